"""GET and HEAD of …/resolve/…: parse → authorise → resolve → plan (pure) → open → send. Never a redirect."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from aiohttp import web

from nearhub.access import Access
from nearhub.affinity import Affinity, client_key
from nearhub.errors import NearhubError, ReadOnly
from nearhub.fill import FillEngine, Source
from nearhub.reader import Reader
from nearhub.resolve import Resolver
from nearhub.web.middleware import STATUS, CutError, base_headers
from nearhub.wire.cachestatus import CacheStatus
from nearhub.wire.reply import Reply, plan_file
from nearhub.wire.spans import Span
from nearhub.wire.target import parse_file

WRITE_TIMEOUT_S = 300.0
"""A client that does not take one piece (1 MiB at most) in this time is gone."""
SMALL_WRITE = 64 * 1024
"""Up to this many bytes, one read and one write cost less than sendfile's set-up."""
_NOWAIT = getattr(os, "RWF_NOWAIT", None)  # Linux


@dataclass(frozen=True, slots=True)
class Files:
    """What serving files needs."""

    access: Access
    resolver: Resolver
    affinity: Affinity
    fills: FillEngine

    async def serve(self, request: web.Request, path: str) -> web.StreamResponse:
        """`path` is raw, without prefix and query. Raises NearhubError before, CutError after the headers."""
        target = parse_file(path)
        if request.method not in ("GET", "HEAD"):
            raise ReadOnly("this is a read-only mirror: files can only be read")
        client = request.remote or "unknown"
        await self.access.authorise(target, client)
        who = client_key(client, request.headers.get("User-Agent", ""))
        is_plain_range = request.method == "GET" and "Range" in request.headers and "If-Range" not in request.headers
        with ExitStack() as stack:
            if is_plain_range:
                stack.enter_context(self.affinity.ranging(who, target))
            commit = self.affinity.commit_for(who, target, is_head=request.method == "HEAD", is_plain_range=is_plain_range)
            resolved = await self.resolver.resolve(target.at(commit) if commit else target, client)
            if commit is None:
                self.affinity.note(who, target, resolved.meta.commit)
            source = Source(target.at(resolved.meta.commit), resolved.meta)
            reply = plan_file(
                request.method,
                request.headers,
                target,
                source.meta,
                caution=self.fills.caution(source.meta.blob, client),
                attachment=request.query.get("download") == "true",
                boundary=uuid.uuid4().hex,
            )
            readers = [stack.enter_context(closing(await self.fills.open(source, part.asked, client))) for part in reply.parts]
            for reader in readers:
                await reader.ready()
            status = readers[0].status if readers else CacheStatus(detail="stale" if resolved.is_stale else None)
            request[STATUS] = status.word
            headers = reply.headers | base_headers(request) | {"Cache-Status": str(status)}
            return await send(request, reply, headers, readers)


async def send(request: web.Request, reply: Reply, headers: dict[str, str], readers: Sequence[Reader]) -> web.StreamResponse:
    """The only place that writes a body. Once begun, an error of ours raises CutError."""
    response = web.StreamResponse(status=reply.status, headers=headers)
    if reply.status != 304:
        response.content_length = reply.length
    await response.prepare(request)
    try:
        for part, reader in zip(reply.parts, readers, strict=True):
            if part.lead:
                await response.write(part.lead)
            while (span := await reader.next_span()) is not None:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await _send_span(request, response, reader.fd, span)
        if reply.trailer:
            await response.write(reply.trailer)
    except NearhubError as exc:
        raise CutError(response, exc) from exc
    except TimeoutError:
        raise ConnectionResetError("the client stopped reading") from None
    await response.write_eof()
    return response


async def _send_span(request: web.Request, response: web.StreamResponse, fd: int, span: Span) -> None:
    """From the page cache to the socket: by sendfile, without a copy in Python, and without a disk read on the loop."""
    if len(span) <= SMALL_WRITE:
        await response.write(await _read(fd, span))
        return
    loop = asyncio.get_running_loop()
    if not _in_memory(fd, span):
        await loop.run_in_executor(None, _read_through, fd, span)
    if request.transport is None or request.transport.is_closing():
        raise ConnectionResetError("the client left")
    await loop.sendfile(request.transport, _File(fd), span.start, len(span), fallback=True)  # type: ignore[arg-type]


async def _read(fd: int, span: Span) -> bytes:
    if _NOWAIT is not None:
        buffer = bytearray(len(span))
        try:
            if os.preadv(fd, [buffer], span.start, _NOWAIT) == len(span):
                return bytes(buffer)
        except OSError:
            pass  # not in memory (EAGAIN), or a file system without RWF_NOWAIT: the thread below reads it
    return await asyncio.get_running_loop().run_in_executor(None, os.pread, fd, len(span), span.start)


def _in_memory(fd: int, span: Span) -> bool:
    """Whether the first and last page of `span` can be read without waiting for the disk."""
    if _NOWAIT is None:
        return False
    try:
        return all(os.preadv(fd, [bytearray(1)], at, _NOWAIT) == 1 for at in (span.start, span.stop - 1))
    except OSError:
        return False


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
