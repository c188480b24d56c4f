"""How many tokens a model takes, told from its config, against what it does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neartune import decode, evaluate, tasks
from neartune.adapter import Card
from neartune.data import Row
from neartune.decode import limit_of
from neartune.hub import Snapshot
from neartune.model import base_files, choose_precision
from neartune.records import judge
from neartune.serving import classify

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SMALL_OPT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}


def config_of(kind: str, positions: int = 20, pad: int = 1) -> Any:
    from transformers import AutoConfig

    sizes = SMALL_OPT | {"word_embed_proj_dim": 16} if kind == "opt" else SMALL
    return AutoConfig.for_model(kind, **sizes, max_position_embeddings=positions, pad_token_id=pad)


@pytest.mark.parametrize(
    ("kind", "pad", "limit"),
    [
        *((kind, 3, 16) for kind in ("camembert", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl")),
        *((kind, 1, 18) for kind in ("roberta", "mpnet")),
        *((kind, 3, 20) for kind in ("bert", "electra", "gpt2", "opt")),
    ],
)
def test_a_model_takes_as_many_tokens_as_is_said_and_not_one_more(kind: str, pad: int, limit: int) -> None:
    from transformers import AutoModel

    config = config_of(kind, pad=pad)
    assert limit_of(config, None) == limit
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        assert model(input_ids=torch.full((1, limit), 7)).last_hidden_state.shape[1] == limit
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 7))


def test_every_base_of_these_tasks_that_counts_positions_from_its_padding_is_known() -> None:
    """By the sources of transformers: a learnt position for each number that create_position_ids_from_input_ids() gives."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    folder = Path(transformers.__file__).parent / "models"
    kinds = {
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        *auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }
    found = set()
    for kind in kinds:
        name = {"data2vec-text": "data2vec"}.get(kind, kind.replace("-", "_"))
        for file in (folder / name).glob("modeling_*.py"):
            text = file.read_text()
            if "create_position_ids_from_input_ids" in text and "Sinusoidal" not in text:
                found.add(kind)
    assert found == decode._FROM_PADDING


def test_a_tokenizer_may_take_less_than_the_positions_and_a_model_without_positions_has_no_end() -> None:
    config = config_of("roberta", positions=514)
    assert limit_of(config, SimpleNamespace(model_max_length=10**30)) == 512
    assert limit_of(config, SimpleNamespace(model_max_length=128)) == 128
    endless = SimpleNamespace(model_type="mamba", get_text_config=lambda: SimpleNamespace(model_type="mamba"))
    assert limit_of(endless, None) == decode._ENDLESS
    assert limit_of(endless, None, 1024) == 1024


def test_a_text_longer_than_a_roberta_takes_is_cut_before_it_is_classified(llama: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    task = tasks.find("text-classification")
    tokenizer = task.load_processor(llama)
    config = config_of("roberta", positions=34, pad=1)
    config.vocab_size, config.num_labels = len(tokenizer), 2
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ((told, count),) = classify.classes(model, task, ["why " * 60], tokenizer, ("no", "yes"))
    assert (count, set(told["probabilities"])) == (32, {"no", "yes"})


def test_a_row_longer_than_a_roberta_takes_is_not_judged_by(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    task = tasks.find("text-classification")
    tokenizer = task.load_processor(llama)
    config = config_of("roberta", positions=34)
    config.vocab_size, config.num_labels = len(tokenizer), 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    side = judge.Side("base", Card.of(Snapshot(tmp_path), base_files(tmp_path), task.name, ("no", "yes")), None, None)
    rows = [Row({"text": "!" * count, "label": "no"}, f"{count}") for count in (32, 33)]
    assert [len(tokenizer(row.values["text"])["input_ids"]) for row in rows] == [32, 33]
    fp32 = choose_precision("fp32", is_cuda=False, has_bf16=False)
    found = list(judge.row_scores(side, rows, tmp_path, fp32, torch.device("cpu"), 0, lambda line: None))
    assert isinstance(found[0], judge.Score)
    assert found[1] == "it is longer than a base takes"


def test_a_row_longer_than_the_model_takes_is_cut_whatever_max_length_says(opt: Path) -> None:
    task = tasks.find("text-generation")
    row = Row({"text": "why not " * 300}, "row")
    prepared = task.prepare([row], task.load_processor(opt), (), max_length=400, model_limit=160)
    assert [len(example["input_ids"]) for example in prepared.examples] == [160]
    assert prepared.counts["rows cut to 160 tokens"] == 1


def test_an_answer_in_training_goes_as_far_as_the_model_does(opt: Path) -> None:
    task = tasks.find("text-generation")
    model, tokenizer = task.load_model(opt, ()).eval(), task.load_processor(opt)
    model.generation_config.eos_token_id = None
    prompt = tokenizer.decode(tokenizer("why not " * 300)["input_ids"][:150])
    count = len(decode.chat_ids(tokenizer, [{"role": "user", "content": prompt}]))
    assert 140 < count < 160
    answer = evaluate.answer(model, tokenizer, prompt, 64)
    assert len(tokenizer(answer)["input_ids"]) <= 160 - count
    assert evaluate.answer(model, tokenizer, "why not " * 300, 64) == ""
