"""SingleFlight: many who ask upstream the same at once share one task. Tasks end with it, not with whoever asked first.

Who has something stale to answer with waits no longer than STALE_AFTER_S, and after a failure not at all for FAILED_TTL_S.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

from nearhub import trace
from nearhub.bounded import Bounded
from nearhub.errors import NearhubError, UpstreamError

log = logging.getLogger(__name__)
T = TypeVar("T")

FAILED_TTL_S = 5.0
"""How long after a failure of upstream what is stale is served without asking again."""
STALE_AFTER_S = 2.0
"""What is known is served stale when upstream takes longer than this."""


class SingleFlight:
    """Owner of the tasks it starts. Clock: wall seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}
        self._failed: Bounded[Hashable, float] = Bounded(10_000)

    async def share(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work`, shared by all who ask for `key` meanwhile. Who is cancelled does not end it."""
        trace.forwarded()
        return await asyncio.shield(self.start(key, work))

    async def share_or_none(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> T | None:
        """As share(); None when upstream does not answer, or not soon enough. The question then goes on without us."""
        failed_at = self._failed.get(key)
        if failed_at is not None and 0 <= self._clock() - failed_at < FAILED_TTL_S:
            return None
        try:
            async with asyncio.timeout(STALE_AFTER_S):
                return await self.share(key, work)
        except (UpstreamError, TimeoutError) as exc:
            self._failed.put(key, self._clock())
            why = str(exc) or f"upstream took longer than {STALE_AFTER_S:g} s"
            trace.note(f"answered stale: {why}")
            log.info("%s: answered stale: %s", key, why)
            return None

    def start(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> asyncio.Task[T]:
        """The task for `key`, begun if there is none. Errors of ours are for whoever awaits it; others are logged."""
        task = self._tasks.get(key)
        if task is None:

            async def run() -> T:
                return await work()

            task = self._tasks[key] = asyncio.get_running_loop().create_task(run(), name=f"ask {key}")
            task.add_done_callback(lambda done: self._done(key, done))
        return task

    def _done(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        del self._tasks[key]
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, NearhubError):
            log.error("asking for %s broke", key, exc_info=error)

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
