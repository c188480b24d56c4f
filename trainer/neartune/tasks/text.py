"""What the text tasks share: padding, and classes by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from neartune.tasks import IGNORED

SEGMENTS = "token_type_ids"
"""Which of two texts a token is of, to models that ask."""


def padding(tokenizer: Any) -> int:
    """The token that fills short rows of a classifier: the base's own, else its end."""
    return next((int(token) for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def collate(examples: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, torch.Tensor]:
    return padded(examples, padding(tokenizer))


def padded(examples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """(rows, longest) ids, mask and labels, padded on the right and masked by length, never by id; or (rows,) classes. Segments
    where a row has them."""
    ids = [example["input_ids"] for example in examples]
    if "label" in examples[0]:
        labels = torch.tensor([example["label"] for example in examples])
    else:
        labels = _filled([example["labels"] for example in examples], IGNORED)
    mask = _filled([[1] * len(row) for row in ids], 0)
    found = {"input_ids": _filled(ids, pad), "attention_mask": mask, "labels": labels}
    if any(SEGMENTS in example for example in examples):
        found[SEGMENTS] = _filled([example.get(SEGMENTS) or [0] * len(example["input_ids"]) for example in examples], 0)
    return found


def _filled(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)


def load_processor(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def classes(labels: Sequence[str]) -> dict[str, Any]:
    """What a model's config says of them."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
    }
