"""Request bodies: bounded in size, and in how long they may keep us waiting. The only reader of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from nearhub.errors import BadTarget, BodyTooSlow, TooLarge
from nearhub.web.connections import PATIENCE

_PIECE = 64 * 1024
_SLOWEST = 16 * 1024
"""Bytes per second: a body that comes at this rate may come for as long as it likes."""


async def pieces(request: web.BaseRequest, most: int, whose: str) -> AsyncIterator[bytes]:
    """The body of at most `most` bytes, unpacked by aiohttp as it comes. `whose`: the client that is meant to send it.

    Raises TooLarge, BodyTooSlow, BadTarget where it cannot be unpacked or is cut.
    """
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    clock = asyncio.get_running_loop().time
    patience = request.get(PATIENCE, 10.0)
    count, waited = 0, 0.0
    try:
        while True:
            began = clock()
            async with asyncio.timeout(patience + count / _SLOWEST - waited):
                piece = await request.content.read(_PIECE)
            if not piece:
                return
            waited += clock() - began
            count += len(piece)
            if count > most:
                raise TooLarge(f"a request of more than {most >> 20} MiB is no {whose}'s")
            yield piece
    except TimeoutError:
        raise BodyTooSlow(f"the request's body did not come: {count} bytes in {patience:g} s") from None
    except web.RequestPayloadError as exc:
        raise BadTarget(f"the request's body cannot be read: {' '.join(str(exc).split())}") from None


async def whole(request: web.BaseRequest, most: int, whose: str) -> bytes:
    """As pieces(), all of it."""
    body = bytearray()
    async for piece in pieces(request, most, whose):
        body += piece
    return bytes(body)
