"""Rows of a step, cuts, the measured micro-batch, and that measuring leaves no trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neartune import batch
from neartune.batch import Trial, choose, cuts, find, is_out_of_memory, rows_of_step, seed_step, share, untouched

CPU = torch.device("cpu")


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32), st.integers(1, 12))
def test_steps_run_across_the_ends_of_epochs(size: int, rows: int, seed: int, steps: int) -> None:
    drawn = [row for step in range(steps) for row in rows_of_step(step, size, rows, seed)]
    assert len(drawn) == steps * size
    for start in range(0, len(drawn) - rows + 1, rows):
        assert sorted(drawn[start : start + rows]) == list(range(rows))
    assert max(Counter(drawn).values()) - min(Counter(drawn + list(range(rows))).values()) <= 1


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 99), st.integers(0, 1000))
def test_rows_are_a_function_of_seed_and_step(size: int, rows: int, seed: int, step: int) -> None:
    first = rows_of_step(step, size, rows, seed)
    batch.order.cache_clear()
    assert rows_of_step(step, size, rows, seed) == first


def test_epochs_and_seeds_differ() -> None:
    assert len({tuple(rows_of_step(step, 50, 50, seed)) for step in range(4) for seed in range(4)}) == 16


@given(st.lists(st.integers(), max_size=50), st.integers(1, 9))
def test_cuts_are_whole_and_only_the_last_is_smaller(rows: list[int], micro: int) -> None:
    parts = list(cuts(rows, micro))
    assert [row for part in parts for row in part] == rows
    assert all(len(part) == micro for part in parts[:-1])


def test_processes_share_equally_and_completely() -> None:
    parts = [share(list(range(12)), rank, 3) for rank in range(3)]
    assert {len(part) for part in parts} == {4}
    assert sorted(row for part in parts for row in part) == list(range(12))


def test_random_numbers_of_a_step_are_its_own() -> None:
    def drawn(seed: int, step: int, rank: int) -> float:
        seed_step(seed, step, rank)
        return float(torch.rand(()))

    assert drawn(1, 2, 0) == drawn(1, 2, 0)
    assert len({drawn(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}) == 27


def trial(micro: int, rate: float, *, fits: bool = True) -> Trial:
    return Trial(micro, rate, 0, fits)


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        ([], 0),
        ([trial(1, 10, fits=False)], 0),
        ([trial(1, 10), trial(2, 20), trial(4, 30)], 4),
        ([trial(1, 10), trial(2, 96), trial(4, 100)], 2),
        ([trial(1, 10), trial(2, 94), trial(4, 100)], 4),
        ([trial(1, 10), trial(2, 20), trial(4, 300, fits=False)], 2),
        ([trial(1, 100), trial(2, 80), trial(4, 70)], 1),
    ],
)
def test_the_smallest_of_those_within_5_percent_of_the_best(trials: list[Trial], chosen: int) -> None:
    assert choose(trials) == chosen


def clock_for(rates: dict[int, float], tried: list[int]) -> tuple[Callable[[int], int], Callable[[], float]]:
    now = 0.0

    def run_micro(size: int) -> int:
        nonlocal now
        tried.append(size)
        now += size / rates[size]
        return size

    return run_micro, lambda: now


def test_sizes_are_tried_upwards_to_the_whole_batch() -> None:
    tried: list[int] = []
    run_micro, clock = clock_for({1: 10, 2: 20, 4: 40, 6: 50}, tried)
    trials = find(run_micro, most=6, device=CPU, limit=2**60, clock=clock, repeats=1)
    assert [t.micro for t in trials] == [1, 2, 4, 6]
    assert [round(t.rate) for t in trials] == [10, 20, 40, 50]


def test_it_ends_at_the_first_that_does_not_fit() -> None:
    def run_micro(size: int) -> int:
        if size == 4:
            raise torch.OutOfMemoryError("too much")
        return size

    trials = find(run_micro, most=64, device=CPU, limit=2**60, clock=map(float, count()).__next__)
    assert [(t.micro, t.fits) for t in trials] == [(1, True), (2, True), (4, False)]
    assert choose(trials) in (1, 2)


def test_it_ends_when_larger_is_only_slower_and_other_errors_are_not_swallowed() -> None:
    run_micro, clock = clock_for({1: 100, 2: 50, 4: 40, 8: 30}, [])
    assert [t.micro for t in find(run_micro, most=8, device=CPU, limit=2**60, clock=clock)] == [1, 2, 4]

    def broken(size: int) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        find(broken, most=8, device=CPU, limit=2**60)


def test_the_peak_of_this_process_is_measured_and_bounded() -> None:
    def run_micro(size: int) -> int:
        torch.ones(size, 2**24).sum()  # 64 MiB each
        return size

    batch.reset_peak(CPU)
    free = batch.peak(CPU) + 320 * 2**20
    trials = find(run_micro, most=64, device=CPU, limit=int(free / (1 - batch.HEADROOM)), clock=map(float, count()).__next__)
    assert [t.fits for t in trials] == [True] * (len(trials) - 1) + [False]
    assert trials[-1].micro in (4, 8, 16)


def test_limits_are_sizes() -> None:
    assert batch.limit_of(CPU, 123) == 123
    assert 0 < batch.limit_of(CPU, "auto") < batch._available()


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


def test_the_cpu_allocator_s_error_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_measuring_leaves_everything_as_it_was_bit_for_bit() -> None:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in the middle"), untouched(model, optimizer):
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
        assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        raise RuntimeError("in the middle")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
