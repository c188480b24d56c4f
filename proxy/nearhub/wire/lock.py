"""hf.lock: which commit of which repo, and what each of its files is; for CI, for reviews, for the trainer. Pure.

JSON, a line a file, in order: what changed is what a diff shows. neartune reads the same format (neartune/pins.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from nearhub.errors import BadLock, NearhubError
from nearhub.wire.leaves import Named
from nearhub.wire.target import Repo, is_commit, parse_repo_name

VERSION = 1
NAME = "hf.lock"


@dataclass(frozen=True, slots=True)
class Locked:
    """A repo at a commit. `revision`: what it was asked for by."""

    revision: str
    commit: str
    files: Mapping[str, Named] = field(repr=False)


def format_lock(locks: Mapping[str, Locked]) -> str:
    """The file's text, of repo (as nearhub writes its name) → what is locked."""
    blocks = []
    for repo, locked in sorted(locks.items()):
        rows = [f"        {_json(path)}: {json.dumps(named.row())}" for path, named in sorted(locked.files.items())]
        files = "{\n" + ",\n".join(rows) + "\n      }" if rows else "{}"
        blocks.append(
            f'    {_json(repo)}: {{\n      "revision": {_json(locked.revision)},\n      "commit": {_json(locked.commit)},\n'
            f'      "files": {files}\n    }}'
        )
    repos = "{\n" + ",\n".join(blocks) + "\n  }" if blocks else "{}"
    return f'{{\n  "version": {VERSION},\n  "repos": {repos}\n}}\n'


def parse_lock(text: str, where: str) -> dict[str, Locked]:
    """The inverse of format_lock(). Raises BadLock, which begins with `where`."""
    try:
        told = json.loads(text, object_pairs_hook=_once)
    except ValueError as exc:
        raise BadLock(f"{where}: is no JSON: {exc}") from None
    if not isinstance(told, dict) or not isinstance(told.get("repos"), dict) or "version" not in told:
        raise BadLock(f"{where}: is no hf.lock: nearhub lock REPO writes one")
    if told["version"] != VERSION:
        raise BadLock(f"{where}: is of version {told['version']!r}, and this nearhub knows {VERSION}: upgrade nearhub")
    return {repo: _read(repo, row, f"{where}: {repo}") for repo, row in told["repos"].items()}


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(found := dict(pairs)) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return found


def _read(repo: str, row: object, where: str) -> Locked:
    if not isinstance(row, dict) or set(row) != {"revision", "commit", "files"} or not isinstance(row["files"], dict):
        raise BadLock(f"{where}: a repo is to have revision, commit and files, and nothing else")
    try:
        name = Repo.from_text(repo)
        parse_repo_name(name.kind, name.name)
    except NearhubError as exc:
        raise BadLock(f"{where}: {exc.message}") from None
    if not isinstance(row["commit"], str) or not is_commit(row["commit"]) or not isinstance(row["revision"], str):
        raise BadLock(f"{where}: names no commit of 40 hex digits, or no revision")
    files = {}
    for path, named in row["files"].items():
        try:
            files[path] = Named.from_row(named)
        except ValueError as exc:
            raise BadLock(f"{where}: {path}: {exc}") from None
    return Locked(row["revision"], row["commit"], files)


def differences(locked: Mapping[str, Named], found: Mapping[str, Named], who: str) -> list[str]:
    """A line for each path of which `who` says something else than the lock."""
    lines = []
    for path in sorted(locked.keys() | found.keys()):
        here, there = locked.get(path), found.get(path)
        if here != there:
            lines.append(f"{path}: locked as {here or 'absent'}; {who} has {there or 'no such file'}")
    return lines


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
