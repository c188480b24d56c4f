"""Prefetch: what it brings, from which connections, how fast, and what is left when it is stopped anywhere."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st

from nearhub.errors import BadTarget, HubRefusal
from nearhub.planner import Lane
from nearhub.prefetch import chosen
from tests.hub import LFS, Content, Fault, Hub
from tests.mirror import Mirror, configure, running
from tests.proxy.test_verbs import Desk

MIB = 1024 * 1024
BIG = Content(24 * MIB, seed=1)
SMALL = Content(300_000, seed=2)

segments = st.sampled_from(["a", "b.json", "c.bin", "sub", "*", "?", "[ab]*", "*.json"])
paths = st.lists(segments.filter(lambda s: not set(s) & set("*?[")), min_size=1, max_size=3).map("/".join)
patterns = st.lists(segments, min_size=1, max_size=3).map("/".join) | st.sampled_from(["sub/", "", "/"])


@given(st.lists(paths, max_size=6), st.lists(patterns, max_size=3), st.lists(patterns, max_size=3))
def test_patterns_are_those_of_huggingface_hub(names: list[str], include: list[str], exclude: list[str]) -> None:
    """The client's own function chooses the same."""
    assert chosen(names, include, exclude) == list(
        filter_repo_objects(names, allow_patterns=include or None, ignore_patterns=exclude or None)
    )


@pytest.fixture
async def mirror(hub: Hub, tmp_path: Path) -> AsyncIterator[Mirror]:
    hub.repo("org/m").commit({"config.json": b"{}", "sub/x.txt": b"x", "big.bin": LFS(BIG), "small.bin": LFS(SMALL)})
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror:
        yield mirror


async def prefetched(mirror: Mirror, repo: str = "org/m", **arguments: Any) -> dict[str, Any]:
    """Its last line."""
    result: dict[str, Any] = {}
    async for line in mirror.front.operations.prefetch(repo, **arguments):
        result = line.get("result", result)
    return result


async def test_all_of_a_repo_then_nothing_more_to_ask(hub: Hub, mirror: Mirror) -> None:
    """Everything that `hf download` asks for is here afterwards, and each byte came once; the second time nothing comes."""
    first = await prefetched(mirror)
    assert (first["files"], first["done_files"], first["failed"]) == (4, 4, [])
    assert first["brought_bytes"] == first["bytes"] == BIG.size + SMALL.size + 3
    assert hub.counters.bytes("cdn") == BIG.size + SMALL.size
    questions = len(hub.log.find("hub", match="/api/models/"))
    assert questions <= 3  # its manifest, its tree, its refs
    hub.log.clear()
    async with aiohttp.ClientSession() as session:
        for path in ("resolve/main/big.bin", "resolve/main/sub/x.txt"):
            async with session.get(f"{mirror.url}/org/m/{path}") as response:
                assert response.status == 200 and "hit" in response.headers["Cache-Status"]
        for path in ("tree/main?recursive=true", "refs", "revision/main"):
            async with session.get(f"{mirror.url}/api/models/org/m/{path}") as response:
                assert response.status == 200
    assert [one.raw_path for one in hub.log] == []
    again = await prefetched(mirror)
    assert (again["done_files"], again["brought_bytes"]) == (4, 0)


async def test_what_matches_of_what_revision(hub: Hub, mirror: Mirror) -> None:
    hub.repo("org/m").commit({"only.json": b"[]"}, revision="dev")
    result = await prefetched(mirror, revision="dev", include=["*.json"], exclude=["config*"])
    assert (result["files"], result["done_bytes"]) == (1, 2)
    with pytest.raises(BadTarget, match="no path of them matches"):
        await prefetched(mirror, include=["*.safetensors"])
    with pytest.raises(HubRefusal):
        await prefetched(mirror, "org/never")


async def test_a_file_that_fails_is_named_and_the_others_come(hub: Hub, mirror: Mirror) -> None:
    """… and whose fault it is."""
    hub.faults.add(Fault.status(403), on="hub", match="small.bin", method="GET")
    result = await prefetched(mirror)
    assert result["done_files"] == 3
    (failure,) = result["failed"]
    assert (failure["file"], failure["fault"]) == ("small.bin", "client"), failure


async def test_what_cannot_fit_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.repo("org/m").commit({"big.bin": LFS(BIG)})
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], CACHE_MAX_SIZE="10MiB")) as mirror:
        (failure,) = (await prefetched(mirror))["failed"]
        assert "more than the whole cache may have" in failure["error"] and failure["fault"] == "mirror"
    assert hub.counters.bytes("cdn") == 0


