"""The front: every request comes in here, is taken to what answers it, and is logged, whatever becomes of it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from nearhub.connectivity import Connectivity
from nearhub.errors import NotRoutable, ReadOnly
from nearhub.metrics import Metrics
from nearhub.operations import Operations
from nearhub.store.index import Index
from nearhub.web.api import Api
from nearhub.web.audit import Audit
from nearhub.web.connections import REFUSAL
from nearhub.web.files import Files
from nearhub.web.git import Git
from nearhub.web.lfs import Lfs
from nearhub.web.log import Log
from nearhub.web.middleware import History, around, base_headers, metadata_status
from nearhub.web.pages import Pages
from nearhub.web.sites import Sites
from nearhub.wire.request import refusal
from nearhub.wire.sites import MOUNT
from nearhub.wire.target import (
    FileTarget,
    GitTarget,
    LfsCall,
    LfsTarget,
    ListCall,
    NamedCall,
    PageTarget,
    RawTarget,
    RepoCall,
    Target,
    parse,
    split_prefix,
)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
_ALLOWED = "GET, HEAD, OPTIONS, POST"


@dataclass(frozen=True, slots=True)
class Front:
    """What answers requests. `prefix`: as configured."""

    prefix: str
    api: Api
    files: Files
    git: Git
    lfs: Lfs
    pages: Pages
    sites: Sites
    log: Log
    index: Index
    metrics: Metrics
    history: History
    connectivity: Connectivity
    operations: Operations
    """The operator's verbs, with all of the mirror behind them."""
    audit: Audit | None = None

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer, whatever comes. Never raises but when the client left."""
        return await around(request, self.dispatch, self.metrics, self.history, self.connectivity, self.audit)

    async def dispatch(self, request: web.BaseRequest) -> web.StreamResponse:
        """Take a request to what answers it: by its raw path, since decoding first would make `refs%2Fpr%2F1` ambiguous."""
        refused = refusal(
            version=request.version,
            method=request.method,
            target=request.raw_path,
            host=request.headers.get("Host"),
            is_chunked="Transfer-Encoding" in request.headers,
        )
        if refused is not None:
            raise refused
        path = split_prefix(request.raw_path, self.prefix)
        if request.method == "OPTIONS":
            return _preflight(request)
        if path.startswith("/-/") and not path.startswith(("/-/lfs/", MOUNT)):
            return await self._own_route(request, path)
        if (too_many := request.get(REFUSAL)) is not None:
            raise too_many
        if path.startswith(MOUNT):
            return await self.sites.serve(request, path)
        api, files = self.api, self.files
        if request.method != "POST" and (decided := files.recall(path)) is not None:
            return await files.answer(request, decided)
        match _parsed(request, path):
            case FileTarget() as target:
                return await files.serve(request, path, target)
            case RawTarget() as target:
                answer = await api.raw(request, target)
                return await files.serve(request, path, answer) if isinstance(answer, FileTarget) else answer
            case RepoCall() as call:
                return await api.repo(request, call)
            case ListCall() as call:
                return await api.listing(request, call)
            case NamedCall() as call:
                return await api.named(request, call)
            case GitTarget() as target:
                return await self.git.serve(request, target)
            case LfsCall() as call:
                return await self.lfs.call(request, call)
            case LfsTarget() as target:
                return await self.lfs.serve(request, target)
            case PageTarget() as target:
                return await self.pages.serve(request, target)

    async def _own_route(self, request: web.BaseRequest, path: str) -> web.Response:
        if path.startswith("/-/log/"):
            return await self.log.serve(request, path.removeprefix("/-/log/").partition("?")[0])
        headers = base_headers(request) | {"Cache-Status": str(metadata_status())}
        match path:
            case "/-/healthz":
                return web.Response(text="ok\n", headers=headers)
            case "/-/readyz":
                # Upstream may be away: that is what a mirror is for. Its index must take writes.
                await self.index.run(self.index.put, "ready", {"at": time.time()})
                why = self.connectivity.why
                return web.Response(text=f"ready, offline: {why}\n" if why else "ready\n", headers=headers)
            case "/-/metrics":
                body = self.metrics.text()
                return web.Response(body=body, headers=headers | {"Content-Type": "text/plain; version=0.0.4"})
            case _:
                raise NotRoutable(f"no such page: {path}")


def _parsed(request: web.BaseRequest, path: str) -> Target:
    try:
        return parse(path)
    except NotRoutable:
        if request.method == "POST":  # commit, preupload, branch …: this mirror knows no such URLs, but what they are for
            raise ReadOnly("this is a read-only mirror: write to the Hub itself") from None
        raise


def _preflight(request: web.BaseRequest) -> web.Response:
    """CORS (hub-protocol §7): browsers ask before they send Range or Authorization."""
    headers = base_headers(request) | {
        "Allow": _ALLOWED,
        "Access-Control-Allow-Methods": _ALLOWED,
        "Access-Control-Allow-Headers": "Authorization, Range, If-Range, If-None-Match, Accept, Content-Type",
        "Access-Control-Max-Age": "86400",
    }
    return web.Response(status=204, headers=headers)
