"""The stand-in Hub itself: two listening ports, one request at a time from question to bytes. Composition root."""

from __future__ import annotations

import asyncio
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Hashable, MutableMapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote

from aiohttp import web
from multidict import CIMultiDict

from tests.hub import api, cdn, files, git
from tests.hub.content import File, source_of
from tests.hub.control import CONTROL_PATH, Control
from tests.hub.faults import BODY_ACTS, OFFSET_ACTS, Act, Faults, Rule
from tests.hub.ledger import Counters, Exchange, Log
from tests.hub.pace import Caps, Pacer
from tests.hub.ranges import Span
from tests.hub.reply import Ask, HubError, Lie, Reply, too_many, whole
from tests.hub.repos import Gate, Kind, Repo
from tests.hub.routes import FileRoute, GitRoute, ListRoute, NamedRoute, RepoRoute, parse
from tests.hub.send import Cut, Wire, reset, send, tune
from tests.hub.world import Limits, User, World, bucket_of

_EXPOSED = (
    "X-Repo-Commit,X-Request-Id,X-Error-Code,X-Error-Message,X-Total-Count,ETag,Link,Accept-Ranges,Content-Range,"
    "Content-Length,X-Linked-Size,X-Linked-ETag,X-Xet-Hash"
)
_MAX_BODY = 64 << 20


