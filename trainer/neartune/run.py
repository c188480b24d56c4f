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
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neartune import adapter, batch, checkpoint, lock, loop
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
    | {"prompts", "processes", "accelerate_config", "output_dir", "lock"}
)
"""Settings in which a resumed run may differ: they do not touch what is learnt."""
CHECKPOINTS_A_RUN = 20
FAILED, INITIAL, METRICS = "failed.json", "initial.safetensors", "metrics.jsonl"


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
    with _alone(output, place, say), _failure_noted(output, place):
        start = decide(output, _left(output))
        before = json.loads((output / "run.json").read_text()) if start.checkpoint else None
        ready = prepare(recipe, place, before or (again and again.before), url, say)
        identity = json.loads(json.dumps(_identity(ready)))
        if again:
            again.begin(identity, facts.machine(ready))
        if before:
            _refuse_changed(output, before, identity)
        _refuse_disagreement(ready, start.step)
        initial = output / INITIAL if recipe.lora_init != "default" else None
        if place.is_first:
            _make_way(output, start)
            if initial:
                adapter.save_initial(ready.trainer.model, initial)
            adapter.write_json(output / "run.json", identity)
            (output / "recipe.yaml").write_text(as_yaml(recipe), encoding="utf-8")
            adapter.write_json(output / "facts.json", facts.of(ready, origins or {}))
        position = Position()
        if start.checkpoint:
            position = checkpoint.load(start.checkpoint, ready.trainer)
            say(f"continued from step {position.step}")
        if not position.micro:
            position.micro = position.eval_micro = micro_batch(recipe, ready.trainer, ready.learnt, say)
            ready.trainer.micro = position.micro
        with (
            _metrics(output, place) as write,
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


@contextmanager
def _alone(output: Path, place: Place, say: Say) -> Iterator[None]:
    """No other run writes there meanwhile. Raises RunError, in all processes alike."""
    with ExitStack() as stack:
        holder = ""
        if place.is_first:
            try:
                stack.enter_context(lock.held(output, say))
            except lock.Taken as exc:
                holder = str(exc)
        if found := next(filter(None, place.gather([holder])), ""):
            raise RunError(
                f"{output}: {found} trains here (its .lock says so): let it end, or end it; or choose another output_dir"
            )
        yield


@dataclass(frozen=True, slots=True)
class Left:
    """What earlier attempts left in output_dir: names, and whole checkpoints, the last one last."""

    names: frozenset[str]
    checkpoints: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """How a run begins there. `checkpoint`: it goes on from this one, of `step`; None: it begins anew. `goes`: files that are
    removed; of metrics.jsonl go the lines beyond `step`; all else is kept until it is written again."""

    checkpoint: Path | None
    step: int
    goes: tuple[str, ...]


def _left(output: Path) -> Left:
    names = frozenset(path.name for path in output.glob("*"))
    return Left(names, tuple(checkpoint.saved(output / "checkpoints")))


def decide(output: Path, left: Left) -> Start:
    """Raises RunError when there is nothing to begin."""
    if "result.json" in left.names:
        raise RunError(f"{output}: this run is finished: choose another output_dir, or remove it to begin anew")
    if left.checkpoints:
        return Start(left.checkpoints[-1], checkpoint.step_of(left.checkpoints[-1]), (FAILED,))
    return Start(None, 0, (FAILED, INITIAL))


def kept(lines: bytes, step: int) -> int:
    """Bytes of metrics.jsonl that a run which goes on from `step` keeps: whole lines, up to that step's."""
    count = 0
    for line in lines.splitlines(keepends=True) if step else ():
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        count += len(line)
    return count


def _make_way(output: Path, start: Start) -> None:
    """What was decided, done."""
    for name in start.goes:
        (output / name).unlink(missing_ok=True)
    with (output / METRICS).open("a+b") as stream:
        stream.seek(0)
        stream.truncate(kept(stream.read(), start.step))


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


def _refuse_changed(output: Path, before: Any, now: Any) -> None:
    """run.json of a run that goes on, and what it would be. Raises RunError with all that differs."""
    changed = [f"{name.removeprefix('recipe.')}: was {was!r}, is {is_now!r}" for name, was, is_now in differences(before, now)]
    if changed:
        raise RunError(f"{output}: this run was begun otherwise, so it cannot be continued:\n  " + "\n  ".join(changed))


# — the steps ————————————————————————————————————————————————————————————————————————————————————


def _refuse_disagreement(ready: Ready, step: int) -> None:
    """Processes that learn together must be at one step of one base and the same rows. Raises RunError in all of them."""
    known = ready.place.gather([(step, fingerprint(ready.files), ready.splits.digest)])
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
    } | ({"skipped": True} if result.was_skipped else {})


def _shown(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))


@contextmanager
def _metrics(output: Path, place: Place) -> Iterator[Callable[[dict[str, Any]], None]]:
    """metrics.jsonl, a line at a time."""
    if not place.is_first:
        yield lambda line: None
        return
    with (output / METRICS).open("a", encoding="utf-8") as stream:

        def write(line: dict[str, Any]) -> None:
            stream.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            stream.flush()

        yield write


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


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
    """failed.json says why a run that has begun ended by itself before its end, until it goes on. What was refused ended
    nothing."""
    try:
        yield
    except (Stopped, RunError):
        raise
    except Exception as exc:
        if place.is_first and (output / "run.json").exists():
            adapter.write_json(output / FAILED, {"error": str(exc)})
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
