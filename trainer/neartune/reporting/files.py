"""The files of a run, read: what is wrong with one is said in a line, with its name and the place in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neartune import yaml12


class Damaged(Exception):
    """A file of a run cannot be read; the message names it."""


def read_json(file: Path) -> dict[str, Any]:
    """Raises Damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise Damaged(f"{file.name} cannot be read: {exc}") from None
    if not isinstance(value, dict):
        raise Damaged(f"{file.name} is no object")
    return value


def read_recipe(file: Path) -> dict[str, Any]:
    """A resolved recipe as plain values. Raises Damaged."""
    try:
        items = yaml12.parse_map(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise Damaged(f"{file.name} cannot be read: {exc}") from None
    except yaml12.YamlError as exc:
        raise Damaged(f"{file.name}:{exc.line}: {exc.message}") from None
    return {key: item.value for key, item in items.items()}


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Of metrics.jsonl, nothing if it is not there; the last may be torn, by a run that is writing it or that died. Raises
    Damaged."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise Damaged(f"{file.name} cannot be read: {exc.strerror}") from None
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or not _is_known(value):
            raise Damaged(f"{file.name}:{number} is no line of metrics")
        yield value


def _is_known(line: Mapping[str, Any]) -> bool:
    """What a line of its kind is read for is there; of other kinds than these nothing is read."""
    match line.get("kind"):
        case None:
            return isinstance(line.get("step"), int) and isinstance(line.get("loss"), int | float)
        case "eval":
            return isinstance(line.get("step"), int) and isinstance(line.get("loss", ""), int | float | None)
        case "samples":
            return isinstance(line.get("step"), int) and isinstance(line.get("samples"), list)
        case _:
            return isinstance(line.get("step", 0), int)
