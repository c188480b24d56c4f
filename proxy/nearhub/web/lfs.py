"""git-lfs: batches answered with the mirror's own signed links, and the objects behind them, from the store of all files.

An oid is never permission: it must be proven that this very repo has it, by a file of it at a commit that is known here, or by
upstream's own batch for that repo, asked with nobody's token. What was proven once is remembered (Catalog).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from aiohttp import web

from nearhub import trace
from nearhub.access import Access
from nearhub.catalog import Catalog, LfsObject
from nearhub.errors import (
    AccessRefused,
    BatchRefused,
    HubRefusal,
    LinkRefused,
    NearhubError,
    NotRoutable,
    Offline,
    ReadOnly,
    RepoNotFound,
    RevisionNotFound,
    RuleRefused,
    TokenWanted,
    UpstreamBusy,
    UpstreamError,
    UpstreamUnreachable,
)
from nearhub.fill import FillEngine, LfsSource, Source
from nearhub.git.mirrors import GitMirrors
from nearhub.grants import Grants
from nearhub.resolve import Resolver, unknown
from nearhub.single_flight import SingleFlight
from nearhub.upstream.dispatch import Dispatcher
from nearhub.web import bodies
from nearhub.web.callers import Callers
from nearhub.web.files import open_and_send
from nearhub.web.links import Links
from nearhub.web.middleware import LFS_JSON, SPEECH, STATUS, base_headers, metadata_status
from nearhub.wire import lfs as words
from nearhub.wire.credentials import Caller
from nearhub.wire.headers import Algo, BlobId, FileMetadata, ObjectMetadata
from nearhub.wire.lfs import Batch, Wanted
from nearhub.wire.reply import plan_object
from nearhub.wire.target import DEFAULT_REVISION, FileTarget, LfsCall, LfsTarget, Repo

MAX_BODY = 4 * 1024**2
"""Bytes of a batch, unpacked."""
LINK_S = 3600
MAX_MANIFESTS = 16
"""Of how many commits besides the one asked for the files are looked through before upstream is asked."""
_NO_LOCKS = {"locks": [], "next_cursor": ""}
_NOBODYS_LOCKS = {"ours": [], "theirs": [], "next_cursor": ""}


@dataclass(frozen=True, slots=True)
class Lfs:
    """What answering needs. `secret` signs the links."""

    access: Access
    callers: Callers
    grants: Grants
    catalog: Catalog
    resolver: Resolver
    dispatcher: Dispatcher
    fills: FillEngine
    links: Links
    mirrors: GitMirrors
    secret: bytes
    _asking: SingleFlight = field(default_factory=SingleFlight)

    async def close(self) -> None:
        """End the questions under way."""
        await self._asking.close()

    async def call(self, request: web.BaseRequest, call: LfsCall) -> web.StreamResponse:
        """What git-lfs asks before it has a link. Raises NearhubError."""
        request[SPEECH] = LFS_JSON
        if (url := self.mirrors.named_url(call.repo)) is not None:
            raise NotRoutable(
                f"LFS files of other hosts are not mirrored: git config lfs.url {url}/info/lfs asks that host, "
                "and GIT_LFS_SKIP_SMUDGE=1 leaves the pointers"
            )
        match request.method, call.what:
            case "POST", "objects/batch":
                return await self._batch(request, call.repo)
            case "POST", "locks/verify":
                return _told(request, _NOBODYS_LOCKS)
            case "GET" | "HEAD", "locks":
                return _told(request, _NO_LOCKS)
            case "POST", what if what.startswith("locks"):
                raise AccessRefused("this is a read-only mirror: lock files at the Hub itself", status=403)
        raise NotRoutable(f"this mirror's LFS has no {request.method} of {call.what}")

    async def serve(self, request: web.BaseRequest, target: LfsTarget) -> web.StreamResponse:
        """An object, by a link of ours. Raises NearhubError before, CutError after the headers."""
        request[SPEECH] = LFS_JSON
        if request.method not in ("GET", "HEAD"):
            raise ReadOnly("this is a read-only mirror: objects can only be read")
        size, mark = words.check_link(self.secret, target, request.query, time.time())
        account = trace.account()
        account.what, account.blob, account.who = "lfs", str(BlobId(Algo.SHA256, target.oid)), mark or None
        client = request.remote or "unknown"
        try:
            repo = await self.access.authorise(target.repo, DEFAULT_REVISION, self._owner(client, mark))
        except (AccessRefused, RepoNotFound) as exc:  # git-lfs then asks for a new link, and there for a token
            raise AccessRefused(exc.message, status=403, code=exc.error_code) from exc
        source = await self._source(repo, target.oid, size)
        reply = plan_object(
            request.method,
            request.headers,
            ObjectMetadata(source.meta.blob, size),
            caution=self.fills.caution(source.meta.blob, client),
            boundary=uuid.uuid4().hex,
        )
        return await open_and_send(request, self.fills, source, reply)

    def _mark(self, caller: Caller) -> str:
        if caller.authorization is not None:
            return self.grants.mark(caller.authorization)
        return f"{words.LOCAL}{caller.name}" if caller.name is not None else ""

    def _owner(self, client: str, mark: str) -> Caller:
        """Who a link was signed for: it is used without his token, which is asked about again all the same."""
        if not mark:
            return Caller(client)
        if mark.startswith(words.LOCAL):
            return self.callers.named(client, mark.removeprefix(words.LOCAL))
        authorization = self.grants.recall(mark)
        if authorization is None:
            raise LinkRefused("this LFS link is older than this mirror's process: ask the batch for a new one")
        return Caller(client, authorization)

    async def _permitted(self, asked: Repo, revision: str, caller: Caller) -> Repo:
        """As for files. Who brought no token and is refused is asked for one."""
        try:
            try:
                return await self.access.authorise(asked, revision, caller)
            except RevisionNotFound:  # a branch that the client alone has
                return await self.access.authorise(asked, DEFAULT_REVISION, caller)
        except (AccessRefused, RepoNotFound) as exc:
            if caller.is_anonymous:
                raise TokenWanted(exc.message, code=exc.error_code) from exc
            raise AccessRefused(exc.message, status=403, code=exc.error_code) from exc

    async def _source(self, repo: Repo, oid: str, size: int) -> Source | LfsSource:
        blob = BlobId(Algo.SHA256, oid)
        known = (await self.catalog.objects(repo, [oid])).get(oid)
        if known is None or known.commit is None or known.path is None:
            return LfsSource(LfsTarget(repo, oid), ObjectMetadata(blob, size))
        return Source(FileTarget(repo, known.commit, known.path), FileMetadata(known.commit, blob, size))

    async def _batch(self, request: web.BaseRequest, asked: Repo) -> web.Response:
        trace.account().what = "lfs"
        batch = words.read_batch(await _body(request))
        caller = self.callers.of(request)
        client = caller.address
        repo = await self._permitted(asked, batch.revision, caller)
        mark = self._mark(caller) if repo.is_restricted else ""
        known, why = await self._look_for(repo, batch, client)
        if isinstance(why, UpstreamBusy) and not any(one.oid in known for one in batch.objects):
            raise why
        base, until = self.links.base(request), int(time.time()) + LINK_S
        objects = []
        for one in batch.objects:
            there = known.get(one.oid)
            if there is not None and there.size == one.size:
                if (refused := await self._refusal(repo, one.oid, there, caller)) is not None:
                    objects.append(words.missing(one, *refused))
                    continue
                link = words.signed_link(self.secret, LfsTarget(repo, one.oid), one.size, until, mark)
                objects.append(words.found(one, base + link, LINK_S))
            elif there is not None and there.proves(one.size):
                objects.append(words.missing(one, 422, f"this object has {there.size} bytes, not {one.size}"))
            elif isinstance(why, NearhubError):
                code = 404 if isinstance(why, HubRefusal | UpstreamUnreachable) else why.http_status
                objects.append(words.missing(one, code, why.message))
            else:
                objects.append(words.missing(one, 404, f"{repo} has no such object: {why.get(one.oid, '')}".rstrip(": ")))
        return _told(request, words.answer(objects))

    async def _refusal(self, repo: Repo, oid: str, there: LfsObject, caller: Caller) -> tuple[int, str] | None:
        """What a rule of the operator's says against this object; or that nobody can bring it."""
        try:
            await self.fills.require(await self._source(repo, oid, there.size))
            await self.access.admit(repo, there.commit, [(there.path, there.size)], caller)
        except (RuleRefused, Offline) as exc:
            return exc.http_status, exc.message
        return None

    async def _look_for(
        self, repo: Repo, batch: Batch, client: str
    ) -> tuple[dict[str, LfsObject], dict[str, str] | NearhubError]:
        """Which of the objects this repo has, and why not the others: by oid, or why nobody can tell."""

        def unproven(known: dict[str, LfsObject]) -> dict[str, Wanted]:
            return {one.oid: one for one in batch.objects if one.oid not in known or not known[one.oid].proves(one.size)}

        oids = list(dict.fromkeys(one.oid for one in batch.objects))
        known = await self.catalog.objects(repo, oids)
        for look in (self._look_at_revision, self._look_at_all):
            if unproven(known):
                await look(repo, batch.revision, client)
                known = await self.catalog.objects(repo, oids)
        if not (left := unproven(known)):
            return known, {}
        trace.note(f"upstream's LFS batch is asked for {len(left)} objects that no file known here is")
        try:
            why: dict[str, str] | NearhubError = await self._ask_upstream(repo, left.values(), client)
        except UpstreamUnreachable as exc:
            return known, unknown("this object", exc)
        except (UpstreamError, HubRefusal) as exc:
            return known, exc
        return await self.catalog.objects(repo, oids), why

    async def _look_at_revision(self, repo: Repo, revision: str, client: str) -> None:
        """The files of the commit that the client is most likely on."""
        try:
            commit = (await self.resolver.commit(repo, revision, client)).commit
            if not self.catalog.has_gathered(repo, commit):
                await self.resolver.files(repo, commit, client)
                await self.catalog.gather_objects(repo, commit)
        except (UpstreamError, HubRefusal) as exc:
            trace.note(f"the files of {repo}@{revision} cannot be had: {exc}")

    async def _look_at_all(self, repo: Repo, revision: str, client: str) -> None:
        """The files that are known of other commits."""
        commits = [commit for _, commit in await self.catalog.manifests(repo)]
        for commit in [commit for commit in commits if not self.catalog.has_gathered(repo, commit)][:MAX_MANIFESTS]:
            await self.catalog.gather_objects(repo, commit)

    async def _ask_upstream(self, repo: Repo, objects: Iterable[Wanted], client: str) -> dict[str, str]:
        """One batch for all of them; what it offers is noted. Returns why it does not offer the others, by oid."""
        asked = tuple(objects)

        async def ask() -> dict[str, str]:
            offers = await self.dispatcher.lfs_offers(repo, asked, client)
            offered = {one.oid: LfsObject(one.size) for one in asked if offers[one.oid].href is not None}
            await self.catalog.note_objects(repo, offered)
            return {oid: offer.message for oid, offer in offers.items()}

        return await self._asking.share((repo, asked), ask)


def _told(request: web.BaseRequest, document: object) -> web.Response:
    status = metadata_status()
    request[STATUS] = status.word
    headers = base_headers(request) | {"Cache-Control": "no-cache", "Cache-Status": str(status)}
    return web.json_response(document, headers=headers, content_type=LFS_JSON)


async def _body(request: web.BaseRequest) -> bytes:
    """Raises BatchRefused, and as bodies.whole()."""
    if request.content_type != LFS_JSON:
        raise BatchRefused(f"this is for git-lfs, which sends {LFS_JSON}")
    return await bodies.whole(request, MAX_BODY, "git-lfs")
