"""From a raw, still encoded path to what it asks for. Sans-IO: it knows the Hub's URL grammar and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from tests.hub.repos import KINDS, Kind

_FILE_MARKERS = ("resolve", "raw")
_VERBS = ("revision", "tree", "paths-info", "refs", "commits", "auth-check", "xet-read-token")
_GIT_SERVICES = (
    "info/refs",
    "git-upload-pack",
    "git-receive-pack",
    "info/lfs/objects/batch",
    "info/lfs/locks",
    "info/lfs/locks/verify",
)
_SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class FileRoute:
    """/{id}/resolve/{revision}/{path}, /{id}/raw/..., /api/resolve-cache/..."""

    marker: str
    kind: Kind
    repo_id: str
    revision: str
    path: str


@dataclass(frozen=True, slots=True)
class RepoRoute:
    """/api/{kind}/{id}[/{verb}[/{revision}[/{path}]]]; revision and path may be empty."""

    verb: str
    kind: Kind
    repo_id: str
    revision: str
    path: str


@dataclass(frozen=True, slots=True)
class ListRoute:
    """/api/{kind}"""

    kind: Kind


@dataclass(frozen=True, slots=True)
class GitRoute:
    """/{id}[.git]/{service}: what git and git-lfs ask for."""

    kind: Kind
    repo_id: str
    service: str


@dataclass(frozen=True, slots=True)
class NamedRoute:
    """A path without parameters, such as /api/whoami-v2."""

    name: str


Route = FileRoute | RepoRoute | ListRoute | GitRoute | NamedRoute


def parse(raw_path: str) -> Route | None:
    """The route of a raw path without query; None where the Hub has nothing."""
    segments = raw_path.removeprefix("/").split("/")
    if segments[:2] == ["api", "resolve-cache"]:
        return _cached_file(segments[2:])
    if segments[0] == "api":
        return _api(segments[1:])
    kind, rest = _kind_first(segments)
    for length in (1, 2):
        if len(rest) > length + 2 and rest[length] in _FILE_MARKERS:
            revision, tail = _split_revision(rest[length + 1 :])
            return FileRoute(rest[length], kind, _joined(rest[:length]), revision, _joined(tail)) if tail else None
    for length in (1, 2):
        service = "/".join(rest[length:])
        if service in _GIT_SERVICES:
            return GitRoute(kind, _joined(rest[:length]).removesuffix(".git"), service)
    return None


def _kind_first(segments: list[str]) -> tuple[Kind, list[str]]:
    for kind in KINDS[1:]:
        if segments[0] == kind:
            return kind, segments[1:]
    return "models", segments


def _cached_file(segments: list[str]) -> FileRoute | None:
    for kind in KINDS:
        for length in (1, 2):
            if segments[0] == kind and len(segments) > length + 2 and _SHA.fullmatch(segments[length + 1]):
                repo_id, path = _joined(segments[1 : length + 1]), _joined(segments[length + 2 :])
                return FileRoute("resolve-cache", kind, repo_id, segments[length + 1], path)
    return None


def _api(segments: list[str]) -> Route | None:
    for kind in KINDS:
        if segments[0] != kind:
            continue
        rest = [one for one in segments[1:] if one]
        if not rest:
            return ListRoute(kind)
        length = 1 if len(rest) == 1 or rest[1] in _VERBS else 2
        verb = rest[length] if len(rest) > length else "info"
        if verb not in (*_VERBS, "info"):
            return None
        revision, tail = _split_revision(rest[length + 1 :])
        return RepoRoute(verb, kind, _joined(rest[:length]), revision, _joined(tail))
    return NamedRoute("/".join(segments))


def _split_revision(segments: list[str]) -> tuple[str, list[str]]:
    """Revision and what follows; refs/pr/1 and refs/convert/x also where a client did not encode the slashes."""
    if segments[:2] in (["refs", "pr"], ["refs", "convert"]) and len(segments) > 2:
        return "/".join(segments[:3]), segments[3:]
    return (unquote(segments[0]), segments[1:]) if segments else ("", [])


def _joined(segments: list[str]) -> str:
    return unquote("/".join(segments))
