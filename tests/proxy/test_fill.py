"""The fill engine, its readers and file serving, over real sockets against the stand-in Hub: the promises P1 to P4, P8, P11."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from nearhub.fill import Patience
from nearhub.planner import READ_AHEAD
from nearhub.release import FOOTER, RESERVE, TAIL
from nearhub.store.blobs import BlobStore
from nearhub.wire.headers import BlobId
from nearhub.wire.spans import BLOCK
from tests.hub import LFS, Content, Fault, Hub, Rule
from tests.mirror import Mirror, configure, running

MIB = 1024 * 1024
REPO = "org/m"
PATH = "/org/m/resolve/main/model.bin"
QUICK = Patience(hedge_after_s=0.2, first_backoff_s=0.01)


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that decodes nothing and has one address."""
    async with aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


def publish(hub: Hub, size: int = 48 * MIB, seed: int = 1) -> Content:
    content = Content(size, seed)
    hub.repo(REPO).commit({"model.bin": LFS(content), "config.json": b'{"a": 1}\n'})
    return content


def blob_of(content: Content) -> BlobId:
    return BlobId.from_etag(content.sha256)


def is_complete(mirror: Mirror, content: Content) -> bool:
    return mirror.fills.store.path_of(blob_of(content)).exists()


async def get(client: aiohttp.ClientSession, url: str, **headers: str) -> tuple[int, bytes]:
    """(status, body); aiohttp.ClientPayloadError or a connection error when the body was cut."""
    async with client.get(url, headers=headers) as response:
        return response.status, await response.read()


async def get_range(client: aiohttp.ClientSession, url: str, start: int, stop: int) -> bytes:
    status, body = await get(client, url, Range=f"bytes={start}-{stop - 1}")
    assert status == 206
    return body


async def read_until_cut(client: aiohttp.ClientSession, url: str, **headers: str) -> tuple[int, bytes, bool]:
    """(status, the bytes that came, whether the body ended as announced)."""
    got = bytearray()
    try:
        async with client.get(url, headers=headers) as response:
            async for chunk in response.content.iter_any():
                got += chunk
    except aiohttp.ClientError:
        return 0, bytes(got), False
    return response.status, bytes(got), len(got) == response.content_length


# — P2, P3: once over the WAN, streamed while filling ————————————————————————————————————————————————


async def test_one_cold_get_costs_the_file_once_and_the_next_costs_nothing(
    hub: Hub, mirror: Mirror, client: aiohttp.ClientSession
) -> None:
    """Cold: exactly the file's bytes from the CDN; warm: not one request to anybody."""
    content = publish(hub)
    status, body = await get(client, mirror.url + PATH)
    assert (status, hashlib.sha256(body).hexdigest()) == (200, content.sha256)
    assert hub.counters.bytes("cdn") == content.size
    hub.counters.reset()
    status, body = await get(client, mirror.url + PATH)
    assert (status, hashlib.sha256(body).hexdigest()) == (200, content.sha256)
    assert hub.counters.requests() == 0


