"""`neartune serve` over real sockets, asked by aiohttp and by OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import torch
from aiohttp import web

from neartune import cli
from neartune.data import DataError
from neartune.decode import PromptError
from neartune.model import ModelError
from neartune.records import registry
from neartune.serving import serve
from tests.trainer import served
from tests.trainer.bases import TRAINER, environment
from tests.trainer.served import QUESTION, alone, generated

NAMES = ("a", "ab", "a.b")
CHAT = {"model": "a", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="session")
def runs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.made_runs(llama, tmp_path_factory)


@pytest.fixture(scope="session")
def classes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.made_classes(llama, tmp_path_factory)


@pytest.fixture(scope="module")
def endless(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of one run, whose base never ends an answer."""
    base = served.endless(tmp_path_factory.mktemp("bases") / "endless")
    home = tmp_path_factory.mktemp("endless")
    served.moved(runs / "a", base, home / "a")
    return home


class Server:
    """In this process and loop, on a port of its own."""

    def __init__(self, homes: Sequence[Path], **options: Any) -> None:
        self.loaded = asyncio.Event()
        self.app = serve.application(homes, "http://127.0.0.1:9", self._say, **options)

    def _say(self, line: str) -> None:
        if "is loaded" in line:
            self.loaded.set()

    async def __aenter__(self) -> Server:
        self._runner, self.url = await serve.listen(self.app, "127.0.0.1", 0)
        self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def ask(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        given = {"json": body} if body is not None else {}
        method = "GET" if body is None and "data" not in options else "POST"
        async with self._session.request(method, f"{self.url}{path}", **given, **options) as response:
            return response.status, json.loads(await response.read())

    async def chat(self, **settings: Any) -> Any:
        status, found = await self.ask("/v1/chat/completions", CHAT | settings)
        assert status == 200, found
        return found

    def post(self, path: str, body: Any) -> Any:
        return self._session.post(f"{self.url}{path}", json=body)

    async def read(self, path: str, body: Any) -> bytes:
        async with self.post(path, body) as response:
            found: bytes = await response.read()
            return found

    async def events(self, path: str, body: Any) -> list[Any]:
        """Of a stream, which must end with [DONE]."""
        async with self.post(path, body | {"stream": True}) as response:
            assert (response.status, response.content_type) == (200, "text/event-stream")
            found = (await response.text()).split("\n\n")
        assert found[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in found[:-2]]


@pytest_asyncio.fixture
async def server(runs: Path) -> AsyncIterator[Server]:
    async with Server([runs]) as server:
        yield server


def said(home: Path, llama: Path, name: str, longest: int = 24) -> tuple[str, int]:
    """(text, tokens) of transformers' own answer."""
    model, tokenizer = alone(home / name, llama)
    ids = generated(model, tokenizer, QUESTION, longest)
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids)


def text_of(events: Sequence[Any]) -> str:
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


# — text —————————————————————————————————————————————————————————————————————————————————————————


async def test_an_answer_is_what_transformers_generates_streamed_or_not(server: Server, runs: Path, llama: Path) -> None:
    text, count = said(runs, llama, "a", 20)
    found = await server.chat(max_tokens=20)
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": text}
    _, tokenizer = alone(runs / "a", llama)
    asked = tokenizer.apply_chat_template(CHAT["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
    usage = {"prompt_tokens": len(asked), "completion_tokens": count, "total_tokens": len(asked) + count}
    assert found["usage"] == usage
    assert (found["object"], found["model"]) == ("chat.completion", "a")
    assert choice["finish_reason"] == ("length" if count == 20 else "stop")
    body = CHAT | {"max_completion_tokens": 20, "stream_options": {"include_usage": True}}
    events = await server.events("/v1/chat/completions", body)
    assert text_of(events) == text
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]][-1] == choice["finish_reason"]
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], usage)
    assert len({event["id"] for event in events}) == 1 and {event["object"] for event in events} == {"chat.completion.chunk"}


