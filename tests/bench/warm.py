"""Cached files: speed and CPU against a bare aiohttp sendfile handler and nginx, in pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.bench.common import MIB, Bench, aria2c, curl, curls, median, timed
from tests.bench.servers import Server, warm_servers

SPEED_GOALS = {"bare aiohttp": 0.95, "nginx": 0.75}
Download = Callable[[str], None]


def warm(bench: Bench) -> None:
    bench.title(f"warm GET of {bench.size // MIB} MiB")
    with warm_servers(bench) as servers:
        _compare(bench, servers, "one connection", curl, bench.size)
        if bench.has("aria2c", "aria2c -x16"):
            _compare(bench, servers, "aria2c -x16", partial(aria2c, connections=16), bench.size)
            _x16_against_x1(bench, servers[0])
        _compare(bench, servers, "8 at once", partial(curls, count=8), 8 * bench.size)
        bench.row("most memory of the mirror", servers[0].peak_mib(), "MiB", digits=0, most=150)


def _compare(bench: Bench, servers: list[Server], how: str, download: Download, size: int) -> None:
    seconds: dict[str, list[float]] = {server.name: [] for server in servers}
    cpu: dict[str, list[float]] = {server.name: [] for server in servers}
    for _ in range(bench.rounds):
        for server in servers:
            before = server.cpu_s()
            seconds[server.name].append(timed(download, server.url))
            cpu[server.name].append(server.cpu_s() - before)
    ours, ours_cpu = seconds["nearhub"], cpu["nearhub"]
    for name in (server.name for server in servers[1:]):
        ratio = median([theirs / our for our, theirs in zip(ours, seconds[name], strict=True)])
        note = f"{_mib_per_s(size, ours)} against {_mib_per_s(size, seconds[name])} MiB/s"
        bench.row(f"{how}: speed / {name}", ratio, least=SPEED_GOALS[name], note=note)
    if "nginx" in cpu:
        ratio = median([our / max(theirs, 0.01) for our, theirs in zip(ours_cpu, cpu["nginx"], strict=True)])
        gib = size / MIB / 1024
        note = f"{median(ours_cpu) / gib:.2f} against {median(cpu['nginx']) / gib:.2f} s per GiB"
        bench.row(f"{how}: CPU per GiB / nginx", ratio, most=1.5, note=note)


def _x16_against_x1(bench: Bench, mirror: Server) -> None:
    ratios = [timed(aria2c, mirror.url, 1) / timed(aria2c, mirror.url, 16) for _ in range(bench.rounds)]
    bench.row("aria2c: speed of -x16 / -x1, both from the mirror", median(ratios), least=1.0)


def _mib_per_s(size: int, seconds: list[float]) -> str:
    return f"{size / MIB / median(seconds):,.0f}"
