"""What can be asked for by name: finished runs, adapters, served names and their versions, and the bases of all these.

A run is a directory with result.json and adapter/; an adapter, one with adapter_config.json and base.json. Names go by the
first directory that has them; a served name (neartune runs promote) goes before a run's.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from neartune.adapter import Card
from neartune.model import ModelError
from neartune.records import registry
from neartune.records.runs import RunsError

_DEEP = 4
"""Directories below the one that is searched."""
_GENERATION = "text-generation"


class Unknown(Exception):
    """There is no model of that name; the message has the nearest."""


@dataclass(frozen=True, slots=True)
class Served:
    """One model. `adapter` None: the base by itself. `digest`: what registry.digest() must still say of the adapter; "": it
    was not promoted. `made`: seconds since 1970."""

    name: str
    card: Card
    adapter: Path | None
    digest: str = ""
    made: int = 0


@dataclass(frozen=True, slots=True)
class Catalog:
    """`models`: by every name that is understood. `troubles`: what was passed over, and why."""

    models: Mapping[str, Served]
    troubles: tuple[str, ...] = ()

    def listed(self) -> dict[str, Served]:
        """A base once, whatever other names it has: by its own, else by that of the first run on it."""
        bases: dict[str, str] = {}
        for name in sorted((name for name, served in self.models.items() if served.adapter is None), key=_plainness):
            bases.setdefault(self.models[name].card.fingerprint, name)
        return {name: served for name, served in self.models.items() if served.adapter or name in bases.values()}


def resolve(name: str, catalog: Catalog) -> Served:
    """What `name` means: NAME, NAME@VERSION, a base's Hub id, base:NAME. Raises Unknown."""
    if name in catalog.models:
        return catalog.models[name]
    by_lower = {known.lower(): known for known in catalog.models}
    near = [by_lower[word] for word in difflib.get_close_matches(name.lower(), by_lower, 3, 0.4)]
    listed = list(catalog.listed())
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = f"there are {', '.join(listed[:8])}{' …' if len(listed) > 8 else ''}" if listed else "nothing is served"
    raise Unknown(f"there is no model {name!r:.100}: {hint}")


def find(homes: Sequence[Path]) -> Catalog:
    """Of the directories `homes`, as they are now. One that is not there is a trouble, as is an adapter that cannot be read."""
    found: dict[str, Served] = {}
    troubles: list[str] = []
    for home in homes:
        if not home.is_dir():
            troubles.append(f"{home}: there is no such directory")
            continue
        for name, path, digest, aliases in (*_promoted(home, troubles), *_adapters(home)):
            try:
                card, made = _card(path)
            except (ModelError, OSError) as exc:
                troubles.append(str(exc))
                continue
            if name in found and found[name].adapter != path:
                troubles.append(f"{path} is not served: {name} is {found[name].adapter}")
                continue
            for alias in (name, *aliases):
                found.setdefault(alias, Served(name, card, path, digest, made))
    return Catalog(found | _bases(found), tuple(troubles))


def _bases(found: Mapping[str, Served]) -> dict[str, Served]:
    """Of text generation: other bases have no classes of their own."""
    bases: dict[str, Served] = {}
    for alias, served in found.items():
        card = served.card
        if card.task == _GENERATION:
            name = _exact(card) if card.repo else f"base:{served.name}"
            for key in ((card.repo, name) if card.repo else ()) + (f"base:{alias}",):
                if key not in found:
                    bases.setdefault(key, Served(name, card, None, made=served.made))
    return bases


def _plainness(name: str) -> tuple[bool, bool]:
    return name.startswith("base:"), "@" in name


def _exact(card: Card) -> str:
    return f"{card.repo}@{str(card.commit)[:12]}"


def _promoted(home: Path, troubles: list[str]) -> Iterator[tuple[str, Path, str, tuple[str, ...]]]:
    """(MODEL@N, its adapter, its digest, other names: MODEL, where it is current)."""
    try:
        known = registry.load(home)
    except RunsError as exc:
        troubles.append(str(exc))
        return
    for name, model in known.items():
        for version in model.versions:
            path = home / version.run / "adapter"
            aliases = (name,) if version.number == model.current else ()
            yield f"{name}@{version.number}", path, version.digest, aliases


def _adapters(home: Path) -> Iterator[tuple[str, Path, str, tuple[str, ...]]]:
    """The same of runs and adapters at or below `home`; not in hidden directories, or behind links."""
    for place, folders, files in os.walk(home):
        path = Path(place)
        below = path.relative_to(home)
        name = below.as_posix() if below.parts else path.resolve().name
        if "result.json" in files and (path / "adapter" / "base.json").is_file():
            yield name, path / "adapter", "", ()
            folders.clear()
        elif {"adapter_config.json", "base.json"} <= {*files}:
            yield name, path, "", ()
            folders.clear()
        elif "run.json" in files or len(below.parts) == _DEEP:
            folders.clear()
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))


def _card(path: Path) -> tuple[Card, int]:
    """Of the adapter at `path`, and when it was made. Raises ModelError, OSError."""
    stat = (path / "base.json").stat()
    return _read(path, stat.st_ino, stat.st_mtime_ns, stat.st_size), int(stat.st_mtime)


@lru_cache(maxsize=4096)
def _read(path: Path, inode: int, changed: int, size: int) -> Card:
    """Read again when it changed."""
    return Card.read(path)
