"""`…/info/lfs/…` and `/-/lfs/…` over real sockets: what is asked of the stand-in Hub, and what nobody gets."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDictProxy
from yarl import URL

from nearhub.fill import Patience
from nearhub.wire.lfs import MEDIA_TYPE, Wanted, question, signed_link
from nearhub.wire.target import LfsTarget, RepoKind
from nearhub.wire.target import Repo as Name
from tests.hub import LFS, Content, Fault, Hub, Repo
from tests.mirror import Mirror, configure, running

WEIGHTS = Content(300_000, seed=1)
OLD = Content(200_000, seed=2)
FOREIGN = Content(1000, seed=3)
BATCH = "info/lfs/objects/batch"
QUICK = Patience(first_backoff_s=0.01, strikes=2, strikes_unproved=1)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()


@dataclass(frozen=True)
class Asker:
    """A client of the mirror. Nothing that it is told leads elsewhere."""

    session: aiohttp.ClientSession
    hub: Hub
    mirror: Mirror

    async def __call__(self, path: str, method: str = "GET", **more: Any) -> Answer:
        url = path if path.startswith("http") else self.mirror.url + path
        async with self.session.request(method, URL(url, encoded=True), allow_redirects=False, **more) as response:
            answer = Answer(response.status, response.headers, await response.read())
        assert answer.headers["Cache-Status"].startswith("nearhub; ")
        if answer.status >= 400:
            assert (answer.headers["Content-Type"], list(answer.json)) == (f"{MEDIA_TYPE}; charset=utf-8", ["message"])
        if answer.status == 200 and path.endswith(BATCH):
            told = [one["actions"]["download"]["href"] for one in answer.json["objects"] if "actions" in one]
            assert all(href.startswith(f"{self.mirror.url}/-/lfs/") for href in told)
        return answer

    async def batch(self, *objects: Content | tuple[str, int], repo: str = "org/m", **more: Any) -> Answer:
        named = [one if isinstance(one, tuple) else (one.sha256, one.size) for one in objects]
        asked = {"operation": "download", "objects": [{"oid": oid, "size": size} for oid, size in named], **more}
        return await self.post(f"/{repo}.git/{BATCH}", json.dumps(asked).encode())

    async def post(self, path: str, body: bytes = b"{}", **headers: str) -> Answer:
        headers = {"Content-Type": f"{MEDIA_TYPE}; charset=utf-8", "Accept": MEDIA_TYPE, **headers}
        return await self(path, "POST", data=io.BytesIO(body), headers=headers)

    async def links(self, *objects: Content, repo: str = "org/m") -> list[str]:
        """All of them are to be had."""
        answer = await self.batch(*objects, repo=repo)
        assert answer.status == 200
        return [one["actions"]["download"]["href"] for one in answer.json["objects"]]


def codes(answer: Answer) -> list[int]:
    """Of each object of a batch: 0 where it can be had."""
    assert answer.status == 200
    return [one["error"]["code"] if "error" in one else 0 for one in answer.json["objects"]]


def message(answer: Answer, number: int = 0) -> str:
    text = answer.json["objects"][number]["error"]["message"]
    assert isinstance(text, str)
    return text


def batches(hub: Hub) -> int:
    """How often the Hub was asked for one."""
    return hub.counters.requests("hub", match=BATCH)


def age(mirror: Mirror, seconds: float) -> None:
    """Let so much time have passed for all that is known of repos."""
    lfs = mirror.front.lfs
    for owner in (lfs.access, lfs.catalog, lfs.resolver, lfs.resolver._asking):
        owner._clock = lambda: time.time() + seconds  # type: ignore[attr-defined]


@pytest.fixture
def repo(hub: Hub) -> Repo:
    """main has one LFS file; another is in its past only. Somebody else's repo has a third."""
    repo = hub.repo("org/m")
    repo.commit({"model.bin": LFS(OLD)})
    repo.commit({"model.bin": LFS(WEIGHTS), "config.json": b"{}"})
    hub.repo("org/other").commit({"their.bin": LFS(FOREIGN)})
    return repo


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


@pytest.fixture
def ask(session: aiohttp.ClientSession, hub: Hub, mirror: Mirror, repo: Repo) -> Asker:
    return Asker(session, hub, mirror)