async def test_many_clients_of_any_mix_share_one_fill(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """30 whole GETs and ranges of one cold file: every byte right, upstream sends the file once."""
    content = publish(hub, 64 * MIB)
    hub.cap(total=200 * MIB)
    spans = [(i * 3 * MIB + 17, i * 3 * MIB + 4 * MIB + 5) for i in range(20)]
    wholes = [get(client, mirror.url + PATH) for _ in range(10)]
    ranges = [get_range(client, mirror.url + PATH, start, stop) for start, stop in spans]
    bodies, parts = await asyncio.gather(asyncio.gather(*wholes), asyncio.gather(*ranges))
    assert {hashlib.sha256(body).hexdigest() for _, body in bodies} == {content.sha256}
    assert parts == [content.bytes(start, stop) for start, stop in spans]
    assert hub.counters.bytes("cdn") <= content.size + BLOCK


async def test_a_new_commit_with_the_same_content_costs_no_bytes(
    hub: Hub, mirror: Mirror, client: aiohttp.ClientSession
) -> None:
    """The same blob in another repo, path and commit is served from the store."""
    content = publish(hub, 20 * MIB)
    await get(client, mirror.url + PATH)
    hub.repo("datasets-org/other", kind="datasets").commit({"copy.bin": LFS(content)})
    hub.counters.reset()
    status, body = await get(client, f"{mirror.url}/datasets/datasets-org/other/resolve/main/copy.bin")
    assert status == 200 and hashlib.sha256(body).hexdigest() == content.sha256
    assert hub.counters.bytes("cdn") == 0


async def test_readers_follow_a_fill_byte_by_byte(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """While upstream stands still in mid-block, everything it sent so far has reached two clients already."""
    content = publish(hub)
    rule = hub.faults.add(Fault.stall(at=BLOCK + 12_345), on="cdn")
    async with client.get(mirror.url + PATH) as first, client.get(mirror.url + PATH) as second:
        for response in (first, second):
            assert await response.content.readexactly(BLOCK + 12_345) == content.bytes(0, BLOCK + 12_345)
        rule.release()
        for response in (first, second):
            assert await response.content.read() == content.bytes(BLOCK + 12_345)
    assert hub.counters.bytes("cdn") <= content.size + BLOCK


async def test_a_far_range_is_fetched_at_once_and_costs_at_most_a_block_more(
    hub: Hub, tmp_path: Path, client: aiohttp.ClientSession
) -> None:
    """While every bulk connection there is stands still, a range near the end comes through by its own lane."""
    content = publish(hub, 200 * MIB)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_CONNECTIONS="4", FILL_CONNECTIONS="2")
    rule = hub.faults.add(Fault.stall(after=MIB), on="cdn", times=2)
    async with running(config, Patience(hedge_after_s=60)) as mirror, client.get(mirror.url + PATH) as whole:
        assert await whole.content.readexactly(MIB) == content.bytes(0, MIB)
        await hub.until(lambda: rule.stalled == 2)
        start = 150 * MIB + 1000
        assert await get_range(client, mirror.url + PATH, start, start + 1000) == content.bytes(start, start + 1000)
        assert rule.stalled == 2
        rule.release()
        assert await whole.content.read() == content.bytes(MIB)
        assert hub.counters.bytes("cdn") <= content.size + BLOCK


async def test_a_tail_range_of_a_cold_file_costs_at_most_one_block(
    hub: Hub, mirror: Mirror, client: aiohttp.ClientSession
) -> None:
    """1 KiB at the end of a cold 100 MiB file, as parquet and GGUF readers ask for: no more than its block crosses."""
    content = publish(hub, 100 * MIB)
    async with client.get(mirror.url + PATH, headers={"Range": "bytes=-1024"}) as response:
        assert response.status == 206 and "detail=unverified" in response.headers["Cache-Status"]
        assert await response.read() == content.bytes(content.size - 1024)
    assert hub.counters.bytes("cdn") <= BLOCK


async def test_a_range_wants_itself_and_32_mib_beyond(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """A reader that stays brings its span and the read-ahead, and no more."""
    content = publish(hub, 200 * MIB)
    rule = hub.faults.add(Fault.stall(at=8 * MIB), on="cdn", times=1)
    async with client.get(mirror.url + PATH, headers={"Range": f"bytes=0-{9 * MIB - 1}"}) as response:
        await response.content.readexactly(MIB)
        # The stalled block is the only one missing of [0, 9 + 32 MiB), rounded up to a block.
        expected = -(-(9 * MIB + READ_AHEAD) // BLOCK) * BLOCK
        rule.release()
        await response.content.read()
        await hub.until(lambda: hub.active("cdn") == 0)
    assert hub.counters.bytes("cdn") <= expected
    assert content.size > expected


# — P1: verified before the last byte ————————————————————————————————————————————————————————————————


async def test_a_quick_blob_with_a_wrong_byte_never_leaves(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """A blob that completes within 2 s is verified before its first byte: the client hears 502, not one byte of it."""
    publish(hub, 4 * MIB)
    hub.cap(total=8 * MIB)
    hub.faults.add(Fault.corrupt(at=100), on="cdn")
    async with client.get(mirror.url + PATH) as response:
        assert response.status == 502
        assert "wrong bytes" in (await response.json())["error"]


async def stream_until_hold(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> tuple[bytes, bool]:
    """Read a whole file that upstream sends slowly enough to be streamed; the bytes, and whether it was complete."""
    _, body, complete = await read_until_cut(client, mirror.url + PATH)
    return body, complete


@pytest.mark.parametrize("at", [1000, 20 * MIB, 40 * MIB - 10])
async def test_a_streamed_blob_with_a_wrong_byte_is_cut_before_its_tail(
    hub: Hub, mirror: Mirror, client: aiohttp.ClientSession, at: int
) -> None:
    """Wherever the byte is wrong: the last 64 KiB are withheld, the connection is cut, it is recorded, the next is right."""
    content = publish(hub, 40 * MIB)
    hub.cap(total=14 * MIB)
    hub.faults.add(Fault.corrupt(at=at), on="cdn")
    body, complete = await stream_until_hold(hub, mirror, client)
    assert not complete and 0 < len(body) <= content.size - TAIL
    store = mirror.fills.store
    await mirror.settled()
    assert (store.root / "quarantine" / str(blob_of(content)) / "mismatch.json").exists()
    assert not is_complete(mirror, content)
    hub.faults.clear()
    hub.cap()
    status, body = await get(client, mirror.url + PATH)
    assert status == 200 and hashlib.sha256(body).hexdigest() == content.sha256


async def test_after_a_mismatch_a_resume_is_never_joined_to_wrong_bytes(
    hub: Hub, mirror: Mirror, client: aiohttp.ClientSession
) -> None:
    """P1b: an open range gets the whole blob where the client then restarts, 412 elsewhere; closed ranges 412 for this one."""
    content = publish(hub, 40 * MIB)
    hub.cap(total=14 * MIB)
    hub.faults.add(Fault.corrupt(at=1000), on="cdn")
    await stream_until_hold(hub, mirror, client)
    await mirror.settled()
    hub.faults.clear()
    hub.cap()
    url = mirror.url + PATH
    hf_status, hf_body = await get(client, url, Range="bytes=1000-", **{"User-Agent": "x; hf_hub/2.4.0; python/3.11"})
    assert hf_status == 200 and hashlib.sha256(hf_body).hexdigest() == content.sha256
    assert (await get(client, url, Range="bytes=1000-", **{"User-Agent": "Wget/1.21.3"}))[0] == 412
    assert (await get(client, url, Range="bytes=1000-1999"))[0] == 412
    assert (await get(client, url, Range="bytes=1000-", **{"If-Range": f'"{content.sha256}"'}))[0] == 200


async def test_the_memory_of_a_mismatch_survives_a_restart(hub: Hub, tmp_path: Path, client: aiohttp.ClientSession) -> None:
    """The record is on disk, with the readers: a restarted mirror is as careful."""
    content = publish(hub, 40 * MIB)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host])
    hub.cap(total=14 * MIB)
    hub.faults.add(Fault.corrupt(at=1000), on="cdn")
    async with running(config) as mirror:
        await stream_until_hold(hub, mirror, client)
        await mirror.settled()
    hub.faults.clear()
    hub.cap()
    async with running(config) as mirror:
        assert (await get(client, mirror.url + PATH, Range="bytes=5-9"))[0] == 412
        status, body = await get(client, mirror.url + PATH)
        assert status == 200 and hashlib.sha256(body).hexdigest() == content.sha256


async def test_repeated_mismatches_are_not_downloaded_again_at_once(
    hub: Hub, mirror: Mirror, client: aiohttp.ClientSession
) -> None:
    """After the second failure in a row the blob is left alone for a while: a clear 502, no byte from upstream."""
    publish(hub, 4 * MIB)
    hub.faults.add(Fault.corrupt(at=100), on="cdn")
    for _ in range(2):
        assert (await get(client, mirror.url + PATH))[0] == 502
    hub.counters.reset()
    status, body = await get(client, mirror.url + PATH)
    assert status == 502 and b"the next try is in" in body
    assert hub.counters.bytes("cdn") == 0


# — P1a: footers ————————————————————————————————————————————————————————————————————————————————


async def test_footers_pass_until_the_budget_is_spent(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """An address may have 8 MiB in all of an unverified blob's tail; what is beyond that waits for verification."""
    content = publish(hub, 64 * MIB)
    stall = hub.faults.add(Fault.stall(at=MIB), on="cdn", match="model.bin")
    url, end = mirror.url + PATH, content.size
    for start, stop in [(end - 3 * MIB, end), (end - 6 * MIB, end - 3 * MIB)]:
        assert await get_range(client, url, start, stop) == content.bytes(start, stop)
    waiting = asyncio.ensure_future(get_range(client, url, end - 12 * MIB, end - 6 * MIB))
    await hub.until(lambda: stall.stalled > 0)
    assert not waiting.done()
    ledger = mirror.fills.ledger(blob_of(content), "127.0.0.1", known_streamer=False)
    assert ledger.has_tail and ledger.sent <= FOOTER + RESERVE
    stall.release()
    assert await waiting == content.bytes(end - 12 * MIB, end - 6 * MIB)
    await mirror.settled()
    assert is_complete(mirror, content)


async def test_parallel_closed_ranges_cannot_finish_an_unverified_blob(
    hub: Hub, mirror: Mirror, client: aiohttp.ClientSession
) -> None:
    """As aria2c -x16 asks: of a corrupt file, no set of answers holds every byte."""
    content = publish(hub, 64 * MIB)
    hub.cap(total=20 * MIB)
    hub.faults.add(Fault.corrupt(at=5 * MIB), on="cdn")
    headers = [{"Range": f"bytes={i * 4 * MIB}-{(i + 1) * 4 * MIB - 1}"} for i in range(16)]
    answers = await asyncio.gather(*(read_until_cut(client, mirror.url + PATH, **header) for header in headers))
    got = sum(len(body) for _, body, _ in answers if body)
    assert got <= content.size - TAIL
    assert not all(complete for _, _, complete in answers)


# — P4: a fill outlives its client, a dropped connection, the process ————————————————————————————————————


async def test_a_fill_outlives_its_only_client(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """A client that leaves after the first bytes: the fill completes alone, and the next client costs nothing."""
    content = publish(hub)
    rule = hub.faults.add(Fault.stall(at=5 * MIB), on="cdn", times=1)
    async with client.get(mirror.url + PATH) as response:
        await response.content.readexactly(4 * MIB)
        response.close()
    rule.release()
    await mirror.settled()
    assert is_complete(mirror, content)
    assert hub.counters.bytes("cdn") <= content.size + BLOCK


async def test_an_orphan_over_the_limit_stops_and_keeps_its_blocks(
    hub: Hub, tmp_path: Path, client: aiohttp.ClientSession
) -> None:
    """More missing than orphan_limit, less than half there: the fill ends with the blocks in flight; the next one has them."""
    content = publish(hub, 128 * MIB)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], FILL_ORPHAN_LIMIT="16MiB", FILL_CONNECTIONS="2")
    hub.cap(total=20 * MIB)
    async with running(config) as mirror:
        async with client.get(mirror.url + PATH) as response:
            await response.content.readexactly(9 * MIB)
            response.close()
        await mirror.settled()
        sent = hub.counters.bytes("cdn")
        assert sent < content.size // 2
        assert not is_complete(mirror, content)
        hub.cap()
        status, body = await get(client, mirror.url + PATH)
        assert status == 200 and hashlib.sha256(body).hexdigest() == content.sha256
        assert hub.counters.bytes("cdn") <= content.size + 2 * BLOCK


async def test_a_partial_blob_is_continued_after_a_restart(hub: Hub, tmp_path: Path, client: aiohttp.ClientSession) -> None:
    """What one process synced the next one has: refetched are at most the blocks in flight."""
    content = publish(hub, 128 * MIB)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], FILL_CONNECTIONS="4")
    hub.faults.add(Fault.stall(at=64 * MIB + 100), on="cdn")
    async with running(config) as mirror, client.get(mirror.url + PATH) as response:
        await response.content.readexactly(50 * MIB)
    before = hub.counters.bytes("cdn")
    hub.faults.clear()
    async with running(config) as mirror:
        status, body = await get(client, mirror.url + PATH)
    assert status == 200 and hashlib.sha256(body).hexdigest() == content.sha256
    assert before > 50 * MIB
    assert hub.counters.bytes("cdn") <= content.size + 4 * BLOCK


async def test_upstream_gone_gives_504_before_headers_never_a_short_200(
    hub: Hub, tmp_path: Path, client: aiohttp.ClientSession
) -> None:
    """With the first half cached and upstream dead, a whole GET is refused cleanly; a range of what is there is served."""
    content = publish(hub, 128 * MIB)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], FILL_CONNECTIONS="1")
    hub.faults.add(Fault.stall(at=64 * MIB + 100), on="cdn")
    async with running(config) as mirror, client.get(mirror.url + PATH) as response:
        await response.content.readexactly(60 * MIB)
    await hub.stop()
    async with running(config, QUICK) as mirror:
        status, body = await get(client, mirror.url + PATH)
        assert status == 504 and b"cannot be reached" in body
        assert (await get(client, mirror.url + PATH, Range=f"bytes={40 * MIB}-{70 * MIB}"))[0] == 504
        assert await get_range(client, mirror.url + PATH, MIB, 2 * MIB) == content.bytes(MIB, 2 * MIB)


