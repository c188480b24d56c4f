"""Each scripted fault does what it says: seen by a client that reads the connection to its end."""

from __future__ import annotations

import json
import re

import pytest

from tests.hub import LFS, Content, Fault, Hub, Rule
from tests.hub.raw_client import Answer, again, ask, fetch

SIZE = 3_000_000
CONTENT = Content(SIZE, seed=9)


@pytest.fixture
async def url(hub: Hub) -> str:
    """The CDN's URL of an LFS file."""
    hub.repo("org/m").commit({"sub/model.bin": LFS(CONTENT), "a.txt": b"hello"})
    return (await fetch(f"{hub.url}/org/m/resolve/main/sub/model.bin", "HEAD")).headers["location"]


async def part(url: str, start: int, stop: int) -> Answer:
    return await fetch(url, headers={"Range": f"bytes={start}-{stop - 1}"})


def is_honest(answer: Answer, start: int = 0, stop: int = SIZE) -> bool:
    return answer.body == CONTENT.bytes(start, stop) and int(answer.headers["content-length"]) == stop - start


async def test_status_comes_as_often_as_told_and_not_before(hub: Hub, url: str) -> None:
    rule = hub.faults.add(Fault.status(503, {"Retry-After": "7"}, b"busy"), on="cdn", times=2, after=1)
    answers = [await fetch(url) for _ in range(4)]
    assert [one.status for one in answers] == [200, 503, 503, 200]
    assert (answers[1].headers["retry-after"], answers[1].body, rule.hits) == ("7", b"busy", 2)
    assert [one.fault for one in hub.log.find("cdn")] == ["", "status", "status", ""]


async def test_origin_method_and_path_select_and_the_first_match_wins(hub: Hub, url: str) -> None:
    hub.faults.add(Fault.status(500), on="cdn", match="other.bin")
    hub.faults.add(Fault.status(501), on="hub", method="HEAD")
    hub.faults.add(Fault.status(502), match=re.compile(r"org/m/sub/model\.bin$"))
    last = hub.faults.add(Fault.status(503))
    assert (await fetch(url)).status == 502
    assert (await fetch(f"{hub.url}/org/m/resolve/main/a.txt", "HEAD")).status == 501
    assert (await fetch(f"{hub.url}/org/m/resolve/main/a.txt")).status == 503
    last.remove()
    assert (await fetch(f"{hub.url}/org/m/resolve/main/a.txt")).status == 307
    hub.faults.clear()
    assert (await fetch(url)).status == 200


async def test_a_captcha_is_html_with_200(hub: Hub, url: str) -> None:
    hub.faults.add(Fault.html_200(), on="cdn")
    got = await fetch(url)
    assert (got.status, got.headers["content-type"]) == (200, "text/html; charset=utf-8")


async def test_an_expired_signature_is_403_in_xml(hub: Hub, url: str) -> None:
    hub.faults.add(Fault.expired(), on="cdn", times=1)
    got = await fetch(url)
    assert (got.status, b"<Error>" in got.body) == (403, True)
    assert is_honest(await fetch(url))


async def test_reset_instead_of_an_answer_and_in_the_middle(hub: Hub, url: str) -> None:
    hub.faults.add(Fault.reset(), times=1)
    assert (await fetch(url)).was_reset
    hub.faults.add(Fault.reset(after=1000), times=1)
    got = await fetch(url)
    assert (got.status, got.was_reset, got.headers["content-length"]) == (200, True, str(SIZE))
    assert [(one.sent, one.aborted) for one in hub.log.find("cdn")] == [(0, False), (1000, False)]


async def test_truncate_at_an_offset_hits_only_answers_that_contain_it(hub: Hub, url: str) -> None:
    rule = hub.faults.add(Fault.truncate(1_500_000), on="cdn")
    got = await fetch(url)
    assert (got.headers["content-length"], got.body) == (str(SIZE), CONTENT.bytes(0, 1_500_000))
    assert is_honest(await part(url, 0, 1_500_000), 0, 1_500_000)
    assert is_honest(await part(url, 1_500_001, SIZE), 1_500_001)
    assert (await part(url, 1_500_000, SIZE)).body == b""
    assert rule.hits == 2
    assert hub.counters.bytes("cdn") == 1_500_000 + 1_500_000 + 1_499_999


