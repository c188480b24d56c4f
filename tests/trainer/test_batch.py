"""Rows of a step, grouped or not, cuts by rows and by tokens, the measured micro-batch, and that measuring leaves no trace."""

from __future__ import annotations

import re
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neartune import batch, loop, prepare
from neartune.batch import (
    Trial,
    choose,
    cuts,
    find,
    grouped,
    is_out_of_memory,
    padded,
    rows_of_step,
    rule_of_thumb,
    seed_step,
    share,
    shuffled,
    token_cuts,
    untouched,
)
from neartune.run import RunError
from tests.trainer.bases import lines, losses, recipe_of, run_here, write_jsonl

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32), st.integers(1, 12))
def test_steps_run_across_the_ends_of_epochs(size: int, rows: int, seed: int, steps: int) -> None:
    assert_every_row_once_an_epoch(shuffled(seed, rows), size, rows, steps)


def assert_every_row_once_an_epoch(order: batch.Order, size: int, rows: int, steps: int) -> None:
    drawn = [row for step in range(steps) for row in rows_of_step(step, size, rows, order)]
    assert len(drawn) == steps * size
    for start in range(0, len(drawn) - rows + 1, rows):
        assert sorted(drawn[start : start + rows]) == list(range(rows))
    assert max(Counter(drawn).values()) - min(Counter(drawn + list(range(rows))).values()) <= 1


@given(st.integers(1, 20), LENGTHS, st.integers(0, 99), st.integers(0, 1000))
def test_rows_are_a_function_of_seed_and_step(size: int, lengths: list[int], seed: int, step: int) -> None:
    for order in (lambda: shuffled(seed, len(lengths)), lambda: grouped(seed, size, lengths)):
        used = order()
        for before in (step + 1, step, 0):
            first = rows_of_step(before, size, len(lengths), used)
        assert rows_of_step(0, size, len(lengths), order()) == first


def test_epochs_and_seeds_differ() -> None:
    assert len({tuple(rows_of_step(step, 50, 50, shuffled(seed, 50))) for step in range(4) for seed in range(4)}) == 16
    lengths = [1 + row % 7 for row in range(50)]
    assert len({tuple(grouped(seed, 5, lengths)(epoch)) for epoch in range(4) for seed in range(4)}) == 16


# — of like length ————————————————————————————————————————————————————————————————————————————————


@given(st.integers(1, 40), LENGTHS, st.integers(0, 2**32), st.integers(1, 12))
def test_grouped_rows_are_each_drawn_once_an_epoch(size: int, lengths: list[int], seed: int, steps: int) -> None:
    assert_every_row_once_an_epoch(grouped(seed, size, lengths), size, len(lengths), steps)


def padding(order: batch.Order, size: int, lengths: list[int], steps: int) -> int:
    drawn = [[lengths[row] for row in rows_of_step(step, size, len(lengths), order)] for step in range(steps)]
    return sum(size * max(step) - sum(step) for step in drawn)


@given(st.integers(1, 9), st.integers(1, 8), st.integers(0, 99), st.data())
def test_grouped_steps_pad_no_more_than_shuffled_ones(size: int, steps: int, seed: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 99), min_size=size * steps, max_size=size * steps))
    assert padding(grouped(seed, size, lengths), size, lengths, steps) <= padding(
        shuffled(seed, len(lengths)), size, lengths, steps
    )


def test_grouping_saves_nearly_all_padding_across_the_ends_of_epochs_too() -> None:
    lengths = [1 + row * 37 % 103 for row in range(103)]
    assert padding(grouped(1, 8, lengths), 8, lengths, 100) < 0.15 * padding(shuffled(1, 103), 8, lengths, 100)
    order = grouped(1, 8, lengths)
    spreads = []
    for step in range(100):
        drawn = [lengths[row] for row in rows_of_step(step, 8, 103, order)]
        spreads.append(max(drawn) - min(drawn))
    assert max(spreads) <= 3 * 8


