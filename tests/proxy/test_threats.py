"""The table of threats in proxy/README.md names a test for each, and each of those is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
README = TESTS.parent / "proxy" / "README.md"
NUMBERS = {"A": 13, "B": 20, "C": 15, "D": 24, "O": 23}
NOT_BUILT = {f"D{number}" for number in range(15, 22)}
"""What bundles and the shared tier will have to withstand."""


def rows() -> dict[str, list[str]]:
    """By number, the tests that a row names."""
    found = {}
    for line in README.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and re.fullmatch(r"[ABCDO]\d+", cells[0]):
            assert cells[0] not in found, f"{cells[0]} stands there twice"
            found[cells[0]] = [name.strip() for name in cells[3].split(",") if name.strip()]
            assert bool(found[cells[0]]) != (cells[2] == "not built yet"), line
    return found


@cache
def functions(path: Path) -> list[str]:
    """Every test of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [name.removeprefix("test_") for name in found if name.startswith("test_")]


def test_every_number_has_a_row() -> None:
    found = rows()
    assert list(found) == [f"{letter}{number}" for letter, last in NUMBERS.items() for number in range(1, last + 1)]
    assert {number for number, tests in found.items() if not tests} <= NOT_BUILT


@pytest.mark.parametrize("number", [number for number in rows() if rows()[number]])
def test_the_tests_of_a_row_are_there(number: str) -> None:
    for name in rows()[number]:
        where, _, what = name.partition(": ")
        if not what:
            assert (TESTS / where).is_file(), name
            continue
        folder, _, stem = where.rpartition("/")
        there = functions(TESTS / folder / f"test_{stem}.py")
        if what.endswith("…"):
            # The same name may stand in several classes of a file.
            assert len({one for one in there if one.startswith(what[:-1])}) == 1, name
        else:
            assert what in there, name
