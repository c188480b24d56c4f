"""The finished adapter: plain peft files that any peft loads on the base as it was; another base is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from neartune import adapter, checkpoint, model, tasks
from neartune.model import ModelError
from tests.trainer.bases import FACTS, make_llama, recipe_of, run_here, write_jsonl

FP32 = model.choose_precision("fp32", is_cuda=False, has_bf16=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", FACTS)


def base_of(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def logits(some: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = some.eval()(input_ids=torch.arange(40, 72).view(2, 16)).logits
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dora": True},
        {"rslora": True},
        {"lora_init": "pissa"},
        {"lora_init": "olora"},
        {"lora_init": "pissa", "rslora": True},
    ],
    ids=["lora", "dora", "rslora", "pissa", "olora", "pissa-rslora"],
)
def test_plain_peft_gives_what_was_trained(llama: Path, data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    run_here(llama, data, tmp_path / "run", max_steps=6, **settings)
    recipe = recipe_of(llama, data, tmp_path, **settings)
    torch.manual_seed(recipe.seed)
    trained = model.build(recipe, tasks.find(recipe.task), llama, (), FP32, lambda line: None)
    checkpoint.load_parameters(checkpoint.saved(tmp_path / "run" / "best")[-1], trained)
    loaded = adapter.load(base_of(llama), tmp_path / "run" / "adapter", llama, lambda line: None)
    torch.testing.assert_close(logits(loaded), logits(trained), atol=2e-4, rtol=2e-4)
    assert (logits(loaded) - logits(base_of(llama))).abs().max() > 1e-2, "the adapter does nothing"
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == (8 if "lora_init" in settings else 4)
    assert config["init_lora_weights"] is True


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_learnt(data: Path, tmp_path: Path, tied: bool) -> None:
    base = make_llama(tmp_path / "base", tied=tied)
    rows = [{"prompt": "Say it", "completion": "<gnu>"}] * 8
    _, said = run_here(
        base, write_jsonl(data, rows), tmp_path / "run", max_steps=30, new_tokens=["<gnu>", "<emu>"], learning_rate=5e-2
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    assert len(tokenizer("<gnu>")["input_ids"]) == 1
    assert "⟦<gnu><|im_end|>⟧" in said[[line.startswith("the first row") for line in said].index(True)]
    plain = base_of(base)
    plain.resize_token_embeddings(len(tokenizer))
    loaded = adapter.load(plain, tmp_path / "run" / "adapter", base, lambda line: None).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say it"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(loaded(input_ids=prompt).logits[0, -1].argmax()) == "<gnu>"


def test_another_base_is_refused_with_the_difference(llama: Path, data: Path, tmp_path: Path) -> None:
    run_here(llama, data, tmp_path / "run", max_steps=1)
    other = make_llama(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match=r"is another base: model\.safetensors differs"):
        adapter.load(base_of(other), tmp_path / "run" / "adapter", other, lambda line: None)
    (tmp_path / "run" / "adapter" / "base.json").unlink()
    with pytest.raises(ModelError, match="it does not say what base it belongs to"):
        adapter.load(base_of(llama), tmp_path / "run" / "adapter", llama, lambda line: None)


def test_another_chat_template_is_a_warning(llama: Path, data: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    run_here(base, data, tmp_path / "run", max_steps=1)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    said: list[str] = []
    adapter.load(base_of(base), tmp_path / "run" / "adapter", base, said.append)
    assert said == ["warning: chat_template.jinja of the base changed since the adapter was trained; the adapter's own is used"]
