"""Imports go one way. A module may import from its own row and the rows above it; never from below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Row by row, from the words that everything uses to the edges that use everything.
ROWS = [
    {"bounded", "connectivity", "errors", "metrics", "schedule", "tasks", "trace", "units", "toml_lines"},
    {"wire", "kinds"},
    {"budget", "planner", "config", "explain"},
    {"signatures"},
    {"digest", "release", "store", "upstream"},
    {"single_flight", "reader", "passage", "affinity", "catalog"},
    {"pins", "resolve"},
    {"documents"},
    {"fill", "git", "grants", "sites"},
    {"access", "rulebook"},
    {"prefetch"},
    {"follower", "bundle"},
    {"proving", "locking", "operations"},
    {"web"},
    {"progress"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
SIBLINGS_APART = [("store", "upstream"), ("upstream", "store")]
PURE = {"wire": {"errors", "wire"}, "planner": {"wire"}, "release": {"planner", "wire"}}
CONFIG_READERS = {"cli", "verbs", "web/app.py", "config"}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "proxy" / "nearhub").parts[0].removesuffix(".py")


FILES = sorted((ROOT / "proxy" / "nearhub").rglob("*.py"))
PARTS = {part: row for row, parts in enumerate(ROWS) for part in parts}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "proxy")))
def test_imports_go_one_way(path: Path) -> None:
    """Downwards only; the pure parts import nothing but words; the configuration is read at the edges; no torch."""
    part = part_of(path)
    if part == "__init__":
        assert imports(path) <= {"__future__"}
        return
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("nearhub.")}
    assert all(PARTS[other] <= PARTS[part] for other in ours), f"{part} imports from below: {ours}"
    assert not {(part, other) for other in ours} & set(SIBLINGS_APART)
    if part in PURE:
        assert ours <= PURE[part]
        assert not imports(path) & {"asyncio", "aiohttp", "time", "logging", "os", "socket", "threading"}
    name = str(path.relative_to(ROOT / "proxy" / "nearhub"))
    assert "config" not in ours or part in CONFIG_READERS or name in CONFIG_READERS
    assert not {other.split(".")[0] for other in imports(path)} & {"torch", "transformers", "neartune"}


# The trainer's, in the same way: a row knows only the rows above it.
TRAINER = ROOT / "trainer" / "neartune"
TRAINER_ROWS = [
    {"__init__", "batch", "hosts", "lock", "pins", "units", "yaml12"},
    {"launch"},
    {"recipe"},
    {"data", "hub", "watch"},
    {"tasks"},
    {"decode", "model"},
    {"adapter", "loop"},
    {"checkpoint", "evaluate", "packing"},
    {"prepare"},
    {"reporting", "weights"},
    {"merge", "run"},
    {"plan", "records"},
    {"serving", "ui"},
    {"cli"},
    {"__main__"},
]


def trainer_imports(path: Path) -> set[str]:
    """Parts of neartune that a file imports: `from neartune import a` and `from neartune.a import …`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "neartune":
            parts = node.module.split(".")[1:2] or [alias.name for alias in node.names if not alias.name.startswith("__")]
            found.update(parts)
    return found


@pytest.mark.parametrize("path", sorted(TRAINER.rglob("*.py")), ids=lambda path: str(path.relative_to(TRAINER)))
def test_the_trainer_s_imports_go_one_way_too(path: Path) -> None:
    rows = {part: row for row, parts in enumerate(TRAINER_ROWS) for part in parts}
    part = path.relative_to(TRAINER).parts[0].removesuffix(".py")
    below = {other for other in trainer_imports(path) - {part} if rows[other] >= rows[part]}
    assert not below, f"{part} imports from below: {below}"


def test_the_trainer_does_not_know_the_mirror() -> None:
    """They meet over HTTP only."""
    for path in (ROOT / "trainer").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"nearhub"}, path
