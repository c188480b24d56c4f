"""The base with a LoRA adapter on it: which precision, which modules, which parameters learn; and what the base is, by its
bytes."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neartune import hub
from neartune.recipe import Recipe
from neartune.tasks import Task

_LARGE, _LARGE_RATE = 6_000_000_000, 3e-4


class ModelError(Exception):
    """The recipe does not fit this base; the message says what does."""


@dataclass(frozen=True, slots=True)
class Precision:
    """`base`: of the frozen weights. `autocast`: of the arithmetic, None: none. `scales`: fp16 gradients are scaled."""

    name: str
    base: torch.dtype
    autocast: torch.dtype | None
    scales: bool
    why: str


def choose_precision(asked: str, *, is_cuda: bool, has_bf16: bool) -> Precision:
    """bf16 where the hardware has it, else fp16 with scaling on CUDA, else fp32. Raises ModelError."""
    if asked == "fp16" and not is_cuda:
        raise ModelError("precision: fp16 needs CUDA: its gradients are scaled there; on a CPU say fp32 or bf16")
    if asked == "bf16" and is_cuda and not has_bf16:
        raise ModelError("precision: bf16 is not what this GPU has (it would be emulated): say fp16, fp32 or auto")
    name = asked
    why = "as the recipe says"
    if asked == "auto":
        name = ("bf16" if has_bf16 else "fp16") if is_cuda else "fp32"
        why = {"bf16": "the GPU has it", "fp16": "the GPU has no bf16", "fp32": "a CPU"}[name]
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes[name]
    return Precision(name, dtype, None if name == "fp32" else dtype, name == "fp16", why)


def weight_files(path: Path) -> list[str]:
    """Of the base in the directory `path`: safetensors, else PyTorch's own. Raises ModelError when there are none."""
    try:
        return [name for name in hub.choose_model_files(_sizes(path)) if hub.is_weights(name)]
    except hub.HubError as exc:
        raise ModelError(f"{path}: {exc}") from None


def _sizes(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}


def base_files(path: Path) -> dict[str, str]:
    """Name → sha256 of what makes a base what it is: its weight files and config.json. Raises ModelError."""
    names = [*weight_files(path), *(["config.json"] if (path / "config.json").is_file() else [])]
    return {name: sha256(path / name) for name in names}


def fingerprint(files: Mapping[str, str]) -> str:
    """sha256 over the sorted (name, sha256) of base_files()."""
    return hashlib.sha256("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def build(
    recipe: Recipe,
    task: Task,
    path: Path,
    labels: Sequence[str],
    precision: Precision,
    say: Callable[[str], None],
    vocabulary: int = 0,
) -> Any:
    """The adapted model: base frozen in its precision, adapter and new heads in fp32. `vocabulary`: tokens that the tokenizer
    has, with recipe.new_tokens the last of them. Raises ModelError."""
    is_cuda = torch.cuda.is_available()
    if recipe.compile:
        refuse_uncompilable(os.environ, is_cuda=is_cuda)
    if not recipe.load_in_4bit:
        base = task.load_model(path, labels, dtype=precision.base, trust_remote_code=False)
        return adapt(base, recipe, task.heads, say, vocabulary)
    import peft

    in_fp32: Any = peft.prepare_model_for_kbit_training
    options = in_4bit(precision, is_cuda=is_cuda, has_library=importlib.util.find_spec("bitsandbytes") is not None)
    base = task.load_model(path, labels, dtype=precision.base, trust_remote_code=False, **options)
    base = in_fp32(base, use_gradient_checkpointing=False)
    say("the base is in 4 bits (nf4, its scales in 8 bits); what is not in 4 bits is in fp32")
    return adapt(base, recipe, task.heads, say, vocabulary)


def in_4bit(precision: Precision, *, is_cuda: bool, has_library: bool) -> dict[str, Any]:
    """from_pretrained()'s options for QLoRA (https://arxiv.org/abs/2305.14314), on this process's GPU. Raises ModelError."""
    if not is_cuda:
        raise ModelError("load_in_4bit needs CUDA and bitsandbytes, and there is no CUDA here: leave it out")
    if not has_library:
        raise ModelError(
            "load_in_4bit needs bitsandbytes, which is not installed: pip install 'nearhub[qlora]', or leave it out"
        )
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": precision.base,
    }
    return {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}


