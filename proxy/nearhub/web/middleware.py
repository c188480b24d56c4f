"""Around every request: an id, one log line, errors rendered as the Hub renders them, headers that all answers carry.

A response that has begun cannot become an error: its connection is cut, so that no client takes a part for the whole.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

from nearhub import trace
from nearhub.connectivity import Connectivity
from nearhub.errors import HubRefusal, NearhubError
from nearhub.metrics import Metrics
from nearhub.web import hypertext, logs
from nearhub.web.audit import Audit
from nearhub.wire.cachestatus import CacheStatus, Forward
from nearhub.wire.headers import cors_headers

log = logging.getLogger("nearhub.access")

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
REQUEST_ID = web.RequestKey("request_id", str)
STATUS = web.RequestKey("cache_status", str)
"""How the request was answered, for the log and the Cache-Status header; handlers set it."""
SPEECH = web.RequestKey("speech", str)
"""The media type in which this client hears of errors; handlers set it. The Hub's own JSON unless it is another."""
TEXT, HTML, LFS_JSON = "text/plain", "text/html", "application/vnd.git-lfs+json"

_SANE_ID = re.compile(r"[A-Za-z0-9=;:._-]{8,128}\Z")


async def around(
    request: web.BaseRequest,
    handler: Handler,
    metrics: Metrics,
    history: History,
    connectivity: Connectivity,
    audit: Audit | None = None,
) -> web.StreamResponse:
    """`handler`'s answer, or the error it raised as one; counted, logged, remembered, audited."""
    started = time.monotonic()
    named = request_id(request)
    traced = trace.begin()
    if connectivity.is_offline:
        traced.is_offline = True
        trace.note(f"this mirror is offline: {connectivity.why}")
    response: web.StreamResponse | None = None
    outcome = "gone"
    try:
        response = await _answer(request, handler, named)
        outcome = str(response.status)
    except CutError as exc:
        outcome = f"cut ({exc})"
        response = exc.response
        _cut(request)
    except ConnectionError:
        outcome = "client left"
        _cut(request)
    except asyncio.CancelledError:
        outcome = "client left"
        raise
    finally:
        status = request.get(STATUS, "-")
        path = _printable(_without_secrets(request.raw_path))
        length = response.headers.get("Content-Length", "-") if response is not None else "-"
        seconds = time.monotonic() - started
        metrics.count_request(outcome.partition(" ")[0], status)
        history.add(named, request.method, path, outcome, status, traced.notes)
        if audit is not None and traced.account is not None:
            audit.note(request, traced.account, outcome, length, named)
        logs.access(
            f"{request.method} {path} {outcome} {length} cache={status} seconds={seconds:.3f}"
            f" client={request.remote} id={named}"
        )
    return response or web.Response(status=499, reason="Client Closed Request")


class History:
    """The last `limit` requests, for `nearhub why ID`. In memory only; queries, which may hold secrets, are not kept."""

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        self._past: OrderedDict[str, tuple[float, str, str, str, str, Sequence[str]]] = OrderedDict()

    def add(self, request_id: str, method: str, path: str, outcome: str, cache: str, notes: Sequence[str]) -> None:
        self._past[request_id] = (time.time(), method, path, outcome, cache, notes)
        self._past.move_to_end(request_id)
        if len(self._past) > self._limit:
            self._past.popitem(last=False)

    def get(self, request_id: str) -> dict[str, Any] | None:
        """How it was answered, and why. `at`: wall seconds."""
        past = self._past.get(request_id)
        return None if past is None else dict(zip(("at", "method", "path", "outcome", "cache", "why"), past, strict=True))


class CutError(Exception):
    """A body that had begun cannot be finished."""

    def __init__(self, response: web.StreamResponse, cause: NearhubError) -> None:
        super().__init__(cause.message)
        self.response = response


async def _answer(request: web.BaseRequest, handler: Handler, request_id: str) -> web.StreamResponse:
    try:
        return await handler(request)
    except NearhubError as exc:
        if exc.fault != "client":
            log.warning("%s: %s (%s's fault)", request_id, exc.message, exc.fault)
        return _rendered(request, exc, request_id)
    except web.HTTPException as exc:
        return _plain(request, exc.status, exc.reason, {"X-Error-Code": type(exc).__name__}, request_id)
    except (CutError, OSError):
        raise
    except Exception:
        log.exception("%s: the mirror's own error", request_id)
        message = f"the mirror failed on this request; its log names it {request_id}"
        return _plain(request, 500, message, {"X-Error-Code": "InternalError"}, request_id)


def _rendered(request: web.BaseRequest, exc: NearhubError, request_id: str) -> web.Response:
    status = metadata_status(detail=None if isinstance(exc, HubRefusal) else exc.error_code)
    request[STATUS] = status.word
    headers = exc.headers() | {"X-Error-Code": exc.error_code, "Cache-Status": str(status)}
    response = _plain(request, exc.http_status, exc.message, headers, request_id)
    if exc.closes:
        response.force_close()
    return response


def _plain(request: web.BaseRequest, status: int, message: str, headers: dict[str, str], request_id: str) -> web.Response:
    """HEAD has no body, so the message travels in a header: one line, latin-1."""
    headers = {"Cache-Status": str(metadata_status())} | headers | cors_headers()
    headers |= {"X-Error-Message": _printable(message), "X-Request-Id": request_id}
    speech = request.get(SPEECH, "application/json")
    if speech == TEXT:  # git shows this line by line
        return web.Response(text=f"{message}\n", status=status, headers=headers)
    if speech == HTML:
        page = hypertext.trouble_page(status, message, headers["X-Error-Code"], request_id)
        return web.Response(body=page.encode(errors="replace"), status=status, headers=headers | hypertext.HEADERS)
    told = {"message": message} if speech == LFS_JSON else {"error": message}
    return web.json_response(told, status=status, headers=headers, content_type=speech)


def metadata_status(*, is_stale: bool = False, detail: str | None = None) -> CacheStatus:
    """How an answer without content of a blob came about: from what was known, or with upstream's help."""
    return _metadata_status(trace.was_forwarded(), is_stale, detail or ("offline" if trace.is_offline() else None))


@functools.lru_cache(256)
def _metadata_status(was_forwarded: bool, is_stale: bool, detail: str | None) -> CacheStatus:
    forward = Forward.URI_MISS if was_forwarded and not is_stale else None
    return CacheStatus(forward, detail="stale" if is_stale and detail is None else detail)


def base_headers(request: web.BaseRequest) -> dict[str, str]:
    """What every answer of ours carries."""
    return cors_headers() | {"X-Request-Id": request_id(request)}


def request_id(request: web.BaseRequest) -> str:
    """The client's own trace id where it sent one, so that its error text and our log name the same thing."""
    known = request.get(REQUEST_ID)
    if known is None:
        sent = request.headers.get("X-Request-Id") or request.headers.get("X-Amzn-Trace-Id") or ""
        known = request[REQUEST_ID] = sent if sent and _SANE_ID.match(sent) else os.urandom(16).hex()
    return known


def _without_secrets(target: str) -> str:
    """The path alone: a query may hold a secret, and so may what stands before a host (absolute-form)."""
    path = target.partition("?")[0].partition("#")[0]
    return path if path.startswith("/") else path.rpartition("@")[2]


def _printable(text: str) -> str:
    if text.isascii() and text.isprintable() and len(text) <= 500:
        return text
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:500]


def _cut(request: web.BaseRequest) -> None:
    if request.transport is not None:
        request.transport.abort()
