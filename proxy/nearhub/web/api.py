"""`/api/…` and `…/raw/…`, answered from manifests wherever they can be: upstream is asked for what nobody here knows yet.

Every URL in an answer is the mirror's own, under the prefix the client sees; Xet is in none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, urlencode

from aiohttp import web

from nearhub import trace
from nearhub.access import Access, Need
from nearhub.catalog import Catalog
from nearhub.documents import Documents, Page
from nearhub.errors import (
    GONE,
    AccessRefused,
    BadTarget,
    EntryNotFound,
    NotRoutable,
    ReadOnly,
    UnknownOffline,
    UpstreamError,
)
from nearhub.resolve import PAGE, Current, Resolver, default
from nearhub.upstream.dispatch import Dispatcher
from nearhub.web import bodies
from nearhub.web.callers import Callers
from nearhub.web.links import Links
from nearhub.web.middleware import STATUS, base_headers, metadata_status
from nearhub.wire import ranges
from nearhub.wire.cachestatus import CacheStatus
from nearhub.wire.credentials import Caller
from nearhub.wire.manifest import Entry, git_oid, is_path, pointer, rewritten, sibling, tree_item, tree_order
from nearhub.wire.search import matching
from nearhub.wire.target import FileTarget, ListCall, NamedCall, RawTarget, Repo, RepoCall, Verb, format_api, is_commit

PAGE_EXPANDED = 50
"""Entries a page of a tree with commits has on the Hub."""
MAX_PATHS = 1000
"""Of one paths-info question."""
MAX_QUESTION = 1024**2
"""Bytes of it."""
_CURSOR = "nearhub."
"""What our own cursors begin with: those of upstream's pages only upstream understands."""
DOCUMENT_TTL_S = 60.0
COMMIT_DOCUMENT_TTL_S = 24 * 3600.0
"""Of documents about one commit: of what is in them, only the verdicts of virus scanners change."""

_PASSED = re.compile(
    r"(trending|quicksearch|daily_papers|papers(/[\w.]+)?|collections(/[\w./-]+)?|(models|datasets)-tags-by-type"
    r"|spaces/semantic-search|(users|organizations)/[\w.-]+/overview)\Z",
    re.ASCII,
)
"""Other questions that change nothing, passed on with nobody's token."""
_OWN_EXPANSIONS = {"author", "cardData", "config", "createdAt", "disabled", "downloads", "gated", "id", "lastModified"}
_OWN_EXPANSIONS |= {"library_name", "likes", "pipeline_tag", "private", "sdk", "sha", "siblings", "tags", "usedStorage"}
_OWN_EXPANSIONS |= {"xetEnabled"}
"""What `expand=` may name and a manifest holds: a full document is an answer to these."""
_NO_HARNESSES: dict[str, Any] = {"standardEnvVars": [], "harnesses": {}}


