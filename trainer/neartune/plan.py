"""What a run would do, before it does it: settings and where they come from, rows, parameters, memory, steps, disk, time.

Nothing of the run is written. Of a base that is not on this machine only configuration and tokenizer are fetched: parameters
and memory are counted on a model that has shapes and no memory (torch's meta device). Where the weights are here, real steps
are timed.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from neartune import batch, data, hub, loop, tasks
from neartune.evaluate import evaluate
from neartune.model import adapt, learning, weight_files
from neartune.prepare import Material, Place, Say, find_place, locate_source, prepare, read
from neartune.recipe import Loaded, Recipe, public
from neartune.run import CHECKPOINTS_A_RUN
from neartune.tasks import Example, Task, length
from neartune.units import duration, meter, size

ADAM_BYTES = 12
"""A learnt parameter's gradient and two moments, in fp32."""
KEPT_CHECKPOINTS = 3
"""The last two and the best."""
_ATTENTION = "counted"


@dataclass(frozen=True, slots=True)
class Setting:
    name: str
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of `low` to `high` tokens."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True, slots=True)
class Kind:
    """Modules of one name, and how many of their parameters learn."""

    name: str
    modules: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Part:
    """One part of what a process holds at its peak."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Measured here. `seconds`: a step's; `eval_seconds`: one evaluation of all held-out rows; `peak`: bytes."""

    seconds: float
    eval_seconds: float
    peak: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All byte counts are of one process of `processes`."""

    settings: tuple[Setting, ...]
    advice: tuple[str, ...]
    base: str
    base_bytes: int
    has_weights: bool
    said: tuple[str, ...]
    """On rows: format, lost, cut, doubled."""
    rows: int
    held_out: int
    lengths: tuple[Bin, ...]
    sample: str
    """What is learnt stands in ⟦ ⟧."""
    kinds: tuple[Kind, ...]
    learnt: int
    parameters: int
    micro: int
    memory: tuple[Part, ...]
    memory_limit: int
    device: str
    processes: int
    steps: int
    evaluations: int
    disk: int
    disk_free: int
    timing: Timing | None

    @property
    def eta(self) -> float | None:
        """Seconds that steps and evaluations take, the one before the first step too."""
        if self.timing is None:
            return None
        return self.steps * self.timing.seconds + (self.evaluations + 1) * self.timing.eval_seconds


def plan(loaded: Loaded, processes: int, url: str, say: Say) -> Plan:
    """Raises HubError, DataError, ModelError, OutOfMemory. `say` hears what is fetched."""
    recipe = loaded.recipe
    place = find_place()
    task = tasks.find(recipe.task)
    base, base_bytes = _base(recipe, url, say)
    has_weights = any(hub.is_weights(file.name) for file in base.path.iterdir() if file.exists())
    commits: dict[str, str | None] = {}
    splits = data.load(recipe, lambda source: locate_source(source, commits, url, say, recipe.lock))
    pinned = {"base": {"repo": base.repo, "commit": base.commit}, "data": {"commits": commits}}
    said: list[str] = []
    material = read(recipe, task, base.path, splits, place, said.append)
    shape = _shape(recipe, task, base.path, material)
    share = recipe.train_batch_size // processes
    longest = max(material.learnt.examples, key=length)
    limit = batch.limit_of(place.device, recipe.memory_limit)
    if place.device.type != "cuda":
        limit //= processes
    fixed = _fixed(shape, recipe)
    kept = _kept(shape, material.processor, task, longest)
    micro = _fitting(recipe, share, length(longest), sum(part.bytes for part in fixed), kept, limit)
    timing = _timed(recipe, place, pinned, url, processes, micro) if has_weights else None
    learnt = sum(parameter.numel() for _, parameter in learning(shape))
    eval_every = max(1, material.total // 20) if recipe.eval_every == "auto" else int(recipe.eval_every)
    return Plan(
        settings=tuple(Setting(name, getattr(public(recipe), name), origin) for name, origin in loaded.origins.items()),
        advice=loaded.advice,
        base=f"{base.repo} at {str(base.commit)[:12]}" if base.repo else str(base.path),
        base_bytes=base_bytes,
        has_weights=has_weights,
        said=tuple(said),
        rows=len(material.learnt.examples),
        held_out=len(material.judged.examples),
        lengths=histogram([length(example) for example in material.learnt.examples]),
        sample=material.learnt.shown,
        kinds=_kinds(shape),
        learnt=learnt,
        parameters=sum(parameter.numel() for parameter in shape.parameters()),
        micro=micro,
        memory=(*fixed, Part(f"kept for the backward pass, {micro} rows of the longest", micro * kept)),
        memory_limit=limit,
        device=place.device.type,
        processes=processes,
        steps=material.total,
        evaluations=-(-material.total // eval_every) if material.judged.examples else 0,
        disk=KEPT_CHECKPOINTS * learnt * ADAM_BYTES + learnt * 4,
        disk_free=_free(recipe.output_dir),
        timing=timing,
    )


def _base(recipe: Recipe, url: str, say: Say) -> tuple[hub.Snapshot, int]:
    """(the base, with its weights only where they are here already; bytes that a run would fetch)."""
    path = Path(recipe.base_model)
    if path.is_dir():
        weight_files(path)
        return hub.Snapshot(path), 0
    pin = hub.pin_of(recipe.lock, recipe.base_model)
    listing = hub.look(recipe.base_model, recipe.revision, url, pin=pin)
    if found := hub.fetched(listing.repo, listing.commit):
        return hub.as_locked(found, pin, say), 0
    found = hub.fetch(listing.repo, listing.commit, url, say, listing=listing, weights=False, pin=pin)
    return found, sum(size for name, size in listing.files.items() if hub.is_weights(name))


def _shape(recipe: Recipe, task: Task, base: Path, material: Material) -> Any:
    """The adapted model without its numbers. PiSSA and OLoRA have the shape of plain LoRA."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(base)
    if material.labels:
        config.num_labels = len(material.labels)
    load: Any = getattr(transformers, task.auto)
    vocabulary = len(material.processor) if recipe.new_tokens else 0
    transformers.AttentionInterface.register(_ATTENTION, _fused)
    with torch.device("meta"):
        model = load.from_config(config, dtype=material.precision.base, attn_implementation=_ATTENTION)
        return adapt(model, replace(recipe, lora_init="default"), task.heads, lambda line: None, vocabulary).train()


