"""What differs between tasks, as a record of plain functions: how rows become examples, what the loss is, what is measured.

An example is a dict of lists: `input_ids` and `labels` for text (label IGNORED where nothing is to be learnt), `picture` and
`label` for images, which become tensors with their batch. Everything else (batches, steps, checkpoints) is the same for all
tasks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neartune.data import Row

IGNORED = -100
Example = dict[str, Any]


def length(example: Example) -> int:
    """In tokens; an image is 1."""
    return len(example.get("input_ids", (0,)))


@dataclass(slots=True)
class Prepared:
    """Examples of one split, and the row of each. `counts`: what happened to how many rows, in words; `shown`: one example as
    text, its mask marked."""

    examples: list[Example] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    shown: str = ""

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    @property
    def wheres(self) -> list[str]:
        return [row.where for row in self.rows]

    def add(self, example: Example, row: Row) -> None:
        self.examples.append(example)
        self.rows.append(row)


def _nothing(examples: Sequence[Example], processor: Any) -> None:
    """Text is ready as it is."""


@dataclass(frozen=True, slots=True)
class Task:
    """`prepare(rows, processor, labels, max_length=, model_limit=)` → Prepared; `collate(examples, processor)` → a batch, where
    text generation takes `pack_to=` too: several rows in one sequence of at most so many tokens. `ahead(examples, processor)`:
    begin with what collate() will need of these, in threads.

    `forward(model, batch)` → (summed loss, how many things it is summed over, predictions or None); `weight(example)` → how
    many of those an example has; `measure(mean loss, predictions, labels)` → metrics by name, "loss" among them.
    """

    name: str
    auto: str
    """The class of transformers that loads its models."""
    load_processor: Callable[[Path], Any]
    find_labels: Callable[[Sequence[Row]], tuple[str, ...]]
    prepare: Callable[..., Prepared]
    load_model: Callable[..., Any]
    collate: Callable[..., dict[str, Any]]
    forward: Callable[..., tuple[Any, Any, Any]]
    weight: Callable[[Example], int]
    measure: Callable[..., dict[str, Any]]
    ahead: Callable[[Sequence[Example], Any], None] = _nothing
    heads: tuple[str, ...] = ()
    """Names of new parts of the model that are trained whole."""


def load_model(auto: Any, path: Path, **options: Any) -> Any:
    """By the class `auto` of transformers. Its `parts_that_are_missing`: modules that are not in the base's files, and begin at
    random."""
    model, found = auto.from_pretrained(path, output_loading_info=True, **options)
    model.parts_that_are_missing = tuple(sorted({name.rpartition(".")[0] for name in found["missing_keys"]}))
    return model


_MODULES = {
    "text-generation": "generation",
    "text-classification": "classification",
    "token-classification": "tagging",
    "image-classification": "images",
}


def find(name: str) -> Task:
    """A task by its name. Imports torch."""
    module = importlib.import_module(f"neartune.tasks.{_MODULES[name]}")
    task: Task = module.TASK
    return task