def refuse_uncompilable(environ: Mapping[str, str], *, is_cuda: bool) -> None:
    """torch.compile writes C++ for a CPU, and C for what starts kernels on a GPU. Raises ModelError."""
    names = ("CC", "gcc", "clang") if is_cuda else ("CXX", "g++")
    wanted = [environ.get(name, "") if name.isupper() else name for name in names]
    if not any(shutil.which(name, path=environ.get("PATH")) for name in wanted if name):
        kind = "C" if is_cuda else "C++"
        raise ModelError(
            f"compile: there is no {kind} compiler on this machine's PATH ({', '.join(filter(None, wanted))}): install one "
            "(Debian: apt-get install g++), or leave compile out"
        )


def adapt(base: Any, recipe: Recipe, heads: Sequence[str], say: Callable[[str], None], vocabulary: int = 0) -> Any:
    """LoRA on `base`, by peft. `heads`: names of parts that are new and learn whole."""
    from peft import LoraConfig, get_peft_model

    whole = [head for head in heads if any(name.rpartition(".")[2] == head for name, _ in base.named_modules())]
    if heads and not whole:
        raise ModelError(f"this base has no head that could learn: none of {', '.join(heads)}")
    whole += _missing_parts(base, whole)
    targets = _targets(base, recipe.lora_targets, whole)
    for key, pattern in (("rank_pattern", recipe.rank_pattern), ("alpha_pattern", recipe.alpha_pattern)):
        for word, _ in pattern:
            if not any(re.match(rf"(.*\.)?({word})$", name) for name in targets):
                raise ModelError(f"{key}: {word!r} matches none of the modules that get an adapter")
    options: dict[str, Any] = {
        "r": recipe.lora_rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.lora_dropout,
        "target_modules": sorted(targets),
        "modules_to_save": whole or None,
        "use_rslora": recipe.rslora,
        "use_dora": recipe.dora,
        "init_lora_weights": True if recipe.lora_init == "default" else recipe.lora_init,
        "rank_pattern": {key: int(rank) for key, rank in recipe.rank_pattern},
        "alpha_pattern": dict(recipe.alpha_pattern),
    }
    if recipe.new_tokens:
        options["trainable_token_indices"] = _with_new_tokens(base, len(recipe.new_tokens), vocabulary)
    if recipe.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(**options))
    for _, parameter in learning(model):
        parameter.data = parameter.data.float()
    kinds = sorted({name.rpartition(".")[2] for name in targets})
    learnt, total = model.get_nb_trainable_parameters()
    say(
        f"LoRA of rank {recipe.lora_rank} on {len(targets)} modules ({', '.join(kinds)}): "
        f"{learnt:,} of {total:,} parameters learn ({learnt / total:.2%})"
    )
    if total >= _LARGE and recipe.learning_rate > _LARGE_RATE:
        say(f"advice: learning_rate {recipe.learning_rate:g} is high for {total / 1e9:.0f} B parameters: at most 3e-4 is usual")
    return model


@dataclass(frozen=True, slots=True)
class Sharding:
    """FSDP, as `accelerate launch` passes it on. `layers`: class names of what is put together at once; none: what the base
    says must not be split. `is_resharded`: a layer is whole only while it is computed with."""

    layers: tuple[str, ...]
    is_resharded: bool

    @staticmethod
    def of(environ: Mapping[str, str]) -> Sharding:
        names = environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
        kept = environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
        return Sharding(tuple(filter(None, names.split(","))), kept not in ("false", "shard_grad_op", "no_shard"))


def shard(model: Any, device: torch.device, sharding: Sharding) -> Any:
    """The frozen base spread over all processes, each layer's weights in equal parts. What learns stays whole in each, so that
    optimizer, clipping and checkpoints are as ever. Raises ModelError."""
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model()
    names = set(sharding.layers or base._no_split_modules or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"FSDP: this base has no layers called {', '.join(sorted(names)) or 'in its own code'}: "
            "name their class in the accelerate config, fsdp_transformer_layer_cls_to_wrap"
        )
    whole = {parameter for _, parameter in learning(model)}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (get_world_size(),))
    before = type(base)
    for module in [*layers, base]:
        fully_shard(module, mesh=mesh, reshard_after_forward=sharding.is_resharded, ignored_params=whole)
    # peft writes the name of the base's class down.
    type(base).__name__, type(base).__module__ = before.__name__, before.__module__
    return model


