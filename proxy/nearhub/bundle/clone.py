"""A plain `git clone` of a Hub's repo, read by git's plumbing: nothing of it is run, and its work tree is not looked at."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from nearhub.errors import BundleRefused, NearhubError
from nearhub.git.processes import run
from nearhub.wire import git as words
from nearhub.wire.headers import BlobId
from nearhub.wire.manifest import Entry, is_path, tree_order
from nearhub.wire.target import Repo, RepoKind, is_commit, parse_repo_name

_TIMEOUT_S = 600.0
_POINTER = re.compile(
    rb"version https://(?:git-lfs\.github\.com|hawser\.github\.com)/spec/v1\n(?:ext-[^\n]*\n)*"
    rb"oid sha256:([0-9a-f]{64})\nsize ([0-9]{1,18})\n?\Z"
)
_MAX_POINTER = 1024
_MAX_SMALL = 512 * 1024**2
"""Bytes of all files that git itself has: more than any Hub takes without LFS for one commit."""


@dataclass(frozen=True, slots=True)
class Clone:
    """`small`: the bytes of what git itself has. `files`: LFS objects on disk. `refs`: names of the commit."""

    repo: Repo
    commit: str
    entries: tuple[Entry, ...]
    refs: tuple[str, ...]
    small: Mapping[BlobId, bytes]
    files: Mapping[BlobId, Path]
    left: tuple[str, ...]
    read_at: float


async def read_clone(folder: Path, repo: Repo | None) -> Clone:
    """Raises BundleRefused where it cannot be read, or does not say which repo it is."""
    git = folder / ".git" if (folder / ".git").is_dir() else folder
    if not (git / "objects").is_dir():
        raise BundleRefused(f"{folder}: .git is no directory: name the repository itself, not a work tree of it")
    commit = (await _ask(git, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")).decode().strip()
    if not is_commit(commit):
        raise BundleRefused(f"{folder}: no commit is checked out")
    if repo is None:
        repo = repo_of_url((await _ask(git, "config", "--get", "remote.origin.url", is_optional=True)).decode().strip())
    lines = (await _ask(git, "ls-tree", "-r", "-t", "-l", "-z", commit)).split(b"\0")
    files: list[tuple[str, str, int]] = []
    entries: list[Entry] = []
    left: list[str] = []
    for line in filter(None, lines):
        about, _, raw = line.partition(b"\t")
        _, kind, oid, size = about.decode().split()
        path = raw.decode("utf-8", "surrogateescape")
        if kind == "commit" or not is_path(path):
            left.append(f"{path[:100]!r}: a Hub does not list it")
        elif kind == "tree":
            entries.append(Entry(path, oid=oid))
        else:
            files.append((path, oid, int(size)))
    if sum(length for _, _, length in files) > _MAX_SMALL:
        raise BundleRefused(f"{folder}: git itself has more than {_MAX_SMALL} bytes of this commit, without LFS")
    bodies = await _bodies(git, sorted({oid for _, oid, _ in files}))
    small: dict[BlobId, bytes] = {}
    objects: dict[BlobId, Path] = {}
    for path, oid, length in files:
        body = bodies[oid]
        pointer = _POINTER.match(body) if length <= _MAX_POINTER else None
        if pointer is None:
            blob = BlobId.from_etag(oid)
            small[blob] = body
            entries.append(Entry(path, length, oid, blob))
            continue
        blob = BlobId.from_etag(pointer[1].decode())
        entries.append(Entry(path, int(pointer[2]), oid, blob, pointer_size=length))
        here = git / "lfs" / "objects" / blob.hex[:2] / blob.hex[2:4] / blob.hex
        if _is_file(here, int(pointer[2])):
            objects[blob] = here
        else:
            left.append(f"{path}: git-lfs did not bring it")
    entries.sort(key=tree_order)
    refs = await _refs(git, commit)
    return Clone(repo, commit, tuple(entries), refs, small, objects, tuple(left), _mtime(git))


def repo_of_url(url: str) -> Repo:
    """The repo that a remote's URL names: its last two segments, and the kind before them. Raises BundleRefused."""
    segments = [part for part in urlsplit(url).path.removesuffix(".git").split("/") if part]
    kind = RepoKind(segments[-3]) if len(segments) >= 3 and segments[-3] in ("datasets", "spaces") else RepoKind.MODELS
    try:
        return parse_repo_name(kind, "/".join(segments[-2:]))
    except NearhubError:
        raise BundleRefused(
            "the clone does not say which repo it is of (its remote origin is none): name it with --repo"
        ) from None


async def _refs(git: Path, commit: str) -> tuple[str, ...]:
    """Branches of origin and tags that are at `commit`."""
    form = "--format=%(refname) %(objectname) %(*objectname)"
    output = (await _ask(git, "for-each-ref", form, "refs/remotes/origin", "refs/tags")).decode()
    found = []
    for line in output.splitlines():
        name, *oids = line.split(" ")
        if commit in oids and not name.endswith("/HEAD"):
            found.append(name.removeprefix("refs/remotes/origin/").removeprefix("refs/tags/"))
    return tuple(found)


async def _bodies(git: Path, oids: Sequence[str]) -> dict[str, bytes]:
    """The bytes of git's blobs. Raises BundleRefused where one is not there."""
    found: dict[str, bytes] = {}
    if not oids:
        return found
    output = await _ask(git, "cat-file", "--batch", "--buffer", input="".join(f"{oid}\n" for oid in oids).encode())
    position = 0
    for oid in oids:
        end = output.find(b"\n", position)
        head = output[position:end].split()
        if end < 0 or len(head) != 3 or head[1] != b"blob":
            raise BundleRefused(f"the clone has not all of its objects: {oid} is missing (is it a partial clone?)")
        size = int(head[2])
        found[oid] = output[end + 1 : end + 1 + size]
        position = end + 1 + size + 1
    return found


async def _ask(git: Path, *arguments: str, input: bytes | None = None, is_optional: bool = False) -> bytes:
    try:
        done = await run(
            arguments,
            {**words.serving(), "core.fsmonitor": "false"},
            timeout_s=_TIMEOUT_S,
            most=2 * _MAX_SMALL,
            directory=str(git),
            input=input,
        )
    except TimeoutError:
        raise BundleRefused(f"git {arguments[0]} took longer than {_TIMEOUT_S:.0f} s") from None
    if done.status != 0 and not is_optional:
        raise BundleRefused(f"{git}: git cannot read it: {done.complaint.strip()[:300]}")
    return done.output


def _is_file(path: Path, size: int) -> bool:
    try:
        info = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_size == size


def _mtime(git: Path) -> float:
    """When it was last fetched or cloned."""
    times = [path.stat().st_mtime for name in ("FETCH_HEAD", "packed-refs", "HEAD") if (path := git / name).exists()]
    return max(times, default=0.0)
