"""A run, from a recipe to an adapter: a lab protocol that reads top to bottom.

OUTPUT/recipe.yaml     the recipe, resolved       adapter/      plain peft files: the best adapter
       metrics.jsonl   a line a step              checkpoints/  to go on from
       run.json        what must not change       result.json   how it ended
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from neartune import adapter, batch, checkpoint, data, hub, loop, tasks
from neartune.checkpoint import Position
from neartune.evaluate import answers, evaluate
from neartune.loop import StepResult, Trainer
from neartune.model import Precision, base_files, build, choose_precision, fingerprint, refuse_dead
from neartune.recipe import Recipe, Source
from neartune.tasks import Prepared, Task

Say = Callable[[str], None]

MAY_CHANGE = frozenset(
    {"max_steps", "epochs", "eval_every", "early_stopping_patience", "early_stopping_min_delta", "mirror", "report_to"}
    | {"prompts", "processes", "output_dir"}
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
class Place:
    """Which process this is, and of how many."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def run(recipe: Recipe, url: str, say: Say) -> dict[str, Any]:
    """Do it. Returns result.json's content. Raises HubError, DataError, ModelError, RunError, OutOfMemory, NotFinite,
    Stopped."""
    place, accelerator = _place()
    say = say if place.is_first else _nothing
    output = recipe.output_dir
    _refuse_finished(output)
    task = tasks.find(recipe)
    with accelerator.main_process_first():  # the others find it fetched
        before = _begun(output)
        commits = dict[str, str | None](before["data"]["commits"] if before else {})
        base = _base(recipe, before, url, say)
        splits = data.load(recipe, lambda source: _located(source, commits, url, say))
    for line in splits.report:
        say(line)
    hub.go_offline()
    _quieten_transformers()

    files = base_files(base.path)
    torch.manual_seed(recipe.seed)
    precision = choose_precision(recipe.precision, is_cuda=place.device.type == "cuda", has_bf16=_has_bf16())
    count = "one process" if place.world == 1 else f"{place.world} processes"
    say(f"precision {precision.name}: {precision.why}; {count} on {place.device.type}")
    processor = task.load_processor(base.path)
    if known := [token for token in recipe.new_tokens if token in processor.get_vocab()]:
        raise RunError(f"new_tokens: the base has {', '.join(known)} already")
    if recipe.new_tokens:
        processor.add_tokens(list(recipe.new_tokens))
    labels = task.find_labels(splits.train)
    vocabulary = len(processor) if recipe.new_tokens else 0
    model = build(recipe, task, base.path, labels, precision, say, vocabulary).to(place.device)
    learnt, judged = _prepare(recipe, task, splits, processor, labels, model, say)
    total = _total_steps(recipe, len(learnt.examples))

    initial = output / "initial.safetensors" if recipe.lora_init != "default" else None
    if initial and place.is_first:
        adapter.save_initial(model, initial)
    trainer = _trainer(recipe, task, model, processor, precision, place, accelerator)
    identity = _identity(recipe, base, files, splits, commits, place, precision)
    position = _begin_or_resume(output, trainer, identity, say, place)
    if not position.micro:
        position.micro = trainer.micro = _micro_batch(recipe, trainer, learnt, say)
        position.eval_micro = trainer.micro
    if place.is_first:
        adapter.write_json(output / "run.json", identity)
        (output / "recipe.yaml").write_text(_as_yaml(recipe), encoding="utf-8")
    with _metrics(output, position.step, place) as log, _signals() as stopping:
        reason = _train(recipe, trainer, learnt, judged, labels, position, total, output, log, stopping, say, place)
    result = {
        "metrics": position.best_metrics,
        "base_metrics": position.base_metrics,
        "steps": position.step,
        "best_step": position.best_step or position.step,
        "stopped_because": reason,
        "micro_batch": position.micro,
        "world_size": place.world,
    }
    if place.is_first:
        best = output / "best" / f"step-{position.best_step:06d}"
        if best.is_dir():
            checkpoint.load_parameters(best, model)
        adapter.save(model, base, files, processor, output / "adapter", initial)
        if initial:
            say(f"{recipe.lora_init} was converted to plain LoRA of rank {2 * recipe.lora_rank}, for the base as it is")
        adapter.write_json(output / "result.json", result)
        size = sum(file.stat().st_size for file in (output / "adapter").iterdir())
        say(f"{reason}; adapter of {size / 1e6:.1f} MB in {output / 'adapter'}")
    return result


# — before the first step ————————————————————————————————————————————————————————————————————————