async def test_a_completion_goes_on_with_its_prompt_streamed_or_not(server: Server, runs: Path, llama: Path) -> None:
    model, tokenizer = alone(runs / "a", llama)
    prompt = "What is 2 and 3?"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [2, tokenizer.eos_token_id]}
    with torch.no_grad():
        told = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    text = tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True)
    body = {"model": "a", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    status, found = await server.ask("/v1/completions", body)
    assert (status, found["object"], found["choices"][0]["text"]) == (200, "text_completion", text)
    events = await server.events("/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in events) == text


async def test_answers_at_once_are_what_each_is_alone(server: Server, runs: Path, llama: Path) -> None:
    names = [*NAMES, "base:a"] * 2
    at_once = await asyncio.gather(*(server.events("/v1/chat/completions", CHAT | {"model": name}) for name in names))
    texts = dict(zip(names, map(text_of, at_once), strict=True))
    assert [text_of(events) for events in at_once[:4]] == [text_of(events) for events in at_once[4:]]
    assert {name: texts[name] for name in NAMES} == {name: said(runs, llama, name)[0] for name in NAMES}
    assert texts["base:a"] == (await server.chat(model="base:a"))["choices"][0]["message"]["content"]
    assert len(set(texts.values())) == 4


async def test_an_answer_ends_at_a_stop_sequence_at_its_end_or_by_length(server: Server) -> None:
    whole = (await server.chat(model="base:a", max_tokens=12))["choices"][0]
    assert whole["finish_reason"] == "length"
    text = whole["message"]["content"]
    stop = text[3:5]
    cut = (await server.chat(model="base:a", max_tokens=12, stop=[stop, "never"]))["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (text[: text.index(stop)], "stop")
    for longest in (None, 10**6):
        to_the_end = await server.chat(model="base:a", max_tokens=longest)
        assert to_the_end["choices"][0]["finish_reason"] == "length"
        assert to_the_end["usage"]["total_tokens"] == 128  # the context of the base


async def test_a_seed_makes_an_answer_again(server: Server) -> None:
    sampled = {"model": "base:a", "temperature": 1.3, "max_tokens": 20}
    texts = [(await server.chat(**sampled, seed=seed))["choices"][0]["message"]["content"] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "abb"}, 404, "there is no model 'abb': did you mean ab"),
        ({"model": "../a"}, 404, "there is no model"),
        ({"model": None}, 400, "model: a name is expected"),
        ({"messages": None}, 400, "messages: a list of {role, content} is expected"),
        ({"messages": []}, 400, "messages: a list of {role, content} is expected"),
        ({"messages": ["hi"]}, 400, "messages[0]: {role, content} is expected"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, 400, "messages[0].role: one of"),
        ({"messages": [{"role": "boss", "content": "hi"}]}, 400, "messages[0].role: one of"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content: text is expected"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content: text is expected"),
        ({"messages": [{"role": "user", "content": "why " * 200}]}, 400, "this model takes 128 tokens, and the question has"),
        ({"max_tokens": 0}, 400, "max_tokens: a whole number from 1"),
        ({"max_tokens": 1.5}, 400, "max_tokens: a whole number from 1"),
        ({"max_tokens": True}, 400, "max_tokens: a whole number from 1"),
        ({"temperature": -1}, 400, "temperature: a number from 0 to 2"),
        ({"temperature": "hot"}, 400, "temperature: a number from 0 to 2"),
        ({"top_p": 1.1}, 400, "top_p: a number from 0 to 1"),
        ({"seed": "x"}, 400, "seed: a whole number"),
        ({"stop": ["a"] * 5}, 400, "stop: a text, or at most 4 texts"),
        ({"stop": [""]}, 400, "stop: a text, or at most 4 texts"),
        ({"stream": "yes"}, 400, "stream: true or false"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options: only with stream: true"),
        (
            {"stream": True, "stream_options": {"include_usag": True}},
            400,
            "'include_usag' is not known here: did you mean include_usage?",
        ),
        ({"n": 2}, 400, "n: 2 is not built"),
        ({"logprobs": True}, 400, "logprobs: True is not built"),
        ({"tools": [{"type": "function"}]}, 400, "tools: "),
        ({"response_format": {"type": "json_object"}}, 400, "response_format: "),
        ({"max_token": 3}, 400, "'max_token' is not known here: did you mean max_tokens?"),
    ],
)
async def test_a_wrong_request_is_told_what_is_wrong_in_openais_shape(
    server: Server, change: dict[str, Any], status: int, message: str
) -> None:
    found, body = await server.ask("/v1/chat/completions", CHAT | change)
    assert found == status and message in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error" and set(body["error"]) == {"message", "type", "param", "code"}
    assert not server.app[serve._POOL].held or status == 400


@pytest.mark.parametrize(
    ("data", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "the body is no JSON"),
        (b"[1]", "application/json", 400, "an object is expected"),
        (b"[" * 100_000, "application/json", 400, "the body is no JSON"),
        (b"{}", "text/plain", 415, "the body must be application/json"),
        (b" " * (serve.BODY + 1), "application/json", 413, "the request is larger than 2,097,152 bytes"),
    ],
)
async def test_a_body_that_is_no_request_is_refused(server: Server, data: bytes, kind: str, status: int, message: str) -> None:
    found, body = await server.ask("/v1/chat/completions", data=io.BytesIO(data), headers={"Content-Type": kind})
    assert found == status and message in body["error"]["message"]


