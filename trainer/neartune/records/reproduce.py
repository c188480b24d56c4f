"""A finished run done again from its folder, its losses compared step by step while it runs; the first that is not the same to
the bit ends it, and is named with all that is known to be different."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neartune import launch
from neartune import recipe as recipes
from neartune.recipe import Loaded, RecipeError, differences
from neartune.records.runs import Run, RunsError

MAY_MOVE = ("base_model", "train_data", "validation_data")
"""Settings that say where something lies. What lies there is compared by its content."""
_MATTERS = ("cpu", "threads", "device", "system")
_COMPARED = ("loss", "grad_norm", "learning_rate")


class Different(RunsError):
    """It is not the same run; the message names the first difference."""


def pinned(run: Run, to: Path, overrides: Sequence[str]) -> Loaded:
    """The recipe that does `run` again in `to`: what was `auto` is what it came to. `overrides`: of MAY_MOVE, and mirror.
    Raises RunsError, RecipeError."""
    if not run.result or not run.losses:
        raise RunsError(f"{run.name} is {run.state}{f' ({run.why})' if run.why else ''}: only a finished run can be done again")
    strange = [word for word in overrides if word.partition("=")[0] not in (*MAY_MOVE, "mirror")]
    if strange:
        allowed = ", ".join((*MAY_MOVE, "mirror"))
        raise RunsError(f"{strange[0]}: a run is done again as it was: only where things lie can be said ({allowed})")
    decided = {
        "output_dir": str(to),
        "micro_batch_size": first_micro_batch(run.lines),
        "processes": run.identity["processes"],
        "precision": run.identity["precision"],
    }
    try:
        return recipes.load(run.path / "recipe.yaml", [*overrides, *(f"{key}={json.dumps(it)}" for key, it in decided.items())])
    except RecipeError as exc:
        moved = [key for key in MAY_MOVE if f" {key} is " in str(exc)]
        hint = [f"it has moved? {key}=PATH on the command line says where it is now" for key in moved]
        raise RecipeError([*exc.complaints, *hint]) from None


def first_micro_batch(lines: Iterable[Mapping[str, Any]]) -> int:
    """That of the first step: measured then, or what memory left of it."""
    return int(next(line["micro_batch"] for line in lines if "kind" not in line))


def sort_out(before: Any, now: Any) -> tuple[list[str], list[str], list[str]]:
    """run.json of both → (what makes it another run, what only lies elsewhere, circumstances in which it may differ)."""
    settings, content, moved, circumstances = [], [], [], []
    is_same_base = before["base"]["fingerprint"] == now["base"]["fingerprint"]
    for name, was, is_now in differences(before, now):
        line = f"{name.removeprefix('recipe.')} was {_shown(was)}, is {_shown(is_now)}"
        part, _, setting = name.partition(".")
        setting = setting.partition(".")[0]
        if name in ("recipe.micro_batch_size", "recipe.precision"):
            continue
        if setting in MAY_MOVE or (part == "base" and is_same_base) or (part == "data" and setting == "commits"):
            moved.append(line)
        elif part == "recipe":
            settings.append(f"{line} (recipe.yaml was changed after the run)")
        elif part in ("base", "data"):
            content.append(line)
        else:
            circumstances.append(line)
    return [*settings, *content], moved, circumstances


def machine_differences(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Of what sums of floats may depend on; a run that was carried here does not say."""
    if before is None:
        return ["the machine of the run is not known"]
    return [f"{name} was {was}, is {is_now}" for name, was, is_now in differences(before, now) if name in _MATTERS]


def step_difference(line: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """Of a step as it was recorded and as it is: what differs, in words; None: nothing."""
    if line is None:
        return f"step {now['step']}: the run had no such step"
    found = [f"{name} was {line[name]!r}, is {now[name]!r}" for name in _COMPARED if line[name] != now[name]]
    return f"step {now['step']}: {'; '.join(found)}" if found else None


def reproduce(run: Run, loaded: Loaded, url: str, say: Any) -> None:
    """Do `run` again by `loaded`, from pinned(); in every process, of which the first speaks. Raises Different, and what a run
    raises."""
    from neartune.run import Again
    from neartune.run import run as train

    world = launch.world_of(os.environ)
    is_first = world is None or world.rank == 0
    recorded = {line["step"]: line for line in run.lines if "kind" not in line}
    last = max(recorded)
    known: list[str] = []

    def tell(line: str) -> None:
        if is_first:
            say(line)

    def begin(identity: dict[str, Any], machine: dict[str, Any]) -> None:
        another, moved, circumstances = sort_out(run.identity, identity)
        if another:
            raise Different(f"this would be another run than {run.name}: {'; '.join(another)}")
        known.extend(circumstances)
        known.extend(machine_differences(run.facts.get("machine"), machine))
        for line in moved:
            tell(f"elsewhere, and the same: {line}")
        for line in known:
            tell(f"not as it was: {line}")

    def watch(trainer: Any, result: Any) -> None:
        now = {name: getattr(result, name) for name in ("step", "micro_batch", *_COMPARED)}
        line = recorded.get(result.step)
        found = step_difference(line, now)
        if found:
            if line and line["micro_batch"] != now["micro_batch"]:
                known.append(f"micro_batch was {line['micro_batch']}, is {now['micro_batch']}")
            raise Different(f"{found}. {_else(known)}")
        if result.step == last or result.step % max(1, last // 10) == 0:
            tell(f"the same up to step {result.step} of {last}")
        if result.step < last:  # where memory ran out then, the smaller cuts are taken now
            trainer.micro = min(trainer.micro, recorded[result.step + 1]["micro_batch"])

    result = train(loaded.recipe, url, say, Again(run.identity, begin, watch))
    if result["steps"] != run.result["steps"]:
        raise Different(f"it ended after {result['steps']} steps, and the run after {run.result['steps']}. {_else(known)}")
    if result["metrics"] != run.result["metrics"]:
        raise Different(f"the steps are the same, and the best metrics are not: {_else(known)}")
    if not is_first:
        return  # the files are the first's, who may be writing them
    files = [path / "adapter" / "adapter_model.safetensors" for path in (run.path, loaded.recipe.output_dir)]
    if files[0].read_bytes() != files[1].read_bytes():
        raise Different(f"the steps are the same, and the adapter is not: {files[0]} was changed after the run")
    say(f"the same to the bit: {len(recorded)} steps, the metrics, the adapter")


def target_of(run: Run, to: Path | None, *, may_be_there: bool = False) -> Path:
    """Where `run` is done again: a directory that is not there, unless another process of this one made it. Raises
    RunsError."""
    target = (to or run.path.with_name(f"{run.path.name}-reproduced")).absolute()
    if target.exists() and not may_be_there:
        raise RunsError(f"{target} is there already: remove it, or say --to DIR")
    return target


def _else(known: Sequence[str]) -> str:
    if known:
        return f"Not as it was: {'; '.join(known)}"
    return "Versions, machine, processes and micro-batch are what they were: something here is not deterministic"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
