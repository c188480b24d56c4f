"""Raw URL path ↔ Target. Parse and format are inverses; percent-decoding happens here, once, and nowhere else.

Routing is on the raw path, since decoding first makes `refs%2Fpr%2F1/config.json` ambiguous. Past this file nobody sees
a URL. Names from URLs never become file names: they are keys of the index and segments of upstream URLs only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import quote, unquote_to_bytes

from nearhub.errors import BadTarget, EntryNotFound, NotRoutable, RepoNotFound

MAX_PATH_BYTES = 4096

_REPO_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?\Z", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}\Z", re.ASCII)
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SLASHES = re.compile(r"/{2,}")


class RepoKind(StrEnum):
    """The value is the word in API paths."""

    MODELS = "models"
    DATASETS = "datasets"
    SPACES = "spaces"


@dataclass(frozen=True, slots=True, order=True)
class Repo:
    """`name` is `owner/name`, or one segment for the Hub's canonical repos such as `gpt2`."""

    kind: RepoKind
    name: str

    def __str__(self) -> str:
        return self.name if self.kind is RepoKind.MODELS else f"{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class FileTarget:
    """One file of one repo at one revision (branch, tag, `refs/pr/1`, or commit)."""

    repo: Repo
    revision: str
    path: str

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, so that the answer can never change."""
        return is_commit(self.revision)

    def at(self, commit: str) -> FileTarget:
        return FileTarget(self.repo, commit, self.path)

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}:{self.path}"


def is_commit(revision: str) -> bool:
    return _COMMIT.match(revision) is not None


def split_prefix(raw_path: str, prefix: str) -> str:
    """`raw_path` without its query, duplicate slashes and `prefix`.

    A path outside the prefix is taken as it is, since a reverse proxy may have stripped it.
    """
    path = _SLASHES.sub("/", "/" + raw_path.partition("?")[0].partition("#")[0])
    if prefix and (path == prefix or path.startswith(prefix + "/")):
        path = path[len(prefix) :] or "/"
    return path


def parse_file(path: str) -> FileTarget:
    """Parse the raw, still percent-encoded path of a `…/resolve/…` URL, as split_prefix returns it."""
    if len(path) > MAX_PATH_BYTES:
        raise BadTarget(f"the URL path has {len(path)} bytes, {MAX_PATH_BYTES} are allowed")
    segments = path.strip("/").split("/")
    kind = RepoKind.MODELS
    if segments[0] in (RepoKind.DATASETS, RepoKind.SPACES):
        kind, segments = RepoKind(segments[0]), segments[1:]
    # A one-segment id is found by the marker; two segments win where both readings are possible.
    for ids in (2, 1):
        if len(segments) > ids + 2 and segments[ids] == "resolve":
            repo = Repo(kind, _repo_name(segments[:ids]))
            revision, rest = _revision(segments[ids + 1 :])
            return FileTarget(repo, revision, _file_path(rest))
    raise NotRoutable(f"this mirror does not serve {path!r}")


def format_file(target: FileTarget) -> str:
    """The canonical raw path for `target`; parse_file of it gives `target` back."""
    return f"{_repo_path(target.repo)}/resolve/{quote(target.revision, safe='')}/{quote(target.path, safe='/')}"


def _repo_path(repo: Repo) -> str:
    return f"/{repo.name}" if repo.kind is RepoKind.MODELS else f"/{repo.kind}/{repo.name}"


def _repo_name(segments: list[str]) -> str:
    name = "/".join(_decode(segment) for segment in segments)
    valid = all(_REPO_SEGMENT.match(part) for part in name.split("/")) and name.count("/") == len(segments) - 1
    if not valid or "--" in name or ".." in name or name.endswith(".git"):
        raise RepoNotFound(f"{name!r} is not a repo id: owner/name of letters, digits, '-', '_' and '.'")
    return name


def _revision(segments: list[str]) -> tuple[str, list[str]]:
    """(revision, remaining raw segments). `refs/pr/1` and `refs/convert/NAME` may come unencoded, as three segments."""
    width = 3 if segments[0] == "refs" and len(segments) > 3 and segments[1] in ("pr", "convert") else 1
    revision = "/".join(_decode(segment) for segment in segments[:width])
    if any(part in ("", ".", "..") for part in revision.split("/")) or len(revision) > 255:
        raise BadTarget(f"{revision!r} is not a revision")
    return revision, segments[width:]


def _file_path(segments: list[str]) -> str:
    path = _decode("/".join(segments))
    if "\\" in path:
        raise EntryNotFound(f"no file {path!r}: the separator in repo paths is '/'")
    if not path or any(part in ("", ".", "..") for part in path.split("/")):
        raise BadTarget(f"{path!r} is not a file path: empty, '.' and '..' segments are not allowed")
    return path


def _decode(raw: str) -> str:
    """Percent-decode once, strictly: broken escapes, invalid UTF-8 (overlong forms too), control bytes are refused."""
    if _BROKEN_ESCAPE.search(raw):
        raise BadTarget("the URL has a '%' that is not followed by two hex digits")
    try:
        text = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeError:  # encoding too: aiohttp hands on raw bytes that are not UTF-8 as lone surrogates
        raise BadTarget("the URL path is not UTF-8") from None
    if _CONTROL.search(text):
        raise BadTarget("the URL path has a control character")
    return text