async def test_a_path_that_is_not_there_names_those_that_are(server: Server) -> None:
    status, body = await server.ask("/v1/embeddings", {})
    assert status == 404 and "POST /v1/chat/completions" in body["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 503, "server_error"),
        (MemoryError(), 503, "server_error"),
        (RuntimeError("x"), 500, "server_error"),
        (ModelError("x"), 500, "server_error"),
        (PromptError("x"), 400, "invalid_request_error"),
        (DataError("x"), 400, "invalid_request_error"),
    ],
)
def test_an_error_says_whose_fault_it_is(error: Exception, status: int, kind: str) -> None:
    refused = serve.refusal(error)
    assert (refused.status, refused.body["error"]["type"]) == (status, kind)


# — who goes away, and who may not come ——————————————————————————————————————————————————————————


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_goes_away_ends_its_answer(endless: Path, is_stream: bool) -> None:
    async with Server([endless]) as server:
        body = CHAT | {"model": "base:a", "max_tokens": 2_000}
        task = asyncio.create_task(server.read("/v1/chat/completions", body | {"stream": is_stream}))
        await server.loaded.wait()
        (held,) = server.app[serve._POOL].held.values()
        worker = await held.ready
        await asyncio.to_thread(worker.wait, lambda: worker.steps >= 3)
        task.cancel()
        await asyncio.to_thread(worker.wait_idle)
        assert 3 <= worker.steps < 2_000


async def test_with_a_token_nothing_but_health_is_answered_without_it(runs: Path) -> None:
    async with Server([runs], token="geheim") as server:
        for headers in ({}, {"Authorization": "Bearer geheimer"}, {"Authorization": "geheim"}):
            status, body = await server.ask("/v1/models", headers=headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert (await server.ask("/v1/models", headers={"Authorization": "Bearer geheim"}))[0] == 200
        assert (await server.ask("/healthz"))[0] == 200


FOREIGN = [
    ({"Host": "evil.example:{port}"}, "is no name of this server"),
    ({"Host": "box.lan.evil.example"}, "is no name of this server"),
    ({"Sec-Fetch-Site": "cross-site"}, "a web page of another origin asks (Sec-Fetch-Site: cross-site)"),
    ({"Sec-Fetch-Site": "same-site"}, "a web page of another origin asks"),
    ({"Origin": "http://evil.example"}, "a web page of another origin asks (Origin: http://evil.example)"),
    ({"Origin": "null"}, "a web page of another origin asks"),
]


@pytest.mark.parametrize(("headers", "message"), FOREIGN)
async def test_without_a_token_no_web_page_uses_up_the_machine(headers: dict[str, str], message: str, tmp_path: Path) -> None:
    async with Server([tmp_path], names=["box.lan"]) as server:
        port = server.url.rpartition(":")[2]
        given = {name: value.format(port=port) for name, value in headers.items()}
        form = aiohttp.FormData({"model": "a"})
        form.add_field("input", b"", filename="a.png")
        for path, options in (("/v1/models", {}), ("/healthz", {}), ("/v1/classify", {"data": form})):
            status, body = await server.ask(path, headers=given, **options)
            assert status == 403 and message in body["error"]["message"], (path, body)
            assert body["error"]["code"] == "host"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost:{port}"},
        {"Host": "10.0.0.7"},
        {"Host": "[::1]:{port}"},
        {"Host": "BOX.lan:{port}"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1:{port}"},
    ],
)
async def test_programs_ask_by_address_localhost_or_a_name_that_was_given(headers: dict[str, str], tmp_path: Path) -> None:
    async with Server([tmp_path], names=["box.lan"]) as server:
        port = server.url.rpartition(":")[2]
        given = {name: value.format(port=port) for name, value in headers.items()}
        assert (await server.ask("/v1/models", headers=given))[0] == 200