def _missing_parts(base: Any, heads: Sequence[str]) -> list[str]:
    """Modules that are not in the base's files, beside its heads: they begin at random, so they are learnt and kept whole.
    Raises ModelError for a base that is to generate, or of which more is missing than single modules."""
    names = getattr(base, "parts_that_are_missing", ())
    found = [name for name in names if not set(name.split(".")) & set(heads)]
    modules = dict(base.named_modules())
    lost = found if not heads else [name for name in found if any(modules[name].children())]
    if lost:
        raise ModelError(
            f"the base's files do not have {', '.join(lost)}, which this task needs: it would begin at random. "
            "Another base is needed, or another task"
        )
    return found


def _with_new_tokens(base: Any, new: int, vocabulary: int) -> dict[str, list[int]]:
    """Make room for the last `new` of `vocabulary` tokens, which begin as the mean of the others. The layers and rows that
    learn."""
    before = base.get_input_embeddings().weight.shape[0]
    if vocabulary > before:
        base.resize_token_embeddings(vocabulary, mean_resizing=False)
    rows = list(range(vocabulary - new, vocabulary))
    layers = [base.get_input_embeddings()]
    if base.get_output_embeddings() is not None and not base.config.tie_word_embeddings:
        layers.append(base.get_output_embeddings())
    with torch.no_grad():
        for layer in layers:
            layer.weight[rows] = layer.weight[: vocabulary - new].float().mean(0).to(layer.weight.dtype)
    return {name.rpartition(".")[2]: rows for name, module in base.named_modules() if any(module is layer for layer in layers)}


def linear_modules(base: Any) -> Iterable[tuple[str, Any]]:
    """Modules that LoRA can be put on."""
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module


def all_linear(base: Any, heads: Sequence[str]) -> set[str]:
    """Full names of all modules that an adapter can be put on: what `lora_targets: all-linear` means. Raises ModelError."""
    return _targets(base, ("all-linear",), heads)


def _targets(base: Any, asked: Sequence[str], heads: Sequence[str]) -> set[str]:
    outputs = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    output = [name for name, module in base.named_modules() if module is outputs and outputs is not None]
    return resolve_targets(asked, [name for name, _ in linear_modules(base)], [*heads, *output])


def resolve_targets(asked: Sequence[str], linear: Sequence[str], heads: Sequence[str]) -> set[str]:
    """Full names of the modules that get an adapter. Every word of `asked` must match some, or ModelError names the nearest.

    `auto` and `all-linear`: all linear modules but the model's head: an output layer, or a new head that is trained whole.
    """
    skipped = {"lm_head", "embed_out", "score", "classifier", *heads}
    usual = {name for name in linear if not {name, *name.split(".")} & skipped}
    chosen: set[str] = set()
    for word in asked:
        found = usual if word in ("auto", "all-linear") else {name for name in linear if _is_named(name, word)}
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in usual})
            near = difflib.get_close_matches(word, kinds, 3, 0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(kinds)}"
            raise ModelError(f"lora_targets: {word!r} matches no module of this base; {hint}")
        if not found & usual:
            raise ModelError(f"lora_targets: {word!r} is the head, which gets no adapter")
        chosen |= found & usual
    return chosen


def _is_named(name: str, word: str) -> bool:
    """Whether `word` is a module's name, the end of its path, a glob for either, or a regular expression for the whole path."""
    if name == word or name.endswith(f".{word}") or fnmatch.fnmatchcase(name, word):
        return True
    try:
        return re.fullmatch(word, name) is not None
    except re.error:
        return False


def learning(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters that learn, in a fixed order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def refuse_dead(model: Any) -> None:
    """After the first step every B matrix must have a gradient, else the adapter is not in the way of the data."""
    matrices = [(name, parameter) for name, parameter in model.named_parameters() if "lora_B" in name]
    dead = [name for name, parameter in matrices if parameter.grad is None or not parameter.grad.any()]
    if dead or not matrices:
        raise ModelError(
            f"{len(dead)} of {len(matrices)} adapter matrices got no gradient in the first step: {', '.join(dead[:3])}"
        )