# — faults that the engine rides out —————————————————————————————————————————————————————————————————


RIDDEN_OUT = {
    "dropped every 3 MiB": (Fault.drop_every(3 * MIB), None),
    "reset": (Fault.reset(after=MIB), 6),
    "truncated": (Fault.truncate(after=MIB), 6),
    "503": (Fault.status(503), 3),
    "expired signature": (Fault.expired(), 3),
    "ranges ignored": (Fault.ignore_range(), None),
    "Content-Range off": (Fault.shift_range(7), 3),
    "another total": (Fault.wrong_total(999), 3),
    "overrun": (Fault.overrun(100), 3),
    "overrun, announced": (Fault.overrun(100, announced=True), 3),
    "HTML with 200": (Fault.html_200(), 3),
    "another ETag midway": (Fault.other_etag(), 3),
}


@pytest.mark.parametrize(("fault", "times"), RIDDEN_OUT.values(), ids=RIDDEN_OUT.keys())
async def test_a_fault_that_passes_is_not_seen_by_the_client(
    hub: Hub, tmp_path: Path, client: aiohttp.ClientSession, fault: Fault, times: int | None
) -> None:
    """One client, one answer, right bytes: retried from where it broke, at another place, or by another way."""
    content = publish(hub, 40 * MIB)
    rule = hub.faults.add(fault, on="cdn", times=times, after=1 if times else 0)
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host]), QUICK) as mirror:
        status, body = await get(client, mirror.url + PATH)
    assert status == 200 and hashlib.sha256(body).hexdigest() == content.sha256
    assert rule.hits > 0


