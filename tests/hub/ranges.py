"""Range, If-Range and If-None-Match as an honest server answers them (RFC 9110). Pure; spans are half-open."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=\s*(\d*)-(\d*)\s*")


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes [start, stop) of a file."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def content_range(self, total: int) -> str:
        return f"bytes {self.start}-{self.stop - 1}/{total}"


class Unsatisfiable(Exception):
    """No byte of the file is in the range asked for: 416."""


def asked_span(header: str | None, size: int) -> Span | None:
    """The one span that a Range header asks for; None where the whole file is the answer."""
    match = _RANGE.fullmatch(header) if header else None
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        if int(last) == 0 or size == 0:
            raise Unsatisfiable
        return Span(max(0, size - int(last)), size)
    start, stop = int(first), min(int(last) + 1, size) if last else size
    if last and int(last) < start:
        return None
    if start >= size:
        raise Unsatisfiable
    return Span(start, stop)


def still_valid(if_range: str | None, etag: str) -> bool:
    """Whether If-Range lets the Range stand: absent, or a strong match (a date never matches here)."""
    return if_range is None or (if_range.strip() == etag and not etag.startswith("W/"))


def unchanged(if_none_match: str | None, etag: str) -> bool:
    """Whether If-None-Match makes the answer a 304 (weak comparison)."""
    if if_none_match is None:
        return False
    wanted = {one.strip().removeprefix("W/") for one in if_none_match.split(",")}
    return "*" in wanted or etag.removeprefix("W/") in wanted
