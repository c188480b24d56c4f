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
from tests.hub.faults import BODY_ACTS, Act, Rule
from tests.hub.pace import MAX_CHUNK, Caps, Pacer
from tests.hub.ranges import Span
from tests.hub.reply import Reply

SEND_BUFFER = 256 * 1024
SENDFILE_BYTES = 4 << 20
_STOPPING = frozenset({Act.TRUNCATE, Act.DROP_EVERY, Act.RESET, Act.STALL})


@dataclass(frozen=True, slots=True)
class Wire:
    """Where a body goes and who keeps count."""

    request: web.BaseRequest
    caps: Caps
    carried: MutableMapping[Hashable, int]
    """Body bytes by connection, for faults that bite after so many."""
    count: Callable[[int], None]

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
    if reply.is_chunked:
        response.enable_chunked_encoding()
    elif reply.status not in (204, 304):
        response.content_length = announced
    writer = await response.prepare(wire.request)
    assert writer is not None
    if wire.request.method != "HEAD" and reply.status not in (204, 304):
        if reply.is_chunked:
            await _send_chunked(wire, response, reply)
        else:
            await _send_body(wire, writer, reply, rule)
            if extra:
                await _write(wire, writer, memoryview(b"!" * extra))
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
                await _stop(wire, rule)
                stop_at = None
            if position >= reply.span.stop:
                return
            pacers = _turn(pacers, own + wire.caps.pacers(wire.transport))
            end = min([reply.span.stop, position + MAX_CHUNK, *(position + pacer.chunk for pacer in pacers)])
            if stop_at is not None and position < stop_at:
                end = min(end, stop_at)
            piece = memoryview(reply.source.read(position, end))
            for pacer in pacers:
                await pacer.take(len(piece))
            if rule is not None and act is Act.CORRUPT:
                piece = _flipped(piece, position, rule.fault.at)
            await _write(wire, writer, piece)
            position += len(piece)
    finally:
        _turn(pacers, [])


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
    """The file offset at which something happens to this body."""
    fault = rule.fault
    if fault.at is not None:
        return fault.at
    if fault.after is None:
        return None
    already = wire.carried.get(wire.transport, 0) if fault.act is Act.DROP_EVERY else 0
    at = span.start + max(0, fault.after - already)
    return at if at <= span.stop else None


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


def _flipped(piece: memoryview, position: int, at: int | None) -> memoryview:
    if at is None or not position <= at < position + len(piece):
        return piece
    changed = bytearray(piece)
    changed[at - position] ^= 0xFF
    return memoryview(changed)


async def _write(wire: Wire, writer: AbstractStreamWriter, piece: memoryview) -> None:
    """Write past aiohttp's length check, and count what the kernel took even if the client leaves meanwhile."""
    transport = wire.transport
    transport.write(piece)
    taken = 0 if transport.is_closing() else len(piece) - transport.get_write_buffer_size()
    taken = max(0, taken)
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
