"""TransparencyLog: the append-only record (P11) as a log that anybody can audit. Owner of CACHE/log/.

    key                  Ed25519, PEM, 0600; made once
    vkey                 its public half, as auditors are given it
    checkpoint           signed: how many leaves, and the hash over them
    tile/…               C2SP tlog-tiles: hashes, and entry bundles; below the edge never rewritten
    foreign/<hash>/      what other logs proved, as bundles brought it: vkey, checkpoint, proofs; <hash> is that of the key

A leaf is first a row of the index, written in the transaction that records what it says, with its number in the log:

    log                              → whose numbers these are (the key), the next one, whether what was known before is in
    leaf <n>                         → the entry, until it is in the log
    logged <scope> <repo>@<commit> <n> → that leaf n is about them; for what is not public also its content and salt

One task brings these rows into the log in batches: tiles, synced → checkpoint, synced → the rows go. Whatever dies in between,
the same leaves get the same numbers again: there are never two trees of one size.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nearhub.errors import BadProof, StoreError, StoreFailed, StoreRefused
from nearhub.signatures import Signer, checked, new_private_key, read_private_key
from nearhub.store.disk import Disk
from nearhub.store.index import Index
from nearhub.wire.leaves import SALT_BYTES, Named, blinded, leaves_of, opened, opening
from nearhub.wire.manifest import Entry
from nearhub.wire.target import Repo
from nearhub.wire.tlog import (
    ENTRIES,
    WIDTH,
    Checkpoint,
    LogKey,
    Proof,
    TileId,
    cut,
    edge,
    grown,
    held,
    inclusion_proof,
    leaf_hash,
    nodes_of,
    pack,
    proofs_in,
    root_of_inclusion,
    subtree,
    tile_at,
    unpack,
)

log = logging.getLogger(__name__)

GATHER_S = 0.5
"""From a leaf to the batch that it goes in: a repo's leaves come together."""
RETRY_S = 30.0
BATCH = 256
"""Leaves, of 32 KiB at most."""


