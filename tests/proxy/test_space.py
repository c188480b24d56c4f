"""A cache that one can live with, over real sockets: its limit, who leaves for whom, what cannot be stored, a full disk."""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from nearhub.fill import Patience
from nearhub.release import TAIL
from nearhub.store.blobs import USED_EVERY_S
from nearhub.store.eviction import LOW_WATER
from nearhub.wire.headers import BlobId
from nearhub.wire.spans import BLOCK
from tests.hub import LFS, Content, Fault, Hub
from tests.mirror import Mirror, configure, running

MIB = 1024 * 1024
QUICK = Patience(hedge_after_s=60, first_backoff_s=0.01)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@dataclass(frozen=True, slots=True)
class Scene:
    """A mirror of some files, and a client."""

    hub: Hub
    mirror: Mirror
    client: aiohttp.ClientSession
    contents: dict[str, Content]

    def url(self, name: str) -> str:
        return f"{self.mirror.url}/org/m/resolve/main/{name}"

    def is_stored(self, name: str) -> bool:
        return self.mirror.fills.store.path_of(BlobId.from_etag(self.contents[name].sha256)).exists()

    @property
    def stored(self) -> str:
        """The names of what is complete, in one word."""
        return "".join(name for name in self.contents if self.is_stored(name))

    def upstream_bytes(self, name: str) -> int:
        return self.hub.counters.bytes("cdn", match=f"org/m/{name}")

    async def get(self, name: str) -> str:
        """Read all of it, compare it, and wait until nothing is under way; the Cache-Status."""
        async with self.client.get(self.url(name)) as response:
            assert response.status == 200
            await self.compare_rest(name, response)
        await self.settled()
        return response.headers["Cache-Status"]

    async def compare_rest(self, name: str, response: aiohttp.ClientResponse, before: bytes = b"") -> None:
        body = before + await response.read()
        assert hashlib.sha256(body).hexdigest() == self.contents[name].sha256

    async def read_until_cut(self, name: str) -> bytes:
        got = bytearray()
        with pytest.raises(aiohttp.ClientPayloadError):
            async with self.client.get(self.url(name)) as response:
                async for chunk in response.content.iter_any():
                    got += chunk
        return bytes(got)

    async def settled(self) -> None:
        """Until no fill and no eviction is under way."""
        await self.mirror.settled()
        if (lowering := self.mirror.fills.space._lowering) is not None:
            await lowering

    def bytes_on_disk(self) -> int:
        """What blobs take there now, complete, partial or condemned. One that moves meanwhile may be missed, never twice."""
        total = 0
        for part in ("blobs", "partial", "quarantine"):
            for directory, _, names in os.walk(self.mirror.fills.store.root / part):
                for name in names:
                    if part == "blobs" or name == "data":
                        with suppress(FileNotFoundError):
                            total += os.lstat(f"{directory}/{name}").st_blocks * 512
        return total


@asynccontextmanager
async def scene(
    hub: Hub, cache: Path, contents: dict[str, Content], *, patience: Patience = QUICK, **extra: str
) -> AsyncIterator[Scene]:
    """A mirror on `cache` of a repo with these files; `extra` as for configure()."""
    hub.repo("org/m").commit({name: LFS(content) for name, content in contents.items()})
    config = configure(cache, [hub.url], [hub.cdn_host], **extra)
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        running(config, patience) as mirror,
        aiohttp.ClientSession(auto_decompress=False, timeout=timeout) as client,
    ):
        yield Scene(hub, mirror, client, contents)


def files(*sizes: int) -> dict[str, Content]:
    """a, b, c … of so many bytes."""
    return {chr(ord("a") + seed): Content(size, seed + 1) for seed, size in enumerate(sizes)}


async def turns(count: int) -> None:
    """Let everything else of this loop run so often."""
    for _ in range(count):
        await asyncio.sleep(0)


# — the limit ——————————————————————————————————————————————————————————————————————————————————————


