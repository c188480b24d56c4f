"""What stands before the first step: base and rows on this machine, rows as examples, the adapter on the base, and how many
rows fit at once. Nothing of a run is written here."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from neartune import batch, data, hub, launch, loop, packing, tasks, units
from neartune.decode import limit_of
from neartune.loop import Trainer
from neartune.model import ModelError, Precision, Sharding, base_files, build, choose_precision, shard
from neartune.recipe import Recipe, Source
from neartune.tasks import Example, Prepared, Task, length

Say = Callable[[str], None]

PATIENCE = timedelta(days=1)
"""How long the other processes wait for the first to fetch."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which process this is, of how many, and on what device."""

    rank: int
    world: int
    device: torch.device
    accelerator: Any
    sharding: Sharding | None = None
    here: int = 1
    """Processes on this machine."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Summed over all processes."""
        if self.world == 1:
            return tensor
        summed: torch.Tensor = self.accelerator.reduce(tensor.to(self.device), "sum")
        return summed.to(tensor.device)

    def gather(self, items: list[Any]) -> list[Any]:
        """All processes' items."""
        if self.world == 1:
            return items
        from accelerate.utils import gather_object

        return list(gather_object(items))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process, then the first of every other machine, then the rest: what the first fetched is there for all with
        its disk, and every machine fetches once. They wait in a group of their own, on the CPU: the patience of the one that
        learns together, of minutes, is too short for a large base, and right for a step."""
        if self.world == 1:
            yield
            return
        waiting = torch.distributed.new_group(timeout=PATIENCE, backend="gloo")
        turn = 0 if self.is_first else 1 if self.accelerator.is_local_main_process else 2
        for _ in range(turn):
            torch.distributed.barrier(waiting)
        yield
        for _ in range(turn, 2):
            torch.distributed.barrier(waiting)
        torch.distributed.destroy_process_group(waiting)

    def put(self, model: Any) -> Any:
        """Where this process computes: the whole model, or its part of the base. Raises ModelError."""
        return model.to(self.device) if self.sharding is None else shard(model, self.device, self.sharding)


@dataclass(frozen=True, slots=True)
class Material:
    """What a run works on, without its model: rows of both splits as examples for the base. `total`: steps."""

    splits: data.Splits
    precision: Precision
    processor: Any
    labels: tuple[str, ...]
    learnt: Prepared
    judged: Prepared
    total: int


@dataclass(slots=True)
class Ready:
    """All that a run works on. `commits`: of datasets, by name; `files`: sha256 of the base's."""

    recipe: Recipe
    place: Place
    task: Task
    base: hub.Snapshot
    files: dict[str, str]
    splits: data.Splits
    commits: dict[str, str | None]
    precision: Precision
    processor: Any
    labels: tuple[str, ...]
    learnt: Prepared
    judged: Prepared
    total: int
    """Steps."""
    trainer: Trainer


def find_place() -> Place:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    is_sharded = accelerator.num_processes > 1 and launch.is_sharded(os.environ)
    sharding = Sharding.of(os.environ) if is_sharded else None
    device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device  # of several processes: cpu:0
    world = launch.world_of(os.environ)
    here = 1 if world is None else world.here
    return Place(accelerator.process_index, accelerator.num_processes, device, accelerator, sharding, here)


def prepare(recipe: Recipe, place: Place, before: Any, url: str, say: Say) -> Ready:
    """Fetch what is missing, then read, render, build. `before`: run.json of the run that goes on here, or None. Afterwards no
    request goes anywhere. Raises HubError, DataError, ModelError."""
    task = tasks.find(recipe.task)
    with place.in_turn():
        commits = dict[str, str | None](before["data"]["commits"] if before else {})
        base = locate_base(recipe, before, url, say)
        splits = data.load(recipe, lambda source: locate_source(source, commits, url, say, recipe.lock))
    material = read(recipe, task, base.path, splits, place, say)
    files = base_files(base.path)
    torch.manual_seed(recipe.seed)
    vocabulary = len(material.processor) if recipe.new_tokens else 0
    model = place.put(build(recipe, task, base.path, material.labels, material.precision, say, vocabulary))
    trainer = make_trainer(recipe, task, model, material.processor, material.precision, place)
    if recipe.packing:
        trainer.pack_to = packing.capacity(recipe, material.learnt.examples)
        say(packing.refuse_leaks(trainer, material.learnt.examples))
    return Ready(
        recipe=recipe,
        place=place,
        task=task,
        base=base,
        files=files,
        splits=splits,
        commits=commits,
        precision=material.precision,
        processor=material.processor,
        labels=material.labels,
        learnt=material.learnt,
        judged=material.judged,
        total=material.total,
        trainer=trainer,
    )


