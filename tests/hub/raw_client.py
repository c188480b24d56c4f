"""A client that believes nothing: one request per connection, and how the connection ended. For tests of the stand-in."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What came back, byte for byte."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    """Everything after the headers until the server closed, chunked framing undone."""
    was_reset: bool


class Conversation:
    """An open connection, read step by step."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            return


async def ask(
    url: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b"", *, keep: bool = False
) -> Conversation:
    """Send one request; with `keep` the connection may carry another."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    conversation = Conversation(reader, writer)
    more = {} if keep else {"Connection": "close"}
    await again(conversation, url, method, {**(headers or {}), **more}, body)
    return conversation


async def again(
    conversation: Conversation, url: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b""
) -> None:
    """Send a request on an open connection, the URL untouched."""
    parts = urlsplit(url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    conversation.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    await conversation.writer.drain()


async def fetch(url: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
    """One request on its own connection, read until that closes."""
    conversation = await ask(url, method, headers, body)
    status, told, received, was_reset = 0, dict[str, str](), bytearray(), False
    try:
        status, told = await conversation.head()
        while piece := await conversation.reader.read(1 << 16):
            received += piece
    except (ConnectionResetError, asyncio.IncompleteReadError):
        was_reset = True
    finally:
        await conversation.close()
    content = _unchunked(bytes(received)) if told.get("transfer-encoding") == "chunked" else bytes(received)
    return Answer(status, told, content, was_reset)


def _unchunked(framed: bytes) -> bytes:
    content = bytearray()
    while framed:
        size, _, rest = framed.partition(b"\r\n")
        content += rest[: int(size, 16)]
        framed = rest[int(size, 16) + 2 :]
    return bytes(content)