def _place() -> tuple[Place, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    return Place(accelerator.process_index, accelerator.num_processes, accelerator.device), accelerator


def _quieten_transformers() -> None:
    """That a head is new is what was asked for. After fetching: the bars of downloads are wanted."""
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _nothing(line: str) -> None:
    """What every process but the first says."""


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _refuse_finished(output: Path) -> None:
    if (output / "result.json").exists():
        raise RunError(f"{output}: this run is finished: choose another output_dir, or remove it to begin anew")


def _begun(output: Path) -> Any:
    """run.json of a run that goes on here; None: a new one."""
    return json.loads((output / "run.json").read_text()) if checkpoint.saved(output / "checkpoints") else None


def _base(recipe: Recipe, before: Any, url: str, say: Say) -> hub.Snapshot:
    """A run that goes on keeps its commit, though the branch may have moved, and needs no mirror for what is here already."""
    name, path = recipe.base_model, Path(recipe.base_model)
    if path.is_dir():
        return hub.Snapshot(path)
    commit = before["base"]["commit"] if before and before["base"]["repo"] == name else None
    return (hub.fetched(name, commit) if commit else None) or hub.fetch(name, commit or recipe.revision, url, say)


def _located(source: Source, commits: dict[str, str | None], url: str, say: Say) -> Path:
    """`commits`: of datasets, by name; what is fetched now is added."""
    if source.is_path:
        return Path(source.name)
    commit = commits.get(source.name)
    found = hub.fetched(source.name, commit, kind="dataset") if commit else None
    found = found or hub.fetch(source.name, commit or "main", url, say, kind="dataset")
    commits[source.name] = found.commit
    return found.path


def _prepare(
    recipe: Recipe, task: Task, splits: data.Splits, processor: Any, labels: Sequence[str], model: Any, say: Say
) -> tuple[Prepared, Prepared]:
    options = {
        "max_length": None if recipe.max_length == "auto" else int(recipe.max_length),
        "model_limit": int(getattr(model.config, "max_position_embeddings", 1024) or 1024),
    }
    learnt = task.prepare(splits.train, processor, labels, **options)
    if not learnt.examples:
        raise data.DataError("no row is left to learn from: " + "; ".join(f"{what}: {n}" for what, n in learnt.counts.items()))
    longest = max(len(example.get("input_ids", ())) for example in learnt.examples)
    judged = task.prepare(splits.validation, processor, labels, **options | {"max_length": longest or None})
    for name, prepared in (("train", learnt), ("validation", judged)):
        for what, count in prepared.counts.items():
            say(f"{name}: {what}: {count}")
    if learnt.shown:
        say(f"the first row, what is learnt in ⟦ ⟧:\n{learnt.shown}")
    return learnt, judged


def _total_steps(recipe: Recipe, rows: int) -> int:
    if recipe.max_steps is not None:
        return recipe.max_steps
    epochs = 3.0 if recipe.epochs is None else recipe.epochs
    return max(1, math.ceil(epochs * rows / recipe.train_batch_size))


def _trainer(
    recipe: Recipe, task: Task, model: Any, processor: Any, precision: Precision, place: Place, accelerator: Any
) -> Trainer:
    if recipe.train_batch_size % place.world:
        raise RunError(f"train_batch_size {recipe.train_batch_size} cannot be shared by {place.world} processes equally")

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        if place.world == 1:
            return tensor
        summed: torch.Tensor = accelerator.reduce(tensor.to(place.device), "sum")
        return summed.to(tensor.device)

    def gather(items: list[Any]) -> list[Any]:
        if place.world == 1:
            return items
        from accelerate.utils import gather_object

        return list(gather_object(items))

    trainer = Trainer(
        task=task,
        model=model,
        optimizer=loop.make_optimizer(model, recipe),
        processor=processor,
        precision=precision,
        device=place.device,
        micro=0,
        rank=place.rank,
        world=place.world,
        scaler=torch.amp.GradScaler(place.device.type) if precision.scales else None,
        reduce=reduce,
        gather=gather,
    )
    model.train()
    return trainer


def _micro_batch(recipe: Recipe, trainer: Trainer, learnt: Prepared, say: Say) -> int:
    """Rows at once: as the recipe says, or measured with the longest rows there are."""
    most = recipe.train_batch_size // trainer.world
    if recipe.micro_batch_size != "auto":
        return min(most, int(recipe.micro_batch_size))
    limit = batch.limit_of(trainer.device, recipe.memory_limit)
    if trainer.device.type != "cuda":
        limit //= trainer.world  # all processes of this machine measure at once
    longest = sorted(learnt.examples, key=lambda example: -len(example.get("input_ids", ())))[:most]
    longest = (longest * most)[:most]

    def run_micro(size: int) -> int:
        rows = longest[:size]
        loss, _ = trainer.loss_of(rows)
        torch.autograd.backward(loss / max(1, sum(map(trainer.task.weight, rows))))
        trainer.optimizer.step()
        return sum(len(example.get("input_ids", (0,))) for example in rows)

    with batch.untouched(trainer.model, trainer.optimizer):
        trials = batch.find(run_micro, most=most, device=trainer.device, limit=limit)
    chosen = batch.choose(trials)
    agreed: int = min(trainer.gather([chosen]))
    if not agreed:
        raise loop.OutOfMemory(f"one row of {len(longest[0].get('input_ids', ()))} tokens does not fit in {limit / 1e9:.1f} GB")
    told = ", ".join(f"{t.micro}: {t.rate:.0f}/s {t.bytes / 1e9:.2f} GB{'' if t.fits else ' (too much)'}" for t in trials)
    say(f"micro-batch {agreed} of {recipe.train_batch_size}, measured within {limit / 1e9:.1f} GB: {told}")
    return agreed


def _identity(
    recipe: Recipe,
    base: hub.Snapshot,
    files: dict[str, str],
    splits: data.Splits,
    commits: dict[str, str | None],
    place: Place,
    precision: Precision,
) -> dict[str, Any]:
    """What a resumed run must have the same."""
    import peft
    import transformers

    settings = {name: value for name, value in _plain(recipe).items() if name not in MAY_CHANGE}
    return {
        "recipe": settings,
        "base": {"repo": base.repo, "commit": base.commit, "fingerprint": fingerprint(files)},
        "data": {"train": len(splits.train), "validation": len(splits.validation), "sha256": splits.digest, "commits": commits},
        "processes": place.world,
        "precision": precision.name,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def _begin_or_resume(output: Path, trainer: Trainer, identity: dict[str, Any], say: Say, place: Place) -> Position:
    found = checkpoint.saved(output / "checkpoints")
    if not found:
        output.mkdir(parents=True, exist_ok=True)
        return Position()
    differences = list(_differences(_begun(output), json.loads(json.dumps(identity)), ""))
    if differences:
        raise RunError(f"{output}: this run was begun otherwise, so it cannot be continued:\n  " + "\n  ".join(differences))
    position = checkpoint.load(found[-1], trainer)
    say(f"continued from step {position.step}")
    return position


def _differences(before: Any, now: Any, name: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name.removeprefix('recipe.')}: was {before!r}, is {now!r}"


# — the steps ————————————————————————————————————————————————————————————————————————————————————


def _train(
    recipe: Recipe,
    trainer: Trainer,
    learnt: Prepared,
    judged: Prepared,
    labels: Sequence[str],
    position: Position,
    total: int,
    output: Path,
    log: Callable[[dict[str, Any]], None],
    stopping: Callable[[], int],
    say: Say,
    place: Place,
) -> str:
    """Steps with evaluations and checkpoints among them. Returns why it ended. Raises Stopped."""
    eval_every = max(1, total // 20) if recipe.eval_every == "auto" else int(recipe.eval_every)
    save_every = max(1, total // CHECKPOINTS_A_RUN)
    checkpoints = output / "checkpoints"
    if recipe.prompts and not position.base_answers:
        position.base_answers = answers(trainer, recipe.prompts)
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
        is_last = result.step == total
        if judged.examples and (result.step % eval_every == 0 or is_last):
            metrics, position.eval_micro = evaluate(trainer, judged.examples, labels, position.eval_micro)
            log({"kind": "eval", "step": result.step, **metrics})
            is_best = _note_progress(position, metrics, recipe.early_stopping_min_delta)
            say(f"step {result.step}/{total}: {_shown(metrics)}{' (best)' if is_best else ''}")
            if recipe.prompts:
                now = answers(trainer, recipe.prompts)
                sides = [
                    {"prompt": prompt, "base": base, "adapter": said}
                    for prompt, base, said in zip(recipe.prompts, position.base_answers, now, strict=True)
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


def _note_progress(position: Position, metrics: dict[str, Any], min_delta: float) -> bool:
    loss = float(metrics["loss"])
    if position.best is None or loss < position.best - min_delta:
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


def _plain(recipe: Recipe) -> dict[str, Any]:
    """For JSON and YAML."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(recipe).items()}


def _as_yaml(recipe: Recipe) -> str:
    """JSON values are YAML 1.2."""
    sources = {"train_data": recipe.train_data, "validation_data": recipe.validation_data}
    plain = _plain(recipe)
    for name, value in sources.items():
        plain[name] = None if value is None else [{"path": source.name, "weight": source.weight} for source in value]
    plain["rank_pattern"], plain["alpha_pattern"] = dict(recipe.rank_pattern), dict(recipe.alpha_pattern)
    return "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in plain.items())
