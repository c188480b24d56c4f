"""A run, from a recipe to an adapter: a lab protocol that reads top to bottom.

OUTPUT/recipe.yaml     the recipe, resolved       adapter/      plain peft files: the best adapter
       metrics.jsonl   a line a step              checkpoints/  to go on from
       run.json        what must not change       result.json   how it ended
       facts.json      what else is to be told    report.html   all of it on a page
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neartune import adapter, batch, checkpoint, loop
from neartune.checkpoint import Position
from neartune.evaluate import answers, evaluate
from neartune.loop import StepResult
from neartune.model import fingerprint, refuse_dead
from neartune.prepare import Place, Ready, Say, find_place, micro_batch, prepare
from neartune.recipe import Recipe, as_yaml, differences, plain
from neartune.reporting import card, facts, report
from neartune.watch import monitor

MAY_CHANGE = frozenset(
    {"max_steps", "epochs", "eval_every", "early_stopping_patience", "early_stopping_min_delta", "mirror", "report_to", "panel"}
    | {"prompts", "processes", "accelerate_config", "output_dir"}
)
"""Settings in which a resumed run may differ: they do not touch what is learnt."""
CHECKPOINTS_A_RUN = 20


class RunError(Exception):
    """This run cannot be begun or continued here; the message says what to do."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C: a checkpoint was written. `status` is the process's exit status."""

    def __init__(self, status: int) -> None:
        super().__init__("stopped")
        self.status = status


@dataclass(frozen=True, slots=True)
class Again:
    """How a finished run is done again. `before`: its run.json, whose commits are taken; `begin(run.json, machine)`: of the
    new one, before anything is written; `watch(trainer, step)`: after each step. Both are called in every process, and may
    raise."""

    before: Any
    begin: Callable[[dict[str, Any], dict[str, Any]], None]
    watch: Callable[[loop.Trainer, StepResult], None]


