"""What an auditor checks of a log: its signature, its tree, that it only grew, and proofs; from files or URLs and a public key.

No cache is opened and nothing is asked of a mirror but what it shows to everybody. Raises BadProof, saying what does not hold.
"""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearhub.errors import BadProof, StoreFailed
from nearhub.signatures import checked
from nearhub.store.log import proven
from nearhub.wire.leaves import Leaf, opened
from nearhub.wire.tlog import (
    ENTRIES,
    HASH_BYTES,
    WIDTH,
    Checkpoint,
    LogKey,
    TileId,
    check_consistency,
    consistency_proof,
    cut,
    held,
    leaf_hash,
    nodes_of,
    proofs_in,
    subtree,
    tile_at,
    tile_root,
    unpack,
)

_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Shown:
    """A log as it is shown: its checkpoint, a signed note, and how its tiles are read."""

    where: str
    note: str
    tile: Callable[[TileId], bytes]


def shown_at(where: str) -> Shown:
    """A log in a directory, or at a URL that ends in /-/log. Raises StoreFailed where there is none."""
    if where.startswith(("http://", "https://")):
        base = where.rstrip("/")
        return Shown(base, _text(_download(f"{base}/checkpoint")), lambda tile: _download(f"{base}/{tile}"))
    root = Path(where)
    return Shown(where, _text(_file(root / "checkpoint")), lambda tile: _tile_file(root, tile))


def key_of(text: str) -> LogKey:
    """A public key as it is handed on, or the file that it is in."""
    if "+" not in text or Path(text).exists():
        text = _text(_file(Path(text)))
    return LogKey.from_text(text)


def verdict(where: str, own: Path, key: str, since: Path | None, proofs: Sequence[Path]) -> dict[str, Any]:
    """As `nearhub log verify` is asked: of the log at `where`, else of the cache's `own`, if it has one. "text": for people."""
    is_remote = where.startswith(("http://", "https://"))
    where = where or (str(own) if own.is_dir() else "")
    if not key and (is_remote or not where):
        raise BadProof("whose log is it? --key KEY|FILE gives its public key, which is not to come from where the log does")
    given = "".join(_text(_file(path)) for path in proofs)
    told = verify(
        shown_at(where) if where else None,
        key_of(key or f"{where}/vkey"),
        since="" if since is None else _text(_file(since)),
        proofs=given,
    )
    lines = [f"{row['repo']}@{row['commit']}: {len(row['files'])} files: leaf {row['index']}" for row in told["proofs"]]
    if told["since"] is not None:
        lines.append(f"it goes on from the {told['since']} leaves of {since}")
    if told["size"] is not None:
        lines.append(f"{told['log']}: {told['size']} leaves")
    return told | {"text": "\n".join([*lines, "all right"])}


def verify(shown: Shown | None, key: LogKey, *, since: str = "", proofs: str = "") -> dict[str, Any]:
    """Check what is given. Without proofs, the whole log: every entry, every tile, the root.

    `since`: an earlier checkpoint of the same log; `proofs`: one or more, as `nearhub log prove` writes them.
    """
    told: dict[str, Any] = {"log": key.name, "size": None, "since": None, "proofs": []}
    now = None if shown is None else checked(shown.note, key)
    given = proofs_in(proofs) if proofs else []
    if now is not None and shown is not None:
        told |= {"size": now.size, "root": now.root.hex()}
        if not given:
            _check_all(shown, now)
    elif since:
        raise BadProof("an earlier checkpoint can be compared with a log only: --log DIR|URL names it")
    if since and shown is not None and now is not None:
        before = checked(since, key, "the earlier checkpoint")
        _check_growth(shown, before, now, "the earlier checkpoint")
        told["since"] = before.size
    for proof in given:
        checkpoint = proven(proof, key)
        if shown is not None and now is not None:
            _check_growth(shown, checkpoint, now, "the proof's checkpoint")
        leaf, _ = opened(proof.extra)
        told["proofs"].append(_row(proof.index, checkpoint, leaf))
    return told


def _row(index: int, checkpoint: Checkpoint, leaf: Leaf) -> dict[str, Any]:
    files = {path: named.row() for path, named in leaf.files.items()}
    about = {"repo": leaf.repo, "commit": leaf.commit, "time": leaf.time, "upstream": leaf.upstream, "files": files}
    return {"index": index, "size": checkpoint.size} | about


def _check_growth(shown: Shown, before: Checkpoint, now: Checkpoint, what: str) -> None:
    if before.size > now.size:
        raise BadProof(f"{what} is of {before.size} leaves, and the log at {shown.where} has {now.size}: it was cut back")
    nodes = nodes_of(now.size, shown.tile)
    check_consistency(before.size, now.size, before.root, now.root, consistency_proof(before.size, now.size, nodes))


def _check_all(shown: Shown, now: Checkpoint) -> None:
    """Every entry is what its tile says, every tile what the one below makes it, and the root what they all make."""
    below: list[bytes] = []
    for number in range(-(-now.size // WIDTH)):
        bundle, tile = tile_at(ENTRIES, number, now.size), tile_at(0, number, now.size)
        assert bundle is not None and tile is not None
        hashes = [leaf_hash(entry) for entry in unpack(shown.tile(bundle))]
        below.append(b"".join(hashes))
        if shown.tile(tile) != below[-1]:
            raise BadProof(f"{bundle} and {tile} of the log at {shown.where} do not fit: an entry was changed")
    level = 0
    while held(level + 1, now.size):
        level += 1
        row = [tile_root(data) for data in below if len(data) == WIDTH * HASH_BYTES]
        below = [b"".join(row[i : i + WIDTH]) for i in range(0, len(row), WIDTH)]
        for number, data in enumerate(below):
            above = tile_at(level, number, now.size)
            if above is None or shown.tile(above) != data:
                raise BadProof(f"{above} of the log at {shown.where} is not what the tiles below it make")
    if subtree(0, now.size, nodes_of(now.size, shown.tile)) != now.root:
        raise BadProof(f"the tiles of the log at {shown.where} have another root than its checkpoint")


def _tile_file(root: Path, tile: TileId) -> bytes:
    """The log may have grown since its checkpoint was read: an earlier width is cut from a later one."""
    with contextlib.suppress(FileNotFoundError):
        return (root / str(tile)).read_bytes()
    folder = (root / str(tile)).parent
    wider = sorted((int(path.name) for path in folder.glob("*") if path.name.isdigit()), reverse=True)
    for path in (root / str(tile.full), *(folder / str(width) for width in wider if width > tile.width)):
        with contextlib.suppress(FileNotFoundError):
            return cut(tile, path.read_bytes())
    raise BadProof(f"{root}: {tile} is missing")


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise StoreFailed(f"{path}: cannot be read: {exc.strerror}") from exc


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            data: bytes = response.read()
            return data
    except urllib.error.HTTPError as exc:
        exc.close()
        raise BadProof(f"{url}: the server says {exc.code}: it has no such part of a log") from None
    except OSError as exc:
        raise StoreFailed(f"{url}: cannot be reached: {getattr(exc, 'reason', exc)}") from exc


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadProof("this is no text in UTF-8") from None
