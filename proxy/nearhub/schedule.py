"""When a followed repo is due. Pure: what is followed, what happened last and what time it is go in, seconds come out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime

from nearhub.units import BadValue, shown

DAY_MIN = 24 * 60
FIRST_RETRY_S = 60.0
"""After a failure, doubled with each one more, up to the usual interval."""


@dataclass(frozen=True, slots=True)
class Window:
    """Minutes of the local day, half-open; `stop` before `start` reaches over midnight."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start // 60:02d}:{self.start % 60:02d}-{self.stop // 60:02d}:{self.stop % 60:02d}"

    @classmethod
    def from_text(cls, text: str) -> Window:
        """`22:00-06:00`. Raises BadValue."""
        match = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]|24):([0-5]\d)", text, re.ASCII)
        if match is None:
            raise BadValue(f"{shown(text)} is not a window; write HH:MM-HH:MM, for example 22:00-06:00")
        start, stop = (int(match[i]) * 60 + int(match[i + 1]) for i in (1, 3))
        if stop > DAY_MIN or (start == stop % DAY_MIN and stop != DAY_MIN):
            raise BadValue(f"{shown(text)} holds no time, or more than a day; leave it out for always")
        return cls(start, stop % DAY_MIN)

    @property
    def length(self) -> int:
        """In minutes."""
        return (self.stop - self.start) % DAY_MIN or DAY_MIN

    def opens_in_s(self, now: datetime) -> float:
        """Seconds until it is open; 0.0: it is. By the clock on the wall: a change of summer time moves it by an hour once."""
        into_s = (_second_of_day(now) - self.start * 60) % (DAY_MIN * 60)
        return 0.0 if into_s < self.length * 60 else DAY_MIN * 60 - into_s

    def closes_in_s(self, now: datetime) -> float:
        """Seconds until an open one is closed."""
        return self.length * 60 - (_second_of_day(now) - self.start * 60) % (DAY_MIN * 60)


@dataclass(frozen=True, slots=True)
class Follow:
    """A [[follow]] table: `repo` (as on the command line) is brought at `revision` again and again.

    `include`, `exclude`: patterns of paths. `keep`: so many of its last commits are pinned; 0: none.
    """

    repo: str
    revision: str = "main"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    every_s: float = 6 * 3600.0
    window: Window | None = None
    keep: int = 0
    where: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True)
class Past:
    """What came of it so far. `began_at`: wall seconds of the last attempt; `failures`: in a row."""

    began_at: float
    failures: int = 0


def wait_s(follow: Follow, past: Past | None, now_s: float, now: datetime) -> float:
    """Seconds until `follow` is to be brought again; 0.0: now. `now_s` in wall seconds, `now` the same on the local clock.

    Never sooner than its interval after it last began, or after a failure, a minute, two, four …; and only in its window.
    A clock that was set back does not make it wait for the old time.
    """
    interval_s = follow.every_s
    if past is not None and past.failures:
        interval_s = min(interval_s, FIRST_RETRY_S * 2.0 ** min(past.failures - 1, 30))
    due_in_s = 0.0 if past is None else past.began_at + interval_s - now_s
    due_in_s = min(max(0.0, due_in_s), interval_s)
    if follow.window is None:
        return due_in_s
    return max(due_in_s, follow.window.opens_in_s(now))


def _second_of_day(now: datetime) -> float:
    return (now.hour * 60 + now.minute) * 60 + now.second + now.microsecond / 1e6
