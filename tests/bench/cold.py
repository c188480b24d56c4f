"""Files that are not cached yet: from a fast upstream, through a slow link, capped per connection, for many clients."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from tests.bench.common import FILE, MIB, REPO, Bench, curl, median, timed
from tests.bench.servers import peak_mib
from tests.hub import LFS, Content, HubProcess
from tests.mirror import MirrorProcess

BLOCK = 8 * MIB
LINK_BYTES_PER_S = 20_000_000  # 160 Mbit/s


@contextmanager
def cold_mirror(bench: Bench, hub: HubProcess, **settings: str) -> Iterator[MirrorProcess]:
    """A mirror with an empty cache, which goes with it."""
    cache = bench.root / "cold"
    try:
        with MirrorProcess(cache, [hub.url], [hub.cdn_host], settings) as mirror:
            yield mirror
    finally:
        shutil.rmtree(cache)


def cold(bench: Bench) -> None:
    bench.title("cold GET")
    with HubProcess() as hub:
        hub.repo(REPO).commit({"model.bin": LFS(bench.original)})
        ratios, ours = [], []
        for _ in range(bench.rounds):
            copy = timed(_copy_and_sum, bench.original, bench.root / "copy")
            with cold_mirror(bench, hub) as mirror:
                ours.append(timed(curl, mirror.url + FILE))
            ratios.append(ours[-1] / copy)
        note = f"{bench.size / MIB / median(ours):,.0f} MiB/s"
        bench.row(f"{bench.size // MIB} MiB: time / (cp + sha256sum)", median(ratios), most=1.5, note=note)
        _through_a_link(bench, hub)


def _copy_and_sum(original: Path, copy: Path) -> None:
    subprocess.run(["cp", str(original), str(copy)], check=True)
    subprocess.run(["sha256sum", str(copy)], check=True, stdout=subprocess.DEVNULL)
    copy.unlink()


def _through_a_link(bench: Bench, hub: HubProcess) -> None:
    size = min(128 * MIB, bench.size)
    hub.repo(REPO).commit({"link.bin": LFS(Content(size, seed=13))})
    hub.cap(total=LINK_BYTES_PER_S)
    path, ratios = f"/{REPO}/resolve/main/link.bin", []
    for _ in range(bench.rounds):
        direct = timed(curl, hub.url + path)
        with cold_mirror(bench, hub) as mirror:
            ratios.append(timed(curl, mirror.url + path) / direct)
    bench.row(f"{size // MIB} MiB through 160 Mbit/s: time / direct", median(ratios), most=1.05)


def capped(bench: Bench, cap: int = 4 * MIB, connections: int = 16) -> None:
    """An upstream that gives each connection so much and no more."""
    size = min(512 * MIB, bench.size)
    bench.title(f"cold GET of {size // MIB} MiB, upstream capped at {cap // MIB} MiB/s a connection, {connections} connections")
    with HubProcess() as hub:
        hub.repo(REPO).commit({"model.bin": LFS(Content(size, seed=12))})
        hub.cap(per_connection=cap)
        part = size // connections
        one = part / timed(curl, hub.url + FILE, "-r", f"0-{part - 1}")
        hub.reset()
        with cold_mirror(bench, hub, FILL_CONNECTIONS=str(connections)) as mirror:
            rate = size / timed(curl, mirror.url + FILE)
            bench.row(f"speed / ({connections} × cap)", rate / cap / connections, least=0.9)
            bench.row("speed / one direct connection", rate / one, digits=1, least=12)
            bench.row("bytes from upstream / size", hub.bytes("cdn") / size, digits=3, most=1 + BLOCK / size)


def many(bench: Bench, clients: int = 200, cap: int = 4_000_000) -> None:
    """Many clients on one cold file, upstream capped in all, against one client."""
    size = min(256 * MIB, bench.size)
    bench.title(f"{clients} clients on one cold file of {size // MIB} MiB, upstream {cap / 1e6:.0f} MB/s in all")
    with HubProcess() as hub:
        contents = [Content(size, seed=20 + i) for i in range(2)]
        hub.repo(REPO).commit({f"{i}.bin": LFS(content) for i, content in enumerate(contents)})
        hub.cap(total=cap)
        with cold_mirror(bench, hub) as mirror:
            one = timed(curl, f"{mirror.url}/{REPO}/resolve/main/0.bin")
            hub.reset()
            started = time.monotonic()
            right = asyncio.run(_download_all(f"{mirror.url}/{REPO}/resolve/main/1.bin", clients, size))
            bench.row("clients with the right length", right, digits=0, least=clients)
            bench.row("bytes from upstream / size", hub.bytes("cdn") / size, digits=3, most=1 + BLOCK / size)
            bench.row("time until the last has it / time of one client", (time.monotonic() - started) / one, most=1.5)
            bench.row("most memory of the mirror", peak_mib(mirror.pid), "MiB", digits=0, most=150 + clients / 2)


async def _download_all(url: str, clients: int, size: int) -> int:
    async def download(session: aiohttp.ClientSession) -> bool:
        total = 0
        async with session.get(url) as response:
            async for chunk in response.content.iter_any():
                total += len(chunk)
        return total == size

    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=512 * 1024, timeout=timeout) as session:
        return sum(await asyncio.gather(*(download(session) for _ in range(clients))))
