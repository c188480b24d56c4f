"""The composition root: builds everything, in order, from the configuration; the only place that knows all parts.

A request passes: front (dispatch on the raw path; id, log and errors around it) → files or api.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import web
from aiohttp.http_parser import HttpRequestParser

from nearhub import __version__
from nearhub.access import Access
from nearhub.affinity import Affinity
from nearhub.budget import Budget
from nearhub.bundle.carriage import Carriage
from nearhub.catalog import Catalog
from nearhub.config import AuditConfig, Config, ServerConfig
from nearhub.connectivity import Connectivity, Mode
from nearhub.documents import Documents
from nearhub.errors import StoreRefused
from nearhub.fill import FillEngine, Patience
from nearhub.follower import Follower
from nearhub.git.mirrors import GitMirrors
from nearhub.grants import Grants
from nearhub.kinds import PolicyTable, SiteTable
from nearhub.metrics import Metrics
from nearhub.operations import Live, Operations
from nearhub.pins import Pins
from nearhub.prefetch import Prefetcher
from nearhub.resolve import Resolver
from nearhub.rulebook import Rulebook
from nearhub.sites import SiteCache
from nearhub.store.audit import AuditLog
from nearhub.store.bares import BareStore
from nearhub.store.blobs import BlobStore
from nearhub.store.eviction import Space
from nearhub.store.holdings import Holdings
from nearhub.store.index import Index
from nearhub.store.layout import CacheDir, open_cache
from nearhub.store.log import TransparencyLog
from nearhub.store.site_bodies import SiteBodies
from nearhub.store.tokens import TokenFile
from nearhub.upstream.client import Upstream, new_session
from nearhub.upstream.dispatch import Dispatcher
from nearhub.upstream.hosts import HostPolicy, HostRule
from nearhub.upstream.keys import Keyring
from nearhub.upstream.sites import SiteClient
from nearhub.web import logs
from nearhub.web.admin import admin_listening
from nearhub.web.api import Api
from nearhub.web.audit import Audit
from nearhub.web.callers import Callers
from nearhub.web.connections import Connections, Limits, fitted, raise_open_files
from nearhub.web.files import Files
from nearhub.web.front import Front, Handler
from nearhub.web.git import Git
from nearhub.web.lfs import Lfs
from nearhub.web.links import Links
from nearhub.web.log import Log
from nearhub.web.middleware import History
from nearhub.web.pages import Pages
from nearhub.web.sites import Sites
from nearhub.wire.policies import Policy
from nearhub.wire.sites import Site

log = logging.getLogger("nearhub")


@asynccontextmanager
async def mirror(config: Config, *, patience: Patience | None = None, is_followed: bool = True) -> AsyncIterator[Front]:
    """What answers requests, with everything behind it open; closed in reverse order on leaving. Raises StoreRefused.

    `is_followed`: whether what the operator follows is brought meanwhile.
    """
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
        proxy_urls = [url for url in (config.proxies.https, config.proxies.http) if url]
        connectivity = Connectivity(
            Mode.ON if config.upstream.offline else Mode.AUTO, lasting_s=config.upstream.offline_after_s
        )
        if connectivity.is_closed:
            log.info("offline: nobody outside is asked")
        metrics.offline.set_function(lambda: float(connectivity.is_offline))
        policy = HostPolicy(
            [upstream.url for upstream in config.upstream.urls],
            [HostRule(host.host, host.port, host.plain_http, host.named) for host in config.upstream.blob_hosts],
            proxy_urls,
        )
        bundle = str(config.upstream.ca_bundle) if config.upstream.ca_bundle else None
        session = new_session(policy, user_agent=f"nearhub/{__version__}", ca_bundle=bundle, metrics=metrics)
        stack.push_async_callback(session.close)
        keys = Keyring()
        upstreams = [
            Upstream(
                upstream.url,
                session,
                policy,
                trusted=upstream.trusted,
                proxy_for=config.proxies.for_url,
                keys=keys if number == 0 else None,
                connectivity=connectivity,
            )
            for number, upstream in enumerate(config.upstream.urls)
        ]
        dispatcher = Dispatcher(
            upstreams,
            connections=config.upstream.connections,
            client_connections=config.fill.client_connections,
            connectivity=connectivity,
        )
        stack.push_async_callback(dispatcher.close)

        record = await asyncio.to_thread(TransparencyLog, cache.log, index, origin=config.log.origin)
        await index.run(record.adopt)
        stack.push_async_callback(record.close)
        catalog = Catalog(index, metrics, record=record)
        pins = Pins(index, catalog, store)
        await pins.load()
        pins.start()
        stack.push_async_callback(pins.close)
        resolver = Resolver(catalog, dispatcher, ref_ttl_s=config.upstream.ref_ttl_s, keeps_open=pins.keeps_open)
        stack.push_async_callback(resolver.close)
        documents = Documents(index, dispatcher, keeps_open=pins.keeps_open)
        stack.push_async_callback(documents.close)
        rulebook = Rulebook(config.rules, config.access.contact, resolver, documents)
        grants = Grants(dispatcher, keys, cache.secret)
        stack.push_async_callback(grants.close)
        policies = await asyncio.to_thread(_policies, config.policies)
        access = Access(catalog, resolver, grants, rulebook, policies, keeps_open=pins.keeps_open)
        tokens = TokenFile(config.access.tokens)
        await asyncio.to_thread(tokens.read)
        callers = Callers(tokens)
        audit = await _audit(stack, config.audit, cache, metrics, callers, grants) if config.audit.enabled else None
        affinity = Affinity(index)
        await index.run(affinity.load)
        stack.push_async_callback(affinity.close)
        bares = BareStore(cache.git)
        await asyncio.to_thread(bares.recover)
        bodies = SiteBodies(cache.sites)
        await asyncio.to_thread(bodies.recover)
        holdings = Holdings(store, bares, bodies)
        space = Space(holdings, metrics, limit=config.cache.max_size_bytes, pinned=pins.holdings)
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
        fills.on_complete = pins.note_complete
        stack.push_async_callback(fills.close)
        mirrors = GitMirrors(
            bares,
            space,
            dispatcher,
            metrics,
            keys,
            named={mirror.name: mirror.url for mirror in config.git.mirrors},
            proxy_for=config.proxies.for_url,
            ca_bundle=bundle,
            ref_ttl_s=config.upstream.ref_ttl_s,
            max_bytes=config.git.max_repo_size_bytes,
            fetch_timeout_s=config.git.fetch_timeout_s,
            keeps_open=pins.keeps_open,
        )
        stack.push_async_callback(mirrors.close)

        links = Links(config.server.public_url, config.server.prefix, [upstream.url for upstream in config.upstream.urls])
        # Of its own: what the Hub's upstreams may redirect to is one list, and sites are on another.
        site_policy = HostPolicy([table.url for table in config.sites], [], proxy_urls)
        site_session = new_session(site_policy, user_agent=f"nearhub/{__version__}", ca_bundle=bundle, metrics=metrics)
        stack.push_async_callback(site_session.close)
        site_client = SiteClient(site_session, config.proxies.for_url)
        site_cache = SiteCache(site_client, connectivity, bodies, index, space, metrics)
        stack.push_async_callback(site_cache.close)
        lfs = Lfs(access, callers, grants, catalog, resolver, dispatcher, fills, links, mirrors, cache.secret)
        stack.push_async_callback(lfs.close)
        prefetcher = Prefetcher(
            access,
            resolver,
            documents,
            fills,
            mirrors,
            Budget(config.prefetch.max_rate_bytes),
            {name for policy in policies for name in policy.who},
        )
        follower = Follower(index, config.follow, prefetcher, pins)
        stack.push_async_callback(follower.close)
        history = History()
        operations = Operations(
            catalog,
            holdings,
            space.remove,
            pins,
            record,
            ref_ttl_s=config.upstream.ref_ttl_s,
            prefix=config.server.prefix,
            live=Live(fills, dispatcher, metrics, history.get, prefetcher, follower),
            carriage=Carriage(
                catalog,
                index,
                holdings,
                record,
                upstreams=[upstream.url for upstream in config.upstream.urls],
                trusted_keys=config.imports.trusted_keys,
                room=space,
                resolver=resolver,
            ),
        )
        front = Front(
            prefix=config.server.prefix,
            api=Api(access, callers, catalog, resolver, documents, dispatcher, links),
            files=Files(access, callers, catalog, resolver, affinity, fills),
            git=Git(access, callers, resolver, mirrors, metrics, config.git.sessions),
            lfs=lfs,
            pages=Pages(access, callers, catalog, resolver, documents, links),
            sites=Sites(_sites(config.sites), site_cache, callers, links),
            log=Log(record),
            index=index,
            metrics=metrics,
            history=history,
            audit=audit,
            connectivity=connectivity,
            operations=operations,
        )
        space.start()
        record.start(catalog.record_known)
        if is_followed:
            follower.start()
        await stack.enter_async_context(admin_listening(operations, cache.root))
        yield front


async def _audit(
    stack: AsyncExitStack, asked: AuditConfig, cache: CacheDir, metrics: Metrics, callers: Callers, grants: Grants
) -> Audit:
    book = AuditLog(cache.audit, metrics, max_file_bytes=asked.max_file_size_bytes, keep_files=asked.keep_files)
    await asyncio.to_thread(book.open)
    stack.push_async_callback(book.close)
    book.start()
    return Audit(book, callers, grants.mark)


def _sites(tables: Sequence[SiteTable]) -> dict[str, Site]:
    return {table.name: Site(table.name, table.url, frozenset(table.who), table.max_file_size_bytes) for table in tables}


def _policies(tables: Sequence[PolicyTable]) -> list[Policy]:
    """With the tokens that their files hold. Raises StoreRefused for a file that cannot be read, or holds none."""
    made = []
    for table in tables:
        authorization = None
        if table.token_file is not None:
            try:
                token = table.token_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as exc:
                raise StoreRefused(f"{table.where}: {table.token_file} cannot be read: {exc}") from exc
            if not token or len(token.split()) > 1:
                raise StoreRefused(f"{table.where}: {table.token_file} holds no token: it is to hold one, and nothing else")
            authorization = f"Bearer {token}"
        made.append(Policy(table.name, table.repos, frozenset(table.who), authorization))
    return made


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; running downloads get `drain_s`. Returns the exit status."""
    lines = logs.install()
    try:
        _require_strict_parser()
        asyncio.run(_serve(config, lines, lambda url: print(f"nearhub ready on {url}", flush=True)))
    except StoreRefused as exc:
        log.error("cannot start: %s", exc.message)  # noqa: TRY400
        return 1
    except OSError as exc:
        log.error("cannot listen on %s:%d: %s", config.server.host, config.server.port, exc.strerror or exc)  # noqa: TRY400
        return 1
    return 0


