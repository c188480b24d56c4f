"""Raw URL path ↔ Target. Parse and format are inverses; percent-decoding happens here, once, and nowhere else.

Routing is on the raw path, since decoding first makes `refs%2Fpr%2F1/config.json` ambiguous. Past this file nobody sees
a URL. Names from URLs never become file names: they are keys of the index and segments of upstream URLs only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from urllib.parse import quote, unquote_to_bytes

from nearhub.errors import BadTarget, EntryNotFound, NearhubError, NotRoutable, RepoNotFound

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


class Scope(StrEnum):
    """Who may see what is known of a repo. The value is the word in the index."""

    PUBLIC = "public"
    """What was learnt with nobody's token: everybody."""
    RESTRICTED = "restricted"
    """What was learnt with somebody's token: who has a grant. Only the door (access.py) makes such repos."""


@dataclass(frozen=True, slots=True, order=True)
class Repo:
    """`name` is `owner/name`, or one segment for the Hub's canonical repos such as `gpt2`."""

    kind: RepoKind
    name: str
    scope: Scope = Scope.PUBLIC
    may_ask: bool = field(default=True, compare=False, repr=False)
    """Whether upstream may be asked about it for this caller's sake; if not, he has what is here (access.py)."""

    def __str__(self) -> str:
        return self.name if self.kind is RepoKind.MODELS else f"{self.kind}/{self.name}"

    @classmethod
    def from_text(cls, text: str) -> Repo:
        """The inverse of str()."""
        kind, slash, name = text.partition("/")
        if slash and kind in (RepoKind.DATASETS, RepoKind.SPACES):
            return cls(RepoKind(kind), name)
        return cls(RepoKind.MODELS, text)

    def folded(self) -> Repo:
        """In lower case: the Hub takes names in any case."""
        return replace(self, name=self.name.lower())

    @property
    def is_restricted(self) -> bool:
        return self.scope is Scope.RESTRICTED


class Verb(StrEnum):
    """What is asked of a repo. The value is the word in API paths, but for INFO."""

    INFO = "info"
    TREE = "tree"
    PATHS_INFO = "paths-info"
    REFS = "refs"
    COMMITS = "commits"
    AUTH_CHECK = "auth-check"
    XET_TOKEN = "xet-read-token"
    PASSED = "passed"
    """Answered by upstream's own words: discussions, compare, parquet and the like."""


@dataclass(frozen=True, slots=True)
class RepoCall:
    """`/api/{kind}/{repo}/…`. `path`: of a file or directory, "" the top; for PASSED the raw rest of the URL."""

    verb: Verb
    repo: Repo
    revision: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class ListCall:
    """`/api/{kind}`: a listing or a search."""

    kind: RepoKind


@dataclass(frozen=True, slots=True)
class NamedCall:
    """Any other `/api/…`; `name` is the raw rest of the URL."""

    name: str


class GitService(StrEnum):
    """What git asks a server for. The value is the word in URLs."""

    UPLOAD_PACK = "git-upload-pack"
    """Clone and fetch."""
    RECEIVE_PACK = "git-receive-pack"
    """Push."""


@dataclass(frozen=True, slots=True)
class GitTarget:
    """`…/{repo}[.git]/info/refs` (`service` None: the query names it), or `…/{repo}[.git]/{service}`."""

    repo: Repo
    service: GitService | None


@dataclass(frozen=True, slots=True)
class LfsCall:
    """`…/{repo}[.git]/info/lfs/{what}`: `objects/batch`, `locks`, `locks/verify`, or a word that no server here knows."""

    repo: Repo
    what: str


@dataclass(frozen=True, slots=True)
class LfsTarget:
    """One LFS object of one repo, by its oid (64 hex): at `/-/lfs/{kind}/{repo}/{oid}` here, in a batch's answer upstream."""

    repo: Repo
    oid: str

    def __str__(self) -> str:
        return f"{self.repo}#{self.oid}"


@dataclass(frozen=True, slots=True)
class PageTarget:
    """What a browser opens: a repo, or a directory of it. `path`: "" the top."""

    repo: Repo
    revision: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class RawTarget:
    """`…/raw/…`: the file as git stores it, which for LFS is the pointer."""

    file: FileTarget


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


Target = FileTarget | RawTarget | RepoCall | ListCall | NamedCall | GitTarget | LfsCall | LfsTarget | PageTarget

