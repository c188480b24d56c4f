"""An adapter merged into its base: an ordinary model directory, written shard by shard and compared with base and adapter.

DIR/config.json, model*.safetensors (+ index)    as save_pretrained lays them out
    tokenizer.json, chat_template.jinja …        the adapter's
    merge.json, README.md                        what it was made of, and how it compares
"""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neartune import __version__, data, hub, recipe, units
from neartune.adapter import Card, load_base, locate_base, write_json
from neartune.model import ModelError, sha256
from neartune.prepare import locate_source, quieten_transformers
from neartune.reporting import card
from neartune.tasks import Example, Task
from neartune.tasks import find as find_task
from neartune.weights import MergeError, Plan, adds_nothing, computed, make_plan, short, ties_are_known, write

Say = Callable[[str], None]

MOST_DIFFERENCE = 1e-3
"""Between logits of base and adapter and of what is merged, both in fp32."""
LEAST_AGREEMENT = 0.98
"""Share of the places where the likeliest is the same after the cast."""

_OF_THE_ADAPTER = ("adapter_", "base.json", "provenance.json", "README")
_FROM_THE_BASE = ("generation_config.json", "tokenizer.model")
"""Files that training does not write beside the adapter."""
_ROWS, _TOKENS, _LOGITS = 64, 128, 2**28
"""Of a comparison, at most: rows, tokens a row, bytes of logits."""
_TEXTS = (
    "The lighthouse keeper wrote the weather in a book every evening, and nobody ever read it.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "Water boils at a lower temperature on a mountain because the air presses less.",
    "What is the capital of France? The capital of France is",
    "今天天气很好，我们去公园散步。",
    "Dear Sir or Madam, I am writing about the invoice of 14 March, number 2209-B.",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "I loved the first half of this film; the second was too long and made no sense.",
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """With base and adapter in fp32. `difference`: largest of logits; `agreement`: share of `places` where the likeliest is
    the same."""

    difference: float
    agreement: float
    places: int
    rows: int


def merge(
    asked: Path,
    to: Path,
    url: str,
    say: Say,
    *,
    dtype: str = "auto",
    base: Path | None = None,
    rows: Path | None = None,
    max_shard: int = 4 * 10**9,
) -> dict[str, Any]:
    """Merge the adapter of the run or adapter directory `asked` into its base, and compare. Returns merge.json's content.
    `rows`: a file of rows to compare by, else those that the run held out. Raises HubError, DataError, ModelError, MergeError;
    `to` is there only when all is well."""
    if to.exists():
        raise MergeError(f"{to}: it is there already: choose another --to, or remove it")
    run, path = _run_and_adapter(asked)
    belongs = Card.read(path)
    task = find_task(belongs.task)
    found = locate_base(belongs, base, url, say)
    processor = task.load_processor(path)
    examples, origin = _examples(task, belongs, processor, _rows(run, rows, task.name, found, url, say), say)
    hub.go_offline()
    quieten_transformers()
    belongs.check(found, path, say)
    if run is not None and _is_4bit(run):
        say("the run was trained on the base in 4 bits (QLoRA): it is merged into, and compared with, the unquantised base")

    plan = make_plan(task, belongs, found, path, dtype)
    if adds_nothing(plan):
        say("warning: all that the adapter adds is 0: what is written is the base as it is")
    temporary = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _refuse_full(to, plan.bytes)
    temporary.mkdir(parents=True)
    try:
        write(plan, temporary, max_shard)
        _copy_beside(path, found, temporary)
        fp32, cast = compare(plan, task, belongs, found, path, processor, examples, temporary)
        say(
            f"compared on {cast.rows} rows ({origin}), {cast.places} places: largest difference of logits "
            f"{fp32.difference:.2g} in fp32, {cast.difference:.2g} in {short(plan.dtype)}; the likeliest is the same in "
            f"{cast.agreement:.2%}"
        )
        _refuse_different(fp32, cast, short(plan.dtype))
        about = _about(plan, belongs, path, fp32, cast, origin)
        write_json(temporary / "merge.json", about)
        (temporary / "README.md").write_text(_readme(about, path, to.name), encoding="utf-8")
        _put(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{plan.bytes / 1e6:,.1f} MB in {short(plan.dtype)} in {to}" + (", weights untied" if plan.untied else ""))
    return about


# — what is merged ———————————————————————————————————————————————————————————————————————————————


def _run_and_adapter(asked: Path) -> tuple[Path | None, Path]:
    """(the run's directory, if it is here, the adapter's)."""
    if (asked / "adapter" / "adapter_config.json").is_file():
        return asked, asked / "adapter"
    if not (asked / "adapter_config.json").is_file():
        raise ModelError(f"{asked}: this is neither a finished run nor an adapter: there is no adapter_config.json")
    return (asked.parent if (asked.parent / "recipe.yaml").is_file() else None), asked


def _is_4bit(run: Path) -> bool:
    lines = (run / "recipe.yaml").read_text(encoding="utf-8").splitlines() if (run / "recipe.yaml").is_file() else []
    return "load_in_4bit: true" in lines


def _copy_beside(adapter: Path, base: Path, target: Path) -> None:
    """Tokenizer, chat template, image processor, generation settings."""
    for file in sorted(adapter.iterdir()):
        if file.is_file() and not file.name.startswith(_OF_THE_ADAPTER):
            shutil.copyfile(file, target / file.name)
    for name in _FROM_THE_BASE:
        if (base / name).is_file() and not (target / name).exists():
            shutil.copyfile(base / name, target / name)


def _refuse_full(to: Path, needed: int) -> None:
    place = next(folder for folder in to.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed + 64 * 2**20:
        raise MergeError(f"{place}: the merged model takes {units.size(needed)}; {units.size(free)} are free")


def _put(temporary: Path, to: Path) -> None:
    """Durable, then there at once."""
    for path in [*sorted(temporary.iterdir()), temporary]:
        _sync(path)
    temporary.rename(to)
    _sync(to.absolute().parent)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# — comparing ————————————————————————————————————————————————————————————————————————————————————


def _rows(run: Path | None, asked: Path | None, task: str, base: Path, url: str, say: Say) -> tuple[list[data.Row], str]:
    """(rows to compare by, whose they are): of the file `asked`, else what the run held out, else none. Raises DataError."""
    if asked is not None:
        learnt, judged = data.read(asked, task=task)
        return judged or learnt, str(asked.name)
    if run is None or not (run / "recipe.yaml").is_file():
        return [], ""
    try:
        settings = recipe.load(run / "recipe.yaml", [f"base_model={json.dumps(str(base))}"]).recipe
        commits = json.loads((run / "run.json").read_text())["data"]["commits"]
        splits = data.load(settings, lambda source: locate_source(source, commits, url, say))
    except (recipe.RecipeError, data.DataError, hub.HubError, OSError) as exc:
        say(f"the run's rows cannot be read, so built-in ones are compared: {exc}")
        return [], ""
    return list(splits.validation or splits.train), "held out by the run" if splits.validation else "of the run"


def _examples(
    task: Task, belongs: Card, processor: Any, found: tuple[list[data.Row], str], say: Say
) -> tuple[list[Example], str]:
    rows, origin = found
    examples = (
        task.prepare(rows[:_ROWS], processor, belongs.labels, max_length=_TOKENS, model_limit=_TOKENS).examples if rows else []
    )
    if not examples:
        origin = "built in"
        examples = task.prepare(
            _built_in(task, belongs, processor), processor, belongs.labels, max_length=_TOKENS, model_limit=_TOKENS
        ).examples
    return examples, origin


def _built_in(task: Task, belongs: Card, processor: Any) -> list[data.Row]:
    """The same rows whatever the model."""
    match task.name:
        case "image-classification":
            return [data.Row({"image": _noise(seed), "label": belongs.labels[0]}, f"noise {seed}") for seed in range(32)]
        case "text-classification":
            values: list[dict[str, Any]] = [{"text": text, "label": belongs.labels[0]} for text in _TEXTS]
        case "token-classification":
            words = [text.split() for text in _TEXTS]
            values = [{"tokens": line, "tags": [belongs.labels[0]] * len(line)} for line in words]
        case _:
            values = [{"text": text} for text in _TEXTS]
    return [data.Row(value, f"built in, {number}") for number, value in enumerate(values, 1)]


def _noise(seed: int) -> bytes:
    from PIL import Image

    coarse = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    Image.frombytes("RGB", (8, 8), coarse.numpy().tobytes()).resize((64, 64)).save(file, "PNG")
    return file.getvalue()


def compare(
    plan: Plan, task: Task, belongs: Card, base: Path, adapter: Path, processor: Any, examples: Sequence[Example], written: Path
) -> tuple[Comparison, Comparison]:
    """(what is merged in fp32, what was written) against base and adapter. One whole model is in memory at a time, in fp32."""
    from peft import PeftModel

    model = load_base(belongs, base, processor)
    with ties_are_known():
        both = PeftModel.from_pretrained(model, str(adapter)).eval()
    inputs = _inputs(task, processor, examples)
    expected = _within(_logits(both, inputs))
    fp32 = None
    if any(tensor.dtype != torch.float32 for tensor in plan.tensors if tensor.is_adapted):
        _put_into(plan, both.unload())
        fp32 = _compared(expected, _logits(model, inputs))
    del model, both
    gc.collect()
    merged = task.load_model(written, belongs.labels, dtype=torch.float32, trust_remote_code=False).eval()
    cast = _compared(expected, _logits(merged, inputs))
    return fp32 or cast, cast


def _inputs(task: Task, processor: Any, examples: Sequence[Example]) -> list[dict[str, torch.Tensor]]:
    """A row each, so that nothing is padded."""
    batches = [task.collate([example], processor) for example in examples]
    return [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]


@torch.no_grad()
def _logits(model: Any, inputs: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """(places, choices) a row."""
    for row in inputs:
        logits = model(**row).logits
        yield logits.reshape(-1, logits.shape[-1])


def _within(logits: Iterator[torch.Tensor]) -> list[torch.Tensor]:
    """As many rows as may be held."""
    held: list[torch.Tensor] = []
    size = 0
    for row in logits:
        held.append(row)
        size += row.nbytes
        if size >= _LOGITS:
            break
    return held


def _compared(expected: Sequence[torch.Tensor], logits: Iterator[torch.Tensor]) -> Comparison:
    difference, same, places = 0.0, 0, 0
    for one, other in zip(expected, logits, strict=False):
        apart = float((one - other).abs().max())
        difference = max(difference, apart) if apart == apart else float("inf")
        same += int((one.argmax(-1) == other.argmax(-1)).sum())
        places += len(one)
    return Comparison(difference, same / max(1, places), places, len(expected))


@torch.no_grad()
def _put_into(plan: Plan, model: Any) -> None:
    """What is merged, before the cast, in place of the parameters of the base `model`."""
    for target in plan.untied:
        module, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(model.get_parameter(target).clone()))
    changed = [tensor for tensor in plan.tensors if tensor.is_adapted]
    for tensor, value in computed(plan, changed):
        model.get_parameter(tensor.target).copy_(value)


def _refuse_different(fp32: Comparison, cast: Comparison, dtype: str) -> None:
    if not fp32.difference <= MOST_DIFFERENCE:
        raise MergeError(
            f"what is merged is not base and adapter: logits differ by {fp32.difference:.3g} in fp32 (at most "
            f"{MOST_DIFFERENCE:g}); nothing was kept"
        )
    if not cast.agreement >= LEAST_AGREEMENT:
        raise MergeError(
            f"{dtype} is too coarse for this adapter: the likeliest is the same in {cast.agreement:.2%} of {cast.places} "
            f"places (at least {LEAST_AGREEMENT:.0%}); nothing was kept: say --dtype fp32, or --data with more rows"
        )


# — what is told of it ———————————————————————————————————————————————————————————————————————————


def _about(plan: Plan, belongs: Card, adapter: Path, fp32: Comparison, cast: Comparison, origin: str) -> dict[str, Any]:
    """merge.json."""
    import peft
    import safetensors
    import transformers

    versions = {"neartune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "task": belongs.task,
        "base": {"repo": belongs.repo, "commit": belongs.commit, "fingerprint": belongs.fingerprint},
        "adapter": {name: sha256(adapter / name) for name in ("adapter_model.safetensors", "adapter_config.json")},
        "dtype": short(plan.dtype),
        "bytes": plan.bytes,
        "untied": sorted(plan.untied),
        "tensors": {
            "merged": sum(tensor.is_adapted and tensor.source is not None for tensor in plan.tensors),
            "of the adapter": sum(tensor.source is None for tensor in plan.tensors),
            "of the base": sum(not tensor.is_adapted for tensor in plan.tensors),
        },
        "compared": {
            "rows": cast.rows,
            "whose": origin,
            "places": cast.places,
            "fp32_max_logit_difference": fp32.difference,
            "max_logit_difference": cast.difference,
            "argmax_agreement": cast.agreement,
        },
        "versions": versions | {"peft": peft.__version__, "safetensors": safetensors.__version__},
    }


def _readme(about: Mapping[str, Any], adapter: Path, name: str) -> str:
    """What the adapter's card says, for a merged model, and what the merge was. An adapter that has none gets a short one."""
    base, compared = about["base"], about["compared"]
    try:
        text = card.card(replace(card.read(adapter), name=name, is_merged=True))
    except (OSError, ValueError, TypeError, KeyError):
        front = {"base_model": base["repo"], "base_model_relation": "finetune"} if base["repo"] else {}
        front |= {"library_name": "transformers", "pipeline_tag": about["task"]}
        lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())
        text = f"---\n{lines}tags: [neartune, lora]\n---\n\n# {name}\n"
    rows = {
        "base": f"{base['repo'] or 'a directory'}, commit {base['commit'] or 'none'}, fingerprint {base['fingerprint']}",
        **{f"sha256 of {file}": digest for file, digest in about["adapter"].items()},
        "written in": about["dtype"] + (f"; untied: {', '.join(about['untied'])}" if about["untied"] else ""),
        "compared with base and adapter in fp32": f"{compared['rows']} rows ({compared['whose']}), {compared['places']} places",
        "largest difference of logits before the cast": f"{compared['fp32_max_logit_difference']:.3g}",
        "largest difference of logits as written": f"{compared['max_logit_difference']:.3g}",
        "the likeliest is the same": f"{compared['argmax_agreement']:.2%}",
        "merged with": ", ".join(f"{one} {version}" for one, version in about["versions"].items()),
    }
    return (
        text + "\n## Merge\n\n| what | value |\n|---|---|\n" + "".join(f"| {one} | {value} |\n" for one, value in rows.items())
    )