def read(recipe: Recipe, task: Task, base: Path, splits: data.Splits, place: Place, say: Say) -> Material:
    """Rows as examples for the base in the directory `base`, of which no weights are needed. From here on no request goes
    anywhere. Raises DataError, ModelError."""
    hub.go_offline()
    quieten_transformers()
    from transformers import AutoConfig

    for line in splits.report:
        say(line)
    precision = choose_precision(recipe.precision, is_cuda=place.device.type == "cuda", has_bf16=_has_bf16())
    count = "one process" if place.world == 1 else f"{place.world} processes"
    say(f"precision {precision.name}: {precision.why}; {count} on {place.device.type}")
    processor = load_processor(recipe, task, base)
    labels = task.find_labels(splits.train)
    learnt, judged = examples(recipe, task, splits, processor, labels, AutoConfig.from_pretrained(base), say)
    return Material(splits, precision, processor, labels, learnt, judged, total_steps(recipe, len(learnt.examples)))


def locate_base(recipe: Recipe, before: Any, url: str, say: Say) -> hub.Snapshot:
    """A run that goes on keeps its commit, though the branch may have moved, and needs no mirror for what is here already."""
    name, path = recipe.base_model, Path(recipe.base_model)
    if path.is_dir():
        return hub.Snapshot(path)
    commit = before["base"]["commit"] if before and before["base"]["repo"] == name else None
    pin = hub.pin_of(recipe.lock, name)
    if commit and (found := hub.fetched(name, commit)):
        return hub.as_locked(found, pin, say)
    return hub.fetch(name, commit or recipe.revision, url, say, pin=pin)


def locate_source(source: Source, commits: dict[str, str | None], url: str, say: Say, lock: Path | None = None) -> Path:
    """`commits`: of datasets, by name; what is fetched now is added. `lock`: an hf.lock that they must be as."""
    if source.is_path:
        return Path(source.name)
    commit = commits.get(source.name)
    pin = hub.pin_of(lock, source.name, "dataset")
    found = hub.fetched(source.name, commit, kind="dataset") if commit else None
    if found is not None:
        hub.as_locked(found, pin, say)
    found = found or hub.fetch(source.name, commit or "main", url, say, kind="dataset", pin=pin)
    commits[source.name] = found.commit
    return found.path


def load_processor(recipe: Recipe, task: Task, base: Path) -> Any:
    """Tokenizer or image processor, with the recipe's new tokens. Raises ModelError."""
    processor = task.load_processor(base)
    if known := [token for token in recipe.new_tokens if token in processor.get_vocab()]:
        raise ModelError(f"new_tokens: the base has {', '.join(known)} already")
    if recipe.new_tokens:
        processor.add_tokens(list(recipe.new_tokens))
    return processor


def examples(
    recipe: Recipe, task: Task, splits: data.Splits, processor: Any, labels: Sequence[str], config: Any, say: Say
) -> tuple[Prepared, Prepared]:
    """(what is learnt from, what is judged by); says what was lost, and shows a row. Raises DataError."""
    options = {
        "max_length": None if recipe.max_length == "auto" else int(recipe.max_length),
        "model_limit": limit_of(config, processor, 1024),
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


def total_steps(recipe: Recipe, rows: int) -> int:
    if recipe.max_steps is not None:
        return recipe.max_steps
    epochs = 3.0 if recipe.epochs is None else recipe.epochs
    return max(1, math.ceil(epochs * rows / recipe.train_batch_size))


def make_trainer(
    recipe: Recipe,
    task: Task,
    model: Any,
    processor: Any,
    precision: Precision,
    place: Place,
    *,
    backend: str = "inductor",
) -> Trainer:
    """`backend`: of torch.compile. Raises ModelError."""
    if recipe.train_batch_size % place.world:
        raise ModelError(f"train_batch_size {recipe.train_batch_size} cannot be shared by {place.world} processes equally")

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
        here=place.here,
        is_sharded=place.sharding is not None,
        by=recipe.micro_batch_by,
        scaler=torch.amp.GradScaler(place.device.type) if precision.scales else None,
        reduce=place.reduce,
        gather=place.gather,
    )
    model.train()
    if recipe.compile:
        # In place: names of parameters stay, and generate() goes around it, whose every step would be another shape.
        model.compile(dynamic=True, backend=backend)
    return trainer


