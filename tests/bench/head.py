"""HEAD of a cached file: how many a second against a bare aiohttp handler, and how long while bulk streams run.

The server has a core, and the clients have the others, as if they were on other machines. The client is our own: wrk waits for
a body after HEAD, for ever.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from tests.bench.common import Bench, median
from tests.bench.servers import Server, warm_servers


def head(bench: Bench) -> None:
    bench.title("warm HEAD")
    with warm_servers(bench, nginx=False) as (mirror, bare), clients_apart(mirror, bare):
        ratios, rates = [], []
        for _ in range(bench.rounds):
            rate, bare_rate = (len(heads(server.url, connections=32, seconds=2.0)) / 2.0 for server in (mirror, bare))
            ratios.append(rate / bare_rate)
            rates.append((rate, bare_rate))
        ours, theirs = (median(list(column)) for column in zip(*rates, strict=True))
        bench.row(
            "32 connections: rate / bare aiohttp", median(ratios), least=0.5, note=f"{ours:,.0f} against {theirs:,.0f} /s"
        )
        for streams, pause, goal in ((0, 0.0, None), (20, 1.0, None), (20, 0.0, 50)):
            with bulk(mirror.url, streams):
                taken = heads(mirror.url, connections=200, seconds=5.0, pause_s=pause)
            what = f"p95 of 200 connections {'at 1/s each' if pause else 'at full rate'}, {streams} bulk streams"
            note = f"{len(taken) / 5.0:,.0f} /s; median {1000 * statistics.median(taken):.0f} ms"
            bench.row(what, 1000 * p95(taken), "ms", digits=0, most=goal, note=note)


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


def heads(url: str, *, connections: int, seconds: float, pause_s: float = 0.0) -> list[float]:
    """Each connection asks again when it has its answer, after a pause. Returns the seconds that each answer took."""
    return asyncio.run(_heads(url, connections, seconds, pause_s))


async def _heads(url: str, connections: int, seconds: float, pause_s: float) -> list[float]:
    loop, parts, taken = asyncio.get_running_loop(), urlsplit(url), list[float]()
    asking = [Asking(parts.netloc, parts.path, taken, pause_s) for _ in range(connections)]
    for one in asking:
        await loop.create_connection(lambda one=one: one, parts.hostname, parts.port)  # type: ignore[misc,arg-type]
    taken.clear()  # what was answered while others still connected
    await asyncio.sleep(seconds)
    result = list(taken)
    for one in asking:
        one.stop()
    if any(one.is_broken for one in asking) or not result:
        raise RuntimeError(f"HEAD {url}: an answer was not a 200, or none came")
    return result


class Asking(asyncio.Protocol):
    """One connection: HEAD, answer, HEAD, answer. As little work as possible, for the server is to be measured."""

    def __init__(self, host: str, path: str, taken: list[float], pause_s: float) -> None:
        self._question = f"HEAD {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bench\r\n\r\n".encode()
        self._taken = taken
        self._pause_s = pause_s
        self._got = b""
        self._stopped = False
        self.is_broken = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask_after(random.uniform(0, self._pause_s))  # not all in step

    def _ask_after(self, pause_s: float) -> None:
        if pause_s:
            asyncio.get_running_loop().call_later(pause_s, self._ask)
        else:
            self._ask()

    def _ask(self) -> None:
        self._asked_at = time.monotonic()
        self._transport.write(self._question)

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._got.endswith(b"\r\n\r\n") and not self._stopped:
            self._taken.append(time.monotonic() - self._asked_at)
            self.is_broken |= not self._got.startswith(b"HTTP/1.1 200")
            self._got = b""
            self._ask_after(self._pause_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_broken |= not self._stopped

    def stop(self) -> None:
        self._stopped = True
        self._transport.abort()


@contextmanager
def clients_apart(*servers: Server) -> Iterator[None]:
    """Where the system can do it, and has the cores."""
    cores = getattr(os, "sched_getaffinity", lambda _: ())(0)
    if len(cores) < 2:
        yield
        return
    first, *others = sorted(cores)
    for server in servers:
        os.sched_setaffinity(server.pid, [first])
    os.sched_setaffinity(0, others)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def bulk(url: str, streams: int) -> Iterator[None]:
    """So many clients that download the file again and again, behind the one that measures."""
    command = ["nice", "-n", "19", "curl", "-sf", "-o", "/dev/null", f"{url}?[1-100000]"]
    processes = [subprocess.Popen(command) for _ in range(streams)]
    try:
        yield
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a bulk stream ended")
    finally:
        for process in processes:
            process.kill()
            process.wait()
