"""Packing: several rows in one sequence. Whether they see each other is the architecture's affair, so it is tried on the loaded
model before anything is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neartune.loop import Trainer
from neartune.model import ModelError
from neartune.recipe import Recipe
from neartune.tasks import Example, length

TOLERANCE = 1e-4
"""Of logits against the largest logit: more is no rounding in fp32."""
ROUNDING = 4
"""Of the dtype's eps: what another kernel may make of the same row in bf16 and fp16."""


def capacity(recipe: Recipe, examples: Sequence[Example]) -> int:
    """Tokens of a sequence: max_length; auto: what the longest row has."""
    return max(map(length, examples)) if recipe.max_length == "auto" else int(recipe.max_length)


def refuse_leaks(trainer: Trainer, examples: Sequence[Example]) -> str:
    """Two of `examples` packed must get the logits that each gets alone, and the second the same after another first row. What
    was found, in words. Raises ModelError, naming the architecture."""
    rows = longest_pair([length(example) for example in examples], trainer.pack_to)
    if rows is None:
        return f"packing: no two rows fit in {trainer.pack_to} tokens, so each has a sequence of its own"
    pair = [examples[row] for row in rows]
    trainer.model.eval()
    try:
        alone = [_logits(trainer, [example])[0] for example in pair]
        packed = _packed_logits(trainer, pair)
        after_another = _packed_logits(trainer, [{**pair[0], "input_ids": pair[0]["input_ids"][::-1]}, pair[1]])
    finally:
        trainer.model.train()
    found, seen = _difference(alone, packed), _difference(packed[1:], after_another[1:])
    dtype = trainer.precision.autocast
    allowed = TOLERANCE if dtype is None else ROUNDING * torch.finfo(dtype).eps
    if not (found <= allowed and seen <= TOLERANCE):
        raise ModelError(
            f"packing: {_architecture(trainer.model)} does not keep the rows of one sequence apart: logits of two packed rows "
            f"differ by {found:.1e} from each alone's ({allowed:.1e} is allowed), by {seen:.1e} after another row; leave it out"
        )
    return f"packing into sequences of {trainer.pack_to} tokens: logits of two packed rows are each alone's to {found:.1e}"


def longest_pair(lengths: Sequence[int], room: int) -> tuple[int, int] | None:
    """The shortest row, after the longest other one that has room beside it."""
    short, *others = sorted(range(len(lengths)), key=lengths.__getitem__)
    fitting = [row for row in others if lengths[row] + lengths[short] <= room]
    return (fitting[-1], short) if fitting else None


def _packed_logits(trainer: Trainer, pair: Sequence[Example]) -> tuple[torch.Tensor, ...]:
    lengths = [length(example) for example in pair]
    return torch.split(_logits(trainer, pair, pack_to=sum(lengths))[0], lengths)


@torch.no_grad()
def _logits(trainer: Trainer, examples: Sequence[Example], pack_to: int = 0) -> torch.Tensor:
    inputs = trainer.task.collate(examples, trainer.processor, pack_to=pack_to)
    with trainer.autocast():
        logits: torch.Tensor = trainer.model(
            **{name: tensor.to(trainer.device) for name, tensor in inputs.items() if name != "labels"}
        ).logits
    return logits.float()


def _difference(alone: Sequence[torch.Tensor], together: Sequence[torch.Tensor]) -> float:
    """The largest, of any logit against its row's largest."""
    return max(float((one - two).abs().max() / one.abs().max()) for one, two in zip(alone, together, strict=True))


def _architecture(model: Any) -> str:
    return type(model.get_base_model()).__name__