def test_long_and_short_steps_take_turns() -> None:
    lengths = sorted(1 + row * 37 % 101 for row in range(96))
    order = grouped(3, 8, lengths)
    longest = [max(lengths[row] for row in rows_of_step(step, 8, 96, order)) for step in range(12)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_large_epochs_mix_otherwise_each_time() -> None:
    """Only the rows of a pool are sorted together, so that a row meets others in the next epoch."""
    lengths = list(range(1, 2 * 50 * 4 + 1))
    order = grouped(1, 4, lengths)
    groups = [
        {frozenset(rows_of_step(step, 4, 400, order)) for step in range(100 * epoch, 100 * epoch + 100)} for epoch in (0, 1)
    ]
    assert len(groups[0] & groups[1]) < 10


@given(st.lists(st.integers(), max_size=50), st.integers(1, 9))
def test_cuts_are_whole_and_only_the_last_is_smaller(rows: list[int], micro: int) -> None:
    parts = list(cuts(rows, micro))
    assert [row for part in parts for row in part] == rows
    assert all(len(part) == micro for part in parts[:-1])


# — padded tokens —————————————————————————————————————————————————————————————————————————————————


@given(LENGTHS, st.integers(1, 300), st.just(0) | st.integers(1, 100))
def test_no_cut_has_more_padded_tokens_than_the_budget(lengths: list[int], budget: int, capacity: int) -> None:
    parts = token_cuts(lengths, budget, capacity)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        assert padded([lengths[row] for row in part], capacity) <= budget or len(part) == 1
    for part in parts[:-1] if capacity == 0 else ():
        assert (len(part) + 1) * lengths[part[0]] > budget, "the next row would have fitted"


def test_padded_tokens_are_rows_times_the_longest() -> None:
    assert padded([3, 9, 1]) == 27
    assert padded([]) == 0
    assert token_cuts([5, 30, 10, 6, 4, 10], 20) == [[1], [2, 5], [3, 0, 4]]


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


def test_sizes_that_are_close_are_measured_again_in_turns() -> None:
    """What looked best in the sweep was not; what was far behind is left alone."""
    swept = [Trial(1, 10.0, 5, True), Trial(2, 90.0, 5, True), Trial(4, 100.0, 5, True), Trial(8, 85.0, 5, True)]
    order: list[int] = []
    rates = {2: [90.0, 10.0, 92.0], 4: [89.0, 91.0, 50.0], 8: [120.0, 20.0, 118.0]}
    seconds = [0.0]

    def run_micro(size: int) -> int:
        order.append(size)
        seconds[0] += size / rates[size][order.count(size) - 1]
        return size

    found = batch.settled(swept, run_micro, device=CPU, limit=2**60, clock=lambda: seconds[0])
    assert order == [2, 4, 8] * 3
    assert [round(trial.rate) for trial in found] == [10, 90, 89, 118]
    assert (choose(swept), choose(found)) == (4, 8)


def test_a_size_that_does_not_fit_the_second_time_is_not_taken() -> None:
    swept = [Trial(1, 95.0, 5, True), Trial(2, 100.0, 5, True)]

    def run_micro(size: int) -> int:
        if size == 2:
            raise torch.OutOfMemoryError("too much")
        return size

    assert choose(batch.settled(swept, run_micro, device=CPU, limit=2**60, clock=map(float, count()).__next__)) == 1


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


def test_without_proc_the_peak_is_what_the_system_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS, which counts bytes; others count KiB."""
    most = max(batch.peak(CPU), batch.in_use(CPU))
    monkeypatch.setattr(batch, "PROCESS", tmp_path / "none")
    batch.reset_peak(CPU)
    assert most <= batch.peak(CPU) < 100 * most
    counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "platform", "darwin")
    assert batch.peak(CPU) == pytest.approx(counted, rel=0.1)


def test_memory_of_a_machine_is_shared_by_its_own_processes(
    llama: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four are here."""
    recipe = recipe_of(llama, mixed, tmp_path / "run", micro_batch_size="auto", memory_limit="64GB")
    ready = prepare.prepare(recipe, prepare.find_place(), None, "http://127.0.0.1:9", lambda line: None)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    process = SimpleNamespace(num_processes=4, process_index=1, device=CPU)
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: process)
    place = prepare.find_place()
    trainer = prepare.make_trainer(recipe, ready.task, ready.trainer.model, ready.processor, ready.precision, place)
    trainer.gather = lambda items: items
    said: list[str] = []
    prepare.micro_batch(recipe, trainer, ready.learnt, said.append)
    assert "measured within 32 GB" in said[0]


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