class Hub:
    """A Hub and its CDN on 127.0.0.1, with all their content in this process. `async with Hub() as hub:`"""

    def __init__(self, seed: int = 0, *, xet: bool = True, control: bool = False) -> None:
        self.world = World(seed=seed, uses_xet=xet)
        self.counters = Counters()
        self.log = Log()
        self.caps = Caps()
        self.faults = Faults(self._pulse)
        self._control = Control(self) if control else None
        self._runners: dict[str, web.ServerRunner] = {}
        self._servers: dict[str, web.Server] = {}
        self._ports = {"hub": 0, "cdn": 0}
        self._carried: MutableMapping[Hashable, int] = weakref.WeakKeyDictionary()
        self._waiters: set[asyncio.Future[None]] = set()
        self._number = 0

    def __repr__(self) -> str:
        state = "up" if self._runners else "down"
        return f"<Hub {self.url} cdn {self.cdn_url} {state}, {len(self.world.repos)} repos, {len(self.log)} requests>"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, port: int = 0, cdn_port: int = 0) -> None:
        """Listen. After a stop() the same ports are taken again unless others are named."""
        if self._runners:
            raise RuntimeError("this Hub is already listening")
        wanted = {"hub": port or self._ports["hub"], "cdn": cdn_port or self._ports["cdn"]}
        try:
            for origin in ("hub", "cdn"):
                await self._listen(origin, wanted[origin])
        except OSError:
            await self.stop()
            raise
        self.world.url = f"http://127.0.0.1:{self._ports['hub']}"
        self.world.cdn_url = f"http://127.0.0.1:{self._ports['cdn']}"

    async def stop(self) -> None:
        """Stop listening and cut every connection at once. Repositories, log and counters stay."""
        for origin, runner in list(self._runners.items()):
            for site in list(runner.sites):
                await site.stop()
            for connection in self._servers[origin].connections:
                transport = connection.transport
                if isinstance(transport, asyncio.Transport):
                    reset(transport)
            await runner.cleanup()
        self._runners.clear()
        self._servers.clear()
        await self.world.shelf.clear()
        self._pulse()

    async def _listen(self, origin: str, port: int) -> None:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            return await self._serve(origin, request)

        server: web.Server = web.Server(
            handle,
            handler_cancellation=True,
            access_log=None,
            max_line_size=65536,
            max_field_size=65536,
            auto_decompress=False,
        )
        runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await runner.setup()
        self._runners[origin], self._servers[origin] = runner, server
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
        await site.start()
        self._ports[origin] = runner.addresses[0][1]

    # What tests read and change

    @property
    def url(self) -> str:
        return self.world.url

    @property
    def cdn_url(self) -> str:
        return self.world.cdn_url

    @property
    def cdn_host(self) -> str:
        return self.world.cdn_url.removeprefix("http://")

    @property
    def users(self) -> dict[str, User]:
        return self.world.users

    @property
    def limits(self) -> Limits:
        return self.world.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self.world.limits = limits

    def repo(self, repo_id: str, kind: Kind = "models", *, private: bool = False, gated: Gate | bool = False) -> Repo:
        """The repository of that exact id, made now if there is none."""
        known = self.world.repos.get((kind, repo_id))
        if known is not None:
            return known
        made = Repo(repo_id, kind, private=private, gated="auto" if gated is True else gated)
        self.world.add(made)
        return made

    def git(self, repo_id: str, folder: Path, kind: Kind = "models") -> Repo:
        """Serve a git repository on disk to git under this id; access, renaming and LFS are the Repo's as ever."""
        if not folder.is_dir():
            raise ValueError(f"not a git repository: {folder}")
        repo = self.repo(repo_id, kind)
        repo.folder = folder
        return repo

    def cap(self, *, per_connection: float | None = None, total: float | None = None) -> None:
        """Limit bodies to so many bytes per second, on each connection and in all; None lifts that cap."""
        self.caps.per_connection = per_connection
        self.caps.total = Pacer(total) if total else None

    def active(self, origin: str) -> int:
        """Requests being answered right now."""
        return self.counters.active(origin)

    def peak(self, origin: str) -> int:
        """The most requests that were being answered at once since the counters were reset."""
        return self.counters.peak(origin)

    def connections(self, origin: str) -> int:
        """Open TCP connections, idle ones included."""
        return len(self._servers[origin].connections) if origin in self._servers else 0

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10) -> None:
        """Wait for a condition on counters, log, faults or gauges; looked at whenever one of them changes."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                waiter = asyncio.get_running_loop().create_future()
                self._waiters.add(waiter)
                try:
                    await waiter
                finally:
                    self._waiters.discard(waiter)

    def _pulse(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    # The life of a request

    async def _serve(self, origin: str, request: web.BaseRequest) -> web.StreamResponse:
        transport = request.transport
        if not isinstance(transport, asyncio.Transport):
            raise ConnectionResetError("the client is gone")
        tune(transport)
        if self._control is not None and origin == "hub" and request.raw_path.startswith(CONTROL_PATH):
            return await self._control.answer(request)
        exchange = self._record(origin, request)
        self.counters.began(exchange)
        self.log.records.append(exchange)
        self._pulse()
        try:
            return await self._answer(request, transport, exchange)
        except (asyncio.CancelledError, ConnectionError):
            exchange.aborted = True
            raise
        finally:
            exchange.done = True
            self.counters.ended(exchange)
            self._pulse()

    async def _answer(self, request: web.BaseRequest, transport: asyncio.Transport, exchange: Exchange) -> web.StreamResponse:
        if request.headers.get("Expect", "").lower() == "100-continue":
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        pieces = _pieces(request, lambda size: self.counters.took(exchange, size))
        ask = Ask(request.method, request.raw_path, request.headers, pieces=pieces)
        route = parse(ask.path) if exchange.origin == "hub" else None
        if isinstance(route, GitRoute):
            ask = git.as_bearer(ask)
        if not git.is_streamed(route):
            ask = replace(ask, body=await _joined(pieces), pieces=None)
        told, is_too_many = self._spend(ask) if exchange.origin == "hub" else ({}, False)
        reply = too_many(told) if is_too_many else self._reply(exchange.origin, ask)
        rule = self._pick(exchange, ask, reply)
        if rule is not None:
            exchange.fault = "" if _is_taken_late(rule, reply) else rule.fault.act.value
            if rule.fault.act is Act.LATENCY:
                await asyncio.sleep(rule.fault.number)
            elif rule.fault.act is Act.RESET and rule.fault.after is None:
                reset(transport)
                return web.StreamResponse()
            reply = self._spoilt(exchange.origin, ask, reply, rule)
        self._adorn(exchange.origin, ask, reply)
        reply.headers.update(told)
        exchange.status = reply.status

        def count(size: int) -> None:
            self.counters.sent(exchange, size)
            self._pulse()

        def bites() -> bool:
            """A rule that was picked for a stream is not taken before its offset is reached."""
            if rule is None or (_is_taken_late(rule, reply) and not rule.take()):
                return False
            exchange.fault = rule.fault.act.value
            return True

        try:
            return await send(Wire(request, self.caps, self._carried, count, bites), reply, rule)
        except Cut:
            return web.StreamResponse()

    def _record(self, origin: str, request: web.BaseRequest) -> Exchange:
        named = cdn.label(self.world, request.raw_path) if origin == "cdn" else unquote(request.raw_path)
        return Exchange(
            origin=origin,
            method=request.method,
            raw_path=request.raw_path,
            headers=tuple(request.headers.items()),
            subject=f"{request.raw_path} {named}",
        )

    def _reply(self, origin: str, ask: Ask) -> Reply:
        """The honest answer, or the one that follows from the ask's lie."""
        try:
            return cdn.answer_cdn(self.world, ask) if origin == "cdn" else self._hub_reply(ask)
        except HubError as error:
            return error.reply()

    def _hub_reply(self, ask: Ask) -> Reply:
        if ask.method == "OPTIONS":
            return Reply(204, CIMultiDict({"Access-Control-Allow-Methods": "GET,HEAD,POST,OPTIONS"}))
        route = parse(ask.path)
        match route:
            case GitRoute():
                return git.answer_git(self.world, ask, route)
            case RepoRoute() if ask.method in ("GET", "HEAD", "POST"):
                return api.answer_repo(self.world, ask, route)
            case NamedRoute() if ask.method in ("GET", "HEAD"):
                return api.answer_named(self.world, ask, route)
            case FileRoute() if ask.method in ("GET", "HEAD"):
                return files.answer_file(self.world, ask, route)
            case ListRoute() if ask.method in ("GET", "HEAD"):
                return api.answer_list(self.world, ask, route)
        raise HubError(404, None, "Sorry, we can't find the page you are looking for.")

    def _pick(self, exchange: Exchange, ask: Ask, reply: Reply) -> Rule | None:
        for rule in list(self.faults.rules):
            if not rule.matches(exchange.origin, exchange.method, exchange.subject) or not _bites(rule, ask, reply):
                continue
            if not rule.is_spent if _is_taken_late(rule, reply) else rule.take():
                return rule
        return None

    def _spoilt(self, origin: str, ask: Ask, reply: Reply, rule: Rule) -> Reply:
        """The answer that a fault makes of an honest one; faults of the body are left to send()."""
        fault = rule.fault
        match fault.act:
            case Act.STATUS:
                return whole(fault.status_code, fault.body, fault.headers)
            case Act.IGNORE_RANGE:
                headers = CIMultiDict(ask.headers)
                headers.pop("Range", None)
                return self._reply(origin, replace(ask, headers=headers))
            case Act.OTHER_ETAG:
                source = source_of(fault.content) if fault.content is not None else None
                return self._reply(origin, replace(ask, lie=Lie(etag_salt="1", source=source)))
            case Act.OTHER_FILE:
                return self._reply(origin, replace(ask, lie=Lie(files={fault.text: self._swapped(rule)})))
            case Act.WRONG_COMMIT:
                reply.headers["X-Repo-Commit"] = fault.text
            case Act.SHIFT_RANGE:
                shift = int(fault.number)
                moved = Span(reply.span.start + shift, reply.span.stop + shift)
                reply.headers["Content-Range"] = moved.content_range(reply.source.size)
            case Act.WRONG_TOTAL:
                reply.headers["Content-Range"] = reply.span.content_range(int(fault.number))
            case Act.OVERRUN if fault.text == "announced" and reply.status == 206:
                longer = Span(reply.span.start, reply.span.stop + int(fault.number))
                reply.headers["Content-Range"] = longer.content_range(reply.source.size)
        return reply

    def _swapped(self, rule: Rule) -> File:
        """The other file, in LFS if the true one is."""
        content = rule.fault.content
        is_lfs = any(
            commit.files[rule.fault.text].is_lfs
            for repo in self.world.repos.values()
            for commit in repo.commits.values()
            if rule.fault.text in commit.files
        )
        return File(source_of(content if content is not None else b""), is_lfs=is_lfs)

    def _spend(self, ask: Ask) -> tuple[dict[str, str], bool]:
        """Count a request against its rate limit: the headers that say so, and whether it is one too many."""
        limits, bucket = self.world.limits, bucket_of(ask.path)
        remains, reset_s, is_too_many = limits.spend(bucket, ask.token or "anonymous", self.world.clock())
        told = {
            "RateLimit": f'"{bucket}";r={remains};t={reset_s}',
            "RateLimit-Policy": f'"fixed window";"{bucket}";q={limits.quota(bucket)};w={limits.window_s}',
        }
        return told, is_too_many

    def _adorn(self, origin: str, ask: Ask, reply: Reply) -> None:
        """The headers that every answer carries."""
        reply.headers.setdefault("Access-Control-Allow-Origin", "*")
        if origin == "cdn":
            reply.headers.setdefault("Server", "CloudFront")
            return
        reply.headers["X-Powered-By"] = "huggingface-moon"
        self._number += 1
        reply.headers["X-Request-Id"] = ask.headers.get("X-Amzn-Trace-Id", f"Root=1-{self._number:08x}")
        reply.headers["Access-Control-Expose-Headers"] = _EXPOSED
        reply.headers.setdefault("Vary", "Origin, Accept")


