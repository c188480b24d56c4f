"""May this caller see this repo? Asked before anything is looked up: a cached byte is never evidence of permission.

Public repos are known by an anonymous question, believed for 60 s, and asked again in the background while they are used: one
that is closed stops in that time. For all others upstream is asked with the caller's own token (grants.py), or the operator
has written down who may have them (policies). His rules come before all of it, and once more for each file (rulebook.py). A
gated repo tells what it holds to everybody, and its content to who was let in.

The answer is a Repo: of PUBLIC scope, or RESTRICTED. What is known of the one is never read for the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum

from nearhub import trace
from nearhub.catalog import Basis, Catalog
from nearhub.errors import AccessRefused, AccessUnknown, HubRefusal, RepoNotFound, RevisionNotFound, UpstreamUnreachable
from nearhub.grants import Grants
from nearhub.resolve import Resolver, unknown
from nearhub.rulebook import File, Rulebook
from nearhub.wire.credentials import Caller
from nearhub.wire.manifest import Visibility
from nearhub.wire.policies import Policy, policy_for
from nearhub.wire.target import DEFAULT_REVISION, Repo, Scope, is_commit

PUBLIC_TTL_S = 60.0
RENEW_AFTER_S = 30.0


class Need(Enum):
    """What the caller wants of a repo."""

    LISTING = "listing"
    CONTENT = "content"


class Access:
    """The one door. State: the Catalog's and the Grants'."""

    def __init__(
        self,
        catalog: Catalog,
        resolver: Resolver,
        grants: Grants,
        rules: Rulebook,
        policies: Sequence[Policy] = (),
        clock: Callable[[], float] = time.time,
        keeps_open: Callable[[Repo], bool] = lambda repo: False,
    ) -> None:
        self._catalog = catalog
        self._resolver = resolver
        self._grants = grants
        self._rules = rules
        self._policies = tuple(policies)
        self._keeps_open = keeps_open
        self._clock = clock

    async def authorise(self, asked: Repo, revision: str, caller: Caller, need: Need = Need.CONTENT) -> Repo:
        """Return the repo by its canonical name, in the scope that this caller may see.

        `revision` is what will be looked up next: one call upstream answers both. Raises HubRefusal, or UpstreamError when
        nobody knows.
        """
        account = trace.account()
        account.repo, account.revision = str(asked), revision
        self._rules.refuse_by_name(asked, caller)
        repo = await self._authorise(asked, revision, caller, need)
        account.repo = str(repo)
        if account.grounds is None:
            account.grounds = "public"
        self._rules.refuse_by_name(repo, caller)
        return repo

    async def admit(self, repo: Repo, commit: str | None, files: Sequence[File], caller: Caller) -> None:
        """After authorise(): whether the rules let this caller have these files, all of them. Raises RuleRefused."""
        await self._rules.check(repo, commit, files, caller)

    @property
    def has_rules(self) -> bool:
        return self._rules.has_rules

    @property
    def is_same_for_all(self) -> bool:
        """Whether what one caller may have of a public repo every other may have too."""
        return self._rules.is_same_for_all

    async def _authorise(self, asked: Repo, revision: str, caller: Caller, need: Need) -> Repo:
        repo = await self._catalog.canonical(asked)
        restricted = await self._catalog.canonical(replace(repo, scope=Scope.RESTRICTED))
        if caller.authorization is not None and self._grants.has(restricted, caller.authorization):
            await self._grants.require(restricted, caller.authorization, caller.address)
            if not await self._is_public_now(repo):
                trace.account().grounds = "grant"
                return restricted
        try:
            repo, visibility = await self._look(asked, repo, revision, caller.address)
        except (RepoNotFound, AccessRefused, UpstreamUnreachable) as exc:
            if isinstance(exc, AccessRefused) and exc.http_status == 403 and exc.error_code != "GatedRepo":
                raise  # disabled, for all
            return await self._by_grant_or_pin(repo, restricted, caller, exc)
        if visibility.is_disabled:
            raise AccessRefused("Access to this resource is disabled.", status=403)
        if visibility.is_gated and need is Need.CONTENT:
            gated = AccessRefused(f"Access to {repo} is restricted: you must be authenticated to have it.", code="GatedRepo")
            restricted = await self._catalog.canonical(replace(repo, scope=Scope.RESTRICTED))
            return await self._by_grant_or_pin(repo, restricted, caller, gated)
        return repo

    async def _by_grant_or_pin(
        self, repo: Repo, restricted: Repo, caller: Caller, refusal: HubRefusal | UpstreamUnreachable
    ) -> Repo:
        """Not public now. What was, when the operator pinned it, is still open to everybody (P5)."""
        try:
            return await self._by_grant(restricted, caller, refusal)
        except (HubRefusal, UpstreamUnreachable, AccessUnknown):
            if not self._keeps_open(repo):
                raise
            trace.note(f"{repo} was pinned while it was public: it is served as it was then")
            trace.account().grounds, trace.account().policy = "pin", None
            return repo

    async def _by_grant(self, repo: Repo, caller: Caller, refusal: HubRefusal | UpstreamUnreachable) -> Repo:
        """`refusal`: what everybody hears. The caller's own token comes first, and then what the operator wrote."""
        if caller.authorization is not None:
            try:
                await self._grants.require(repo, caller.authorization, caller.address)
            except AccessUnknown as exc:
                # What nobody may know of is refused in one way, whether or not it is here.
                raise (refusal if isinstance(refusal, UpstreamUnreachable) else exc) from exc
            trace.account().grounds = "grant"
            return repo
        policy = policy_for(self._policies, repo, caller.groups | ({caller.name} if caller.name else set()))
        if policy is None:
            raise refusal
        trace.note(f"{repo}: the policy {policy.name!r} lets this caller in")
        trace.account().grounds, trace.account().policy = "policy", policy.name
        if policy.authorization is None:
            return replace(repo, may_ask=False)
        try:
            await self._grants.require(repo, policy.authorization, caller.address)
        except AccessUnknown:
            trace.note(f"{repo}: upstream cannot be asked with the policy's token: what is here is served")
            return replace(repo, may_ask=False)
        return repo

    async def _is_public_now(self, repo: Repo) -> bool:
        seen = await self._catalog.seen(repo)
        return seen is not None and not seen.visibility.is_gated and 0 <= self._clock() - seen.at < PUBLIC_TTL_S

    def is_current(self, basis: Basis, ref_ttl_s: float) -> bool:
        """Whether authorise() would say the same again to everybody, at once and without a thought of renewal.

        Touches no disk.
        """
        if not self._catalog.holds(basis) or basis.seen is None:
            return False
        now = self._clock()
        is_fresh = basis.ref is None or 0 <= now - basis.ref.asked_at < ref_ttl_s
        return is_fresh and 0 <= now - basis.seen.at < RENEW_AFTER_S

    # — what everybody may know ————————————————————————————————————————————————————————————————————

    async def _look(self, asked: Repo, repo: Repo, revision: str, client: str) -> tuple[Repo, Visibility]:
        """What an anonymous question tells, now or at most 60 s ago; stale when upstream does not answer one."""
        seen = await self._catalog.seen(repo)
        if seen is None:
            return await self._first_look(asked, revision, client)
        age_s = self._clock() - seen.at
        trace.note(f"{repo} was seen in public {age_s:.0f} s ago")
        revision = await self._revision_to_ask_for(repo, revision)
        if self._resolver.is_offline:
            trace.note("offline: what was public when upstream was last asked is served")
            return repo, seen.visibility
        if not 0 <= age_s < PUBLIC_TTL_S:
            return await self._look_again(asked, repo, revision, client, seen.visibility)
        if age_s >= RENEW_AFTER_S:
            self._resolver.refresh_soon(asked, revision, client)
        return repo, seen.visibility

    async def _first_look(self, asked: Repo, revision: str, client: str) -> tuple[Repo, Visibility]:
        try:
            info = await self._resolver.refresh(asked, revision, client)
        except UpstreamUnreachable as exc:
            raise unknown(str(asked), exc) from exc
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
        return (repo, known) if info is None else (info.repo, info.visibility)

    async def _revision_to_ask_for(self, repo: Repo, revision: str) -> str:
        """A commit that is known never changes: the default branch's news are worth more."""
        if is_commit(revision) and await self._catalog.manifest(repo, revision) is not None:
            return DEFAULT_REVISION
        return revision