# — the formula, and micro-batches by tokens in a run ————————————————————————————————————————————————


def test_the_usual_formula() -> None:
    a_row = 128 * 576 * 30 * 4 * 17
    assert rule_of_thumb(10 * a_row, 128, 576, 30, 4) == 8
    assert rule_of_thumb(a_row, 128, 576, 30, 4) == 0


MIXED = [{"prompt": f"Say it {n}", "completion": "ab " * (1 + n * 7 % 30)} for n in range(16)]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "mixed.jsonl", MIXED)


def test_the_formula_stands_beside_the_measurement(llama: Path, mixed: Path, tmp_path: Path) -> None:
    _, said = run_here(llama, mixed, tmp_path / "run", micro_batch_size="auto", max_steps=1, memory_limit="64GB")
    (number,) = [number for number, line in enumerate(said) if line.startswith("micro-batch ")]
    line = said[number + 1]
    assert line.startswith("the usual formula says ")
    longest = re.search(r"\((\d+) tokens × 32 × 2 layers × 4 bytes × 17\)", line)
    free = re.search(r"0.8 × ([\d.]+) GB free", line)
    rows = re.search(r"says (\d+) rows", line)
    assert longest is not None
    assert free is not None
    assert rows is not None
    assert 60 < float(free[1]) < 64, "what this process has in use is not free"
    assert int(rows[1]) == pytest.approx(0.8e9 * float(free[1]) / (int(longest[1]) * 32 * 2 * 4 * 17), rel=0.01)
    assert "it is not used: it knows neither logits (a vocabulary of 512), nor the attention" in line


BY_TOKENS: dict[str, Any] = {
    "train_batch_size": 8,
    "max_steps": 6,
    "eval_every": 6,
    "lora_dropout": 0,
    "micro_batch_by": "tokens",
}


def test_cuts_by_tokens_learn_what_cuts_by_rows_learn(llama: Path, mixed: Path, tmp_path: Path) -> None:
    run_here(llama, mixed, tmp_path / "rows", **BY_TOKENS | {"micro_batch_by": "rows", "micro_batch_size": 8})
    result, _ = run_here(llama, mixed, tmp_path / "tokens", **BY_TOKENS, micro_batch_size=90)
    assert losses(tmp_path / "tokens") == pytest.approx(losses(tmp_path / "rows"), rel=1e-5)
    evaluations = [
        [line["loss"] for line in lines(tmp_path / name) if line.get("kind") == "eval"] for name in ("rows", "tokens")
    ]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-5)
    assert (result["micro_batch"], result["micro_batch_by"]) == (90, "tokens")
    assert {line["micro_batch"] for line in lines(tmp_path / "tokens") if "kind" not in line} == {90}


def test_a_measured_budget_is_rows_times_the_longest(llama: Path, mixed: Path, tmp_path: Path) -> None:
    result, said = run_here(llama, mixed, tmp_path / "run", **BY_TOKENS, micro_batch_size="auto")
    (line,) = [line for line in said if line.startswith("micro-batch ")]
    told = re.match(r"micro-batch of (\d+) padded tokens \((\d+) rows\), measured within", line)
    assert told is not None
    longest = re.search(r"\((\d+) tokens", next(line for line in said if line.startswith("the usual formula")))
    assert longest is not None
    assert result["micro_batch"] == int(told[1]) == int(told[2]) * int(longest[1])


