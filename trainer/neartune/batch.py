"""Which rows a step has, how they are cut to fit in memory, and how large a cut this machine takes: measured, not guessed.

Rows and random numbers of a step are pure functions of seed and step, so that a resumed run goes on exactly; a step always
has `train_batch_size` rows, whatever fits at once. Batches run across the ends of epochs.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

GOOD_ENOUGH = 0.95
"""Of the best rate: the smallest micro-batch that reaches it is taken."""
HEADROOM = 0.10
"""Of the memory limit, left free: real batches vary."""
CPU_SHARE = 0.7
"""Of the memory that this process could have, used when the recipe does not say."""


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """Rows of an epoch, shuffled: the same for the same seed, everywhere."""
    rows = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(rows)
    return tuple(rows)


def rows_of_step(step: int, size: int, count: int, seed: int) -> list[int]:
    """Indices of the `size` rows of `step` (from 0), out of `count`."""
    return [order(seed, position // count, count)[position % count] for position in range(step * size, (step + 1) * size)]


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
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 * 2**30
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes at most since reset_peak()."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def limit_of(device: torch.device, asked: int | str) -> int:
    """Bytes that may be used on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_allocated(device))
    return cpu_limit() if asked == "auto" else int(asked)


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
