"""Served names and their versions: MODEL → 1, 2, 3 …, each the adapter of a run, and which of them is current.

HOME/registry.json   written beside, synced, renamed; one writer at a time holds HOME/.registry.lock (a lock of the kernel's: it
                     goes with the process). A reader sees the file before or after a change, and needs no lock.

A version remembers the sha256 of its adapter: one that changed on disk is never given out. Nothing heavy is imported.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath

from neartune.records import runs
from neartune.records.runs import RunsError

FILE, _LOCK = "registry.json", ".registry.lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
_VERSION = re.compile(r"([^@]+)@([1-9][0-9]{0,8})\Z")


@dataclass(frozen=True, slots=True)
class Version:
    """`run`: below the registry's directory, or an absolute path; `digest`: of the adapter; `metrics`: of the best adapter."""

    number: int
    run: str
    digest: str
    when: str
    who: str
    metrics: Mapping[str, float]
    base: str


@dataclass(frozen=True, slots=True)
class Model:
    """A served name. `served`: numbers that were current, one after the other; the last is. Going back takes it off."""

    versions: tuple[Version, ...]
    served: tuple[int, ...]

    @property
    def current(self) -> int:
        return self.served[-1]

    def version(self, number: int) -> Version | None:
        return next((version for version in self.versions if version.number == number), None)


Registry = dict[str, Model]


# — decided, purely ——————————————————————————————————————————————————————————————————————————————


def with_version(registry: Registry, name: str, version: Version) -> Registry:
    """`version`, numbered as the next of `name`, is current. Raises RunsError."""
    if not _NAME.match(name):
        raise RunsError(f"{name!r} cannot be a served name: letters, digits and . _ - are allowed, a letter or digit first")
    model = registry.get(name, Model((), ()))
    known = next((old for old in model.versions if (old.digest, old.run) == (version.digest, version.run)), None)
    if known is not None:
        hint = "it is current" if known.number == model.current else f"neartune runs rollback {name} --to {known.number}"
        raise RunsError(f"{version.run} is {name}@{known.number} already: {hint}")
    number = max((old.number for old in model.versions), default=0) + 1
    added = Version(**asdict(version) | {"number": number})
    return registry | {name: Model((*model.versions, added), (*model.served, number))}


def gone_back(registry: Registry, name: str, to: int | None) -> Registry:
    """The pointer of `name` at what was current before, or at `to`. Raises RunsError."""
    model = _model(registry, name)
    if to is None:
        if len(model.served) < 2:
            raise RunsError(f"{name}@{model.current} is the first that was served: there is nothing to go back to")
        return registry | {name: Model(model.versions, model.served[:-1])}
    if model.version(to) is None:
        raise RunsError(f"{name} has no version {to}: there are {', '.join(str(old.number) for old in model.versions)}")
    if to == model.current:
        raise RunsError(f"{name}@{to} is current already")
    served = model.served[: model.served.index(to) + 1] if to in model.served else (*model.served, to)
    return registry | {name: Model(model.versions, served)}


def _model(registry: Registry, name: str) -> Model:
    if name not in registry:
        known = f"there are {', '.join(sorted(registry))}" if registry else "nothing was promoted yet"
        raise RunsError(f"there is no served name {name!r}: {known}")
    return registry[name]


# — on disk ——————————————————————————————————————————————————————————————————————————————————————


