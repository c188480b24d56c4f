"""The Cache-Status header (RFC 9211). The same words label metrics and the access log."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Forward(StrEnum):
    """Why upstream was needed (RFC 9211 §2.2)."""

    URI_MISS = "uri-miss"
    PARTIAL = "partial"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """How one request was answered. `forward` None means a hit: no byte of the body had to come from upstream."""

    forward: Forward | None = None
    collapsed: bool = False
    stored: bool = False
    detail: str | None = None
    """A token; see proxy/README.md for which there are."""

    @property
    def word(self) -> str:
        """One token for logs and metric labels."""
        if self.forward is None:
            return "hit"
        return "collapsed" if self.collapsed else str(self.forward)

    def __str__(self) -> str:
        parts = ["nearhub", "hit" if self.forward is None else f"fwd={self.forward}"]
        parts += ["stored"] * self.stored + ["collapsed"] * self.collapsed
        if self.detail:
            parts.append(f"detail={self.detail}")
        return "; ".join(parts)
