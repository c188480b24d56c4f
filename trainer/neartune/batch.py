"""Which rows a step has, how they are cut to fit in memory, and how large a cut this machine takes: measured, not guessed.

Rows and random numbers of a step are pure functions of seed and step, so that a resumed run goes on exactly; a step always
has `train_batch_size` rows, whatever fits at once. Batches run across the ends of epochs. Rows may be grouped by length, cut
by rows or by padded tokens, and packed, several in one sequence.
"""

from __future__ import annotations

import gc
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")
Order = Callable[[int], Sequence[int]]
"""Epoch, from 0 → its rows, each once, in the order in which steps take them."""

GOOD_ENOUGH = 0.95
"""Of the best rate: the smallest micro-batch that reaches it is taken."""
CLOSE, ROUNDS = 0.8, 3
"""Sizes from this share of the best rate on are measured again, so often, in turns."""
HEADROOM = 0.10
"""Of the memory limit, left free: real batches vary."""
PROCESS = Path("/proc/self")
POOL = 50
"""Steps whose rows are sorted by length together: more would pad less, and mix less."""
CPU_SHARE = 0.7
"""Of the memory that this process could have, used when the recipe does not say."""
FORMULA_SHARE = 0.8
"""Of the free memory, in rule_of_thumb()."""
ACTIVATIONS = 17
"""Numbers that a transformer's layer keeps for the backward pass, for each token and each of `hidden`: 34 bytes at two bytes a
number, attention scores left out (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.1)."""


def shuffled(seed: int, count: int) -> Order:
    """The same for the same seed, everywhere."""
    return lru_cache(maxsize=4)(partial(_shuffled, seed, count))


def grouped(seed: int, size: int, lengths: Sequence[int]) -> Order:
    """Shuffled, then sorted by length in pools of POOL steps of `size` rows, so that a step's rows are of like length, then the
    steps shuffled. A step that runs across the end of an epoch takes rows of like length on both sides."""
    return lru_cache(maxsize=4)(partial(_grouped, seed, size, lengths))


def _shuffled(seed: int, count: int, epoch: int) -> list[int]:
    rows = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(rows)
    return rows


def _grouped(seed: int, size: int, lengths: Sequence[int], epoch: int) -> list[int]:
    rows = _shuffled(seed, len(lengths), epoch)
    begun = min(len(rows), -epoch * len(rows) % size)  # rows of the step that the epoch before began
    left = (len(rows) - begun) % size  # rows of the step that the next epoch ends
    rest = sorted(rows, key=lengths.__getitem__)
    first, rest = _taken(rest, begun, _where(seed, epoch))
    last, rest = _taken(rest, left, _where(seed, epoch + 1))
    taken = {*first, *last}
    steps = [
        step
        for pool in cuts([row for row in rows if row not in taken], POOL * size)
        for step in cuts(sorted(pool, key=lengths.__getitem__), size)
    ]
    random.Random(f"{seed}/{epoch}/steps").shuffle(steps)
    return [*first, *(row for step in steps for row in step), *last]


def _where(seed: int, epoch: int) -> float:
    """Where among all lengths the step is that runs into `epoch`: 0 the shortest, 1 the longest."""
    return random.Random(f"{seed}/{epoch}/begin").random()


def _taken(rows: list[int], count: int, where: float) -> tuple[list[int], list[int]]:
    """(`count` neighbours, the others)."""
    start = round(where * (len(rows) - count))
    return rows[start : start + count], rows[:start] + rows[start + count :]


