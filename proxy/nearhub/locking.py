"""What `nearhub lock` does: asks a Hub endpoint, a mirror or the Hub itself, what repos are; or hashes files that are here.

Over HTTP only, as every client: what a CI job has is an endpoint.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from nearhub.digest import BlobHash
from nearhub.errors import BadLock, UpstreamFailed, UpstreamUnreachable
from nearhub.wire.leaves import Named
from nearhub.wire.lock import Locked, differences, format_lock, parse_lock
from nearhub.wire.manifest import read_info, read_tree
from nearhub.wire.target import DEFAULT_REVISION, Repo, RepoKind, format_api, parse_repo_name

T = TypeVar("T")

_NEXT = re.compile(r'<[^>]*\?([^>]*)>;\s*rel="next"')
_FOLDERS = {RepoKind.MODELS: "models", RepoKind.DATASETS: "datasets", RepoKind.SPACES: "spaces"}
_OF_TOOLS = (".cache/", ".git/")
"""What huggingface_hub and git put beside the files."""
_TIMEOUT = aiohttp.ClientTimeout(total=300, sock_connect=20, sock_read=60)


class Endpoint:
    """One, open as long as the block. `token`: sent to it, and to nobody else."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def __aenter__(self) -> Endpoint:
        self._session = aiohttp.ClientSession(timeout=_TIMEOUT, trust_env=True)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def lock(self, asked: str) -> tuple[str, Locked]:
        """(the repo's name, what it is now) for REPO or REPO@REV. Raises NearhubError."""
        name, _, revision = asked.partition("@")
        told = Repo.from_text(name.strip("/").removeprefix("models/"))
        repo = parse_repo_name(told.kind, told.name)
        revision = revision or DEFAULT_REVISION
        document, _ = await self._ask(format_api(repo, "revision", revision), asked)
        info = read_info(repo.kind, document)
        return str(info.repo), Locked(revision, info.commit, await self._files(info.repo, info.commit))

    async def files(self, repo: str, commit: str) -> dict[str, Named]:
        return await self._files(Repo.from_text(repo), commit)

    async def _files(self, repo: Repo, commit: str) -> dict[str, Named]:
        """Of the recursive tree, all pages: `siblings` may be cut short."""
        path = format_api(repo, "tree", commit)
        found: dict[str, Named] = {}
        query: str | None = "recursive=true&expand=false"
        asked = set()
        while query is not None:
            if query in asked:
                raise UpstreamFailed(f"{self.url}: its tree of {repo} goes round in circles")
            asked.add(query)
            document, query = await self._ask(f"{path}?{query}", f"{repo}@{commit}")
            entries = read_tree(document)
            found |= {entry.path: Named(entry.blob, entry.size) for entry in entries if entry.blob is not None}
        return found

    async def _ask(self, path: str, what: str) -> tuple[Any, str | None]:
        try:
            async with self._session.get(URL(self.url + path, encoded=True), headers=self._headers) as response:
                if response.status != 200:
                    said = response.headers.get("X-Error-Message") or response.reason
                    raise UpstreamFailed(f"{self.url} does not show {what}: {response.status} {said}")
                link = _NEXT.search(response.headers.get("Link", ""))
                return await response.json(), link[1] if link else None
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            raise UpstreamUnreachable(f"{self.url} cannot be asked about {what}: {exc or type(exc).__name__}") from exc


