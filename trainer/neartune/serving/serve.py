"""`neartune serve`: models over HTTP, as OpenAI's clients ask for them.

    GET  /v1/models, /v1/models/NAME     POST /v1/chat/completions, /v1/completions     GET /healthz
                                         POST /v1/classify

A client that goes away ends its answer. SIGTERM: answers in progress are finished, then it ends.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from neartune import hub, units
from neartune.adapter import locate_base
from neartune.batch import is_out_of_memory, limit_of
from neartune.data import DataError
from neartune.decode import Options, Piece, PromptError, chat_ids, ends_of, pieces, text_ids, tokens
from neartune.decode import limit_of as longest_of
from neartune.hosts import foreign
from neartune.model import ModelError
from neartune.records.runs import RunsError
from neartune.serving import catalog, wire
from neartune.serving.catalog import Served, Unknown
from neartune.serving.classify import IMAGES, TASKS, classes
from neartune.serving.pool import NoRoom, Pool, Seat
from neartune.serving.wire import Asked, Head, Refused

BODY, IMAGES_BODY = 2 * 2**20, 32 * 2**20
"""Bytes of a request at most; of one for classes, which may bring images."""
FINISH = 600.0
"""Seconds that answers in progress get after SIGTERM."""

_ROUTES = "GET /healthz, /v1/models, /v1/models/NAME; POST /v1/chat/completions, /v1/completions, /v1/classify"

Say = Callable[[str], None]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_HOMES: web.AppKey[Sequence[Path]] = web.AppKey("homes", tuple)
_POOL = web.AppKey("pool", Pool)


def device_of(asked: str) -> torch.device:
    """Raises ModelError."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: there is no CUDA here; cpu and auto are what can be had")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)


def application(
    homes: Sequence[Path],
    url: str,
    say: Say,
    *,
    memory: int | None = None,
    device: str = "auto",
    token: str | None = None,
    names: Sequence[str] = (),
) -> web.Application:
    """`url`: of the Hub endpoint that bases are fetched from, if they are not on this machine. `memory`: bytes of weights;
    None: what the device has. `token`: without it nothing but /healthz is answered. `names`: of this machine, by which it may
    be asked where there is no token, beside localhost and addresses."""
    place = device_of(device)

    def locate(served: Served) -> Path:
        return locate_base(served.card, None, url, say)

    guard = _no_pages(names) if token is None else _only(token)
    app = web.Application(middlewares=[_errors(say), guard], client_max_size=IMAGES_BODY)
    app[_HOMES] = tuple(homes)
    app[_POOL] = Pool(limit_of(place, "auto") if memory is None else memory, place, locate, say)
    app.router.add_get("/healthz", _health)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/v1/models/{name:.+}", _model)
    app.router.add_post("/v1/chat/completions", partial(_answer, is_chat=True))
    app.router.add_post("/v1/completions", partial(_answer, is_chat=False))
    app.router.add_post("/v1/classify", _classify)
    app.on_cleanup.append(lambda app: app[_POOL].close())
    return app


