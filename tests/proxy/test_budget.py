"""A budget: however the bytes come, no second has more of them than it may."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.budget import BURST_S, Budget, due
from tests.proxy.clock import Clock


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 500)), min_size=1, max_size=30), st.integers(1, 1000))
def test_it_is_never_faster_than_its_rate(pieces: list[tuple[float, int]], rate: int) -> None:
    """From any moment to any other, no more than rate × time, a burst, and the piece under way is paid for."""
    now, free_at = 0.0, float("-inf")
    paid: list[tuple[float, int]] = []
    for pause, count in pieces:
        now += pause
        free_at = due(free_at, now, count, rate)
        now = max(now, free_at)
        paid.append((now, count))
    for first in range(len(paid)):
        for last in range(first + 1, len(paid)):
            spent = sum(count for _, count in paid[first + 1 : last + 1])
            assert spent <= rate * (paid[last][0] - paid[first][0] + BURST_S) + 1e-6 * spent + 1e-6


async def test_who_spends_waits_and_without_a_rate_nobody_does() -> None:
    clock = Clock()
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    budget = Budget(100.0, clock=clock, sleep=sleep)
    for _ in range(3):
        await budget.spend(100)
    assert slept == pytest.approx([1 - BURST_S, 1.0, 1.0])
    await Budget(None, clock=clock, sleep=sleep).spend(10**12)
    assert len(slept) == 3
