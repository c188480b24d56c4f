"""Which bytes of an unverified blob may leave, and when (P1, P1a). Pure.

The invariant: no client address ever holds every byte of a blob of which one is unverified. It either lacks the last 64 KiB, or
(a footer read) has been given at most 8 MiB of a blob larger than 16 MiB.
While verification lags, bytes just below the bound are dripped, since clients give up after 10 s of silence.
"""

from __future__ import annotations

from dataclasses import dataclass

from nearhub.planner import SMALL_BLOB

TAIL = 64 * 1024
"""Bytes at the end of a blob that wait for its verification."""
FOOTER = 8 * 1024 * 1024
"""Unverified bytes in all that an address may have of a blob once it has any of the tail."""
RESERVE = 512 * 1024
"""Bytes below a bound that are dripped, so that there is something to send while verification catches up."""
DRIP = 1024
DRIP_EVERY_S = 3.0
HOLD_S = 2.0
"""A blob that completes within this time is verified before its first byte leaves."""
JUDGE_AFTER_S = 0.05
"""After its first byte, a fill's rate is trusted from here on (P3: first byte ≤ upstream's + 50 ms)."""


@dataclass(slots=True)
class Ledger:
    """What one client address was sent of one blob before it was verified."""

    sent: int = 0
    has_tail: bool = False
    streamed: bool = False
    """Whether any of it was more than a footer read: then it may hold a part that would be continued."""


@dataclass(frozen=True, slots=True)
class Release:
    """Bytes up to `end` may be sent now. When `end` is the position: wait for news, or for `again_s` at most.

    `is_exhausted`: nothing is left to drip, the connection must be cut if `again_s` passes without verification.
    """

    end: int
    again_s: float | None = None
    is_exhausted: bool = False


def release(
    *, position: int, stop: int, there: int, size: int, ledger: Ledger, is_footer: bool, silent_s: float, sent_any: bool
) -> Release:
    """For a reader of an unverified blob at `position` that reads on to `stop`; bytes are there up to `there`.

    `is_footer`: it asked for a closed or suffix range. `silent_s` seconds since it was last sent something.
    """
    tail = max(0, size - TAIL)
    left = FOOTER - ledger.sent
    may_have_tail = is_footer and size > SMALL_BLOB
    if ledger.has_tail or (may_have_tail and position + left > tail):
        free, bound = position + left, position + left + RESERVE
    elif stop <= tail:
        free, bound = stop, stop
    else:
        free, bound = tail - RESERVE, tail
    if not may_have_tail:
        bound = min(bound, tail)
    bound = min(bound, stop)
    free = min(free, bound)
    if min(free, there) > position:
        return Release(min(free, there))
    if there <= position:
        return Release(position)
    if bound <= position:
        return Release(position, again_s=DRIP_EVERY_S if sent_any else None, is_exhausted=sent_any)
    if silent_s < DRIP_EVERY_S:
        return Release(position, again_s=DRIP_EVERY_S - silent_s)
    return Release(min(position + DRIP, bound, there))


def is_streaming(ledger: Ledger, count: int, *, is_footer: bool) -> bool:
    """Whether `count` more unverified bytes make this address one that downloads the blob rather than peeks at its footer."""
    return not is_footer or ledger.streamed or ledger.sent + count > FOOTER


def charge(ledger: Ledger, *, start: int, stop: int, size: int, is_footer: bool) -> None:
    """Write into the ledger that unverified bytes [start, stop) leave."""
    ledger.streamed = is_streaming(ledger, stop - start, is_footer=is_footer)
    ledger.sent += stop - start
    ledger.has_tail = ledger.has_tail or stop > size - TAIL


def holds_first_byte(*, missing: int, received: int, since_start_s: float, since_first_byte_s: float | None) -> bool:
    """Whether the first byte should wait, because at this rate the blob is complete and verified within HOLD_S.

    `missing` bytes when the fill began, of which `received` came since: what was there already says nothing of the rate.
    """
    if since_start_s >= HOLD_S or since_first_byte_s is None or received == 0:
        return since_start_s < HOLD_S
    if since_first_byte_s < JUDGE_AFTER_S:
        return True
    before_s = since_start_s - since_first_byte_s
    return before_s + since_first_byte_s * missing / received <= HOLD_S
