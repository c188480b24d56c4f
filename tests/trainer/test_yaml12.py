"""What plain scalars mean, and what is refused, with the line."""

from __future__ import annotations

import pytest

from neartune.yaml12 import YamlError, parse_map, parse_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-7", -7),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("12:30:00", "12:30:00"),
        ("1_000", "1_000"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ('"true"', "true"),
        ("[a, 1, 2.5]", ["a", 1, 2.5]),
        ("{a: no}", {"a": "no"}),
        ("2024-01-01", "2024-01-01"),
        ("a=b", "a=b"),
    ],
)
def test_plain_scalars_follow_the_core_schema(text: str, value: object) -> None:
    got = parse_scalar(text)
    assert got == value
    assert type(got) is type(value)


def test_lines_are_those_of_the_keys() -> None:
    items = parse_map("# a comment\na: 1\n\nb:\n  - x\n  - y\n")
    assert {key: (item.value, item.line) for key, item in items.items()} == {"a": (1, 2), "b": (["x", "y"], 4)}


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' is given twice, the first time on line 1"),
        ("a:\n  x: 1\n  x: 2\n", 3, "'x' is given twice"),
        ("- a\n", 1, "key: value"),
        ("a: [1\nb: 2\n", 2, ""),
        ("a: &x 1\nb: *x\n", 1, "anchors"),
        ("a: !!python/object:os.system x\n", 1, "tags"),
        ("a: 1\n? [b]\n: 2\n", 2, "a key must be a word"),
        ("a: " + "[" * 40 + "]" * 40, 1, "nested too deeply"),
        ("a: 1\n---\nb: 2\n", 2, ""),
    ],
)
def test_what_is_refused(text: str, line: int, word: str) -> None:
    with pytest.raises(YamlError) as caught:
        parse_map(text)
    assert caught.value.line == line
    assert word in caught.value.message


def test_an_empty_file_is_an_empty_map() -> None:
    assert parse_map("# nothing\n") == {}
