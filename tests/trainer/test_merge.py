"""Merging: the same weights as peft's own merge in memory, an ordinary model directory, a comparison that can fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from neartune import adapter, cli, hub, merge, tasks
from neartune.adapter import Card
from neartune.model import ModelError, base_files, sha256
from neartune.weights import MergeError
from tests.hub import HubProcess
from tests.mirror import MirrorProcess
from tests.trainer.bases import FACTS, SMALL, environment, make_llama, make_tokenizer, make_vit, run_here, write_jsonl

NOWHERE = "http://127.0.0.1:9"
TEXTS = [
    {"text": f"{word} {n}", "label": label} for n in range(6) for word, label in (("warm sun", "good"), ("cold rain", "bad"))
]
WORDS = [{"tokens": ["Ada", "sleeps", str(n)], "tags": ["NAME", "O", "O"]} for n in range(12)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", FACTS)


@pytest.fixture(scope="module")
def trained(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny llama, not to be changed."""
    output = tmp_path_factory.mktemp("runs") / "run"
    run_here(llama, data, output, max_steps=6)
    return output


def merged(run: Path, to: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return merge.merge(run, to, NOWHERE, said.append, **options), said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def by_peft(base: Path, run: Path) -> Any:
    """The model that peft merges in memory."""
    from peft import PeftModel

    card = Card.read(run / "adapter")
    task = tasks.find(card.task)
    model = adapter.load_base(card, base, task.load_processor(run / "adapter"))
    return PeftModel.from_pretrained(model, str(run / "adapter")).merge_and_unload()


def assert_as_by_peft(base: Path, run: Path, to: Path) -> Any:
    """The merged model, which has the weights that peft merges, to the rounding of fp32."""
    card = Card.read(run / "adapter")
    model = tasks.find(card.task).load_model(to, card.labels, dtype=torch.float32, trust_remote_code=False)
    expected = by_peft(base, run).state_dict()
    got = model.state_dict()
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rslora": True},
        {"dora": True},
        {"lora_init": "pissa", "rslora": True},
        {"lora_init": "olora"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 31}},
    ],
    ids=["lora", "rslora", "dora", "pissa-rslora", "olora", "patterns"],
)
def test_every_kind_of_adapter_is_merged_as_by_peft(llama: Path, data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    run_here(llama, data, tmp_path / "run", max_steps=6, **settings)
    about, said = merged(tmp_path / "run", tmp_path / "out")
    assert_as_by_peft(llama, tmp_path / "run", tmp_path / "out")
    before, after = weights(llama), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    assert before.keys() == after.keys()
    compared = about["compared"]
    assert compared["whose"] == "held out by the run"
    assert 0 < compared["fp32_max_logit_difference"] == compared["max_logit_difference"] < 1e-4
    assert compared["argmax_agreement"] == 1
    assert f"{compared['fp32_max_logit_difference']:.2g} in fp32" in said[-2]
    assert "the likeliest is the same in 100.00%" in said[-2]


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_merged_and_what_was_tied_stays_tied(data: Path, tmp_path: Path, tied: bool) -> None:
    base = make_llama(tmp_path / "base", tied=tied)
    rows = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "Say it", "completion": "<gnu>"}] * 8)
    run_here(base, rows, tmp_path / "run", max_steps=6, new_tokens=["<gnu>", "<emu>"], learning_rate=5e-2)
    about, _ = merged(tmp_path / "run", tmp_path / "out")
    model = assert_as_by_peft(base, tmp_path / "run", tmp_path / "out")
    assert model.config.vocab_size == json.loads((base / "config.json").read_text())["vocab_size"] + 2
    assert about["untied"] == []
    assert ("lm_head.weight" in weights(tmp_path / "out")) is not tied
    assert model.config.tie_word_embeddings is tied
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")("<gnu>")["input_ids"]) == 1