class _Fused(torch.autograd.Function):
    """Attention as fused kernels do it, by what it keeps: its inputs, its output, and no matrix of scores. (On the meta device
    torch would do the arithmetic of scores, which grow with the square of the length.)"""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("a model without numbers learns nothing")


def _fused(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any) -> Any:
    """For transformers' table of attentions: (rows, heads, tokens, width) each; (rows, tokens, heads, width) out."""
    output: torch.Tensor = _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


def _kinds(shape: Any) -> tuple[Kind, ...]:
    """By the last name of the module that an adapter or a new head is in."""
    found: dict[str, tuple[set[str], int]] = {}
    for name, parameter in learning(shape):
        owner = name.partition(".lora_")[0].partition(".modules_to_save.")[0].partition(".token_adapter.")[0]
        modules, count = found.get(owner.rpartition(".")[2], (set(), 0))
        found[owner.rpartition(".")[2]] = (modules | {owner}, count + parameter.numel())
    return tuple(Kind(name, len(modules), count) for name, (modules, count) in sorted(found.items()))


# — memory ———————————————————————————————————————————————————————————————————————————————————————


def _fixed(shape: Any, recipe: Recipe) -> tuple[Part, ...]:
    """What does not depend on how many rows are worked on at once."""
    learnt = {id(parameter): parameter.numel() for _, parameter in learning(shape)}
    frozen = [parameter for parameter in shape.parameters() if id(parameter) not in learnt]
    size = sum(parameter.numel() * parameter.element_size() for parameter in frozen)
    if recipe.load_in_4bit:
        size //= 4  # of 16 bits: linear layers are nearly all of a base
    numbers = sum(learnt.values())
    return (
        Part("base, frozen", size),
        Part("adapter and new parts", 4 * numbers),
        Part("gradients", 4 * numbers),
        Part("optimizer (AdamW)", 8 * numbers),
    )