async def test_the_limit_holds_at_every_moment(hub: Hub, tmp_path: Path) -> None:
    """Sixty files, three times the limit, six clients: whenever one looks, the disk has no more than the limit and a block."""
    contents = {f"f{i}": Content((1 + i % 7) * 300_000 + i, i) for i in range(60)}
    limit = 20 * MIB
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB") as at:
        looks = 0

        async def one_client(names: list[str]) -> None:
            nonlocal looks
            for name in names:
                async with at.client.get(at.url(name)) as response:
                    body = bytearray()
                    async for chunk in response.content.iter_any():
                        body += chunk
                        looks += 1
                        assert at.bytes_on_disk() <= limit + BLOCK
                        assert at.mirror.fills.space.spoken_for <= limit
                assert hashlib.sha256(body).hexdigest() == contents[name].sha256

        names = list(contents)
        await asyncio.gather(*(one_client(names[i::6]) for i in range(6)))
        await at.settled()
        assert looks > 300
        assert LOW_WATER * limit * 0.8 < at.bytes_on_disk() <= limit
        assert at.mirror.fills.space.on_disk == at.bytes_on_disk()
        metrics = at.mirror.metrics.registry
        assert metrics.get_sample_value("nearhub_cache_bytes") == at.bytes_on_disk()
        assert metrics.get_sample_value("nearhub_cache_limit_bytes") == limit
        assert at.mirror.metrics.evicted_blobs._value.get() > 20


async def test_the_least_recently_used_leaves_first(hub: Hub, tmp_path: Path) -> None:
    """a, b and c fit; a is read again, so that d costs b; what stayed needs no upstream."""
    contents = files(4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB)
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="13MiB") as at:
        for name in "abca":
            await at.get(name)
        await at.get("d")
        assert at.stored == "acd"
        hub.counters.reset()
        for name in "acd":
            assert await at.get(name) == "nearhub; hit"
        assert hub.counters.bytes("cdn") == 0


async def test_the_order_survives_a_restart(hub: Hub, tmp_path: Path) -> None:
    """Reads are remembered in the files' access times, by the hour; the time of change stays what it was."""
    contents = files(4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB)
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="13MiB") as at:
        for name in "abc":
            await at.get(name)
        store, now = at.mirror.fills.store, at.mirror.fills.store.clock()
        paths = {name: store.path_of(BlobId.from_etag(contents[name].sha256)) for name in "abc"}
        changed = {name: path.stat().st_mtime_ns for name, path in paths.items()}
        for hours, name in enumerate("cab", 2):
            store.clock = lambda hours=hours: now + hours * USED_EVERY_S  # type: ignore[misc]
            await at.get(name)
        assert {name: path.stat().st_mtime_ns for name, path in paths.items()} == changed
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="13MiB") as at:
        await at.get("d")
        assert at.stored == "abd"


async def test_a_fill_is_never_evicted(hub: Hub, tmp_path: Path) -> None:
    """While one fill stands still, more than the limit passes by it; its bytes are not asked for again."""
    contents = files(24 * MIB, 4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB)
    rule = hub.faults.add(Fault.stall(at=20 * MIB), on="cdn", match="org/m/a")
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="34MiB") as at:
        async with at.client.get(at.url("a")) as response:
            head = await response.content.readexactly(15 * MIB)
            for name in "bcde":
                await asyncio.wait_for(get_beside(at, name), 30)
            assert at.mirror.metrics.evicted_blobs._value.get() >= 2
            rule.release()
            await at.compare_rest("a", response, head)
        await at.settled()
        assert at.is_stored("a")
        assert at.upstream_bytes("a") == contents["a"].size


async def get_beside(at: Scene, name: str) -> None:
    """As get(), while another fill is under way."""
    async with at.client.get(at.url(name)) as response:
        await at.compare_rest(name, response)
    blob = BlobId.from_etag(at.contents[name].sha256)
    for fill in at.mirror.fills.running:
        if fill.blob == blob:
            await fill.done.wait()


async def test_a_reader_of_an_evicted_blob_finishes(hub: Hub, tmp_path: Path) -> None:
    """A slow client has the first MiB of a large file when that leaves for another; it gets the rest, and it is right."""
    contents = files(64 * MIB, 60 * MIB)
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="70MiB") as at:
        await at.get("a")
        async with at.client.get(at.url("a")) as response:
            assert response.headers["Cache-Status"] == "nearhub; hit"
            head = await response.content.readexactly(MIB)
            await at.get("b")
            assert at.stored == "b"
            await at.compare_rest("a", response, head)


async def test_an_abandoned_partial_blob_is_evicted_like_any_other(hub: Hub, tmp_path: Path) -> None:
    """Ranges of a large file were read; what is kept of it leaves when it was not used for longest."""
    contents = files(40 * MIB, 8 * MIB, 36 * MIB)
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="48MiB") as at:
        async with at.client.get(at.url("a"), headers={"Range": "bytes=0-99"}) as response:
            assert await response.read() == contents["a"].bytes(0, 100)
        await at.settled()
        partial = at.mirror.fills.store.root / "partial" / f"sha256-{contents['a'].sha256}"
        assert partial.exists()
        assert at.mirror.fills.space.on_disk == at.bytes_on_disk() > 0
        await at.get("b")
        await at.get("c")
        assert not partial.exists() and at.stored == "bc"