async def test_truncate_after_so_many_bytes_of_the_answer(hub: Hub, url: str) -> None:
    hub.faults.add(Fault.truncate(after=10), on="cdn")
    got = await part(url, 100, 200)
    assert (got.status, got.headers["content-length"], got.body) == (206, "100", CONTENT.bytes(100, 110))
    assert is_honest(await part(url, 100, 110), 100, 110)


async def test_json_can_be_truncated_too(hub: Hub, url: str) -> None:
    hub.faults.add(Fault.truncate(after=20), on="hub", match="/api/")
    got = await fetch(f"{hub.url}/api/models/org/m")
    assert len(got.body) == 20 < int(got.headers["content-length"])


async def test_corrupt_flips_one_byte_of_the_file_whatever_the_range(hub: Hub, url: str) -> None:
    rule = hub.faults.add(Fault.corrupt(at=1_000_000), on="cdn")
    for start, stop in ((0, SIZE), (1_000_000, 1_000_001), (999_000, 1_001_000)):
        got = (await part(url, start, stop)).body
        truth = CONTENT.bytes(start, stop)
        assert [start + at for at in range(len(truth)) if truth[at] != got[at]] == [1_000_000]
    assert is_honest(await part(url, 0, 1_000_000), 0, 1_000_000)
    assert rule.hits == 3


async def test_stall_sends_up_to_the_offset_and_waits_for_release(hub: Hub, url: str) -> None:
    rule = hub.faults.add(Fault.stall(1_000_000), on="cdn")
    conversation = await ask(url)
    await conversation.head()
    assert await conversation.reader.readexactly(1_000_000) == CONTENT.bytes(0, 1_000_000)
    await hub.until(lambda: rule.stalled == 1)
    assert (hub.counters.bytes("cdn"), hub.active("cdn")) == (1_000_000, 1)
    rule.release()
    assert await conversation.reader.read(-1) == CONTENT.bytes(1_000_000)
    await conversation.close()


async def test_a_stalled_client_that_leaves_is_noticed(hub: Hub, url: str) -> None:
    rule = hub.faults.add(Fault.stall(after=5), on="cdn")
    conversation = await ask(url)
    await hub.until(lambda: rule.stalled == 1)
    await conversation.close()
    await hub.until(lambda: hub.active("cdn") == 0)
    assert (hub.log[-1].aborted, hub.log[-1].sent, rule.stalled) == (True, 5, 0)


async def test_drip_sends_everything_in_small_pieces(hub: Hub, url: str) -> None:
    rule = hub.faults.add(Fault.drip(100_000), on="cdn")
    assert is_honest(await part(url, 0, 5_000), 0, 5_000)
    assert rule.hits == 1


async def test_latency_only_delays(hub: Hub, url: str) -> None:
    hub.faults.add(Fault.latency(0.01), on="cdn")
    assert is_honest(await fetch(url))


async def test_drop_every_counts_per_connection(hub: Hub, url: str) -> None:
    """Two requests on one connection share its allowance; a new connection has its own."""
    hub.faults.add(Fault.drop_every(1000), on="cdn")
    for _ in range(2):
        conversation = await ask(url, headers={"Range": "bytes=0-699"}, keep=True)
        await conversation.head()
        assert await conversation.reader.readexactly(700) == CONTENT.bytes(0, 700)
        await again(conversation, url, headers={"Range": "bytes=700-1399"})
        assert (await conversation.head())[1]["content-length"] == "700"
        assert await conversation.reader.read(-1) == CONTENT.bytes(700, 1000)
        await conversation.close()


async def test_overrun_sends_bytes_nobody_announced(hub: Hub, url: str) -> None:
    hub.faults.add(Fault.overrun(7), on="cdn")
    got = await part(url, 10, 20)
    assert (got.headers["content-length"], got.body) == ("10", CONTENT.bytes(10, 20) + b"!" * 7)