DEFAULT_REVISION = "main"
_PAGE_WORDS = {"resolve", "raw", "tree", "blob", "blame", "commits", "commit", "discussions", "settings", "edit", "upload"}
_PAGE_WORDS |= {"new", "delete", "info", "community", "viewer", "embed", "duplicate", "branches", "refs", *GitService}
"""What follows a repo in the Hub's own URLs: never the first directory of a short URL."""
_TOP_WORDS = {"api", *RepoKind, "kernels", "buckets", "collections", "papers", "posts", "blog", "docs", "learn", "tasks"}
_TOP_WORDS |= {"organizations", "oauth", "login", "join", "search", "inference", "chat", "front", "avatars", "v2"}
"""What the Hub's other URLs begin with (`v2`: a registry's, which ollama asks): never the owner in a short URL."""
_NO_OWNERS = {"api", RepoKind.DATASETS, RepoKind.SPACES}
"""A model of theirs would have the URL of something else; the Hub gives these names to nobody."""
_OID = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
_PASSED = frozenset({"discussions", "compare", "treesize", "safetensors-metadata", "parquet"})
_NEEDS_REVISION = {"revision": Verb.INFO, "tree": Verb.TREE, "paths-info": Verb.PATHS_INFO, "commits": Verb.COMMITS}
_STANDS_ALONE = {"refs": Verb.REFS, "auth-check": Verb.AUTH_CHECK, "xet-read-token": Verb.XET_TOKEN}
_STANDS_ALONE |= dict.fromkeys(_PASSED, Verb.PASSED)


def parse(path: str) -> Target:
    """Parse the raw, still percent-encoded path of a URL, as split_prefix returns it. Raises BadTarget, NotRoutable, …"""
    if len(path) > MAX_PATH_BYTES:
        raise BadTarget(f"the URL path has {len(path)} bytes, {MAX_PATH_BYTES} are allowed")
    segments = path.strip("/").split("/")
    match segments:
        case ["api", "resolve-cache", kind, *rest] if kind in tuple(RepoKind):
            return _file(RepoKind(kind), rest, None, path)
        case ["api", "spaces", "semantic-search"]:
            return NamedCall("spaces/semantic-search")
        case ["api", kind] if kind in tuple(RepoKind):
            return ListCall(RepoKind(kind))
        case ["api", kind, *rest] if kind in tuple(RepoKind):
            return _repo_call(RepoKind(kind), rest, path)
        case ["api", *rest]:
            _refuse_dots(rest, path)
            return NamedCall("/".join(rest))
        case ["-", "lfs", kind, *rest] if kind in tuple(RepoKind) and len(rest) in (2, 3) and _OID.match(rest[-1]):
            return LfsTarget(Repo(RepoKind(kind), _repo_name(rest[:-1])), rest[-1])
    kind = RepoKind.MODELS
    if segments[0] in (RepoKind.DATASETS, RepoKind.SPACES):
        kind, segments = RepoKind(segments[0]), segments[1:]
    if "resolve" in segments[1:3]:
        return _file(kind, segments, "resolve", path)
    if "raw" in segments[1:3]:
        return RawTarget(_file(kind, segments, "raw", path))
    return _git(kind, segments) or _short(kind, segments, path)


def parse_file(path: str) -> FileTarget:
    """parse() for a URL that must be a file's."""
    target = parse(path)
    if not isinstance(target, FileTarget):
        raise NotRoutable(f"this mirror does not serve {path!r}")
    return target


def _file(kind: RepoKind, segments: list[str], marker: str | None, path: str) -> FileTarget:
    """A one-segment id is found by the marker; two segments win where both readings are possible.

    Without a marker (resolve-cache) a commit follows the id.
    """
    for ids in (2, 1):
        width = ids + (marker is not None)
        if len(segments) < width + 2 or (segments[ids] != marker if marker else not is_commit(segments[ids])):
            continue
        repo = Repo(kind, _repo_name(segments[:ids]))
        revision, rest = _revision(segments[width:], more=True)
        return FileTarget(repo, revision, _file_path(rest))
    raise NotRoutable(f"this mirror does not serve {path!r}")


def _git(kind: RepoKind, segments: list[str]) -> GitTarget | LfsCall | None:
    """What git and git-lfs ask, of an id of one segment or two, with or without `.git`; None: something else."""
    for ids in (1, 2):
        match segments[ids:]:
            case ["info", "refs"]:
                return GitTarget(_git_repo(kind, segments[:ids]), None)
            case [word] if word in tuple(GitService):
                return GitTarget(_git_repo(kind, segments[:ids]), GitService(word))
            case ["info", "lfs", *rest] if rest:
                return LfsCall(_git_repo(kind, segments[:ids]), "/".join(rest))
    return None


def _git_repo(kind: RepoKind, segments: list[str]) -> Repo:
    return Repo(kind, _repo_name([*segments[:-1], segments[-1].removesuffix(".git")]))


def _short(kind: RepoKind, segments: list[str], path: str) -> FileTarget | PageTarget:
    """`owner/name/path` is a file of main; `owner/name` and `owner/name/tree/…` are pages.

    The words that the Hub has after a repo's name keep their meaning, so no short URL can stand for another one.
    """
    words = [_decode(segment) for segment in segments[:2]]
    match segments:
        case [] | [_] | ["" | "-", *_] | [_, ""]:
            pass
        case _ if _PAGE_WORDS & set(words) or words[0] in _TOP_WORDS or words[1] in ("api", *RepoKind):
            pass  # `gpt2/tree/main` and `wrong-prefix/api/models` are no files of repos called `tree` and `api`
        case [owner, name]:
            return PageTarget(Repo(kind, _repo_name([owner, name.removesuffix(".git")])), DEFAULT_REVISION)
        case [owner, name, "tree", *rest] if rest:
            revision, rest = _revision(rest, more=False)
            return PageTarget(Repo(kind, _repo_name([owner, name])), revision, _file_path(rest) if rest else "")
        case [owner, name, "blob", *rest] if len(rest) > 1:
            revision, rest = _revision(rest, more=True)
            return FileTarget(Repo(kind, _repo_name([owner, name])), revision, _file_path(rest))
        case [owner, name, word, *rest] if _decode(word) not in _PAGE_WORDS and "resolve" not in map(_decode, rest):
            # With `resolve` further on it is a whole URL below a prefix that is none of ours: of a file, or `kernels/…`.
            return FileTarget(Repo(kind, _repo_name([owner, name])), DEFAULT_REVISION, _file_path([word, *rest]))
    raise NotRoutable(f"this mirror does not serve {path!r}")


