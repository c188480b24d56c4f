"""YAML 1.2 with the line of every value: `3e-4` is a number, `no` is text, and a key given twice is an error.

PyYAML parses; what a plain scalar means is decided here, since PyYAML follows YAML 1.1 (https://yaml.org/spec/1.2.2/#103-core-schema).
Maps of text keys, lists and scalars only: no anchors, no tags.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

_NULL = re.compile(r"(?:null|Null|NULL|~|)\Z")
_TRUE = re.compile(r"(?:true|True|TRUE)\Z")
_FALSE = re.compile(r"(?:false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_BASED = re.compile(r"0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_MOST_DEEP = 16


class YamlError(ValueError):
    """`line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


@dataclass(frozen=True, slots=True)
class Item:
    """A value of the top-level map in plain Python, and the line of its key."""

    value: Any
    line: int


def parse_map(text: str) -> dict[str, Item]:
    """The top-level map. Raises YamlError."""
    try:
        depth = 0
        events: Any = yaml.parse(text, Loader=yaml.SafeLoader)
        for event in events:
            _refuse_extras(event)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MOST_DEEP:
                raise YamlError("nested too deeply", event.start_mark.line + 1)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        raise YamlError(exc.problem or "cannot be read", mark.line + 1 if mark else 1) from None
    except yaml.YAMLError as exc:
        raise YamlError(str(exc).splitlines()[0], 1) from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise YamlError("the file must hold `key: value` lines", node.start_mark.line + 1)
    return {key.value: Item(_value(value), key.start_mark.line + 1) for key, value in _pairs(node)}


def parse_scalar(text: str) -> Any:
    """A value as it stands on a command line: `3e-4`, `true`, `[a, b]`, plain text. Raises YamlError."""
    return parse_map(f"value: {text}")["value"].value


def _refuse_extras(event: Any) -> None:
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
        raise YamlError("anchors (&, *) are not used here: write the value out", event.start_mark.line + 1)
    if getattr(event, "tag", None):
        raise YamlError(f"tags are not used here: {event.tag}", event.start_mark.line + 1)


def _pairs(node: yaml.MappingNode) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    seen: dict[str, int] = {}
    pairs = []
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise YamlError("a key must be a word", line)
        key = key_node.value
        if key in seen:
            raise YamlError(f"{key!r} is given twice, the first time on line {seen[key]}", line)
        seen[key] = line
        pairs.append((key_node, value_node))
    return pairs


def _value(node: yaml.Node) -> Any:
    match node:
        case yaml.MappingNode():
            return {key.value: _value(value) for key, value in _pairs(node)}
        case yaml.SequenceNode():
            return [_value(item) for item in node.value]
        case yaml.ScalarNode():
            return node.value if node.style is not None else _plain(node.value)
        case _:
            raise YamlError("cannot be read", node.start_mark.line + 1)


def _plain(text: str) -> Any:
    if _NULL.match(text):
        return None
    if _TRUE.match(text):
        return True
    if _FALSE.match(text):
        return False
    if _INT.match(text):
        return int(text)
    if _BASED.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    return text
