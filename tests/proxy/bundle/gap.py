"""Two mirrors with an air gap between them, and the command line at both."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tests.hub import Hub
from tests.mirror import Mirror, configure, run_client, running


def nowhere() -> str:
    """A URL where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@dataclass
class Side:
    """A cache, and `nearhub …` on it."""

    cache: Path
    env: Mapping[str, str]

    async def run(self, *arguments: str, status: int = 0) -> str:
        """Output of a verb."""
        command = (sys.executable, "-m", "nearhub", arguments[0], "--cache-dir", str(self.cache), *arguments[1:])
        got, output = await run_client(*command, env=self.env)
        assert got == status, output
        return output

    async def ask(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(await self.run(*arguments, "--json", status=status))

    def blobs(self) -> list[Path]:
        return [path for path in (self.cache / "blobs").rglob("*") if path.is_file()]


def inside(folder: Path, **extra: str) -> Side:
    """A side that has never seen the Hub; no mirror runs there yet."""
    env = {"NEARHUB_UPSTREAM_URLS": nowhere(), **{f"NEARHUB_{key}": value for key, value in extra.items()}}
    return Side(folder, env)


@asynccontextmanager
async def outside(folder: Path, hub: Hub, **extra: str) -> AsyncIterator[tuple[Side, Mirror]]:
    """A side with a running mirror of `hub`."""
    async with running(configure(folder, [hub.url], [hub.cdn_host], **extra)) as mirror:
        yield Side(folder, {"NEARHUB_UPSTREAM_URLS": hub.url}), mirror


@asynccontextmanager
async def serving(side: Side, config: Path | None = None) -> AsyncIterator[Mirror]:
    """A mirror of `side`, which asks an upstream that does not answer."""
    from nearhub.config import load

    variables = {**side.env, "NEARHUB_CACHE_DIR": str(side.cache)}
    async with running(load(config, variables, {})) as mirror:
        yield mirror


async def get(url: str, token: str | None = None) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as response:
        return response.status, await response.read()


async def fetched(mirror: Mirror, repo: str, *paths: str, token: str | None = None) -> None:
    """Have the mirror bring these files."""
    for path in paths:
        status, _ = await get(f"{mirror.url}/{repo}/resolve/main/{path}", token)
        assert status == 200, path
    await mirror.settled()
