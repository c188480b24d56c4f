"""What was decided for one request: in words, for `nearhub why`; as an Account, for the audit; and whether upstream was needed.

Noted where it is decided.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

_MOST = 40


@dataclass(slots=True)
class Account:
    """What a request was about, and on which grounds it was answered so. None: nothing of the kind.

    `what`: "file", "api", "git", "lfs", "page", "site". `repo` as upstream calls it; `revision` as asked for; `blob` as
    `algo-hash`. `who`: where the request itself does not tell. `grounds`: "public", "grant" (the caller's own token), "policy",
    "pin" (it was public when the operator pinned it).
    """

    what: str | None = None
    repo: str | None = None
    revision: str | None = None
    commit: str | None = None
    path: str | None = None
    blob: str | None = None
    who: str | None = None
    grounds: str | None = None
    policy: str | None = None
    rule: str | None = None


@dataclass(slots=True)
class Trace:
    """`was_forwarded`: the answer had to wait for upstream. `is_offline`: there was none to ask."""

    notes: list[str] = field(default_factory=list)
    was_forwarded: bool = False
    account: Account | None = None
    """Made when there is something to tell."""
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


def account() -> Account:
    """Of the request whose task this is; one that nobody reads where there is none."""
    trace = _current.get()
    if trace is None:
        return Account()
    if trace.account is None:
        trace.account = Account()
    return trace.account


def as_before(known: Account) -> None:
    """This request is answered as an earlier one was, whose account this is. Nobody changes it any more."""
    trace = _current.get()
    if trace is not None:
        trace.account = known
