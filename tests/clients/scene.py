"""All clients at once against one fault, each with a file of its own, and what must be true whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from nearhub.config import Config
from nearhub.fill import Patience
from tests.clients.programs import ELSEWHERE, MATRIX, MIB, Client, Got, Want, made
from tests.hub import LFS, Content, Fault, Hub, Rule
from tests.mirror import Mirror, configure, running

SIZE = 18 * MIB
"""Of each client's file: more than a small blob, for which other rules hold."""
STREAMED = 1.25 * MIB
"""Bytes per second of one connection to the CDN at which a fill is still under way when the first bytes have to leave."""
CONNECTIONS = 4
QUICK = Patience(hedge_after_s=0.5, min_rate=100_000, rate_window_s=0.5, first_backoff_s=0.01, strikes=3)


@dataclass(frozen=True, slots=True)
class Cell:
    """One client, its file, and where it downloads to."""

    client: Client
    content: Content
    repo: str
    home: Path


class Scene:
    """A mirror whose upstream misbehaves. Cells share nothing but the mirror: each has its repo, its blob, its directory."""

    mirror: Mirror

    def __init__(
        self, hub: Hub, config: Config, patience: Patience, folder: Path, clients: Sequence[Client], size: int
    ) -> None:
        self.hub = hub
        self.cells: list[Cell] = []
        self._config = config
        self._patience = patience
        self._mirrors = AsyncExitStack()
        self._gots: dict[str, Got] = {}
        for number, client in enumerate(clients):
            content = Content(size, seed=1000 + number)
            repo = f"org/for-{client.name.strip('-')}"
            hub.repo(repo).commit({"model.bin": LFS(content)})
            self.cells.append(Cell(client, content, repo, folder / client.name))

    async def start_mirror(self) -> None:
        self.mirror = await self._mirrors.enter_async_context(running(self._config, self._patience))

    async def stop_mirror(self) -> None:
        await self._mirrors.aclose()

    async def restart_mirror(self) -> None:
        """The cache stays, the port changes."""
        await self.stop_mirror()
        await self.start_mirror()

    def spoil(self, fault: Fault, *, on: str = "cdn", times: int | None = None, after: int = 0) -> list[Rule]:
        """The fault, for each cell by itself; a 429 once for all, since it closes the upstream for all."""
        add = self.hub.faults.add
        if fault.status_code == 429:
            return [add(fault, on=on, method="GET", times=times, after=after)]
        return [add(fault, on=on, match=f"{cell.repo}/", method="GET", times=times, after=after) for cell in self.cells]

    def heal(self) -> None:
        """The upstream is in order again, and fast."""
        self.hub.faults.clear()
        self.hub.cap()

    def want(self, cell: Cell) -> Want:
        return Want(self.mirror.url, cell.repo, "model.bin")

    async def download(self) -> dict[str, str]:
        """All cells at once; client name → verdict. Called again: who failed goes on with what it has; nobody else runs."""
        return await self._each(self._get)

    async def _get(self, cell: Cell) -> Got:
        got = self._gots.get(cell.repo)
        if got is None or not got.is_claimed:
            got = self._gots[cell.repo] = await cell.client.get(self.want(cell), cell.home)
        return got

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
    folder: Path,
    clients: Sequence[Client] = MATRIX,
    *,
    size: int = SIZE,
    speed: float | None = STREAMED,
    patience: Patience = QUICK,
    **extra: str,
) -> AsyncIterator[Scene]:
    """A Hub at `speed` bytes per second and connection, a mirror of it, and a repo for each client."""
    extra = {"FILL_CONNECTIONS": str(CONNECTIONS), **extra}
    # Cells must not wait for each other's connections: this is about faults, not about fairness.
    plenty = str(2 * CONNECTIONS * len(clients))
    extra |= {"UPSTREAM_CONNECTIONS": plenty, "FILL_CLIENT_CONNECTIONS": plenty}
    async with Hub() as hub:
        hub.cap(per_connection=speed)
        config = configure(made(folder) / "cache", [hub.url], [hub.cdn_host], **extra)
        play = Scene(hub, config, patience, folder, clients, size)
        await play.start_mirror()
        try:
            yield play
        finally:
            await play.stop_mirror()


def besides(verdicts: dict[str, str], *expected: str) -> dict[str, str]:
    """Whose verdict is none of those: an assertion that this is empty shows who and what."""
    return {name: verdict for name, verdict in verdicts.items() if verdict not in expected}


async def troubles(runs: Mapping[str, Awaitable[dict[str, str]]]) -> dict[str, dict[str, str]]:
    """Run all scenes at once: for each that had any, what went wrong, by client."""
    results = await asyncio.gather(*runs.values())
    return {name: result for name, result in zip(runs, results, strict=True) if result}
