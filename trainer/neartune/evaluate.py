"""How good the model is on the rows that were held out: loss and the task's own measures, in batches of their own."""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from neartune import batch
from neartune.decode import chat_ids, ends_of, limit_of
from neartune.loop import OutOfMemory, Trainer
from neartune.tasks import Example

AHEAD = 4
"""Rows that are made ready while one is judged."""


def evaluate(trainer: Trainer, examples: Sequence[Example], labels: Sequence[str], micro: int) -> tuple[dict[str, Any], int]:
    """(metrics over `examples`, the micro-batch that fitted). Each process does its share. Raises OutOfMemory.

    Never more than one batch of logits is held; dropout is off.
    """
    trainer.model.eval()
    try:
        mine = batch.share(examples, trainer.rank, trainer.world)
        loss, weight, predictions, micro = _sums(trainer, mine, micro, examples[:1])
    finally:
        trainer.model.train()
    sums = trainer.reduce(torch.tensor([loss, float(weight)], dtype=torch.float64))
    predicted = trainer.gather(predictions)
    return trainer.task.measure(float(sums[0]) / max(1.0, float(sums[1])), predicted, labels), micro


@dataclass(frozen=True, slots=True)
class RowLoss:
    """Of one row by itself: the summed loss in nats, the number of things it is summed over, the task's predictions."""

    loss: float
    weight: int
    predictions: Any

    @property
    def mean(self) -> float | None:
        """None: it is no finite number."""
        return self.loss / self.weight if math.isfinite(self.loss) else None

    @property
    def rank(self) -> float:
        """By which the hardest come first, and before them what is no number."""
        return -math.inf if self.mean is None else -self.mean


@torch.no_grad()
def row_losses(trainer: Trainer, examples: Sequence[Example]) -> list[RowLoss]:
    """In the order of `examples`, one at a time, in this process alone; dropout is off."""
    trainer.model.eval()
    found = []
    try:
        for number, example in enumerate(examples):
            trainer.ahead(examples[number : number + AHEAD])
            loss, predictions = trainer.loss_of([example])
            found.append(RowLoss(float(loss), trainer.task.weight(example), predictions))
    finally:
        trainer.model.train()
    return found


@torch.no_grad()
def answers(trainer: Trainer, prompts: Sequence[str], longest: int = 64) -> list[str]:
    """What the model says to each prompt now, always choosing the likeliest token."""
    trainer.model.eval()
    try:
        return [answer(trainer.model, trainer.processor, prompt, longest) for prompt in prompts]
    finally:
        trainer.model.train()


def answer(model: Any, tokenizer: Any, prompt: str, longest: int) -> str:
    """To `prompt` alone, put as in training; the likeliest tokens, `longest` at most, as far as the model goes."""
    ids = torch.tensor([chat_ids(tokenizer, [{"role": "user", "content": prompt}])], device=model.device)
    longest = min(longest, limit_of(model.config, tokenizer) - ids.shape[1])
    if longest < 1:
        return ""
    said = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=longest,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ends_of(model, tokenizer)),
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@torch.no_grad()
def _sums(trainer: Trainer, mine: Sequence[Example], micro: int, spare: Sequence[Example]) -> tuple[float, int, list[Any], int]:
    """`spare`: what to run while others have more rows, and this process must run with them."""
    loss, weight, predictions = 0.0, 0, list[Any]()
    waiting = deque(trainer.cuts(mine, micro))
    idle = trainer.idle(len(waiting))
    while waiting:
        part = waiting[0]
        for near in islice(waiting, 2):
            trainer.ahead(near)
        try:
            summed, predicted = trainer.loss_of(part)
            loss += float(summed)
        except (RuntimeError, MemoryError) as exc:
            if not batch.is_out_of_memory(exc):
                raise
            trainer.refuse_short()
            if all(len(part) == 1 for part in waiting):
                raise OutOfMemory("not even one row at a time fits in memory in evaluation: a smaller max_length") from None
            micro = max(1, micro // 2)
            waiting = deque(trainer.cuts([example for part in waiting for example in part], micro))
            gc.collect()
            continue
        weight += sum(trainer.task.weight(example) for example in part)
        predictions += predicted or []
        waiting.popleft()
    for _ in range(idle):
        trainer.loss_of(spare)
    return loss, weight, predictions, micro
