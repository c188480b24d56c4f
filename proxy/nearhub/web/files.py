"""GET and HEAD of …/resolve/…: decide (authorise, resolve) → plan (pure) → open → send. Never a redirect."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from nearhub import trace
from nearhub.access import Access
from nearhub.affinity import Affinity, client_key
from nearhub.bounded import Bounded
from nearhub.catalog import Basis, Catalog
from nearhub.errors import NearhubError, ReadOnly
from nearhub.fill import FillEngine, LfsSource, Source
from nearhub.reader import FilePiece, Reading
from nearhub.resolve import Resolver, default
from nearhub.web.callers import Callers
from nearhub.web.middleware import STATUS, CutError, base_headers, metadata_status
from nearhub.wire.credentials import Caller
from nearhub.wire.headers import file_headers
from nearhub.wire.reply import Reply, plan_file
from nearhub.wire.spans import Span
from nearhub.wire.target import FileTarget

WRITE_TIMEOUT_S = 300.0
SLOWEST = 8 * 1024
"""A client that takes a piece neither in this time nor at this rate, in bytes per second, is gone."""
STEP = 1024 * 1024
"""Whether bytes are in memory is looked at once in so many."""
SMALL_WRITE = 64 * 1024
"""Up to this many bytes, one read and one write cost less than sendfile's set-up."""
_NOWAIT = getattr(os, "RWF_NOWAIT", None)  # Linux


@dataclass(frozen=True, slots=True)
class Decided:
    """What a URL is now, and from which answers of upstream that follows: good for as long as those are.

    `headers`: of a HEAD without conditions.
    """

    target: FileTarget
    source: Source
    basis: Basis
    is_stale: bool
    headers: Mapping[str, str]
    account: trace.Account


class Files:
    """Serving files. A bounded table of decided answers spares a warm request everything but the answer itself."""

    def __init__(
        self, access: Access, callers: Callers, catalog: Catalog, resolver: Resolver, affinity: Affinity, fills: FillEngine
    ) -> None:
        self.fills = fills
        self._callers = callers
        self._access = access
        self._catalog = catalog
        self._resolver = resolver
        self._affinity = affinity
        self._decided: Bounded[str, Decided] = Bounded(20_000)

    def recall(self, path: str) -> Decided | None:
        """What was decided for `path`, if upstream has said nothing since and it is not too old."""
        decided = self._decided.get(path)
        if decided is None or not self._access.is_current(decided.basis, self._resolver.ref_ttl_s):
            return None
        trace.note("as decided for an earlier request")
        return decided

    async def decide(self, path: str, target: FileTarget, caller: Caller) -> Decided:
        """What `target`, asked for by `path`, is now. Raises HubRefusal or UpstreamError."""
        trace.account().what, trace.account().path = "file", target.path
        repo = await self._access.authorise(target.repo, default(target.revision), caller)
        resolved = await self._resolver.resolve(FileTarget(repo, target.revision, target.path), caller.address)
        target = FileTarget(replace(target.repo, scope=repo.scope), target.revision, target.path)
        source = Source(FileTarget(repo, resolved.meta.commit, target.path), resolved.meta)
        await self._access.admit(repo, resolved.meta.commit, [(target.path, resolved.meta.size)], caller)
        basis = self._catalog.basis(repo, default(target.revision))
        headers = file_headers(target, source.meta, attachment=False) | {"Content-Length": str(source.meta.size)}
        account = _account_of(source, trace.account())
        decided = Decided(target, source, basis, resolved.is_stale, headers, account)
        if not decided.is_stale and not repo.is_restricted and self._access.is_same_for_all:
            self._decided.put(path, decided)
        return decided

    async def serve(self, request: web.BaseRequest, path: str, target: FileTarget) -> web.StreamResponse:
        """`path` is the URL's, as split_prefix returns it. Raises NearhubError before, CutError after the headers."""
        if request.method not in ("GET", "HEAD"):
            raise ReadOnly("this is a read-only mirror: files can only be read")
        return await self.answer(request, await self.decide(path, target, self._callers.of(request)))

    async def answer(self, request: web.BaseRequest, decided: Decided) -> web.StreamResponse:
        """As serve(), of what is decided already."""
        trace.as_before(decided.account)
        client = request.remote or "unknown"
        target, headers = decided.target, request.headers
        is_head = request.method == "HEAD"
        who = client_key(client, headers.get("User-Agent", ""))
        is_plain_range = not is_head and "Range" in headers and "If-Range" not in headers
        with ExitStack() as stack:
            if is_plain_range:
                stack.enter_context(self._affinity.ranging(who, target))
            source = await self._source_for(request, who, decided, is_head=is_head, is_plain_range=is_plain_range)
            if is_head and trace.is_offline():
                await self.fills.require(source)  # what GET would be refused, HEAD must not promise
            if is_head and source is decided.source and "If-None-Match" not in headers and "?" not in request.raw_path:
                return await _send_head(request, decided)
            reply = plan_file(
                request.method,
                headers,
                target,
                source.meta,
                caution=self.fills.caution(source.meta.blob, client),
                attachment="?" in request.raw_path and request.query.get("download") == "true",
                boundary=uuid.uuid4().hex if "Range" in headers else "",
            )
            return await open_and_send(request, self.fills, source, reply, is_stale=decided.is_stale)

    async def _source_for(
        self, request: web.BaseRequest, who: str, decided: Decided, *, is_head: bool, is_plain_range: bool
    ) -> Source:
        """What was decided, unless this client goes on with another commit (P1c)."""
        source = decided.source
        commit = self._affinity.commit_for(who, decided.target, is_head=is_head, is_plain_range=is_plain_range)
        if commit is None:
            self._affinity.note(who, decided.target, source.meta.commit)
        elif commit != source.meta.commit:
            trace.note(f"this client goes on with {commit}, which it was told before")
            caller = self._callers.of(request)
            earlier = await self._resolver.resolve(source.target.at(commit), caller.address)
            await self._access.admit(source.target.repo, commit, [(source.target.path, earlier.meta.size)], caller)
            source = Source(source.target.at(commit), earlier.meta)
            trace.as_before(_account_of(source, decided.account))
        return source


