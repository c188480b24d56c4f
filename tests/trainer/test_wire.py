"""Requests, whatever they are: a checked record, or a refusal that is the client's and says of what."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neartune.serving import wire
from neartune.serving.wire import Asked, Classified, Refused

USER = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"model": "a", "messages": [USER]}
PROMPT: dict[str, Any] = {"model": "a", "prompt": "hi"}
CLASSIFY: dict[str, Any] = {"model": "a", "input": "hi"}

TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1 << 63, True])
WORDS = st.sampled_from(["user", "system", "text", "none", "json_object", "\ud800"])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS | WORDS
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(TEXTS | st.sampled_from(["role", "content", "type", "text", "include_usage"]), inner, max_size=4)
    ),
    max_leaves=12,
)
KNOWN = ("model", "messages", "prompt", "input", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop")
NAMES = st.sampled_from([*KNOWN, "stream", *wire._IGNORED, *wire._NEUTRAL])
CHANGES = st.dictionaries(NAMES | TEXTS, VALUES, max_size=3)


def as_chat(body: Any) -> Any:
    return wire.asked(body, is_chat=True)


def as_prompt(body: Any) -> Any:
    return wire.asked(body, is_chat=False)


READERS = ((as_chat, CHAT, Asked), (as_prompt, PROMPT, Asked), (wire.classified, CLASSIFY, Classified))


@settings(max_examples=200, deadline=None)
@given(VALUES, CHANGES)
@example(None, {"messages": [{"role": ["user"], "content": "hi"}]})
@example(None, {"messages": [{"role": {"a": 1}, "content": "hi"}]})
@example(None, {"temperature": 10**400})
@example(None, {"top_p": -(10**400)})
def test_any_json_at_all_is_a_request_or_the_clients_fault(body: Any, change: dict[str, Any]) -> None:
    for read, plain, kind in READERS:
        for one in (body, plain | change):
            sent = json.dumps(one).encode()
            try:
                found = read(wire.parsed(sent))
            except Refused as refused:
                assert 400 <= refused.status < 500
                assert json.loads(json.dumps(refused.body))["error"]["type"] == "invalid_request_error"
            else:
                assert isinstance(found, kind)
                json.dumps(asdict(found), ensure_ascii=False).encode()  # no half characters, which no tokenizer takes


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40) | st.text('[]{}":,0123456789eE+-.\\u dDnulltrfas', max_size=40).map(str.encode))
@example(b"\xff\xfe\x00")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"1" * 5_000)
def test_any_bytes_at_all_are_json_or_the_clients_fault(body: bytes) -> None:
    try:
        wire.parsed(body)
    except Refused as refused:
        assert refused.status == 400


@pytest.mark.parametrize(
    ("read", "body", "param"),
    [
        (as_chat, CHAT | {"messages": [USER, {"role": ["user"], "content": "x"}]}, "messages[1].role"),
        (as_chat, CHAT | {"messages": [{"role": 3, "content": "x"}]}, "messages[0].role"),
        (as_chat, CHAT | {"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
        (as_chat, CHAT | {"messages": [{"content": "x"}]}, "messages[0].role"),
        (as_chat, CHAT | {"messages": [{"role": "user", "content": [3]}]}, "messages[0].content"),
        (as_chat, CHAT | {"messages": [{"role": "user"}]}, "messages[0].content"),
        (as_chat, CHAT | {"messages": ["hi"]}, "messages[0]"),
        (as_chat, CHAT | {"temperature": 10**400}, "temperature"),
        (as_chat, CHAT | {"stream": "yes"}, "stream"),
        (as_prompt, PROMPT | {"prompt": [1, 2]}, "prompt"),
        (wire.classified, CLASSIFY | {"input": [["a"], 3]}, "input"),
    ],
)
def test_what_is_wrong_is_named(read: Callable[[Any], Any], body: Any, param: str) -> None:
    with pytest.raises(Refused, match=rf"^{param.replace('[', '.').replace(']', '.')}:") as raised:
        read(body)
    assert (raised.value.status, raised.value.param) == (400, param)


def test_half_a_character_is_refused_and_a_whole_one_of_two_halves_is_not() -> None:
    with pytest.raises(Refused, match="half a character"):
        wire.parsed(rb'{"prompt": "\ud83d"}')
    with pytest.raises(Refused, match="no JSON"):
        wire.parsed(b'{"prompt": "\xed\xa0\xbd"}')
    assert wire.parsed(rb'{"prompt": "\ud83d\ude00"}') == {"prompt": "😀"}
