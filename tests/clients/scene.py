"""All clients at once against one fault, each with a file of its own, and what must be true whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from nearhub.fill import Patience
from tests.clients.programs import ALL, ELSEWHERE, MIB, Client, Got, Want
from tests.hub import LFS, Content, Fault, Hub, Rule
from tests.mirror import Mirror, configure, running

SIZE = 24 * MIB
"""Of each client's file: more than a small blob, for which other rules hold."""
STREAMED = 1.5 * MIB
"""Bytes per second of one connection to the CDN at which a fill is still under way when the first bytes have to leave."""
CONNECTIONS = 4
QUICK = Patience(hedge_after_s=0.5, min_rate=100_000, rate_window_s=0.5, first_backoff_s=0.01)


@dataclass(frozen=True, slots=True)
class Cell:
    """One client, its file, and where it downloads to."""

    client: Client
    content: Content
    repo: str
    home: Path


class Scene:
    """A mirror whose upstream misbehaves. Cells share nothing but the mirror: each has its repo, its blob, its directory."""

    def __init__(self, hub: Hub, mirror: Mirror, folder: Path, clients: Sequence[Client], size: int) -> None:
        self.hub = hub
        self.mirror = mirror
        self.cells: list[Cell] = []
        for number, client in enumerate(clients):
            content = Content(size, seed=1000 + number)
            repo = f"org/for-{client.name.strip('-')}"
            hub.repo(repo).commit({"model.bin": LFS(content)})
            self.cells.append(Cell(client, content, repo, folder / client.name))

    def spoil(self, fault: Fault, *, on: str = "cdn", times: int | None = None, after: int = 0) -> list[Rule]:
        """The fault, for each cell by itself."""
        add = self.hub.faults.add
        return [add(fault, on=on, match=f"{cell.repo}/", method="GET", times=times, after=after) for cell in self.cells]

    def heal(self) -> None:
        """The upstream is in order again, and fast."""
        self.hub.faults.clear()
        self.hub.cap()

    def want(self, cell: Cell) -> Want:
        return Want(self.mirror.url, cell.repo, "model.bin")

    async def download(self) -> dict[str, str]:
        """All cells at once; client name → verdict."""
        return await self._each(lambda cell: cell.client.get(self.want(cell), cell.home))

    async def download_afresh(self) -> dict[str, str]:
        """All cells again, as a newcomer with nothing on its disk."""
        return await self._each(lambda cell: cell.client.get(self.want(cell), cell.home.with_name(f"{cell.client} afresh")))

    async def download_elsewhere(self) -> dict[str, str]:
        """Each cell's file, by a client at another address."""
        return await self._each(lambda cell: ELSEWHERE.get(self.want(cell), cell.home.with_name(f"{cell.client} elsewhere")))

    async def _each(self, get: Callable[[Cell], Awaitable[Got]]) -> dict[str, str]:
        gots = await asyncio.gather(*(get(cell) for cell in self.cells))
        return {cell.client.name: got.verdict(cell.content.sha256) for cell, got in zip(self.cells, gots, strict=True)}


@asynccontextmanager
async def scene(
    hub: Hub,
    folder: Path,
    clients: Sequence[Client] = ALL,
    *,
    size: int = SIZE,
    speed: float | None = STREAMED,
    patience: Patience = QUICK,
    **extra: str,
) -> AsyncIterator[Scene]:
    """A mirror, a repo for each client, and an upstream at `speed` bytes per second and connection."""
    extra = {"FILL_CONNECTIONS": str(CONNECTIONS), **extra}
    # Cells must not wait for each other's connections: this is about faults, not about fairness.
    plenty = str(2 * CONNECTIONS * len(clients))
    extra |= {"UPSTREAM_CONNECTIONS": plenty, "FILL_CLIENT_CONNECTIONS": plenty}
    hub.cap(per_connection=speed)
    async with running(configure(folder / "cache", [hub.url], [hub.cdn_host], **extra), patience) as mirror:
        yield Scene(hub, mirror, folder, clients, size)


def all_of(verdicts: dict[str, str], *allowed: str) -> bool:
    """Whether every verdict is one of those, with a message that shows the others."""
    rest = {name: verdict for name, verdict in verdicts.items() if verdict not in allowed}
    assert rest == {}
    return True
