"""Verbs over runs that need no torch: `runs list, show, compare, promote, rollback`, `push`, `pull`. They answer at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neartune.records import carry, registry, runs
from neartune.records.runs import RunsError


def add_runs(parser: argparse.ArgumentParser, add_mirror: Callable[[argparse.ArgumentParser], None]) -> None:
    verbs = parser.add_subparsers(title="what", metavar="WHAT", required=True, dest="what")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, allow_abbrev=False)

    listed = verb("list", "runs at or below directories: state, base, best metric, date, size")
    listed.add_argument("directories", nargs="*", type=Path, metavar="DIR", help="where to look; default: here")
    shown = verb("show", "all that is known of a run")
    shown.add_argument("run", metavar="NAME", help="below --in, or a path")
    compared = verb("compare", "what differs between two runs, and their losses by step")
    compared.add_argument("run", metavar="A")
    compared.add_argument("other", metavar="B")
    promoted = verb("promote", "make a run's adapter the next version of a served name, and current")
    promoted.add_argument("run", metavar="NAME")
    promoted.add_argument("--as", dest="model", metavar="MODEL", required=True, help="the served name")
    back = verb("rollback", "make the version that was current before, or another one, current again")
    back.add_argument("model", metavar="MODEL")
    back.add_argument("--to", type=int, metavar="N", help="this version")
    again = verb("reproduce", "do a finished run again, and compare its losses step by step; exit status 1: different")
    again.add_argument("run", metavar="NAME")
    again.add_argument("--to", type=Path, metavar="DIR", help="of the new run; default: NAME-reproduced beside it")
    add_mirror(again)
    again.add_argument("overrides", nargs="*", metavar="key=value", help="where base_model, train_data or the mirror are now")
    for one in (shown, compared, promoted, back, again):
        _add_home(one)
    for one in (listed, shown, compared):
        one.add_argument("--json", action="store_true", help="for programs")


def _add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--in", dest="home", type=Path, default=Path(), metavar="DIR", help="where runs are; default: here")


def add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="NAME", help="a finished run: below --in, or a path")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="such as where a USB stick is mounted")
    parser.add_argument("--as", dest="name", metavar="NAME", help="its name there; default: the run's directory")
    _add_home(parser)


def add_pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what was pushed, or the directory that it is in")
    parser.add_argument("--as", dest="name", metavar="NAME", help="its name here; default: as it was pushed")
    parser.add_argument("--to", type=Path, default=Path(), metavar="DIR", help="where runs are; default: here")


def act(parsed: argparse.Namespace) -> int:
    """Exit status 2: it cannot be had, which was said."""
    do = {"runs": lambda: _RUNS[parsed.what](parsed), "push": lambda: _push(parsed), "pull": lambda: _pull(parsed)}
    try:
        for line in do[parsed.verb]():
            print(line)
    except RunsError as exc:
        print(f"neartune: {exc}", file=sys.stderr)
        return 2
    return 0


def the_run(name: str, home: Path) -> runs.Run:
    """Raises RunsError."""
    path = runs.locate(name, home)
    return runs.read(path, runs.name_of(path, home))


def _readable(name: str, home: Path) -> runs.Run:
    run = the_run(name, home)
    if run.state == runs.DAMAGED:
        raise RunsError(f"{run.name}: {run.why}")
    return run


def _list(parsed: argparse.Namespace) -> list[str]:
    homes = parsed.directories or [Path()]
    found = []
    served: dict[Path, list[str]] = {}
    for home in homes:
        served |= registry.promoted(registry.load(home), home)
        prefix = f"{home}/" if len(homes) > 1 else ""
        found += [runs.read(path, prefix + runs.name_of(path, home)) for path in runs.find(home)]
    if parsed.json:
        return [_json([run.brief() | {"served": served.get(run.path.absolute(), [])} for run in found])]
    return runs.table(found, served) if found else [f"no runs in {', '.join(str(home.absolute()) for home in homes)}"]


def _show(parsed: argparse.Namespace) -> list[str]:
    run = the_run(parsed.run, parsed.home)
    served = registry.promoted(registry.load(parsed.home), parsed.home).get(run.path.absolute(), [])
    known = run.brief() | {"served": served}
    more = {name: value for name, value in run.identity.items() if name != "recipe"}
    more |= {name: value for name, value in run.result.items() if name not in ("metrics", "steps")}
    if parsed.json:
        return [_json(known | more | {"recipe": run.recipe, "losses": list(run.losses.items())})]
    lines = [f"{name}: {_value(value)}" for name, value in (known | more).items() if value not in ("", [], {})]
    lines += ["recipe:", *(f"  {name}: {_value(value)}" for name, value in run.recipe.items())]
    return [*lines, *runs.curve([run.losses], [run.name])]


def _compare(parsed: argparse.Namespace) -> list[str]:
    one, two = (_readable(name, parsed.home) for name in (parsed.run, parsed.other))
    found = runs.compare(one, two)
    if parsed.json:
        return [_json(found)]
    lines = [f"a: {one.name}, {runs.progress(one)}", f"b: {two.name}, {runs.progress(two)}"]
    lines += [f"{name}: {_value(before)} | {_value(now)}" for name, (before, now) in found["differences"].items()]
    if not found["differences"]:
        lines.append("recipe, base, data, versions and processes are the same")
    for name, (first, second) in found["metrics"].items():
        cells = ["-" if value is None else f"{value:.4f}" for value in (first, second)]
        lines.append(f"best {name}: {cells[0]} | {cells[1]}")
    return [*lines, *runs.curve([one.losses, two.losses], [one.name, two.name])]


def _promote(parsed: argparse.Namespace) -> list[str]:
    version = registry.promote(runs.locate(parsed.run, parsed.home), parsed.model, parsed.home)
    return [f"{parsed.model}@{version.number} is current: {version.run}, {runs.numbers(version.metrics)}"]


def _rollback(parsed: argparse.Namespace) -> list[str]:
    version = registry.rollback(parsed.model, parsed.home, parsed.to)
    return [f"{parsed.model}@{version.number} is current: {version.run}, promoted by {version.who} at {version.when}"]


_RUNS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "list": _list,
    "show": _show,
    "compare": _compare,
    "promote": _promote,
    "rollback": _rollback,
}


def _push(parsed: argparse.Namespace) -> list[str]:
    return carry.told(carry.push(_readable(parsed.run, parsed.home), parsed.to, parsed.name))


def _pull(parsed: argparse.Namespace) -> list[str]:
    carried = carry.pull(parsed.folder, parsed.to, parsed.name)
    return [*carry.told(carried), carry.base_told(carried)]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