class TestBatch:
    async def test_an_object_of_main_costs_what_the_file_costs(self, ask: Asker) -> None:
        """One question for the manifest, no batch upstream, and the file by its resolve URL; then nothing any more."""
        answer = await ask.batch(WEIGHTS, transfers=["basic", "xet"], ref={"name": "refs/heads/main"}, hash_algo="sha256")
        told = answer.json
        assert (told["transfer"], told["hash_algo"], codes(answer)) == ("basic", "sha256", [0])
        one = told["objects"][0]
        assert (one["oid"], one["size"], one["authenticated"]) == (WEIGHTS.sha256, WEIGHTS.size, True)
        assert {key for key in one["actions"]["download"]} == {"href", "expires_in"}
        got = await ask(one["actions"]["download"]["href"])
        assert (got.status, got.sha256, got.headers["ETag"]) == (200, WEIGHTS.sha256, f'"{WEIGHTS.sha256}"')
        assert (batches(ask.hub), ask.hub.counters.bytes("cdn")) == (0, WEIGHTS.size)
        assert len(ask.hub.log.find("hub", match="/api/models")) == 1
        ask.hub.counters.reset()
        [link] = await ask.links(WEIGHTS)
        assert (await ask(link)).sha256 == WEIGHTS.sha256
        assert ask.hub.counters.requests() == 0

    async def test_an_object_of_the_past_is_asked_for_in_that_repos_batch(self, ask: Asker) -> None:
        """All unknown ones in one question, with nobody's token; what is found is remembered, also across a restart."""
        basic = "Basic dXNlcjpoZl9zZWNyZXQ="
        asked = {"operation": "download", "objects": [{"oid": o, "size": s} for o, s in _named(OLD, WEIGHTS, FOREIGN)]}
        answer = await ask.post(f"/org/m/{BATCH}", json.dumps(asked).encode(), Authorization=basic)
        assert codes(answer) == [0, 0, 404]
        [asking] = ask.hub.log.find("hub", match=BATCH)
        assert (asking.header("Accept"), asking.header("Content-Type")) == (MEDIA_TYPE, MEDIA_TYPE)
        assert (await ask(answer.json["objects"][0]["actions"]["download"]["href"])).sha256 == OLD.sha256
        assert [one.header("Authorization") for one in ask.hub.log if one.header("Authorization")] == []
        ask.hub.counters.reset()
        assert codes(await ask.batch(OLD)) == [0]
        assert ask.hub.counters.requests() == 0

    async def test_what_was_proven_outlives_the_process(
        self, session: aiohttp.ClientSession, hub: Hub, repo: Repo, tmp_path: Path
    ) -> None:
        config = configure(tmp_path / "kept", [hub.url], [hub.cdn_host])
        async with running(config) as mirror:
            [link] = await Asker(session, hub, mirror).links(OLD)
            assert (await Asker(session, hub, mirror)(link)).sha256 == OLD.sha256
        await hub.stop()
        async with running(config) as mirror:
            ask = Asker(session, hub, mirror)
            assert codes(await ask.batch(OLD, WEIGHTS)) == [0, 0]
            old_port, new_port = URL(link).port, URL(mirror.url).port
            assert (await ask(link.replace(f":{old_port}/", f":{new_port}/"))).sha256 == OLD.sha256

    async def test_a_commit_that_was_downloaded_is_known_by_its_objects(self, ask: Asker, repo: Repo) -> None:
        """`hf download --revision` of an old commit: its objects are not asked for, and with the Hub gone they are here."""
        old = next(iter(repo.commits))
        assert (await ask(f"/org/m/resolve/{old}/model.bin")).sha256 == OLD.sha256
        await ask.links(WEIGHTS)
        await ask.hub.stop()
        [link] = await ask.links(OLD)
        assert (await ask(link)).sha256 == OLD.sha256
        assert batches(ask.hub) == 0

    async def test_a_branch_that_only_the_client_has_is_no_obstacle(self, ask: Asker) -> None:
        assert codes(await ask.batch(WEIGHTS, ref={"name": "refs/heads/my-own"})) == [0]

    async def test_a_branch_names_its_own_objects(self, ask: Asker, repo: Repo) -> None:
        repo.commit({"more.bin": LFS(FOREIGN)}, "dev")
        assert codes(await ask.batch(FOREIGN, ref={"name": "refs/heads/dev"})) == [0]
        assert batches(ask.hub) == 0

    async def test_another_repos_object_is_refused(self, ask: Asker) -> None:
        """Though it is here, complete: an oid is no permission."""
        [link] = await ask.links(FOREIGN, repo="org/other")
        assert (await ask(link)).status == 200
        refused = await ask.batch(FOREIGN, WEIGHTS)
        assert codes(refused) == [404, 0]
        assert "org/m has no such object" in message(refused)
        assert (await ask(link.replace("org/other", "org/m"))).status == 403

    async def test_a_size_that_is_not_the_objects(self, ask: Asker) -> None:
        """422 where a file proves the true size. Where upstream's batch alone knows, it is asked, and nothing sticks."""
        wrong = await ask.batch((WEIGHTS.sha256, 7), WEIGHTS, (OLD.sha256, 7))
        assert codes(wrong) == [422, 0, 404]
        assert str(WEIGHTS.size) in message(wrong)
        assert codes(await ask.batch(OLD)) == [0]

    async def test_a_hub_that_repeats_any_size_poisons_nothing(self, ask: Asker, repo: Repo) -> None:
        """The wrong size that it agreed to is not served with wrong bytes, and the right one is had afterwards."""
        told = {"oid": OLD.sha256, "size": 7, "actions": {"download": {"href": f"{ask.hub.cdn_url}/x"}}}
        lie = ask.hub.faults.add(Fault.status(200, body=json.dumps({"objects": [told]}).encode()), match=BATCH, times=1)
        agreed = await ask.batch((OLD.sha256, 7))
        assert (codes(agreed), lie.hits) == ([0], 1)
        assert (await ask(agreed.json["objects"][0]["actions"]["download"]["href"])).status == 404
        [link] = await ask.links(OLD)
        assert (await ask(link)).sha256 == OLD.sha256

    async def test_with_the_hub_gone_what_is_known_is_served(self, ask: Asker) -> None:
        """And what is not is refused by itself, in words, at once."""
        await ask.links(WEIGHTS)
        await ask.hub.stop()
        answer = await ask.batch(WEIGHTS, OLD)
        assert codes(answer) == [0, 404]
        assert "upstream cannot be asked" in message(answer, 1)

    async def test_with_the_hub_failing_too(self, ask: Asker) -> None:
        await ask.links(WEIGHTS)
        ask.mirror.front.lfs.dispatcher._absorb_s = 0.0
        ask.hub.faults.add(Fault.status(500), match=BATCH)
        assert codes(await ask.batch(WEIGHTS, OLD)) == [0, 502]

    async def test_a_hub_that_is_busy_says_when_to_come_back(self, ask: Asker) -> None:
        """As the status of a batch of which nothing can be had; otherwise what is here must not wait for it."""
        await ask.links(WEIGHTS)
        ask.hub.faults.add(Fault.status(429, {"Retry-After": "77"}), match=BATCH)
        busy = await ask.batch(OLD)
        assert busy.status == 429 and 70 <= int(busy.headers["Retry-After"]) <= 77
        assert codes(await ask.batch(WEIGHTS, OLD)) == [0, 429]

    async def test_a_crowd_asks_upstream_once(self, ask: Asker) -> None:
        await ask.links(WEIGHTS)
        gate = ask.hub.faults.add(Fault.stall(after=0), match=BATCH)
        asking = [asyncio.ensure_future(ask.batch(OLD)) for _ in range(20)]
        await ask.hub.until(lambda: gate.stalled == 1)
        gate.release()
        assert [codes(answer) for answer in await asyncio.gather(*asking)] == [[0]] * 20
        assert batches(ask.hub) == 1

    @pytest.mark.parametrize("name", ["org/absent", "org/private", "org/gated"])
    async def test_who_brings_no_token_to_what_is_not_public_is_asked_for_one(self, ask: Asker, name: str) -> None:
        for hidden in (ask.hub.repo("org/private", private=True), ask.hub.repo("org/gated", gated=True)):
            hidden.commit({"model.bin": LFS(WEIGHTS)})
        answer = await ask.batch(WEIGHTS, repo=name)
        assert (answer.status, "WWW-Authenticate" in answer.headers) == (401, True)

    async def test_kinds_spellings_and_new_names(self, ask: Asker, repo: Repo) -> None:
        ask.hub.repo("gpt2").commit({"model.bin": LFS(WEIGHTS)})
        ask.hub.repo("org/d", "datasets").commit({"data.bin": LFS(WEIGHTS)})
        repo.rename("org/new")
        for name in ("gpt2", "datasets/org/d", "org/m", "Org/New"):
            [link] = await ask.links(WEIGHTS, repo=name)
            assert (await ask(link)).sha256 == WEIGHTS.sha256
        assert ask.hub.counters.bytes("cdn") == WEIGHTS.size

    async def test_links_are_below_what_the_client_calls_the_mirror(
        self, session: aiohttp.ClientSession, hub: Hub, repo: Repo, tmp_path: Path
    ) -> None:
        async with running(configure(tmp_path / "p", [hub.url], [hub.cdn_host], SERVER_PREFIX="/a/b")) as mirror:
            ask = Asker(session, hub, mirror)
            [link] = await ask.links(WEIGHTS)
            assert link.startswith(f"{mirror.url}/-/lfs/models/org/m/") and mirror.url.endswith("/a/b")
            assert (await ask(link)).sha256 == WEIGHTS.sha256

    async def test_bodies_that_are_too_much_or_none(self, ask: Asker) -> None:
        """All in git-lfs's own words for errors; a packed body is read, as far as it may be long."""
        packed = {"Content-Encoding": "gzip"}
        good = json.dumps({"operation": "download", "objects": []}).encode()
        path = f"/org/m.git/{BATCH}"
        assert (await ask.post(path, gzip.compress(good), **packed)).status == 200
        assert (await ask.post(path, b" " * (4 * 1024**2) + good)).status == 413
        assert (await ask.post(path, gzip.compress(b" " * (50 * 1024**2) + good), **packed)).status == 413
        assert (await ask.post(path, b"{")).status == 422
        assert (await ask(path, "POST", data=good)).status == 422
        assert (await ask(path)).status == 404
        assert (await ask.post(path, b"no gzip at all", **packed)).status == 400

    async def test_nothing_is_written_through_a_mirror(self, ask: Asker) -> None:
        upload = await ask.batch(WEIGHTS, operation="upload")
        assert upload.status == 403 and "read-only" in upload.json["message"]
        for what in ("locks", "locks/1/unlock"):
            assert (await ask.post(f"/org/m.git/info/lfs/{what}")).status == 403
        assert (await ask.post("/org/m.git/info/lfs/locks/verify")).json == {"ours": [], "theirs": [], "next_cursor": ""}
        assert (await ask("/org/m.git/info/lfs/locks?limit=1")).json == {"locks": [], "next_cursor": ""}
        assert ask.hub.counters.requests() == 0


