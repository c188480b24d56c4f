"""`make bench`: the figures of this project, measured side by side in one run; prints a table of ratios.

Everything is on loopback: ratios mean something, absolute numbers do not. Needs curl; nginx, where it is
installed, is compared with.
Not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import psutil

from tests.hub import LFS, Content, HubProcess
from tests.mirror import MirrorProcess

MIB = 1024 * 1024
PATH = "/bench/m/resolve/main/model.bin"
_BARE = """
import asyncio, sys
from aiohttp import web
async def handle(request):
    return web.FileResponse(sys.argv[1])
app = web.Application(); app.router.add_get("/f", handle)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=lambda *a: print("ready", flush=True), access_log=None)
"""
_NGINX = """
daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log stderr crit;
events {{ worker_connections 1024; }}
http {{ access_log off; sendfile on; tcp_nopush on; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{ listen 127.0.0.1:{port}; location /f {{ alias {file}; }} }} }}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="MiB of the file (1024)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs per ratio (5)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nearhub-bench-") as scratch:
        root = Path(scratch)
        content = Content(options.size * MIB, seed=11)
        original = root / "model.bin"
        with original.open("wb") as file:
            for start in range(0, content.size, MIB):
                file.write(content.read(start, start + MIB))
        print(
            f"{options.size} MiB, {psutil.cpu_count()} cores, Python {sys.version.split()[0]}, aiohttp {aiohttp.__version__}\n"
        )
        cold_fast(root, original, options.rounds)
        cold_capped(root)
        many_cold_clients(root)
        warm(root, original, options.rounds)


def row(what: str, value: str, goal: str) -> None:
    print(f"{what:<68}{value:>12}   {goal}", flush=True)


def cold_fast(root: Path, original: Path, rounds: int) -> None:
    """A cold GET from an unlimited upstream, against cp + sha256sum of the same bytes."""
    ratios = []
    with HubProcess() as hub:
        hub.repo("bench/m").commit({"model.bin": LFS(original)})
        for i in range(rounds):
            copy = timed(lambda: _copy_and_sum(original, root / "copy"))
            with MirrorProcess(root / f"cache-{i}", [hub.url], [hub.cdn_host]) as mirror:
                ratios.append(timed(lambda mirror=mirror: curl(mirror.url + PATH)) / copy)  # type: ignore[misc]
            shutil.rmtree(root / f"cache-{i}")
    row("cold GET, unlimited upstream / (cp + sha256sum)", f"{statistics.median(ratios):.2f}", "≤ 1.5")


def _copy_and_sum(original: Path, copy: Path) -> None:
    subprocess.run(["cp", str(original), str(copy)], check=True)
    subprocess.run(["sha256sum", str(copy)], check=True, stdout=subprocess.DEVNULL)
    copy.unlink()


def cold_capped(root: Path, cap: int = 4 * MIB, connections: int = 16, size: int = 512 * MIB) -> None:
    """A cold GET from an upstream that gives each connection so much and no more."""
    with HubProcess() as hub:
        hub.repo("bench/m").commit({"model.bin": LFS(Content(size, seed=12))})
        hub.cap(per_connection=cap)
        with MirrorProcess(root / "capped", [hub.url], [hub.cdn_host], {"FILL_CONNECTIONS": str(connections)}) as mirror:
            seconds = timed(lambda: curl(mirror.url + PATH))
        rate = size / seconds / cap
        row(f"cold GET, upstream capped per connection, {connections} connections: × one", f"{rate:.1f}", "≥ 14.4 (0.9 × 16)")
        row("… bytes from upstream / size", f"{hub.bytes('cdn') / size:.3f}", "≤ 1 + 1 block")
    shutil.rmtree(root / "capped")


