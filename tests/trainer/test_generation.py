"""Masks by offsets for several templates, what is cut, what carries loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from neartune.data import DataError, Row
from neartune.decode import chat_ids, text_ids
from neartune.tasks import IGNORED
from neartune.tasks.generation import TASK, automatic_length, collate, cut, detect, prepare, weight
from tests.trainer.bases import CHATML, make_tokenizer

TALK = [
    {"role": "user", "content": "What is 2 and 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 and 3?"},
    {"role": "assistant", "content": "It is 6."},
]
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ASKED = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
OPEN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}" + ASKED
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}{{ 'assistant: …' + eos_token }}{% else %}"
    "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endif %}{% endfor %}" + ASKED
)
HIDING = "{{ messages | length }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
MARKED = (
    "{{ messages | length }}{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=False, begin=True)


def prepared(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> Any:
    numbered = [Row(values, f"a.jsonl:{number}") for number, values in enumerate(rows, 1)]
    return prepare(numbered, tokenizer, (), **{"max_length": None, "model_limit": 512} | options)


def learnt(example: dict[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in example["labels"] if label != IGNORED]))


@pytest.mark.parametrize(
    ("template", "expected", "count"),
    [
        (CHATML, "It is 4.<|im_end|>It is 6.<|im_end|>", None),
        (LLAMA2, " It is 4.<|im_end|> It is 6.<|im_end|>", None),
        (OPEN, "It is 4.It is 6.<|im_end|>", None),
        (FORGETFUL, "It is 6.<|im_end|>", "rows of which only the last answer is learnt: the chat template hides the others"),
        (MARKED, "It is 4.<|im_end|>It is 6.<|im_end|>", "rows masked by the template's own {% generation %} marks"),
        (HIDING, None, "rows refused: the chat template hides where the answers are"),
    ],
    ids=["chatml", "llama2", "open", "forgetful", "marked", "hiding"],
)
def test_only_the_answers_are_learnt(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, expected: str | None, count: str | None
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    got = prepared([{"messages": TALK}], tokenizer)
    assert [learnt(example, tokenizer) for example in got.examples] == ([expected] if expected else [])
    if count:
        assert got.counts[count] == 1
    if got.examples and template != OPEN:
        assert tokenizer.decode(got.examples[0]["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_the_mask_that_is_shown_is_the_mask(tokenizer: Any) -> None:
    shown = prepared([{"prompt": "Hi", "completion": "Ho"}], tokenizer).shown
    assert shown == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Ho<|im_end|>⟧\n"


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"prompt": "Hi ", "completion": "Ho"}, "<s>Hi Ho</s>", "Ho</s>"),
        ({"prompt": "Hi", "completion": "Ho"}, "<s>Hi\nHo</s>", "Ho</s>"),
        ({"question": "Hi", "answer": " Ho"}, "<s>Hi Ho</s>", " Ho</s>"),
        ({"instruction": "Add", "input": "1", "output": "2"}, "<s>Add\n\n1\n2</s>", "2</s>"),
        ({"instruction": "Add", "input": "", "output": "2"}, "<s>Add\n2</s>", "2</s>"),
        ({"text": "All of it"}, "<s>All of it</s>", "All of it</s>"),
    ],
)
def test_without_a_template(plain: Any, row: dict[str, str], text: str, answer: str) -> None:
    example = prepared([row], plain).examples[0]
    assert plain.decode(example["input_ids"]) == text
    assert learnt(example, plain) == answer


def test_other_names_for_roles(tokenizer: Any) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert learnt(prepared([{"conversations": talk}], tokenizer).examples[0], tokenizer) == "Ho<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "a message's role must be one of"),
        ({"messages": [{"role": "user", "content": "x"}]}, "there is no message of the assistant's"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "text is expected, not 3"),
        ({"messages": None, "x": 1}, "it has no messages"),
    ],
)
def test_a_bad_row_is_named(tokenizer: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        prepared([{"messages": TALK}] * 100 + [row], tokenizer)
    assert str(caught.value).startswith(f"a.jsonl:101: {message}")


def test_messages_need_a_template(plain: Any) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: the base has no chat template"):
        prepared([{"messages": TALK}], plain)


def test_the_format_is_that_of_all_first_rows() -> None:
    assert detect([Row({"prompt": "a", "completion": "b", "text": "c"}, "1")])[0] == "prompt and completion"
    with pytest.raises(DataError, match=r"a:1: the columns are completion, prompt, text; one of these is needed in every row"):
        detect([Row({"prompt": "a", "completion": "b"}, "a:1"), Row({"text": "c"}, "a:2")])


def test_too_long_is_cut_on_the_prompt_s_side(plain: Any) -> None:
    got = prepared([{"prompt": "far away " * 30, "completion": "near"}], plain, max_length=12)
    assert got.counts["rows cut to 12 tokens"] == 1
    assert len(got.examples[0]["input_ids"]) == 12
    assert learnt(got.examples[0], plain) == " near</s>"


def test_a_cut_leaves_a_token_before_the_first_that_is_learnt() -> None:
    ids, marks = cut([1, 2, 3, 4, 5, 6], [False, False, False, True, True, True], 3)
    assert (ids, marks) == ([3, 4, 5], [False, True, True])


def test_the_length_is_that_of_99_of_100_rows_at_most_the_model_s() -> None:
    assert automatic_length([10] * 99 + [500], 1024) == 10
    assert automatic_length([10] * 98 + [500] * 2, 1024) == 500
    assert automatic_length([10] * 98 + [500] * 2, 128) == 128
    assert automatic_length([], 128) == 128


def test_padding_is_masked_by_length_not_by_its_id(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    examples = [{"input_ids": [5, end], "labels": [IGNORED, end]}, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    batch = collate(examples, tokenizer)
    assert batch["input_ids"].tolist() == [[5, end, end], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, end, IGNORED], [5, 6, 7]]
    assert [weight(example) for example in examples] == [1, 2]


def test_the_loss_is_summed_over_what_is_learnt(llama: Path, tokenizer: Any) -> None:
    model = TASK.load_model(llama, (), dtype=torch.float32).eval()
    examples = prepared([{"prompt": "a", "completion": "b"}, {"prompt": "c d e f", "completion": "g h"}], tokenizer).examples
    with torch.no_grad():
        both, count, _ = TASK.forward(model, collate(examples, tokenizer))
        alone = [TASK.forward(model, collate([example], tokenizer))[0] for example in examples]
    assert count == sum(map(weight, examples))
    assert float(both) == pytest.approx(float(sum(alone)), rel=1e-5)


def test_a_template_that_refuses_a_row_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(tmp_path, chat=True)
    refusing = "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' }}" + CHATML
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    row = Row({"messages": [{"role": "system", "content": "Be kind."}, *TALK]}, "chat.jsonl:7")
    with pytest.raises(DataError, match=r"chat\.jsonl:7: System role not supported"):
        prepare([row], tokenizer, (), max_length=None, model_limit=512)


def test_plain_text_begins_as_the_tokenizer_has_it_though_there_is_a_chat_template(tmp_path: Path) -> None:
    """As of Gemma and Llama 3, whose tokenizers put the mark before a text and whose templates write it themselves."""
    tokenizer = make_tokenizer(tmp_path, chat=True, begin=True)
    begin, asking = tokenizer.bos_token_id, [{"role": "user", "content": "one"}]

    def ids(**values: str) -> list[int]:
        return list(prepare([Row(values, "1")], tokenizer, (), max_length=None, model_limit=512).examples[0]["input_ids"])

    tokenizer.chat_template = LLAMA2
    assert begin not in ids(text="one two"), "this tokenizer puts nothing before a text"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, begin)]
    )
    for template, count in ((LLAMA2, 0), ("{{ bos_token }}" + LLAMA2, 1)):
        tokenizer.chat_template = template
        learnt = ids(text="one two")
        assert (learnt[0], learnt.count(begin)) == (begin, 1)
        assert text_ids(tokenizer, "one two") == learnt[:-1], "what is asked plainly begins as what was learnt"
        assert chat_ids(tokenizer, asking).count(begin) == count, "a template's words are whole"
        assert ids(prompt="one", completion="two").count(begin) == count
