"""What was decided for one request, in words, for `nearhub why`, and whether upstream was needed. Noted where it is decided."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

_MOST = 40


@dataclass(slots=True)
class Trace:
    """`was_forwarded`: the answer had to wait for upstream. `is_offline`: there was none to ask."""

    notes: list[str] = field(default_factory=list)
    was_forwarded: bool = False
    is_offline: bool = False


_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def begin() -> Trace:
    """The trace of the request whose task this is; tasks that it starts note in it too."""
    trace = Trace()
    _current.set(trace)
    return trace


def note(text: str) -> None:
    trace = _current.get()
    if trace is not None and len(trace.notes) < _MOST:
        trace.notes.append(text)


def forwarded() -> None:
    """This request waits for an answer of upstream's."""
    trace = _current.get()
    if trace is not None:
        trace.was_forwarded = True


def was_forwarded() -> bool:
    trace = _current.get()
    return trace is not None and trace.was_forwarded and not trace.is_offline


def is_offline() -> bool:
    """Whether this request came in while the mirror was offline."""
    trace = _current.get()
    return trace is not None and trace.is_offline