async def test_it_has_a_quarter_of_the_connections_until_clients_ask(hub: Hub, tmp_path: Path) -> None:
    """Five of 20 bulk connections are its own, so one of two files waits. Whoever asks for either meanwhile does not."""
    for name, seed in (("one", 3), ("two", 4)):
        hub.repo(f"org/{name}").commit({"big.bin": LFS(Content(256 * MIB, seed=seed))})
    hub.cap(per_connection=100_000)
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror, aiohttp.ClientSession() as session:
        slots = mirror.fills.dispatcher.slots
        works = [asyncio.ensure_future(prefetched(mirror, f"org/{name}")) for name in ("one", "two")]
        await hub.until(lambda: hub.active("cdn") == 5)
        assert repr(slots(Lane.BULK)).startswith("<Slots 5/20,") and repr(slots(Lane.PREFETCH)).startswith("<Slots 5/5,")
        async with asyncio.timeout(20):
            for name in ("one", "two"):
                async with session.get(f"{mirror.url}/org/{name}/resolve/main/big.bin") as response:
                    assert len(await response.content.readexactly(1000)) == 1000
                    assert hub.active("cdn") > 5
        for work in works:
            work.cancel()
        await asyncio.wait(works)


async def test_it_keeps_to_its_rate(hub: Hub, mirror: Mirror) -> None:
    """24 MiB at 16 MiB/s cannot take less than the rate allows, whatever the link gives."""
    result = await prefetched(mirror, include=["big.bin"], rate=16.0 * MIB)
    assert result["brought_bytes"] == BIG.size
    assert result["seconds"] >= BIG.size / (16 * MIB) - 0.5


async def test_stopped_it_stops_and_goes_on_from_there(hub: Hub, tmp_path: Path) -> None:
    """Cancelled in the middle: the fill ends with its blocks, and the next run asks for the rest alone."""
    hub.repo("org/m").commit({"big.bin": LFS(BIG)})
    hub.cap(per_connection=8 * MIB)
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], FILL_CONNECTIONS="1")) as mirror:
        lines = mirror.front.operations.prefetch("org/m")
        async for line in lines:
            if line["done"] >= 8 * MIB:
                break
        await lines.aclose()
        await mirror.settled()
        sent = hub.counters.bytes("cdn")
        assert 8 * MIB <= sent < BIG.size
        hub.cap()
        result = await prefetched(mirror)
        assert result["done_bytes"] == BIG.size
        assert hub.counters.bytes("cdn") <= BIG.size + 8 * MIB


async def started(desk: Desk, hub: Hub, *arguments: str) -> asyncio.subprocess.Process:
    """`nearhub prefetch` on a directory that nobody serves."""
    settings = ["--cache-dir", str(desk.cache), "--upstream", hub.url, "--blob-host", f"http://{hub.cdn_host}"]
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "nearhub", "prefetch", *arguments, *settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_from_the_command_line_with_no_mirror_interrupted_or_killed(
    hub: Hub, tmp_path: Path, number: signal.Signals
) -> None:
    """It works on the directory alone; Ctrl-C ends it with 130 and a sentence; after it, and after kill -9, it goes on."""
    hub.repo("org/m").commit({"big.bin": LFS(BIG), "config.json": b"{}"})
    desk = Desk(tmp_path / "cache", hub)
    stall = hub.faults.add(Fault.stall(at=20 * MIB), on="cdn")
    process = await started(desk, hub, "org/m")
    await hub.until(lambda: stall.stalled > 0)
    await asyncio.to_thread(_until_marked, desk.cache, 2)
    process.send_signal(number)
    assert process.stdout is not None
    said = (await process.stdout.read()).decode()
    status = await process.wait()
    assert (status, "goes on from there" in said) == ((130, True) if number is signal.SIGINT else (-9, False))
    hub.faults.clear()
    before = hub.counters.bytes("cdn")
    listed = tmp_path / "repos.txt"
    listed.write_text("# ours\norg/m   # the one\n\norg/never\n")
    process = await started(desk, hub, "--list", str(listed))
    assert process.stdout is not None
    said = (await process.stdout.read()).decode()
    assert await process.wait() == 1
    assert "2 of 2 files are here" in said and "org/never: " in said, said
    assert desk.blob(BIG).read_bytes() == BIG.bytes()
    assert hub.counters.bytes("cdn") - before <= BIG.size - 16 * MIB


def _until_marked(cache: Path, blocks: int) -> None:
    """Until so many blocks of the partial blob are marked as present."""
    while not any(path.read_bytes().count(b"\xa5\x5a") >= blocks for path in cache.glob("partial/*/present")):
        time.sleep(0.01)
