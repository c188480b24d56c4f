"""Follower: brings what the operator follows, when it is due. Owner of its record in the index.

    follow <repo>@<revision>    → began_at, ended_at, failures (in a row), commit, error

One at a time, in the order in which they are due. When that is, schedule.py decides.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from datetime import datetime
from typing import Any

from nearhub.errors import NearhubError
from nearhub.pins import Pins
from nearhub.prefetch import Prefetcher, Wanted
from nearhub.schedule import Follow, Past, wait_s
from nearhub.store.index import Index
from nearhub.wire.target import Repo

log = logging.getLogger(__name__)

GROUP = "follow"
"""Of the pins that `keep` makes."""
LONGEST_SLEEP_S = 600.0
"""The clock on the wall may be set meanwhile."""
OFFLINE_SLEEP_S = 30.0
"""Between looks whether the mirror is online again; and nothing is due to the second."""


class Follower:
    """Clock: wall seconds; `local` tells the same on the local clock."""

    def __init__(
        self,
        index: Index,
        follows: Sequence[Follow],
        prefetcher: Prefetcher,
        pins: Pins,
        *,
        clock: Callable[[], float] = time.time,
        local: Callable[[float], datetime] = datetime.fromtimestamp,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._index = index
        self._follows = tuple(follows)
        self._prefetcher = prefetcher
        self._pins = pins
        self._clock = clock
        self._local = local
        self._sleep = sleep
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Follower of {len(self._follows)}>"

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="follow")

    async def close(self) -> None:
        """A prefetch under way stops; what came of it stays."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def report(self) -> list[dict[str, Any]]:
        """A row for each: what is followed, what came of it, and in how many seconds it is due."""
        now = self._clock()
        rows = []
        for follow in self._follows:
            row = await self._row(follow) or {}
            wait = wait_s(follow, _past(row), now, self._local(now))
            rows.append({"follow": str(follow), "where": follow.where, "due_in_s": round(wait, 1), **row})
        return rows

    async def _row(self, follow: Follow) -> dict[str, Any] | None:
        return await self._index.run(self._index.get, _key(follow))

    async def _run(self) -> None:
        await self._let_go()
        while self._follows:
            now = self._clock()
            waits = [wait_s(follow, _past(await self._row(follow) or {}), now, self._local(now)) for follow in self._follows]
            soonest = min(waits)
            if soonest > 0 or self._prefetcher.is_offline:
                await self._sleep(min(max(soonest, OFFLINE_SLEEP_S), LONGEST_SLEEP_S))
            else:
                await self._bring(self._follows[waits.index(soonest)])

    async def _let_go(self) -> None:
        """Of pins that were made for what is not followed any more."""
        kept = {str(follow) for follow in self._follows if follow.keep}
        if gone := [pin for pin in self._pins.all if pin.group == GROUP and str(pin) not in kept]:
            await self._pins.drop(gone)

    async def _bring(self, follow: Follow) -> None:
        began_at = self._clock()
        past = _past(await self._row(follow) or {})
        failures = 1 + (past.failures if past else 0)
        # Written first: what dies with the process is no success, and is tried again in a minute.
        row: dict[str, Any] = {"began_at": began_at, "failures": failures, "error": "it did not come to its end"}
        await self._index.keep(self._index.put, _key(follow), row)
        until_s = None if follow.window is None else follow.window.closes_in_s(self._local(began_at))
        try:
            async with asyncio.timeout(until_s):
                result = await self._brought(follow)
            if follow.keep:
                await self._pins.pin(Repo.from_text(follow.repo), follow.revision, last=follow.keep, group=GROUP)
        except NearhubError as exc:
            row["error"] = exc.message
        except TimeoutError:
            row |= {"failures": 1, "error": f"its window ({follow.window}) closed; the next time it goes on"}
        else:
            failed = result["failed"]
            row |= {"commit": result["commit"], "error": ""}
            row |= {"error": f"{len(failed)} files: {failed[0]['file']}: {failed[0]['error']}"} if failed else {"failures": 0}
        row["ended_at"] = self._clock()
        (log.warning if row["error"] else log.info)("followed %s: %s", follow, row["error"] or "all of it is here")
        await self._index.keep(self._index.put, _key(follow), row)

    async def _brought(self, follow: Follow) -> dict[str, Any]:
        wanted = Wanted(Repo.from_text(follow.repo), follow.revision, follow.include, follow.exclude)
        result: dict[str, Any] = {}
        async with aclosing(self._prefetcher.run(wanted)) as lines:
            async for line in lines:
                result = line.get("result", result)
        return result


def _key(follow: Follow) -> str:
    return f"follow {follow}"


def _past(row: dict[str, Any]) -> Past | None:
    return Past(float(row["began_at"]), int(row["failures"])) if row else None