async def listen(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, str]:
    """(what to clean up, the server's address). Raises OSError."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=FINISH)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    bound = runner.addresses[0]
    return runner, f"http://{f'[{bound[0]}]' if ':' in bound[0] else bound[0]}:{bound[1]}"


async def serve(app: web.Application, host: str, port: int, say: Say) -> None:
    """Until SIGTERM or Ctrl-C; a second one does not wait. Raises OSError."""
    runner, address = await listen(app, host, port)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    found = await asyncio.to_thread(catalog.find, app[_HOMES])
    for trouble in found.troubles:
        say(f"warning: {trouble}")
    say(f"models: {', '.join(found.listed()) or 'none yet'}")
    say(f"weights of at most {units.size(app[_POOL].limit)} on {app[_POOL].device}; listening on {address}")
    await stop.wait()
    say("no new requests; answers in progress are finished")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    await runner.cleanup()


# — around every request —————————————————————————————————————————————————————————————————————————


def _errors(say: Say) -> Any:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ConnectionError:
            raise
        except Exception as exc:  # noqa: BLE001 - each has an answer
            refused = refusal(exc)
            if refused.status >= 500:
                say(f"{request.method} {request.path}: {refused.status}: {refused if exc is refused else f'{exc!r}'}")
            return _refusing(refused)

    return middleware


def refusal(exc: Exception) -> Refused:
    """What is answered, and whose fault it is."""
    match exc:
        case Refused():
            return exc
        case Unknown():
            return Refused(404, str(exc), param="model", code="model_not_found")
        case PromptError() | DataError():
            return Refused(400, str(exc))
        case NoRoom():
            return Refused(507 if exc.is_for_good else 503, str(exc), code="no_room")
        case hub.HubError():
            return Refused(502, str(exc), code="hub")
        case ModelError() | RunsError():
            return Refused(500, str(exc), code="model")
        case web.HTTPRequestEntityTooLarge():
            return Refused(413, f"the request is larger than {IMAGES_BODY:,} bytes")
        case web.HTTPException():
            return Refused(exc.status, f"{exc.reason}: there are {_ROUTES}")
    if is_out_of_memory(exc):
        return Refused(503, "there is not enough memory for this answer now: a shorter one, or later", code="out_of_memory")
    return Refused(500, f"this should not have happened: {type(exc).__name__}: {exc}", code="internal")


def _refusing(refused: Refused) -> web.Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(refused.status, {})
    return web.json_response(refused.body, status=refused.status, headers=headers)


def _only(token: str) -> Any:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if request.path != "/healthz" and not hmac.compare_digest(given, expected):
            raise Refused(401, "the token of --token-file is needed: Authorization: Bearer TOKEN", code="invalid_api_key")
        return await handler(request)

    return middleware


def _no_pages(names: Sequence[str]) -> Any:
    """Where no token tells who asks: a web page that is open in somebody's browser may not use up the machine."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if why := foreign(request.headers, names):
            raise Refused(403, why, code="host")
        return await handler(request)

    return middleware


async def _json(request: web.Request, most: int) -> Any:
    """Raises Refused."""
    if request.content_type != "application/json":
        raise Refused(415, f"the body must be application/json, not {request.content_type}")
    body = bytearray()
    async for part in request.content.iter_chunked(65536):
        body += part
        if len(body) > most:
            raise Refused(413, f"the request is larger than {most:,} bytes")
    return wire.parsed(bytes(body))


async def _resolved(request: web.Request, name: str) -> Served:
    """By what is on disk now: a run that has just ended, a version that was just promoted. Raises Unknown."""
    return catalog.resolve(name, await asyncio.to_thread(catalog.find, request.app[_HOMES]))


# — what there is ————————————————————————————————————————————————————————————————————————————————


async def _health(request: web.Request) -> web.Response:
    pool = request.app[_POOL]
    bases = [
        {"base": held.name, "bytes": held.all_bytes, "adapters": len(held.adapters), "answers": held.life.users}
        for held in pool.held.values()
    ]
    return web.json_response({"status": "ok", "memory": pool.limit, "bases": bases})


async def _models(request: web.Request) -> web.Response:
    found = await asyncio.to_thread(catalog.find, request.app[_HOMES])
    return web.json_response({"object": "list", "data": [_about(name, served) for name, served in found.listed().items()]})