def with_peft(base: Path, target: Path, *, snapshot: hub.Snapshot | None = None, **settings: Any) -> Path:
    """An adapter of random matrices, made by peft itself, with our card beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        model = get_peft_model(model, LoraConfig(r=4, **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.requires_grad:
            parameter.data.mul_(1.5)
    model.save_pretrained(target, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    card = Card.of(snapshot or hub.Snapshot(base), base_files(base), "text-generation", ())
    adapter.write_json(target / "base.json", asdict(card))
    return target


def in_pytorch_s_format(base: Path, target: Path, *, is_zip: bool = True) -> Path:
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = weights(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, target / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    return target


@pytest.mark.parametrize(("dtype", "is_bin"), [("fp32", False), ("bf16", False), ("fp32", True)])
def test_tied_weights_are_untied_where_one_side_was_adapted(llama: Path, tmp_path: Path, dtype: str, is_bin: bool) -> None:
    base = in_pytorch_s_format(llama, tmp_path / "base") if is_bin else llama
    path = with_peft(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    about, said = merged(path, tmp_path / "out", dtype=dtype)
    assert about["untied"] == ["lm_head.weight"]
    assert about["compared"]["fp32_max_logit_difference"] < 1e-4
    assert "weights untied" in said[-1]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = weights(llama)["model.embed_tokens.weight"], weights(tmp_path / "out")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert torch.equal(after["lm_head.weight"], before.to(kind))
    matrices = load_file(path / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    expected = before + 2.0 * (matrices[prefix + "B"] @ matrices[prefix + "A"]).T  # alpha 8 over rank 4
    torch.testing.assert_close(after["model.embed_tokens.weight"], expected.to(kind))


def test_a_head_that_was_saved_whole_is_untied(llama: Path, tmp_path: Path) -> None:
    path = with_peft(llama, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    merged(path, tmp_path / "out")
    before, after = weights(llama)["model.embed_tokens.weight"], weights(tmp_path / "out")
    assert torch.equal(after["model.embed_tokens.weight"], before)
    torch.testing.assert_close(after["lm_head.weight"], 1.5 * before)


def make_gpt2(target: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = len(make_tokenizer(target, chat=True))
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=128)).save_pretrained(target)
    return target


def test_weights_that_lie_the_other_way_are_merged(tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "gpt2")
    path = with_peft(base, tmp_path / "adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)
    merged(path, tmp_path / "out")
    assert_as_by_peft(base, tmp_path, tmp_path / "out")


def make_mixtral(target: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    size = len(make_tokenizer(target, chat=True))
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
    )
    MixtralForCausalLM(config).save_pretrained(target)
    return target


def test_experts_keep_the_names_that_they_have_in_the_base_s_files(tmp_path: Path) -> None:
    base = make_mixtral(tmp_path / "mixtral")
    path = with_peft(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    merged(path, tmp_path / "out")
    assert_as_by_peft(base, tmp_path, tmp_path / "out")
    assert weights(base).keys() == weights(tmp_path / "out").keys()
    assert any("experts.3" in name for name in weights(tmp_path / "out"))


def test_a_base_in_shards_is_merged_into_shards(llama: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = Path(shutil.copytree(llama, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors")))
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    run_here(base, data, tmp_path / "run", max_steps=4)
    about, said = merged(tmp_path / "run", tmp_path / "out", max_shard=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert len(files) == 3
    largest = 2 * max(tensor.numel() for tensor in weights(base).values())
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= max(20_000, largest)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    expected = by_peft(base, tmp_path / "run").state_dict()
    got = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    assert all(torch.equal(got[name], expected[name].to(torch.bfloat16)) for name in got), "cast once, at the end"
    assert about["dtype"] == "bf16"
    assert about["compared"]["fp32_max_logit_difference"] < 1e-4 < about["compared"]["max_logit_difference"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "in bf16" in said[-1]


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_base_in_pytorch_s_own_format(llama: Path, data: Path, tmp_path: Path, is_zip: bool) -> None:
    base = in_pytorch_s_format(llama, tmp_path / "base", is_zip=is_zip)
    run_here(base, data, tmp_path / "run", max_steps=2)
    merged(tmp_path / "run", tmp_path / "out")
    assert_as_by_peft(base, tmp_path / "run", tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(llama).keys(), "what is tied is written once"


def make_bert(target: Path) -> Path:
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer(target, chat=False)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **SMALL)).save_pretrained(
        target
    )
    return target


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a head, its names without a prefix."""
    return make_bert(tmp_path_factory.mktemp("bases") / "bert")


