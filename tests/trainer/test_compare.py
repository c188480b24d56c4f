"""Paired bootstrap: what it says of rows whose truth is known."""

from __future__ import annotations

from math import inf, isclose, isinf

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neartune.records import compare
from neartune.records.compare import BETTER, CANNOT_TELL, WORSE, paired

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40)
FEW = settings(max_examples=25, deadline=None, derandomize=True)


@FEW
@given(VALUES)
def test_identical_inputs_cannot_be_told_apart(values: list[float]) -> None:
    told = paired(values, values, [1.0] * len(values), is_lower_better=True)
    assert (told.verdict, told.difference) == (CANNOT_TELL, 0.0)
    assert len(values) == 1 or (told.low, told.high) == (0.0, 0.0)


@FEW
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.integers(1, 50)), min_size=2, max_size=40), st.booleans())
def test_the_other_way_round_says_the_opposite(rows: list[tuple[float, float, int]], is_lower_better: bool) -> None:
    first, second, weights = zip(*rows, strict=True)
    forth = paired(first, second, weights, is_lower_better=is_lower_better)
    back = paired(second, first, weights, is_lower_better=is_lower_better)
    assert back.verdict == {BETTER: WORSE, WORSE: BETTER, CANNOT_TELL: CANNOT_TELL}[forth.verdict]
    assert isclose(forth.low, -back.high, abs_tol=1e-12)
    assert isclose(forth.high, -back.low, abs_tol=1e-12)
    assert forth.low - 1e-12 <= forth.difference <= forth.high + 1e-12


@pytest.mark.parametrize("rows", [6, 12, 50])
def test_the_interval_holds_the_truth_in_about_95_of_100(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of rows of 1 to 60 tokens, the rows' own difficulty far larger than the difference."""
    monkeypatch.setattr(compare, "RESAMPLES", 1000)
    random = numpy.random.default_rng(7)
    true, times = -0.05, 400
    held = 0
    for number in range(times):
        tokens = random.integers(20, 60, rows)
        hard = random.normal(2.0, 1.0, rows)
        second = tokens * hard
        first = tokens * (hard + true + random.normal(0.0, 0.2, rows))
        told = paired(first.tolist(), second.tolist(), tokens.tolist(), is_lower_better=True, seed=number)
        held += told.low <= true <= told.high
    assert 0.925 <= held / times <= 0.98


def test_the_statistic_is_the_loss_of_all_tokens_not_the_mean_of_rows() -> None:
    told = paired([10.0, 1.0], [20.0, 1.0], [10, 1], is_lower_better=True)
    assert (told.first, told.second) == (11 / 11, 21 / 11)
    assert isclose(told.difference, -10 / 11)


def test_what_is_lower_is_better_for_a_loss_and_worse_for_accuracy() -> None:
    low, high = [1.0 + n / 100 for n in range(30)], [2.0 + n / 90 for n in range(30)]
    assert paired(low, high, [1] * 30, is_lower_better=True).verdict == BETTER
    assert paired(low, high, [1] * 30, is_lower_better=False).verdict == WORSE
    assert paired(high, low, [1] * 30, is_lower_better=True).verdict == WORSE


def test_one_row_tells_nothing() -> None:
    told = paired([1.0], [9.0], [1], is_lower_better=True)
    assert told.verdict == CANNOT_TELL
    assert isinf(told.low)
    assert isinf(told.high)


def test_five_rows_that_go_the_same_way_tell_nothing_and_six_do() -> None:
    low, high = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [2.0, 2.2, 2.4, 2.6, 2.8, 3.0]
    assert paired(low[:5], high[:5], [1] * 5, is_lower_better=True).verdict == CANNOT_TELL
    assert paired(low, high, [1] * 6, is_lower_better=True).verdict == BETTER


def test_the_same_question_has_the_same_answer_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    random = numpy.random.default_rng(1)
    first, second = random.normal(size=50).tolist(), random.normal(size=50).tolist()
    whole = paired(first, second, [1] * 50, is_lower_better=True)
    monkeypatch.setattr(compare, "_AT_ONCE", 700)
    assert paired(first, second, [1] * 50, is_lower_better=True) == whole
    assert paired(first, second, [1] * 50, is_lower_better=True, seed=1) != whole


def test_a_measure_that_contradicts_the_first_leaves_it_open() -> None:
    assert compare.overall([BETTER, CANNOT_TELL]) == BETTER
    assert compare.overall([CANNOT_TELL, BETTER]) == CANNOT_TELL
    assert compare.overall([WORSE, BETTER]) == CANNOT_TELL


@pytest.mark.parametrize(
    ("first", "second", "weights"), [([], [], []), ([1.0], [1.0, 2.0], [1]), ([inf], [1.0], [1]), ([1.0], [1.0], [0])]
)
def test_what_is_no_pairs_is_refused(first: list[float], second: list[float], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="values"):
        paired(first, second, weights, is_lower_better=True)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_of_student_s_t_are_those_of_printed_tables(freedom: int, quantile: float) -> None:
    assert compare.student(0.975, freedom) == pytest.approx(quantile, abs=0.008)
