"""Classes of texts, words and images, with probabilities: each by itself, read as in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from neartune.data import Row
from neartune.decode import PromptError, limit_of
from neartune.tasks import IGNORED, Example, Task

IMAGES = "image-classification"
TASKS = ("text-classification", "token-classification", IMAGES)


def example_of(task: Task, item: Any, processor: Any, labels: Sequence[str], limit: int) -> Example:
    """`item`: a text, a pair of texts, a list of words, or an image's bytes. Raises DataError, PromptError."""
    match task.name, item:
        case "image-classification", bytes():
            values: dict[str, Any] = {"image": item, "label": labels[0]}
        case "token-classification", str() | list():
            words = item.split() if isinstance(item, str) else item
            values = {"tokens": words, "tags": [labels[0]] * len(words)}
        case "text-classification", str():
            values = {"text": item, "label": labels[0]}
        case "text-classification", [one, other]:
            values = {"sentence1": one, "sentence2": other, "label": labels[0]}
        case _:
            raise PromptError(f"{item!r:.60} is nothing that a model of {task.name} takes")
    prepared = task.prepare([Row(values, "input")], processor, labels, max_length=limit, model_limit=limit)
    if not prepared.examples:
        raise PromptError(f"there is nothing to classify in {item!r:.60}")
    return prepared.examples[0]


def classes(
    model: Any, task: Task, items: Sequence[Any], processor: Any, labels: Sequence[str]
) -> Iterator[tuple[dict[str, Any], int]]:
    """({label, probabilities}, tokens) of each item; of words, {words: [{word, label, probabilities}]}. Raises DataError,
    PromptError."""
    limit = limit_of(model.config, processor)
    for item in items:
        example = example_of(task, item, processor, labels, limit)
        shares = _shares(model, task, example, processor)
        if task.name == "token-classification":
            first = [place for place, label in enumerate(example["labels"]) if label != IGNORED]
            words = item.split() if isinstance(item, str) else item
            found = [{"word": word, **_told(shares[0, place], labels)} for word, place in zip(words, first, strict=False)]
            yield {"words": found}, len(example["input_ids"])
        else:
            yield _told(shares[0], labels), len(example.get("input_ids", ()))


@torch.no_grad()
def _shares(model: Any, task: Task, example: Example, processor: Any) -> torch.Tensor:
    inputs = task.collate([example], processor)
    logits = model(**{name: tensor.to(model.device) for name, tensor in inputs.items() if name != "labels"}).logits
    shares: torch.Tensor = logits.float().softmax(-1).cpu()
    return shares


def _told(shares: torch.Tensor, labels: Sequence[str]) -> dict[str, Any]:
    probabilities = dict(zip(labels, shares.tolist(), strict=True))
    return {"label": labels[int(shares.argmax())], "probabilities": probabilities}
