"""The composition root: builds everything, in order, from the configuration; the only place that knows all parts.

A request passes: middleware (id, log, errors) → dispatch on the raw path → files.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import web

from nearhub import __version__
from nearhub.access import Access
from nearhub.affinity import Affinity
from nearhub.catalog import Catalog
from nearhub.config import Config
from nearhub.documents import Documents
from nearhub.errors import HostRejected, NotRoutable, ReadOnly, StoreRefused
from nearhub.fill import FillEngine, Patience
from nearhub.metrics import Metrics
from nearhub.operations import Live, Operations
from nearhub.resolve import Resolver
from nearhub.store.blobs import BlobStore
from nearhub.store.eviction import Space
from nearhub.store.index import Index
from nearhub.store.layout import open_cache
from nearhub.upstream.client import Upstream, new_session
from nearhub.upstream.dispatch import Dispatcher
from nearhub.upstream.hosts import HostPolicy, HostRule
from nearhub.web import logs
from nearhub.web.admin import admin_listening
from nearhub.web.api import Api
from nearhub.web.files import Files
from nearhub.web.links import Links
from nearhub.web.middleware import HISTORY, METRICS, History, around, base_headers
from nearhub.wire.target import FileTarget, ListCall, NamedCall, RawTarget, RepoCall, Target, parse, split_prefix

log = logging.getLogger("nearhub")

API = web.AppKey("api", Api)
FILES = web.AppKey("files", Files)
INDEX = web.AppKey("index", Index)
PREFIX = web.AppKey("prefix", str)
_ALLOWED = "GET, HEAD, OPTIONS, POST"


@asynccontextmanager
async def mirror(config: Config, *, patience: Patience | None = None) -> AsyncIterator[web.Application]:
    """The application, with everything behind it open; closed in reverse order on leaving. Raises StoreRefused."""
    async with AsyncExitStack() as stack:
        cache = await asyncio.to_thread(
            open_cache, config.cache.dir, index_dir=config.cache.index_dir, allow_group=config.cache.allow_group
        )
        stack.callback(cache.close)
        store = BlobStore(cache.root)
        resumable = await asyncio.to_thread(store.recover)
        index = await asyncio.to_thread(Index, cache.index)
        stack.callback(index.close)
        log.info("cache %s: %d partial blobs can be continued", cache.root, len(resumable))

        metrics = Metrics()
        policy = HostPolicy(
            [upstream.url for upstream in config.upstream.urls],
            [HostRule(host.host, host.port, host.plain_http, host.named) for host in config.upstream.blob_hosts],
            [url for url in (config.proxies.https, config.proxies.http) if url],
        )
        bundle = str(config.upstream.ca_bundle) if config.upstream.ca_bundle else None
        session = new_session(policy, user_agent=f"nearhub/{__version__}", ca_bundle=bundle)
        stack.push_async_callback(session.close)
        upstreams = [
            Upstream(upstream.url, session, policy, trusted=upstream.trusted, proxy_for=config.proxies.for_url)
            for upstream in config.upstream.urls
        ]
        dispatcher = Dispatcher(
            upstreams, connections=config.upstream.connections, client_connections=config.fill.client_connections
        )
        stack.push_async_callback(dispatcher.close)

        catalog = Catalog(index, metrics)
        resolver = Resolver(catalog, dispatcher, ref_ttl_s=config.upstream.ref_ttl_s)
        stack.push_async_callback(resolver.close)
        documents = Documents(index, dispatcher)
        stack.push_async_callback(documents.close)
        access = Access(catalog, resolver)
        affinity = Affinity(index)
        await index.run(affinity.load)
        stack.push_async_callback(affinity.close)
        space = Space(store, metrics, limit=config.cache.max_size_bytes)
        stack.push_async_callback(space.close)
        fills = FillEngine(
            store,
            space,
            dispatcher,
            metrics,
            connections=config.fill.connections,
            orphan_limit=config.fill.orphan_limit_bytes,
            patience=patience,
        )
        stack.push_async_callback(fills.close)

        app = web.Application(client_max_size=1024**2)
        app[METRICS] = metrics
        app[HISTORY] = history = History()
        app[INDEX] = index
        app[PREFIX] = config.server.prefix
        app[FILES] = Files(access, catalog, resolver, affinity, fills)
        links = Links(config.server.public_url, config.server.prefix, [upstream.url for upstream in config.upstream.urls])
        app[API] = Api(access, catalog, resolver, documents, dispatcher, links)
        # One route: dispatch is on the raw path, which aiohttp's own routing has decoded.
        app.router.add_route("*", r"/{path:[\s\S]*}", _handle)
        space.start()
        operations = Operations(
            catalog,
            store,
            space.remove,
            ref_ttl_s=config.upstream.ref_ttl_s,
            prefix=config.server.prefix,
            live=Live(fills, dispatcher, metrics, history.get),
        )
        await stack.enter_async_context(admin_listening(operations, cache.root))
        yield app


async def _handle(request: web.Request) -> web.StreamResponse:
    return await around(request, dispatch)


async def dispatch(request: web.Request) -> web.StreamResponse:
    if not request.raw_path.startswith("/"):
        raise HostRejected("this is a mirror, not a forward proxy: ask for paths, and set HF_ENDPOINT instead of HTTP_PROXY")
    path = split_prefix(request.raw_path, request.app[PREFIX])
    if request.method == "OPTIONS":
        return _preflight(request)
    if request.method not in ("GET", "HEAD", "POST"):
        raise ReadOnly("this is a read-only mirror: write to the Hub itself")
    if path.startswith("/-/"):
        return await _own_route(request, path)
    api, files = request.app[API], request.app[FILES]
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


def _parsed(request: web.Request, path: str) -> Target:
    try:
        return parse(path)
    except NotRoutable:
        if request.method == "POST":  # commit, preupload, branch …: this mirror knows no such URLs, but what they are for
            raise ReadOnly("this is a read-only mirror: write to the Hub itself") from None
        raise


def _preflight(request: web.Request) -> web.Response:
    """CORS (hub-protocol §7): browsers ask before they send Range or Authorization."""
    headers = base_headers(request) | {
        "Allow": _ALLOWED,
        "Access-Control-Allow-Methods": _ALLOWED,
        "Access-Control-Allow-Headers": "Authorization, Range, If-Range, If-None-Match, Accept, Content-Type",
        "Access-Control-Max-Age": "86400",
    }
    return web.Response(status=204, headers=headers)


async def _own_route(request: web.Request, path: str) -> web.Response:
    match path:
        case "/-/healthz":
            return web.Response(text="ok\n", headers=base_headers(request))
        case "/-/readyz":
            # Upstream may be away: that is what a mirror is for. Its index must take writes.
            index = request.app[INDEX]
            await index.run(index.put, "ready", {"at": time.time()})
            return web.Response(text="ready\n", headers=base_headers(request))
        case "/-/metrics":
            body = request.app[METRICS].text()
            return web.Response(body=body, headers=base_headers(request) | {"Content-Type": "text/plain; version=0.0.4"})
        case _:
            raise NotRoutable(f"no such page: {path}")


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; running downloads get `drain_s`. Returns the exit status."""
    lines = logs.install()
    try:
        asyncio.run(_serve(config, lines, lambda url: print(f"nearhub ready on {url}", flush=True)))
    except StoreRefused as exc:
        log.error("cannot start: %s", exc.message)  # noqa: TRY400
        return 1
    except OSError as exc:
        log.error("cannot listen on %s:%d: %s", config.server.host, config.server.port, exc.strerror or exc)  # noqa: TRY400
        return 1
    return 0


async def _serve(config: Config, lines: logs.Gathered, on_ready: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    flushing = loop.create_task(logs.keep_flushing(lines), name="log")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with mirror(config) as app, listening(app, config.server.host, config.server.port, config.server.drain_s) as port:
        host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
        on_ready(f"http://{host}:{port}{config.server.prefix}")
        await stop.wait()
        log.info("stopping: running downloads have %.0f s", config.server.drain_s)
    flushing.cancel()


@asynccontextmanager
async def listening(app: web.Application, host: str, port: int, drain_s: float) -> AsyncIterator[int]:
    """Serve `app`; yields the port. On leaving: no new connections, then the open ones have `drain_s` seconds.

    handler_cancellation: a client that leaves ends its handler, and so its Reader; fills are other tasks.
    """
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=drain_s)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=1024)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