def _account_of(source: Source, known: trace.Account) -> trace.Account:
    return replace(known, what="file", commit=source.meta.commit, path=source.target.path, blob=str(source.meta.blob))


async def _send_head(request: web.BaseRequest, decided: Decided) -> web.StreamResponse:
    """The answer that is asked for most, with as little ado as may be."""
    status = metadata_status(is_stale=decided.is_stale)
    request[STATUS] = status.word
    headers = {**decided.headers, **base_headers(request), "Cache-Status": str(status)}
    response = web.StreamResponse(status=200, headers=headers)
    await response.prepare(request)
    await response.write_eof()
    return response


async def open_and_send(
    request: web.BaseRequest, fills: FillEngine, source: Source | LfsSource, reply: Reply, *, is_stale: bool = False
) -> web.StreamResponse:
    """Carry out a planned reply. Raises NearhubError before, CutError after the headers."""
    client = request.remote or "unknown"
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(await fills.open(source, part.asked, client))) for part in reply.parts]
        for number, reader in enumerate(readers):
            await reader.ready(is_first=number == 0)
        status = readers[0].status if readers else metadata_status(is_stale=is_stale)
        if status.detail is None and trace.is_offline():
            status = replace(status, detail="offline")
        request[STATUS] = status.word
        told = reply.headers | base_headers(request) | {"Cache-Status": str(status)}
        return await send(request, reply, told, readers)


async def send(
    request: web.BaseRequest, reply: Reply, headers: dict[str, str], readers: Sequence[Reading]
) -> web.StreamResponse:
    """The only place that writes a body. Once begun, an error of ours raises CutError."""
    response = web.StreamResponse(status=reply.status, headers=headers)
    if reply.status != 304:
        response.content_length = reply.length
    await response.prepare(request)
    try:
        for part, reader in zip(reply.parts, readers, strict=True):
            if part.lead:
                await response.write(part.lead)
            while (piece := await reader.next_piece()) is not None:
                await send_piece(request, response, piece)
        if reply.trailer:
            await response.write(reply.trailer)
    except NearhubError as exc:
        raise CutError(response, exc) from exc
    except TimeoutError:
        raise ConnectionResetError("the client stopped reading") from None
    await response.write_eof()
    return response


async def send_piece(request: web.BaseRequest, response: web.StreamResponse, piece: FilePiece | bytes) -> None:
    """Raises TimeoutError when the client does not take it."""
    if isinstance(piece, FilePiece):
        await _send_span(request, response, piece.fd, piece.span)
    else:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(piece)


async def _send_span(request: web.BaseRequest, response: web.StreamResponse, fd: int, span: Span) -> None:
    """From the page cache to the socket: by sendfile, without a copy in Python, and without a disk read on the loop."""
    if len(span) <= SMALL_WRITE:
        data = await _read(fd, span)
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(data)
        return
    loop = asyncio.get_running_loop()
    file: Any = _File(fd)
    position = span.start
    while position < span.stop:
        stop = _in_memory_until(fd, position, span.stop)
        if stop == position:
            stop = min(span.stop, position + STEP)
            await loop.run_in_executor(None, _read_through, fd, Span(position, stop))
        if request.transport is None or request.transport.is_closing():
            raise ConnectionResetError("the client left")
        async with asyncio.timeout(WRITE_TIMEOUT_S + (stop - position) / SLOWEST):
            await loop.sendfile(request.transport, file, position, stop - position, fallback=True)
        position = stop


async def _read(fd: int, span: Span) -> bytes:
    if _NOWAIT is not None:
        buffer = bytearray(len(span))
        try:
            if os.preadv(fd, [buffer], span.start, _NOWAIT) == len(span):
                return bytes(buffer)
        except OSError:
            pass  # not in memory (EAGAIN), or a file system without RWF_NOWAIT: the thread below reads it
    return await asyncio.get_running_loop().run_in_executor(None, os.pread, fd, len(span), span.start)


def _in_memory_until(fd: int, position: int, stop: int) -> int:
    """How far from `position` on the bytes are in memory, judged by a page each STEP, and by the last."""
    if _NOWAIT is None:
        return position
    probe = [bytearray(1)]
    reached: int = position
    try:
        for at in (*range(position, stop, STEP), stop - 1):
            reached = at
            if os.preadv(fd, probe, at, _NOWAIT) != 1:
                return reached
    except OSError:
        return reached
    return stop


def _read_through(fd: int, span: Span) -> None:
    """Bring `span` into the page cache. Blocks."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, span.start, 4 * len(span), os.POSIX_FADV_WILLNEED)
    os.preadv(fd, [bytearray(len(span))], span.start)


class _File:
    """What loop.sendfile asks of a file object, around a descriptor that many responses share by offset."""

    mode = "rb"

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._position = 0

    def fileno(self) -> int:
        return self._fd

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def readinto(self, buffer: memoryview) -> int:
        count = os.preadv(self._fd, [buffer], self._position)
        self._position += count
        return count
