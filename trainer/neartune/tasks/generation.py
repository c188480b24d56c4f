"""Text generation: rows of chat, instruction, prompt and completion, or plain text; loss on what the model is to say.

The answers' places are found in the rendered text, which is then tokenised once and masked by offsets: whatever a template
does, the tokens are those that the model will see.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch.nn import functional

from neartune import tasks
from neartune.batch import pack
from neartune.data import DataError, Row
from neartune.tasks import IGNORED, Prepared, Task
from neartune.tasks.text import padded

FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("chat", ("messages",)),
    ("chat", ("conversations",)),
    ("instruction", ("instruction", "output")),
    ("prompt and completion", ("prompt", "completion")),
    ("prompt and completion", ("question", "answer")),
    ("plain text", ("text",)),
)
_LOOKED_AT = 100
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system", "tool": "tool"}

Span = tuple[int, int]


def detect(rows: Sequence[Row]) -> tuple[str, tuple[str, ...]]:
    """(format, its columns), from the first rows. Raises DataError."""
    first = rows[:_LOOKED_AT]
    for name, columns in FORMATS:
        if all(all(row.values.get(column) is not None for column in columns) for row in first):
            return name, columns
    found = ", ".join(sorted({column for row in first for column in row.values}))
    wanted = "; ".join(" + ".join(columns) for _, columns in FORMATS)
    raise DataError(f"{first[0].where}: the columns are {found}; one of these is needed in every row: {wanted}")


class Hidden(ValueError):
    """The chat template changes what came before, so that not all answers' places can be told. `last`: of the last, if its
    can."""

    def __init__(self, messages: list[dict[str, str]], text: str, last: list[Span]) -> None:
        super().__init__("the chat template hides where the answers are")
        self.messages, self.text, self.last = messages, text, last


def render(row: Row, kind: str, columns: Sequence[str], tokenizer: Any) -> tuple[str, list[Span]]:
    """The text of a row, and where in it the answers are. Raises DataError, naming the row, and Hidden."""
    try:
        missing = [column for column in columns if row.values.get(column) is None]
        if missing:
            raise ValueError(f"it has no {' and no '.join(missing)}")
        match kind:
            case "chat":
                return _chat(_messages(row.values[columns[0]]), tokenizer)
            case "plain text":
                text = _is_text(row.values["text"]) + (tokenizer.eos_token or "")
                return text, [(0, len(text))]
            case "instruction":
                asked = _is_text(row.values["instruction"])
                if row.values.get("input"):
                    asked += "\n\n" + _is_text(row.values["input"])
                answer = _is_text(row.values["output"])
            case _:
                asked, answer = (_is_text(row.values[column]) for column in columns)
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            return _chat(messages, tokenizer)
        separator = "" if not asked or asked[-1].isspace() or answer[:1].isspace() else "\n"
        prompt = asked + separator
        text = prompt + answer + (tokenizer.eos_token or "")
        return text, [(len(prompt), len(text))]
    except Hidden:
        raise
    except (TypeError, ValueError, TemplateError) as exc:  # a template may refuse a role, or an order of roles
        raise DataError(f"{row.where}: {exc}") from None


def _is_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text is expected, not {value!r:.60}")
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list of {role, content}")
    messages = []
    for message in value:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        if role not in _ROLES:
            raise ValueError(f"a message's role must be one of {', '.join(sorted(set(_ROLES)))}, not {role!r}")
        messages.append({"role": _ROLES[role], "content": _is_text(message.get("content", message.get("value")))})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no message of the assistant's: nothing to learn")
    return messages


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[str, list[Span]]:
    if not tokenizer.chat_template:
        raise ValueError("the base has no chat template: give prompt and completion instead of messages")

    def rendered(some: list[dict[str, str]], **options: Any) -> str:
        return str(tokenizer.apply_chat_template(some, tokenize=False, **options))

    text = rendered(messages)
    spans = []
    is_hidden = False
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = rendered(messages[:number], add_generation_prompt=True)
        upto = rendered(messages[: number + 1])
        if text.startswith(before) and text.startswith(upto):
            spans.append((len(before), len(upto.rstrip())))
        elif number == len(messages) - 1 and text.startswith(before):
            spans.append((len(before), len(text.rstrip())))
        else:
            is_hidden = True
    if is_hidden:
        raise Hidden(messages, text, [span for span in spans if span[1] == len(text.rstrip())])
    if text.rstrip().endswith(messages[-1]["content"].rstrip()) and messages[-1]["role"] == "assistant":
        # The template closes no answer: the end has to be learnt all the same.
        end = len(text.rstrip())
        text = text[:end] + (tokenizer.eos_token or "")
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def prepare(
    rows: Sequence[Row],
    tokenizer: Any,
    labels: Sequence[str],
    *,
    max_length: int | None,
    model_limit: int,
    format_of: tuple[str, tuple[str, ...]] | None = None,
) -> Prepared:
    """Examples of `rows`. Longer than `max_length` (None: as the data and the model say): cut on the prompt's side."""
    kind, columns = format_of or detect(rows)
    prepared = Prepared()
    prepared.counts[f"format: {kind} ({' + '.join(columns)})"] = len(rows)
    encoded = []
    for row in rows:
        try:
            text, spans = render(row, kind, columns, tokenizer)
            ids, marks = tokenize(text, spans, tokenizer, is_rendered=kind != "plain text")
        except Hidden as exc:
            ids, marks = _by_generation_marks(exc.messages, tokenizer)
            if any(marks):
                prepared.count("rows masked by the template's own {% generation %} marks")
            elif exc.last:
                ids, marks = tokenize(exc.text, exc.last, tokenizer)
                prepared.count("rows of which only the last answer is learnt: the chat template hides the others")
            else:
                prepared.count("rows refused: the chat template hides where the answers are")
                continue
        if not any(marks[1:]):
            prepared.count("rows without a token to learn")
            continue
        encoded.append((ids, marks, row))
        if not prepared.shown:
            prepared.shown = shown(ids, marks, tokenizer)
    limit = min(max_length or automatic_length([len(ids) for ids, _, _ in encoded], model_limit), model_limit)
    for ids, marks, row in encoded:
        if len(ids) > limit:
            ids, marks = cut(ids, marks, limit)
            prepared.count(f"rows cut to {limit} tokens")
        if not any(marks[1:]):
            prepared.count("rows whose answer was cut off")
            continue
        targets = [token if mark else IGNORED for token, mark in zip(ids, marks, strict=True)]
        prepared.add({"input_ids": ids, "labels": targets}, row)
    return prepared


