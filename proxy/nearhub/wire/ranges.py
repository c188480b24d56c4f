"""The Range family of headers (RFC 9110 §13.1.5, §14). Header text in, spans out; nothing else.

Our own parser, since a mirror needs what web frameworks get wrong: If-Range by strong comparison, several ranges, suffixes,
and "unknown or malformed means ignore it".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from nearhub.wire.spans import Span

MAX_RANGES = 8
"""More ranges than this, or overlapping ones, get the whole representation (RFC 9110 §17.15)."""

_SPEC = re.compile(r"[ \t]*(?:([0-9]+)-([0-9]*)|-([0-9]+))[ \t]*\Z", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]+)-([0-9]+)/([0-9]+|\*)\Z", re.ASCII)


class Shape(Enum):
    """How the client wrote a range: what it may safely be given depends on it (P1a, P1b)."""

    CLOSED = "a-b"
    OPEN = "a-"
    SUFFIX = "-n"


@dataclass(frozen=True, slots=True)
class Asked:
    """One satisfiable range of a representation."""

    span: Span
    shape: Shape


class Unsatisfiable(Exception):
    """A well-formed Range of which nothing lies in the representation: 416."""


def parse_range(header: str | None, size: int) -> tuple[Asked, ...]:
    """The ranges that `header` asks of a representation of `size` bytes; () means: send all of it.

    Unknown unit, malformed, too many or overlapping ranges → (). Raises Unsatisfiable when no range has a byte.
    """
    if header is None:
        return ()
    unit, equals, specs = header.partition("=")
    if not equals or unit.strip().lower() != "bytes":
        return ()
    asked: list[Asked] = []
    texts = [text for text in specs.split(",") if text.strip(" \t")]
    if not texts or len(texts) > MAX_RANGES:
        return ()
    for text in texts:
        match = _SPEC.match(text)
        if match is None:
            return ()
        first, last, suffix = match.groups()
        if suffix is not None:
            length = _clamped(suffix, size)
            if length:
                asked.append(Asked(Span(size - length, size), Shape.SUFFIX))
            continue
        start = _clamped(first, size)
        if last and _less(last, first):
            return ()
        if start < size:
            stop = _clamped(last, size - 1) + 1 if last else size
            asked.append(Asked(Span(start, stop), Shape.CLOSED if last else Shape.OPEN))
    if not asked:
        raise Unsatisfiable
    ordered = sorted(a.span for a in asked)
    if any(left.stop > right.start for left, right in pairwise(ordered)):
        return ()
    return tuple(asked)


def _clamped(digits: str, limit: int) -> int:
    """int(digits), at most `limit`; numbers of absurd length are never converted."""
    digits = digits.lstrip("0") or "0"
    return limit if len(digits) > 19 else min(int(digits), limit)


def _less(a: str, b: str) -> bool:
    a, b = a.lstrip("0"), b.lstrip("0")
    return (len(a), a) < (len(b), b)


def etag_matches(header: str, etag: str) -> bool:
    """If-None-Match (RFC 9110 §13.1.2): weak comparison against the opaque `etag`, given without quotes."""
    if header.strip() == "*":
        return True
    return any(_opaque(candidate) == etag for candidate in header.split(","))


def if_range_holds(header: str | None, etag: str) -> bool:
    """If-Range (RFC 9110 §13.1.5): strong comparison. A date never matches: we send no Last-Modified."""
    return header is None or header.strip() == f'"{etag}"'


def _opaque(text: str) -> str:
    return text.strip().removeprefix("W/").strip('"')


def format_range(span: Span) -> str:
    """Request header value for a non-empty span."""
    return f"bytes={span.start}-{span.stop - 1}"


def format_content_range(span: Span, size: int) -> str:
    return f"bytes {span.start}-{span.stop - 1}/{size}"


def format_unsatisfied(size: int) -> str:
    return f"bytes */{size}"


def parse_content_range(header: str | None) -> tuple[Span, int | None] | None:
    """(span, complete length or None when "*"); None when absent or not of the form."""
    match = _CONTENT_RANGE.match(header.strip()) if header else None
    if match is None or len(match[1]) > 19 or len(match[2]) > 19 or len(match[3]) > 19:
        return None
    start, last = int(match[1]), int(match[2])
    if last < start:
        return None
    return Span(start, last + 1), None if match[3] == "*" else int(match[3])