async def test_a_silent_span_is_asked_for_again_elsewhere(hub: Hub, tmp_path: Path, client: aiohttp.ClientSession) -> None:
    """One connection stands still for ever: after hedge_after_s its span comes by another one, and the client is done."""
    content = publish(hub, 40 * MIB)
    rule: Rule = hub.faults.add(Fault.stall(at=MIB), on="cdn", times=1)
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host]), QUICK) as mirror:
        status, body = await get(client, mirror.url + PATH)
        assert status == 200 and hashlib.sha256(body).hexdigest() == content.sha256
        assert rule.hits == 1
        assert mirror.metrics.upstream_requests.labels("hedge")._value.get() >= 1


async def test_a_dripping_connection_is_given_up(hub: Hub, tmp_path: Path, client: aiohttp.ClientSession) -> None:
    """Bytes that come below the least rate for a whole window end the request; the next one brings the rest."""
    content = publish(hub, 20 * MIB)
    rule = hub.faults.add(Fault.drip(2000), on="cdn", times=1)
    patience = Patience(hedge_after_s=60, min_rate=100_000, rate_window_s=0.5, first_backoff_s=0.01)
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host]), patience) as mirror:
        status, body = await get(client, mirror.url + PATH)
    assert status == 200 and hashlib.sha256(body).hexdigest() == content.sha256
    assert rule.hits == 1


