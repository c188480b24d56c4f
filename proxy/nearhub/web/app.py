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

from nearhub import __version__
from nearhub.access import Access
from nearhub.affinity import Affinity
from nearhub.bundle.carriage import Carriage
from nearhub.catalog import Catalog
from nearhub.config import Config
from nearhub.documents import Documents
from nearhub.errors import StoreRefused
from nearhub.fill import FillEngine, Patience
from nearhub.git.mirrors import GitMirrors
from nearhub.grants import Grants
from nearhub.kinds import PolicyTable
from nearhub.metrics import Metrics
from nearhub.operations import Live, Operations
from nearhub.resolve import Resolver
from nearhub.rulebook import Rulebook
from nearhub.store.bares import BareStore
from nearhub.store.blobs import BlobStore
from nearhub.store.eviction import Space
from nearhub.store.holdings import Holdings
from nearhub.store.index import Index
from nearhub.store.layout import open_cache
from nearhub.store.tokens import TokenFile
from nearhub.upstream.client import Upstream, new_session
from nearhub.upstream.dispatch import Dispatcher
from nearhub.upstream.hosts import HostPolicy, HostRule
from nearhub.upstream.keys import Keyring
from nearhub.web import logs
from nearhub.web.admin import admin_listening
from nearhub.web.api import Api
from nearhub.web.callers import Callers
from nearhub.web.files import Files
from nearhub.web.front import Front, Handler
from nearhub.web.git import Git
from nearhub.web.lfs import Lfs
from nearhub.web.links import Links
from nearhub.web.middleware import History
from nearhub.web.pages import Pages
from nearhub.wire.policies import Policy

log = logging.getLogger("nearhub")


@asynccontextmanager
async def mirror(config: Config, *, patience: Patience | None = None) -> AsyncIterator[Front]:
    """What answers requests, with everything behind it open; closed in reverse order on leaving. Raises StoreRefused."""
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
        keys = Keyring()
        upstreams = [
            Upstream(
                upstream.url,
                session,
                policy,
                trusted=upstream.trusted,
                proxy_for=config.proxies.for_url,
                keys=keys if number == 0 else None,
            )
            for number, upstream in enumerate(config.upstream.urls)
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
        rulebook = Rulebook(config.rules, config.access.contact, resolver, documents)
        grants = Grants(dispatcher, keys, cache.secret)
        stack.push_async_callback(grants.close)
        policies = await asyncio.to_thread(_policies, config.policies)
        access = Access(catalog, resolver, grants, rulebook, policies)
        tokens = TokenFile(config.access.tokens)
        await asyncio.to_thread(tokens.read)
        callers = Callers(tokens)
        affinity = Affinity(index)
        await index.run(affinity.load)
        stack.push_async_callback(affinity.close)
        bares = BareStore(cache.git)
        await asyncio.to_thread(bares.recover)
        holdings = Holdings(store, bares)
        space = Space(holdings, metrics, limit=config.cache.max_size_bytes)
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
        )
        stack.push_async_callback(mirrors.close)

        links = Links(config.server.public_url, config.server.prefix, [upstream.url for upstream in config.upstream.urls])
        lfs = Lfs(access, callers, grants, catalog, resolver, dispatcher, fills, links, mirrors, cache.secret)
        stack.push_async_callback(lfs.close)
        front = Front(
            prefix=config.server.prefix,
            api=Api(access, callers, catalog, resolver, documents, dispatcher, links),
            files=Files(access, callers, catalog, resolver, affinity, fills),
            git=Git(access, callers, resolver, mirrors, metrics, config.git.sessions),
            lfs=lfs,
            pages=Pages(access, callers, catalog, resolver, documents, links),
            index=index,
            metrics=metrics,
            history=History(),
        )
        space.start()
        operations = Operations(
            catalog,
            holdings,
            space.remove,
            ref_ttl_s=config.upstream.ref_ttl_s,
            prefix=config.server.prefix,
            live=Live(fills, dispatcher, metrics, front.history.get),
            carriage=Carriage(
                catalog,
                index,
                holdings,
                upstreams=[upstream.url for upstream in config.upstream.urls],
                trusted_keys=config.imports.trusted_keys,
                room=space,
                resolver=resolver,
            ),
        )
        await stack.enter_async_context(admin_listening(operations, cache.root))
        yield front


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
    server = config.server
    try:
        async with mirror(config) as front, listening(front.handle, server.host, server.port, server.drain_s) as port:
            host = f"[{server.host}]" if ":" in server.host else server.host
            on_ready(f"http://{host}:{port}{server.prefix}")
            await stop.wait()
            log.info("stopping: running downloads have %.0f s", server.drain_s)
    finally:
        flushing.cancel()


@asynccontextmanager
async def listening(handle: Handler, host: str, port: int, drain_s: float) -> AsyncIterator[int]:
    """Answer requests by `handle`; yields the port. On leaving: no new connections, then the open ones have `drain_s` seconds.

    handler_cancellation: a client that leaves ends its handler, and so its Reader; fills are other tasks.
    """
    # Without aiohttp's Application: its router works on decoded paths, and a warm HEAD would spend a third of its time there.
    runner = web.ServerRunner(web.Server(handle, handler_cancellation=True, access_log=None), shutdown_timeout=drain_s)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=1024)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
