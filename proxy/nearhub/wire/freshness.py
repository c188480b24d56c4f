"""May what we know be used? Decided from facts given as arguments: no clock, no disk, no network (RFC 9111 §4)."""

from __future__ import annotations

from enum import Enum


class Decision(Enum):
    USE = "use"
    """Fresh, or immutable: answer from the store."""
    REVALIDATE = "revalidate"
    """Known but stale: ask upstream, fall back on what is known."""
    FETCH = "fetch"
    """Unknown: only upstream can tell."""
    USE_STALE = "use stale"
    """Known, and upstream cannot be asked or did not answer (RFC 9111 §4.2.4)."""
    FAIL = "fail"
    """Unknown, and upstream cannot be asked or did not answer."""


def decide(*, age_s: float | None, ttl_s: float, immutable: bool, reachable: bool = True) -> Decision:
    """`age_s` of what is known, None when nothing is. `reachable` False: upstream failed just now, or we are offline.

    A negative age (the clock was set back) counts as stale, never as fresh for years.
    """
    if age_s is None:
        return Decision.FETCH if reachable else Decision.FAIL
    if immutable or 0 <= age_s < ttl_s:
        return Decision.USE
    return Decision.REVALIDATE if reachable else Decision.USE_STALE