def _repo_call(kind: RepoKind, segments: list[str], path: str) -> RepoCall:
    for ids in (1, 2):
        word, rest = segments[ids] if len(segments) > ids else None, segments[ids + 1 :]
        if word in _STANDS_ALONE:
            repo = Repo(kind, _repo_name(segments[:ids]))
            _refuse_dots(rest, path)
            return RepoCall(_STANDS_ALONE[word], repo, DEFAULT_REVISION, "/".join(segments[ids:]))
        if word in _NEEDS_REVISION and rest:
            repo = Repo(kind, _repo_name(segments[:ids]))
            revision, rest = _revision(rest, more=False)
            if rest and word != "tree":
                break
            return RepoCall(_NEEDS_REVISION[word], repo, revision, _file_path(rest) if rest else "")
    if len(segments) <= 2:
        return RepoCall(Verb.INFO, Repo(kind, _repo_name(segments)), DEFAULT_REVISION)
    raise NotRoutable(f"this mirror does not serve {path!r}")


def _refuse_dots(segments: list[str], path: str) -> None:
    """For what is handed on raw: it must mean upstream what it means here."""
    if any(part in ("", ".", "..") for segment in segments for part in _decode(segment).split("/")):
        raise BadTarget(f"{path!r} has empty, '.' or '..' segments, which are not allowed")


def format_file(target: FileTarget) -> str:
    """The canonical raw path for `target`; parse_file of it gives `target` back."""
    return f"{_repo_path(target.repo)}/resolve/{quote(target.revision, safe='')}/{quote(target.path, safe='/')}"


def format_short(target: FileTarget) -> str:
    """The shortest raw path that parse() reads as `target`: without `/resolve/main`, where no other URL is so."""
    short = f"{_repo_path(target.repo)}/{quote(target.path, safe='/')}"
    try:
        is_same = parse(short) == target
    except NearhubError:
        is_same = False
    return short if is_same else format_file(target)


def format_page(target: PageTarget) -> str:
    """The canonical raw path for `target`, of a repo with an owner; parse of it gives `target` back."""
    if (target.revision, target.path) == (DEFAULT_REVISION, ""):
        return _repo_path(target.repo)
    parts = [f"{_repo_path(target.repo)}/tree/{quote(target.revision, safe='')}", quote(target.path, safe="/")]
    return "/".join(part for part in parts if part)


def format_lfs(target: LfsTarget) -> str:
    """The raw path of an LFS object on this mirror; parse of it gives `target` back."""
    return f"/-/lfs/{target.repo.kind}/{target.repo.name}/{target.oid}"


def format_api(repo: Repo, verb: str = "", revision: str = "", path: str = "") -> str:
    """The canonical raw path of `/api/{kind}/{repo}[/{verb}[/{revision}[/{path}]]]`."""
    parts = [f"/api/{repo.kind}/{repo.name}", verb, quote(revision, safe=""), quote(path, safe="/")]
    return "/".join(part for part in parts if part)


def parse_repo_name(kind: RepoKind, name: str) -> Repo:
    """A repo id as it stands in JSON. Raises RepoNotFound when it is none."""
    return Repo(kind, _repo_name(name.split("/")))


def _repo_path(repo: Repo) -> str:
    return f"/{repo.name}" if repo.kind is RepoKind.MODELS else f"/{repo.kind}/{repo.name}"


def _repo_name(segments: list[str]) -> str:
    name = "/".join(_decode(segment) for segment in segments)
    valid = len(segments) <= 2 and name.count("/") == len(segments) - 1
    valid = valid and all(_REPO_SEGMENT.match(part) for part in name.split("/")) and name.split("/")[0] not in _NO_OWNERS
    if not valid or "--" in name or ".." in name or name.endswith(".git"):
        raise RepoNotFound(f"{name!r} is not a repo id: owner/name of letters, digits, '-', '_' and '.'")
    return name


def _revision(segments: list[str], *, more: bool) -> tuple[str, list[str]]:
    """(revision, remaining raw segments). `refs/pr/1` and `refs/convert/NAME` may come unencoded, as three segments.

    `more`: a path must follow.
    """
    is_special = segments[0] == "refs" and len(segments) >= 3 + more and segments[1] in ("pr", "convert")
    width = 3 if is_special else 1
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
