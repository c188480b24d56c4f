"""Putting an answer on the wire: exact counting, caps, and the faults that happen while a body flows."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from tests.hub.content import OnDisk
from tests.hub.faults import BODY_ACTS, OFFSET_ACTS, Act, Rule
from tests.hub.pace import MAX_CHUNK, Caps, Pacer
from tests.hub.ranges import Span
from tests.hub.reply import Reply

SEND_BUFFER = 256 * 1024
SENDFILE_BYTES = 4 << 20
_STOPPING = OFFSET_ACTS - {Act.CORRUPT}


@dataclass(frozen=True, slots=True)
class Wire:
    """Where a body goes and who keeps count."""

    request: web.BaseRequest
    caps: Caps
    carried: MutableMapping[Hashable, int]
    """Body bytes by connection, for faults that bite after so many."""
    count: Callable[[int], None]
    bites: Callable[[], bool]
    """Asked where a body has come to a fault's offset: whether the fault happens."""

    @property
    def transport(self) -> asyncio.Transport:
        transport = self.request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        return transport


class Cut(Exception):
    """The connection was cut on purpose."""


def tune(transport: asyncio.Transport) -> None:
    """Small buffers, and drain() only returns when the kernel has everything: counts stay exact."""
    transport.set_write_buffer_limits(high=0)
    raw = transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


def reset(transport: asyncio.Transport) -> None:
    """Close with RST instead of FIN."""
    raw = transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def send(wire: Wire, reply: Reply, rule: Rule | None) -> web.StreamResponse:
    """Send headers and body; raises Cut where the rule says that the connection ends in between."""
    response = web.StreamResponse(status=reply.status, headers=reply.headers)
    announced = len(reply.span)
    extra = 0
    if rule is not None and rule.fault.act is Act.OVERRUN:
        extra = int(rule.fault.number)
        if rule.fault.text == "announced":
            announced += extra
    if reply.is_chunked or reply.stream is not None:
        response.enable_chunked_encoding()
    elif reply.status not in (204, 304):
        response.content_length = announced
    writer = await response.prepare(wire.request)
    assert writer is not None
    if wire.request.method != "HEAD" and reply.status not in (204, 304):
        if reply.is_chunked:
            await _send_chunked(wire, response, reply)
        else:
            try:
                await _send_body(wire, writer, reply, rule)
            finally:
                if reply.stream is not None:
                    await reply.stream.close()
            if extra:
                is_chunk = reply.stream is not None and announced > len(reply.span)
                await _write(wire, writer, memoryview(b"!" * extra), is_chunk=is_chunk)
                if not is_chunk:
                    _cut(wire)
    await response.write_eof()
    return response


async def _send_chunked(wire: Wire, response: web.StreamResponse, reply: Reply) -> None:
    """Compressed text: small, so no fault or cap looks inside."""
    piece = reply.source.read(reply.span.start, reply.span.stop)
    await response.write(bytes(piece))
    wire.count(len(piece))


async def _send_body(wire: Wire, writer: AbstractStreamWriter, reply: Reply, rule: Rule | None) -> None:
    act = rule.fault.act if rule is not None and rule.fault.act in BODY_ACTS | {Act.RESET} else None
    if act is None and wire.caps.are_off and isinstance(reply.source, OnDisk) and len(reply.span):
        await _send_from_disk(wire, reply.source, reply.span)
        return
    own = [Pacer(rule.fault.number)] if rule is not None and act is Act.DRIP else []
    pacers: list[Pacer] = []
    stop_at = _stop_at(wire, reply.span, rule) if rule is not None and act in _STOPPING else None
    try:
        position = reply.span.start
        while True:
            if position == stop_at:
                assert rule is not None
                if wire.bites():
                    await _stop(wire, rule)
                stop_at = None
            pacers = _turn(pacers, own + wire.caps.pacers(wire.transport))
            end = position + min([MAX_CHUNK, *(pacer.chunk for pacer in pacers)])
            if stop_at is not None and position < stop_at:
                end = min(end, stop_at)
            piece = await _piece(reply, position, end)
            if not piece:
                return
            for pacer in pacers:
                await pacer.take(len(piece))
            at = rule.fault.at if rule is not None and act is Act.CORRUPT else None
            if at is not None and position <= at < position + len(piece) and wire.bites():
                piece = _flipped(piece, at - position)
            await _write(wire, writer, piece, is_chunk=reply.stream is not None)
            position += len(piece)
    finally:
        _turn(pacers, [])


async def _piece(reply: Reply, start: int, stop: int) -> memoryview:
    """The next bytes of a body, none past `stop`; none at its end."""
    if reply.stream is not None:
        return memoryview(await reply.stream.read(stop - start))
    end = min(stop, reply.span.stop)
    return memoryview(reply.source.read(start, end) if start < end else b"")


def _turn(old: list[Pacer], new: list[Pacer]) -> list[Pacer]:
    """Stop using the pacers that no longer apply, begin with those that do."""
    for pacer in old:
        if pacer not in new:
            pacer.end()
    for pacer in new:
        if pacer not in old:
            pacer.begin()
    return new


def _stop_at(wire: Wire, span: Span, rule: Rule) -> int | None:
    """The offset of the file, or of the stream, at which something happens to this body."""
    fault = rule.fault
    if fault.at is not None:
        return fault.at
    if fault.after is None:
        return None
    already = wire.carried.get(wire.transport, 0) if fault.act is Act.DROP_EVERY else 0
    return span.start + max(0, fault.after - already)


async def _stop(wire: Wire, rule: Rule) -> None:
    if rule.fault.act is Act.STALL:
        await rule.hold()
        return
    if rule.fault.act is Act.RESET:
        reset(wire.transport)
        raise Cut
    _cut(wire)


def _cut(wire: Wire) -> None:
    """Close the connection after what was written."""
    wire.transport.close()
    raise Cut


def _flipped(piece: memoryview, at: int) -> memoryview:
    changed = bytearray(piece)
    changed[at] ^= 0xFF
    return memoryview(changed)


async def _write(wire: Wire, writer: AbstractStreamWriter, piece: memoryview, *, is_chunk: bool) -> None:
    """Write past aiohttp's length check, and count what the kernel took even if the client leaves meanwhile."""
    transport = wire.transport
    before, after = (b"%x\r\n" % len(piece), b"\r\n") if is_chunk else (b"", b"")
    transport.write(b"".join((before, piece, after)) if is_chunk else piece)
    framed = len(before) + len(piece) + len(after)
    taken = 0 if transport.is_closing() else framed - transport.get_write_buffer_size() - len(before)
    taken = min(len(piece), max(0, taken))
    _count(wire, transport, taken)
    await writer.drain()
    _count(wire, transport, len(piece) - taken)


async def _send_from_disk(wire: Wire, source: OnDisk, span: Span) -> None:
    """The kernel copies; if the client leaves meanwhile, the file position tells how far it came."""
    loop, transport = asyncio.get_running_loop(), wire.transport
    with source.path.open("rb") as handle:
        for start in range(span.start, span.stop, SENDFILE_BYTES):
            handle.seek(start)
            try:
                await loop.sendfile(transport, handle, start, min(SENDFILE_BYTES, span.stop - start))
            finally:
                _count(wire, transport, max(0, handle.tell() - start))


def _count(wire: Wire, transport: asyncio.Transport, size: int) -> None:
    if size:
        wire.carried[transport] = wire.carried.get(transport, 0) + size
        wire.count(size)
