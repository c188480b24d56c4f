"""The servers that are compared: the mirror with its file cached, a bare aiohttp handler, and nginx."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.common import FILE, MIB, REPO, Bench, curl
from tests.hub import LFS, HubProcess
from tests.mirror import MirrorProcess

_BARE = """
import sys
from aiohttp import web
async def get(request):
    return web.FileResponse(sys.argv[1])
async def head(request):
    return web.Response(headers={"Content-Length": "1000", "ETag": '"0"', "Accept-Ranges": "bytes"})
app = web.Application()
app.router.add_route("GET", "/f", get)
app.router.add_route("HEAD", "/f", head)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=lambda *a: print("ready", flush=True), access_log=None)
"""
_NGINX = """
daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log stderr crit;
events {{ worker_connections 1024; }}
http {{ access_log off; sendfile on; tcp_nopush on; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{ listen 127.0.0.1:{port}; location /f {{ alias {file}; }} }} }}
"""


@dataclass(frozen=True)
class Server:
    """A running server and the URL of the big file on it."""

    name: str
    url: str
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds used so far, workers included."""
        process = psutil.Process(self.pid)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    def peak_mib(self) -> float:
        return peak_mib(self.pid)


def peak_mib(pid: int) -> float:
    """The most memory a process has had (Linux), or what it has now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024
    except FileNotFoundError:
        return psutil.Process(pid).memory_info().rss / MIB


@contextmanager
def warm_servers(bench: Bench, *, nginx: bool = True) -> Iterator[list[Server]]:
    """The mirror first. All of them send the same file: the mirror's own blob."""
    with ExitStack() as stack:
        hub = stack.enter_context(HubProcess())
        hub.repo(REPO).commit({"model.bin": LFS(bench.original)})
        cache = bench.root / "warm"
        mirror = stack.enter_context(MirrorProcess(cache, [hub.url], [hub.cdn_host]))
        curl(mirror.url + FILE)
        blob = bench.root / "blob.bin"
        blob.unlink(missing_ok=True)
        blob.hardlink_to(_only_blob(cache))
        servers = [Server("nearhub", mirror.url + FILE, mirror.pid), stack.enter_context(bare_aiohttp(blob))]
        if nginx and bench.has("nginx", "comparison with nginx"):
            servers.append(stack.enter_context(nginx_server(bench.root, blob)))
        yield servers


def _only_blob(cache: Path) -> Path:
    """The one file in the cache; a client has its last byte a moment before the mirror has filed it away."""
    while not (found := list((cache / "blobs" / "sha256").glob("*/*/*"))):
        time.sleep(0.05)
    return found[0]


@contextmanager
def bare_aiohttp(file: Path) -> Iterator[Server]:
    """The shortest aiohttp program that sends a file, and answers HEAD without looking at it."""
    port = _free_port()
    process = subprocess.Popen([sys.executable, "-c", _BARE, str(file), str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield Server("bare aiohttp", f"http://127.0.0.1:{port}/f", process.pid)
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def nginx_server(root: Path, file: Path) -> Iterator[Server]:
    port = _free_port()
    config = root / "nginx.conf"
    config.write_text(_NGINX.format(dir=root, port=port, file=file))
    root.chmod(0o755)  # its worker is another user
    process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(root)], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/f"
    try:
        curl(url, "-I", "--retry", "50", "--retry-connrefused", "--retry-delay", "0")
        yield Server("nginx", url, process.pid)
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
