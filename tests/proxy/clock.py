"""A clock that moves when told, and sleeps that end when it has moved far enough: no test waits."""

from __future__ import annotations

import asyncio


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


class Clock:
    """Seconds. Give it as the clock, and its sleep as the sleep."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        end = asyncio.get_running_loop().create_future()
        sleeper = (self.now + seconds, end)
        self._sleepers.append(sleeper)
        try:
            await end
        finally:
            self._sleepers.remove(sleeper)

    @property
    def sleepers(self) -> int:
        return len(self._sleepers)

    async def advance(self, seconds: float) -> None:
        """Move on; whoever sleeps until then or sooner is woken in order, at his time. Nobody may do so without end."""
        target, woken = self.now + seconds, 0
        await settle()
        while due := [sleeper for sleeper in self._sleepers if sleeper[0] <= target and not sleeper[1].done()]:
            self.now, end = min(due, key=lambda sleeper: sleeper[0])
            end.set_result(None)
            woken += 1
            assert woken < 1000, "somebody sleeps for no time, again and again"
            await settle()
        self.now = target
        await settle()
