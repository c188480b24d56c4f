"""Several rows in one sequence: how they are packed, that they do not see each other, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neartune import cli, loop, packing, tasks
from neartune.batch import pack
from neartune.model import ModelError
from neartune.prepare import find_place, prepare
from neartune.tasks import IGNORED
from neartune.tasks.generation import collate
from tests.trainer.bases import losses, make_tokenizer, recipe_of, run_here, settings_of, write_jsonl

ROWS = [{"prompt": f"Say it {n}", "completion": "ab " * (1 if n % 4 else 20)} for n in range(24)]
PACKED: dict[str, Any] = {"packing": True, "max_length": 96, "train_batch_size": 8, "micro_batch_size": 8, "lora_dropout": 0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def ready(data: Path, tmp_path: Path) -> Callable[..., Any]:
    """What stands before the first step, on a base."""

    def made(base: Path, **settings: Any) -> Any:
        recipe = recipe_of(base, data, tmp_path / "run", **PACKED | settings)
        return prepare(recipe, find_place(), None, "http://127.0.0.1:9", lambda line: None)

    return made


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 60))
def test_every_row_is_in_one_sequence_that_has_room_for_it(lengths: list[int], capacity: int) -> None:
    sequences = pack(lengths, capacity)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in sequence) <= capacity or len(sequence) == 1 for sequence in sequences)
    assert pack(lengths, capacity) == sequences
    used = [sum(lengths[row] for row in sequence) for sequence in sequences]
    for number, sequence in enumerate(sequences):
        for row in sequence:
            assert all(before + lengths[row] > capacity for before in used[:number]), "a sequence before it had room"


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 60), st.data())
def test_rows_of_some_sequences_are_packed_into_just_those(lengths: list[int], capacity: int, data: st.DataObject) -> None:
    sequences = [[lengths[row] for row in sequence] for sequence in pack(lengths, capacity)]
    kept = data.draw(st.lists(st.sampled_from(range(len(sequences))), unique=True)) if sequences else []
    some = [length for number in kept for length in sequences[number]]
    again = [[some[row] for row in sequence] for sequence in pack(some, capacity)]
    assert again == [sequences[number] for number in sorted(kept)]


@pytest.mark.parametrize(
    ("lengths", "capacity", "sequences"),
    [
        ([3, 9, 2, 7, 1], 10, [[1, 4], [3, 0], [2]]),
        ([4, 4, 4], 12, [[0, 1, 2]]),
        ([20, 3, 3], 10, [[0], [1, 2]]),
        ([2, 6, 6, 2, 4], 10, [[1, 4], [2, 0, 3]]),
        ([1, 1], 0, [[0], [1]]),
        ([], 10, []),
    ],
)
def test_the_longest_first_into_the_first_with_room(lengths: list[int], capacity: int, sequences: list[list[int]]) -> None:
    assert pack(lengths, capacity) == sequences


def test_positions_begin_anew_and_no_label_crosses_a_border(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, chat=True)
    end = tokenizer.eos_token_id
    examples = [
        {"input_ids": [11, 12], "labels": [11, 12]},
        {"input_ids": [21, 22, 23], "labels": [IGNORED, 22, 23]},
        {"input_ids": [31, 32, 33, 34], "labels": [31, 32, 33, 34]},
    ]
    batch = collate(examples, tokenizer, pack_to=6)
    assert batch["input_ids"].tolist() == [[31, 32, 33, 34, 11, 12], [21, 22, 23, end, end, end]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORED, 32, 33, 34, IGNORED, 12],
        [IGNORED, 22, 23, IGNORED, IGNORED, IGNORED],
    ]
    learnt = sum(label != IGNORED for row in batch["labels"][:, 1:].tolist() for label in row)
    assert learnt == sum(map(tasks.find("text-generation").weight, examples))


def test_packed_rows_learn_what_unpacked_rows_learn(llama: Path, data: Path, tmp_path: Path) -> None:
    options = PACKED | {"max_steps": 20, "eval_every": 20}
    _, said = run_here(llama, data, tmp_path / "packed", **options)
    run_here(llama, data, tmp_path / "unpacked", **options | {"packing": False})
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "unpacked"), rel=1e-4)
    assert len(losses(tmp_path / "packed")) == 20
    assert losses(tmp_path / "packed")[-1] < 0.95 * losses(tmp_path / "packed")[0]
    (line,) = [line for line in said if line.startswith("packing")]
    assert line.startswith("packing into sequences of 96 tokens: logits of two packed rows are each alone's to ")


def test_fewer_tokens_go_through_the_model(llama: Path, ready: Callable[..., Any]) -> None:
    trainer, rows = ready(llama).trainer, ready(llama).learnt.examples[:8]
    packed = trainer.collate(rows)["input_ids"]
    trainer.pack_to = 0
    unpacked = trainer.collate(rows)["input_ids"]
    assert len(packed) < len(unpacked) == 8
    assert packed.shape[1] <= 96
    assert packed.numel() < 0.7 * unpacked.numel()


def test_cuts_by_tokens_count_the_packed_sequences(llama: Path, ready: Callable[..., Any]) -> None:
    trainer, rows = ready(llama, micro_batch_by="tokens").trainer, ready(llama).learnt.examples
    parts = trainer.cuts(rows, 192)
    shapes = [trainer.collate(part)["input_ids"].shape for part in parts]
    assert all(sequences * longest <= 192 for sequences, longest in shapes)
    assert sum(map(len, parts)) == len(rows)
    assert [sequences for sequences, _ in shapes][:2] == [2, 2]
    assert len(parts[0]) + len(parts[1]) > 6


def test_the_probe_leaves_random_numbers_and_the_model_s_mode(llama: Path, ready: Callable[..., Any]) -> None:
    made = ready(llama, lora_dropout=0.5)
    state = torch.get_rng_state()
    packing.refuse_leaks(made.trainer, made.learnt.examples)
    assert torch.equal(torch.get_rng_state(), state)
    assert made.trainer.model.training


def test_rows_that_see_each_other_are_told_of_by_the_architecture_s_name(opt: Path, ready: Callable[..., Any]) -> None:
    with pytest.raises(
        ModelError, match=r"^packing: OPTForCausalLM does not keep the rows of one sequence apart: logits of two"
    ):
        ready(opt)
    assert ready(opt, packing=False).trainer.pack_to == 0


def test_opt_would_learn_otherwise(opt: Path, ready: Callable[..., Any]) -> None:
    """What it is refused for: the losses of packed rows are not those of the rows."""
    made = ready(opt, packing=False)
    trainer, rows = made.trainer, made.learnt.examples[:8]
    trainer.model.eval()
    with torch.no_grad():
        unpacked = float(trainer.loss_of(rows)[0])
        trainer.pack_to = 96
        assert abs(float(trainer.loss_of(rows)[0]) - unpacked) > 1e-4 * unpacked


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bloom_s_alibi_sees_the_row_before(tmp_path: Path, ready: Callable[..., Any], precision: str) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    tokenizer = make_tokenizer(tmp_path / "bloom", chat=True)
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    with pytest.raises(ModelError, match="BloomForCausalLM"):
        ready(tmp_path / "bloom", precision=precision)


def test_positions_that_count_on_from_row_to_row_are_refused_too(tmp_path: Path, ready: Callable[..., Any]) -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    tokenizer = make_tokenizer(tmp_path / "neo", chat=True)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128, "vocab_size": len(tokenizer)}
    config = GPTNeoConfig(**shape, attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=1)
    GPTNeoForCausalLM(config).save_pretrained(tmp_path / "neo")
    made = ready(tmp_path / "neo")
    positions = made.trainer.model.get_base_model().transformer.wpe
    positions.register_forward_pre_hook(lambda module, inputs: (torch.arange(inputs[0].shape[-1])[None],))
    with pytest.raises(ModelError, match="GPTNeoForCausalLM"):
        packing.refuse_leaks(made.trainer, made.learnt.examples)


def test_bf16_rounds_more_and_is_not_refused_for_it(llama: Path, ready: Callable[..., Any]) -> None:
    assert ready(llama, precision="bf16").trainer.pack_to == 96


@pytest.mark.parametrize(
    ("lengths", "room", "pair"),
    [([5, 9, 3, 7], 10, (3, 2)), ([5, 9, 3, 7], 12, (1, 2)), ([5, 9, 3, 7], 7, None), ([4], 99, None), ([5, 5], 10, (1, 0))],
)
def test_what_is_tried_is_the_longest_pair_with_room(lengths: list[int], room: int, pair: tuple[int, int] | None) -> None:
    assert packing.longest_pair(lengths, room) == pair


def test_sequences_are_of_the_longest_row_where_max_length_does_not_say(llama: Path, ready: Callable[..., Any]) -> None:
    made = ready(llama, max_length="auto")
    assert made.trainer.pack_to == max(len(example["input_ids"]) for example in made.learnt.examples) < 96


def test_rows_of_which_no_two_fit_are_not_packed(llama: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "alike.jsonl", [{"prompt": "a b", "completion": "c " * 9 + str(n)} for n in range(9)])
    _, said = run_here(llama, data, tmp_path / "run", packing=True, max_steps=1)
    (line,) = [line for line in said if line.startswith("packing")]
    assert line.startswith("packing: no two rows fit in ")


def test_a_refusal_is_an_error_of_the_recipe(opt: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = settings_of(tmp_path / "run", opt, data, ["packing=true", "max_length=96"])
    assert cli.main(arguments, verb="train") == 2
    assert "packing: OPTForCausalLM" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_out_of_memory_with_packing_halves_the_rows(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PACKED | {"max_steps": 3, "validation_split": 0}
    run_here(llama, data, tmp_path / "undisturbed", **options | {"micro_batch_size": 2})
    loss_of = loop.Trainer.loss_of

    def limited(trainer: loop.Trainer, examples: Any) -> Any:
        if len(examples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_of(trainer, examples)

    monkeypatch.setattr(loop.Trainer, "loss_of", limited)
    result, _ = run_here(llama, data, tmp_path / "run", **options)
    assert result["micro_batch"] == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
