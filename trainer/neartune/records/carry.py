"""Adapters across an air gap, through a folder such as a USB stick.

FOLDER/NAME/manifest.json     what it is, which base it needs, and size and sha256 of every file
            manifest.sha256   of manifest.json
            files/…           recipe.yaml, run.json, result.json, metrics.jsonl, adapter/

What was pulled is a run again: it is written beside, each file's hash taken of the very bytes that were written, and renamed
when all of them are right. A changed, missing, short, extra or linked file is refused by name. This finds damage, not forgery:
whoever can write to the folder can write another manifest. Both sides say the manifest's sha256, to be compared by people.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from neartune import __version__, hub, units
from neartune.records import runs
from neartune.records.registry import finished_adapter, sync, who
from neartune.records.runs import RunsError

FORMAT = 1
MANIFEST, SEAL, FILES = "manifest.json", "manifest.sha256", "files"
_CARRIED = ("recipe.yaml", "run.json", "result.json", "metrics.jsonl")
_WORD = r"[A-Za-z0-9_][A-Za-z0-9._ +-]{0,127}"
_NAME = re.compile(rf"{_WORD}\Z")
_FILE = re.compile(rf"(?:{'|'.join(map(re.escape, _CARRIED))}|adapter(?:/{_WORD}){{1,3}})\Z")
_PIECE = 2**20


@dataclass(frozen=True, slots=True)
class Part:
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """`base`: repo, commit and fingerprint; `data`: sha256 and count of the rows; `files`: name → Part."""

    format: int
    name: str
    task: str
    base: Mapping[str, Any]
    data: Mapping[str, Any]
    when: str
    who: str
    neartune: str
    files: Mapping[str, Part]


@dataclass(frozen=True, slots=True)
class Carried:
    """`path`: what was written; `seal`: sha256 of the manifest."""

    path: Path
    manifest: Manifest
    seal: str


# — pushed ———————————————————————————————————————————————————————————————————————————————————————


def push(run: runs.Run, folder: Path, name: str | None = None) -> Carried:
    """The finished `run` in FOLDER/NAME, durable on return. Raises RunsError."""
    adapter = finished_adapter(run.path)
    name = _checked_name(name or run.path.name)
    if not folder.is_dir():
        raise RunsError(f"{folder}: there is no such directory: is the stick mounted?")
    sources = {file: run.path / file for file in _CARRIED if (run.path / file).is_file()}
    sources |= {
        f"adapter/{file.relative_to(adapter).as_posix()}": file for file in sorted(adapter.rglob("*")) if file.is_file()
    }
    for file in sources:
        if not _FILE.match(file):
            raise RunsError(f"{run.path / file}: a file of this name is not carried: it is no part of an adapter")
    with _beside(folder / name) as temporary:
        parts = {file: _copied(source, temporary / FILES / file) for file, source in sources.items()}
        manifest = Manifest(
            format=FORMAT,
            name=name,
            task=str(run.recipe.get("task")),
            base=run.identity["base"],
            data=run.identity["data"],
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            who=who(),
            neartune=__version__,
            files=parts,
        )
        text = json.dumps(asdict(manifest), indent=2) + "\n"
        seal = hashlib.sha256(text.encode()).hexdigest()
        _write(temporary / MANIFEST, text.encode())
        _write(temporary / SEAL, f"{seal}\n".encode())
    return Carried(folder / name, manifest, seal)


# — pulled ———————————————————————————————————————————————————————————————————————————————————————


def pull(folder: Path, home: Path, name: str | None = None) -> Carried:
    """What was pushed to `folder` (or to the one directory in it) as the run HOME/NAME. Nothing is there unless all is right.
    Raises RunsError."""
    source = pushed(folder)
    manifest, seal = read(source)
    name = _checked_name(name or manifest.name)
    if not home.is_dir():
        raise RunsError(f"{home}: there is no such directory")
    _refuse_strange(source, manifest)
    with _beside(home / name) as temporary:
        for file, part in manifest.files.items():
            written = _copied(source / FILES / file, temporary / file)
            if written.size != part.size:
                raise RunsError(f"{source / FILES / file}: it is damaged: {written.size} bytes of {part.size}")
            if written.sha256 != part.sha256:
                raise RunsError(f"{source / FILES / file}: it is damaged: its sha256 is not the manifest's")
    return Carried(home / name, manifest, seal)


def pushed(folder: Path) -> Path:
    """`folder` itself, or the only directory in it that was pushed. Raises RunsError."""
    if (folder / MANIFEST).is_file():
        return folder
    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}") if not path.parent.name.startswith("."))
    if len(found) != 1:
        what = f"several adapters: {', '.join(path.name for path in found)}. Say which" if found else "no pushed adapter"
        raise RunsError(f"{folder}: there is {what}")
    return found[0]


def read(source: Path) -> tuple[Manifest, str]:
    """(manifest, its sha256) of what was pushed. Raises RunsError."""
    try:
        text, seal = _bytes(source / MANIFEST), _bytes(source / SEAL)
        if f"{hashlib.sha256(text).hexdigest()}\n".encode() != seal:
            raise RunsError(f"{source / MANIFEST}: it is damaged: its sha256 is not that of {SEAL}")
        known = json.loads(text)
        if known["format"] != FORMAT:
            raise RunsError(f"{source}: its format is {known['format']}, and this neartune reads {FORMAT}")
        files = {name: Part(int(part["size"]), str(part["sha256"])) for name, part in known["files"].items()}
        manifest = Manifest(**known | {"files": files})
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise RunsError(f"{source / MANIFEST}: it was not written by neartune: {exc}") from None
    strange = [file for file in manifest.files if not _FILE.match(file)]
    if strange:
        raise RunsError(f"{source / MANIFEST}: {strange[0]!r} is no file of an adapter")
    missing = [file for file in ("run.json", "result.json", "recipe.yaml", "adapter/base.json") if file not in manifest.files]
    if missing:
        raise RunsError(f"{source / MANIFEST}: there is no {', no '.join(missing)} in it")
    return manifest, seal.decode().strip()


def _refuse_strange(source: Path, manifest: Manifest) -> None:
    """Links, and what the manifest does not name. Raises RunsError."""
    named = {MANIFEST, SEAL, *(f"{FILES}/{file}" for file in manifest.files)}
    folders = {parent.as_posix() for file in named for parent in Path(file).parents}
    found = set()
    for place, inner, files in os.walk(source):
        for entry in (*inner, *files):
            path = Path(place) / entry
            relative = path.relative_to(source).as_posix()
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RunsError(f"{path}: it is a link or no plain file: only plain files are carried")
            if relative not in (folders if stat.S_ISDIR(mode) else named):
                raise RunsError(f"{path}: the manifest does not name it: take it away, or have it pushed again")
            found.add(relative)
    missing = sorted(named - found)
    if missing:
        raise RunsError(f"{source / missing[0]}: it is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""))


def base_told(carried: Carried) -> str:
    """Which base what was pulled needs, and whether it is on this machine: a Hub's by its commit, a directory by its place."""
    base = carried.manifest.base
    mark = f"sha256 {str(base.get('fingerprint'))[:12]}"
    if base.get("repo"):
        is_here = hub.fetched(str(base["repo"]), str(base["commit"])) is not None
        where = "it is on this machine" if is_here else "it is not on this machine: it will be fetched when it is needed"
        return f"base: {base['repo']} at {str(base['commit'])[:12]} ({mark}): {where}"
    path = Path(json.loads((carried.path / "adapter" / "base.json").read_text())["path"])
    where = "it is there" if path.is_dir() else "there is none on this machine: --base DIR says where it is now"
    return f"base: the directory {path} ({mark}): {where}"


