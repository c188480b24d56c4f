"""What a browser sees of a repo: a list of its files, with links and the commands to copy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from aiohttp import web

from nearhub import trace
from nearhub.access import Access, Need
from nearhub.catalog import Catalog
from nearhub.documents import Documents
from nearhub.errors import BadTarget, ReadOnly
from nearhub.resolve import PAGE, Resolver, default
from nearhub.web import hypertext
from nearhub.web.api import COMMIT_DOCUMENT_TTL_S
from nearhub.web.callers import Callers
from nearhub.web.hypertext import View
from nearhub.web.links import Links
from nearhub.web.middleware import HTML, SPEECH, STATUS, TEXT, base_headers, metadata_status
from nearhub.wire import ranges
from nearhub.wire.manifest import Entry, is_path, read_tree, tree_order
from nearhub.wire.target import FileTarget, PageTarget, format_api, format_file


@dataclass(frozen=True, slots=True)
class Pages:
    """What answering needs."""

    access: Access
    callers: Callers
    catalog: Catalog
    resolver: Resolver
    documents: Documents
    links: Links

    async def serve(self, request: web.BaseRequest, target: PageTarget) -> web.StreamResponse:
        """The page; of a path that is a file, the way to that file. Raises NearhubError."""
        request[SPEECH] = HTML if "text/html" in request.headers.get("Accept", "") else TEXT
        if request.method not in ("GET", "HEAD"):
            raise ReadOnly("this is a read-only mirror: pages can only be read")
        trace.account().what = "page"
        caller = self.callers.of(request)
        client = caller.address
        revision = default(target.revision)
        repo = await self.access.authorise(target.repo, revision, caller, Need.LISTING)
        current = await self.resolver.commit(repo, revision, client)
        target = PageTarget(repo, revision, target.path)
        base = self.links.base(request)
        entries, next_query = await self._entries(request, target, current.commit, client)
        if [entry.path for entry in entries if not entry.is_directory] == [target.path]:
            path = hypertext.path_below(base, format_file(FileTarget(repo, revision, target.path)))
            return self._answer(request, b"", {"Location": path}, is_stale=current.is_stale)
        manifest = await self.resolver.manifest(repo, current.commit, client)
        seen = await self.catalog.seen(repo)
        view = View(
            base,
            target,
            current.commit,
            manifest.about,
            entries,
            await self.resolver.files(repo, current.commit, client) if manifest.has_files else None,
            next_query,
            is_first=not {"after", "cursor"} & set(request.query),
            is_gated=seen is not None and seen.visibility.is_gated,
            is_stale=current.is_stale,
        )
        body = hypertext.repo_page(view).encode()
        headers = hypertext.HEADERS | {
            "X-Repo-Commit": current.commit,
            "ETag": f'W/"{hashlib.sha256(body).hexdigest()[:32]}"',
            "Cache-Control": "private, no-cache" if repo.is_restricted else "no-cache",
        }
        return self._answer(request, body, headers, is_stale=current.is_stale)

    async def _entries(
        self, request: web.BaseRequest, target: PageTarget, commit: str, client: str
    ) -> tuple[list[Entry], str | None]:
        """What this page lists, and the query of the next one."""
        if (cursor := request.query.get("cursor")) is not None:
            return await self._upstream_entries(target, commit, client, cursor)
        after = request.query.get("after", "")
        if after and not (is_path(after.removesuffix("/")) and after.startswith(f"{target.path}/" if target.path else "")):
            raise BadTarget("there is no such page of this directory")
        found = await self.resolver.tree(target.repo, commit, target.path, client, recursive=False, after=after, limit=PAGE + 1)
        if found is None:
            return await self._upstream_entries(target, commit, client, "")
        has_more = len(found) > PAGE
        return found[:PAGE], urlencode({"after": tree_order(found[PAGE - 1])}) if has_more else None

    async def _upstream_entries(
        self, target: PageTarget, commit: str, client: str, cursor: str
    ) -> tuple[list[Entry], str | None]:
        """Of a tree too large to be known whole: upstream's own pages, with its cursors."""
        asked = {"cursor": cursor, "limit": str(PAGE)} if cursor else {"limit": str(PAGE)}
        path = format_api(target.repo, "tree", commit, target.path)
        page = await self.documents.get(f"{path}?{urlencode(asked)}", client, about=target.repo, ttl_s=COMMIT_DOCUMENT_TTL_S)
        onward = dict(parse_qsl(page.next_query or "")).get("cursor")
        return list(read_tree(page.value)), urlencode({"cursor": onward}) if onward else None

    def _answer(self, request: web.BaseRequest, body: bytes, headers: dict[str, str], *, is_stale: bool) -> web.StreamResponse:
        status = metadata_status(is_stale=is_stale)
        request[STATUS] = status.word
        headers = base_headers(request) | headers | {"Cache-Status": str(status)}
        if "Location" in headers:
            return web.Response(status=302, headers=headers)
        etag = headers["ETag"].removeprefix("W/").strip('"')
        if ranges.etag_matches(request.headers.get("If-None-Match", ""), etag):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, headers=headers)