def _by_generation_marks(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """By what the template itself marks as the assistant's; nothing is marked if it has no such marks."""
    if not re.search(r"{%-?\s*generation\b", tokenizer.chat_template):
        return [], []
    encoding = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return list(encoding["input_ids"]), [bool(mark) for mark in encoding["assistant_masks"]]


def automatic_length(lengths: Sequence[int], model_limit: int) -> int:
    """The smaller of what the model takes and of what all but a hundredth of the rows need."""
    if not lengths:
        return model_limit
    ordered = sorted(lengths)
    return max(8, min(model_limit, ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]))


def tokenize(text: str, spans: Sequence[Span], tokenizer: Any, *, is_rendered: bool = True) -> tuple[list[int], list[bool]]:
    """(ids, whether each is learnt). The text is whole, but for the mark of the beginning: that is put before what no chat
    template rendered. `is_rendered`: by the template, if there is one; plain text, of which it knows nothing, has the mark if
    the tokenizer itself gives it to a text."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = [
        any(start < stop and begin < stop and end > start for start, stop in spans) and end > begin
        for begin, end in encoding["offset_mapping"]
    ]
    ids = list(encoding["input_ids"])
    begin = tokenizer.bos_token_id
    if (
        begin is not None
        and ids[:1] != [begin]
        and (not tokenizer.chat_template or (not is_rendered and tokenizer("")["input_ids"][:1] == [begin]))
    ):
        ids, marks = [begin, *ids], [False, *marks]
    return ids, marks


def cut(ids: list[int], marks: list[bool], limit: int) -> tuple[list[int], list[bool]]:
    """To `limit` tokens, from the prompt's side up to the token before the first answer, then from the end."""
    drop = min(len(ids) - limit, max(0, marks.index(True) - 1))
    return ids[drop:][:limit], marks[drop:][:limit]


