"""Text classification: a row has a text, or a pair of texts, and one of a few classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from neartune import tasks
from neartune.data import DataError, Row
from neartune.tasks import Prepared, Task, text
from neartune.tasks.generation import automatic_length
from neartune.tasks.scores import scores, sorted_labels
from neartune.tasks.text import SEGMENTS, classes, collate, padding

TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("text", "text_pair"),
    ("text",),
    ("sentence",),
    ("content",),
    ("review",),
)
LABELS = ("label", "labels", "class", "category")


def columns(rows: Sequence[Row]) -> tuple[tuple[str, ...], str]:
    """(columns of the text, column of the class), from the first row. Raises DataError."""
    values = rows[0].values
    texts = next((names for names in TEXTS if all(name in values for name in names)), None)
    label = next((name for name in LABELS if name in values), None)
    if texts is None or label is None:
        wanted = f"one of {', '.join(' + '.join(names) for names in TEXTS)}, and one of {', '.join(LABELS)}"
        raise DataError(f"{rows[0].where}: the columns are {', '.join(sorted(values))}; needed are {wanted}")
    return texts, label


def find_labels(rows: Sequence[Row]) -> tuple[str, ...]:
    _, label = columns(rows)
    missing = next((row for row in rows if row.values.get(label) in (None, "")), None)
    if missing is not None:
        raise DataError(f"{missing.where}: it has no {label}")
    labels = sorted_labels([row.values[label] for row in rows])
    if len(labels) < 2:
        raise DataError(f"all rows have the same {label}: there is nothing to tell apart")
    return labels


def prepare(
    rows: Sequence[Row], tokenizer: Any, labels: Sequence[str], *, max_length: int | None, model_limit: int
) -> Prepared:
    """A row that is too long is cut by the tokenizer; of a pair whichever text is longer then."""
    prepared = Prepared()
    if not rows:
        return prepared
    texts, label = columns(rows)
    numbers = {name: number for number, name in enumerate(labels)}
    prepared.counts[f"format: {' + '.join(texts)} → {label}, {len(labels)} classes"] = len(rows)
    encoded = []
    for row in rows:
        parts = [row.values.get(name) for name in texts]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"{row.where}: {' and '.join(texts)} must be text")
        if str(row.values.get(label)) not in numbers:
            prepared.count("rows of a class that training does not have")
            continue
        encoded.append((_read(tokenizer, parts), parts, numbers[str(row.values[label])], row))
    limit = min(max_length or automatic_length([len(read["input_ids"]) for read, *_ in encoded], model_limit), model_limit)
    for read, parts, number, row in encoded:
        if len(read["input_ids"]) > limit:
            prepared.count(f"rows cut to {limit} tokens")
            read = _read(tokenizer, parts, truncation="longest_first", max_length=limit)
        prepared.add({**read, "label": number}, row)
    tokenizer("")  # it keeps how it was last told to cut, and is saved with the adapter
    if encoded:
        prepared.shown = f"{tokenizer.decode(encoded[0][0]['input_ids'])} → ⟦{labels[encoded[0][2]]}⟧"
    return prepared


def _read(tokenizer: Any, parts: Sequence[Any], **options: Any) -> dict[str, list[int]]:
    """Ids, and where there are others than 0 the segments, which tell two texts apart."""
    encoding = tokenizer(*parts, **options)
    names = ["input_ids"] + [SEGMENTS] * any(encoding.get(SEGMENTS, ()))
    return {name: list(encoding[name]) for name in names}


def load_processor(path: Path) -> Any:
    """A tokenizer that gives segments only where the model in `path` takes them; the adapter's remembers it."""
    tokenizer = text.load_processor(path)
    if (path / "config.json").is_file() and SEGMENTS in tokenizer.model_input_names and not _takes_segments(path):
        names = [name for name in tokenizer.model_input_names if name != SEGMENTS]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def _takes_segments(path: Path) -> bool:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = AutoConfig.from_pretrained(path)
    model: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return SEGMENTS in inspect.signature(model.forward).parameters and getattr(config, "type_vocab_size", 2) > 1


def load_model(path: Path, labels: Sequence[str], **options: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    model = tasks.load_model(AutoModelForSequenceClassification, path, **classes(labels), **options)
    # A decoder's class is read off the last token that is not this one, so it has to be what collate() pads with.
    model.config.get_text_config().pad_token_id = padding(load_processor(path))
    return model


def forward(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int, list[tuple[int, int]]]:
    """(summed loss over rows, rows, pairs of true and predicted class)."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits.float()
    loss = functional.cross_entropy(logits, batch["labels"], reduction="sum")
    pairs = list(zip(batch["labels"].tolist(), logits.argmax(-1).tolist(), strict=True))
    return loss, len(pairs), pairs


def one(example: Mapping[str, Any]) -> int:
    return 1


def measure(loss: float, pairs: Sequence[tuple[int, int]], labels: Sequence[str]) -> dict[str, Any]:
    """`loss` is the mean over what was judged (rows, or words with a tag), in nats."""
    return {"loss": loss, **scores(pairs, labels)}


TASK = Task(
    name="text-classification",
    auto="AutoModelForSequenceClassification",
    load_processor=load_processor,
    find_labels=find_labels,
    prepare=prepare,
    load_model=load_model,
    collate=collate,
    forward=forward,
    weight=one,
    measure=measure,
    heads=("classifier", "score", "pre_classifier"),
)