def _bites(rule: Rule, ask: Ask, reply: Reply) -> bool:
    """Whether this fault changes anything about this answer; only then does it count as a hit."""
    fault, span = rule.fault, reply.span
    if fault.act is Act.IGNORE_RANGE:
        return "Range" in ask.headers and reply.status in (206, 416)
    if fault.act in (Act.SHIFT_RANGE, Act.WRONG_TOTAL):
        return reply.status == 206
    if fault.act is Act.WRONG_COMMIT:
        return "X-Repo-Commit" in reply.headers
    if fault.act is Act.OTHER_ETAG:
        return "ETag" in reply.headers
    if fault.act not in BODY_ACTS and not (fault.act is Act.RESET and fault.after is not None):
        return True
    if reply.stream is not None:
        return True
    if ask.method == "HEAD" or not reply.has_content or reply.is_chunked:
        return False
    if fault.at is not None:
        return span.start <= fault.at < span.stop
    return fault.act is Act.DROP_EVERY or fault.after is None or fault.after < len(span)


def _is_taken_late(rule: Rule, reply: Reply) -> bool:
    """Whether only the sending of a body, of unknown length, can tell if this fault has something to bite on."""
    fault = rule.fault
    return reply.stream is not None and fault.act in OFFSET_ACTS and (fault.at is not None or fault.after is not None)


async def _pieces(request: web.BaseRequest, count: Callable[[int], None]) -> AsyncIterator[bytes]:
    """The request's body, decoded; what is counted is the encoded one."""
    is_packed = request.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip")
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    async for piece in request.content.iter_any():
        count(len(piece))
        try:
            yield unpacker.decompress(piece) if is_packed else piece
        except zlib.error as error:
            raise ConnectionResetError("a request body that is not gzip") from error


async def _joined(pieces: AsyncIterator[bytes]) -> bytes:
    body = bytearray()
    async for piece in pieces:
        body += piece
        if len(body) > _MAX_BODY:
            raise ConnectionResetError("a request body that no client of the Hub sends")
    return bytes(body)