async def test_a_busy_upstream_is_passed_on_with_its_retry_after(
    hub: Hub, mirror: Mirror, client: aiohttp.ClientSession
) -> None:
    """429 with a long Retry-After: the client that needs upstream hears it; upstream is not asked again."""
    publish(hub)
    hub.faults.add(Fault.status(429, {"Retry-After": "120"}), on="cdn")
    async with client.head(mirror.url + PATH) as response:
        assert response.status == 200
    async with client.get(mirror.url + PATH) as response:
        assert response.status == 429 and 100 <= int(response.headers["Retry-After"]) <= 120
    hub.counters.reset()
    assert (await get(client, mirror.url + PATH))[0] == 429
    assert hub.counters.requests("cdn") == 0


async def test_short_pauses_that_upstream_asks_for_are_no_failures(
    hub: Hub, tmp_path: Path, client: aiohttp.ClientSession
) -> None:
    """More 429s in a row than failures are borne, each of a moment: the fill waits as long as it was told, and goes on."""
    content = publish(hub, 4 * MIB)
    patience = Patience(first_backoff_s=0.01, strikes=1, strikes_unproved=1)
    rule = hub.faults.add(Fault.status(429, {"Retry-After": "0"}), on="cdn", times=4)
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host]), patience) as mirror:
        status, body = await get(client, mirror.url + PATH)
    assert status == 200 and hashlib.sha256(body).hexdigest() == content.sha256
    assert rule.hits == 4