@dataclass(frozen=True, slots=True)
class Api:
    """What answering needs."""

    access: Access
    callers: Callers
    catalog: Catalog
    resolver: Resolver
    documents: Documents
    dispatcher: Dispatcher
    links: Links

    # — repos ——————————————————————————————————————————————————————————————————————————————————————

    async def repo(self, request: web.BaseRequest, call: RepoCall) -> web.StreamResponse:
        """Everything under `/api/{kind}/{repo}`."""
        if request.method == "POST" and call.verb is not Verb.PATHS_INFO:
            raise ReadOnly("this is a read-only mirror: write to the Hub itself")
        if call.verb is Verb.XET_TOKEN:
            raise NotRoutable("this mirror serves plain HTTP, not Xet: files are at …/resolve/…")
        account = trace.account()
        account.what, account.path = f"api {call.verb}", call.path or None
        caller = self.callers.of(request)
        client = caller.address
        need = Need.CONTENT if call.verb is Verb.AUTH_CHECK else Need.LISTING
        repo = await self.access.authorise(call.repo, default(call.revision), caller, need)
        match call.verb:
            case Verb.INFO:
                return await self._info(request, repo, call, client)
            case Verb.TREE:
                return await self._tree(request, repo, call, client)
            case Verb.PATHS_INFO:
                return await self._paths_info(request, repo, call, client)
            case Verb.REFS:
                return await self._refs(request, repo, client)
            case Verb.COMMITS:
                return await self._commits(request, repo, call, client)
            case Verb.AUTH_CHECK:
                if call.path != Verb.AUTH_CHECK:
                    raise AccessRefused("nobody may write to a read-only mirror", status=403)
                return self._json(request, None)
            case _:
                path = _with_query(format_api(repo, call.path), request)
                page = await self.documents.get(path, client, about=repo, ttl_s=DOCUMENT_TTL_S)
                return self._page(request, page)

    async def _info(self, request: web.BaseRequest, repo: Repo, call: RepoCall, client: str) -> web.StreamResponse:
        current = await self.resolver.commit(repo, call.revision, client)
        if _expansions(request) - _OWN_EXPANSIONS:
            try:
                path = _with_query(format_api(repo, "revision", current.commit), request)
                page = await self.documents.get(path, client, about=repo, ttl_s=DOCUMENT_TTL_S)
                return self._page(request, page, current)
            except (UpstreamError, *GONE):
                pass  # a full document is better than none; and commits vanish upstream, ours stay
        manifest = await self.resolver.manifest(repo, current.commit, client)
        files = await self.resolver.files(repo, current.commit, client)
        with_blobs = request.query.get("blobs") == "true"
        about = {**manifest.about, "sha": current.commit, "siblings": [sibling(file, with_blobs=with_blobs) for file in files]}
        return self._json(request, about, current=current)

    async def _tree(self, request: web.BaseRequest, repo: Repo, call: RepoCall, client: str) -> web.StreamResponse:
        current = await self.resolver.commit(repo, call.revision, client)
        cursor = request.query.get("cursor", "")
        if cursor and not cursor.startswith(_CURSOR):
            return await self._upstream_tree(request, repo, call, client, current)
        if _flag(request, "expand") and not cursor:
            try:
                return await self._upstream_tree(request, repo, call, client, current)
            except (UpstreamError, *GONE):
                pass  # without the commits of each entry, then, to the last page
        recursive, limit = _flag(request, "recursive"), min(_number(request, "limit", PAGE), PAGE)
        after = _after(cursor)
        found = await self.resolver.tree(
            repo, current.commit, call.path, client, recursive=recursive, after=after, limit=limit + 1
        )
        if found is None and cursor:
            raise BadTarget("the cursor is none of this listing's")
        if found is None:
            return await self._upstream_tree(request, repo, call, client, current)
        more = tree_order(found[limit - 1]) if len(found) > limit else None
        next_query = None
        if more is not None:
            kept = [(key, value) for key, value in _query(request) if key != "cursor"]
            next_query = urlencode([*kept, ("cursor", _CURSOR + base64.urlsafe_b64encode(more.encode()).decode())])
        items = [tree_item(entry) for entry in found[:limit]]
        next_path = format_api(call.repo, "tree", current.commit, call.path)
        return self._json(request, items, current=current, next_query=next_query, next_path=next_path)

    async def _upstream_tree(
        self, request: web.BaseRequest, repo: Repo, call: RepoCall, client: str, current: Current
    ) -> web.StreamResponse:
        """Upstream's own pages, of the same commit, with its cursors."""
        path = _with_query(format_api(repo, "tree", current.commit, call.path), request)
        page = await self.documents.get(path, client, about=repo, ttl_s=COMMIT_DOCUMENT_TTL_S)
        return self._page(request, page, current, format_api(call.repo, "tree", current.commit, call.path))

    async def _paths_info(self, request: web.BaseRequest, repo: Repo, call: RepoCall, client: str) -> web.StreamResponse:
        if request.method != "POST":
            raise NotRoutable("paths-info is asked by POST")
        paths, expand = await _asked_paths(request)
        current = await self.resolver.commit(repo, call.revision, client)
        if expand and paths:
            try:
                form = {"paths": sorted(set(paths)), "expand": True}
                path = format_api(repo, "paths-info", current.commit)
                return self._page(
                    request, await self.documents.get(path, client, about=repo, ttl_s=COMMIT_DOCUMENT_TTL_S, form=form), current
                )
            except (UpstreamError, *GONE):
                pass
        entries = await self.resolver.paths(repo, current.commit, paths, client)
        return self._json(request, [tree_item(entry) for entry in entries], current=current)

    async def _refs(self, request: web.BaseRequest, repo: Repo, client: str) -> web.StreamResponse:
        try:
            path = _with_query(format_api(repo, "refs"), request)
            page = await self.documents.get(path, client, about=repo, ttl_s=self.resolver.ref_ttl_s)
        except (UnknownOffline, *GONE):
            known = await self.catalog.refs(repo)
            return self._json(request, _refs_document(known), is_stale=True)
        return self._page(request, page)

    async def _commits(self, request: web.BaseRequest, repo: Repo, call: RepoCall, client: str) -> web.StreamResponse:
        current = await self.resolver.commit(repo, call.revision, client)
        try:
            path = _with_query(format_api(repo, "commits", current.commit), request)
            page = await self.documents.get(path, client, about=repo, ttl_s=COMMIT_DOCUMENT_TTL_S)
            return self._page(request, page, current, format_api(call.repo, "commits", current.commit))
        except (UnknownOffline, *GONE):
            manifest = await self.resolver.manifest(repo, current.commit, client)
            date = manifest.about.get("lastModified", "1970-01-01T00:00:00.000Z")
            only = {"id": current.commit, "title": "", "message": "", "authors": [], "date": date}
            return self._json(request, [only], current=current, is_stale=True)

    async def raw(self, request: web.BaseRequest, target: RawTarget) -> web.StreamResponse | FileTarget:
        """The pointer of an LFS file; for any other file, its target, since git stores it as it is."""
        if request.method == "POST":
            raise ReadOnly("this is a read-only mirror: write to the Hub itself")
        account = trace.account()
        account.what, account.path = "raw", target.file.path
        caller = self.callers.of(request)
        client, file = caller.address, target.file
        repo = await self.access.authorise(file.repo, default(file.revision), caller)
        current = await self.resolver.commit(repo, file.revision, client)
        account.commit = current.commit
        entry = await self.resolver.entry(repo, current.commit, file.path, client)
        await self.access.admit(repo, current.commit, [(file.path, entry.size)], caller)
        if not entry.is_lfs:
            return FileTarget(file.repo, file.revision, file.path)
        return self._pointer(request, file, entry, current)

    def _pointer(self, request: web.BaseRequest, file: FileTarget, entry: Entry, current: Current) -> web.StreamResponse:
        body = pointer(entry)
        oid = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        if oid != git_oid(entry):
            raise EntryNotFound(f"{file.path!r} has an LFS pointer that this mirror does not know", current.commit)
        headers = {"ETag": f'"{oid}"', "X-Repo-Commit": current.commit, "Content-Type": "text/plain; charset=utf-8"}
        return _answer(request, body, headers, metadata_status(is_stale=current.is_stale))

    # — everything else ————————————————————————————————————————————————————————————————————————————

    async def listing(self, request: web.BaseRequest, call: ListCall) -> web.StreamResponse:
        """Listings and searches: upstream's words, else what is known here."""
        _refuse_writes(request)
        try:
            self.dispatcher.connectivity.require_online()  # else what is listed could not be had
            path = _with_query(f"/api/{call.kind}", request)
            page = await self.documents.get(path, request.remote or "unknown", ttl_s=DOCUMENT_TTL_S)
        except UpstreamError:
            repos = await self.catalog.public_repos(call.kind)
            return self._json(request, matching(repos, _query(request)), is_stale=True)
        return self._page(request, page)

    async def named(self, request: web.BaseRequest, call: NamedCall) -> web.StreamResponse:
        """`/api/` without a repo."""
        client = request.remote or "unknown"
        if call.name.startswith("telemetry/"):
            return self._json(request, None)  # nobody's business but the user's
        _refuse_writes(request)
        match call.name:
            case "agent-harnesses":
                return self._json(request, _NO_HARNESSES)
            case "whoami-v2":
                return await self._whoami(request, client)
        if not _PASSED.match(call.name):
            raise NotRoutable(f"this mirror does not serve /api/{call.name}")
        page = await self.documents.get(_with_query(f"/api/{call.name}", request), client, ttl_s=DOCUMENT_TTL_S)
        return self._page(request, page)

    async def _whoami(self, request: web.BaseRequest, client: str) -> web.StreamResponse:
        """Whose token this is: asked with it, of the Hub alone, every time; a token of this mirror's own is known here."""
        caller = self.callers.of(request)
        if caller.name is not None:
            about = {"type": "user", "name": caller.name, "orgs": [], "auth": {"type": "access_token"}}
            return web.json_response(about, headers=base_headers(request) | {"Cache-Control": "no-store"})
        if self.dispatcher.connectivity.is_offline:
            return _whoever(request, caller)
        answer = await self.dispatcher.personal("/api/whoami-v2", client, caller.authorization)
        request[STATUS] = "pass"
        headers = {**answer.headers, **base_headers(request)}
        headers |= {"Cache-Status": "nearhub; fwd=bypass", "Cache-Control": "no-store"}
        return web.Response(body=answer.body, status=answer.status, headers=headers)

    # — answers ————————————————————————————————————————————————————————————————————————————————————

    def _page(
        self, request: web.BaseRequest, page: Page, current: Current | None = None, next_path: str | None = None
    ) -> web.StreamResponse:
        return self._json(
            request, page.value, current=current, next_query=page.next_query, next_path=next_path, is_stale=page.is_stale
        )

    def _json(
        self,
        request: web.BaseRequest,
        document: Any,
        *,
        current: Current | None = None,
        next_query: str | None = None,
        next_path: str | None = None,
        is_stale: bool = False,
    ) -> web.StreamResponse:
        """200 with `document` (None: an empty body), or 304.

        `next_path`: of the next page, if not the request's own; at the commit, so that no listing is spliced of two.
        """
        base = self.links.base(request)
        is_stale = is_stale or (current is not None and current.is_stale)
        # private: what one token may see is kept by nobody on the way.
        headers = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "private, no-cache"}
        if current is not None:
            headers["X-Repo-Commit"] = current.commit
        if next_query is not None:
            headers["Link"] = f'<{base}{next_path or self.links.path(request)}?{next_query}>; rel="next"'
        document = rewritten(document, self.links.upstreams, base)
        body = b"" if document is None else json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        headers["ETag"] = f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'
        return _answer(request, body, headers, metadata_status(is_stale=is_stale))