def shown(ids: Sequence[int], marks: Sequence[bool], tokenizer: Any) -> str:
    """The text, with what is learnt in ⟦ ⟧."""
    text = ""
    is_open = False
    run: list[int] = []
    for token, mark in [*zip(ids, marks, strict=True), (0, None)]:
        if mark is not is_open and run:
            piece = tokenizer.decode(run)
            text += f"⟦{piece}⟧" if is_open else piece
            run = []
        is_open = bool(mark)
        run.append(token)
    return text


def load_processor(path: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.is_fast:
        raise DataError("the base's tokenizer gives no offsets: only bases with a tokenizer.json can be adapted")
    return tokenizer


def load_model(path: Path, labels: Sequence[str], **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = tasks.load_model(AutoModelForCausalLM, path, **options)
    model.config.use_cache = False
    return model


def collate(examples: Sequence[Mapping[str, Any]], processor: Any, pack_to: int = 0) -> dict[str, torch.Tensor]:
    """(rows, longest) tensors, padded on the right with the end token. `pack_to`: several rows in one sequence of at most so
    many tokens."""
    if pack_to:
        return _packed(examples, processor, pack_to)
    return padded(examples, processor.eos_token_id if processor.eos_token_id is not None else 0)


def _packed(examples: Sequence[Mapping[str, Any]], processor: Any, capacity: int) -> dict[str, torch.Tensor]:
    """(sequences, longest) tensors. Positions begin anew with each row, by which transformers tells rows apart where no mask is
    given (masking_utils.find_packed_sequence_indices); each token of padding is at 0, a row of its own. A row's first token is
    no label: the row before must not learn to foretell it."""
    lengths = [len(example["input_ids"]) for example in examples]
    sequences = pack(lengths, capacity)
    shape = (len(sequences), max(sum(lengths[row] for row in sequence) for sequence in sequences))
    ids = torch.full(shape, processor.eos_token_id if processor.eos_token_id is not None else 0)
    labels = torch.full(shape, IGNORED)
    positions = torch.zeros(shape, dtype=torch.long)
    for number, sequence in enumerate(sequences):
        start = 0
        for row in sequence:
            end = start + lengths[row]
            ids[number, start:end] = torch.tensor(examples[row]["input_ids"])
            labels[number, start + 1 : end] = torch.tensor(examples[row]["labels"][1:])
            positions[number, start:end] = torch.arange(lengths[row])
            start = end
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def forward(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int, None]:
    """(summed loss over the learnt tokens, how many they are, nothing)."""
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    targets = batch["labels"][:, 1:]
    loss = functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="sum")
    return loss, int((targets != IGNORED).sum()), None


def weight(example: Mapping[str, Any]) -> int:
    """Learnt tokens of one example, as forward() counts them."""
    return sum(label != IGNORED for label in example["labels"][1:])


def measure(loss: float, predictions: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
    """`loss` is the mean over learnt tokens, in nats."""
    return {"loss": loss, "perplexity": math.exp(min(loss, 80.0))}


def no_labels(rows: Sequence[Row]) -> tuple[str, ...]:
    return ()


TASK = Task(
    name="text-generation",
    auto="AutoModelForCausalLM",
    load_processor=load_processor,
    find_labels=no_labels,
    prepare=prepare,
    load_model=load_model,
    collate=collate,
    forward=forward,
    weight=weight,
    measure=measure,
)
