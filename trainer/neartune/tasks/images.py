"""Image classification: a picture and its class. Size, channels and normalisation are what the base's processor says.

An example keeps the picture's file, or its bytes; the first ones their pixels too, as long as they are few. Others' pixels are
there from ahead(), or collate(), until their batch is made.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from neartune import tasks
from neartune.data import DataError, Row
from neartune.tasks import Prepared, Task
from neartune.tasks.classification import forward, measure, one
from neartune.tasks.scores import sorted_labels
from neartune.tasks.text import classes

KEPT = 2**28
"""Bytes of pixels of a split that each process keeps."""
THREADS = 4
"""That open pictures beside the training, at most."""


@dataclass(slots=True)
class Picture:
    """`kept`: its pixels, if they are; `begun`: those that a thread has or makes."""

    row: Row
    kept: torch.Tensor | None = None
    begun: Future[torch.Tensor] | None = None


def find_labels(rows: Sequence[Row]) -> tuple[str, ...]:
    missing = next((row for row in rows if row.values.get("label") in (None, "") or row.values.get("image") is None), None)
    if missing is not None:
        raise DataError(f"{missing.where}: a row needs an image and a label")
    labels = sorted_labels([row.values["label"] for row in rows])
    if len(labels) < 2:
        raise DataError("all images have the same label: there is nothing to tell apart")
    return labels


def prepare(
    rows: Sequence[Row], processor: Any, labels: Sequence[str], *, max_length: int | None, model_limit: int
) -> Prepared:
    """Images are all opened here once, so that a bad one is told of at the beginning. `max_length` is for text."""
    prepared = Prepared()
    left = KEPT
    shape = ""
    numbers = {name: number for number, name in enumerate(labels)}
    for row in rows:
        if str(row.values.get("label")) not in numbers:
            prepared.count("images of a class that training does not have")
            continue
        picture = Picture(row)
        if left > 0 or not shape:
            found = pixels(row, processor)
            shape = shape or "×".join(map(str, found.shape))
            left -= found.nbytes
            picture.kept = found if left >= 0 else None
        else:
            opened(row, processor)
        prepared.add({"picture": picture, "label": numbers[str(row.values["label"])]}, row)
    if prepared.examples:
        prepared.counts[f"format: images ({shape}), {len(labels)} classes"] = len(prepared.examples)
    return prepared


def opened(row: Row, processor: Any) -> Any:
    """The picture, upright (EXIF), in the channels that the base takes. Raises DataError, naming the row."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    source = row.values["image"]
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as exc:
        raise DataError(f"{row.where}: it is no image that can be read: {exc}") from None
    mean = getattr(processor, "image_mean", None) or [0.0] * 3
    return upright.convert("L" if len(mean) == 1 else "RGB")


def pixels(row: Row, processor: Any) -> torch.Tensor:
    """(channels, height, width), normalised. Raises DataError, naming the row."""
    return torch.as_tensor(processor(opened(row, processor), return_tensors="pt")["pixel_values"][0])


def ahead(examples: Sequence[Mapping[str, Any]], processor: Any) -> None:
    for picture in (example["picture"] for example in examples):
        if picture.kept is None and picture.begun is None:
            picture.begun = _threads().submit(pixels, picture.row, processor)


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "pictures")


def _taken(picture: Picture, processor: Any) -> torch.Tensor:
    if picture.kept is not None:
        return picture.kept
    begun, picture.begun = picture.begun, None
    return begun.result() if begun else pixels(picture.row, processor)


def load_processor(path: Path) -> Any:
    from transformers import AutoImageProcessor

    load: Any = AutoImageProcessor.from_pretrained
    return load(path, backend="pil")


def load_model(path: Path, labels: Sequence[str], **options: Any) -> Any:
    from transformers import AutoModelForImageClassification

    # The base's own classes give way to ours.
    return tasks.load_model(AutoModelForImageClassification, path, **classes(labels), ignore_mismatched_sizes=True, **options)


def collate(examples: Sequence[Mapping[str, Any]], processor: Any) -> dict[str, torch.Tensor]:
    """(rows, channels, height, width) pixels, (rows,) classes."""
    return {
        "pixel_values": torch.stack([_taken(example["picture"], processor) for example in examples]),
        "labels": torch.tensor([example["label"] for example in examples]),
    }


TASK = Task(
    name="image-classification",
    auto="AutoModelForImageClassification",
    load_processor=load_processor,
    find_labels=find_labels,
    prepare=prepare,
    load_model=load_model,
    collate=collate,
    forward=forward,
    weight=one,
    measure=measure,
    ahead=ahead,
    heads=("classifier",),
)