def _wanted(*objects: Content) -> list[Wanted]:
    return [Wanted(one.sha256, one.size) for one in objects]


def _named(*objects: Content) -> list[tuple[str, int]]:
    return [(one.sha256, one.size) for one in objects]


class TestObjects:
    @pytest.mark.parametrize("content", [WEIGHTS, OLD], ids=["by its file", "by upstream's batch"])
    async def test_ranges_are_exact_and_nothing_is_packed(self, ask: Asker, content: Content) -> None:
        """The first one cold; then the whole, HEAD, and what cannot be satisfied."""
        [link] = await ask.links(content)
        size = content.size
        part = await ask(link, headers={"Range": f"bytes=1000-{size - 1}", "Accept-Encoding": "gzip"})
        assert (part.status, part.body) == (206, content.bytes(1000))
        assert part.headers["Content-Range"] == f"bytes 1000-{size - 1}/{size}"
        whole = await ask(link, headers={"Accept-Encoding": "gzip"})
        assert (whole.status, whole.sha256, "Content-Encoding" in whole.headers) == (200, content.sha256, False)
        head = await ask(link, "HEAD")
        assert (head.status, head.headers["Content-Length"], head.body) == (200, str(size), b"")
        past = await ask(link, headers={"Range": f"bytes={size}-"}, method="HEAD")
        assert past.status == 200
        assert (await ask(link, headers={"If-None-Match": f'"{content.sha256}"'}, method="HEAD")).status == 304
        assert ask.hub.counters.bytes("cdn") == size

    async def test_it_is_one_store(self, ask: Asker) -> None:
        """A file that was downloaded is an object that is here, and the reverse."""
        assert (await ask("/org/m/resolve/main/model.bin")).sha256 == WEIGHTS.sha256
        [link] = await ask.links(WEIGHTS)
        assert (await ask(link)).headers["Cache-Status"] == "nearhub; hit"
        [theirs] = await ask.links(FOREIGN, repo="org/other")
        await ask(theirs)
        ask.hub.counters.reset()
        assert (await ask("/org/other/resolve/main/their.bin")).sha256 == FOREIGN.sha256
        assert ask.hub.counters.bytes("cdn") == 0

    async def test_an_old_object_too_large_for_the_cache_passes_through(
        self, session: aiohttp.ClientSession, hub: Hub, repo: Repo, tmp_path: Path
    ) -> None:
        async with running(configure(tmp_path / "small", [hub.url], [hub.cdn_host], CACHE_MAX_SIZE="150KB")) as mirror:
            ask = Asker(session, hub, mirror)
            [link] = await ask.links(OLD)
            got = await ask(link)
            assert (got.sha256, "detail=too-large" in got.headers["Cache-Status"]) == (OLD.sha256, True)

    async def test_a_link_is_signed_and_has_its_time(self, ask: Asker) -> None:
        [link] = await ask.links(WEIGHTS)
        target, secret = LfsTarget(Name(RepoKind.MODELS, "org/m"), WEIGHTS.sha256), ask.mirror.front.lfs.secret
        for until, status in ((int(time.time()) + 60, 200), (int(time.time()) - 1, 403)):
            assert (await ask(signed_link(secret, target, WEIGHTS.size, until, ""))).status == status
        forged = [link[:-1] + ("0" if link[-1] != "0" else "1"), link.partition("?")[0], link.replace("size=3", "size=4")]
        forged += [link.replace(WEIGHTS.sha256, OLD.sha256), signed_link(b"x" * 32, target, WEIGHTS.size, 2**40, "")]
        for bad in forged:
            refused = await ask(bad)
            assert refused.status == 403 and "batch" in refused.json["message"]
        assert (await ask(link, "POST")).status == 405

    async def test_a_repo_that_is_closed_stops(self, ask: Asker, repo: Repo) -> None:
        """Within 60 s, whatever links are about; and it comes back."""
        [link] = await ask.links(WEIGHTS)
        assert (await ask(link)).status == 200
        repo.private = True
        age(ask.mirror, 61)
        assert (await ask(link)).status == 403
        assert (await ask.batch(WEIGHTS)).status == 401

    async def test_an_expired_url_of_upstreams_is_asked_for_again(self, ask: Asker) -> None:
        [link] = await ask.links(OLD)
        expired = ask.hub.faults.add(Fault.expired(), on="cdn", times=1)
        assert (await ask(link)).sha256 == OLD.sha256
        assert (expired.hits, batches(ask.hub)) == (1, 3)

    async def test_upstreams_link_to_a_host_that_nobody_allowed_is_not_followed(
        self, session: aiohttp.ClientSession, hub: Hub, repo: Repo, tmp_path: Path
    ) -> None:
        config = configure(tmp_path / "c", [hub.url])
        async with running(config, QUICK) as mirror:
            ask = Asker(session, hub, mirror)
            [link] = await ask.links(OLD)
            refused = await ask(link)
            assert refused.status == 502 and "blob_hosts" in refused.json["message"]
            assert hub.counters.requests("cdn") == 0

    async def test_headers_that_upstream_wants_sent_go_nowhere(self, ask: Asker) -> None:
        """Neither to the client nor to the host of its link, which refuses a second permission."""
        [link] = await ask.links(OLD)
        theirs = await ask.session.post(f"{ask.hub.url}/org/m.git/{BATCH}", json=question(_wanted(OLD)))
        told = json.loads(await theirs.read())
        told["objects"][0]["actions"]["download"]["header"] = {"Authorization": "Basic c2VjcmV0"}
        with_header = ask.hub.faults.add(Fault.status(200, body=json.dumps(told).encode()), match=BATCH)
        assert (await ask(link)).sha256 == OLD.sha256
        assert with_header.hits == 1
        assert [one for one in ask.hub.log.find("cdn") if one.header("Authorization")] == []

    async def test_an_object_that_upstream_gives_no_more_is_a_clean_no(self, ask: Asker, repo: Repo) -> None:
        [link] = await ask.links(OLD)
        repo.commits.pop(next(iter(repo.commits)))
        assert (await ask(link)).status == 404

    @pytest.mark.parametrize("content", [WEIGHTS, OLD], ids=["by its file", "by upstream's batch"])
    async def test_wrong_bytes_are_not_given_and_the_right_ones_are(self, ask: Asker, content: Content) -> None:
        wrong = ask.hub.faults.add(Fault.corrupt(at=content.size // 2), on="cdn", times=1)
        [link] = await ask.links(content)
        assert (await ask(link)).status == 502
        assert wrong.hits == 1
        assert (await ask(link)).sha256 == content.sha256

    @pytest.mark.parametrize(
        ("agent", "status"), [("git-lfs/3.3.0 (GitHub; linux amd64; go 1.19.8)", 200), ("Wget/1.21.3", 412)]
    )
    async def test_after_wrong_bytes_git_lfs_starts_over_by_itself(self, ask: Asker, agent: str, status: int) -> None:
        """What it has may be of them. It would repeat a 412 until it gives up, and a 200 it takes from the start."""
        ask.hub.faults.add(Fault.corrupt(at=5), on="cdn", times=1)
        [link] = await ask.links(WEIGHTS)
        assert (await ask(link)).status == 502
        resumed = await ask(link, headers={"Range": "bytes=1000-", "User-Agent": agent})
        assert resumed.status == status
        assert status != 200 or resumed.sha256 == WEIGHTS.sha256
