"""An adapter merged into its base: an ordinary model directory, written shard by shard and compared with base and adapter.

The model is there without memory (torch's meta device); the adapter's matrices are real. Tensor by tensor the base is read
into its place in fp32, peft merges that one module, the result is cast once and written. So the arithmetic of every kind of
adapter is peft's own, and memory is that of one shard.

DIR/config.json, model*.safetensors (+ index)    as save_pretrained lays them out
    tokenizer.json, chat_template.jinja …        the adapter's
    merge.json, README.md                        what it was made of, and how it compares
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neartune import __version__, data, hub, recipe
from neartune.adapter import Card, load_base, locate_base, write_json
from neartune.model import ModelError, learning, sha256
from neartune.prepare import locate_source, quieten_transformers
from neartune.reporting import card
from neartune.tasks import Example, Task
from neartune.tasks import find as find_task

Say = Callable[[str], None]

MOST_DIFFERENCE = 1e-3
"""Between logits of base and adapter and of what is merged, both in fp32."""
LEAST_AGREEMENT = 0.98
"""Share of the places where the likeliest is the same after the cast."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
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


class MergeError(Exception):
    """What was merged is not what was trained, or there is no place for it; the message says which."""


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the base's files."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written: `name` in the files, `target` in the model. `source` None: the adapter has it whole."""

    name: str
    target: str
    source: Source | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_adapted: bool

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Plan:
    """What is written. `model`: peft's, its base without memory; `dtype`: of most of it; `untied`: target → what it was tied
    to."""

    model: Any
    config: Any
    tensors: tuple[Tensor, ...]
    dtype: torch.dtype
    untied: Mapping[str, str]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


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
    examples, origin = _examples(task, belongs, processor, _rows(run, rows, found, url, say), say)
    hub.go_offline()
    quieten_transformers()
    belongs.check(found, path, say)
    if run is not None and _is_4bit(run):
        say("the run was trained on the base in 4 bits (QLoRA): it is merged into, and compared with, the unquantised base")

    plan = make_plan(task, belongs, found, path, dtype)
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
            f"{fp32.difference:.2g} in fp32, {cast.difference:.2g} in {_short(plan.dtype)}; the likeliest is the same in "
            f"{cast.agreement:.2%}"
        )
        _refuse_different(fp32, cast, _short(plan.dtype))
        about = _about(plan, belongs, path, fp32, cast, origin)
        write_json(temporary / "merge.json", about)
        (temporary / "README.md").write_text(_readme(about, path, to.name), encoding="utf-8")
        _put(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{plan.bytes / 1e6:,.1f} MB in {_short(plan.dtype)} in {to}" + (", weights untied" if plan.untied else ""))
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


def make_plan(task: Task, belongs: Card, base: Path, adapter: Path, dtype: str) -> Plan:
    """What the merged model consists of. `dtype`: auto (each tensor as in the base), fp32, bf16 or fp16. Raises ModelError."""
    sources = [source for file in _weight_files(base) for source in _read_header(file)]
    usual = max(_DTYPES.values(), key=lambda one: sum(_elements(source) for source in sources if source.dtype == one))
    written = None if dtype == "auto" else _DTYPES[dtype]
    model, config = _skeleton(task, belongs, base, adapter)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {name for name, _ in model.named_parameters()}
    ties: dict[str, str] = dict(model.all_tied_weights_keys)
    targets = _targets_of(model, sources)
    wrapped = _with_adapter(model, adapter)
    adapted = _adapted(wrapped)

    planned = {
        target: Tensor(target, target, None, tuple(parameter.shape), written or usual, True)
        for target, parameter in _heads(adapted).items()
    }
    for source in sources:
        target, name, is_part = targets[source.name]
        if target not in shapes or (target in planned and planned[target].source is None):
            continue  # the model has no such thing, or the adapter has it whole
        layer = adapted.get(target.rpartition(".")[0])
        is_adapted = layer is not None and target.endswith(".weight")
        if is_part and is_adapted:
            raise ModelError(f"{adapter}: {target} is put together from {source.name} and others: it cannot be merged")
        wanted.discard(target)
        shape = source.shape if is_part else shapes[target]
        if shape != source.shape and not (is_adapted and _fills(layer, source.shape, shape)):
            raise ModelError(f"{base}: {source.name} is {source.shape}; the model has {shape} there")
        kind = (written or source.dtype) if source.dtype.is_floating_point else source.dtype
        planned[name if is_part else target] = Tensor(name, target, source, shape, kind, is_adapted)
    lacking = sorted(wanted - planned.keys() - ties.keys())
    if lacking:
        raise ModelError(f"{base} has no {', '.join(lacking[:3])}: it would begin at random, and the adapter has not learnt it")
    untied = {} if all(_are_alike(adapted, one, other) for one, other in ties.items()) else ties
    _tie(planned, ties, untied, adapted)
    if untied:
        config.tie_word_embeddings = False
    config.dtype = written or usual
    order = {file: number for number, file in enumerate(dict.fromkeys(source.file for source in sources))}
    ordered = sorted(planned.values(), key=lambda one: order[one.source.file] if one.source else len(order))
    return Plan(wrapped, config, tuple(ordered), written or usual, untied)


def _tie(planned: dict[str, Tensor], ties: Mapping[str, str], untied: Mapping[str, str], adapted: Mapping[str, Any]) -> None:
    """What is tied is written once; what is not any more, each by itself."""
    for target, other in ties.items():
        if not untied:
            planned.pop(target, None)
        elif target not in planned:
            is_adapted = target.rpartition(".")[0] in adapted
            planned[target] = replace(planned[other], name=target, target=target, is_adapted=is_adapted)


def _elements(source: Source) -> int:
    return torch.Size(source.shape).numel()


def _weight_files(base: Path) -> list[Path]:
    try:
        names = hub.choose_model_files({file.name: 0 for file in base.iterdir() if file.is_file()})
    except (hub.HubError, OSError) as exc:
        raise ModelError(f"{base}: {exc}") from None
    return [base / name for name in names if hub.is_weights(name)]


def _read_header(file: Path) -> Iterator[Source]:
    """Names, shapes and dtypes; no tensor is read."""
    if file.suffix == ".bin":
        for name, tensor in _load_bin(file, "meta").items():
            yield Source(file, name, tuple(tensor.shape), tensor.dtype)
        return
    from safetensors import safe_open

    with safe_open(file, "pt", backend="pread") as opened:
        for name in opened.offset_keys():
            entry = opened.get_slice(name)
            if entry.get_dtype() not in _SAFETENSORS:
                raise ModelError(f"{file}: {name} is {entry.get_dtype()}: the base is quantised; say where the unquantised is")
            yield Source(file, name, tuple(entry.get_shape()), _SAFETENSORS[entry.get_dtype()])


def _load_bin(file: Path, device: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(
        file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file) or None
    )
    return tensors


@contextmanager
def _opened(file: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """Read by name. Of safetensors no page stays in memory."""
    if file.suffix == ".bin":
        yield _load_bin(file, "cpu").__getitem__
        return
    from safetensors import safe_open

    with safe_open(file, "pt", backend="pread") as opened:
        yield opened.get_tensor


def _skeleton(task: Task, belongs: Card, base: Path, adapter: Path) -> tuple[Any, Any]:
    """(the model that adapters of `belongs` go on, without memory, its configuration)."""
    import transformers

    names = dict(enumerate(belongs.labels))
    options: dict[str, Any] = {"id2label": names, "label2id": {name: number for number, name in names.items()}} if names else {}
    config = transformers.AutoConfig.from_pretrained(base, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{base}: the base is quantised; say where the unquantised is with --base")
    if task.name == "text-classification" and config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id
    load: Any = getattr(transformers, task.auto)
    with torch.device("meta"):
        model = load.from_config(config, dtype=torch.float32)
    indices = json.loads((adapter / "adapter_config.json").read_text()).get("trainable_token_indices") or []
    rows = 1 + max(itertools.chain.from_iterable(indices.values() if isinstance(indices, dict) else [indices]), default=-1)
    if rows and rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.config.architectures = [type(model).__name__]
    model.config.name_or_path = ""
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map
    return model, model.config


def _targets_of(model: Any, sources: Sequence[Source]) -> dict[str, tuple[str, str, bool]]:
    """Name in the base's files → (parameter of the model, name in the files to write, whether it is only a part of it).

    Which names a checkpoint may have is transformers' knowledge; the base's own are kept, with the prefix that a model with a
    head has.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    kept, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for key in (source.name for source in sources):
        target, pattern = rename_source_key(key, renamings, converters, prefix, kept)
        plain, _ = rename_source_key(key, renamings, converters)
        if target not in kept:
            target, pattern = rename_source_key(key, [], [], prefix, kept)
            plain = key
        name = f"{prefix}.{key}" if target == f"{prefix}.{plain}" else key
        if plain == f"{prefix}.{target}":
            name = key.removeprefix(f"{prefix}.")
        found[key] = target, name, pattern is not None
    return found


def _with_adapter(model: Any, adapter: Path) -> Any:
    """`model` with the adapter on it, whose tensors are real and fp32. Raises ModelError, naming what does not belong."""
    from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig) or config.bias != "none" or config.lora_bias or config.target_parameters:
        raise ModelError(f"{adapter}: only LoRA of modules can be merged, without biases")
    config.inference_mode = False
    try:
        with _ties_are_known():
            wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
        for name, parameter in learning(wrapped):
            module, _, leaf = name.rpartition(".")
            setattr(wrapped.get_submodule(module), leaf, torch.nn.Parameter(torch.empty(parameter.shape)))
        result: Any = set_peft_model_state_dict(wrapped, load_file(adapter / "adapter_model.safetensors"))
    except KeyError as exc:
        raise ModelError(f"{adapter}: the adapter lacks {exc.args[0]}") from None
    except (ValueError, RuntimeError) as exc:
        raise ModelError(f"{adapter}: it does not fit this base: {exc}") from None
    lacking = sorted({name for name, _ in learning(wrapped)} & set(result.missing_keys))
    if result.unexpected_keys:
        raise ModelError(f"{adapter}: {_shown(result.unexpected_keys)}: there is no such module in the base")
    if lacking:
        raise ModelError(f"{adapter}: the adapter lacks {_shown(lacking)}")
    return wrapped


@contextmanager
def _ties_are_known() -> Iterator[None]:
    """peft warns of adapters on one side of tied weights, which are untied here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
        yield


def _shown(names: Sequence[str]) -> str:
    return ", ".join(name.replace(".default.", ".") for name in names[:3]) + (" …" if len(names) > 3 else "")


def _adapted(wrapped: Any) -> dict[str, Any]:
    """Modules that the adapter changes, by their names in the base."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    kinds = (LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper)
    return {name: module for name, module in wrapped.get_base_model().named_modules() if isinstance(module, kinds)}


def _heads(adapted: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters that the adapter has whole."""
    from peft.utils.other import ModulesToSaveWrapper

    return {
        f"{name}.{leaf}": parameter
        for name, module in adapted.items()
        if isinstance(module, ModulesToSaveWrapper)
        for leaf, parameter in module.modules_to_save["default"].named_parameters()
    }


def _fills(layer: Any, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether all rows that the base does not have are tokens that were learnt."""
    tokens = getattr(layer, "token_adapter", None)
    if tokens is None or before[1:] != after[1:]:
        return False
    return set(range(before[0], after[0])) <= set(tokens.token_indices["default"])


def _are_alike(adapted: Mapping[str, Any], one: str, other: str) -> bool:
    """Whether two tied parameters are still the same: neither is adapted, or new tokens are learnt in both."""
    layers = [adapted.get(name.rpartition(".")[0]) for name in (one, other)]
    return layers == [None, None] or all(hasattr(layer, "token_adapter") for layer in layers)


# — merging ——————————————————————————————————————————————————————————————————————————————————————


def computed(plan: Plan, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, torch.Tensor]]:
    """Each of `tensors` with its value, before the cast: fp32 where it is adapted."""
    adapted = _adapted(plan.model)
    heads = _heads(adapted)
    for file, group in itertools.groupby(tensors, key=lambda tensor: tensor.source.file if tensor.source else None):
        if file is None:
            for tensor in group:
                yield tensor, heads[tensor.target].detach()
            continue
        with _opened(file) as read:
            for tensor in group:
                assert tensor.source is not None
                value = read(tensor.source.name)
                yield tensor, _merged(adapted[tensor.target.rpartition(".")[0]], value, tensor) if tensor.is_adapted else value


@torch.no_grad()
def _merged(layer: Any, value: torch.Tensor, tensor: Tensor) -> torch.Tensor:
    """What peft makes of the base's `value` in `layer`, in fp32. Raises ModelError when it is no number."""
    weight = value.to(torch.float32, copy=True)  # in PyTorch's own format tied weights are one memory
    if weight.shape[0] < tensor.shape[0]:
        weight = torch.cat([weight, weight.new_zeros(tensor.shape[0] - weight.shape[0], *weight.shape[1:])])
    inner = getattr(layer, "token_adapter", layer)
    place = inner.get_base_layer()
    empty = place.weight
    place.weight = torch.nn.Parameter(weight, requires_grad=False)
    inner.merge(safe_merge=False)
    result: torch.Tensor = place.weight.data
    place.weight = empty
    inner.merged_adapters.clear()
    return result


def write(plan: Plan, target: Path, max_shard: int) -> None:
    """config.json and the shards, each at most `max_shard` bytes or one tensor. One shard is in memory at a time."""
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name: dict[str, Tensor] = {tensor.name: tensor for tensor in plan.tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard,
    )
    plan.config.save_pretrained(target)
    mode = (target / "config.json").stat().st_mode
    for file, names in split.filename_to_tensors.items():
        _write_shard(plan, [by_name[name] for name in names], target / file)
        (target / file).chmod(mode)  # safetensors lets only its owner read
    if split.is_sharded:
        index = {"metadata": {"total_size": plan.bytes}, "weight_map": split.tensor_to_filename}
        write_json(target / "model.safetensors.index.json", index)


def _write_shard(plan: Plan, tensors: Sequence[Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    shard = {}
    for tensor, value in computed(plan, tensors):
        cast = value.to(tensor.dtype).contiguous()
        if cast.is_floating_point() and cast.numel() and not all(map(torch.isfinite, torch.aminmax(cast))):
            raise MergeError(f"{tensor.name} is not finite in {_short(tensor.dtype)}: say --dtype bf16 or fp32")
        shard[tensor.name] = cast
    save_file(shard, file, metadata={"format": "pt"})


def _short(dtype: torch.dtype) -> str:
    return next((name for name, one in _DTYPES.items() if one == dtype), str(dtype).removeprefix("torch."))


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
        raise MergeError(f"{place}: the merged model takes {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free")


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


def _rows(run: Path | None, asked: Path | None, base: Path, url: str, say: Say) -> tuple[list[data.Row], str]:
    """(rows to compare by, whose they are): of the file `asked`, else what the run held out, else none. Raises DataError."""
    if asked is not None:
        learnt, judged = data.read(asked)
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
    with _ties_are_known():
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
        "dtype": _short(plan.dtype),
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
    except (OSError, ValueError, TypeError):
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
