"""Runs as they lie on disk: found, read, listed, compared. Nothing heavy is imported, and nothing is written.

A run is a directory with run.json. What cannot be read is told of in its place, and keeps no other run from being listed.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from neartune import lock
from neartune.recipe import differences
from neartune.reporting import files
from neartune.units import size

FINISHED, RUNNING, UNFINISHED, FAILED, DAMAGED = "finished", "running", "unfinished", "failed", "damaged"
_DEEP = 4
"""Directories below the one that is searched."""
_BARS, _WIDE = 16, 40
"""Rows and columns of a curve."""


class RunsError(Exception):
    """What was asked of a run, or of a served name, cannot be had; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Run:
    """`identity`: run.json; `result`: result.json, {} until it is finished; `facts`: facts.json, {} where there is none;
    `total`: steps it is to have, None where epochs were asked for of rows that are not counted; `why`: it failed, or cannot be
    read."""

    name: str
    path: Path
    state: str
    why: str
    recipe: Mapping[str, Any]
    identity: Mapping[str, Any]
    result: Mapping[str, Any]
    facts: Mapping[str, Any]
    lines: tuple[Mapping[str, Any], ...]
    total: int | None
    changed: float
    bytes: int

    @property
    def losses(self) -> dict[int, float]:
        """Step → loss."""
        return {line["step"]: line["loss"] for line in self.lines if "kind" not in line}

    @property
    def step(self) -> int:
        return int(self.result.get("steps") or max(self.losses, default=0))

    @property
    def metrics(self) -> dict[str, float]:
        """Of the best adapter so far: numbers only."""
        found = self.result.get("metrics") or _best(self.lines)
        return {name: value for name, value in found.items() if isinstance(value, float)}

    @property
    def base(self) -> str:
        """The Hub's id and commit, or a directory's name."""
        base = self.identity.get("base", {})
        if base.get("repo"):
            return f"{base['repo']}@{str(base.get('commit'))[:12]}"
        return Path(str(self.recipe.get("base_model", "?"))).name

    def brief(self) -> dict[str, Any]:
        """For a list, and for JSON."""
        return {
            "name": self.name,
            "path": str(self.path),
            "state": self.state,
            "step": self.step,
            "steps": self.total,
            "task": self.recipe.get("task"),
            "base": self.base,
            "metrics": self.metrics,
            "why": self.why,
            "changed": datetime.fromtimestamp(self.changed, UTC).isoformat(timespec="seconds"),
            "bytes": self.bytes,
        }


