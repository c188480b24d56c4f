"""How fast bodies may flow: a pacer, and the caps per connection and in all. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, Hashable, MutableMapping
from dataclasses import dataclass

MAX_CHUNK = 256 * 1024
_CATCH_UP_S = 0.25
_STEPS_PER_S = 50


class Pacer:
    """A rate in bytes per second, kept over time: a late wake-up is made good, an idle time is not saved up."""

    def __init__(
        self,
        bytes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.rate = bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._due = 0.0
        self._users = 0

    def begin(self) -> None:
        """A body starts to flow."""
        if self._users == 0:
            self._due = max(self._due, self._clock())
        self._users += 1

    def end(self) -> None:
        self._users -= 1

    async def take(self, size: int) -> None:
        """Return when `size` more bytes may be sent."""
        now = self._clock()
        self._due = max(self._due, now - _CATCH_UP_S) + size / self.rate
        if self._due > now:
            await self._sleep(self._due - now)

    @property
    def chunk(self) -> int:
        """A piece small enough for an even flow."""
        return max(1, min(MAX_CHUNK, int(self.rate / _STEPS_PER_S)))


@dataclass(eq=False)
class Caps:
    """The caps in force. Changing them changes bodies already under way."""

    total: Pacer | None = None
    per_connection: float | None = None

    def __post_init__(self) -> None:
        self._by_connection: MutableMapping[Hashable, Pacer] = weakref.WeakKeyDictionary()

    @property
    def are_off(self) -> bool:
        return self.total is None and self.per_connection is None

    def pacers(self, connection: Hashable) -> list[Pacer]:
        """What a body on this connection has to obey."""
        pacers = [self.total] if self.total else []
        if self.per_connection:
            own = self._by_connection.get(connection)
            if own is None or own.rate != self.per_connection:
                own = self._by_connection[connection] = Pacer(self.per_connection)
            pacers.append(own)
        return pacers