def read(path: Path) -> dict[str, Locked]:
    """Raises BadLock."""
    try:
        return parse_lock(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as exc:
        raise BadLock(f"{path}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc


async def renewed(known: Mapping[str, Locked], endpoint: Endpoint, repos: Sequence[str]) -> dict[str, Locked]:
    """What these repos are now, or all that are locked already."""
    asked = repos or [f"{repo}@{locked.revision}" for repo, locked in known.items()]
    return dict([await endpoint.lock(one) for one in asked])


async def check(locks: Mapping[str, Locked], endpoint: Endpoint) -> list[str]:
    """What the endpoint says otherwise than the lock: a line each, none when it says the same."""
    lines = []
    for repo, locked in locks.items():
        try:
            found = await endpoint.files(repo, locked.commit)
        except UpstreamFailed as exc:
            lines.append(f"{repo}@{locked.commit}: {exc.message}")
            continue
        lines += [f"{repo}@{locked.commit}: {line}" for line in differences(locked.files, found, endpoint.url)]
    return lines


def check_files(locks: Mapping[str, Locked], root: Path) -> list[str]:
    """What files below `root` are otherwise than the lock: a line each. Files that are not there yet are no difference.

    `root`: a Hugging Face cache, a directory with a folder org/name for each repo, or the files of the one repo.
    """
    lines = []
    for repo, locked in locks.items():
        folder = _folder_of(Repo.from_text(repo), locked.commit, root, is_alone=len(locks) == 1)
        if folder is None:
            lines.append(f"{repo}@{locked.commit}: there is nothing of it in {root}")
            continue
        here = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
        found = {name: _named(path, locked.files.get(name)) for name, path in here.items() if not name.startswith(_OF_TOOLS)}
        wanted = {name: named for name, named in locked.files.items() if name in found}
        lines += [f"{repo}@{locked.commit}: {line}" for line in differences(wanted, found, str(folder))]
    return lines


def _folder_of(repo: Repo, commit: str, root: Path, *, is_alone: bool) -> Path | None:
    for cache in (root, root / "hub"):
        snapshot = cache / f"{_FOLDERS[repo.kind]}--{repo.name.replace('/', '--')}" / "snapshots" / commit
        if snapshot.is_dir():
            return snapshot
    if any(path.name.startswith(tuple(f"{name}--" for name in _FOLDERS.values())) for path in _within(root)):
        return None
    if (root / str(repo)).is_dir():
        return root / str(repo)
    return root if is_alone and root.is_dir() else None


def _within(root: Path) -> Iterable[Path]:
    return [path for folder in (root, root / "hub") if folder.is_dir() for path in folder.iterdir()]


def _named(path: Path, locked: Named | None) -> Named:
    """What the file is, by the kind of hash that it is locked by."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            wanted = Named.from_row({"git": "0" * 40, "size": 0}) if locked is None else locked
            digest = BlobHash(wanted.blob, size)
            digest.read(file.fileno(), size)
    except OSError as exc:
        raise BadLock(f"{path}: cannot be read: {exc.strerror}") from exc
    return Named(replace(wanted.blob, hex=digest.hex), size)


def run(
    path: Path, repos: Sequence[str], url: str, token: str | None, *, is_check: bool, files: Path | None
) -> tuple[list[str], bool]:
    """(lines to show, whether all is well) of `nearhub lock`. Raises NearhubError.

    Without `is_check`, `repos` are locked at what they are now, or all that stand there already; others stay.
    """
    known = read(path) if is_check or path.exists() else {}
    if not repos and not known:
        raise BadLock(f"{path}: locks nothing yet: name the repos, such as org/name@main")
    chosen = _chosen(known, repos, path) if is_check else known
    if files is not None:
        lines = check_files(chosen, files)
        return lines or [f"{files}: what is there is as locked"], not lines
    if is_check:
        lines = asyncio.run(_over_http(url, token, lambda endpoint: check(chosen, endpoint)))
        return lines or [f"{url}: {len(chosen)} repos are as locked"], not lines
    news = asyncio.run(_over_http(url, token, lambda endpoint: renewed(known, endpoint, repos)))
    _replace(path, format_lock({**known, **news}))
    return [f"{repo}@{locked.commit}: {len(locked.files)} files" for repo, locked in news.items()], True


async def _over_http(url: str, token: str | None, ask: Callable[[Endpoint], Awaitable[T]]) -> T:
    async with Endpoint(url, token) as endpoint:
        return await ask(endpoint)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as exc:
        raise BadLock(f"{path}: cannot be written: {exc.strerror}") from exc


def _chosen(locks: Mapping[str, Locked], repos: Sequence[str], path: Path) -> dict[str, Locked]:
    if strange := [repo for repo in repos if repo not in locks]:
        raise BadLock(f"{path}: has no {strange[0]}: nearhub lock {strange[0]} adds it")
    return {repo: locked for repo, locked in locks.items() if not repos or repo in repos}
