"""May this caller see this repo? Asked before anything is looked up: a cached byte is never evidence of permission.

For now the answer is yes for public repos, known by an anonymous question upstream, and a clear no for all others. Visibility
is believed for 60 s, and asked again in the background while it is used: a repo that is closed stops in that time. A gated repo
tells what it holds to everybody, and its content to nobody here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum

from nearhub import trace
from nearhub.catalog import Basis, Catalog
from nearhub.errors import AccessRefused, RevisionNotFound, UpstreamUnreachable
from nearhub.resolve import Resolver, unknown
from nearhub.wire.manifest import Visibility
from nearhub.wire.target import DEFAULT_REVISION, Repo, is_commit

PUBLIC_TTL_S = 60.0
RENEW_AFTER_S = 30.0
ONLY_PUBLIC = "this mirror serves public repositories only"


class Need(Enum):
    """What the caller wants of a repo."""

    LISTING = "listing"
    CONTENT = "content"


class Access:
    """The one door. State: the Catalog's."""

    def __init__(self, catalog: Catalog, resolver: Resolver, clock: Callable[[], float] = time.time) -> None:
        self._catalog = catalog
        self._resolver = resolver
        self._clock = clock

    async def authorise(self, asked: Repo, revision: str, client: str, need: Need = Need.CONTENT) -> Repo:
        """Return the repo by its canonical name if anybody may see it. Raises HubRefusal, or UpstreamError when nobody knows.

        `revision` is what will be looked up next: one call upstream answers both.
        """
        repo = await self._catalog.canonical(asked)
        seen = await self._catalog.seen(repo)
        if seen is None:
            repo, visibility = await self._first_look(asked, revision, client)
        else:
            visibility = seen.visibility
            age_s = self._clock() - seen.at
            trace.note(f"{repo} was seen in public {age_s:.0f} s ago")
            revision = await self._revision_to_ask_for(repo, revision)
            if not 0 <= age_s < PUBLIC_TTL_S:
                repo, visibility = await self._look_again(asked, repo, revision, client, visibility)
            elif age_s >= RENEW_AFTER_S:
                self._resolver.refresh_soon(asked, revision, client)
        _judge(repo, visibility, need)
        return repo

    def is_current(self, basis: Basis, ref_ttl_s: float) -> bool:
        """Whether authorise() would say the same again, at once and without a thought of renewal. Touches no disk."""
        if not self._catalog.holds(basis) or basis.seen is None:
            return False
        now = self._clock()
        is_fresh = basis.ref is None or 0 <= now - basis.ref.asked_at < ref_ttl_s
        return is_fresh and 0 <= now - basis.seen.at < RENEW_AFTER_S

    async def _first_look(self, asked: Repo, revision: str, client: str) -> tuple[Repo, Visibility]:
        try:
            info = await self._resolver.refresh(asked, revision, client)
        except UpstreamUnreachable as exc:
            raise unknown(str(asked), exc) from exc
        except AccessRefused as exc:
            raise _explained(exc) from exc
        return info.repo, info.visibility

    async def _look_again(
        self, asked: Repo, repo: Repo, revision: str, client: str, known: Visibility
    ) -> tuple[Repo, Visibility]:
        try:
            info = await self._resolver.refresh_or_none(asked, revision, client)
        except RevisionNotFound:
            if revision != DEFAULT_REVISION:
                # It may be gated meanwhile: an answer about another revision tells that too. Commits vanish, ours stay.
                return await self._look_again(asked, repo, DEFAULT_REVISION, client, known)
            # It is there, and public, or the Hub would not have looked for the revision.
            await self._catalog.note_seen(repo, known)
            return repo, known
        except AccessRefused as exc:
            raise _explained(exc) from exc
        return (repo, known) if info is None else (info.repo, info.visibility)

    async def _revision_to_ask_for(self, repo: Repo, revision: str) -> str:
        """A commit that is known never changes: the default branch's news are worth more."""
        if is_commit(revision) and await self._catalog.manifest(repo, revision) is not None:
            return DEFAULT_REVISION
        return revision


def _judge(repo: Repo, visibility: Visibility, need: Need) -> None:
    if visibility.is_disabled:
        raise AccessRefused("Access to this resource is disabled.", status=403)
    if visibility.is_gated and need is Need.CONTENT:
        raise AccessRefused(f"{repo} is gated ({ONLY_PUBLIC})", status=401, code="GatedRepo")


def _explained(exc: AccessRefused) -> AccessRefused:
    if exc.http_status == 403 and exc.error_code != "GatedRepo":
        return exc  # a disabled repo: clients know it by these very words
    return AccessRefused(f"{exc.message} ({ONLY_PUBLIC})", status=exc.http_status, code=exc.error_code)