def _kept(shape: Any, processor: Any, task: Task, longest: Example) -> int:
    """Bytes that a forward pass of the row `longest` keeps for the backward pass, logits and loss included."""
    inputs = {name: tensor.to("meta") for name, tensor in task.collate([longest], processor).items() if "label" not in name}
    inputs.pop("attention_mask", None)  # a mask is looked at; of one whole row there is none
    own = {tensor.untyped_storage()._cdata for tensor in [*shape.parameters(), *shape.buffers()]}
    held: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = shape(**inputs).logits.flatten(0, -2).float()
        functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device="meta"))
    return sum(storage.nbytes() for storage in held.values())


def _fitting(recipe: Recipe, share: int, longest: int, fixed: int, a_row: int, limit: int) -> int:
    """Rows at once that the estimate allows, which counts no temporary tensors and no libraries; a run measures them."""
    if recipe.micro_batch_size != "auto":
        given = int(recipe.micro_batch_size)
        return max(1, min(share, given if recipe.micro_batch_by == "rows" else given // max(1, longest)))
    return max(1, min(share, int((limit / 2 - fixed) // max(1, a_row))))


def _free(output: Path) -> int:
    existing = next(folder for folder in (output, *output.parents) if folder.is_dir())
    return shutil.disk_usage(existing).free


# — time —————————————————————————————————————————————————————————————————————————————————————————


def _timed(recipe: Recipe, place: Place, pinned: Any, url: str, processes: int, micro: int) -> Timing:
    """The first step warms up; the two after it are timed, and an evaluation of a few rows. One process's share."""
    recipe = replace(recipe, train_batch_size=recipe.train_batch_size // processes)
    ready = prepare(recipe, place, pinned, url, lambda line: None)
    trainer, learnt, judged = ready.trainer, ready.learnt, ready.judged
    trainer.micro = micro if trainer.by == "rows" else micro * max(map(length, learnt.examples))
    batch.reset_peak(place.device)
    steps = loop.steps(trainer, recipe, learnt.examples, learnt.wheres, first=0, total=3, applied=0)
    seconds = [result.seconds for result in islice(steps, 1, 3)]
    eval_seconds = 0.0
    if judged.examples:
        some = judged.examples[: trainer.micro]
        began = time.perf_counter()
        evaluate(trainer, some, ready.labels, trainer.micro)
        eval_seconds = (time.perf_counter() - began) * len(judged.examples) / len(some) / processes
    return Timing(statistics.median(seconds), eval_seconds, batch.peak(place.device))


# — shown ————————————————————————————————————————————————————————————————————————————————————————


def histogram(lengths: Sequence[int], bins: int = 10) -> tuple[Bin, ...]:
    """At most `bins` of one width that cover all `lengths`, each of which is in exactly one; none for images, of length 1."""
    if max(lengths, default=0) < 2:
        return ()
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // bins)
    counts = [0] * (-(-(high - low + 1) // width))
    for tokens in lengths:
        counts[(tokens - low) // width] += 1
    return tuple(
        Bin(low + number * width, min(high, low + (number + 1) * width - 1), count) for number, count in enumerate(counts)
    )


def as_json(plan: Plan) -> dict[str, Any]:
    return asdict(plan) | {"eta": plan.eta}


def show(plan: Plan, console: Any) -> None:
    """On a rich console: what was set, in colour; defaults faint; learnt text in green."""
    from rich.text import Text

    for title, parts in (
        ("Recipe", _of_recipe(plan)),
        ("Rows", _of_rows(plan)),
        ("Adapter", _of_adapter(plan)),
        (f"Memory of a process on {plan.device}", _of_memory(plan)),
        ("Work", _of_work(plan)),
    ):
        for part in (Text(f"\n{title}", style="bold"), *parts):
            console.print(part, highlight=False)


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Any:
    """Each row ends with its style; columns `right` hold numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for column in range(len(rows[0]) - 1):
        table.add_column(justify="right" if column in right else "left", overflow="fold")
    for *cells, style in rows:
        table.add_row(*cells, style=style)
    return table


def _of_recipe(plan: Plan) -> Iterator[Any]:
    from rich.text import Text

    settings = sorted(plan.settings, key=lambda setting: setting.origin == "default")
    styles = ["dim" if setting.origin == "default" else "" for setting in settings]
    yield _table(
        [(setting.name, _value(setting.value), setting.origin, style) for setting, style in zip(settings, styles, strict=True)]
    )
    for line in plan.advice:
        yield Text(f"advice: {line}", style="yellow")


def _of_rows(plan: Plan) -> Iterator[Any]:
    from rich.text import Text

    yield f"{plan.rows} to learn from, {plan.held_out} held out"
    for line in plan.said:
        if not plan.sample or plan.sample not in line:
            yield Text(f"  {line}")
    if plan.sample:
        yield "the first row; what is learnt is green:"
        yield _coloured(plan.sample)
    if plan.lengths:
        yield "lengths in tokens:"
        most = max(part.rows for part in plan.lengths)
        bars = [(f"{part.low}–{part.high}", str(part.rows), meter(part.rows / most, 40), "") for part in plan.lengths]
        yield _table(bars, (0, 1))


def _of_adapter(plan: Plan) -> Iterator[Any]:
    rows = [(kind.name, f"{kind.modules} modules", f"{kind.parameters:,}", "") for kind in plan.kinds]
    share = f"{plan.learnt:,} of {plan.parameters:,} ({plan.learnt / plan.parameters:.2%})"
    yield _table([*rows, ("in all", "", share, "bold")], (1, 2))


def _of_memory(plan: Plan) -> Iterator[Any]:
    from rich.text import Text

    total = sum(part.bytes for part in plan.memory)
    rows = [(part.name, size(part.bytes), "") for part in plan.memory]
    rows.append(("counted together", size(total), "bold"))
    if plan.timing:
        rows.append(("measured at the peak, libraries included", size(plan.timing.peak), ""))
    yield _table([*rows, ("may be used", size(plan.memory_limit), "")], (1,))
    if total > plan.memory_limit:
        yield Text("this does not fit: a smaller max_length, or gradient_checkpointing: true", style="bold red")


def _of_work(plan: Plan) -> Iterator[Any]:
    to_fetch = "" if plan.has_weights else f"; {size(plan.base_bytes)} of weights to fetch"
    measured = "" if _is_set(plan, "micro_batch_size") else ", estimated; a run measures it"
    taken, style = "not known: the weights are not on this machine, and two steps cannot be timed", ""
    if plan.timing is not None and plan.eta is not None:
        taken, style = f"{duration(plan.eta)}; a step takes {plan.timing.seconds:.2f} s (median of two)", "bold"
    yield _table(
        [
            ("base", plan.base + to_fetch, ""),
            ("processes", str(plan.processes), ""),
            ("rows at once", f"{plan.micro}{measured}", ""),
            ("steps", f"{plan.steps}, {plan.evaluations} evaluations, a checkpoint every {_every(plan.steps)}", ""),
            ("disk", f"{size(plan.disk)} for checkpoints and adapter; {size(plan.disk_free)} are free", ""),
            ("time", taken, style),
        ]
    )


def _is_set(plan: Plan, name: str) -> bool:
    return any(setting.name == name and setting.value != "auto" for setting in plan.settings)


def _every(steps: int) -> str:
    count = max(1, steps // CHECKPOINTS_A_RUN)
    return "step" if count == 1 else f"{count} steps"


def _coloured(sample: str) -> Any:
    from rich.text import Text

    text = Text()
    for number, piece in enumerate(sample.replace("⟧", "⟦").split("⟦")):
        text.append(piece, style="green" if number % 2 else "dim")
    return text


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(_value(item) for item in value) or "none"
    return str(getattr(value, "name", value)) if not isinstance(value, Path) else str(value)
