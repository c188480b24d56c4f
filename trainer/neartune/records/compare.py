"""Is one better than the other? Paired bootstrap over rows that both were judged on. Pure.

The statistic is a ratio of sums, Σ value / Σ weight: for a loss, nats over the things it is summed over (learnt tokens, bytes,
rows), which is what `metrics` of a run mean by "loss". Rows are drawn whole, each with both its values and its weight: tokens
of a row are not independent of each other, rows are.

The interval is the percentile interval widened for few rows (Hesterberg, What Teachers Should Know About the Bootstrap, 2014,
section 3.3): the plain one of n rows is too narrow by sqrt((n-1)/n) and has no tails of Student's t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy

RESAMPLES = 10_000
CONFIDENCE = 0.95
FEWEST = 6
"""Rows for a verdict. All of 5 go the same way by chance once in 16 times: no interval of theirs is a 95 % one."""
_AT_ONCE = 2_000_000
"""Drawn rows held in memory at a time. It decides nothing: random numbers come in the same order however they are cut."""

BETTER, WORSE, CANNOT_TELL = "better", "worse", "cannot tell"


@dataclass(frozen=True, slots=True)
class Difference:
    """`first` and `second`: the statistic of each; `difference`: first - second, with its 95 % interval `low` to `high`.
    `verdict`: of the first. `rows`: how many pairs."""

    rows: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    verdict: str


def paired(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float], *, is_lower_better: bool, seed: int = 0
) -> Difference:
    """Values of the same rows, in the same order, and the rows' weights. The same arguments give the same answer. Raises
    ValueError unless there are rows, equally many of each, with weights above 0 and values that are numbers."""
    one, two, weight = (numpy.asarray(values, dtype=numpy.float64) for values in (first, second, weights))
    if not len(one) or not one.shape == two.shape == weight.shape:
        raise ValueError(f"{len(one)}, {len(two)} and {len(weight)} values are no pairs")
    if not (numpy.isfinite(one).all() and numpy.isfinite(two).all() and (weight > 0).all()):
        raise ValueError("values must be finite and weights above 0")
    gap = one - two
    low, high = _interval(gap, weight, seed)
    total = weight.sum()
    difference = float(gap.sum() / total)
    verdict = judge(low, high, is_lower_better=is_lower_better) if len(one) >= FEWEST else CANNOT_TELL
    return Difference(len(one), float(one.sum() / total), float(two.sum() / total), difference, low, high, verdict)


def judge(low: float, high: float, *, is_lower_better: bool) -> str:
    """Of the interval of first - second: one that has 0 in it tells nothing."""
    if low <= 0.0 <= high:
        return CANNOT_TELL
    return BETTER if (high < 0.0) == is_lower_better else WORSE


def overall(verdicts: Sequence[str]) -> str:
    """Of the first measure, which must not be contradicted by another."""
    return CANNOT_TELL if {BETTER, WORSE} <= set(verdicts) else verdicts[0]


def _interval(gap: numpy.ndarray, weight: numpy.ndarray, seed: int) -> tuple[float, float]:
    """One row has no spread to learn from: its interval has no ends."""
    rows = len(gap)
    if rows < 2:
        return -float("inf"), float("inf")
    random = numpy.random.default_rng(seed)
    parts = []
    left = RESAMPLES
    while left:
        now = min(left, max(1, _AT_ONCE // rows))
        drawn = random.integers(0, rows, size=(now, rows))
        parts.append(gap[drawn].sum(axis=1) / weight[drawn].sum(axis=1))
        left -= now
    tail = NormalDist().cdf(-sqrt(rows / (rows - 1)) * student(1 - (1 - CONFIDENCE) / 2, rows - 1))
    low, high = numpy.quantile(numpy.concatenate(parts), [tail, 1 - tail])
    return float(low), float(high)


def student(share: float, freedom: int) -> float:
    """Quantile of Student's t, by its expansion in 1/freedom about the normal's (Abramowitz and Stegun, 26.7.5); exact for 1
    and 2, where the expansion is not good enough."""
    if freedom == 1:
        from math import pi, tan

        return tan(pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) / sqrt(2 * share * (1 - share))
    z: float = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom**power) for power, term in enumerate(terms, 1))
