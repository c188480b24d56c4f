"""What the operator follows is brought when it is due: by a clock that moves when told, through a restart and failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nearhub.catalog import Catalog
from nearhub.errors import UpstreamUnreachable
from nearhub.follower import Follower
from nearhub.metrics import Metrics
from nearhub.pins import Pins
from nearhub.prefetch import Prefetcher, Wanted
from nearhub.schedule import Follow, Window
from nearhub.store.blobs import BlobStore
from nearhub.store.index import Index
from tests.hub import LFS, Content, Hub
from tests.mirror import running
from tests.proxy.clock import Clock, settle

HOUR = 3600.0
NOON = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()


class Scripted(Prefetcher):
    """Notes what it is to bring, and when; fails as told."""

    def __init__(self, clock: Clock) -> None:
        self.runs: list[tuple[float, str]] = []
        self.clock = clock
        self.error: Exception | None = None
        self.failed: list[dict[str, str]] = []
        self.takes_s = 0.0
        self.is_off = False

    @property
    def is_offline(self) -> bool:
        return self.is_off

    async def run(self, wanted: Wanted, rate: float | None = None) -> AsyncGenerator[dict[str, Any]]:
        self.runs.append(((self.clock() - NOON) / HOUR, str(wanted)))
        if self.error is not None:
            raise self.error
        yield {"done": 0, "of": 1}
        if self.takes_s:
            await self.clock.sleep(self.takes_s)
        yield {"result": {"commit": "c" * 40, "failed": self.failed}}


@pytest.fixture
def pins(index: Index, tmp_path: Path) -> Pins:
    return Pins(index, Catalog(index, Metrics()), BlobStore(tmp_path))


def follower(index: Index, clock: Clock, prefetcher: Scripted, pins: Pins, *follows: Follow) -> Follower:
    return Follower(
        index, follows, prefetcher, pins, clock=clock, local=lambda at: datetime.fromtimestamp(at, UTC), sleep=clock.sleep
    )


async def hours(clock: Clock, index: Index, count: float) -> None:
    """Move on in steps; between them the index's thread has its turn."""
    for _ in range(round(count * 6)):
        await clock.advance(600.0)
        for _ in range(4):
            await index.run(index.get, "nothing")
            await settle()


async def test_in_turn_and_no_sooner_than_their_intervals(index: Index, pins: Pins) -> None:
    """Two repos, of six hours and of one; a restart in between brings nothing again."""
    clock = Clock(NOON)
    script = Scripted(clock)
    follows = (Follow("org/six"), Follow("org/one", "dev", every_s=HOUR))
    one = follower(index, clock, script, pins, *follows)
    one.start()
    await hours(clock, index, 3)
    await one.close()
    one = follower(index, clock, script, pins, *follows)
    one.start()
    await hours(clock, index, 4)
    rows = await one.report()
    await one.close()
    begun = [at for at, what in script.runs if what == "org/six@main"]
    assert len(begun) == 2 and begun[1] - begun[0] > 5.8
    begun = [at for at, what in script.runs if what == "org/one@dev"]
    assert 6 <= len(begun) <= 8 and all(later - at > 0.8 for at, later in pairwise(begun))
    assert [(row["follow"], row["failures"], row["error"]) for row in rows] == [("org/six@main", 0, ""), ("org/one@dev", 0, "")]


async def test_a_failure_is_tried_again_sooner_and_said(index: Index, pins: Pins) -> None:
    clock = Clock(NOON)
    script = Scripted(clock)
    script.error = UpstreamUnreachable("no upstream answers")
    one = follower(index, clock, script, pins, Follow("org/m"))
    one.start()
    await hours(clock, index, 1)
    assert 3 <= len(script.runs) <= 6  # after 1, 2, 4, 8 … minutes
    (row,) = await one.report()
    assert row["error"] == "no upstream answers" and row["failures"] == len(script.runs)
    script.error, script.failed = None, [{"file": "a.bin", "error": "no room", "fault": "mirror"}]
    await hours(clock, index, 2)
    (row,) = await one.report()
    assert row["error"] == "1 files: a.bin: no room"
    script.failed = []
    await hours(clock, index, 6)
    (row,) = await one.report()
    await one.close()
    assert (row["error"], row["failures"], row["commit"]) == ("", 0, "c" * 40)


async def test_only_in_its_window(index: Index, pins: Pins) -> None:
    """From ten in the evening on."""
    clock = Clock(NOON)
    script = Scripted(clock)
    one = follower(index, clock, script, pins, Follow("org/m", window=Window.from_text("22:00-06:00"), every_s=HOUR * 24))
    one.start()
    await hours(clock, index, 9.5)
    assert script.runs == []
    await hours(clock, index, 1)
    await one.close()
    assert len(script.runs) == 1 and 10 <= script.runs[0][0] < 10.5


async def test_offline_it_waits(index: Index, pins: Pins) -> None:
    """Nothing is tried, nor counted as a failure."""
    clock = Clock(NOON)
    script = Scripted(clock)
    script.is_off = True
    one = follower(index, clock, script, pins, Follow("org/m"))
    one.start()
    await hours(clock, index, 2)
    assert script.runs == []
    script.is_off = False
    await hours(clock, index, 1)
    await one.close()
    assert len(script.runs) == 1


async def test_what_a_closing_window_cuts_off_goes_on_when_it_opens_again(index: Index, pins: Pins) -> None:
    """Not ten days later, as its interval says."""
    clock = Clock(NOON + 6 * HOUR - 0.1)
    script = Scripted(clock)
    script.takes_s = 100 * HOUR
    one = follower(index, clock, script, pins, Follow("org/m", window=Window.from_text("12:00-18:00"), every_s=HOUR * 240))
    one.start()
    async with asyncio.timeout(20):
        while "ended_at" not in (await one.report())[0]:
            pass
    clock.now += 0.1
    (row,) = await one.report()
    await one.close()
    assert "window (12:00-18:00) closed" in row["error"] and row["due_in_s"] == 18 * HOUR


async def test_the_mirror_follows_and_keeps_the_last_commits(hub: Hub, tmp_path: Path) -> None:
    """From its settings: what is followed is here though nobody asked, its commits are pinned. Then it is not followed."""
    from nearhub.config import load

    content = Content(300_000, seed=1)
    hub.repo("org/m").commit({"a.bin": LFS(content), "b.txt": b"b"})
    file = tmp_path / "nearhub.toml"

    async def started(more: str) -> list[dict[str, Any]]:
        file.write_text(
            f'[cache]\ndir = "cache"\n[upstream]\nurls = ["{hub.url}"]\nblob_hosts = ["http://{hub.cdn_host}"]\n{more}'
        )
        async with running(load(file, {}, {})) as mirror:
            await hub.until(lambda: not more or hub.counters.bytes("cdn") >= content.size)
            await mirror.settled()
            operations = mirror.front.operations
            if more:
                while (await operations.stats())["followed"][0].get("error", "-"):
                    pass
            return await operations.pins()

    (pin,) = await started('[[follow]]\nrepo = "org/m"\ninclude = ["*.bin"]\nevery = "1h"\nkeep = 2\n')
    assert (pin["repo"], pin["revision"], pin["last"], pin["group"]) == ("org/m", "main", 2, "follow")
    assert pin["cached_bytes"] == content.size
    assert await started("") == []