def micro_batch(recipe: Recipe, trainer: Trainer, learnt: Prepared, say: Say) -> int:
    """Rows at once (micro_batch_by: tokens: padded tokens at once): as the recipe says, or measured with the longest rows there
    are. Raises OutOfMemory."""
    most = recipe.train_batch_size // trainer.world
    if recipe.micro_batch_size != "auto":
        given = int(recipe.micro_batch_size)
        return given if trainer.by == "tokens" else min(most, given)
    limit = batch.limit_of(trainer.device, recipe.memory_limit)
    if trainer.device.type != "cuda":
        limit //= trainer.here  # all processes of this machine measure at once
    longest = sorted(learnt.examples, key=length, reverse=True)[:most]
    longest = (longest * most)[:most]
    free = max(0, limit - batch.in_use(trainer.device))
    trials = _measured(trainer, longest, limit)
    rows: int = min(trainer.gather([batch.choose(trials)]))
    if not rows:
        raise loop.OutOfMemory(f"one row of {length(longest[0])} tokens does not fit in {units.size(limit)}")
    tokens = batch.padded([length(example) for example in longest[:rows]], trainer.pack_to)
    told = ", ".join(f"{t.micro}: {t.rate:.0f}/s {units.size(t.bytes)}{'' if t.fits else ' (too much)'}" for t in trials)
    size = f"{rows} of {recipe.train_batch_size}" if trainer.by == "rows" else f"of {tokens} padded tokens ({rows} rows)"
    say(f"micro-batch {size}, measured within {units.size(limit)}: {told}")
    say(_formula(trainer, length(longest[0]), free))
    return rows if trainer.by == "rows" else tokens


def _measured(trainer: Trainer, longest: Sequence[Example], limit: int) -> list[batch.Trial]:
    """Sizes in rows, up to all of `longest`, within `limit` bytes."""

    def run_micro(size: int) -> int:
        rows = longest[:size]
        loss, _ = trainer.loss_of(rows)
        torch.autograd.backward(loss / max(1, sum(map(trainer.task.weight, rows))))
        trainer.optimizer.step()
        return sum(map(length, rows))

    with batch.untouched(trainer.model, trainer.optimizer):
        trials = batch.find(run_micro, most=len(longest), device=trainer.device, limit=limit)
        return batch.settled(trials, run_micro, device=trainer.device, limit=limit)


def _formula(trainer: Trainer, longest: int, free: int) -> str:
    """What the usual formula says, and why that is not what is done."""
    config = trainer.model.config.get_text_config()
    hidden, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if longest < 2 or not hidden or not layers:
        return "the usual formula (free memory over tokens × hidden size × layers) says nothing of this base"
    size = trainer.precision.base.itemsize
    rows = batch.rule_of_thumb(free, longest, hidden, layers, size)
    return (
        f"the usual formula says {rows} rows: {batch.FORMULA_SHARE} × {units.size(free)} free / ({longest} tokens × {hidden} "
        f"× {layers} layers × {size} bytes × {batch.ACTIVATIONS}); it is not used: it knows neither logits (a vocabulary of "
        f"{config.vocab_size}), nor the attention's implementation, nor gradient checkpointing"
    )


def quieten_transformers() -> None:
    """That a head is new is what was asked for. After fetching: the bars of downloads are wanted."""
    import transformers

    # peft asks transformers for what transformers has renamed.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
