"""Which modules get an adapter, in which precision; and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neartune import checkpoint, loop, model, tasks
from neartune.data import Row
from neartune.evaluate import answers
from neartune.model import ModelError, base_files, choose_precision, fingerprint, resolve_targets
from neartune.prepare import Place, make_trainer
from tests.trainer.bases import FACTS, make_llama, recipe_of, write_jsonl

LINEAR = [f"model.layers.{n}.{part}" for n in (0, 1) for part in ("attn.q_proj", "attn.v_proj", "mlp.up_proj")]
LINEAR += ["lm_head", "classifier.dense"]
FP32 = choose_precision("fp32", is_cuda=False, has_bf16=False)


@pytest.mark.parametrize(
    ("asked", "kinds", "count"),
    [
        (["auto"], {"q_proj", "v_proj", "up_proj"}, 6),
        (["all-linear"], {"q_proj", "v_proj", "up_proj"}, 6),
        (["q_proj"], {"q_proj"}, 2),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}, 4),
        (["*.0.*"], {"q_proj", "v_proj", "up_proj"}, 3),
        ([r".*layers\.1\.attn\.(q|v)_proj"], {"q_proj", "v_proj"}, 2),
        (["layers.0.attn.q_proj", "up_proj"], {"q_proj", "up_proj"}, 3),
    ],
)
def test_targets(asked: list[str], kinds: set[str], count: int) -> None:
    got = resolve_targets(asked, LINEAR, ["classifier"])
    assert {name.rpartition(".")[2] for name in got} == kinds
    assert len(got) == count


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["q_prj"], "'q_prj' matches no module of this base; did you mean q_proj"),
        (["q_proj", "v_prj"], "'v_prj' matches no module of this base; did you mean v_proj"),
        (["zzzz"], "there are q_proj, up_proj, v_proj"),
        (["lm_head"], "'lm_head' is the head"),
        (["q_proj", "classifier.dense"], "is the head"),
        (["("], "matches no module"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_with_the_nearest_names(asked: list[str], message: str) -> None:
    with pytest.raises(ModelError, match="lora_targets") as caught:
        resolve_targets(asked, LINEAR, ["classifier"])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "is_cuda", "has_bf16", "name"),
    [
        ("auto", True, True, "bf16"),
        ("auto", True, False, "fp16"),
        ("auto", False, False, "fp32"),
        ("bf16", False, False, "bf16"),
        ("fp32", True, True, "fp32"),
    ],
)
def test_precision(asked: str, is_cuda: bool, has_bf16: bool, name: str) -> None:
    got = choose_precision(asked, is_cuda=is_cuda, has_bf16=has_bf16)
    assert (got.name, got.scales, got.autocast is None) == (name, name == "fp16", name == "fp32")


@pytest.mark.parametrize(("asked", "is_cuda"), [("fp16", False), ("bf16", True)])
def test_precisions_that_are_refused(asked: str, is_cuda: bool) -> None:
    with pytest.raises(ModelError, match=f"precision: {asked}"):
        choose_precision(asked, is_cuda=is_cuda, has_bf16=False)


def built(base: Path, tmp_path: Path, **settings: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    recipe = recipe_of(base, write_jsonl(tmp_path / "r.jsonl", FACTS), tmp_path, **settings)
    return model.build(recipe, tasks.find(recipe.task), base, (), settings.pop("at", FP32), said.append), said


def test_only_the_adapter_learns_in_fp32_whatever_the_base_is_in(llama: Path, tmp_path: Path) -> None:
    bf16 = choose_precision("bf16", is_cuda=False, has_bf16=False)
    recipe = recipe_of(llama, write_jsonl(tmp_path / "r.jsonl", FACTS), tmp_path)
    adapted = model.build(recipe, tasks.find(recipe.task), llama, (), bf16, lambda line: None)
    learning = model.learning(adapted)
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in learning)
    frozen = [parameter for parameter in adapted.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}


def test_what_is_adapted_is_said(llama: Path, tmp_path: Path) -> None:
    _, said = built(llama, tmp_path, lora_targets=["q_proj", "v_proj"])
    assert said[0].startswith("LoRA of rank 4 on 4 modules (q_proj, v_proj): ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"q_prj": 8}}, "rank_pattern: 'q_prj' matches none"),
        ({"alpha_pattern": {"lm_head": 8}}, "alpha_pattern: 'lm_head' matches none"),
    ],
)
def test_what_does_not_fit_the_base(llama: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        built(llama, tmp_path, **settings)


def test_patterns_dora_and_rslora_reach_peft(llama: Path, tmp_path: Path) -> None:
    adapted, _ = built(llama, tmp_path, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, dora=True, rslora=True)
    layer = adapted.base_model.model.model.layers[0].self_attn
    assert layer.q_proj.lora_A["default"].weight.shape[0] == 2
    assert layer.v_proj.scaling["default"] == pytest.approx(3 / 4**0.5)
    assert layer.k_proj.use_dora["default"]


def test_heads_are_trained_whole_and_get_no_adapter(llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(llama, write_jsonl(tmp_path / "r.jsonl", FACTS), tmp_path, task="text-classification")
    adapted = model.build(recipe, tasks.find(recipe.task), llama, ("a", "b"), FP32, lambda line: None)
    learning = [name for name, _ in model.learning(adapted)]
    assert [name for name in learning if "score" in name] == ["base_model.model.score.modules_to_save.default.weight"]
    assert adapted.config.id2label == {0: "a", 1: "b"}


def test_a_base_without_its_output_layer_cannot_generate(llama: Path, tmp_path: Path) -> None:
    """What would begin at random, and stay so, is no base."""
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(kept, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"files do not have .*model\.norm, which this task needs"):
        built(base, tmp_path)


def test_a_base_without_the_head_is_an_error(llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(llama, write_jsonl(tmp_path / "r.jsonl", FACTS), tmp_path)
    base = tasks.find(recipe.task).load_model(llama, (), dtype=torch.float32)
    with pytest.raises(ModelError, match="this base has no head that could learn: none of classifier"):
        model.adapt(base, recipe, ("classifier",), lambda line: None)


def test_gradient_checkpointing_changes_memory_not_gradients(llama: Path, tmp_path: Path) -> None:
    def gradient(**settings: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        adapted, _ = built(llama, tmp_path, lora_dropout=0, **settings)
        ids = torch.arange(20).view(2, 10)
        torch.autograd.backward(adapted.train()(input_ids=ids, labels=ids).loss)
        return [parameter.grad for name, parameter in model.learning(adapted) if "lora_B" in name]

    for one, two in zip(gradient(), gradient(gradient_checkpointing=True), strict=True):
        torch.testing.assert_close(one, two)


def test_a_fingerprint_is_of_weights_and_config_alone(llama: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other")
    assert base_files(other).keys() == {"config.json", "model.safetensors"}
    before = fingerprint(base_files(other))
    assert before == fingerprint(base_files(llama))
    (other / "tokenizer.json").write_text("{}")
    (other / "training_args.bin").write_bytes(b"x")
    assert fingerprint(base_files(other)) == before
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert fingerprint(base_files(other)) != before
    (other / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        base_files(other)


# — QLoRA: CUDA's branch against a stand-in for the loader, not run on a GPU —————————————————————


@pytest.mark.parametrize(
    ("is_cuda", "has_library", "message"),
    [
        (False, True, "load_in_4bit needs CUDA and bitsandbytes, and there is no CUDA here"),
        (True, False, r"load_in_4bit needs bitsandbytes, which is not installed: pip install 'nearhub\[qlora\]'"),
    ],
)
def test_4_bits_are_refused_where_they_cannot_be(is_cuda: bool, has_library: bool, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model.in_4bit(FP32, is_cuda=is_cuda, has_library=has_library)


def test_qlora_asks_for_nf4_and_what_learns_is_in_fp32(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = choose_precision("bf16", is_cuda=True, has_bf16=True)
    recipe = recipe_of(llama, write_jsonl(tmp_path / "r.jsonl", FACTS), tmp_path, load_in_4bit=True)
    task = tasks.find(recipe.task)
    asked: dict[str, Any] = {}

    def load(path: Path, labels: Any, **options: Any) -> Any:
        asked.update(options)
        return task.load_model(path, labels, dtype=options["dtype"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: name)
    said: list[str] = []
    adapted = model.build(recipe, dataclasses.replace(task, load_model=load), llama, (), bf16, said.append)
    assert asked == {
        "dtype": torch.bfloat16,
        "trust_remote_code": False,
        "device_map": {"": 3},
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
    }
    assert said[0].startswith("the base is in 4 bits")
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in model.learning(adapted))
    assert {parameter.dtype for parameter in adapted.parameters()} == {torch.float32}, "norms too"


# — torch.compile ————————————————————————————————————————————————————————————————————————————————


@pytest.mark.parametrize(
    ("is_cuda", "there", "more", "needs"),
    [
        (False, ["gcc"], {}, r"C\+\+ compiler on this machine's PATH \(g\+\+\)"),
        (False, ["g++"], {"CXX": "icpx"}, None),
        (False, ["icpx"], {"CXX": "icpx"}, None),
        (False, ["g++"], {}, None),
        (True, ["g++"], {}, r"C compiler on this machine's PATH \(gcc, clang\)"),
        (True, ["clang"], {}, None),
    ],
)
def test_compile_is_refused_without_a_compiler(
    tmp_path: Path, is_cuda: bool, there: list[str], more: dict[str, str], needs: str | None
) -> None:
    for name in there:
        (tmp_path / name).touch(0o755)
    environ = {"PATH": str(tmp_path)} | more
    if needs is None:
        model.refuse_uncompilable(environ, is_cuda=is_cuda)
    else:
        with pytest.raises(ModelError, match=f"compile: there is no {needs}"):
            model.refuse_uncompilable(environ, is_cuda=is_cuda)


def test_a_recipe_that_compiles_asks_for_a_compiler(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ModelError, match="compile: there is no"):
        built(llama, tmp_path, compile=True)


def test_compiled_steps_are_the_eager_ones_and_checkpoints_know_nothing_of_it(tmp_path: Path) -> None:
    """Traced and differentiated ahead of time, run by torch's own kernels: what the default backend adds takes a minute."""
    base = make_llama(tmp_path / "base", layers=1)
    data = write_jsonl(tmp_path / "r.jsonl", FACTS)
    place = Place(0, 1, torch.device("cpu"), None)

    def run(**settings: Any) -> tuple[list[float], set[str], Any]:
        recipe = recipe_of(base, data, tmp_path, lora_dropout=0.2, micro_batch_size=2, lora_targets=["q_proj"], **settings)
        task = tasks.find(recipe.task)
        processor = task.load_processor(base)
        torch.manual_seed(0)
        adapted = model.build(recipe, task, base, (), FP32, lambda line: None)
        trainer = make_trainer(recipe, task, adapted, processor, FP32, place, backend="aot_eager")
        trainer.micro = 2
        rows = [Row(row, f"r:{number}") for number, row in enumerate(FACTS)]
        prepared = task.prepare(rows, processor, (), max_length=None, model_limit=128)
        done = loop.steps(trainer, recipe, prepared.examples, prepared.wheres, first=0, total=4, applied=0)
        result = [step.loss for step in done]
        checkpoint.save(tmp_path / "checkpoints", trainer, checkpoint.Position(step=4))
        names = set(load_file(tmp_path / "checkpoints" / "step-000004" / "adapter.safetensors"))
        assert checkpoint.load(tmp_path / "checkpoints" / "step-000004", trainer).step == 4
        assert answers(trainer, ["What is 1 and 1?"], longest=2)
        return result, names, trainer.model

    expected, names, _ = run()
    calls = torch._dynamo.utils.counters
    calls.clear()
    got, compiled_names, adapted = run(compile=True)
    assert calls["stats"]["unique_graphs"] == 1, "rows of every length by one graph"
    assert not calls["graph_break"]
    assert got == pytest.approx(expected, rel=1e-4)
    assert compiled_names == names
    assert not [name for name in adapted.state_dict() if "_orig_mod" in name]
