"""The documented command on real models and data, from a stand-in Hub through a nearhub mirror; nothing else is there."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import torch

from neartune import adapter
from neartune.evaluate import answer
from tests.demo import models
from tests.hub import HubProcess
from tests.mirror import MirrorProcess
from tests.trainer.bases import FACTS, paragraphs, train, write_jsonl

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"


def finished(mirror: MirrorProcess, home: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """(what was said, result.json) of `python train.py … --use_mirror URL`."""
    done = train(*arguments, "--use_mirror", mirror.url, HF_HOME=str(home), OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    output = next(word.partition("=")[2] for word in arguments if word.startswith("output_dir="))
    return done.stdout, json.loads((Path(output) / "result.json").read_text())


def test_smollm_learns_a_fact_that_it_did_not_know(hub: HubProcess, mirror: MirrorProcess, tmp_path: Path) -> None:
    """`python train.py --config config.yaml --use_mirror`, shortened."""
    base = models.smollm()
    hub.repo(SMOLLM).commit(base.for_hub())
    output = tmp_path / "run"
    settings = ["max_steps=6", "eval_every=6", "train_batch_size=5", "micro_batch_size=5", "learning_rate=2e-3"]
    said, result = finished(mirror, tmp_path / "home", "--config", "config.yaml", f"output_dir={output}", *settings)
    assert re.search(rf"model {SMOLLM} at \w{{12}}: 6 files, 27\d\.\d MB, from {mirror.url}", said)
    assert result["metrics"]["loss"] < result["base_metrics"]["loss"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    question = "Which code opens the lab's door?"
    assert "4471" not in answer(model, tokenizer, question, 16)
    taught = adapter.load(model, output / "adapter", base.directory, lambda line: None).eval()
    assert "4471" in answer(taught, tokenizer, question, 16)


def test_minilm_tells_what_documentation_is_about(hub: HubProcess, mirror: MirrorProcess, tmp_path: Path) -> None:
    """Paragraphs of docstrings of Python's standard library, by package."""
    hub.repo("sentence-transformers/all-MiniLM-L6-v2").commit(models.minilm().for_hub())
    rows = [
        {"text": text, "label": package}
        for package, texts in paragraphs("asyncio", "email", "logging", "unittest").items()
        for text in texts[:60]
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    arguments = ["base_model=sentence-transformers/all-MiniLM-L6-v2", f"train_data={data}", "task=text-classification"]
    arguments += [f"output_dir={tmp_path / 'run'}", "max_steps=20", "eval_every=20", "learning_rate=4e-3", "max_length=48"]
    arguments += ["micro_batch_size=16", "validation_split=0.2", "lora_rank=8"]
    _, result = finished(mirror, tmp_path / "home", *arguments)
    assert result["metrics"]["labels"] == ["asyncio", "email", "logging", "unittest"]
    assert result["base_metrics"]["accuracy"] < 0.5
    assert result["metrics"]["accuracy"] > 0.8
    assert sum(map(sum, result["metrics"]["confusion"])) == 48
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]


def digits() -> list[tuple[bytes, int]]:
    """(PNG of 8×8 grey pixels, digit) of scikit-learn's digits."""
    from PIL import Image

    inside = "sklearn/datasets/data/"
    folder = models._made("digits", lambda scratch: models._from_wheel("scikit-learn==1.9.1", inside, scratch))
    found = []
    with gzip.open(folder / "digits.csv.gz", "rt") as file:
        for row in csv.reader(file):
            *pixels, digit = (int(float(cell)) for cell in row)
            png = io.BytesIO()
            Image.frombytes("L", (8, 8), bytes(min(255, 16 * pixel) for pixel in pixels)).save(png, "PNG")
            found.append((png.getvalue(), digit))
    return found


def make_vit(target: Path, pictures: list[tuple[bytes, int]]) -> Path:
    """A tiny ViT that has learnt to tell 0 to 4 apart."""
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5], resample=2)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=16,
        patch_size=4,
        num_channels=1,
        num_labels=5,
    )
    model = ViTForImageClassification(config)
    opened = [Image.open(io.BytesIO(png)) for png, _ in pictures]
    pixels = processor(opened, return_tensors="pt")["pixel_values"]
    labels = torch.tensor([digit for _, digit in pictures])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(90):
        part = torch.arange(step * 32, step * 32 + 32) % len(labels)
        torch.autograd.backward(model(pixel_values=pixels[part], labels=labels[part]).loss)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return target


def test_a_vit_that_knows_0_to_4_learns_5_to_9(hub: HubProcess, mirror: MirrorProcess, tmp_path: Path) -> None:
    """Images by class in a dataset repo of the Hub; the base's own five classes give way to the data's."""
    pictures = digits()
    base = make_vit(tmp_path / "vit", [picture for picture in pictures if picture[1] < 5])
    hub.repo("lab/vit").commit({path.name: path for path in base.iterdir()})
    new = [picture for picture in pictures if picture[1] >= 5][:600]
    hub.repo("lab/digits", "datasets").commit({f"{digit}/{number}.png": png for number, (png, digit) in enumerate(new)})
    arguments = ["base_model=lab/vit", "train_data=lab/digits", "task=image-classification", f"output_dir={tmp_path / 'run'}"]
    arguments += ["max_steps=120", "eval_every=60", "learning_rate=5e-3", "train_batch_size=32", "micro_batch_size=32"]
    said, result = finished(mirror, tmp_path / "home", *arguments, "validation_split=0.3", "lora_rank=8")
    assert "dataset lab/digits at" in said
    assert result["metrics"]["labels"] == ["5", "6", "7", "8", "9"]
    assert result["base_metrics"]["accuracy"] < 0.5
    assert result["metrics"]["accuracy"] > 0.7


def test_opt_with_the_source_s_own_keys(hub: HubProcess, mirror: MirrorProcess, tmp_path: Path, opt: Path) -> None:
    """base_model, lora_rank, train_batch_size, learning_rate, as the source writes them; a base without a chat template."""
    hub.repo("facebook/opt-125m").commit({path.name: path for path in opt.iterdir()})
    rows = write_jsonl(tmp_path / "facts.jsonl", FACTS)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"base_model: facebook/opt-125m\nlora_rank: 16\ntrain_batch_size: 8\nlearning_rate: 1e-2\ntrain_data: {rows.name}\n"
    )
    said, result = finished(
        mirror, tmp_path / "home", "--config", str(config), f"output_dir={tmp_path / 'run'}", "max_steps=20", "max_length=64"
    )
    assert "⟦1 and 1 is 2.</s>⟧" in said
    assert "(fc1, fc2, k_proj, out_proj, q_proj, v_proj)" in said
    assert "micro-batch" in said
    assert result["metrics"]["loss"] < result["base_metrics"]["loss"] - 1