def pictures(folder: Path) -> Path:
    from PIL import Image

    for number in range(12):
        name = "light" if number % 2 else "dark"
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (200 * (number % 2) + number,) * 3).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "image-classification"])
def test_a_head_comes_from_the_adapter_and_names_get_its_prefix(bert: Path, tmp_path: Path, task: str) -> None:
    if task == "image-classification":
        base, rows = make_vit(tmp_path / "vit", 16, num_labels=5), pictures(tmp_path / "pictures")
    else:
        base, rows = bert, write_jsonl(tmp_path / "data.jsonl", TEXTS if task == "text-classification" else WORDS)
    run_here(base, rows, tmp_path / "run", max_steps=6, task=task, validation_split=0.3)
    about, _ = merged(tmp_path / "run", tmp_path / "out")
    assert about["tensors"]["of the adapter"] == 2
    assert about["compared"]["fp32_max_logit_difference"] < 1e-5
    assert about["compared"]["whose"] == "held out by the run"
    model = assert_as_by_peft(base, tmp_path / "run", tmp_path / "out")
    model.save_pretrained(tmp_path / "by transformers")
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "by transformers").keys()
    card = Card.read(tmp_path / "run" / "adapter")
    assert tuple(model.config.id2label[number] for number in range(2)) == card.labels
    tasks.find(task).load_processor(tmp_path / "out")

    alone = Path(shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "adapter"))
    about, _ = merged(alone, tmp_path / "narrow", dtype="bf16")
    assert about["compared"]["whose"] == "built in"
    assert about["compared"]["rows"] >= 8
    assert {tensor.dtype for tensor in weights(tmp_path / "narrow").values()} == {torch.bfloat16}


