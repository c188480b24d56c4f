"""The training loop: a generator of step results, with everything else (files, evaluation, stopping) around it.

A step: the same rows on every run of the recipe, cut to micro-batches that fit, gradients summed over them and over all
processes, divided by the number of learnt tokens of the whole step, clipped, applied. If memory runs out, the step is done
again in smaller cuts.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from neartune import batch
from neartune.model import Precision, learning
from neartune.recipe import Recipe
from neartune.tasks import Example, Task, length


class NotFinite(Exception):
    """The loss or its gradient is no number; `rows` are where the step's rows stand."""

    def __init__(self, step: int, rows: Sequence[str]) -> None:
        shown = ", ".join(rows[:8]) + (" …" if len(rows) > 8 else "")
        super().__init__(f"the loss of step {step} is no finite number; its rows: {shown}. A lower learning_rate often helps")


class OutOfMemory(Exception):
    """Not even one row at a time fits."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer update. `loss`: mean over learnt tokens (or rows) of the whole step. `step` counts from 1.
    `grad_norm`: before clipping; None: no finite number, as where a step is skipped. `micro_batch`: rows, or padded tokens, as
    the recipe's micro_batch_by says."""

    step: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens: int
    seconds: float
    micro_batch: int
    was_skipped: bool
    """fp16: the gradients overflowed, and nothing was changed."""


@dataclass(slots=True)
class Trainer:
    """What a step works on. `micro`: rows at once (by "tokens": padded tokens), which only ever falls. `world`: processes,
    `here` of them on this machine. `pack_to`: tokens of the
    sequences into which rows are packed, 0: none are. `reduce(tensor)`: summed over all processes; `gather(list)`: joined."""

    task: Task
    model: Any
    optimizer: torch.optim.Optimizer
    processor: Any
    precision: Precision
    device: torch.device
    micro: int
    rank: int = 0
    world: int = 1
    here: int = 1
    is_sharded: bool = False
    by: str = "rows"
    pack_to: int = 0
    scaler: torch.amp.GradScaler | None = None
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    gather: Callable[[list[Any]], list[Any]] = lambda items: items

    def loss_of(self, examples: Sequence[Example]) -> tuple[torch.Tensor, Any]:
        """(summed loss, predictions) of a micro-batch."""
        with self.autocast():
            loss, _, predictions = self.task.forward(self.model, self.collate(examples))
        return loss, predictions

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """On the device."""
        options = {"pack_to": self.pack_to} if self.pack_to else {}
        return {name: tensor.to(self.device) for name, tensor in self.task.collate(examples, self.processor, **options).items()}

    def ahead(self, examples: Sequence[Example]) -> None:
        """Begin with what collate() will need of these, while a device computes; a CPU that computes has no core to spare."""
        if self.device.type != "cpu":
            self.task.ahead(examples, self.processor)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.precision.autocast, enabled=self.precision.autocast is not None)

    def idle(self, parts: int) -> int:
        """Micro-batches to run and not to count, beside `parts`: all processes put a sharded base together at once, so each
        must run equally many."""
        return int(max(self.gather([parts]))) - parts if self.is_sharded else 0

    def refuse_short(self) -> None:
        """Out of memory in the middle of what processes do together. Raises OutOfMemory."""
        if self.is_sharded:
            raise OutOfMemory(
                "memory ran out while the base is sharded (FSDP): the other processes wait for this one, so the step cannot be "
                "done again in smaller cuts: a smaller micro_batch_size, gradient_checkpointing: true"
            )

    def cuts(self, examples: Sequence[Example], micro: int) -> list[Sequence[Example]]:
        """Micro-batches of at most `micro` rows or padded tokens."""
        if self.by == "rows":
            return list(batch.cuts(examples, micro))
        parts = batch.token_cuts([length(example) for example in examples], micro, self.pack_to)
        return [[examples[row] for row in part] for part in parts]


