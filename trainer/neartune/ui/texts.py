"""Recipes as texts: presets, what is wrong with a text and at which line, and a text that means the same wherever it lies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import neartune
from neartune import pins, recipe, yaml12

_SOURCES = ("base_model", "train_data", "validation_data")


@dataclass(frozen=True, slots=True)
class Complaint:
    """`line` counts from 1; None: of the text as a whole."""

    line: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Checked:
    """`complaints`: as the command line has them, without the file's name."""

    complaints: tuple[Complaint, ...]
    advice: tuple[str, ...]


def shipped_presets() -> Path:
    """The checkout's recipes; those that pyproject.toml copies into an installed package, where there is no checkout."""
    package = Path(str(neartune.__file__)).parent
    is_checkout = (package.parent / "configs").is_dir() and (package.parent / "config.yaml").is_file()
    return package.parent if is_checkout else package / "presets"


def presets(folder: Path) -> dict[str, Path]:
    """Name → file of every recipe in `folder` and its configs/."""
    files = [*sorted(folder.glob("*.yaml")), *sorted((folder / "configs").glob("*.yaml"))]
    return {file.relative_to(folder).as_posix(): file for file in files}


def check(text: str, file: Path) -> Checked:
    """Of a text as if it stood in `file`, which need not be there; relative paths start at its directory."""
    try:
        return Checked((), recipe.load(file, text=text).advice)
    except recipe.RecipeError as exc:
        return Checked(tuple(_complaint(line, str(file)) for line in exc.complaints), ())


def _complaint(line: str, file: str) -> Complaint:
    if match := re.match(r":(\d+): ", line.removeprefix(file)):
        return Complaint(int(match[1]), line[len(file) + match.end() :])
    return Complaint(None, line.removeprefix(f"{file}: ").removeprefix("default: "))


def grounded(text: str, directory: Path, output: Path) -> str:
    """`text`, line by line as it was, with its paths absolute and `output` for output_dir; `directory`: of its relative paths.
    For a text that `check` has nothing against."""
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    given = yaml12.parse_map(text)
    edits = []
    for key, node in root.value:
        if key.value == "output_dir":
            edits.append((node, output))
        elif key.value in ("accelerate_config", "lock") and given[key.value].value is not None:
            edits.append((node, _absolute(node.value, directory)))
        elif key.value in _SOURCES:
            leaves = [leaf for leaf in _leaves(node) if recipe.is_path(leaf.value.strip(), directory)]
            edits += [(leaf, _absolute(leaf.value.strip(), directory)) for leaf in leaves]
    if "lock" not in given and (directory / pins.FILE).is_file():
        text = f"{text.rstrip()}\nlock: {json.dumps(str(directory / pins.FILE), ensure_ascii=False)}\n"
    for node, path in reversed(edits):
        written = json.dumps(str(path), ensure_ascii=False)
        text = text[: node.start_mark.index] + written + text[node.end_mark.index :]
    if "output_dir" in given:
        return text
    return f"{text.rstrip()}\noutput_dir: {json.dumps(str(output), ensure_ascii=False)}\n"


def _leaves(node: Any) -> Iterator[Any]:
    """Names of sources: words, and what stands at `path`."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _leaves(item)
    else:
        yield from (value for key, value in node.value if key.value == "path")


def _absolute(name: str, directory: Path) -> Path:
    return (directory / Path(name).expanduser()).absolute()