async def test_another_answer_for_the_same_commit_is_an_alarm_not_an_update(
    hub: Hub, tmp_path: Path, client: aiohttp.ClientSession
) -> None:
    """P11: what a path is at a commit was recorded; when the Hub's tree says otherwise later, the record stands."""
    content = publish(hub, 4 * MIB)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="1ms")
    async with running(config) as mirror:
        await get(client, mirror.url + PATH)
        hub.faults.add(Fault.other_file("model.bin", Content(4 * MIB, 99)), on="hub")
        async with client.get(f"{mirror.url}/api/models/org/m/tree/main") as response:
            [model] = [item for item in await response.json() if item["path"] == "model.bin"]
            assert model["lfs"]["oid"] == content.sha256
        async with client.head(mirror.url + PATH) as response:
            assert response.headers["ETag"] == f'"{content.sha256}"'
        status, body = await get(client, mirror.url + PATH)
        assert status == 200 and hashlib.sha256(body).hexdigest() == content.sha256
        assert mirror.metrics.alarms._value.get() > 0  # one each time it is heard


async def test_a_fill_always_has_its_last_word(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """A thread that ends just as the fill waits for its threads must not leave a fill that everybody waits for."""
    publish(hub, 4 * MIB)
    stall = hub.faults.add(Fault.stall(at=MIB), on="cdn")
    async with client.get(mirror.url + PATH) as response:
        await hub.until(lambda: stall.stalled > 0)
        await response.content.readexactly(1000)
        (fill,) = mirror.fills.running
        await fill._quiet()
        ending: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        fill._io.add(ending)
        ending.add_done_callback(fill._io.discard)
        ending.set_result(None)
        await fill._quiet()
        stall.release()
        assert response.status == 200


# — nothing is left behind —————————————————————————————————————————————————————————————————————————————


async def test_no_task_and_no_descriptor_is_left(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """After clients that stay, leave and fail: as many open files and fills as before."""
    publish(hub, 24 * MIB)
    await get(client, f"{mirror.url}/org/m/resolve/main/config.json")
    process = psutil.Process()
    store = str(mirror.fills.store.root)
    for _ in range(3):
        async with client.get(mirror.url + PATH) as response:
            await response.content.readexactly(1000)
            response.close()
    await get(client, mirror.url + PATH)
    await mirror.settled()
    held = [file.path for file in process.open_files() if file.path.startswith((f"{store}/partial", f"{store}/blobs"))]
    assert held == []


async def test_the_store_on_disk_is_ordinary_files(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """P9: a complete blob is a read-only file named by its hash, LFS and plain."""
    content = publish(hub, 4 * MIB)
    await get(client, mirror.url + PATH)
    await get(client, f"{mirror.url}/org/m/resolve/main/config.json")
    await mirror.settled()
    store: BlobStore = mirror.fills.store
    path = store.path_of(blob_of(content))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert path.stat().st_mode & 0o777 == 0o444
    plain = b'{"a": 1}\n'
    sha1 = hashlib.sha1(b"blob %d\0" % len(plain) + plain).hexdigest()
    assert store.path_of(BlobId.from_etag(sha1)).read_bytes() == plain