@pytest.fixture
def die_after_3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first run dies, the next goes on."""
    steps = loop.steps

    def some(*arguments: Any, **named: Any) -> Iterator[loop.StepResult]:
        for result in steps(*arguments, **named):
            yield result
            if result.step == 3:
                monkeypatch.setattr(loop, "steps", steps)
                raise KeyboardInterrupt

    monkeypatch.setattr(loop, "steps", some)
    yield
    monkeypatch.setattr(loop, "steps", steps)


def test_the_measured_budget_is_in_the_checkpoint(
    llama: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_after_3: None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_here(llama, mixed, tmp_path / "run", **BY_TOKENS, micro_batch_size="auto")
    monkeypatch.setattr(batch, "find", None)
    result, _ = run_here(llama, mixed, tmp_path / "run", **BY_TOKENS, micro_batch_size="auto")
    assert {line["micro_batch"] for line in lines(tmp_path / "run") if "kind" not in line} == {result["micro_batch"]}


def test_grouped_rows_and_cuts_by_tokens_resume_to_the_bit(llama: Path, mixed: Path, tmp_path: Path, die_after_3: None) -> None:
    options = BY_TOKENS | {"micro_batch_size": 90, "group_by_length": True, "lora_dropout": 0.2, "train_batch_size": 5}
    with pytest.raises(KeyboardInterrupt):
        run_here(llama, mixed, tmp_path / "run", **options)
    resumed, _ = run_here(llama, mixed, tmp_path / "run", **options)
    straight, _ = run_here(llama, mixed, tmp_path / "straight", **options)
    assert resumed["metrics"] == straight["metrics"]
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    run_here(llama, mixed, tmp_path / "shuffled", **options | {"group_by_length": False})
    assert losses(tmp_path / "shuffled") != losses(tmp_path / "straight")


@pytest.mark.parametrize("changed", [{"micro_batch_by": "rows"}, {"group_by_length": True}])
def test_other_cuts_are_another_run(
    llama: Path, mixed: Path, tmp_path: Path, die_after_3: None, changed: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_here(llama, mixed, tmp_path / "run", **BY_TOKENS, micro_batch_size=8)
    with pytest.raises(RunError, match=f"{next(iter(changed))}: was"):
        run_here(llama, mixed, tmp_path / "run", **BY_TOKENS | changed, micro_batch_size=8)


def has_room_for(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Memory ends at so many padded tokens; how many were asked for."""
    asked: list[int] = []
    loss_of = loop.Trainer.loss_of

    def limited(trainer: loop.Trainer, examples: Any) -> Any:
        asked.append(len(examples) * max(len(example["input_ids"]) for example in examples))
        if asked[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_of(trainer, examples)

    monkeypatch.setattr(loop.Trainer, "loss_of", limited)
    return asked


def test_out_of_memory_halves_the_budget_and_does_the_same_rows_again(
    llama: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BY_TOKENS | {"lora_dropout": 0.2}
    run_here(llama, mixed, tmp_path / "undisturbed", **options, micro_batch_size=100)
    asked = has_room_for(monkeypatch, 100)
    result, _ = run_here(llama, mixed, tmp_path / "run", **options, micro_batch_size=400)
    assert max(asked) > 200
    assert result["micro_batch"] == 100
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    evaluations = [
        [line["loss"] for line in lines(tmp_path / name) if line.get("kind") == "eval"] for name in ("undisturbed", "run")
    ]
    assert evaluations[1] == evaluations[0]


def test_a_row_alone_that_does_not_fit_ends_the_run(
    llama: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = has_room_for(monkeypatch, 1)
    with pytest.raises(loop.OutOfMemory, match="not even one row at a time"):
        run_here(llama, mixed, tmp_path / "run", **BY_TOKENS, micro_batch_size=400, validation_split=0)
    assert len(asked) < 9
    with pytest.raises(loop.OutOfMemory, match="in evaluation"):
        run_here(llama, mixed, tmp_path / "other", **BY_TOKENS, micro_batch_size=400)
