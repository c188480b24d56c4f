"""SingleFlight: many who ask upstream the same at once share one task. Tasks end with it, not with whoever asked first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

from nearhub import trace
from nearhub.errors import NearhubError

log = logging.getLogger(__name__)
T = TypeVar("T")


class SingleFlight:
    """Owner of the tasks it starts."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}

    async def share(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work`, shared by all who ask for `key` meanwhile. Who is cancelled does not end it."""
        trace.forwarded()
        return await asyncio.shield(self.start(key, work))

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
