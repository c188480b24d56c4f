"""Many clients on one cold file (P2, P3, P4): all right, the file crosses the WAN once, nobody waits for anybody's leaving."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from nearhub.wire.headers import BlobId
from nearhub.wire.spans import BLOCK
from tests.clients.programs import ALL, ARIA_16, CURL, HF, MIB, WGET, Client, Want
from tests.hub import LFS, Content, Fault, Hub
from tests.mirror import Mirror, configure, running

URL = "/org/m/resolve/main/model.bin"


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """As many connections as asked for."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=100)) as one:
        yield one


def publish(hub: Hub, size: int) -> Content:
    content = Content(size, seed=21)
    hub.repo("org/m").commit({"model.bin": LFS(content)})
    return content


def is_complete(mirror: Mirror, content: Content) -> bool:
    return mirror.fills.store.path_of(BlobId.from_etag(content.sha256)).exists()


async def whole(session: aiohttp.ClientSession, url: str) -> str:
    """The sha256 of what came, which must be all that was announced."""
    digest = hashlib.sha256()
    async with session.get(url) as response:
        assert response.status == 200
        async for piece in response.content.iter_any():
            digest.update(piece)
    return digest.hexdigest()


async def part(session: aiohttp.ClientSession, url: str, start: int, stop: int) -> bytes:
    async with session.get(url, headers={"Range": f"bytes={start}-{stop - 1}"}) as response:
        assert response.status == 206
        return await response.read()


@pytest.mark.parametrize(("wholes", "ranges"), [(15, 30), (20, 180)], ids=["45", "200"])
async def test_one_cold_file_crosses_the_wan_once(
    hub: Hub, mirror: Mirror, session: aiohttp.ClientSession, wholes: int, ranges: int
) -> None:
    """Whole files and ranges from everywhere in it, all at once, upstream slower than they are."""
    content = publish(hub, 64 * MIB)
    hub.cap(total=32 * MIB)
    url = mirror.url + URL
    starts = [number * (content.size - MIB) // ranges for number in range(ranges)]
    digests, parts = await asyncio.gather(
        asyncio.gather(*(whole(session, url) for _ in range(wholes))),
        asyncio.gather(*(part(session, url, start, start + MIB) for start in starts)),
    )
    assert set(digests) == {content.sha256}
    assert [start for start, got in zip(starts, parts, strict=True) if got != content.bytes(start, start + MIB)] == []
    await mirror.settled()
    assert (hub.counters.requests("hub", match="/revision/"), hub.counters.requests("hub", method="HEAD")) == (1, 0)
    assert content.size <= hub.counters.bytes("cdn") <= content.size + BLOCK
    fetched = (
        mirror.metrics.upstream_bytes.labels("fill")._value.get() + mirror.metrics.upstream_bytes.labels("hedge")._value.get()
    )
    assert fetched == content.size
    assert is_complete(mirror, content)


async def test_real_clients_of_all_kinds_share_one_fill(hub: Hub, mirror: Mirror, tmp_path: Path) -> None:
    """Every program twice, at once, on one cold file."""
    content = publish(hub, 64 * MIB)
    hub.cap(total=24 * MIB)
    want = Want(mirror.url, "org/m", "model.bin")
    crowd = [(client, tmp_path / f"{client} {number}") for client in ALL for number in range(2)]
    gots = await asyncio.gather(*(client.get(want, home) for client, home in crowd))
    assert {f"{client}: {got.verdict(content.sha256)}" for (client, _), got in zip(crowd, gots, strict=True)} == {
        f"{client}: right" for client in ALL
    }
    await mirror.settled()
    assert hub.counters.bytes("cdn") <= content.size + BLOCK


@pytest.mark.parametrize("client", [CURL, WGET, ARIA_16, HF], ids=str)
async def test_a_client_killed_at_a_tenth_leaves_a_fill_that_completes(
    hub: Hub, mirror: Mirror, tmp_path: Path, client: Client
) -> None:
    """kill -9 of the only client while the fill is under way: the blob is complete without it, paid for once."""
    content = publish(hub, 40 * MIB)
    stall = hub.faults.add(Fault.stall(at=content.size // 10), on="cdn", times=1)
    task = asyncio.create_task(client.get(Want(mirror.url, "org/m", "model.bin"), tmp_path / "home"))
    await hub.until(lambda: stall.stalled == 1 and hub.counters.bytes("cdn") > content.size // 10)
    task.cancel()
    assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
    assert not is_complete(mirror, content)
    stall.release()
    await mirror.settled()
    assert is_complete(mirror, content)
    assert hub.counters.bytes("cdn") <= content.size + BLOCK
    hub.counters.reset()
    got = await CURL.get(Want(mirror.url, "org/m", "model.bin"), tmp_path / "next")
    assert got.verdict(content.sha256) == "right"
    assert hub.counters.requests() == 0


async def test_a_slow_reader_slows_nobody(hub: Hub, mirror: Mirror, session: aiohttp.ClientSession) -> None:
    """One reads its first MiB and stops; others are served to their end meanwhile; then it goes on to right bytes."""
    content = publish(hub, 64 * MIB)
    digest = hashlib.sha256()
    async with session.get(mirror.url + URL) as slow:
        digest.update(await slow.content.readexactly(MIB))
        assert await whole(session, mirror.url + URL) == content.sha256
        await mirror.settled()
        assert is_complete(mirror, content)
        async for piece in slow.content.iter_any():
            digest.update(piece)
    assert digest.hexdigest() == content.sha256
    assert hub.counters.bytes("cdn") <= content.size + BLOCK


async def test_a_slow_cold_file_does_not_delay_another(hub: Hub, tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """A fill that stands still, with all of its connections, leaves the next file and small files alone."""
    content = publish(hub, 40 * MIB)
    other = Content(20 * MIB, seed=22)
    hub.repo("org/other").commit({"model.bin": LFS(other), "config.json": b"{}"})
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror:
        stall = hub.faults.add(Fault.stall(after=100), on="cdn", match="org/m/")
        stuck = asyncio.create_task(whole(session, mirror.url + URL))
        await hub.until(lambda: stall.stalled > 0)
        assert await whole(session, f"{mirror.url}/org/other/resolve/main/model.bin") == other.sha256
        async with session.get(f"{mirror.url}/org/other/resolve/main/config.json") as response:
            assert await response.read() == b"{}"
        assert not stuck.done()
        stall.release()
        stall.remove()
        assert await stuck == content.sha256