class TransparencyLog:
    """Blocks, but for what is `async`. `origin`: the log's name, "" for one made of its key. Clock: wall seconds."""

    def __init__(
        self,
        directory: Path,
        index: Index,
        *,
        origin: str = "",
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or begin the log. Raises StoreRefused for one that does not fit its key, its tiles, or the index."""
        self._directory = directory
        self._index = index
        self._disk = disk or Disk()
        self._clock = clock
        self._signer = self._open_key(origin)
        self._checkpoint, self._note = self._open_checkpoint()
        self._refuse_damage()
        self._news = asyncio.Event()
        self._busy = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<TransparencyLog {self.key.name} {self.size}>"

    @property
    def key(self) -> LogKey:
        return self._signer.key

    @property
    def size(self) -> int:
        """Leaves that the checkpoint covers."""
        return self._checkpoint.size

    @property
    def checkpoint(self) -> str:
        """The signed note, as it is on disk."""
        return self._note

    # — opening ————————————————————————————————————————————————————————————————————————————————————

    def _open_key(self, origin: str) -> Signer:
        self._disk.make_dirs(self._directory)
        path, public = self._directory / "key", self._directory / "vkey"
        if not path.exists():
            if (self._directory / "checkpoint").exists():
                raise StoreRefused(f"{path}: is gone, and the log goes on under no other: put it back, or {self._aside}")
            self._disk.write_file(path, new_private_key())
        try:
            private = read_private_key(path.read_bytes())
            told = LogKey.from_text(public.read_text(encoding="utf-8")) if public.exists() else None
        except (BadProof, OSError, UnicodeDecodeError) as exc:
            raise StoreRefused(f"{self._directory}: its key or vkey: {exc}: put it back, or {self._aside}") from exc
        made = f"nearhub/{hashlib.sha256(private.public_key().public_bytes_raw()).hexdigest()[:16]}"
        known = told.name if told else origin or made
        signer = Signer(known, private)
        if told is not None and told != signer.key:
            raise StoreRefused(f"{public}: is not the public half of {path}: put the right one back, or {self._aside}")
        if origin and origin != known:
            raise StoreRefused(f"{public}: this log is called {known}, for ever: set [log] origin to that, or {self._aside}")
        if told is None:
            self._disk.write_file(public, f"{signer.key}\n".encode())
        return signer

    @property
    def _aside(self) -> str:
        return f"move {self._directory} away to begin a new log"

    def _open_checkpoint(self) -> tuple[Checkpoint, str]:
        path = self._directory / "checkpoint"
        try:
            note = path.read_text(encoding="utf-8")
            return checked(note, self.key), note
        except FileNotFoundError:
            if (self._directory / "tile").exists():
                raise StoreRefused(f"{path}: is gone: put it back from a backup, or {self._aside}") from None
            empty = Checkpoint(self.key.name, 0, subtree(0, 0, nodes_of(0, self._tile)))
            return self._publish(empty)
        except (BadProof, OSError, UnicodeDecodeError) as exc:
            raise StoreRefused(f"{path}: {exc}: put it back from a backup, or {self._aside}") from exc

    def _refuse_damage(self) -> None:
        """The tiles at the edge, which the next ones go on from, must be those of the checkpoint."""
        try:
            root = subtree(0, self.size, nodes_of(self.size, self._tile))
            entries = tile_at(ENTRIES, (self.size - 1) // WIDTH, self.size) if self.size else None
            if root != self._checkpoint.root or (entries and len(unpack(self._tile(entries))) != entries.width):
                raise BadProof("its tiles are not those of its checkpoint")
        except (BadProof, OSError) as exc:
            raise StoreRefused(f"{self._directory}: {exc}: put it back from a backup, or {self._aside}") from exc

    def adopt(self) -> None:
        """Make the index's numbers and the log's agree; in the index's thread. Raises StoreRefused."""
        index, mine = self._index, self.key.id.hex()
        with index.transaction():
            row = index.get("log")
            if row is not None and row["key"] != mine:  # a new log has begun: what waits goes to its beginning
                waiting = index.scan("leaf ")
                index.delete_many([*(key for key, _ in waiting), *index.keys("logged ")])
                index.put_many([(_leaf_key(self.size + n), entry) for n, (_, entry) in enumerate(waiting)])
                row = {"next": self.size + len(waiting)}
            following = self.size if row is None else int(row["next"])
            first = next((int(key.removeprefix("leaf ")) for key in index.keys("leaf ")), following)
            if first > self.size:
                raise StoreRefused(
                    f"{self._directory}: has {self.size} leaves, and {first} were logged: an older log was put back. "
                    f"Put the newest back, or {self._aside}"
                )
            index.put("log", {**(row or {}), "key": mine, "next": max(following, self.size)})

    # — new leaves —————————————————————————————————————————————————————————————————————————————————

    def record(self, repo: Repo, commit: str, entries: Iterable[Entry], source: str) -> None:
        """Note what `source` says these files are; in the index's thread, within the transaction that records them."""
        files = [(entry.path, Named(entry.blob, entry.size)) for entry in entries if entry.blob is not None]
        if not files:
            return
        row = self._index.get("log")
        assert row is not None
        number = int(row["next"])
        rows: list[tuple[str, dict[str, Any]]] = []
        for leaf in leaves_of(int(self._clock()), str(repo), commit, source, files):
            entry, about = leaf.encode(), {}
            if repo.is_restricted:
                salt = os.urandom(SALT_BYTES)
                about = {"leaf": entry.decode(), "salt": salt.hex()}
                entry = blinded(entry, salt)
            rows += [(_leaf_key(number), {"entry": entry.decode()}), (f"{_about_key(repo, commit)}{number:016d}", about)]
            number += 1
        self._index.put_many([*rows, ("log", row | {"next": number})])

    def has(self, repo: Repo, commit: str) -> bool:
        """Whether there are leaves about it; in the index's thread, as the next two."""
        return next(self._index.keys(_about_key(repo, commit)), None) is not None

    def is_caught_up(self) -> bool:
        """Whether the log has what the index knew before it."""
        return bool((self._index.get("log") or {}).get("caught_up"))

    def note_caught_up(self) -> None:
        self._index.put("log", {**(self._index.get("log") or {}), "caught_up": True})

    def wake(self) -> None:
        """There may be new leaves."""
        self._news.set()

    def start(self, catch_up: Callable[[], Awaitable[None]]) -> None:
        """Keep bringing leaves into the log, those of the last process first. `catch_up` records what has none yet."""
        self.wake()
        self._task = asyncio.get_running_loop().create_task(self._keep_integrating(catch_up), name="transparency log")

    async def _keep_integrating(self, catch_up: Callable[[], Awaitable[None]]) -> None:
        await asyncio.to_thread(self._sweep)
        while True:
            await self._news.wait()
            await asyncio.sleep(GATHER_S)
            self._news.clear()
            try:
                await catch_up()
                await self.integrate()
            except StoreError as exc:
                log.error("the log stands still, and its leaves wait in the index: %s", exc.message)  # noqa: TRY400
                await asyncio.sleep(RETRY_S)
                self._news.set()

    async def integrate(self) -> None:
        """Bring every leaf that waits into the log. Raises StoreError; nothing is lost by it."""
        async with self._busy:
            while waiting := await self._index.run(self._index.scan, "leaf ", "", BATCH):
                rows = [(int(key.removeprefix("leaf ")), str(row["entry"]).encode()) for key, row in waiting]
                entries = [entry for number, entry in rows if number >= self.size]
                if entries:
                    await asyncio.to_thread(self.append, entries)
                await self._index.run(self._index.delete_many, [key for key, _ in waiting])

    def append(self, entries: Sequence[bytes]) -> None:
        """One batch: tiles, then the checkpoint that covers them, each durable before the next."""
        old, size = self.size, self.size + len(entries)
        tiles = grown(old, [leaf_hash(entry) for entry in entries], self._tile)
        first = tile_at(ENTRIES, held(ENTRIES, old) // WIDTH, old)
        bundled = [*(unpack(self._tile(first)) if first else []), *entries]
        for number, start in enumerate(range(0, len(bundled), WIDTH), old // WIDTH):
            chunk = bundled[start : start + WIDTH]
            tiles.append((TileId(ENTRIES, number, len(chunk)), pack(chunk)))
        for tile, data in tiles:
            path = self._directory / str(tile)
            self._disk.make_dirs(path.parent)
            self._disk.write_file(path, data)
        made = dict(tiles)
        root = subtree(0, size, nodes_of(size, lambda tile: made.get(tile) or self._tile(tile)))
        self._checkpoint, self._note = self._publish(Checkpoint(self.key.name, size, root))
        for tile in edge(old):
            if tile not in edge(size):
                self._drop(self._directory / str(tile))

    def _publish(self, checkpoint: Checkpoint) -> tuple[Checkpoint, str]:
        note = str(self._signer.sign(str(checkpoint)))
        self._disk.write_file(self._directory / "checkpoint", note.encode())
        return checkpoint, note

    def _drop(self, path: Path) -> None:
        self._disk.unlink(path)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()

    def _sweep(self) -> None:
        """Partial tiles that a process which died left behind the edge, or beyond it."""
        current = {self._directory / str(tile) for tile in edge(self.size)}
        for path in (self._directory / "tile").rglob("*.p/*"):
            if path not in current:
                self._drop(path)

    async def close(self) -> None:
        """What waits is integrated when the next process starts."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    # — reading ————————————————————————————————————————————————————————————————————————————————————

    def _tile(self, tile: TileId) -> bytes:
        return (self._directory / str(tile)).read_bytes()

    def read(self, tile: TileId) -> bytes | None:
        """A tile that this or an earlier checkpoint covers; None for any other."""
        for _ in range(3):
            now = tile_at(tile.level, tile.index, self.size)
            if now is None or tile.width > now.width:
                return None
            try:
                data = self._tile(now)
            except FileNotFoundError:  # it has grown since
                continue
            except OSError as exc:
                raise StoreFailed(f"the log cannot be read: {exc.strerror}") from exc
            return cut(tile, data)
        return None

    async def proofs(self, repo: Repo, commit: str, path: str | None = None) -> list[Proof]:
        """Of every leaf about `repo` at `commit`, or of that which names `path`, against the checkpoint as it is now."""
        return await self._proofs_of([(repo, commit)], path)

    async def _proofs_of(self, wanted: Iterable[tuple[Repo, str]], path: str | None = None) -> list[Proof]:
        await self.integrate()
        about: list[tuple[int, dict[str, Any]]] = []
        for prefix in (_about_key(repo, commit) for repo, commit in wanted):
            rows = await self._index.run(self._index.scan, prefix)
            about += [(int(key.removeprefix(prefix)), row) for key, row in rows]
        return await asyncio.to_thread(self._proofs, about, path)

    def _proofs(self, about: Sequence[tuple[int, dict[str, Any]]], path: str | None) -> list[Proof]:
        note, size = self._note, self._checkpoint.size
        nodes = nodes_of(size, self._read_at(size))
        bundles: dict[int, list[bytes]] = {}
        found = []
        for number, row in about:
            if number >= size:  # came meanwhile
                continue
            if row:
                extra = opening(str(row["leaf"]).encode(), bytes.fromhex(row["salt"]))
            else:
                bundle = number // WIDTH
                if bundle not in bundles:
                    bundles = {bundle: unpack(self._read_at(size)(_at(ENTRIES, bundle, size)))}
                extra = opening(bundles[bundle][number % WIDTH])
            if path is None or path in opened(extra)[0].files:
                found.append(Proof(number, tuple(inclusion_proof(number, size, nodes)), note, extra))
        return found

    def _read_at(self, size: int) -> Callable[[TileId], bytes]:
        def read(tile: TileId) -> bytes:
            data = self.read(tile)
            if data is None:
                raise StoreFailed(f"the log lost {tile}: nearhub log verify tells what is left")
            return data

        return read

    # — what crosses an air gap ————————————————————————————————————————————————————————————————————

    async def carried(self, wanted: Iterable[tuple[Repo, str]]) -> bytes:
        """For a bundle: this log's public key, and the proofs of these commits, against one checkpoint.

        Commits of which nothing was logged are passed over.
        """
        return f"{self.key}\n{''.join(map(str, await self._proofs_of(wanted)))}".encode()

    def keep_foreign(self, carried: bytes, trusted: LogKey | None = None) -> list[Proof]:
        """Check what carried() gave, and keep it below foreign/. Raises BadProof where anything of it does not hold.

        `trusted`: whose it must be; None: whoever it names, and for one name always the same.
        """
        try:
            head, _, text = carried.decode().partition("\n")
        except UnicodeDecodeError:
            raise BadProof("the bundle's proofs are no text") from None
        key = LogKey.from_text(head)
        if trusted is not None and key != trusted:
            raise BadProof(f"the bundle's proofs are of the log {key}, which is not the trusted one")
        proofs = proofs_in(text) if text else []
        home = self._directory / "foreign" / hashlib.sha256(str(key).encode()).hexdigest()
        known = home / "checkpoint"
        newest = (checked(known.read_text("utf-8"), key), known.read_text("utf-8")) if known.exists() else None
        for proof in proofs:
            checkpoint = proven(proof, key)
            if newest is not None and checkpoint.size == newest[0].size and checkpoint.root != newest[0].root:
                raise BadProof(f"the log {key.name} shows two trees of {checkpoint.size} leaves: it was rewritten")
            if newest is None or checkpoint.size > newest[0].size:
                newest = checkpoint, proof.checkpoint
        self._disk.make_dirs(home / "proofs")
        self._disk.write_file(home / "vkey", f"{key}\n".encode())
        for proof in proofs:
            self._disk.write_file(
                home / "proofs" / f"{hashlib.sha256(opened(proof.extra)[1]).hexdigest()}", str(proof).encode()
            )
        if newest is not None:
            self._disk.write_file(known, newest[1].encode())
        return proofs


def proven(proof: Proof, key: LogKey) -> Checkpoint:
    """The checkpoint that a proof leads to. Raises BadProof unless `key` signed it, and the leaf is in it."""
    checkpoint = checked(proof.checkpoint, key, "the proof's checkpoint")
    _, entry = opened(proof.extra)
    if root_of_inclusion(proof.index, checkpoint.size, leaf_hash(entry), proof.hashes) != checkpoint.root:
        raise BadProof(f"leaf {proof.index} is not what the proof says: the log's tree has another there")
    return checkpoint


def _at(level: int, index: int, size: int) -> TileId:
    tile = tile_at(level, index, size)
    assert tile is not None
    return tile


def _leaf_key(number: int) -> str:
    return f"leaf {number:016d}"


def _about_key(repo: Repo, commit: str) -> str:
    return f"logged {repo.scope} {repo}@{commit} "
