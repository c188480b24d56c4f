"""The Hub does not answer (P5): the cached is served to every client, all else fails clearly, nothing needs a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from nearhub.fill import Patience
from tests.clients.programs import ALL, HF_OLD, MATRIX, MIB, Client, Want
from tests.clients.scene import besides
from tests.hub import LFS, Content, Fault, Hub
from tests.mirror import Mirror, configure, run_client, running

QUICK = Patience(hedge_after_s=60, first_backoff_s=0.01)
SIZE = 20 * MIB
CACHED = Content(SIZE, seed=41)
HALF = Content(3 * SIZE, seed=42)


async def everyone(mirror: Mirror, path: str, folder: Path, clients: tuple[Client, ...] = ALL) -> dict[str, str]:
    want = Want(mirror.url, "org/m", path)
    gots = await asyncio.gather(*(client.get(want, folder / client.name) for client in clients))
    right = {"cached.bin": CACHED, "half.bin": HALF}[path].sha256
    return {client.name: got.verdict(right) for client, got in zip(clients, gots, strict=True)}


@pytest.mark.parametrize("ref_ttl", ["60s", "1ms"], ids=["within the ref TTL", "after it"])
async def test_the_cached_is_served_and_all_heals_by_itself(hub: Hub, tmp_path: Path, ref_ttl: str) -> None:
    """Hub down: a cached file for all clients, labelled stale once it may be. Hub back: news arrives, new files come."""
    repo = hub.repo("org/m")
    repo.commit({"cached.bin": LFS(CACHED)})
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL=ref_ttl)
    async with running(config, QUICK) as mirror, aiohttp.ClientSession() as session:
        url = f"{mirror.url}/org/m/resolve/main/cached.bin"
        async with session.get(url) as response:
            assert await response.read() == CACHED.bytes()
        await hub.stop()
        assert besides(await everyone(mirror, "cached.bin", tmp_path / "down"), "right") == {}
        async with session.head(url) as response:
            assert response.status == 200
            assert ("detail=stale" in response.headers["Cache-Status"]) == (ref_ttl == "1ms")
        async with session.get(f"{mirror.url}/org/m/resolve/main/unknown.bin") as response:
            # What is not in the manifest of a commit does not exist, whether or not upstream can be asked.
            assert (response.status, response.headers["X-Error-Code"]) == (404, "EntryNotFound")
        await hub.start()
        commit = repo.commit({"half.bin": LFS(HALF)})
        assert besides(await everyone(mirror, "cached.bin", tmp_path / "back"), "right") == {}
        want = Want(mirror.url, "org/m", "half.bin", revision=commit)
        # While the upstream's short rest lasts, the answer is a clear 504; the client's own retries outlast it.
        await _outlast(want.url)
        gots = await asyncio.gather(*(client.get(want, tmp_path / f"new {client.name}") for client in MATRIX))
        assert {got.verdict(HALF.sha256) for got in gots} == {"right"}


async def _outlast(url: str) -> None:
    """As a patient client: for bytes that are not here yet, 504 is tried again each second."""
    patience = ["--retry", "60", "--retry-delay", "1", "--max-time", "60"]
    status, said = await run_client("curl", "-q", "-fsS", *patience, "-r", "-10", "-o", "/dev/null", url)
    assert status == 0, said


async def test_an_incomplete_blob_is_a_clean_504_for_everyone(hub: Hub, tmp_path: Path) -> None:
    """Half of it is here, upstream is gone: every client fails before it has a body, and none leaves a file it believes in."""
    hub.repo("org/m").commit({"half.bin": LFS(HALF)})
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], FILL_CONNECTIONS="1")
    stall = hub.faults.add(Fault.stall(at=HALF.size // 2), on="cdn")
    async with running(config, QUICK) as mirror, aiohttp.ClientSession() as session:
        url = f"{mirror.url}/org/m/resolve/main/half.bin"
        async with session.get(url) as response:
            await response.content.readexactly(HALF.size // 2 - MIB)
            assert stall.stalled == 1
            await hub.stop()
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        await mirror.settled()
        async with session.get(url) as response:
            assert response.status == 504
            assert "X-Linked-Size" not in response.headers
        # huggingface_hub 0.36 asks five more times, over half a minute; test_faults.py waits for that once.
        impatient = tuple(client.impatient(10, 1) for client in MATRIX if client is not HF_OLD)
        assert besides(await everyone(mirror, "half.bin", tmp_path / "down", impatient), "failed") == {}
        async with session.get(url, headers={"Range": "bytes=100-199"}) as response:
            assert response.status == 206 and await response.read() == HALF.bytes(100, 200)
        stall.remove()
        await hub.start()
        await _outlast(url)
        hub.counters.reset()
        assert besides(await everyone(mirror, "half.bin", tmp_path / "down"), "right") == {}
        assert hub.counters.bytes("cdn") < HALF.size * 2 // 3