def _whoever(request: web.BaseRequest, caller: Caller) -> web.Response:
    """Offline. Nobody can tell whose token it is, nor whether it is good: 200, so that logging in goes on, and a name that
    says so."""
    if caller.authorization is None:
        raise AccessRefused("Invalid username or password.")  # the Hub's words
    about: dict[str, Any] = {
        "type": "user",
        "id": "",
        "name": "unknown-offline",
        "fullname": "This mirror is offline: whose token this is cannot be asked",
        "email": None,
        "isPro": False,
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": {"displayName": "unknown", "role": "read"}},
    }
    status = metadata_status()
    request[STATUS] = status.word
    headers = base_headers(request) | {"Cache-Control": "no-store", "Cache-Status": str(status)}
    return web.json_response(about, headers=headers)


def _answer(request: web.BaseRequest, body: bytes, headers: dict[str, str], status: CacheStatus) -> web.Response:
    request[STATUS] = status.word
    headers = base_headers(request) | headers | {"Cache-Status": str(status)}
    etag = headers["ETag"].removeprefix("W/").strip('"')
    if ranges.etag_matches(request.headers.get("If-None-Match", ""), etag):
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, headers=headers)


def _refuse_writes(request: web.BaseRequest) -> None:
    if request.method == "POST":
        raise ReadOnly("this is a read-only mirror: write to the Hub itself")