# — what is never stored ———————————————————————————————————————————————————————————————————————————


async def test_a_blob_larger_than_the_limit_streams_through(hub: Hub, tmp_path: Path) -> None:
    """Right bytes, each time from upstream, nothing on disk, and what was stored stays."""
    contents = files(2 * MIB, 30 * MIB)
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB") as at:
        await at.get("a")
        for _ in range(2):
            assert await at.get("b") == "nearhub; fwd=uri-miss; detail=too-large"
        assert at.stored == "a" and at.bytes_on_disk() == contents["a"].size
        assert at.upstream_bytes("b") == 2 * contents["b"].size
        assert at.mirror.metrics.streamed_through.labels("too-large")._value.get() == 2


@pytest.mark.parametrize("asked", ["bytes=1000-2000999", "bytes=29000000-", "bytes=-500"])
async def test_a_range_of_such_a_blob_costs_itself_and_says_that_it_is_not_verified(
    hub: Hub, tmp_path: Path, asked: str
) -> None:
    """206 with the bytes that were asked for, and no others from upstream."""
    contents = files(30 * MIB)
    start, _, last = asked.removeprefix("bytes=").partition("-")
    size = contents["a"].size
    span = (int(start), int(last) + 1 if last else size) if start else (size - int(last), size)
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB") as at:
        async with at.client.get(at.url("a"), headers={"Range": asked}) as response:
            assert response.status == 206
            assert response.headers["Cache-Status"] == "nearhub; fwd=uri-miss; detail=unverified"
            assert await response.read() == contents["a"].bytes(*span)
        assert at.upstream_bytes("a") == span[1] - span[0]


async def test_several_ranges_of_such_a_blob_need_no_connection_each(hub: Hub, tmp_path: Path) -> None:
    """Each part waits for the one before it: with one connection in all, three ranges are answered."""
    contents = files(30 * MIB)
    async with (
        scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB", UPSTREAM_CONNECTIONS="1") as at,
        at.client.get(at.url("a"), headers={"Range": "bytes=0-99999,1000000-1299999,-500"}) as response,
    ):
        assert response.status == 206
        body = await response.read()
        for start, stop in ((0, 100_000), (1_000_000, 1_300_000), (30 * MIB - 500, 30 * MIB)):
            assert contents["a"].bytes(start, stop) in body


@pytest.mark.parametrize("at_byte", [1000, 30 * MIB - 10])
async def test_wrong_bytes_of_such_a_blob_are_cut_before_the_end_and_remembered(hub: Hub, tmp_path: Path, at_byte: int) -> None:
    """P1 and P1b hold: the last 64 KiB never leave, a resume gets 412, also after a restart."""
    contents = files(30 * MIB)
    hub.faults.add(Fault.corrupt(at=at_byte), on="cdn")
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB") as at:
        got = await at.read_until_cut("a")
        assert len(got) == contents["a"].size - TAIL
        assert at.mirror.metrics.mismatches._value.get() == 1
    hub.faults.clear()
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB") as at:
        for asked in ("bytes=1000-", "bytes=1000-1999"):
            async with at.client.get(at.url("a"), headers={"Range": asked, "User-Agent": "Wget/1.21.3"}) as response:
                assert response.status == 412
        await at.get("a")


PASSING = {
    "dropped every 3 MiB": (Fault.drop_every(3 * MIB), None),
    "503": (Fault.status(503), 2),
    "expired signature": (Fault.expired(), 2),
    "ranges ignored": (Fault.ignore_range(), None),
    "overrun": (Fault.overrun(100), 2),
    "another ETag midway": (Fault.other_etag(), 2),
}


@pytest.mark.parametrize(("fault", "times"), PASSING.values(), ids=PASSING.keys())
async def test_a_fault_of_upstream_that_passes_is_not_seen(hub: Hub, tmp_path: Path, fault: Fault, times: int | None) -> None:
    """It goes on from where it broke, and the whole is right."""
    contents = files(30 * MIB)
    rule = hub.faults.add(fault, on="cdn", times=times)
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB") as at:
        await at.get("a")
        assert rule.hits > 0