def rows_of_step(step: int, size: int, count: int, order: Order) -> list[int]:
    """Indices of the `size` rows of `step` (from 0), out of `count`."""
    return [order(position // count)[position % count] for position in range(step * size, (step + 1) * size)]


def seed_step(seed: int, step: int, rank: int) -> None:
    """What is random in a step (dropout) depends on these alone: the same when it is done again, other in each process."""
    torch.manual_seed(random.Random(f"{seed}/{step}/{rank}").getrandbits(63))


def share(rows: Sequence[T], rank: int, world: int) -> list[T]:
    """Rows of one process: equally many each."""
    return list(rows[rank::world])


def cuts(rows: Sequence[T], micro: int) -> Iterator[Sequence[T]]:
    """Micro-batches of at most `micro`; the last may be smaller."""
    for start in range(0, len(rows), micro):
        yield rows[start : start + micro]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows, by their index, in sequences of at most `capacity` tokens: the longest first, each into the first sequence with
    room (first-fit decreasing). A row longer than that is a sequence of its own. Rows of some of the sequences alone would be
    packed into just those."""
    sequences: list[list[int]] = []
    used: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((place for place, tokens in enumerate(used) if tokens + lengths[row] <= capacity), len(used))
        if place == len(used):
            sequences.append([])
            used.append(0)
        sequences[place].append(row)
        used[place] += lengths[row]
    return sequences


def padded(lengths: Sequence[int], capacity: int = 0) -> int:
    """Tokens of a micro-batch, padding too: sequences × the longest. `capacity`: of pack(); 0: a row a sequence."""
    used = [sum(lengths[row] for row in sequence) for sequence in pack(lengths, capacity)]
    return len(used) * max(used, default=0)


def token_cuts(lengths: Sequence[int], budget: int, capacity: int = 0) -> list[list[int]]:
    """Micro-batches of rows, by their index, the longest sequences first, each as large as `budget` padded() tokens allow. A
    longer row goes alone."""
    parts: list[list[int]] = []
    count = longest = 0
    packed = [(sum(lengths[row] for row in sequence), sequence) for sequence in pack(lengths, min(capacity, budget))]
    for tokens, sequence in sorted(packed, key=lambda item: -item[0]):
        if not parts or (count + 1) * longest > budget:
            parts.append([])
            count, longest = 0, tokens
        parts[-1] += sequence
        count += 1
    return parts


def is_out_of_memory(exc: BaseException) -> bool:
    """CUDA's own error, and the CPU allocator's RuntimeError."""
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(exc)
    return isinstance(exc, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)


# — memory ———————————————————————————————————————————————————————————————————————————————————————


def cpu_limit() -> int:
    """Bytes this process may use: CPU_SHARE of the smaller of the cgroup's limit and what the system has free."""
    return int(CPU_SHARE * min([*_cgroup_limits(), _available()]))


def _cgroup_limits() -> Iterator[int]:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            yield int(text)


def _available() -> int:
    return int(psutil.virtual_memory().available)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            (PROCESS / "clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes at most since reset_peak(); on a CPU without Linux's /proc: since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def in_use(device: torch.device) -> int:
    """Bytes now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)


def limit_of(device: torch.device, asked: int | str) -> int:
    """Bytes that may be used on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_allocated(device))
    return cpu_limit() if asked == "auto" else int(asked)


def rule_of_thumb(free: int, longest: int, hidden: int, layers: int, element_bytes: int) -> int:
    """Rows at once by the usual formula, which is printed beside the measurement and not used:

        floor(0.8 × free bytes / (longest × hidden × layers × element_bytes × 17))

    0.8: FORMULA_SHARE. 17: ACTIVATIONS. It is the rule's usual form, not a quotation.
    """
    return int(FORMULA_SHARE * free / (longest * hidden * layers * element_bytes * ACTIVATIONS))


# — the finder ———————————————————————————————————————————————————————————————————————————————————


@dataclass(frozen=True, slots=True)
class Trial:
    """One measured size. `rate` in tokens (or images) a second; `bytes` at the peak."""

    micro: int
    rate: float
    bytes: int
    fits: bool


def choose(trials: Sequence[Trial]) -> int:
    """Of the sizes that fit, the smallest whose rate is within 5 % of the best; 0 when none fits."""
    fitting = [trial for trial in trials if trial.fits]
    best = max((trial.rate for trial in fitting), default=0.0)
    return min((trial.micro for trial in fitting if trial.rate >= GOOD_ENOUGH * best), default=0)


def find(
    run_micro: Callable[[int], int],
    *,
    most: int,
    device: torch.device,
    limit: int,
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = 2,
) -> list[Trial]:
    """Try sizes upwards, 1, 2, 4 … and `most`: `run_micro(size)` does a real forward and backward pass of the longest rows,
    with optimizer state in place, and returns how many tokens it was. Ends at the first that does not fit, or that is
    slower."""
    trials: list[Trial] = []
    size = 1
    while True:
        trial = _try(run_micro, size, device, limit, clock, repeats)
        trials.append(trial)
        if not trial.fits or size >= most or _is_past_best(trials):
            return trials
        size = min(most, size * 2)


def settled(
    trials: Sequence[Trial],
    run_micro: Callable[[int], int],
    *,
    device: torch.device,
    limit: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Trial]:
    """The sizes that may be chosen measured again, in turns, so that what else the machine does hits all of them alike. Their
    rates are the medians."""
    best = max((trial.rate for trial in trials if trial.fits), default=0.0)
    close = [trial.micro for trial in trials if trial.fits and trial.rate >= CLOSE * best]
    if len(close) < 2:
        return list(trials)
    again = [_try(run_micro, size, device, limit, clock, 0) for _ in range(ROUNDS) for size in close]
    found = []
    for trial in trials:
        turns = [other for other in again if other.micro == trial.micro]
        if turns:
            rate, used = statistics.median(turn.rate for turn in turns), max(turn.bytes for turn in turns)
            trial = Trial(trial.micro, rate, max(trial.bytes, used), fits=all(turn.fits for turn in turns))
        found.append(trial)
    return found


def _is_past_best(trials: Sequence[Trial]) -> bool:
    """Two sizes in a row that were slower than one before: larger ones will not be faster."""
    rates = [trial.rate for trial in trials]
    return len(rates) >= 3 and max(rates[-2:]) < GOOD_ENOUGH * max(rates[:-2])


def _try(
    run_micro: Callable[[int], int], size: int, device: torch.device, limit: int, clock: Callable[[], float], repeats: int
) -> Trial:
    gc.collect()
    reset_peak(device)
    best = 0.0
    try:
        for _ in range(1 + repeats):  # the first warms caches up
            started = clock()
            tokens = run_micro(size)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, tokens / max(1e-9, clock() - started))
            if peak(device) > limit:
                break
    except (RuntimeError, MemoryError) as exc:
        if not is_out_of_memory(exc):
            raise
        return Trial(size, 0.0, limit, fits=False)
    used = peak(device)
    return Trial(size, best, used, fits=used <= (1 - HEADROOM) * limit)


@contextmanager
def untouched(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What is done inside leaves random numbers, parameters, buffers and an empty optimizer as they were, bit for bit."""
    changing = [parameter for parameter in model.parameters() if parameter.requires_grad] + list(model.buffers())
    before = [tensor.detach().clone() for tensor in changing]
    state = torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        with torch.no_grad():
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(state)
        if on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)
