"""How a model answers: a token at a time, with a cache of its own for each answer, so that answers can take turns on one model.

Tokens are ids; text comes in pieces that are whole characters, and never runs into a stop sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neartune.tasks.generation import tokenize

_BROKEN = "�"
_ENDLESS = 1 << 30
_FROM_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Model types of transformers that count positions from the one after the padding token's id on: of 514, 512 can be used."""


class PromptError(Exception):
    """What was asked cannot be put to this model; the message says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """`longest`: tokens at most; `ends`: tokens that end an answer. `temperature` 0: always the likeliest. `top_p`: of the
    likeliest tokens, as many as together have this probability. `seed` None: another answer each time."""

    longest: int
    ends: frozenset[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


def tokens(model: Any, ids: Sequence[int], options: Options) -> Iterator[int]:
    """The answer to `ids`, its end token too. Which adapter is on may change between two tokens, if it is put back."""
    generator = torch.Generator()
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    fed, cache = list(ids), None
    for _ in range(options.longest):
        logits, cache = _step(model, fed, cache)
        token = choose(logits, options, generator)
        yield token
        if token in options.ends:
            return
        fed = [token]


@torch.no_grad()
def _step(model: Any, fed: Sequence[int], cache: Any) -> tuple[torch.Tensor, Any]:
    """((vocabulary,) fp32 logits of the next token, on the CPU; the cache with `fed` in it)."""
    inputs = torch.tensor([list(fed)], device=model.device)
    found = model(input_ids=inputs, cache=cache, use_cache=True, logits_to_keep=1)
    return found.logits[0, -1].float().cpu(), found.cache


def choose(logits: torch.Tensor, options: Options, generator: torch.Generator) -> int:
    """The next token."""
    if options.temperature == 0:
        return int(logits.argmax())
    shares = (logits.double() / options.temperature).softmax(-1)
    if options.top_p < 1:
        ordered, order = shares.sort(descending=True, stable=True)
        is_beyond = ordered.cumsum(-1) - ordered >= options.top_p
        is_beyond[0] = False  # with top_p 0 the likeliest is left
        shares[order[is_beyond]] = 0
    return int(torch.multinomial(shares, 1, generator=generator))


# — in ———————————————————————————————————————————————————————————————————————————————————————————


def limit_of(config: Any, processor: Any, otherwise: int = _ENDLESS) -> int:
    """Tokens that a sequence may have, for a model of `config`: as its positions and its tokenizer have it. `otherwise`: where
    the model has no positions."""
    text = config.get_text_config()
    positions = int(getattr(text, "max_position_embeddings", None) or otherwise)
    if text.model_type in _FROM_PADDING:
        positions -= text.pad_token_id + 1
    return int(min(positions, getattr(processor, "model_max_length", positions)))


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those of the base's generation_config."""
    known = model.generation_config.eos_token_id
    ends = known if isinstance(known, list) else [known]
    return frozenset(int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None)


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """What asks for the next message, as in training. A base without a chat template takes one question. Raises PromptError."""
    if tokenizer.chat_template:
        from jinja2 import TemplateError

        try:
            text = tokenizer.apply_chat_template([*map(dict, messages)], tokenize=False, add_generation_prompt=True)
        except TemplateError as exc:
            raise PromptError(f"the model's chat template does not take these messages: {exc}") from None
    elif [message["role"] for message in messages] == ["user"]:
        text = messages[0]["content"]
        text += "" if not text or text[-1].isspace() else "\n"
    else:
        raise PromptError("the model has no chat template: it takes a single message of the user's, or a plain completion")
    return text_ids(tokenizer, str(text), is_rendered=True)


def text_ids(tokenizer: Any, text: str, *, is_rendered: bool = False) -> list[int]:
    """Text as it is, with the mark of the beginning where training had one. Raises PromptError."""
    ids, _ = tokenize(text, [], tokenizer, is_rendered=is_rendered)
    if not ids:
        raise PromptError("there is nothing to answer: the text is empty")
    return ids


# — out ——————————————————————————————————————————————————————————————————————————————————————————


@dataclass(frozen=True, slots=True)
class Piece:
    """Of an answer. `count`: tokens so far; `finish`: "stop" or "length" in the last piece, None before."""

    text: str
    count: int
    finish: str | None = None


def pieces(found: Iterator[int], tokenizer: Any, options: Options, stops: Sequence[str] = ()) -> Iterator[Piece]:
    """Text of the tokens `found`, a piece for each, which may be empty: a character that is not whole yet is kept back, and so
    is what may be the beginning of one of `stops`, at which the answer ends."""
    text = _Text(tokenizer)
    kept, count, finish = "", 0, "length"
    for token in found:
        count += 1
        if token in options.ends:
            finish = "stop"
            break
        kept += text.add(token)
        at = min((place for place in map(kept.find, stops) if place >= 0), default=None)
        if at is not None:
            yield Piece(kept[:at], count, "stop")
            return
        free = len(kept) - _begun(kept, stops)
        yield Piece(kept[:free], count)
        kept = kept[free:]
    kept += text.rest()
    at = min((place for place in map(kept.find, stops) if place >= 0), default=len(kept))
    yield Piece(kept[:at], count, "stop" if at < len(kept) else finish)


def _begun(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that may begin a stop sequence."""
    most = min(len(text), max(map(len, stops), default=1) - 1)
    return next((n for n in range(most, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)


class _Text:
    """Tokens to text, as they come: the last few are decoded with those before them, since what a token is may depend on
    them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._ids = tokenizer, list[int]()
        self._first = self._next = 0

    def add(self, token: int) -> str:
        self._ids.append(token)
        return self._new(is_last=False)

    def rest(self) -> str:
        return self._new(is_last=True)

    def _new(self, *, is_last: bool) -> str:
        before = self._decoded(self._ids[self._first : self._next])
        now = self._decoded(self._ids[self._first :])
        if (now.endswith(_BROKEN) and not is_last) or not now.startswith(before):
            return ""
        if len(now) > len(before):
            self._first, self._next = self._next, len(self._ids)
        return now[len(before) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