def test_the_names_of_host_and_allow_host_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    async def once(app: web.Application, host: str, port: int, say: Any) -> None:
        runner, url = await serve.listen(app, "127.0.0.1", port)
        async with aiohttp.ClientSession() as session:
            for name in ("box.lan", "gpu.example", "evil.example"):
                async with session.get(f"{url}/v1/models", headers={"Host": name}) as response:
                    found.append(response.status)
        await runner.cleanup()

    monkeypatch.setattr(serve, "serve", once)
    words = ["serve", "--runs", str(tmp_path), "--port", "0", "--host", "box.lan", "--allow-host", "gpu.example"]
    assert cli.main(words) == 0
    assert found == [200, 200, 403]


async def test_who_has_the_token_asks_by_any_name(tmp_path: Path) -> None:
    async with Server([tmp_path], token="geheim") as server:
        headers = {"Authorization": "Bearer geheim", "Host": "gpu.example", "Origin": "https://page.example"}
        assert (await server.ask("/v1/models", headers=headers))[0] == 200


async def test_what_does_not_fit_is_refused_with_the_numbers(runs: Path) -> None:
    async with Server([runs], memory=50_000) as server:
        status, body = await server.ask("/v1/chat/completions", CHAT)
        assert status == 507 and "--memory is 50 kB" in body["error"]["message"]
        assert body["error"]["type"] == "server_error"


async def test_a_base_that_is_nowhere_is_the_mirrors_fault(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    card = json.loads((tmp_path / "a" / "adapter" / "base.json").read_text())
    (tmp_path / "a" / "adapter" / "base.json").write_text(json.dumps(card | {"repo": "lab/nowhere", "commit": "c" * 40}))
    async with Server([tmp_path]) as server:
        status, body = await server.ask("/v1/chat/completions", CHAT)
        assert status == 502 and "http://127.0.0.1:9 cannot be reached" in body["error"]["message"]


async def test_nobody_is_asked_for_a_base_that_is_on_this_machine(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def note(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=404)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", note)
    runner, url = await serve.listen(app, "127.0.0.1", 0)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    async with Server([runs]) as server:
        for name in (*NAMES, "base:a"):
            await server.chat(model=name)
    await runner.cleanup()
    assert asked == []


# — versions —————————————————————————————————————————————————————————————————————————————————————


async def test_a_version_that_is_promoted_or_rolled_back_answers_from_the_next_request_on(runs: Path, tmp_path: Path) -> None:
    for name in ("a", "ab"):
        shutil.copytree(runs / name, tmp_path / name)
    async with Server([tmp_path]) as server:
        direct = {name: (await server.chat(model=name))["choices"] for name in ("a", "ab")}
        registry.promote(tmp_path / "a", "door", tmp_path)
        found = await server.chat(model="door")
        assert (found["model"], found["choices"]) == ("door@1", direct["a"])
        registry.promote(tmp_path / "ab", "door", tmp_path)
        found = await server.chat(model="door")
        assert (found["model"], found["choices"]) == ("door@2", direct["ab"])
        registry.rollback("door", tmp_path)
        assert (await server.chat(model="door"))["choices"] == direct["a"]
        assert (await server.chat(model="door@2"))["choices"] == direct["ab"]


# — classes ——————————————————————————————————————————————————————————————————————————————————————


async def test_texts_words_and_images_get_classes_with_probabilities(classes: Path, tmp_path: Path, llama: Path) -> None:
    images = served.made_images(tmp_path)
    async with Server([classes, images]) as server:
        body = {"model": "spam", "input": ["win 5 coins now", "lunch at 5 today"]}
        status, found = await server.ask("/v1/classify", body)
        assert status == 200, found
        assert [told["label"] for told in found["data"]] == ["spam", "ham"]
        assert all(sum(told["probabilities"].values()) == pytest.approx(1) for told in found["data"])
        status, turned = await server.ask("/v1/classify", body | {"model": "pams"})
        assert [told["label"] for told in turned["data"]] == ["ham", "spam"]
        for given in ("ship 3 to Oslo", [["ship", "3", "to", "Oslo"]]):
            status, found = await server.ask("/v1/classify", {"model": "words", "input": given})
            assert status == 200, found
            assert [(word["word"], word["label"]) for word in found["data"][0]["words"]] == [
                *(("ship", "O"), ("3", "N")),
                *(("to", "O"), ("Oslo", "P")),
            ]
        picture = io.BytesIO()
        served.picture("red").save(picture, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
        status, by_url = await server.ask("/v1/classify", {"model": "pictures", "input": url})
        assert status == 200, by_url
        form = aiohttp.FormData({"model": "pictures"})
        form.add_field("input", picture.getvalue(), filename="red.png")
        status, by_form = await server.ask("/v1/classify", data=form)
        assert by_form == by_url and by_url["data"][0]["label"] == "red"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "spam", "input": []}, "input: there is nothing in it"),
        ({"model": "spam", "input": [3]}, "input: a text, or a list of texts, is expected, not 3"),
        ({"model": "spam", "input": [["a", "b", "c"]]}, "is nothing that a model of text-classification takes"),
        ({"model": "spam"}, "input: a text"),
        ({"model": "spam", "input": "x", "inptu": 1}, "'inptu' is not known here: did you mean input?"),
        ({"model": "a", "input": "x"}, "a is a model of text-generation: POST /v1/chat/completions"),
    ],
)
async def test_a_wrong_request_for_classes_is_told_what_is_wrong(
    classes: Path, runs: Path, body: dict[str, Any], message: str
) -> None:
    async with Server([classes, runs]) as server:
        status, found = await server.ask("/v1/classify", body)
        assert status == 400 and message in found["error"]["message"]


