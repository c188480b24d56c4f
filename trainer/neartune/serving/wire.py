"""What is said over HTTP, in OpenAI's shapes: requests as checked records, errors, answers. Pure.

A setting that would change the answer and is not built is refused, never ignored; so is one that is not known.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neartune.decode import Piece

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options")
"""Settings that do not change the answer."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Settings that are not built, and the values with which that makes no difference; null is one for each."""
_STOPS = 4
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


class Refused(Exception):
    """An answer that says no. `fault`: OpenAI's type of error: invalid_request_error is the client's, server_error ours."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        fault = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": fault, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for text. `messages` of a chat, or `prompt`. `longest` None: as far as the model goes."""

    model: str
    messages: tuple[Mapping[str, str], ...]
    prompt: str
    longest: int | None
    temperature: float
    top_p: float
    seed: int | None
    stops: tuple[str, ...]
    is_stream: bool
    with_usage: bool


def parsed(body: bytes) -> Any:
    """JSON in whose texts all characters are whole: no tokenizer takes half of one. Raises Refused."""
    try:
        found = json.loads(body.decode())
        if _HALF.search(body):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused(400, "there is half a character (a lone surrogate) in a text of the body") from None
    except (ValueError, RecursionError) as exc:
        raise Refused(400, f"the body is no JSON: {exc}") from None
    return found


def asked(body: Any, *, is_chat: bool) -> Asked:
    """Raises Refused."""
    what = "messages" if is_chat else "prompt"
    known = {"model", what, "max_tokens", "temperature", "top_p", "seed", "stop", "stream"}
    if is_chat:
        known.add("max_completion_tokens")
    body = _object(body, known | {*_IGNORED, *_NEUTRAL})
    for name, values in _NEUTRAL.items():
        if body.get(name) is not None and not any(_is_same(body[name], value) for value in values):
            raise Refused(
                400, f"{name}: {body[name]!r:.80} is not built here: leave it out", param=name, code="unsupported_value"
            )
    longest = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    stream = _flag(body, "stream")
    options = body.get("stream_options")
    if options is not None and not stream:
        raise Refused(400, "stream_options: only with stream: true", param="stream_options")
    return Asked(
        model=_text(body, "model"),
        messages=_messages(body.get("messages")) if is_chat else (),
        prompt="" if is_chat else _prompt(body.get("prompt")),
        longest=_whole(body, longest, 1, 1 << 30) if body.get(longest) is not None else (None if is_chat else 16),
        temperature=_number(body, "temperature", 0, 2, 1),
        top_p=_number(body, "top_p", 0, 1, 1),
        seed=_whole(body, "seed", -(1 << 63), (1 << 63) - 1) if body.get("seed") is not None else None,
        stops=_stops(body.get("stop")),
        is_stream=stream,
        with_usage=_flag(_object(options, {"include_usage"}), "include_usage") if options is not None else False,
    )


@dataclass(frozen=True, slots=True)
class Classified:
    """A request for classes. `inputs`: texts, pairs of texts or lists of words; of images, bytes."""

    model: str
    inputs: tuple[Any, ...]


def classified(body: Any) -> Classified:
    """`input`: a text or a list of texts; where an item is a list itself, it is a pair of texts, or words. Raises Refused."""
    body = _object(body, {"model", "input", "user"})
    given = body.get("input")
    items = given if isinstance(given, list) else [given]
    if not items:
        raise Refused(400, "input: there is nothing in it", param="input")
    for item in items:
        words = item if isinstance(item, list) else [item]
        if not words or not all(isinstance(word, str) and word for word in words):
            raise Refused(400, f"input: a text, or a list of texts, is expected, not {item!r:.60}", param="input")
    return Classified(_text(body, "model"), tuple(items))


def image_bytes(item: Any) -> bytes:
    """Of a base64 data URL. Raises Refused."""
    head, comma, data = item.partition(",") if isinstance(item, str) else ("", "", "")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise Refused(400, "input: an image is expected as data:image/…;base64,…", param="input")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as exc:
        raise Refused(400, f"input: it is no base64: {exc}", param="input") from None


def _object(body: Any, known: set[str]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise Refused(400, f"an object is expected, not {body!r:.60}")
    strange = next((name for name in body if name not in known), None)
    if strange is not None:
        near = difflib.get_close_matches(str(strange), known, 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise Refused(400, f"{strange!r:.60} is not known here{hint}", param=str(strange), code="unknown_parameter")
    return body


def _is_same(value: Any, other: Any) -> bool:
    """1 is no True."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise Refused(400, f"{name}: a name is expected, not {value!r:.60}", param=name)
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise Refused(400, f"{name}: true or false is expected, not {value!r:.60}", param=name)


def _whole(body: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Refused(400, f"{name}: a whole number from {least} to {most} is expected, not {value!r:.60}", param=name)
    return value


def _number(body: Mapping[str, Any], name: str, least: float, most: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise Refused(400, f"{name}: a number from {least} to {most} is expected, not {value!r:.60}", param=name)
    return float(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > _STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(400, f"stop: a text, or at most {_STOPS} texts, are expected, not {value!r:.60}", param="stop")
    return tuple(stops)


def _prompt(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value:
        raise Refused(400, f"prompt: one text is expected, not {value!r:.60}", param="prompt")
    return value


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise Refused(400, f"messages: a list of {{role, content}} is expected, not {value!r:.60}", param="messages")
    found = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise Refused(400, f"{where}: {{role, content}} is expected, not {message!r:.60}", param=where)
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise Refused(400, f"{where}.role: one of {', '.join(_ROLES)} is expected", param=f"{where}.role")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise Refused(400, f"{where}.content: text is expected", param=f"{where}.content")
        found.append({"role": _ROLES[role], "content": "".join(map(str, texts))})
    return tuple(found)


# — answers ——————————————————————————————————————————————————————————————————————————————————————


@dataclass(frozen=True, slots=True)
class Head:
    """What all parts of an answer have in common. `model`: which it was, exactly."""

    id: str
    created: int
    model: str
    fingerprint: str
    is_chat: bool

    def around(self, choices: Sequence[Mapping[str, Any]], *, is_chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if self.is_chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
        }


def usage(prompt: int, count: int) -> dict[str, int]:
    """The token that ends an answer is one of it."""
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


def whole(head: Head, text: str, last: Piece, prompt: int) -> dict[str, Any]:
    said = {"message": {"role": "assistant", "content": text}} if head.is_chat else {"text": text}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": last.finish}
    return head.around([choice], is_chunk=False) | {"usage": usage(prompt, last.count)}


def first_chunk(head: Head) -> dict[str, Any] | None:
    if not head.is_chat:
        return None
    return head.around([_delta({"role": "assistant", "content": ""}, None)], is_chunk=True)


def chunks(head: Head, piece: Piece) -> list[dict[str, Any]]:
    """Of a piece; of one without text and end, none."""
    if not head.is_chat:
        choice = {"index": 0, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}
        return [head.around([choice], is_chunk=True)] if piece.text or piece.finish else []
    found = [_delta({"content": piece.text}, None)] if piece.text else []
    if piece.finish:
        found.append(_delta({}, piece.finish))
    return [head.around([choice], is_chunk=True) for choice in found]


def usage_chunk(head: Head, last: Piece, prompt: int) -> dict[str, Any]:
    return head.around([], is_chunk=True) | {"usage": usage(prompt, last.count)}


def _delta(delta: Mapping[str, str], finish: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
