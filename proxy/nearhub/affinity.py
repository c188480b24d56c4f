"""P1c: no client splices two commits. Per client address and URL with a movable revision: the commit it was last answered from.

Rows live in memory and are written to the index in batches, so that a resume after a restart of the mirror is safe too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from nearhub.errors import StoreError
from nearhub.store.index import Index
from nearhub.wire.target import FileTarget

log = logging.getLogger(__name__)

GET_S = 60.0
"""A GET this soon after a HEAD belongs to it."""
RANGE_S = 24 * 3600.0
LIMIT = 50_000
FLUSH_S = 1.0

_Key = tuple[str, str]


class Affinity:
    """Owner of (address, URL) → (commit, wall-clock second)."""

    def __init__(self, index: Index, clock: Callable[[], float] = time.time) -> None:
        self._index = index
        self._clock = clock
        self._rows: OrderedDict[_Key, tuple[str, float]] = OrderedDict()
        self._unsaved: set[_Key] = set()
        self._dropped: set[_Key] = set()
        self._flusher: asyncio.Task[None] | None = None

    def load(self) -> None:
        """Read what an earlier process wrote. Blocks; before serving."""
        stale = []
        for name in self._index.keys("seen "):
            row = self._index.get(name) or {}
            _, address, url = name.split(" ", 2)
            if 0 <= self._clock() - float(row["at"]) < RANGE_S:
                self._rows[address, url] = (str(row["commit"]), float(row["at"]))
            else:
                stale.append(name)
        self._index.delete_many(stale)

    def commit_for(self, address: str, target: FileTarget, *, is_plain_range: bool) -> str | None:
        """The commit a GET must be answered from, or None: from the current one. `is_plain_range`: Range without If-Range."""
        if target.is_pinned:
            return None
        commit, at = self._rows.get((address, str(target)), ("", 0.0))
        age_s = self._clock() - at
        return commit if commit and 0 <= age_s < (RANGE_S if is_plain_range else GET_S) else None

    def note(self, address: str, target: FileTarget, commit: str) -> None:
        """This address was just told that `target` is at `commit`, the current one."""
        if target.is_pinned:
            return
        key = (address, str(target))
        self._rows[key] = (commit, self._clock())
        self._rows.move_to_end(key)
        self._unsaved.add(key)
        while len(self._rows) > LIMIT:
            oldest, _ = self._rows.popitem(last=False)
            self._unsaved.discard(oldest)
            self._dropped.add(oldest)
        if self._flusher is None:
            self._flusher = asyncio.get_running_loop().create_task(self._flush_soon(), name="affinity flush")

    async def _flush_soon(self) -> None:
        try:
            await asyncio.sleep(FLUSH_S)
            await self._flush()
        except StoreError as exc:
            log.error("affinity was not saved: %s", exc)  # noqa: TRY400
        finally:
            self._flusher = None

    async def _flush(self) -> None:
        rows = [(_name(key), {"commit": self._rows[key][0], "at": self._rows[key][1]}) for key in self._unsaved]
        dropped = [_name(key) for key in self._dropped]
        self._unsaved, self._dropped = set(), set()
        await self._index.run(self._index.put_many, rows)
        if dropped:
            await self._index.run(self._index.delete_many, dropped)

    async def close(self) -> None:
        if self._flusher is not None:
            self._flusher.cancel()
            await asyncio.wait([self._flusher])
        await self._flush()


def _name(key: _Key) -> str:
    return f"seen {key[0]} {key[1]}"