async def test_parts_of_two_objects_are_never_joined_in_a_range(hub: Hub, tmp_path: Path) -> None:
    """Nothing would tell: after another ETag midway an unverified range is cut."""
    contents = files(30 * MIB)
    hub.faults.add(Fault.drop_every(3 * MIB), on="cdn", times=1)
    hub.faults.add(Fault.other_etag(), on="cdn")
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB") as at:
        got = bytearray()
        with pytest.raises(aiohttp.ClientPayloadError):
            async with at.client.get(at.url("a"), headers={"Range": "bytes=0-9999999"}) as response:
                async for chunk in response.content.iter_any():
                    got += chunk
        assert len(got) <= 3 * MIB and got == contents["a"].bytes(0, len(got))


async def test_an_upstream_that_says_no_is_passed_on_before_headers(hub: Hub, tmp_path: Path) -> None:
    """A clean error, never a short 200."""
    contents = files(30 * MIB)
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB") as at:
        async with at.client.head(at.url("a")) as response:
            assert response.status == 200
        hub.faults.add(Fault.status(500), on="cdn")
        async with at.client.get(at.url("a")) as response:
            assert response.status == 502 and "Content-Range" not in response.headers


async def test_a_client_that_leaves_closes_upstream(hub: Hub, tmp_path: Path) -> None:
    """In the middle of what would be 200 MiB."""
    contents = files(200 * MIB)
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB") as at:
        async with at.client.get(at.url("a")) as response:
            await response.content.readexactly(MIB)
            assert hub.active("cdn") == 1
            response.close()
        await hub.until(lambda: hub.active("cdn") == 0)


async def test_a_slow_client_slows_upstream(hub: Hub, tmp_path: Path) -> None:
    """It has read 1 MiB of 200 and stops: upstream has sent that and what sockets and buffers hold, however long one waits."""
    contents = files(200 * MIB)
    async with (
        scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB") as at,
        at.client.get(at.url("a")) as response,
    ):
        head = await response.content.readexactly(MIB)
        await turns(5000)
        assert at.upstream_bytes("a") < 40 * MIB
        await at.compare_rest("a", response, head)


