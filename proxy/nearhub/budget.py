"""Budget: so many bytes a second, for whatever is brought ahead of its use. Who spends waits; nothing is refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

BURST_S = 0.25
"""What was not spent in this time is saved up."""


def due(free_at: float, now: float, count: int, rate: float) -> float:
    """When `count` bytes are paid for, if all before them are at `free_at`. Seconds; `rate` in bytes per second."""
    return max(free_at, now - BURST_S) + count / rate


class Budget:
    """`rate` in bytes per second; None: without end. Clock: monotonic seconds."""

    def __init__(
        self,
        rate: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.rate = rate
        self._clock = clock
        self._sleep = sleep
        self._free_at = float("-inf")

    async def spend(self, count: int) -> None:
        """Wait until `count` bytes are paid for: they were read already, and the next are not read before."""
        if self.rate is None:
            return
        now = self._clock()
        self._free_at = due(self._free_at, now, count, self.rate)
        if self._free_at > now:
            await self._sleep(self._free_at - now)
