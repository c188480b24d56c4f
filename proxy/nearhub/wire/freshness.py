"""May what we know be used? Decided from facts given as arguments: no clock, no disk, no network (RFC 9111 §4)."""

from __future__ import annotations

from enum import Enum


class Decision(Enum):
    USE = "use"
    """Fresh, or immutable: answer from the store."""
    USE_AND_REFRESH = "use and refresh"
    """Just stale: answer from the store, and ask upstream meanwhile (RFC 5861)."""
    REVALIDATE = "revalidate"
    """Known but stale: ask upstream, fall back on what is known."""
    FETCH = "fetch"
    """Unknown: only upstream can tell."""
    USE_STALE = "use stale"
    """Known, and upstream cannot be asked or did not answer (RFC 9111 §4.2.4)."""
    FAIL = "fail"
    """Unknown, and upstream cannot be asked or did not answer."""


def decide(
    *, age_s: float | None, ttl_s: float, immutable: bool = False, grace_s: float = 0.0, reachable: bool = True
) -> Decision:
    """`age_s` of what is known, None when nothing is. `grace_s`: for how long after `ttl_s` it is used while upstream is asked.

    `reachable` False: upstream failed just now, or we are offline.

    A negative age (the clock was set back) counts as stale, never as fresh for years.
    """
    if age_s is None:
        return Decision.FETCH if reachable else Decision.FAIL
    if immutable or 0 <= age_s < ttl_s:
        return Decision.USE
    if reachable and 0 <= age_s < ttl_s + grace_s:
        return Decision.USE_AND_REFRESH
    return Decision.REVALIDATE if reachable else Decision.USE_STALE
