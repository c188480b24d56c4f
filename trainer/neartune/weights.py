"""The weights of a merged model, tensor by tensor: which there are, where each comes from, what it is, and the files.

The model is there without memory (torch's meta device); the adapter's matrices are real. A tensor of the base is read into its
place in fp32, peft merges that one module, the result is cast once and written: memory is that of one shard, and the arithmetic
of every kind of adapter is peft's own.
"""

from __future__ import annotations

import itertools
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neartune import hub
from neartune.adapter import Card, write_json
from neartune.model import ModelError, learning
from neartune.tasks import Task

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


# — what is merged ———————————————————————————————————————————————————————————————————————————————


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
        with ties_are_known():
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
def ties_are_known() -> Iterator[None]:
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


def adds_nothing(plan: Plan) -> bool:
    """Whether all that the adapter adds is 0, and it replaces nothing of the base."""
    return all(
        "lora_" in name and ("lora_A" in name or "lora_embedding_A" in name or not bool(parameter.any()))
        for name, parameter in learning(plan.model)
    )


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
            raise MergeError(f"{tensor.name} is not finite in {short(tensor.dtype)}: say --dtype bf16 or fp32")
        shard[tensor.name] = cast
    save_file(shard, file, metadata={"format": "pt"})


def short(dtype: torch.dtype) -> str:
    return next((name for name, one in _DTYPES.items() if one == dtype), str(dtype).removeprefix("torch."))
