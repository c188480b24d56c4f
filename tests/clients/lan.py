"""A LAN: a Hub, a mirror of it as a process, and client programs that can reach nothing but the mirror.

A program that asks anybody else is heard: every proxy variable names a listener here that writes down what it is asked, and
the Hub knows who asks it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.clients import old_client
from tests.clients.programs import made
from tests.hub import Exchange, Hub, Limits
from tests.mirror import MirrorProcess, run_client

PREFIX = "/huggingface-proxy"
NEWEST = "2.4.0"
VERSIONS = (NEWEST, old_client.VERSION, old_client.OLDEST)
LATER = Path(__file__).with_name("later")
_SCRIPT = """
import hashlib, json, os, pathlib, sys
def raised(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        return [type(error).__name__, " <- ".join(str(one) for one in causes)]
def hashes(folder):
    root = pathlib.Path(folder)
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}
out = {}
"""
_END = '\npathlib.Path(os.environ["OUT"]).write_text(json.dumps(out))\n'


@dataclass(slots=True)
class Lan:
    """`base` is the prefix under which clients have the mirror."""

    hub: Hub
    mirror: MirrorProcess
    base: str
    folder: Path
    trap: str
    heard: list[str] = field(default_factory=list)
    """First lines of requests that went to anybody else."""
    _homes: int = 0

    @property
    def url(self) -> str:
        """What clients have as HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.mirror.port}{self.base}"

    def new_home(self) -> Path:
        """An empty home directory: a client that has nothing yet."""
        self._homes += 1
        return made(self.folder / f"home-{self._homes}")

    def environment(self, home: Path) -> dict[str, str]:
        """All that a client program knows. Xet, telemetry and everything else are as users have them."""
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"), self.trap)
        return {
            **proxies,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "OUT": str(home / "out.json"),
        }

    async def hf(self, *arguments: str, home: Path) -> str:
        """`hf`, which has to succeed; what it said."""
        hf = str(Path(sys.executable).with_name("hf"))
        status, said = await run_client("env", "-i", *self._settings(home), hf, *arguments, cwd=home)
        assert status == 0, said
        return said

    async def python(self, script: str, *, home: Path | None = None, version: str = NEWEST, **more: str) -> dict[str, Any]:
        """Run a script with that huggingface_hub in a process of its own, with a new home unless one is given: its `out`.

        `raised(call, …)` gives the exception's type and its text with those of its causes, `hashes(folder)` path → sha256.
        """
        home = home or self.new_home()
        program = sys.executable if version == NEWEST else str(old_client.python(version))
        code = f"{_SCRIPT}{script}{_END}"
        status, said = await run_client("env", "-i", *self._settings(home, more), program, "-c", code, cwd=home)
        assert status == 0, said
        result: dict[str, Any] = json.loads((home / "out.json").read_text())
        return result

    def _settings(self, home: Path, more: Mapping[str, str] | None = None) -> list[str]:
        return [f"{key}={value}" for key, value in (self.environment(home) | dict(more or {})).items()]

    def metadata_calls(self, match: str | None = None) -> list[str]:
        """What the Hub was asked that is not content; content is a GET of …/resolve/…, of resolve-cache or of the CDN."""
        return [f"{one.method} {one.raw_path}" for one in self.hub.log.find("hub", match=match) if not _is_content(one)]

    def off_the_mirror(self) -> list[str]:
        """Who was asked by a client program, and was not the mirror."""
        asked = [f"{one.origin}: {one.raw_path}" for one in self.hub.log if not _is_nearhub(one)]
        return [*self.heard, *asked]

    async def later(self, hours: float = 24) -> None:
        """The mirror is started again on its cache, so much later: all that it knows of branches and visibility is old."""
        self.mirror.terminate()
        with _hours_later(hours):
            self.mirror.start()

    async def hub_dies(self) -> None:
        """A day later the Hub is gone."""
        await self.hub.stop()
        await self.later()

    async def hub_refuses(self) -> None:
        """A day later the Hub answers 429 to everything, with the headers that it has for that."""
        if not self.hub_is_up:
            await self.hub.start()
        self.hub.log.clear()
        self.hub.limits = Limits(api=0, resolvers=0, pages=0, enforce=True)
        await self.later()

    @property
    def hub_is_up(self) -> bool:
        return "up" in repr(self.hub)

    def refusals(self) -> int:
        """How often the Hub was asked since, each time in vain."""
        assert {one.status for one in self.hub.log.find("hub")} <= {429}
        return len(self.hub.log.find("hub"))

    async def cache_status(self, path: str) -> str:
        """What the mirror says of how it answers."""
        async with aiohttp.ClientSession() as session, session.head(f"{self.url}{path}") as response:
            assert response.status == 200
            return response.headers["Cache-Status"]


@asynccontextmanager
async def lan(
    folder: Path, base: str = "", *, hub: Hub, upstreams: Sequence[str] = (), blob_hosts: Sequence[str] = (), **extra: str
) -> AsyncIterator[Lan]:
    """A mirror of `hub`, or of `upstreams`, and the listener that hears of everything else."""
    heard: list[str] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append((await reader.readline()).decode(errors="replace").strip())
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    trap = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    extra = {"SERVER_PREFIX": base, **extra}
    mirror = MirrorProcess(folder / "cache", upstreams or [hub.url], blob_hosts or [hub.cdn_host], extra)
    async with server:
        with _hours_later(0), mirror:
            yield Lan(hub, mirror, base, folder, trap, heard)


@contextmanager
def _hours_later(hours: float) -> Iterator[None]:
    """Processes that are started meanwhile live so much later, by a slow clock (later/sitecustomize.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(LATER), prepend=os.pathsep)
        patch.setenv("HOURS_LATER", str(hours))
        yield


def _is_content(one: Exchange) -> bool:
    path = one.raw_path.partition("?")[0]
    return one.method == "GET" and ("/resolve/" in path or path.startswith("/api/resolve-cache/"))


def _is_nearhub(one: Exchange) -> bool:
    return (one.header("User-Agent") or "").startswith("nearhub/")
