"""The mirror under test: in this process (Mirror), or as its own process from the command line (MirrorProcess)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from nearhub.config import Config, load
from nearhub.fill import FillEngine, Patience
from nearhub.metrics import Metrics
from nearhub.web.app import limits_of, listening, mirror
from nearhub.web.front import Front

READY = "nearhub ready on "


def configure(cache: Path, upstreams: Sequence[str], blob_hosts: Sequence[str] = (), **extra: str) -> Config:
    """A configuration for tests; `extra` are NEARHUB_ variables without the prefix, such as SERVER_PREFIX."""
    return load(None, environment(cache, upstreams, blob_hosts, **extra), {})


def environment(cache: Path, upstreams: Sequence[str], blob_hosts: Sequence[str] = (), **extra: str) -> dict[str, str]:
    variables = {
        "CACHE_DIR": str(cache),
        "UPSTREAM_URLS": ",".join(upstreams),
        "UPSTREAM_BLOB_HOSTS": ",".join(f"http://{host}" for host in blob_hosts),
    }
    return {f"NEARHUB_{key}": value for key, value in (variables | extra).items() if value}


@dataclass(slots=True)
class Mirror:
    """A mirror in this process. `url` includes the prefix."""

    url: str
    front: Front

    @property
    def fills(self) -> FillEngine:
        return self.front.files.fills

    @property
    def metrics(self) -> Metrics:
        return self.front.metrics

    async def settled(self) -> None:
        """Until no fill is under way."""
        async with asyncio.timeout(60):
            while self.fills.running:
                await self.fills.running[0].done.wait()


@asynccontextmanager
async def running(config: Config, patience: Patience | None = None) -> AsyncIterator[Mirror]:
    """Start a mirror on a free port; stopped, with nothing left running, on leaving."""
    async with (
        mirror(config, patience=patience) as front,
        listening(front.handle, "127.0.0.1", 0, 5.0, limits_of(config.server), front.metrics) as port,
    ):
        yield Mirror(f"http://127.0.0.1:{port}{config.server.prefix}", front)


@dataclass(slots=True)
class MirrorProcess:
    """`nearhub serve` as a user starts it. Use as a context manager, or start(), kill(), terminate()."""

    cache: Path
    upstreams: Sequence[str]
    blob_hosts: Sequence[str] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    url: str = ""
    log: Path | None = None
    _process: subprocess.Popen[str] | None = None

    def start(self) -> MirrorProcess:
        """Returns once the mirror says that it is ready. RuntimeError with its output when it does not start."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("NEARHUB_")}
        env |= environment(self.cache, self.upstreams, self.blob_hosts, **{"SERVER_PORT": str(self.port), **self.extra})
        self.log = self.cache.with_name(f"{self.cache.name}.log")
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nearhub", "serve"], env=env, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(READY):
            if line:
                self._process.kill()
            status = self._wait()
            raise RuntimeError(f"the mirror did not start: {line!r}, status {status}\n{self.log.read_text()[-2000:]}")
        self.url = line.removeprefix(READY).strip()
        self.port = int(self.url.split("://")[1].split("/")[0].rpartition(":")[2])
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._wait()

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._wait()

    def _wait(self) -> int:
        assert self._process is not None
        status = self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        return status

    def __enter__(self) -> MirrorProcess:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self.terminate()


async def run_client(*command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> tuple[int, str]:
    """Run a client program to its end; (exit status, its output). Cancelled: the program is killed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **env} if env else None,
        cwd=cwd,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")