def told(carried: Carried) -> list[str]:
    """What was carried, and which base it needs."""
    manifest = carried.manifest
    total = sum(part.size for part in manifest.files.values())
    lines = [f"{manifest.name}: {len(manifest.files)} files, {units.size(total)}, in {carried.path}; manifest {carried.seal}"]
    rows = manifest.data.get("train")
    lines.append(
        f"learnt from {rows} rows (sha256 {str(manifest.data.get('sha256'))[:12]}), pushed by {manifest.who} at {manifest.when}"
    )
    return lines


# — files ————————————————————————————————————————————————————————————————————————————————————————


def _checked_name(name: str) -> str:
    if not _NAME.match(name):
        raise RunsError(
            f"{name!r} cannot be a name here: letters, digits, spaces and . _ + - are allowed; --as NAME says another"
        )
    return name


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A directory that becomes `target` when all went well, and is gone otherwise. Raises RunsError."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if os.path.lexists(target):
        raise RunsError(f"{target} is there already: nothing is overwritten; --as NAME says another name")
    try:
        temporary.mkdir()
        yield temporary
        for place, _, _ in os.walk(temporary, topdown=False):
            sync(Path(place))
        temporary.rename(target)
        sync(target.parent)
    except OSError as exc:
        raise RunsError(f"{exc.filename or target}: {exc.strerror or exc}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open(file: Path) -> int:
    """A pipe is not waited for: it is empty, and so damaged."""
    return os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _bytes(file: Path) -> bytes:
    try:
        with os.fdopen(_open(file), "rb") as stream:
            return stream.read()
    except OSError as exc:
        raise RunsError(f"{file}: it cannot be read: {exc.strerror}") from None


def _copied(source: Path, target: Path) -> Part:
    """Size and sha256 of the bytes that were written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, count = hashlib.sha256(), 0
    with os.fdopen(_open(source), "rb") as stream, target.open("xb") as copy:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            count += len(piece)
            copy.write(piece)
        copy.flush()
        os.fsync(copy.fileno())
    return Part(count, digest.hexdigest())


def _write(file: Path, content: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
