"""decide(): the complete table."""

from __future__ import annotations

import itertools

import pytest

from nearhub.wire.freshness import Decision, decide

TTL_S = 60.0


@pytest.mark.parametrize(
    ("age_s", "immutable", "reachable", "decision"),
    [
        (None, False, True, Decision.FETCH),
        (None, False, False, Decision.FAIL),
        (None, True, True, Decision.FETCH),
        (None, True, False, Decision.FAIL),
        (0.0, False, True, Decision.USE),
        (0.0, False, False, Decision.USE),
        (59.999, False, True, Decision.USE),
        (59.999, False, False, Decision.USE),
        (60.0, False, True, Decision.REVALIDATE),
        (60.0, False, False, Decision.USE_STALE),
        (1e12, False, True, Decision.REVALIDATE),
        (1e12, False, False, Decision.USE_STALE),
        (-1.0, False, True, Decision.REVALIDATE),
        (-1.0, False, False, Decision.USE_STALE),
        (-1.0, True, True, Decision.USE),
        (1e12, True, True, Decision.USE),
        (1e12, True, False, Decision.USE),
    ],
)
def test_the_table(age_s: float | None, immutable: bool, reachable: bool, decision: Decision) -> None:
    """A negative age (the clock was set back) is stale; what is immutable never is."""
    assert decide(age_s=age_s, ttl_s=TTL_S, immutable=immutable, reachable=reachable) is decision


def test_upstream_is_asked_only_when_it_can_be() -> None:
    """And what is known is never refused: whatever the age, TTL and kind."""
    ages = (None, -1e9, -0.1, 0.0, 0.1, 59.0, 61.0, 1e9)
    for age_s, ttl_s, immutable in itertools.product(ages, (0.0, 60.0), (False, True)):
        offline = decide(age_s=age_s, ttl_s=ttl_s, immutable=immutable, reachable=False)
        assert offline in (Decision.USE, Decision.USE_STALE, Decision.FAIL)
        assert (offline is Decision.FAIL) == (age_s is None)
        online = decide(age_s=age_s, ttl_s=ttl_s, immutable=immutable)
        assert online in (Decision.USE, Decision.REVALIDATE, Decision.FETCH)


@pytest.mark.parametrize(
    ("age_s", "reachable", "decision"),
    [
        (None, True, Decision.FETCH),
        (59.9, True, Decision.USE),
        (60.0, True, Decision.USE_AND_REFRESH),
        (89.9, True, Decision.USE_AND_REFRESH),
        (90.0, True, Decision.REVALIDATE),
        (-0.1, True, Decision.REVALIDATE),
        (60.0, False, Decision.USE_STALE),
        (90.0, False, Decision.USE_STALE),
    ],
)
def test_just_stale_is_used_while_upstream_is_asked(age_s: float | None, reachable: bool, decision: Decision) -> None:
    """RFC 5861: for the grace after the TTL nobody waits; a clock set back has no grace."""
    assert decide(age_s=age_s, ttl_s=TTL_S, grace_s=30.0, reachable=reachable) is decision


def test_a_ttl_of_zero_makes_everything_movable_stale_at_once() -> None:
    assert decide(age_s=0.0, ttl_s=0.0, immutable=False) is Decision.REVALIDATE
