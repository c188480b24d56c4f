"""`neartune plan`: what it counts is what a run has; of the run it writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch.nn import functional

import neartune.hub
from neartune import cli, model, plan, recipe, tasks
from neartune.model import learning
from tests.hub import HubProcess
from tests.mirror import MirrorProcess
from tests.trainer.bases import FACTS, recipe_of, run_here, settings_of, write_jsonl

FP32 = model.choose_precision("fp32", is_cuda=False, has_bf16=False)


@given(st.lists(st.integers(2, 5000), min_size=1), st.integers(1, 20))
def test_every_length_is_in_one_bin_and_the_bins_cover_all(lengths: list[int], most: int) -> None:
    bins = plan.histogram(lengths, most)
    assert len(bins) <= most
    assert [part.rows for part in bins] == [sum(part.low <= length <= part.high for length in lengths) for part in bins]
    assert sum(part.rows for part in bins) == len(lengths)
    assert (bins[0].low, bins[-1].high) == (min(lengths), max(lengths))


def test_images_have_no_lengths() -> None:
    assert plan.histogram([1, 1]) == ()


def planned(base: Path, folder: Path, **settings: Any) -> plan.Plan:
    """Of a short run on FACTS."""
    data = write_jsonl(folder / "rows.jsonl", FACTS)
    usual = settings_of(folder / "run", base, data, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    return plan.plan(recipe.load(None, usual), 1, "http://127.0.0.1:9", lambda line: None)


@pytest.fixture(scope="module")
def here(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> plan.Plan:
    return planned(llama, tmp_path_factory.mktemp("plan"), max_steps=20, eval_every=6, lora_targets=["q_proj", "down_proj"])


def test_parameters_are_those_of_the_real_model(here: plan.Plan, llama: Path, tmp_path: Path) -> None:
    asked = recipe_of(llama, write_jsonl(tmp_path / "rows.jsonl", FACTS), tmp_path, lora_targets=["q_proj", "down_proj"])
    adapted = model.build(asked, tasks.find(asked.task), llama, (), FP32, lambda line: None)
    learnt = dict(learning(adapted))
    assert here.learnt == sum(parameter.numel() for parameter in learnt.values())
    assert here.parameters == sum(parameter.numel() for parameter in adapted.parameters())
    assert [(kind.name, kind.modules) for kind in here.kinds] == [("down_proj", 2), ("q_proj", 2)]
    of_q = sum(parameter.numel() for name, parameter in learnt.items() if ".q_proj." in name)
    assert here.kinds[1].parameters == of_q
    parts = {part.name: part.bytes for part in here.memory}
    assert parts["base, frozen"] == 4 * (here.parameters - here.learnt)
    assert parts["optimizer (AdamW)"] == 8 * here.learnt


def test_what_the_backward_pass_needs_is_counted_as_a_real_pass_keeps_it(here: plan.Plan, llama: Path, tmp_path: Path) -> None:
    """The tensors that autograd saves in a pass with numbers, on the longest row."""
    rows = write_jsonl(tmp_path / "rows.jsonl", FACTS)
    asked = recipe_of(llama, rows, tmp_path, lora_targets=["q_proj", "down_proj"])
    task = tasks.find(asked.task)
    adapted = model.build(asked, task, llama, (), FP32, lambda line: None).train()
    ids = torch.zeros((1, here.lengths[-1].high), dtype=torch.long)
    weights = {parameter.data_ptr() for parameter in adapted.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = adapted(input_ids=ids).logits[0]
        functional.cross_entropy(logits, ids[0])
    real = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
    assert here.memory[-1].bytes / here.micro == pytest.approx(real, rel=0.05)


def test_steps_evaluations_and_time(here: plan.Plan) -> None:
    assert (here.steps, here.evaluations) == (20, 4)
    assert here.timing is not None
    assert here.eta == 20 * here.timing.seconds + 5 * here.timing.eval_seconds
    assert here.disk >= 3 * 12 * here.learnt


def test_each_value_has_its_origin(llama: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", FACTS)
    config = tmp_path / "recipe.yaml"
    config.write_text(f"base_model: {llama}\n\ntrain_data: {data.name}\nseed: 7\nmirror: http://reader:geheim@mirror\n")
    found = plan.plan(recipe.load(config, ["seed=8", "max_steps=3"]), 1, "http://127.0.0.1:9", lambda line: None)
    origins = {setting.name: (setting.value, setting.origin) for setting in found.settings}
    assert origins["base_model"] == (str(llama), f"{config}:1")
    assert origins["seed"] == (8, "command line")
    assert origins["lora_rank"] == (16, "default")
    assert origins["mirror"] == ("http://mirror", f"{config}:5"), "without the password"
    assert origins.keys() == recipe.FIELDS.keys()


def test_nothing_of_the_run_is_written(llama: Path, tmp_path: Path) -> None:
    planned(llama, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_planned_run_is_the_run(llama: Path, tmp_path: Path) -> None:
    """The plan's steps are the run's, and change nothing of it."""
    data = write_jsonl(tmp_path / "rows.jsonl", FACTS)
    before, _ = run_here(llama, data, tmp_path / "a", epochs=1, max_steps=None)
    found = planned(llama, tmp_path, epochs=1)
    after, _ = run_here(llama, data, tmp_path / "b", epochs=1, max_steps=None)
    assert found.steps == before["steps"] == after["steps"]
    assert before["metrics"] == after["metrics"]


@pytest.mark.parametrize("width", [60, 100])
def test_it_is_shown_in_any_width(here: plan.Plan, width: int) -> None:
    console = Console(width=width, record=True, force_terminal=True, highlight=False)
    plan.show(here, console)
    text = console.export_text(styles=True)
    assert "\x1b[32m" in text  # what is learnt
    plain = [line.rstrip() for line in Console(width=width).render_str(text).plain.splitlines()]
    assert all(len(line) <= width for line in plain if "\x1b" not in line)
    assert "20, 4 evaluations" in text


def test_a_base_of_the_mirror_is_planned_without_its_weights(
    hub: HubProcess, mirror: MirrorProcess, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    hub.repo("lab/planned").commit({path.name: path for path in llama.iterdir()})
    data = write_jsonl(tmp_path / "rows.jsonl", FACTS)
    arguments = settings_of(tmp_path / "run", "lab/planned", data, ["--use_mirror", mirror.url])
    assert cli.main(["plan", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = (llama / "model.safetensors").stat().st_size
    assert found["base_bytes"] == weights
    assert found["eta"] is None
    assert found["parameters"] > found["learnt"] > 0
    names = {path.name for path in (tmp_path / "hf").rglob("*") if path.is_symlink()}
    assert "tokenizer.json" in names
    assert not any(name.endswith(".safetensors") for name in names)
    assert not (tmp_path / "run").exists()


def test_a_base_of_the_mirror_that_is_here_is_timed(
    hub: HubProcess, mirror: MirrorProcess, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The steps are those of the commit that was looked up, and nobody is asked again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    hub.repo("lab/here").commit({path.name: path for path in llama.iterdir()})
    neartune.hub.fetch("lab/here", "main", mirror.url, lambda line: None)
    data = write_jsonl(tmp_path / "rows.jsonl", FACTS)
    arguments = settings_of(tmp_path / "run", "lab/here", data, ["--use_mirror", mirror.url])
    assert cli.main(["plan", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["base_bytes"], found["has_weights"]) == (0, True)
    assert found["timing"]["seconds"] > 0


def test_a_batch_that_cannot_be_shared_is_told_of_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    data = write_jsonl(tmp_path / "rows.jsonl", FACTS)
    arguments = ["base_model=lab/x", f"train_data={data}", "train_batch_size=4"]
    for verb in ("plan", "train"):
        assert cli.main([verb, *arguments, "--use_mirror", "http://127.0.0.1:9"]) == 2
        assert "train_batch_size 4 cannot be shared by 3 processes equally" in capsys.readouterr().err


def test_a_base_without_weights_is_refused(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_bytes((llama / "config.json").read_bytes())
    data = write_jsonl(tmp_path / "rows.jsonl", FACTS)
    assert cli.main(["plan", *settings_of(tmp_path / "run", empty, data)]) == 2
    assert "it has no weights" in capsys.readouterr().err