def load(home: Path) -> Registry:
    """HOME's served names; none when there is no registry yet. Raises RunsError."""
    try:
        text = (home / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise RunsError(f"{home / FILE}: it cannot be read: {exc.strerror}") from None
    try:
        return {
            name: Model(tuple(Version(**version) for version in model["versions"]), tuple(model["served"]))
            for name, model in json.loads(text)["models"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise RunsError(f"{home / FILE}: it was not written by this version of neartune: {exc}") from None


def promote(path: Path, name: str, home: Path) -> Version:
    """The adapter of the run at `path` becomes the next version of `name`, and current. Raises RunsError."""
    run = runs.read(path, runs.name_of(path, home))
    adapter = finished_adapter(path)
    inside = home.absolute() in path.absolute().parents
    version = Version(
        number=0,
        run=run.name if inside else str(path.absolute()),
        digest=digest(adapter),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        who=who(),
        metrics=run.metrics,
        base=run.base,
    )
    with _writing(home) as registry:
        changed = with_version(registry, name, version)
        _save(home, changed)
    return changed[name].versions[-1]


def rollback(name: str, home: Path, to: int | None = None) -> Version:
    """`name` is again what it was before, or `to`, whose adapter must be as it was promoted. Raises RunsError."""
    with _writing(home) as registry:
        changed = gone_back(registry, name, to)
        version = changed[name].version(changed[name].current)
        assert version is not None
        _checked(home, name, version)
        _save(home, changed)
    return version


def resolve(name: str, home: Path) -> Path:
    """The adapter directory of `MODEL` (its current version), `MODEL@2`, or of a finished run by its name below `home`. A
    served name goes before a run's. Nothing outside of `home` is reached but what was promoted. Raises RunsError.

    A version's adapter is checked against its digest; files that have the size, inode and times they had at the last check in
    this process are not read again."""
    registry = load(home)
    exact = _VERSION.match(name)
    if name in registry or (exact and exact[1] in registry):
        model_name = exact[1] if exact and name not in registry else name
        model = registry[model_name]
        number = int(exact[2]) if exact and name not in registry else model.current
        version = model.version(number)
        if version is None:
            known = ", ".join(str(old.number) for old in model.versions)
            raise RunsError(f"{model_name} has no version {number}: there are {known}")
        return _checked(home, model_name, version)
    parts = PurePosixPath(name).parts
    path = home / name
    is_below = bool(parts) and not name.startswith("/") and ".." not in parts
    if not is_below or not runs.is_run(path) or home.resolve() not in path.resolve().parents:
        known = ", ".join([*sorted(registry), *(runs.name_of(run, home) for run in runs.find(home))][:8])
        raise RunsError(
            f"there is no served name and no run {name!r}: " + (f"there are {known}" if known else "nothing is here")
        )
    return finished_adapter(path)


def finished_adapter(path: Path) -> Path:
    """Of the run at `path`. Raises RunsError."""
    if not (path / "result.json").is_file() or not (path / "adapter" / "base.json").is_file():
        raise RunsError(f"{path.name} is not finished, so it has no adapter: the same command goes on with it")
    return path / "adapter"


def digest(adapter: Path) -> str:
    """sha256 over the sorted (name, sha256) of an adapter's files. Raises RunsError."""
    try:
        files = sorted(file for file in adapter.rglob("*") if file.is_file())
        stats = [file.stat() for file in files]
    except OSError as exc:
        raise RunsError(f"{adapter}: it cannot be read: {exc.strerror}") from None
    seen = tuple((stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)
    return _digest(adapter.absolute(), tuple(files), seen)


@lru_cache(maxsize=256)
def _digest(adapter: Path, files: tuple[Path, ...], seen: tuple[tuple[int, ...], ...]) -> str:
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            found.update(f"{file.absolute().relative_to(adapter).as_posix()} ".encode())
            found.update(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def _checked(home: Path, name: str, version: Version) -> Path:
    """`version.run` may be absolute: joined, it stays so."""
    path = home / version.run / "adapter"
    if not path.is_dir():
        raise RunsError(f"{name}@{version.number}: its adapter is gone: {path}")
    if digest(path) != version.digest:
        raise RunsError(
            f"{name}@{version.number}: the adapter in {path} was changed after it was promoted: it is not given out"
        )
    return path


@contextmanager
def _writing(home: Path) -> Iterator[Registry]:
    """What is there now, which no other process changes meanwhile."""
    try:
        lock = os.open(home / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as exc:
        raise RunsError(f"{home}: the registry cannot be written here: {exc.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield load(home)
    finally:
        os.close(lock)


def _save(home: Path, registry: Registry) -> None:
    plain = {"models": {name: asdict(model) for name, model in sorted(registry.items())}}
    temporary = home / f".{FILE}.tmp"
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(plain, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(home / FILE)
        sync(home)
    except OSError as exc:
        raise RunsError(f"{home / FILE}: it cannot be written: {exc.strerror}") from None


def sync(folder: Path) -> None:
    """The names in a directory are on disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def who() -> str:
    """The user at this machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{os.uname().nodename}"


def promoted(registry: Registry, home: Path) -> dict[Path, list[str]]:
    """Directory of a run → what it is served as: `MODEL@2`, with a star where that is current."""
    found: dict[Path, list[str]] = {}
    for name, model in sorted(registry.items()):
        for version in model.versions:
            star = "*" if version.number == model.current else ""
            found.setdefault((home / version.run).absolute(), []).append(f"{name}@{version.number}{star}")
    return found