def run(
    recipe: Recipe, url: str, say: Say, again: Again | None = None, origins: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Do it. Returns result.json's content. `origins`: where each setting came from, for the report. Raises HubError,
    DataError, ModelError, RunError, OutOfMemory, NotFinite, Stopped, and what `again` raises."""
    began = time.perf_counter()
    place = find_place()
    say = say if place.is_first else _nothing
    output = recipe.output_dir
    _refuse_finished(output)
    ready = prepare(recipe, place, _begun(output) or (again and again.before), url, say)
    if again:
        again.begin(json.loads(json.dumps(_identity(ready))), facts.machine(ready))
    initial = output / "initial.safetensors" if recipe.lora_init != "default" else None
    if initial and place.is_first:
        if not checkpoint.saved(output / "checkpoints"):
            initial.unlink(missing_ok=True)  # of a run that ended before it could be continued
        adapter.save_initial(ready.trainer.model, initial)
    position = _begin_or_resume(ready, say)
    _refuse_disagreement(ready, position)
    if not position.micro:
        position.micro = ready.trainer.micro = micro_batch(recipe, ready.trainer, ready.learnt, say)
        position.eval_micro = ready.trainer.micro
    if place.is_first:
        adapter.write_json(output / "run.json", _identity(ready))
        (output / "recipe.yaml").write_text(as_yaml(recipe), encoding="utf-8")
        adapter.write_json(output / "facts.json", facts.of(ready, origins or {}))
    with (
        _failure_noted(output, place),
        _metrics(output, position.step, place) as write,
        _watched(ready, position.step, write, say) as (log, say_above),
        _signals() as stopping,
    ):
        reason = _train(ready, position, log, stopping, again, say_above)
    result = {
        "metrics": position.best_metrics,
        "base_metrics": position.base_metrics,
        "steps": position.step,
        "best_step": position.best_step or position.step,
        "stopped_because": reason,
        "micro_batch": position.micro,
        "micro_batch_by": recipe.micro_batch_by,
        "world_size": place.world,
        "seconds": time.perf_counter() - began,
        "peak_bytes": batch.peak(place.device),
    }
    if place.is_first:
        _finish(ready, position, initial, result, say)
    elif place.sharding:
        facts.at_the_end(ready, position.step)  # the base's other parts are here: the first cannot judge rows by itself
    return result


def _finish(ready: Ready, position: Position, initial: Path | None, result: dict[str, Any], say: Say) -> None:
    """The best adapter, what is known of it, result.json, the report."""
    recipe, model, output = ready.recipe, ready.trainer.model, ready.recipe.output_dir
    best = output / "best" / f"step-{position.best_step:06d}"
    if best.is_dir():
        checkpoint.load_parameters(best, model)
    belongs = adapter.Card.of(ready.base, ready.files, ready.task.name, ready.labels)
    adapter.save(model, belongs, ready.base.path, ready.processor, output / "adapter", initial)
    if initial:
        say(f"{recipe.lora_init} was converted to plain LoRA of rank {2 * recipe.lora_rank}, for the base as it is")
    result["saved"] = facts.saved(ready, output / "adapter")
    known = json.loads((output / "facts.json").read_text(encoding="utf-8")) | facts.at_the_end(ready, position.step)
    adapter.write_json(output / "facts.json", known)
    vocabulary = len(ready.processor) if recipe.new_tokens else 0
    card.write(card.facts_of(output.name, known, result, plain(recipe), vocabulary), output / "adapter")
    adapter.write_json(output / "result.json", result)
    page = report.write(output)
    size = sum(file.stat().st_size for file in (output / "adapter").iterdir())
    say(f"{result['stopped_because']}; adapter of {size / 1e6:.1f} MB in {output / 'adapter'}")
    say(card.saved_sentence(result["saved"]))
    say(f"report: {page}")


# — before the first step ————————————————————————————————————————————————————————————————————————


def _nothing(line: str) -> None:
    """What every process but the first says."""


def _refuse_finished(output: Path) -> None:
    if (output / "result.json").exists():
        raise RunError(f"{output}: this run is finished: choose another output_dir, or remove it to begin anew")


def _begun(output: Path) -> Any:
    """run.json of a run that goes on here; None: a new one."""
    return json.loads((output / "run.json").read_text()) if checkpoint.saved(output / "checkpoints") else None


def _identity(ready: Ready) -> dict[str, Any]:
    """What a resumed run must have the same."""
    import peft
    import transformers

    settings = {name: value for name, value in plain(ready.recipe).items() if name not in MAY_CHANGE}
    splits = ready.splits
    rows = {"train": len(splits.train), "validation": len(splits.validation), "sha256": splits.digest}
    return {
        "recipe": settings,
        "base": {"repo": ready.base.repo, "commit": ready.base.commit, "fingerprint": fingerprint(ready.files)},
        "data": rows | {"commits": ready.commits},
        "processes": ready.place.world,
        "precision": ready.precision.name,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def _begin_or_resume(ready: Ready, say: Say) -> Position:
    output = ready.recipe.output_dir
    found = checkpoint.saved(output / "checkpoints")
    if not found:
        output.mkdir(parents=True, exist_ok=True)
        return Position()
    changed = [
        f"{name.removeprefix('recipe.')}: was {was!r}, is {now!r}"
        for name, was, now in differences(_begun(output), json.loads(json.dumps(_identity(ready))))
    ]
    if changed:
        raise RunError(f"{output}: this run was begun otherwise, so it cannot be continued:\n  " + "\n  ".join(changed))
    position = checkpoint.load(found[-1], ready.trainer)
    say(f"continued from step {position.step}")
    return position


# — the steps ————————————————————————————————————————————————————————————————————————————————————


def _refuse_disagreement(ready: Ready, position: Position) -> None:
    """Processes that learn together must be at one step of one base and the same rows. Raises RunError in all of them."""
    known = ready.place.gather([(position.step, fingerprint(ready.files), ready.splits.digest)])
    if len(set(known)) > 1:
        raise RunError(
            f"{ready.recipe.output_dir}: the processes do not have the same step, base and rows: is output_dir on one disk for "
            "all of them, or did base or data change on the Hub while they were fetched? Start again"
        )


def _train(
    ready: Ready,
    position: Position,
    log: Callable[[dict[str, Any]], None],
    stopping: Callable[[], int],
    again: Again | None,
    say: Say,
) -> str:
    """Steps with evaluations and checkpoints among them. Returns why it ended. Raises Stopped."""
    recipe, trainer, total = ready.recipe, ready.trainer, ready.total
    learnt, judged, labels, place = ready.learnt, ready.judged, ready.labels, ready.place
    eval_every = _eval_every(recipe, total)
    save_every = max(1, total // CHECKPOINTS_A_RUN)
    output = recipe.output_dir
    checkpoints = output / "checkpoints"
    if new := [prompt for prompt in recipe.prompts if prompt not in position.base_answers]:
        with trainer.model.disable_adapter() if position.step else nullcontext():
            position.base_answers |= dict(zip(new, answers(trainer, new), strict=True))
    if judged.examples and not position.base_metrics:
        position.base_metrics, position.eval_micro = evaluate(trainer, judged.examples, labels, position.eval_micro)
        say(f"before: {_shown(position.base_metrics)}")
        log({"kind": "eval", "step": position.step, **position.base_metrics})
    if recipe.early_stopping_patience and position.checks >= recipe.early_stopping_patience:
        return f"no progress in {position.checks} evaluations"
    results = loop.steps(
        trainer, recipe, learnt.examples, learnt.wheres, first=position.step, total=total, applied=position.applied
    )
    for result in results:
        if result.step == 1:
            refuse_dead(trainer.model)
        position.step = result.step
        position.applied += not result.was_skipped
        position.micro = result.micro_batch
        log(_line(result))
        if again:
            again.watch(trainer, result)
        is_last = result.step == total
        if judged.examples and (result.step % eval_every == 0 or is_last):
            metrics, position.eval_micro = evaluate(trainer, judged.examples, labels, position.eval_micro)
            log({"kind": "eval", "step": result.step, **metrics})
            is_best = _note_progress(position, metrics, recipe.early_stopping_min_delta)
            say(f"step {result.step}/{total}: {_shown(metrics)}{' (best)' if is_best else ''}")
            if recipe.prompts:
                now = answers(trainer, recipe.prompts)
                sides = [
                    {"prompt": prompt, "base": position.base_answers[prompt], "adapter": said}
                    for prompt, said in zip(recipe.prompts, now, strict=True)
                ]
                log({"kind": "samples", "step": result.step, "samples": sides})
                for side in sides:
                    say("  {prompt}\n    base: {base}\n    adapter: {adapter}".format(**side))
            if is_best and place.is_first:
                checkpoint.save(output / "best", trainer, position, keep=0)
            if recipe.early_stopping_patience and position.checks >= recipe.early_stopping_patience:
                if place.is_first:
                    checkpoint.save(checkpoints, trainer, position)
                return f"no progress in {position.checks} evaluations"
        status = max(trainer.gather([stopping()]))  # all processes stop after the same step
        if place.is_first and (result.step % save_every == 0 or is_last or status):
            checkpoint.save(checkpoints, trainer, position)
            checkpoint.drop_all_but(output / "best", position.best_step)
        if status:
            say(f"stopped after step {result.step}: the same command goes on from here")
            raise Stopped(status)
    return f"all {total} steps are done"


def _eval_every(recipe: Recipe, total: int) -> int:
    return max(1, total // 20) if recipe.eval_every == "auto" else int(recipe.eval_every)


def _note_progress(position: Position, metrics: dict[str, Any], min_delta: float) -> bool:
    loss = float(metrics["loss"])
    if math.isfinite(loss) and (position.best is None or loss < position.best - min_delta):
        position.best, position.best_step, position.best_metrics, position.checks = loss, position.step, metrics, 0
        return True
    position.checks += 1
    return False


def _line(result: StepResult) -> dict[str, Any]:
    return {
        "step": result.step,
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens_per_second": result.tokens / max(1e-9, result.seconds),
        "micro_batch": result.micro_batch,
        "seconds": result.seconds,
    }


def _shown(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))


@contextmanager
def _metrics(output: Path, step: int, place: Place) -> Iterator[Callable[[dict[str, Any]], None]]:
    """metrics.jsonl, a line at a time; lines beyond `step`, of a run that died later, are cut off."""
    if not place.is_first:
        yield lambda line: None
        return
    file = output / "metrics.jsonl"
    kept = 0
    if step and file.exists():
        for line in file.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
    with file.open("a", encoding="utf-8") as stream:
        stream.truncate(kept)

        def write(line: dict[str, Any]) -> None:
            stream.write(json.dumps(line) + "\n")
            stream.flush()

        yield write


def _watched(ready: Ready, step: int, write: monitor.Log, say: Say) -> AbstractContextManager[tuple[monitor.Log, Say]]:
    """The first process is watched; the others have nothing to show."""
    recipe, place = ready.recipe, ready.place
    if not place.is_first:
        return nullcontext((write, say))
    return monitor.watch(
        recipe,
        write,
        say,
        title=f"{Path(recipe.base_model).name} · {recipe.task} · {place.device.type}",
        step=step,
        total=ready.total,
        eval_every=_eval_every(recipe, ready.total) if ready.judged.examples else 0,
        console=monitor.terminal(recipe.panel),
    )


@contextmanager
def _failure_noted(output: Path, place: Place) -> Iterator[None]:
    """failed.json says why a run ended by itself before its end, until it goes on."""
    file = output / "failed.json"
    if place.is_first:
        file.unlink(missing_ok=True)
    try:
        yield
    except Stopped:
        raise
    except Exception as exc:
        if place.is_first:
            adapter.write_json(file, {"error": str(exc)})
        raise


@contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """How a stop was asked for: 0 not at all, else the exit status. The step under way is finished; a second Ctrl-C is not
    waited for."""
    status = 0

    def note(number: int, frame: object) -> None:
        nonlocal status
        if status:
            sys.exit(128 + number)
        status = 128 + number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