async def _model(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    return web.json_response(_about(name, await _resolved(request, name)))


def _about(name: str, served: Served) -> dict[str, Any]:
    card = served.card
    return {
        "id": name,
        "object": "model",
        "created": served.made,
        "owned_by": "neartune",
        "version": served.name,
        "task": card.task,
        "labels": list(card.labels),
        "base": card.repo or Path(card.path).name,
        "base_fingerprint": card.fingerprint,
    }


# — text —————————————————————————————————————————————————————————————————————————————————————————


async def _answer(request: web.Request, *, is_chat: bool) -> web.StreamResponse:
    asked = wire.asked(await _json(request, BODY), is_chat=is_chat)
    served = await _resolved(request, asked.model)
    if served.card.task != "text-generation":
        raise Refused(400, f"{asked.model} is a model of {served.card.task}: POST /v1/classify", param="model")
    async with request.app[_POOL].seat(served) as seat:
        ids = await asyncio.to_thread(_ids, asked, seat)
        options = _options(asked, seat, len(ids))
        kind = "chatcmpl" if is_chat else "cmpl"
        head = Head(f"{kind}-{uuid.uuid4().hex}", int(time.time()), served.name, served.card.fingerprint[:12], is_chat)
        steps = pieces(tokens(seat.base.model, ids, options), seat.processor, options, asked.stops)
        async with aclosing(seat.run(steps)) as found:
            if asked.is_stream:
                return await _stream(request, head, asked, found, len(ids))
            text = ""
            async for piece in found:
                text += piece.text
            return web.json_response(wire.whole(head, text, piece, len(ids)))


def _ids(asked: Asked, seat: Seat) -> list[int]:
    """Raises PromptError."""
    return chat_ids(seat.processor, asked.messages) if asked.messages else text_ids(seat.processor, asked.prompt)


def _options(asked: Asked, seat: Seat, count: int) -> Options:
    """An answer that the model's context does not take ends there, by length. Raises Refused."""
    room = longest_of(seat.base.model.config, seat.processor) - count
    if room < 1:
        raise Refused(
            400,
            f"this model takes {room + count} tokens, and the question has {count}: leave room for an answer",
            code="context_length_exceeded",
        )
    longest = room if asked.longest is None else min(room, asked.longest)
    return Options(longest, ends_of(seat.base.model, seat.processor), asked.temperature, asked.top_p, asked.seed)


async def _stream(
    request: web.Request, head: Head, asked: Asked, found: AsyncIterator[Piece], prompt: int
) -> web.StreamResponse:
    """What fails before the first token has a status of its own; later, it is an event."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
    piece = await anext(found)

    async def send(event: Any) -> None:
        await response.write(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")

    await response.prepare(request)
    try:
        if first := wire.first_chunk(head):
            await send(first)
        while True:
            for chunk in wire.chunks(head, piece):
                await send(chunk)
            if piece.finish:
                break
            piece = await anext(found)
        if asked.with_usage:
            await send(wire.usage_chunk(head, piece, prompt))
        await response.write(b"data: [DONE]\n\n")
    except ConnectionError:
        raise
    except Exception as exc:  # noqa: BLE001 - the status has gone out already
        await send(refusal(exc).body)
    await response.write_eof()
    return response


# — classes ——————————————————————————————————————————————————————————————————————————————————————


async def _classify(request: web.Request) -> web.Response:
    asked = await _parts(request) if request.content_type == "multipart/form-data" else None
    asked = asked or wire.classified(await _json(request, IMAGES_BODY))
    served = await _resolved(request, asked.model)
    if served.card.task not in TASKS:
        raise Refused(400, f"{asked.model} is a model of {served.card.task}: POST /v1/chat/completions", param="model")
    items = [
        wire.image_bytes(item) if served.card.task == IMAGES and not isinstance(item, bytes) else item for item in asked.inputs
    ]
    async with request.app[_POOL].seat(served) as seat:
        steps = classes(seat.base.model, seat.base.task, items, seat.processor, served.card.labels)
        data, count = list[dict[str, Any]](), 0
        async with aclosing(seat.run(steps)) as found:
            async for told, length in found:
                data.append({"index": len(data), **told})
                count += length
    return web.json_response({"object": "list", "model": served.name, "data": data, "usage": wire.usage(count, 0)})


async def _parts(request: web.Request) -> wire.Classified:
    """A field `model`, and images as files. Raises Refused."""
    form = await request.post()
    model = form.get("model")
    files = [value.file.read() for value in form.values() if isinstance(value, web.FileField)]
    if not isinstance(model, str) or not files:
        raise Refused(400, "a field model, and at least one file, are expected", param="input")
    return wire.Classified(model, tuple(files))