def rate_at(step: int, total: int, recipe: Recipe) -> float:
    """Learning rate of `step` (from 0) of `total`: warmup in a line, then as scheduled."""
    warmup = recipe.warmup * total if recipe.warmup < 1 else recipe.warmup
    if step < warmup:
        return recipe.learning_rate * (step + 1) / math.ceil(warmup)
    done = (step - warmup) / max(1.0, total - warmup)
    match recipe.schedule:
        case "constant":
            return recipe.learning_rate
        case "linear":
            return recipe.learning_rate * (1.0 - done)
        case _:
            return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def steps(
    trainer: Trainer,
    recipe: Recipe,
    examples: Sequence[Example],
    wheres: Sequence[str],
    *,
    first: int,
    total: int,
    applied: int,
) -> Iterator[StepResult]:
    """Steps `first` to `total` - 1. `applied`: updates so far, by which the learning rate is scheduled; skipped ones do not
    count."""
    order = order_of(recipe, examples)
    for step in range(first, total):
        began = time.perf_counter()
        rows = batch.rows_of_step(step, recipe.train_batch_size, len(examples), order)
        rate = rate_at(applied, total, recipe)
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_ratio", 1.0)
        weights = sum(trainer.task.weight(examples[row]) for row in rows)
        mine = [examples[row] for row in batch.share(rows, trainer.rank, trainer.world)]
        after = batch.rows_of_step(step + 1, recipe.train_batch_size, len(examples), order) if step + 1 < total else []
        following = [examples[row] for row in batch.share(after, trainer.rank, trainer.world)]
        loss = _gradients(trainer, mine, following, weights, partial(batch.seed_step, recipe.seed, step, trainer.rank))
        norm, was_skipped = (None, False) if not math.isfinite(loss) else _apply(trainer, recipe)
        if not math.isfinite(loss) or (norm is None and not trainer.scaler):
            raise NotFinite(step + 1, [wheres[row] for row in rows])
        applied += not was_skipped
        tokens = sum(length(examples[row]) for row in rows)
        yield StepResult(step + 1, loss, norm, rate, tokens, time.perf_counter() - began, trainer.micro, was_skipped)


def order_of(recipe: Recipe, examples: Sequence[Example]) -> batch.Order:
    if recipe.group_by_length:
        return batch.grouped(recipe.seed, recipe.train_batch_size, [length(example) for example in examples])
    return batch.shuffled(recipe.seed, len(examples))


def _gradients(
    trainer: Trainer, mine: Sequence[Example], following: Sequence[Example], weights: int, reseed: Callable[[], None]
) -> float:
    """Gradients of the step's mean loss, in every process alike. `following`: the next step's rows. Returns that loss. Raises
    OutOfMemory."""
    while True:
        reseed()
        trainer.optimizer.zero_grad(set_to_none=True)
        parts = trainer.cuts(mine, trainer.micro)
        for part in (*parts[:1], *trainer.cuts(following, trainer.micro)[:1]):
            trainer.ahead(part)
        loss, is_short = _try_gradients(trainer, parts, weights)
        can_shrink = any(len(part) > 1 for part in parts)
        # All processes agree before anything is exchanged: one that ran out of memory must not keep the others waiting.
        flags = trainer.reduce(torch.tensor([float(is_short), loss, float(can_shrink)], dtype=torch.float64))
        if not flags[0]:
            _exchange(trainer)
            return float(flags[1])
        if not flags[2]:
            raise OutOfMemory("not even one row at a time fits in memory: a smaller max_length, gradient_checkpointing: true")
        trainer.micro = max(1, trainer.micro // 2)
        trainer.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()


def _try_gradients(trainer: Trainer, parts: Sequence[Sequence[Example]], weights: int) -> tuple[float, bool]:
    """(this process's part of the mean loss, whether memory ran out)."""
    total = 0.0
    try:
        for number, examples in enumerate([*parts, *list(parts[:1]) * trainer.idle(len(parts))]):
            for part in parts[number + 1 : number + 2]:
                trainer.ahead(part)
            loss, _ = trainer.loss_of(examples)
            loss = loss / weights
            if number >= len(parts):
                loss = loss * 0
            torch.autograd.backward(trainer.scaler.scale(loss) if trainer.scaler else loss)
            total += float(loss.detach())
    except (RuntimeError, MemoryError) as exc:
        if not batch.is_out_of_memory(exc):
            raise
        trainer.refuse_short()
        return 0.0, True
    return total, False


def _exchange(trainer: Trainer) -> None:
    """Sum the gradients of all processes: one message, since only the adapter's are there."""
    if trainer.world == 1:
        return
    parameters = [parameter for _, parameter in learning(trainer.model)]
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    flat = trainer.reduce(flat)
    position = 0
    for parameter in parameters:
        parameter.grad = flat[position : position + parameter.numel()].view_as(parameter).clone()
        position += parameter.numel()


def _apply(trainer: Trainer, recipe: Recipe) -> tuple[float | None, bool]:
    """(norm of the gradients before clipping, None if it is no finite number; whether the update was skipped)."""
    scaler = trainer.scaler
    if scaler is not None:
        scaler.unscale_(trainer.optimizer)
    parameters = [parameter for _, parameter in learning(trainer.model)]
    found = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm))
    norm = found if math.isfinite(found) else None
    if scaler is None:
        trainer.optimizer.step()
        return norm, False
    before = scaler.get_scale()
    scaler.step(trainer.optimizer)
    scaler.update()
    return norm, scaler.get_scale() < before


def make_optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; with loraplus_ratio B matrices learn that much faster than A (https://arxiv.org/abs/2402.12354)."""
    ratio = recipe.loraplus_ratio or 1.0
    fast = [parameter for name, parameter in learning(model) if "lora_B" in name]
    slow = [parameter for name, parameter in learning(model) if "lora_B" not in name]
    groups: list[dict[str, Any]] = [{"params": slow, "lr_ratio": 1.0}, {"params": fast, "lr_ratio": ratio}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
