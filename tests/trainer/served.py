"""What is served in tests: runs that answer differently; and what transformers and peft by themselves make of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from neartune import adapter, tasks
from neartune.adapter import Card
from neartune.hub import Snapshot
from neartune.model import base_files
from tests.trainer.bases import FACTS, make_llama, run_here, write_jsonl

_MADE: dict[str, Path] = {}
"""Trained once for all test files."""
QUESTION = "What is 2 and 3?"
MAILS = [{"text": f"win {n} coins now", "label": "spam"} for n in range(8)]
MAILS += [{"text": f"lunch at {n} today", "label": "ham"} for n in range(8)]
WORDS = [{"tokens": ["ship", str(n), "to", "Oslo"], "tags": ["O", "N", "O", "P"]} for n in range(8)]
SAYINGS: Mapping[str, Sequence[Mapping[str, str]]] = {
    "a": FACTS,
    "ab": [row | {"completion": "Nobody knows that."} for row in FACTS],
    "a.b": [row | {"completion": f"{row['prompt']} Ask another day."} for row in FACTS],
}


def trained(base: Path, home: Path, name: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
    data = write_jsonl(home / f".{name}.jsonl", rows)
    run_here(base, data, home / name, **{"max_steps": 8, "learning_rate": 2e-2, "validation_split": 0, **settings})
    return home / name


def made_runs(base: Path, factory: pytest.TempPathFactory) -> Path:
    """A directory of a and ab, which are of one shape, and a.b, of another."""
    if "runs" not in _MADE:
        home = _MADE["runs"] = factory.mktemp("runs")
        for name, rows in SAYINGS.items():
            trained(base, home, name, rows, lora_rank=8 if name == "a.b" else 4)
    return _MADE["runs"]


def made_classes(base: Path, factory: pytest.TempPathFactory) -> Path:
    """A directory of spam and pams, which have learnt the opposite of each other, and words, which has tags; of one base."""
    if "classes" in _MADE:
        return _MADE["classes"]
    home = _MADE["classes"] = factory.mktemp("classes")
    turned = [row | {"label": {"spam": "ham", "ham": "spam"}[row["label"]]} for row in MAILS]
    trained(base, home, "spam", MAILS, task="text-classification")
    trained(base, home, "pams", turned, task="text-classification")
    trained(base, home, "words", WORDS, task="token-classification")
    return home


def picture(colour: str) -> Any:
    from PIL import Image

    return Image.new("RGB", (16, 16), colour)


def made_images(folder: Path) -> Path:
    """A directory of the run pictures, which tells red from blue."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    for colour in ("red", "blue"):
        (folder / "images" / colour).mkdir(parents=True)
        for number in range(4):
            picture(colour).save(folder / "images" / colour / f"{number}.png")
    settings = {"task": "image-classification", "max_steps": 4, "learning_rate": 2e-2, "validation_split": 0}
    run_here(folder / "vit", folder / "images", folder / "runs" / "pictures", **settings)
    return folder / "runs"


def endless(target: Path) -> Path:
    """A base that never comes to an end: it has no end token, and its context has no end."""
    make_llama(target)
    for name, change in (
        ("config.json", {"max_position_embeddings": 10**7, "eos_token_id": None}),
        ("generation_config.json", {"eos_token_id": None}),
        ("tokenizer_config.json", {"eos_token": None}),
    ):
        known = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps(known | change))
    return target


def moved(run: Path, base: Path, target: Path) -> Path:
    """The run, as if it had been trained on the directory `base`, which has the same weights."""
    shutil.copytree(run, target)
    card = json.loads((target / "adapter" / "base.json").read_text())
    known = Card.of(Snapshot(base), base_files(base), card["task"], card["labels"])
    card |= {"fingerprint": known.fingerprint, "files": known.files, "tokenizer": known.tokenizer, "path": str(base)}
    (target / "adapter" / "base.json").write_text(json.dumps(card))
    return target


def alone(run: Path, base: Path) -> tuple[Any, Any]:
    """(model, processor): the run's adapter by peft, on a base of its own."""
    card = Card.read(run / "adapter")
    task = tasks.find(card.task)
    processor = task.load_processor(run / "adapter")
    model = adapter.load(adapter.load_base(card, base, processor), run / "adapter", base, lambda line: None).eval()
    return model, processor


def generated(model: Any, tokenizer: Any, question: str, longest: int) -> list[int]:
    """By transformers' own loop, greedily."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        said = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=longest,
            do_sample=False,
            use_cache=True,
            eos_token_id=[model.generation_config.eos_token_id, tokenizer.eos_token_id],
            pad_token_id=tokenizer.eos_token_id,
        )
    return [int(token) for token in said[0, inputs["input_ids"].shape[1] :]]
