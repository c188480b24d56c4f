"""git at both ends of a bundle: a bare mirror's objects out, and in again; checked by git as a fetch is."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

from nearhub.bundle.format import GitPart
from nearhub.bundle.parts import PIECE
from nearhub.errors import BundleRefused, GitFailed, StoreFailed
from nearhub.git.processes import run, running
from nearhub.store.bares import BareId, BareStore, Said
from nearhub.wire import git as words

TIMEOUT_S = 3600.0
_LOCAL_TIMEOUT_S = 60.0


async def git_refs(path: Path) -> tuple[dict[str, str], str | None]:
    """All refs of the bare mirror at `path`, and the branch that HEAD is."""
    done = await run(
        ["for-each-ref", "--format=%(objectname) %(refname)"],
        words.serving(),
        timeout_s=_LOCAL_TIMEOUT_S,
        most=words.MAX_REFS_BYTES,
        directory=str(path),
    )
    if done.status != 0:
        raise GitFailed(f"git for-each-ref failed here: {done.complaint.strip()[:300]}")
    pairs = (line.split(" ", 1) for line in done.output.decode().splitlines())
    head = await run(["symbolic-ref", "-q", "HEAD"], words.serving(), timeout_s=_LOCAL_TIMEOUT_S, directory=str(path))
    return {name: oid for oid, name in pairs}, head.output.decode().strip() or None


async def packed(path: Path, refs: Mapping[str, str], old: Mapping[str, str]) -> AsyncGenerator[bytes]:
    """What `git bundle create` writes of all refs, less what the refs `old` reach. Nothing, where nothing is new."""
    known = set(old.values())
    if not refs or set(refs.values()) <= known:
        return
    async with running(
        ["bundle", "create", "--quiet", "-", "--stdin"], words.serving(), directory=str(path), takes_input=True
    ) as git:
        stdin, stdout = git.process.stdin, git.process.stdout
        assert stdin is not None and stdout is not None
        lines = [name for name, oid in refs.items() if oid not in known] + [f"^{oid}" for oid in sorted(known)]
        stdin.write("".join(f"{line}\n" for line in lines).encode())
        await stdin.drain()
        stdin.close()
        while data := await stdout.read(PIECE):
            yield data
        status, complaint = await git.end()
    if status != 0:
        raise GitFailed(f"git bundle create failed here: {complaint.strip()[:300]}")


async def unpack(bares: BareStore, bare: BareId, git: GitPart, file: Path | None) -> None:
    """Make the bare mirror what `git` says. `file`: the new objects, verified. Raises BundleRefused, GitFailed."""
    with bares.hold(bare) as path:
        said = bares.said(bare)
        if said is not None and said.at > git.asked_at:
            return  # upstream was asked here later than there
        lock = bares.lock(bare)
        if lock is None:
            raise StoreFailed(f"{bare} is in use: import the bundle once more")
        try:
            await _must([*words.INIT, str(path)], None, lock)
            if file is not None:
                settings = words.fetching("file://", proxy=None, ca_bundle=None)
                fetch = [*words.FETCH, str(file), *words.ALL_REFS]
                done = await run(
                    [one for one in fetch if one != "--prune"], settings, timeout_s=TIMEOUT_S, directory=str(path), keeps=lock
                )
                if done.status != 0:
                    bares.sweep(bare)
                    raise BundleRefused(f"git refuses the objects of {bare}: {done.complaint.strip()[-300:]}")
            await _set_refs(path, git, lock)
            bares.note_said(bare, Said(git.asked_at, git.digest))
        finally:
            os.close(lock)


async def _set_refs(path: Path, git: GitPart, lock: int) -> None:
    here, _ = await git_refs(path)
    orders = [f"update {name} {oid}" for name, oid in git.refs.items() if here.get(name) != oid]
    orders += [f"delete {name}" for name in here if name not in git.refs]
    if orders:
        text = "".join(f"{line}\n" for line in orders).encode()
        update = ["update-ref", "--stdin"]
        done = await run(update, words.serving(), timeout_s=_LOCAL_TIMEOUT_S, directory=str(path), keeps=lock, input=text)
        if done.status != 0:
            raise BundleRefused(f"the bundle has not all objects that its refs name: {done.complaint.strip()[:300]}")
    if git.head is not None:
        await _must(["symbolic-ref", "HEAD", git.head], path, lock)


async def _must(arguments: list[str], path: Path | None, lock: int) -> None:
    directory = None if path is None else str(path)
    done = await run(arguments, words.serving(), timeout_s=_LOCAL_TIMEOUT_S, directory=directory, keeps=lock)
    if done.status != 0:
        raise GitFailed(f"git {arguments[0]} failed here: {done.complaint.strip()[:300]}")
