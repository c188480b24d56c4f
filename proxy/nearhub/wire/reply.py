"""Request headers + metadata → status, headers and byte spans. Pure: the whole of RFC 9110 §13–14 as this mirror speaks it,
and P1b: how a client that may hold bytes which failed verification is kept from continuing them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from nearhub.errors import ResumeUnsafe
from nearhub.wire import ranges
from nearhub.wire.headers import FileMetadata, ObjectMetadata, file_headers
from nearhub.wire.lfs import object_headers
from nearhub.wire.ranges import Asked, Shape, Unsatisfiable
from nearhub.wire.spans import Span
from nearhub.wire.target import FileTarget

_RESTARTS_ON_200 = re.compile(r"\bhf_hub/[1-9]", re.ASCII)
_IS_LFS = re.compile(r"\bgit-lfs/", re.ASCII)


class Caution(Enum):
    """What is remembered of this blob's verification, for this client address (P1b)."""

    NONE = "none"
    MISMATCHED = "mismatched"
    """In the last 24 h an upstream's bytes for this blob failed verification."""
    TAINTED = "tainted"
    """… and this address read some of them."""


@dataclass(frozen=True, slots=True)
class Part:
    """`lead` (multipart headers, else empty) and then the bytes of `asked`."""

    lead: bytes
    asked: Asked


@dataclass(frozen=True, slots=True)
class Reply:
    """What to send: `parts` in order, then `trailer`. HEAD and 304 and 416 have no parts."""

    status: int
    headers: dict[str, str]
    length: int
    parts: tuple[Part, ...] = ()
    trailer: bytes = b""

    @property
    def is_download(self) -> bool:
        """Whether a client could take this for the whole rest of the file: no footer allowance then (P1a)."""
        return any(part.asked.shape is Shape.OPEN for part in self.parts)


def plan_file(
    method: str,
    request: Mapping[str, str],
    target: FileTarget,
    meta: FileMetadata,
    *,
    caution: Caution = Caution.NONE,
    attachment: bool = False,
    boundary: str = "nearhub",
) -> Reply:
    """The answer to HEAD or GET of a file. `request` headers must be case-insensitive.

    Raises ResumeUnsafe (412) where continuing could join wrong bytes with right ones.
    """
    headers = file_headers(target, meta, attachment=attachment)
    return _plan(method, request, headers, meta, request.get("Range"), caution, boundary)


def plan_object(
    method: str, request: Mapping[str, str], meta: ObjectMetadata, *, caution: Caution = Caution.NONE, boundary: str = "nearhub"
) -> Reply:
    """As plan_file, of an LFS object.

    git-lfs hashes what it has, and starts over on a 200 (measured): with caution its resumes get the whole. On a 412 it would
    try the same again until it gives up.
    """
    starts_over = caution is not Caution.NONE and _IS_LFS.search(request.get("User-Agent", ""))
    range_header = None if starts_over else request.get("Range")
    return _plan(method, request, object_headers(meta), meta, range_header, caution, boundary)


def _plan(
    method: str,
    request: Mapping[str, str],
    headers: dict[str, str],
    meta: FileMetadata | ObjectMetadata,
    range_header: str | None,
    caution: Caution,
    boundary: str,
) -> Reply:
    if_none_match = request.get("If-None-Match")
    if if_none_match is not None and ranges.etag_matches(if_none_match, meta.etag):
        return Reply(304, headers, 0)
    if method == "HEAD":
        return Reply(200, headers, meta.size)
    if not ranges.if_range_holds(request.get("If-Range"), meta.etag):
        range_header = None
    try:
        asked = ranges.parse_range(range_header, meta.size)
    except Unsatisfiable:
        return Reply(416, headers | {"Content-Range": ranges.format_unsatisfied(meta.size)}, 0)
    if asked and not _may_continue(asked, caution, request):
        asked = ()
    if not asked:
        whole = Asked(Span(0, meta.size), Shape.OPEN)
        return Reply(200, headers, meta.size, (Part(b"", whole),))
    if len(asked) == 1:
        span = asked[0].span
        headers["Content-Range"] = ranges.format_content_range(span, meta.size)
        return Reply(206, headers, len(span), (Part(b"", asked[0]),))
    return _multipart(asked, headers, meta.size, boundary)


def _may_continue(asked: tuple[Asked, ...], caution: Caution, request: Mapping[str, str]) -> bool:
    """True: serve the ranges. False: serve the whole file, which makes this client start over. Raises ResumeUnsafe."""
    if caution is Caution.NONE:
        return True
    resumes = any(a.shape is Shape.OPEN and a.span.start > 0 for a in asked)
    if resumes:
        # A client that sent If-Range must cope with 200, and huggingface_hub 1 and later restarts on it (measured). Others
        # would keep their prefix: wget -c, and huggingface_hub 0.x, which appends the whole file to it.
        if "If-Range" in request or _RESTARTS_ON_200.search(request.get("User-Agent", "")):
            return False
    elif caution is not Caution.TAINTED or all(a.shape is Shape.OPEN for a in asked):
        return True  # an open range from 0 continues nothing
    raise ResumeUnsafe(
        "an upstream sent wrong bytes for this file, and the part you have may be of them: delete it and start over"
    )


def _multipart(asked: tuple[Asked, ...], headers: dict[str, str], size: int, boundary: str) -> Reply:
    """206 multipart/byteranges (RFC 9110 §14.6)."""
    part_type = headers["Content-Type"]
    parts = []
    for i, a in enumerate(asked):
        lead = f"{'' if i == 0 else chr(13) + chr(10)}--{boundary}\r\nContent-Type: {part_type}\r\n"
        lead += f"Content-Range: {ranges.format_content_range(a.span, size)}\r\n\r\n"
        parts.append(Part(lead.encode("latin-1"), a))
    trailer = f"\r\n--{boundary}--\r\n".encode()
    length = sum(len(p.lead) + len(p.asked.span) for p in parts) + len(trailer)
    headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
    return Reply(206, headers, length, tuple(parts), trailer)
