"""A question and an answer as values: what the handlers take and give. No sockets here."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol
from urllib.parse import quote

from multidict import CIMultiDict

from tests.hub.content import File, Memory, Source, read_all
from tests.hub.ranges import Span, Unsatisfiable, asked_span, still_valid, unchanged


@dataclass(frozen=True, slots=True)
class Lie:
    """What a fault wants the handlers to believe instead of the truth."""

    etag_salt: str = ""
    source: Source | None = None
    files: Mapping[str, File] = field(default_factory=dict)


class Stream(Protocol):
    """A body of unknown length, made while it is sent."""

    async def read(self, limit: int) -> bytes:
        """Some bytes, at most `limit`; none at the end."""
        ...

    async def close(self) -> None:
        """Give up what makes the bytes; called once, whether or not it was read."""
        ...


TRUTH = Lie()
NOTHING = Span(0, 0)
EMPTY = Memory(b"")


@dataclass(frozen=True)
class Ask:
    """A request: everything an answer may depend on."""

    method: str
    raw_path: str
    headers: Mapping[str, str]
    body: bytes = b""
    lie: Lie = TRUTH
    pieces: AsyncIterator[bytes] | None = None
    """The body where it is read while the answer flows."""

    @property
    def path(self) -> str:
        """The path, still encoded, without the query."""
        return self.raw_path.partition("?")[0]

    @property
    def query(self) -> str:
        return self.raw_path.partition("?")[2]

    @property
    def token(self) -> str | None:
        """The bearer token, if any."""
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        return value.strip() if scheme.lower() == "bearer" else None


@dataclass(frozen=True)
class Reply:
    """A response: status, headers, and which span of which source is its body; or the stream that is."""

    status: int
    headers: CIMultiDict[str]
    source: Source = EMPTY
    span: Span = NOTHING
    is_chunked: bool = False
    stream: Stream | None = None

    @property
    def has_content(self) -> bool:
        """Whether body faults have something to bite on."""
        return self.stream is not None or (self.status in (200, 206) and len(self.span) > 0)


def whole(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Reply:
    """An answer whose body is these bytes."""
    return Reply(status, CIMultiDict(headers or {}), Memory(body), Span(0, len(body)))


def as_json(data: object, headers: Mapping[str, str] | None = None, status: int = 200) -> Reply:
    """An answer in JSON."""
    body = json.dumps(data, separators=(",", ":")).encode()
    return whole(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


def redirect(status: int, location: str, headers: Mapping[str, str] | None = None) -> Reply:
    """A redirect with the note that the Hub puts into its body; Content-Length is the note's, not the file's."""
    note = f"{HTTPStatus(status).phrase}. Redirecting to {location}".encode()
    return whole(status, note, {"Content-Type": "text/plain; charset=utf-8", "Location": location, **(headers or {})})


class HubError(Exception):
    """An answer that is an error, told in headers as the Hub tells it."""

    def __init__(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}

    def reply(self) -> Reply:
        return as_json({"error": self.message}, self._told(), self.status)

    def as_text(self) -> Reply:
        """The answer for people who see the body, as git shows it."""
        return whole(self.status, self.message.encode(), {"Content-Type": "text/plain; charset=utf-8", **self._told()})

    def _told(self) -> dict[str, str]:
        told = {"X-Error-Message": self.message, **self.headers}
        if self.code:
            told["X-Error-Code"] = self.code
        return told


def too_many(told: Mapping[str, str]) -> Reply:
    """429 of a client that has used up its window; `told` are its RateLimit headers."""
    wait_s = told["RateLimit"].rpartition("t=")[2]
    return HubError(429, None, "Too Many Requests", {"Retry-After": wait_s}).reply()


def file_reply(ask: Ask, file: File, etag: str, headers: Mapping[str, str], *, gzip_from: int | None = None) -> Reply:
    """200, 206, 304 or 416 for a file: the one place that knows about Range and validators.

    `gzip_from` is the size from which text is compressed for clients that take gzip; None never compresses.
    """
    source = ask.lie.source or file.source
    quoted = f'"{_salted(etag, ask.lie.etag_salt)}"'
    answer: CIMultiDict[str] = CIMultiDict(headers)
    answer["ETag"] = quoted
    if unchanged(ask.headers.get("If-None-Match"), quoted):
        return Reply(304, answer)
    answer.setdefault("Content-Type", file.media_type)
    answer["Accept-Ranges"] = "bytes"
    asked = ask.headers.get("Range") if still_valid(ask.headers.get("If-Range"), quoted) else None
    if asked is None and gzip_from is not None and file.size >= gzip_from and _takes_gzip(ask) and file.is_text:
        return _compressed(source, answer)
    try:
        span = asked_span(asked, source.size)
    except Unsatisfiable:
        answer["Content-Range"] = f"bytes */{source.size}"
        return Reply(416, answer)
    if span is None:
        return Reply(200, answer, source, Span(0, source.size))
    answer["Content-Range"] = span.content_range(source.size)
    return Reply(206, answer, source, span)


def _salted(etag: str, salt: str) -> str:
    """The same ETag, or with a salt one of the same length that differs."""
    return etag if not salt else f"{int(etag, 16) ^ int(salt, 16):0{len(etag)}x}"


def _takes_gzip(ask: Ask) -> bool:
    offers = [one.strip().lower() for one in ask.headers.get("Accept-Encoding", "").split(",")]
    names = {offer.partition(";")[0].strip() for offer in offers if not offer.replace(" ", "").endswith(";q=0")}
    return "gzip" in names and "identity" not in names


def _compressed(source: Source, headers: CIMultiDict[str]) -> Reply:
    packed = gzip.compress(read_all(source), compresslevel=6, mtime=0)
    headers["ETag"] = "W/" + headers["ETag"]
    headers["Content-Encoding"] = "gzip"
    headers["Vary"] = "Accept-Encoding"
    del headers["Accept-Ranges"]
    return Reply(200, headers, Memory(packed), Span(0, len(packed)), is_chunked=True)


def disposition(path: str, kind: str = "inline") -> str:
    """Content-Disposition in the Hub's form, trailing semicolon included."""
    name = path.rsplit("/", 1)[-1]
    plain = name.encode("ascii", "replace").decode().replace('"', "_")
    return f"{kind}; filename*=UTF-8''{quote(name, safe='')}; filename=\"{plain}\";"
