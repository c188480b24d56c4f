"""May this caller see this repo? Asked before anything is looked up: a cached byte is never evidence of permission.

For now the answer is yes for public repos, known by an anonymous question upstream, and a clear no for all others. Visibility
is believed for 60 s, and asked again in the background while it is used: a repo that is closed stops in that time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from nearhub.errors import AccessRefused, EntryNotFound, HubRefusal, RevisionNotFound, UpstreamError
from nearhub.resolve import Bounded
from nearhub.store.index import Index
from nearhub.wire.headers import FileMetadata
from nearhub.wire.target import FileTarget, Repo

PUBLIC_TTL_S = 60.0
RENEW_AFTER_S = 30.0
UNREACHABLE_TTL_S = 10.0
"""After upstream failed to answer, how long it is not asked again before a known public repo is served."""

Ask = Callable[[FileTarget, str], Awaitable[FileMetadata]]
"""(target, client) → what upstream says of it, asked anonymously."""


class Access:
    """Owner of what is known of repos' visibility."""

    def __init__(self, index: Index, ask: Ask, clock: Callable[[], float] = time.time) -> None:
        self._index = index
        self._ask = ask
        self._clock = clock
        self._public: Bounded[Repo, float] = Bounded(100_000)
        self._unreachable_at = float("-inf")
        self._renewals: dict[Repo, asyncio.Task[None]] = {}

    async def authorise(self, target: FileTarget, client: str) -> None:
        """Return if anybody may read the repo. Raises HubRefusal, or UpstreamError when nobody knows."""
        since = await self._public_since(target.repo)
        age_s = None if since is None else self._clock() - since
        if age_s is not None and 0 <= age_s < PUBLIC_TTL_S:
            if age_s >= RENEW_AFTER_S:
                self._renew(target, client)
            return
        if age_s is not None and 0 <= self._clock() - self._unreachable_at < UNREACHABLE_TTL_S:
            return
        await self._probe(target, client, was_public=age_s is not None)

    async def _probe(self, target: FileTarget, client: str, *, was_public: bool) -> None:
        """Ask for the very file that is wanted: for a gated repo, info and tree answer everybody and prove nothing."""
        try:
            await self._ask(target, client)
        except (EntryNotFound, RevisionNotFound):
            raise  # proves nothing: a Hub may look for the file before it looks at the gate
        except HubRefusal as exc:
            await self._note_closed(target.repo)
            raise _explained(exc) from exc
        except UpstreamError:
            self._unreachable_at = self._clock()
            if not was_public:
                raise
        else:
            await self._note_public(target.repo)

    def _renew(self, target: FileTarget, client: str) -> None:
        if target.repo not in self._renewals:
            task = asyncio.get_running_loop().create_task(self._renewal(target, client), name=f"renew {target.repo}")
            self._renewals[target.repo] = task
            task.add_done_callback(lambda _: self._renewals.pop(target.repo, None))

    async def _renewal(self, target: FileTarget, client: str) -> None:
        try:
            await self._probe(target, client, was_public=True)
        except HubRefusal:
            return  # noted: the next request hears of it

    async def _public_since(self, repo: Repo) -> float | None:
        since = self._public.get(repo)
        if since is None and (row := await self._index.run(self._index.get, f"public {repo}")) is not None:
            since = float(row["at"])
            self._public.put(repo, since)
        return since

    async def _note_public(self, repo: Repo) -> None:
        now = self._clock()
        self._public.put(repo, now)
        await self._index.run(self._index.put, f"public {repo}", {"at": now})

    async def _note_closed(self, repo: Repo) -> None:
        self._public.drop(repo)
        await self._index.run(self._index.delete_many, [f"public {repo}"])

    async def close(self) -> None:
        tasks = list(self._renewals.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _explained(exc: HubRefusal) -> HubRefusal:
    if not isinstance(exc, AccessRefused):
        return exc
    message = f"{exc.message} (this mirror serves public repositories only)"
    return AccessRefused(message, status=exc.http_status, code=exc.error_code)
