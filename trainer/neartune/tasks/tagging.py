"""Token classification: a row has words (`tokens`) and a tag for each (`tags` or `ner_tags`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from neartune import tasks
from neartune.data import DataError, Row
from neartune.tasks import IGNORED, Prepared, Task
from neartune.tasks.classification import measure
from neartune.tasks.generation import automatic_length
from neartune.tasks.scores import sorted_labels
from neartune.tasks.text import classes, collate, load_processor

TAGS = ("tags", "ner_tags", "pos_tags", "labels")


def columns(rows: Sequence[Row]) -> str:
    """The column of the tags. Raises DataError."""
    values = rows[0].values
    tag = next((name for name in TAGS if name in values), None)
    if tag is None or "tokens" not in values:
        raise DataError(
            f"{rows[0].where}: the columns are {', '.join(sorted(values))}; needed are tokens and one of {', '.join(TAGS)}"
        )
    return tag


def find_labels(rows: Sequence[Row]) -> tuple[str, ...]:
    tag = columns(rows)
    for row in rows:
        _refuse_uneven(row, tag)
    return sorted_labels([value for row in rows for value in row.values[tag]])


def _refuse_uneven(row: Row, tag: str) -> None:
    tokens, tags = row.values.get("tokens"), row.values.get(tag)
    if not isinstance(tokens, list) or not isinstance(tags, list) or len(tokens) != len(tags):
        raise DataError(f"{row.where}: tokens and {tag} must be lists of one length")


def prepare(
    rows: Sequence[Row], tokenizer: Any, labels: Sequence[str], *, max_length: int | None, model_limit: int
) -> Prepared:
    """A word's tag is learnt at its first token; the others are not judged."""
    prepared = Prepared()
    if not rows:
        return prepared
    tag = columns(rows)
    numbers = {name: number for number, name in enumerate(labels)}
    prepared.counts[f"format: tokens → {tag}, {len(labels)} tags"] = len(rows)
    encoded = []
    for row in rows:
        _refuse_uneven(row, tag)
        encoding = tokenizer([str(word) for word in row.values["tokens"]], is_split_into_words=True)
        targets, before = [], None
        for word in encoding.word_ids():
            is_first = word is not None and word != before
            targets.append(numbers.get(str(row.values[tag][word]), IGNORED) if is_first else IGNORED)
            before = word
        encoded.append((list(encoding["input_ids"]), targets, row))
    limit = min(max_length or automatic_length([len(ids) for ids, _, _ in encoded], model_limit), model_limit)
    for ids, targets, row in encoded:
        if len(ids) > limit:
            prepared.count(f"rows cut to {limit} tokens")
        if all(target == IGNORED for target in targets[:limit]):
            prepared.count("rows without a tag to learn")
            continue
        prepared.add({"input_ids": ids[:limit], "labels": targets[:limit]}, row)
    return prepared


def load_model(path: Path, labels: Sequence[str], **options: Any) -> Any:
    from transformers import AutoModelForTokenClassification

    return tasks.load_model(AutoModelForTokenClassification, path, **classes(labels), **options)


def forward(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int, list[tuple[int, int]]]:
    """(summed loss over judged tokens, how many, pairs of true and predicted tag)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    targets = batch["labels"]
    loss = functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="sum")
    judged = targets != IGNORED
    pairs = list(zip(targets[judged].tolist(), logits.argmax(-1)[judged].tolist(), strict=True))
    return loss, len(pairs), pairs


def weight(example: Mapping[str, Any]) -> int:
    return sum(label != IGNORED for label in example["labels"])


TASK = Task(
    name="token-classification",
    auto="AutoModelForTokenClassification",
    load_processor=load_processor,
    find_labels=find_labels,
    prepare=prepare,
    load_model=load_model,
    collate=collate,
    forward=forward,
    weight=weight,
    measure=measure,
    heads=("classifier", "score"),
)
