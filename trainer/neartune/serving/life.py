"""The life of a base in memory, as a table. Pure.

              who may                what ends it
    COMING    come, and waits        LOADED → HERE, or FAILED → GONE: its load ends
    HERE      come                   ASKED → LEAVING, or DROP → GOING
    LEAVING   wait for its end       DROP → GOING once nobody uses it, or SPARED → HERE: who made room ends
    GOING     wait for its end       DROPPED → GONE: the step that its thread is at ends
    GONE      have it loaded anew

So who waits for a base waits for something that ends. COME and WENT count who uses it; a base in use is never dropped.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from enum import auto


class Phase(enum.Enum):
    COMING, HERE, LEAVING, GOING, GONE = auto(), auto(), auto(), auto(), auto()


class Event(enum.Enum):
    """COME, WENT: one that uses it. ASKED, SPARED: to make room. DROP, DROPPED: its thread and its memory."""

    COME, WENT, LOADED, FAILED, ASKED, SPARED, DROP, DROPPED = auto(), auto(), auto(), auto(), auto(), auto(), auto(), auto()


_TABLE: Mapping[tuple[Phase, Event], Phase] = {
    (Phase.COMING, Event.COME): Phase.COMING,
    (Phase.COMING, Event.WENT): Phase.COMING,
    (Phase.COMING, Event.LOADED): Phase.HERE,
    (Phase.COMING, Event.FAILED): Phase.GONE,
    (Phase.HERE, Event.COME): Phase.HERE,
    (Phase.HERE, Event.WENT): Phase.HERE,
    (Phase.HERE, Event.ASKED): Phase.LEAVING,
    (Phase.HERE, Event.DROP): Phase.GOING,
    (Phase.LEAVING, Event.WENT): Phase.LEAVING,
    (Phase.LEAVING, Event.SPARED): Phase.HERE,
    (Phase.LEAVING, Event.DROP): Phase.GOING,
    (Phase.GOING, Event.DROPPED): Phase.GONE,
    (Phase.GONE, Event.WENT): Phase.GONE,
}


@dataclass(frozen=True, slots=True)
class Life:
    phase: Phase = Phase.COMING
    users: int = 0

    @property
    def is_open(self) -> bool:
        """Whether one more may use it."""
        return (self.phase, Event.COME) in _TABLE

    @property
    def is_loaded(self) -> bool:
        return self.phase in (Phase.HERE, Phase.LEAVING)


def step(life: Life, event: Event) -> Life:
    """Raises ValueError where `event` cannot happen."""
    phase = _TABLE.get((life.phase, event))
    users = life.users + {Event.COME: 1, Event.WENT: -1}.get(event, 0)
    if phase is None or users < 0 or (event is Event.DROP and users):
        raise ValueError(f"{event.name} cannot happen to a base that is {life.phase.name} with {life.users} users")
    return Life(phase, users)
