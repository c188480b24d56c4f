"""FileMetadata ↔ the Hub's headers. What is read from upstream and sent to clients is listed here; nothing else passes.

Xet is hidden: X-Xet-Hash, X-Xet-Refresh-Route and Link are never read, so they can never be sent on.
"""

from __future__ import annotations

import functools
import mimetypes
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import quote

from nearhub.errors import UpstreamFailed
from nearhub.wire.target import FileTarget, is_commit

EXPOSED = (
    "X-Repo-Commit,X-Request-Id,X-Error-Code,X-Error-Message,X-Total-Count,ETag,Link,Accept-Ranges,Content-Range,"
    "Content-Length,X-Linked-Size,X-Linked-ETag,X-Xet-Hash"
)
"""Access-Control-Expose-Headers, as the Hub has it."""

_SHA256 = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
_SHA1 = re.compile(r"[0-9a-f]{40}\Z", re.ASCII)
_RESOLVE_CACHE_COMMIT = re.compile(r"/api/resolve-cache/[a-z]+/[^?]*?/([0-9a-f]{40})/")
_DIGITS = re.compile(r"[0-9]{1,18}\Z", re.ASCII)
_TYPES = mimetypes.MimeTypes(filenames=())
# A browser must not run what a stranger's repo holds under this mirror's origin.
_SCRIPTABLE = re.compile(r"text/html|image/svg|xml|javascript|ecmascript", re.IGNORECASE)


class Algo(StrEnum):
    """What a blob's name is the hash of: the bytes (LFS), or `blob <size>\\0` and the bytes (git)."""

    SHA256 = "sha256"
    SHA1 = "sha1"


@dataclass(frozen=True, slots=True, order=True)
class BlobId:
    """The name of immutable bytes; also the file's ETag, exactly as the Hub's."""

    algo: Algo
    hex: str

    def __str__(self) -> str:
        return f"{self.algo}-{self.hex}"

    @classmethod
    def from_etag(cls, etag: str) -> BlobId:
        """64 hex is an LFS sha256, 40 hex a git blob sha1; ValueError for anything else."""
        if _SHA256.match(etag):
            return cls(Algo.SHA256, etag)
        if _SHA1.match(etag):
            return cls(Algo.SHA1, etag)
        raise ValueError(f"{etag!r} is neither a sha256 nor a git blob sha1")


@dataclass(frozen=True, slots=True)
class FileMetadata:
    """What one path is at one commit. `size` in bytes; `source`: the upstream that said so, where one was asked."""

    commit: str
    blob: BlobId
    size: int
    source: str = field(default="", compare=False)

    @property
    def etag(self) -> str:
        """Opaque tag without quotes."""
        return self.blob.hex


@dataclass(frozen=True, slots=True)
class ObjectMetadata:
    """What one LFS object is, whichever files name it. `size` in bytes."""

    blob: BlobId
    size: int

    @property
    def etag(self) -> str:
        """Opaque tag without quotes."""
        return self.blob.hex


def normalise_etag(value: str | None) -> str | None:
    """`W/"x"`, `"x"` and `x` → x."""
    if value is None:
        return None
    return value.strip().removeprefix("W/").strip('"') or None


def read_metadata(headers: Mapping[str, str], url_path: str, *, is_redirect: bool) -> FileMetadata:
    """FileMetadata from the Hub's final answer to HEAD or GET of a resolve URL; `url_path` is what was asked.

    `headers` must be case-insensitive. The commit may be missing on resolve-cache answers, where the path has it. A redirect's
    own Content-Length is the length of the note in it, never the file's.
    """
    commit = headers.get("X-Repo-Commit") or _commit_in(url_path)
    if commit is None or not is_commit(commit):
        raise UpstreamFailed("the answer has no X-Repo-Commit: not a Hub's answer for a file")
    etag = normalise_etag(headers.get("X-Linked-ETag") or headers.get("ETag"))
    try:
        blob = BlobId.from_etag(etag or "")
    except ValueError as exc:
        raise UpstreamFailed(f"cannot verify this file, its ETag names no content: {exc}") from None
    size = _digits(headers.get("X-Linked-Size"))
    if size is None and not is_redirect and headers.get("Content-Encoding", "identity").lower() == "identity":
        size = _digits(headers.get("Content-Length"))
    if size is None:
        raise UpstreamFailed("the answer has no size: neither X-Linked-Size nor Content-Length")
    return FileMetadata(commit, blob, size)


def _commit_in(url_path: str) -> str | None:
    match = _RESOLVE_CACHE_COMMIT.search(url_path)
    return match[1] if match else None


def _digits(value: str | None) -> int | None:
    return int(value) if value and _DIGITS.match(value.strip()) else None


def file_headers(target: FileTarget, meta: FileMetadata, *, attachment: bool) -> dict[str, str]:
    """Headers of every answer about a file, whatever its status (hub-protocol: 200, 206, 304, 416).

    `target.revision` is what the client asked for: only a commit may be cached for ever.
    """
    headers = {
        "X-Repo-Commit": meta.commit,
        "ETag": f'"{meta.etag}"',
        "X-Linked-Size": str(meta.size),
        "Accept-Ranges": "bytes",
        "Content-Type": content_type(target.path),
        "Content-Disposition": content_disposition(target.path, attachment=attachment),
        "Cache-Control": _cache_control(target),
        "X-Content-Type-Options": "nosniff",
    }
    if meta.blob.algo is Algo.SHA256:
        headers["X-Linked-ETag"] = f'"{meta.etag}"'
    return headers


def _cache_control(target: FileTarget) -> str:
    if target.repo.is_restricted:
        return "private, no-cache"
    return "public, max-age=31536000, immutable" if target.is_pinned else "no-cache"


def cors_headers() -> dict[str, str]:
    """Browsers (transformers.js) read files and these headers from any origin; no credentials are involved."""
    return {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": EXPOSED, "Vary": "Origin"}


@functools.lru_cache(10_000)
def content_type(path: str) -> str:
    # "./": a name such as `data:text/x,y` is a name, not a URL that brings its own type.
    guess, encoding = _TYPES.guess_type("./" + path.rsplit("/", 1)[-1], strict=False)
    if guess is None or encoding is not None:  # what is compressed is not what is inside
        return "application/octet-stream"
    if _SCRIPTABLE.search(guess):
        return "text/plain; charset=utf-8"
    return f"{guess}; charset=utf-8" if guess.startswith("text/") else guess


@functools.lru_cache(10_000)
def content_disposition(path: str, *, attachment: bool) -> str:
    """huggingface_hub finds the name by `filename="…";`: the trailing semicolon is needed."""
    name = path.rsplit("/", 1)[-1]
    ascii_name = "".join(c if " " <= c <= "~" and c not in '"\\' else "_" for c in name)
    kind = "attachment" if attachment else "inline"
    return f"{kind}; filename*=UTF-8''{quote(name, safe='')}; filename=\"{ascii_name}\";"