async def test_a_model_of_classes_does_not_chat(classes: Path) -> None:
    async with Server([classes]) as server:
        status, found = await server.ask("/v1/chat/completions", CHAT | {"model": "spam"})
        assert status == 400 and "POST /v1/classify" in found["error"]["message"]


# — clients ——————————————————————————————————————————————————————————————————————————————————————


async def test_openais_own_client_lists_chats_streams_and_reads_errors(runs: Path, llama: Path) -> None:
    import openai

    text, count = said(runs, llama, "ab")
    messages: Any = CHAT["messages"]
    async with Server([runs], token="geheim") as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="geheim", max_retries=0) as client:
            assert {model.id async for model in client.models.list()} == {*NAMES, "base:a"}
            assert (await client.models.retrieve("base:a.b")).id == "base:a.b"
            options: Any = {"model": "ab", "messages": messages, "temperature": 0, "max_tokens": 24}
            whole = await client.chat.completions.create(**options)
            assert whole.choices[0].message.content == text
            assert whole.usage is not None and whole.usage.completion_tokens == count
            stream = await client.chat.completions.create(**options, stream=True)
            assert "".join([part.choices[0].delta.content or "" async for part in stream]) == text
            completed = await client.completions.create(model="ab", prompt="What", max_tokens=3)
            assert completed.usage is not None and completed.usage.completion_tokens <= 3
            with pytest.raises(openai.NotFoundError, match="did you mean ab") as raised:
                await client.chat.completions.create(model="abb", messages=messages)
            assert raised.value.code == "model_not_found"
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="falsch", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()


def test_sigterm_finishes_the_answer_in_progress_and_then_ends(endless: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("geheim\n")
    arguments = ["--runs", str(endless), "--port", "0", "--token-file", str(tmp_path / "token")]
    process = subprocess.Popen(
        [sys.executable, "-m", "neartune", "serve", *arguments],
        cwd=TRAINER,
        env=environment(PYTHONPATH=str(TRAINER)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = ""
    while "listening on " not in said:
        said = process.stdout.readline()
        assert said
    url = said.rpartition("listening on ")[2].strip()
    drained = threading.Thread(target=process.stdout.read)
    drained.start()

    async def ask() -> list[bytes]:
        headers = {"Authorization": "Bearer geheim"}
        body = CHAT | {"model": "base:a", "max_tokens": 200, "stream": True}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(f"{url}/v1/chat/completions", json=body) as response,
        ):
            lines = []
            async for line in response.content:
                if not lines:
                    os.kill(process.pid, signal.SIGTERM)
                lines.append(line)
            return lines

    lines = [line for line in asyncio.run(ask()) if line.strip()]
    assert lines[-1] == b"data: [DONE]\n"
    assert json.loads(lines[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
    assert process.wait(60) == 0
    drained.join()
    process.stdout.close()