def test_the_directory_is_a_whole_model_and_names_no_path_of_this_machine(llama: Path, data: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    (base / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    run_here(base, data, tmp_path / "run", max_steps=2)
    about, _ = merged(tmp_path / "run", tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merge.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((out / "config.json").read_text())
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {(base / "config.json").stat().st_mode & 0o777}
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config.get("use_cache", True)
    assert (out / "generation_config.json").read_text() == (base / "generation_config.json").read_text()
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (tmp_path / "run" / "adapter" / name).read_bytes()
    assert not [file.name for file in out.iterdir() if str(tmp_path).encode() in file.read_bytes()]
    assert json.loads((out / "merge.json").read_text()) == about
    assert about["adapter"]["adapter_model.safetensors"] == sha256(tmp_path / "run" / "adapter" / "adapter_model.safetensors")


def test_the_model_card_says_what_it_was_made_of(llama: Path, tmp_path: Path) -> None:
    import yaml

    snapshot = hub.Snapshot(llama, "lab/base", "a" * 40)
    path = with_peft(llama, tmp_path / "adapter", snapshot=snapshot, target_modules=["q_proj"])
    about, _ = merged(path, tmp_path / "out", base=llama)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("## Merge") == 1
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "lab/base"
    assert head["pipeline_tag"] == "text-generation"
    assert about["base"]["commit"] == "a" * 40
    for part in ("a" * 40, Card.read(path).fingerprint, sha256(path / "adapter_model.safetensors"), "built in", "100.00%"):
        assert part in text


def test_an_adapter_that_adds_nothing_is_said_to(trained: Path, llama: Path, tmp_path: Path) -> None:
    warning = "warning: all that the adapter adds is 0: what is written is the base as it is"
    assert warning not in merged(trained, tmp_path / "other")[1]
    path = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    tensors = load_file(path / "adapter_model.safetensors")
    zeros = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(zeros, path / "adapter_model.safetensors")
    assert warning in merged(path, tmp_path / "out")[1]
    assert all(torch.equal(tensor, weights(llama)[name]) for name, tensor in weights(tmp_path / "out").items())


# — what goes wrong ———————————————————————————————————————————————————————————————————————————————


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_scale_is_found_and_nothing_is_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    from peft.tuners.lora.layer import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.05 * right(self, name))
    with pytest.raises(MergeError, match=r"what is merged is not base and adapter: logits differ by .* in fp32"):
        merged(trained, tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_in_the_files_is_found(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(tensors: dict[str, torch.Tensor], *arguments: Any, **named: Any) -> None:
        save_file(tensors | {"model.norm.weight": -tensors["model.norm.weight"]}, *arguments, **named)

    monkeypatch.setattr("safetensors.torch.save_file", damaged)
    with pytest.raises(MergeError, match="is not base and adapter"):
        merged(trained, tmp_path / "out")
    with pytest.raises(MergeError, match=r"bf16 is too coarse .* the same in 0\.00% of"):
        merged(trained, tmp_path / "out", dtype="bf16")
    assert list(tmp_path.iterdir()) == []


def test_a_cast_that_changes_what_is_likeliest_is_refused(tmp_path: Path) -> None:
    """Of each two words one is likelier by a part in a thousand, which bf16 cannot tell."""
    base = make_llama(tmp_path / "base", tied=False)
    tensors = load_file(base / "model.safetensors")
    head = tensors["lm_head.weight"]
    head[1::2] = 1.001 * head[::2]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    path = with_peft(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(MergeError, match=r"bf16 is too coarse for this adapter: the likeliest is the same in \d+\.\d+% of"):
        merged(path, tmp_path / "out", dtype="bf16")
    merged(path, tmp_path / "out", dtype="fp32")


def test_what_does_not_fit_in_fp16_is_refused(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    path = with_peft(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(MergeError, match=r"model\.norm\.weight is not finite in fp16"):
        merged(path, tmp_path / "out", dtype="fp16")


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("layers.1.self_attn.q_proj", "layers.7.self_attn.q_proj"), r"layers\.7\.self_attn\.q_proj\.lora_A\.weight"),
        (without("layers.1.mlp.up_proj.lora_B"), r"the adapter lacks .*layers\.1\.mlp\.up_proj\.lora_B\.weight"),
        (without("layers.1.mlp.up_proj"), r"the adapter lacks .*layers\.1\.mlp\.up_proj\.lora_A\.weight"),
    ],
    ids=["no such module", "half a pair", "a module less"],
)
def test_an_adapter_that_does_not_fit_is_named(trained: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    save_file(change(load_file(path / "adapter_model.safetensors")), path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=message):
        merged(path, tmp_path / "out")


def test_a_head_that_is_not_in_the_adapter_is_named(bert: Path, tmp_path: Path) -> None:
    run_here(bert, write_jsonl(tmp_path / "data.jsonl", TEXTS), tmp_path / "run", max_steps=1, task="text-classification")
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    save_file(without("classifier.weight")(load_file(file)), file)
    with pytest.raises(ModelError, match=r"the adapter lacks .*classifier\.weight"):
        merged(tmp_path / "run", tmp_path / "out")


def test_a_part_that_the_base_lacks_is_in_the_adapter_or_is_named(bert: Path, tmp_path: Path) -> None:
    """A pooler that began at random in training: it was learnt whole, and is of no other load."""
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    save_file(without("pooler")(load_file(base / "model.safetensors")), base / "model.safetensors", metadata={"format": "pt"})
    rows = write_jsonl(tmp_path / "data.jsonl", TEXTS)
    run_here(base, rows, tmp_path / "run", max_steps=1, task="text-classification")
    merged(tmp_path / "run", tmp_path / "whole")
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    learnt = {name.rpartition(".pooler.")[2]: tensor for name, tensor in load_file(file).items() if ".pooler." in name}
    assert learnt
    for name, tensor in learnt.items():
        assert torch.equal(weights(tmp_path / "whole")[f"bert.pooler.{name}"], tensor)
    save_file(without("pooler")(load_file(file)), file)
    config = json.loads(file.with_name("adapter_config.json").read_text())
    file.with_name("adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["classifier"]}))
    with pytest.raises(
        ModelError, match=r"has no bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight: it would begin at random"
    ):
        merged(tmp_path / "run", tmp_path / "out")


def test_another_base_or_a_quantised_one_is_refused(llama: Path, trained: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match=r"is another base: model\.safetensors differs"):
        merged(trained, tmp_path / "out", base=other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    card = Card.of(hub.Snapshot(other), base_files(other), "text-generation", ())
    path = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    adapter.write_json(path / "base.json", asdict(card))
    with pytest.raises(ModelError, match="the base is quantised"):
        merged(path, tmp_path / "out")


def test_a_full_disk_is_told_of_before_anything_is_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(MergeError, match=r"takes [\d.]+ kB; 1 kB are free"):
        merged(trained, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


# — what is compared, and the command ——————————————————————————————————————————————————————————————


def test_rows_are_the_run_s_then_built_in_and_data_overrides(llama: Path, data: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copy(data, tmp_path / "mine.jsonl"))
    run_here(llama, moved, tmp_path / "run", max_steps=2)
    moved.unlink()
    about, said = merged(tmp_path / "run", tmp_path / "a")
    assert about["compared"]["whose"] == "built in"
    assert any("the run's rows cannot be read, so built-in ones are compared" in line for line in said)
    rows = write_jsonl(tmp_path / "rows.jsonl", FACTS[:3])
    about, _ = merged(tmp_path / "run" / "adapter", tmp_path / "b", rows=rows)
    assert (about["compared"]["rows"], about["compared"]["whose"]) == (3, "rows.jsonl")


def test_a_run_in_4_bits_is_merged_into_the_unquantised_base_which_is_said(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("load_in_4bit: false", "load_in_4bit: true"))
    _, said = merged(run, tmp_path / "out")
    assert any("QLoRA" in line and "unquantised base" in line for line in said)


def test_the_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["merge", str(trained), "--to", str(out), "--dtype", "bf16", "--max-shard", "40KB"]) == 0
    said = capsys.readouterr().out
    assert "largest difference of logits" in said
    assert "the likeliest is the same in" in said
    assert len(list(out.glob("*.safetensors"))) > 1
    assert cli.main(["merge", str(trained), "--to", str(out)]) == 1
    assert "it is there already" in capsys.readouterr().err
    assert cli.main(["merge", str(tmp_path), "--to", str(tmp_path / "b")]) == 2
    assert "neither a finished run nor an adapter" in capsys.readouterr().err


def test_what_was_merged_is_served_through_a_mirror_and_is_a_base(
    hub: HubProcess, mirror: MirrorProcess, trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neartune.hub import fetch

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    merged(trained, tmp_path / "out", max_shard=60_000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.repo("lab/merged").commit({file.name: file for file in (tmp_path / "out").iterdir()})
    found = fetch("lab/merged", "main", mirror.url, lambda line: None)
    here, there = weights(tmp_path / "out"), weights(found.path)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    result, _ = run_here(found.path, data, tmp_path / "again", max_steps=1)
    assert result["steps"] == 1


def make_large(target: Path) -> Path:
    """96 MB in one file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = len(make_tokenizer(target, chat=True))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(target)
    return target


MEMORY = """
import json, sys
from pathlib import Path
import torch
from neartune import tasks
from neartune.adapter import Card
from neartune.weights import make_plan, write

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

path, base, to = map(Path, sys.argv[1:])
card = Card.read(path)
tiny = make_plan(tasks.find(card.task), card, base, path, "auto")  # libraries are imported
to.mkdir()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmHWM")
plan = make_plan(tasks.find(card.task), card, base, path, "auto")
write(plan, to, 16_000_000)
print(json.dumps({"bytes": plan.bytes, "grown": status("VmHWM") - before}))
"""


def test_memory_is_that_of_a_shard_and_not_of_the_model(tmp_path: Path) -> None:
    base = make_large(tmp_path / "base")
    path = with_peft(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    command = [sys.executable, "-c", MEMORY, str(path), str(base), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["bytes"] > 90_000_000
    assert told["grown"] < 2 * 16_000_000 + 10_000_000