def _with_query(path: str, request: web.BaseRequest) -> str:
    """`path` with the request's query in one canonical form, which is also how documents are told apart."""
    query = urlencode(sorted(_query(request)), quote_via=quote)
    return f"{path}?{query}" if query else path


def _query(request: web.BaseRequest) -> list[tuple[str, str]]:
    """Decoded once: aiohttp's query_string is decoded already."""
    return parse_qsl(request.rel_url.raw_query_string, keep_blank_values=True)


def _expansions(request: web.BaseRequest) -> set[str]:
    return set(request.query.getall("expand", [])) | set(request.query.getall("expand[]", []))


def _flag(request: web.BaseRequest, name: str) -> bool:
    return request.query.get(name, "").lower() in ("true", "1")


def _number(request: web.BaseRequest, name: str, otherwise: int) -> int:
    text = request.query.get(name, "")
    return max(1, int(text[:9])) if text.isascii() and text.isdigit() else otherwise


def _after(cursor: str) -> str:
    """The tree_order that a cursor of ours names; "" for none."""
    try:
        return base64.urlsafe_b64decode(cursor.removeprefix(_CURSOR)).decode()
    except ValueError:
        raise BadTarget("the cursor is none of this mirror's") from None


async def _asked_paths(request: web.BaseRequest) -> tuple[list[str], bool]:
    """Paths of a paths-info question, as Python's form or JavaScript's JSON; without those that nothing can have."""
    body = await bodies.whole(request, MAX_QUESTION, "client")
    try:
        if request.content_type == "application/json":
            asked = json.loads(body)
            paths, expand = asked.get("paths", []), bool(asked.get("expand"))
            paths = [paths] if isinstance(paths, str) else paths
        else:
            form = parse_qs(body.decode(), max_num_fields=MAX_PATHS + 10)
            paths, expand = form.get("paths", []), form.get("expand", ["false"])[0].lower() == "true"
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths) or len(paths) > MAX_PATHS:
            raise ValueError("not a list of at most 1,000 paths")
    except (ValueError, AttributeError, TypeError, RecursionError) as exc:
        raise BadTarget(f"paths-info: the body cannot be read: {exc}") from None
    return [path.strip("/") for path in paths if is_path(path.strip("/"))], expand


def _refs_document(known: Mapping[str, str]) -> dict[str, Any]:
    """What is known of refs when upstream cannot be asked for all of them."""
    named = {revision: commit for revision, commit in known.items() if not is_commit(revision)}

    def refs(prefix: str, among: Sequence[str]) -> list[dict[str, str]]:
        return [
            {"name": name.removeprefix(prefix), "ref": name if prefix else f"refs/heads/{name}", "targetCommit": named[name]}
            for name in among
        ]

    converts = [name for name in named if name.startswith("refs/convert/")]
    branches = [name for name in named if not name.startswith("refs/")]
    return {"branches": refs("", branches), "converts": refs("refs/convert/", converts), "tags": [], "pullRequests": []}
