"""P1c: no client splices two commits. Per client and URL with a movable revision: the commit it was last answered from.

A client is an address and a User-Agent: behind a NAT or a reverse proxy many programs share an address, and one program's HEAD
must not move the commit under another's ranges. While a client asks for ranges, its own HEADs do not move it either.
Rows live in memory and are written to the index in batches, so that a resume after a restart of the mirror is safe too.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nearhub.errors import StoreError
from nearhub.store.index import Index
from nearhub.wire.target import FileTarget

log = logging.getLogger(__name__)

GET_S = 60.0
"""A GET this soon after a HEAD belongs to it."""
IN_USE_S = 300.0
"""After a plain range, all of this client's requests for the URL are answered from that commit for so long."""
RANGE_S = 24 * 3600.0
LIMIT = 50_000
FLUSH_S = 1.0

_Key = tuple[str, str]


@functools.lru_cache(10_000)
def client_key(address: str, user_agent: str) -> str:
    """One word for a client: its address and a digest of its User-Agent."""
    return f"{address}/{hashlib.sha256(user_agent.encode('utf-8', 'replace')).hexdigest()[:12]}"


class Affinity:
    """Owner of (client, URL) → (commit, wall-clock second)."""

    def __init__(self, index: Index, clock: Callable[[], float] = time.time) -> None:
        self._index = index
        self._clock = clock
        self._rows: OrderedDict[_Key, tuple[str, float]] = OrderedDict()
        self._ranging: Counter[_Key] = Counter()
        self._ranged_at: dict[_Key, float] = {}
        self._unsaved: set[_Key] = set()
        self._dropped: set[_Key] = set()
        self._flusher: asyncio.Task[None] | None = None

    def load(self) -> None:
        """Read what an earlier process wrote. Blocks; before serving."""
        stale = []
        for name in self._index.keys("seen "):
            row = self._index.get(name) or {}
            _, client, url = name.split(" ", 2)
            if 0 <= self._clock() - float(row["at"]) < RANGE_S:
                self._rows[client, url] = (str(row["commit"]), float(row["at"]))
            else:
                stale.append(name)
        self._index.delete_many(stale)

    def commit_for(self, client: str, target: FileTarget, *, is_head: bool, is_plain_range: bool) -> str | None:
        """The commit that must answer, or None: the current one. `is_plain_range`: a GET with Range and without If-Range."""
        key = (client, str(target))
        commit, at = self._rows.get(key, ("", 0.0))
        now = self._clock()
        if target.is_pinned or not commit or not 0 <= now - at < RANGE_S:
            return None
        if is_plain_range:
            return commit
        is_in_use = self._ranging[key] > 0 or 0 <= now - self._ranged_at.get(key, float("-inf")) < IN_USE_S
        return commit if is_in_use or (not is_head and now - at < GET_S) else None

    @contextmanager
    def ranging(self, client: str, target: FileTarget) -> Iterator[None]:
        """While a plain range is answered, and IN_USE_S longer, nothing moves this client's commit."""
        key = (client, str(target))
        self._ranging[key] += 1
        try:
            yield
        finally:
            self._ranging[key] -= 1
            if not self._ranging[key]:
                del self._ranging[key]
            if key in self._rows:
                self._ranged_at[key] = self._clock()

    def note(self, client: str, target: FileTarget, commit: str) -> None:
        """This client was just told that `target` is at `commit`, the current one."""
        if target.is_pinned:
            return
        key = (client, str(target))
        self._rows[key] = (commit, self._clock())
        self._rows.move_to_end(key)
        self._unsaved.add(key)
        while len(self._rows) > LIMIT:
            oldest, _ = self._rows.popitem(last=False)
            self._unsaved.discard(oldest)
            self._ranged_at.pop(oldest, None)
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
        await self._index.keep(self._index.put_many, rows)
        if dropped:
            await self._index.keep(self._index.delete_many, dropped)

    async def close(self) -> None:
        if self._flusher is not None:
            self._flusher.cancel()
            await asyncio.wait([self._flusher])
        await self._flush()


def _name(key: _Key) -> str:
    return f"seen {key[0]} {key[1]}"