def _require_strict_parser() -> None:
    """aiohttp's parser in Python takes shapes of requests that a server in front of us may read in another way."""
    if HttpRequestParser.__module__ != "aiohttp._http_parser":
        raise StoreRefused("aiohttp is installed here without its parser in C: unset AIOHTTP_NO_EXTENSIONS, or install a wheel")


async def _serve(config: Config, lines: logs.Gathered, on_ready: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    flushing = loop.create_task(logs.keep_flushing(lines), name="log")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = config.server
    try:
        async with (
            mirror(config) as front,
            listening(front.handle, server.host, server.port, server.drain_s, limits_of(server), front.metrics) as port,
        ):
            host = f"[{server.host}]" if ":" in server.host else server.host
            on_ready(f"http://{host}:{port}{server.prefix}")
            await stop.wait()
            log.info("stopping: running downloads have %.0f s", server.drain_s)
    finally:
        flushing.cancel()


def limits_of(server: ServerConfig) -> Limits:
    """As configured, and as many as this process may have."""
    asked = Limits(
        server.max_connections,
        server.max_client_connections,
        server.request_timeout_s,
        server.idle_timeout_s,
        server.stall_timeout_s,
    )
    limits = fitted(asked, raise_open_files())
    if limits.total < asked.total:
        log.warning("the system's limit of open files allows %d connections, not %d", limits.total, asked.total)
    return limits


@asynccontextmanager
async def listening(
    handle: Handler, host: str, port: int, drain_s: float, limits: Limits | None = None, metrics: Metrics | None = None
) -> AsyncIterator[int]:
    """Answer requests by `handle`; yields the port. On leaving: no new connections, then open ones have `drain_s` seconds."""
    # Without aiohttp's Application: its router works on decoded paths, and a warm HEAD would spend a third of its time there.
    runner = web.ServerRunner(Connections(handle, limits or Limits(), metrics or Metrics()), shutdown_timeout=drain_s)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=1024)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
