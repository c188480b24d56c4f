"""Index: what the mirror knows, as rows in one SQLite file (diskcache). Rows are small JSON values under text keys.

    alias, visible, ref, manifest, path, lfs   what is known of repos: catalog.py
    pin                                     what the operator keeps: pins.py
    follow                                  what he has brought again and again: follower.py
    doc                                     what else upstream said, in its own words: documents.py
    seen  <client> <repo>@<revision>:<path> → commit, when (P1c): affinity.py

diskcache pickles by default, and its JSONDisk still unpickles rows whose `mode` column says so (CVE-2025-69872); TextDisk here
stores text, reads text and refuses everything else. eviction_policy none and cull_limit 0: by default rows vanish at 1 GiB.
Everything here blocks, but run(), by which the loop has it done in the index's own thread: one thread, one connection. One
process owns the index (SQLite's WAL-reset bug needs two).
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import diskcache

from nearhub.errors import StoreFailed, StoreFull, StoreRefused

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

_NO_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)
"""SQLite's errors (primary codes) that say nothing about what is in the file: no reason to begin anew."""
_FOREIGN_ROW = "the index holds a row that nearhub did not write: move the index directory away"
_RAW = 1  # diskcache's mode number for "the column holds the value itself"


class TextDisk(diskcache.Disk):  # type: ignore[misc]
    """Rows hold text in the row itself. No pickle, no side files, in neither direction."""

    def put(self, key: object) -> tuple[str, bool]:
        if not isinstance(key, str):
            raise TypeError("index keys are text")
        return key, True

    def get(self, key: object, raw: bool) -> str:
        if not raw or not isinstance(key, str):
            raise StoreFailed("the index holds a key that nearhub did not write: move the index directory away")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
        if read or not isinstance(value, str):
            raise TypeError("index values are text")
        return 0, _RAW, None, value

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> str:
        if mode != _RAW or filename is not None or read or not isinstance(value, str):
            raise StoreFailed(_FOREIGN_ROW)
        return value


class Index:
    """Text keys → JSON objects. `directory` must be on a local file system."""

    def __init__(self, directory: Path) -> None:
        self._thread = ThreadPoolExecutor(1, "nearhub-index")
        self._cache = self._thread.submit(self._open, directory).result()

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`call`, a method of this index, in the index's thread. Raises StoreFailed; StoreFull where room is missing."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, functools.partial(call, *args, **kwargs))
        except sqlite3.Error as exc:
            is_full = getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
            raise (StoreFull if is_full else StoreFailed)(f"the index failed: {exc}") from exc

    async def keep(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """As run(), of a write without which this process can go on: on a full disk it is lost, and that is said."""
        try:
            await self.run(call, *args, **kwargs)
        except StoreFull as exc:
            log.warning("what upstream said is not kept: %s", exc)

    def _open(self, directory: Path) -> Any:
        try:
            return _open_checked(directory)
        except sqlite3.DatabaseError as exc:
            if getattr(exc, "sqlite_errorcode", 0) & 0xFF in _NO_DAMAGE:
                raise StoreRefused(f"{directory}: the index cannot be opened: {exc}") from exc
            aside = directory.with_name(f"{directory.name}.broken-{int(time.time())}")
            directory.rename(aside)
            log.error("the index is damaged (%s): moved to %s and begun anew; blobs are kept", exc, aside)  # noqa: TRY400
            directory.mkdir(mode=0o700)
            return _open_checked(directory)

    def get(self, key: str) -> dict[str, Any] | None:
        text = self._cache.get(key)
        return None if text is None else _load(text)

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Durable on return."""
        self._cache.set(key, _dump(row))

    def transaction(self) -> Any:
        """A context: what is written in it, by this thread, is written as one."""
        return self._cache.transact()

    def put_many(self, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """All or none, in one transaction."""
        with self._cache.transact():
            for key, row in rows:
                self._cache.set(key, _dump(row))

    def delete_many(self, keys: Iterable[str]) -> None:
        with self._cache.transact():
            for key in keys:
                self._cache.delete(key)

    def scan(self, prefix: str, start: str = "", limit: int | None = None) -> list[tuple[str, dict[str, Any]]]:
        """Rows whose key starts with `prefix`, in order, from key `start` on; costs what it finds, not what the index holds."""
        sql = "SELECT key, value FROM Cache WHERE key >= ? AND key < ? ORDER BY key LIMIT ?"
        rows = self._cache._sql(sql, (max(prefix, start), _after(prefix), -1 if limit is None else limit))
        return [(str(key), _load(value)) for key, value in rows.fetchall()]

    def keys(self, prefix: str) -> Iterator[str]:
        """Keys that start with `prefix`, in order."""
        rows = self._cache._sql("SELECT key FROM Cache WHERE key >= ? AND key < ? ORDER BY key", (prefix, _after(prefix)))
        return (str(key) for (key,) in rows.fetchall())

    def prune(self, prefix: str, keep: int) -> None:
        """Of the rows whose key starts with `prefix`, only the `keep` written last stay."""
        sql = "SELECT key FROM Cache WHERE key >= ? AND key < ? ORDER BY store_time DESC LIMIT -1 OFFSET ?"
        self.delete_many([str(key) for (key,) in self._cache._sql(sql, (prefix, _after(prefix), keep)).fetchall()])

    def close(self) -> None:
        self._thread.submit(self._cache.close).result()
        self._thread.shutdown()
        self._cache.close()  # the connection of the calling thread, if it had one


def _open_checked(directory: Path) -> Any:
    cache = diskcache.Cache(
        str(directory),
        disk=TextDisk,
        eviction_policy="none",
        cull_limit=0,
        size_limit=2**62,
        sqlite_synchronous=2,  # FULL: these rows are acknowledged facts, and NORMAL loses them all in a power cut
        sqlite_mmap_size=0,
        statistics=0,
    )
    verdict = cache._sql("PRAGMA quick_check").fetchone()[0]
    if verdict != "ok":
        cache.close()
        raise sqlite3.DatabaseError(str(verdict))
    return cache


def _after(prefix: str) -> str:
    """The first key after all that start with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _load(text: object) -> dict[str, Any]:
    try:
        row = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise StoreFailed(_FOREIGN_ROW)
    return row


def _dump(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))