def _best(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    judged = [line for line in lines if line.get("kind") == "eval" and line["step"] > 0 and line["loss"] is not None]
    best = min(judged, key=lambda line: float(line["loss"]), default={})
    return {name: value for name, value in best.items() if name not in ("kind", "step")}


# — found and read ———————————————————————————————————————————————————————————————————————————————


def is_run(path: Path) -> bool:
    return (path / "run.json").is_file()


def find(home: Path) -> list[Path]:
    """Directories of runs at or below `home`, sorted. Nothing is looked for inside a run, in hidden directories, or behind
    links. Raises RunsError."""
    if not home.is_dir():
        raise RunsError(f"{home}: there is no such directory")
    found = []
    for place, folders, _ in os.walk(home):
        path = Path(place)
        if is_run(path):
            found.append(path)
            folders.clear()
        elif len(path.relative_to(home).parts) == _DEEP:
            folders.clear()
        else:
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
    return sorted(found)


def locate(name: str, home: Path) -> Path:
    """A run's directory: a name below `home`, or a path. Raises RunsError with the nearest names."""
    for path in (home / name, Path(name)):
        if is_run(path):
            return path.absolute()
    import difflib

    names = [name_of(path, home) for path in find(home)]
    near = difflib.get_close_matches(name, names, 3, 0.4) or names[:5]
    hint = f"did you mean {' or '.join(near)}?" if near else f"{home.absolute()} has no runs: --in DIR says where they are"
    raise RunsError(f"there is no run {name!r}; {hint}")


def name_of(path: Path, home: Path) -> str:
    """Below `home`, with slashes; a run that lies elsewhere, or is `home`, by its directory's own name."""
    path, home = path.absolute(), home.absolute()
    return path.relative_to(home).as_posix() if home in path.parents else path.name


def _files(path: Path) -> Iterator[os.stat_result]:
    """Of the files below; one that goes meanwhile, since the run is under way, is passed over."""
    for place, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                found = (Path(place) / name).lstat()
                if stat.S_ISREG(found.st_mode):
                    yield found


def read(path: Path, name: str) -> Run:
    """What is known of the run at `path`; never raises for what is in it."""
    there = list(_files(path))
    changed = max((file.st_mtime for file in there), default=0.0)
    size = sum(file.st_size for file in there)
    recipe: Mapping[str, Any] = {}
    identity: Mapping[str, Any] = {}
    result: Mapping[str, Any] = {}
    facts: Mapping[str, Any] = {}
    lines: tuple[Mapping[str, Any], ...] = ()
    total, state, why = None, DAMAGED, ""
    try:
        identity = files.read_json(path / "run.json")
        recipe = files.read_recipe(path / "recipe.yaml")
        lines = tuple(files.read_lines(path / "metrics.jsonl"))
        result, facts, failure = (
            files.read_json(path / name) if (path / name).exists() else {}
            for name in ("result.json", "facts.json", "failed.json")
        )
        total = _total(recipe, identity)
        why = str(failure.get("error", ""))
        state = FINISHED if result else RUNNING if lock.is_running(path) else FAILED if failure else UNFINISHED
    except (files.Damaged, TypeError, ValueError) as exc:
        why = str(exc)
    return Run(name, path, state, why, recipe, identity, result, facts, lines, total, changed, size)


def _total(recipe: Mapping[str, Any], identity: Mapping[str, Any]) -> int | None:
    """As prepare.total_steps() has it, of all rows: those that were dropped are known to the run only."""
    if recipe.get("max_steps"):
        return int(recipe["max_steps"])
    rows, size = identity.get("data", {}).get("train"), recipe.get("train_batch_size")
    return max(1, math.ceil(float(recipe.get("epochs") or 3) * rows / size)) if rows and size else None


# — compared —————————————————————————————————————————————————————————————————————————————————————


def compare(one: Run, two: Run) -> dict[str, Any]:
    """What differs between two runs: what they were given (`recipe`; `base`, `data`, `versions` and so on), what came of it."""
    ignored = ("output_dir", "recipe")
    given = [
        (f"recipe.{name}", before, now)
        for name, before, now in differences(dict(one.recipe), dict(two.recipe))
        if name not in ignored
    ]
    known = [{key: value for key, value in run.identity.items() if key not in ignored} for run in (one, two)]
    metrics = {name: [run.metrics.get(name) for run in (one, two)] for name in {**one.metrics, **two.metrics}}
    losses = [run.losses for run in (one, two)]
    return {
        "runs": [one.name, two.name],
        "differences": {name: [before, now] for name, before, now in [*given, *differences(known[0], known[1])]},
        "metrics": metrics,
        "steps": [one.step, two.step],
        "losses": [[step, *(curve.get(step) for curve in losses)] for step in sorted({*losses[0], *losses[1]})],
    }


def curve(losses: Sequence[Mapping[int, float]], names: Sequence[str]) -> list[str]:
    """Loss by step as text, a line for some steps: the mean of each run's steps, and where it is between least and most."""
    last = max((step for run in losses for step in run), default=0)
    if not last:
        return []
    wide = max(1, math.ceil(last / _BARS))
    table = []
    for start in range(1, last + 1, wide):
        span = range(start, min(last, start + wide - 1) + 1)
        means = []
        for run in losses:
            there = [run[step] for step in span if step in run]
            means.append(sum(there) / len(there) if there else math.nan)
        table.append((f"{span[0]}-{span[-1]}" if len(span) > 1 else str(start), means))
    known = [mean for _, means in table for mean in means if math.isfinite(mean)]
    least, most = min(known, default=0.0), max(known, default=0.0)
    marks = "ab" if len(losses) == 2 else "•"
    heads = [f"{mark} {name}"[-14:] if len(losses) == 2 else "loss" for mark, name in zip(marks, names, strict=False)]
    lines = [f"{'step':>11} " + " ".join(f"{head:>14}" for head in heads)]
    for label, means in table:
        strip = ["·"] * _WIDE
        for mark, mean in zip(marks, means, strict=False):
            if math.isfinite(mean):
                place = round((mean - least) / (most - least or 1.0) * (_WIDE - 1))
                strip[place] = mark if strip[place] == "·" else "*"
        cells = " ".join(f"{mean:>14.4f}" if math.isfinite(mean) else f"{'-':>14}" for mean in means)
        lines.append(f"{label:>11} {cells}  {''.join(strip)}")
    return lines


# — as text ——————————————————————————————————————————————————————————————————————————————————————


def table(runs: Sequence[Run], served: Mapping[Path, Sequence[str]]) -> list[str]:
    """A line a run, under a line of names. `served`: by a run's directory, the versions that it was promoted to."""
    rows = [("run", "state", "task", "base", "best", "changed", "size", "served as")]
    rows += [
        (
            run.name,
            progress(run),
            str(run.recipe.get("task", "?")),
            run.base,
            numbers(run.metrics),
            _date(run.changed),
            size(run.bytes),
            " ".join(served.get(run.path.absolute(), ())),
        )
        for run in runs
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def progress(run: Run) -> str:
    if run.state == FINISHED:
        return f"{run.state}, {run.step} steps"
    if run.state == DAMAGED:
        return f"{run.state}: {run.why}"
    about = "" if run.recipe.get("max_steps") else "about "
    return f"{run.state}, step {run.step} of {about}{run.total or '?'}"


def numbers(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "-"


def _date(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().strftime("%Y-%m-%d %H:%M")