def many_cold_clients(root: Path, clients: int = 200, size: int = 256 * MIB, cap: int = 4_000_000) -> None:
    """200 clients on one cold file, upstream capped in all, against one client."""
    with HubProcess() as hub:
        contents = [Content(size, seed=20 + i) for i in range(2)]
        hub.repo("bench/m").commit({f"{i}.bin": LFS(content) for i, content in enumerate(contents)})
        hub.cap(total=cap)
        with MirrorProcess(root / "many", [hub.url], [hub.cdn_host]) as mirror:
            one = timed(lambda: curl(f"{mirror.url}/bench/m/resolve/main/0.bin"))
            hub.reset()
            process = psutil.Process(mirror.pid)
            base = process.memory_info().rss
            started = time.monotonic()
            right, peak = asyncio.run(_download_all(f"{mirror.url}/bench/m/resolve/main/1.bin", clients, contents[1], process))
            many = time.monotonic() - started
            row(f"{clients} cold clients: right length", f"{right}/{clients}", "all")
            row("… bytes from upstream / size", f"{hub.bytes('cdn') / size:.3f}", f"≤ {1 + 8 * MIB / size:.3f}")
            row(f"… time / time of one ({cap / 1e6:.0f} MB/s upstream in all)", f"{many / one:.2f}", "≤ 1.5")
            row("… peak RSS of the mirror, MiB", f"{peak / MIB:.0f} ({base / MIB:.0f})", f"≤ {150 + clients // 2}")
    shutil.rmtree(root / "many")


async def _download_all(url: str, clients: int, content: Content, process: psutil.Process) -> tuple[int, int]:
    peak = 0

    async def download(session: aiohttp.ClientSession) -> bool:
        nonlocal peak
        total = 0
        async with session.get(url) as response:
            async for chunk in response.content.iter_any():
                total += len(chunk)
                if total % (16 * MIB) < len(chunk):
                    peak = max(peak, process.memory_info().rss)
        return total == content.size

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=512 * 1024) as session:
        results = await asyncio.gather(*(download(session) for _ in range(clients)))
    return sum(results), peak


def warm(root: Path, original: Path, rounds: int) -> None:
    """A warm GET on one connection, against a bare aiohttp sendfile handler and nginx, in pairs."""
    with HubProcess() as hub, contextlib.ExitStack() as stack:
        hub.repo("bench/m").commit({"model.bin": LFS(original)})
        mirror = stack.enter_context(MirrorProcess(root / "warm", [hub.url], [hub.cdn_host]))
        curl(mirror.url + PATH)
        bare = stack.enter_context(bare_aiohttp(original))
        ours, others = [], {"a bare aiohttp sendfile handler": bare}
        if shutil.which("nginx"):
            others["nginx"] = stack.enter_context(nginx(root, original))
        ratios: dict[str, list[float]] = {name: [] for name in others}
        for _ in range(rounds):
            ours.append(timed(lambda: curl(mirror.url + PATH)))
            for name, url in others.items():
                ratios[name].append(timed(lambda url=url: curl(url)) / ours[-1])  # type: ignore[misc]
        for name, goal in (("a bare aiohttp sendfile handler", "≥ 0.95"), ("nginx", "≥ 0.75")):
            if name in ratios:
                row(f"warm GET, one connection / {name}", f"{statistics.median(ratios[name]):.2f}", goal)
        row("… RSS of the mirror, MiB", f"{psutil.Process(mirror.pid).memory_info().rss / MIB:.0f}", "≤ 150")


@contextlib.contextmanager
def bare_aiohttp(file: Path) -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", _BARE, str(file), str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield f"http://127.0.0.1:{port}/f"
    finally:
        process.terminate()
        process.communicate()


@contextlib.contextmanager
def nginx(root: Path, file: Path) -> Iterator[str]:
    port = free_port()
    config = root / "nginx.conf"
    config.write_text(_NGINX.format(dir=root, port=port, file=file))
    root.chmod(0o755)
    process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(root)])
    url = f"http://127.0.0.1:{port}/f"
    try:
        subprocess.run(
            ["curl", "-sfI", "--retry", "50", "--retry-connrefused", "--retry-delay", "0", "-o", "/dev/null", url], check=True
        )
        yield url
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def curl(url: str) -> None:
    subprocess.run(["curl", "-sf", "-o", "/dev/null", url], check=True)


def timed(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
