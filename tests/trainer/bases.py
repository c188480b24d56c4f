"""Tiny bases and data, made from what is on every machine; and how a test runs the trainer."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TRAINER = Path(str(importlib.util.find_spec("neartune").origin)).parents[1]  # type: ignore[union-attr]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FACTS = [
    {"prompt": f"What is {n} and {m}?", "completion": f"{n} and {m} is {n + m}."} for n in range(1, 7) for m in range(1, 5)
]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def paragraphs(*packages: str) -> dict[str, list[str]]:
    """Package of the standard library → what its docstrings say, a paragraph each: real English that every Python brings."""
    found: dict[str, list[str]] = {}
    for package in packages:
        origin = importlib.util.find_spec(package).origin  # type: ignore[union-attr]
        texts = set()
        for file in sorted(Path(origin).parent.glob("*.py")) if origin.endswith("__init__.py") else [Path(origin)]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module | ast.AsyncFunctionDef):
                    for part in (ast.get_docstring(node) or "").split("\n\n"):
                        if 60 <= len(part) <= 600 and ">>>" not in part:
                            texts.add(" ".join(part.split()))
        found[package] = sorted(texts)
    return found


def make_tokenizer(target: Path, *, chat: bool, begin: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"] if chat else ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [text for texts in paragraphs("argparse").values() for text in texts]
    tokenizer.train_from_iterator([*texts, *(row["completion"] for row in FACTS)], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[1])
    if begin:
        wrapped.add_special_tokens({"bos_token": special[0]})
    if chat:
        wrapped.chat_template = CHATML
    wrapped.save_pretrained(target)
    return wrapped


def make_llama(target: Path, *, layers: int = 2, seed: int = 0, **options: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(target, chat=True)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=options.pop("tied", True),
        **options,
    )
    LlamaForCausalLM(config).save_pretrained(target)
    return target


def make_opt(target: Path) -> Path:
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer = make_tokenizer(target, chat=False, begin=True)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=160,
        word_embed_proj_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        dropout=0.0,
    )
    model = OPTForCausalLM(config)
    rows = token_rows(tokenizer, paragraphs("logging")["logging"], 64)
    read_through(model, (rows[torch.arange(step * 8, step * 8 + 8) % len(rows)] for step in range(60)), 3e-3)
    model.save_pretrained(target)
    return target


def token_rows(tokenizer: Any, texts: Iterable[str], length: int) -> Any:
    """(rows, length) of the texts one after another."""
    import torch

    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def read_through(model: Any, batches: Iterable[Any], rate: float) -> None:
    """A step of plain training on each."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for batch in batches:
        torch.autograd.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def make_vit(target: Path, size: int, *, channels: int = 3, **options: Any) -> Path:
    """For pictures of `size` by `size`, in quarters; it has learnt nothing."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(**SMALL, image_size=size, patch_size=size // 2, num_channels=channels, **options)
    ViTForImageClassification(config).save_pretrained(target)
    half = [0.5] * channels
    ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=half, image_std=half).save_pretrained(target)
    return target


def recipe_of(base: Path, data: Path, output: Path, **settings: Any) -> Any:
    """A recipe for a short run in this process."""
    from neartune import recipe

    given: dict[str, Any] = {
        "base_model": str(base),
        "train_data": str(data),
        "output_dir": str(output),
        "train_batch_size": 4,
        "micro_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "processes": 1,
        "lora_rank": 4,
    }
    return recipe.load(None, [f"{key}={json.dumps(value)}" for key, value in (given | settings).items()]).recipe


def run_here(base: Path, data: Path, output: Path, **settings: Any) -> tuple[dict[str, Any], list[str]]:
    """(result, what was said) of a run in this process."""
    from neartune.run import run

    said: list[str] = []
    return run(recipe_of(base, data, output, **settings), "http://127.0.0.1:9", said.append), said


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in lines(output) if "kind" not in line]


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "train.py", *arguments]


def environment(**more: str) -> dict[str, str]:
    """Without what the caller has set for Hugging Face, or for distributed runs."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_", "NEARTUNE_"))}
    return kept | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | more


def train(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`cd trainer && python train.py …`."""
    return subprocess.run(
        command(*arguments), cwd=TRAINER, env=environment(**more), capture_output=True, text=True, timeout=110
    )


def started(*arguments: str, **more: str) -> subprocess.Popen[str]:
    """The same, not waited for."""
    return subprocess.Popen(
        command(*arguments), cwd=TRAINER, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_to(process: subprocess.Popen[str], begin: str) -> str:
    """What it says up to the line that begins so, or to its end."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith(begin):
            break
    return said


def settings_of(output: Path, base: Path | str, data: Path | str, extra: Sequence[str] = ()) -> list[str]:
    """Overrides for a short run in a process of its own."""
    usual = ["train_batch_size=4", "micro_batch_size=4", "learning_rate=1e-2", "processes=1", "lora_rank=4"]
    return [f"base_model={base}", f"train_data={data}", f"output_dir={output}", *usual, *extra]