async def test_while_upstream_is_silent_something_is_dripped(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients give up after 10 s of silence: what was held back feeds them, but never with the end of the blob."""
    monkeypatch.setattr("nearhub.passage.DRIP_EVERY_S", 0.001)
    contents = files(30 * MIB)
    size = contents["a"].size
    for stops_at, comes in ((10 * MIB, 10 * MIB), (size - 1, size - TAIL)):
        rule = hub.faults.add(Fault.stall(at=stops_at), on="cdn", times=1)
        async with (
            scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB") as at,
            at.client.get(at.url("a")) as response,
        ):
            head = await response.content.readexactly(comes)
            assert rule.stalled == 1
            await turns(5000)
            assert response.content.read_nowait() == b""
            rule.release()
            await at.compare_rest("a", response, head)


# — no room now ————————————————————————————————————————————————————————————————————————————————————


async def test_what_does_not_fit_beside_running_fills_streams_through_and_is_stored_later(hub: Hub, tmp_path: Path) -> None:
    """It does not wait for them, and nothing leaves in vain."""
    contents = files(4 * MIB, 24 * MIB, 16 * MIB)
    rule = hub.faults.add(Fault.stall(at=20 * MIB), on="cdn", match="org/m/b")
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="32MiB") as at:
        await at.get("a")
        async with at.client.get(at.url("b")) as filling:
            head = await filling.content.readexactly(15 * MIB)
            async with at.client.get(at.url("c")) as response:
                assert response.headers["Cache-Status"] == "nearhub; fwd=uri-miss; detail=no-room"
                await at.compare_rest("c", response)
            assert at.stored == "a"
            rule.release()
            await at.compare_rest("b", filling, head)
        await at.settled()
        assert at.stored == "ab"
        await at.get("c")
        assert at.stored == "c"


async def test_passages_leave_connections_to_fills(hub: Hub, tmp_path: Path) -> None:
    """As many passages as may be stand still: another fill goes on, and one more passage hears 503 rather than nothing."""
    contents = files(30 * MIB, 4 * MIB, 18 * MIB)
    rule = hub.faults.add(Fault.stall(at=MIB), on="cdn", match="org/m/a")
    async with scene(hub, tmp_path / "cache", contents, CACHE_MAX_SIZE="20MiB", UPSTREAM_CONNECTIONS="8") as at:
        places = at.mirror.fills._route.places.limit
        waiting = [await at.client.get(at.url("a")) for _ in range(places)]
        await hub.until(lambda: rule.stalled == places)
        await get_beside(at, "c")
        async with at.client.get(at.url("a")) as response:
            assert response.status == 503 and response.headers["Retry-After"] == "10"
        rule.release()
        for response in waiting:
            await at.compare_rest("a", response)


# — a full disk ————————————————————————————————————————————————————————————————————————————————————


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


class Ballast:
    """Bytes of somebody else on the disk."""

    def __init__(self, disk: Path) -> None:
        self._path = disk / "ballast"
        self._disk = disk

    def fill_up(self, leave: int = 0) -> None:
        """All that is free but `leave` bytes."""
        usage = os.statvfs(self._disk)
        with self._path.open("ab") as file:
            os.posix_fallocate(file.fileno(), file.tell(), usage.f_bavail * usage.f_frsize - leave)

    def drop(self) -> None:
        self._path.unlink()


@needs_root
async def test_a_blob_larger_than_the_disk_streams_through_and_the_next_is_stored(hub: Hub, small_disk: Path) -> None:
    """45 MiB into 32: right bytes, nothing of it stays, and the cache works on."""
    contents = files(45 * MIB, 8 * MIB)
    async with scene(hub, small_disk / "cache", contents) as at:
        assert await at.get("a") == "nearhub; fwd=uri-miss; detail=no-room"
        assert at.bytes_on_disk() == 0
        await at.get("b")
        assert at.stored == "b"


@needs_root
async def test_when_the_disk_is_full_every_file_is_served_and_when_there_is_room_stored(hub: Hub, small_disk: Path) -> None:
    """Not one byte is free: large and small files are right all the same; space comes back, and no restart is needed."""
    contents = files(20 * MIB, 1000, 0)
    async with scene(hub, small_disk / "cache", contents) as at:
        for name in contents:
            async with at.client.head(at.url(name)) as response:
                assert response.status == 200
        ballast = Ballast(small_disk)
        ballast.fill_up()
        for name in contents:
            await at.get(name)
        assert at.stored == ""
        ballast.drop()
        for name in contents:
            await at.get(name)
        assert at.stored == "abc"


@needs_root
async def test_a_repo_that_was_never_seen_is_served_from_a_full_disk_too(hub: Hub, small_disk: Path) -> None:
    """What upstream says of it cannot be kept, and is used all the same; when there is room, it is kept."""
    hub.repo("org/new").commit({"config.json": b"{}", "sub/data.txt": b"words"})
    async with scene(hub, small_disk / "cache", files(1000)) as at:
        ballast = Ballast(small_disk)
        ballast.fill_up()
        url = f"{at.mirror.url}/org/new/resolve/main"
        for name, body in (("config.json", b"{}"), ("sub/data.txt", b"words")):
            async with at.client.get(f"{url}/{name}") as response:
                assert (response.status, await response.read()) == (200, body)
        async with at.client.get(f"{url}/absent") as response:
            assert (response.status, response.headers["X-Error-Code"]) == (404, "EntryNotFound")
        async with at.client.get(f"{at.mirror.url}/-/readyz") as response:
            assert response.status == 507
        ballast.drop()
        async with at.client.get(f"{url}/config.json") as response:
            assert response.status == 200
        await at.settled()
        async with at.client.get(f"{at.mirror.url}/-/readyz") as response:
            assert response.status == 200


@needs_root
@pytest.mark.parametrize("drops", [False, True], ids=["steady", "dropped"])
async def test_when_the_disk_fills_up_during_a_fill_its_readers_go_on(hub: Hub, small_disk: Path, drops: bool) -> None:
    """Two whole GETs and a range that is behind: right to the last byte; what is here is not asked for again by any; later
    the file is stored."""
    contents, stop = files(28 * MIB), 2 * BLOCK + MIB
    rule = hub.faults.add(Fault.stall(at=stop), on="cdn", times=1)
    async with scene(hub, small_disk / "cache", contents, FILL_CONNECTIONS="1") as at:
        ballast = Ballast(small_disk)
        responses = [await at.client.get(at.url("a")) for _ in range(2)]
        heads = [await response.content.readexactly(stop) for response in responses]
        part = await at.client.get(at.url("a"), headers={"Range": f"bytes={MIB}-{24 * MIB - 1}"})
        part_head = await part.content.readexactly(1000)
        ballast.fill_up(leave=2 * MIB)
        if drops:
            hub.faults.add(Fault.drop_every(3 * MIB), on="cdn")
        asked_before = len(hub.log.find("cdn"))
        rule.release()
        for response, head in zip(responses, heads, strict=True):
            await at.compare_rest("a", response, head)
        assert part_head + await part.read() == contents["a"].bytes(MIB, 24 * MIB)
        await at.settled()
        assert at.stored == ""
        assert at.mirror.metrics.streamed_through.labels("no-room")._value.get() == 3
        asked = [one.header("Range") or "" for one in hub.log.find("cdn")[asked_before:]]
        assert len(asked) >= 3
        assert min(int(span.removeprefix("bytes=").partition("-")[0]) for span in asked) >= stop
        ballast.drop()
        hub.faults.clear()
        await at.get("a")
        assert at.stored == "a"


@needs_root
async def test_what_a_fill_could_not_finish_makes_room_on_a_full_disk(hub: Hub, small_disk: Path) -> None:
    """Others need the disk: the cache gives up what it may, and its reader is right all the same."""
    contents = files(24 * MIB)
    rule = hub.faults.add(Fault.stall(at=2 * MIB), on="cdn", times=1)
    async with scene(hub, small_disk / "cache", contents, FILL_CONNECTIONS="1") as at:
        async with at.client.get(at.url("a")) as response:
            head = await response.content.readexactly(2 * MIB)
            Ballast(small_disk).fill_up(leave=MIB)
            rule.release()
            await at.compare_rest("a", response, head)
        await at.settled()
        assert list((at.mirror.fills.store.root / "partial").iterdir()) == []
        assert at.mirror.fills.space.on_disk == 0


@needs_root
async def test_when_the_disk_fills_up_older_blobs_leave_and_the_fill_goes_on(hub: Hub, small_disk: Path) -> None:
    """Room was promised, and somebody else took it: the fill is stored all the same."""
    contents = files(9 * MIB, 16 * MIB)
    rule = hub.faults.add(Fault.stall(at=12 * MIB), on="cdn", match="org/m/b")
    async with scene(hub, small_disk / "cache", contents) as at:
        await at.get("a")
        async with at.client.get(at.url("b")) as response:
            head = await response.content.readexactly(9 * MIB)
            Ballast(small_disk).fill_up()
            rule.release()
            await at.compare_rest("b", response, head)
        await at.settled()
        assert at.stored == "b"
        assert at.mirror.metrics.streamed_through.labels("no-room")._value.get() == 0


@needs_root
@pytest.mark.parametrize("at_byte", [1000, 23 * MIB])
async def test_wrong_bytes_are_cut_also_when_the_disk_fills_up(hub: Hub, small_disk: Path, at_byte: int) -> None:
    """Whether the wrong byte came before the disk was full or after it: the last 64 KiB never leave."""
    contents = files(24 * MIB)
    stall = hub.faults.add(Fault.stall(at=BLOCK + MIB), on="cdn", times=1)
    async with scene(hub, small_disk / "cache", contents, FILL_CONNECTIONS="1") as at:
        if at_byte < BLOCK:
            stall.remove()
            hub.faults.add(Fault.corrupt(at=at_byte), on="cdn", times=1)
            stall = hub.faults.add(Fault.stall(at=BLOCK + MIB), on="cdn", times=1)
        async with at.client.get(at.url("a")) as response:
            got = bytearray(await response.content.readexactly(BLOCK + MIB))
            ballast = Ballast(small_disk)
            ballast.fill_up(leave=2 * MIB)
            if at_byte > BLOCK:
                hub.faults.add(Fault.corrupt(at=at_byte), on="cdn")
            stall.release()
            with pytest.raises(aiohttp.ClientPayloadError):
                async for chunk in response.content.iter_any():
                    got += chunk
        assert len(got) <= contents["a"].size - TAIL
        await at.settled()
        assert at.stored == ""
        async with at.client.get(at.url("a"), headers={"Range": "bytes=5-", "User-Agent": "Wget/1.21.3"}) as response:
            assert response.status == 412
        hub.faults.clear()
        ballast.drop()
        await at.get("a")
        assert at.stored == "a"


async def test_a_file_larger_than_the_file_system_takes_streams_through(hub: Hub, tmp_path: Path) -> None:
    """EFBIG: nobody is evicted for it, since that would not help."""
    contents = files(4 * MIB, 24 * MIB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with scene(hub, tmp_path / "cache", contents) as at:
        await at.get("a")
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 * MIB, hard))
        try:
            assert await at.get("b") == "nearhub; fwd=uri-miss; detail=no-room"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert at.stored == "a"
        await at.get("b")
        assert at.stored == "ab"