async def test_overrun_can_be_announced(hub: Hub, url: str) -> None:
    hub.faults.add(Fault.overrun(7, announced=True), on="cdn")
    got = await part(url, 10, 20)
    assert (got.headers["content-length"], got.headers["content-range"]) == ("17", f"bytes 10-26/{SIZE}")
    assert got.body == CONTENT.bytes(10, 20) + b"!" * 7


async def test_ignore_range_hits_only_range_requests(hub: Hub, url: str) -> None:
    rule = hub.faults.add(Fault.ignore_range(), on="cdn")
    got = await part(url, 5, 10)
    assert (got.status, is_honest(got)) == (200, True)
    await fetch(url)
    assert rule.hits == 1


async def test_other_etag_makes_if_range_fail(hub: Hub, url: str) -> None:
    other = Content(SIZE, seed=10)
    etag = (await fetch(url, "HEAD")).headers["etag"]
    resume = {"Range": "bytes=5-9", "If-Range": etag}
    assert (await fetch(url, headers=resume)).status == 206
    hub.faults.add(Fault.other_etag(other), on="cdn", after=1)
    assert (await fetch(url, headers=resume)).status == 206
    changed = await fetch(url, headers=resume)
    assert (changed.status, changed.body) == (200, other.bytes())
    assert len(changed.headers["etag"]) == len(etag)
    assert changed.headers["etag"] != etag


async def test_shifted_range_and_wrong_total_lie_in_the_header_only(hub: Hub, url: str) -> None:
    hub.faults.add(Fault.shift_range(3), on="cdn", times=1)
    hub.faults.add(Fault.wrong_total(99), on="cdn", times=1)
    assert is_honest(await fetch(url))
    ranges = []
    for _ in range(3):
        got = await part(url, 10, 20)
        assert is_honest(got, 10, 20)
        ranges.append(got.headers["content-range"])
    assert ranges == [f"bytes 13-22/{SIZE}", "bytes 10-19/99", f"bytes 10-19/{SIZE}"]


async def test_wrong_commit_is_a_header(hub: Hub, url: str) -> None:
    hub.faults.add(Fault.wrong_commit(), on="hub", match="/resolve/")
    assert (await fetch(f"{hub.url}/org/m/resolve/main/a.txt", "HEAD")).headers["x-repo-commit"] == "f" * 40


async def test_other_file_violates_a_commit_everywhere_alike(hub: Hub, url: str) -> None:
    other = Content(12345, seed=1)
    commit = hub.repo("org/m").refs["refs/heads/main"]
    hub.faults.add(Fault.other_file("sub/model.bin", other))
    got = await fetch(f"{hub.url}/org/m/resolve/{commit}/sub/model.bin")
    assert (got.headers["x-linked-size"], got.headers["x-linked-etag"]) == ("12345", f'"{other.sha256}"')
    assert (await fetch(got.headers["location"])).body == other.bytes()
    info = json.loads((await fetch(f"{hub.url}/api/models/org/m/revision/{commit}?blobs=true")).body)
    tree = json.loads((await fetch(f"{hub.url}/api/models/org/m/tree/{commit}/sub")).body)
    assert info["siblings"][1]["lfs"]["sha256"] == tree[0]["lfs"]["oid"] == other.sha256
    assert info["sha"] == commit
    hub.faults.clear()
    assert is_honest(await fetch(url))


@pytest.mark.parametrize(
    "fault",
    [
        Fault.status(503, {"A": "b"}, b"\x00\xff"),
        Fault.truncate(5),
        Fault.other_etag(Content(5, 6)),
        Fault.other_file("a", b"\xff"),
        Fault.overrun(3, announced=True),
        Fault.latency(0.5),
    ],
)
def test_faults_survive_json(fault: Fault) -> None:
    assert Fault.from_json(json.loads(json.dumps(fault.to_json()))) == fault


async def test_removing_a_rule_twice_is_harmless(hub: Hub) -> None:
    rule: Rule = hub.faults.add(Fault.status(500))
    rule.remove()
    rule.remove()
    assert hub.faults.rules == []
