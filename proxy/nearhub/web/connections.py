"""Who is connected, and who may stay: how many connections, and how long a client may take. The owner of the open ones.

An address may have so many connections, and all addresses together so many. Where a limit is reached, the connection that has
been idle longest gives way; where none is idle, a new one hears 503 with its first request, in words; and if even of those
there are too many, it is cut at once. What a client sends must come in time, and what it is sent it must take.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum

from aiohttp import web

from nearhub.errors import TooManyConnections
from nearhub.metrics import Metrics
from nearhub.web import logs

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
REFUSAL = web.RequestKey("refusal", TooManyConnections)
"""Set on requests of a connection that is one too many."""
PATIENCE = web.RequestKey("patience", float)
"""How long this request's body may keep us waiting, in seconds."""
LINGER_S = 2.0
"""How long the rest of a refused body is read, so that its sender reads the answer."""
_SPARE = 64
"""Connections above a limit that are told why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`total`, `per_client`: connections, of all addresses and of each. Times in seconds.

    `request_s`: for the head of a connection's first request, and what a body may keep us waiting; `idle_s`: between requests,
    until the head of the next is here; `stall_s`: without taking a byte of what is sent.
    """

    total: int = 4096
    per_client: int = 512
    request_s: float = 10.0
    idle_s: float = 75.0
    stall_s: float = 60.0


class Admission(Enum):
    """What becomes of a new connection."""

    WELCOME = "welcome"
    TOLD = "told"
    CUT = "cut"


def decide(count: int, limit: int) -> Admission:
    """Of a connection beside which there are `count` others, where `limit` are allowed. Pure."""
    if count < limit:
        return Admission.WELCOME
    return Admission.TOLD if count < limit + _SPARE else Admission.CUT


@dataclass(slots=True)
class _Client:
    """One address. `idle`: those of its connections that wait for a request, the longest first."""

    count: int = 0
    idle: dict[web.RequestHandler, None] = field(default_factory=dict)


@dataclass(slots=True)
class _Connection:
    address: str
    transport: asyncio.Transport
    refusal: TooManyConnections | None = None
    deadline: asyncio.TimerHandle | None = None


class Connections(web.Server):
    """aiohttp's server, with a door. `handle` answers requests."""

    def __init__(self, handle: Handler, limits: Limits, metrics: Metrics) -> None:
        # handler_cancellation: a client that leaves ends its handler, and so its Reader; fills are other tasks.
        super().__init__(
            self._answer,
            handler_cancellation=True,
            access_log=None,
            logger=logs.HTTP,
            keepalive_timeout=limits.idle_s,
            lingering_time=LINGER_S,
        )
        self._handle = handle
        self._limits = limits
        self._metrics = metrics
        self._open: dict[web.RequestHandler, _Connection] = {}
        self._clients: dict[str, _Client] = {}
        self._idle: dict[web.RequestHandler, None] = {}

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """aiohttp calls this for each new connection, before anything is read from it."""
        super().connection_made(handler, transport)
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) else "local"
        client = self._clients.get(address, _Client())
        limits = self._limits
        connection = _Connection(address, transport)
        for limit, idle, why in ((limits.per_client, client.idle, "client"), (limits.total, self._idle, "total")):
            beside = client.count if why == "client" else len(self._open)
            if beside >= limit and self._close_idle(idle):
                beside -= 1
            admission = decide(beside, limit)
            if admission is Admission.WELCOME:
                continue
            self._metrics.connections_refused.labels(why).inc()
            if admission is Admission.CUT:
                transport.abort()
                return
            connection.refusal = TooManyConnections(_sentence(why, address, limit))
        _bound_stalls(transport, limits.stall_s)
        loop = asyncio.get_running_loop()
        connection.deadline = loop.call_later(limits.request_s, self._cut_silent, handler)
        self._clients.setdefault(address, _Client()).count += 1  # the one above may just have lost its last
        self._open[handler] = connection
        self._metrics.connections.set(len(self._open))

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """aiohttp calls this when one is gone, whoever closed it."""
        super().connection_lost(handler, exc)
        self._forget(handler)

    def _forget(self, handler: web.RequestHandler) -> None:
        connection = self._open.pop(handler, None)
        if connection is None:
            return
        if connection.deadline is not None:
            connection.deadline.cancel()
        self._idle.pop(handler, None)
        client = self._clients[connection.address]
        client.idle.pop(handler, None)
        client.count -= 1
        if client.count == 0:
            del self._clients[connection.address]
        self._metrics.connections.set(len(self._open))

    def _close_idle(self, idle: dict[web.RequestHandler, None]) -> bool:
        """Close the longest idle one of `idle` whose last answer has left; whether there was one."""
        for handler in idle:
            if self._open[handler].transport.get_write_buffer_size() == 0:
                handler.force_close()
                self._forget(handler)
                return True
        return False

    def _cut_silent(self, handler: web.RequestHandler) -> None:
        """Its time for a first request is over."""
        self._metrics.connections_refused.labels("slow").inc()
        self._open[handler].transport.abort()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        handler = request.protocol
        connection = self._open.get(handler)
        if connection is None:  # closed in this very moment
            return await self._handle(request)
        if connection.deadline is not None:
            connection.deadline.cancel()
            connection.deadline = None
        idle = self._clients[connection.address].idle
        self._idle.pop(handler, None)
        idle.pop(handler, None)
        request[PATIENCE] = self._limits.request_s
        if connection.refusal is not None:
            request[REFUSAL] = connection.refusal
            response = await self._handle(request)
            response.force_close()
            return response
        try:
            return await self._handle(request)
        finally:
            if handler in self._open:
                self._idle[handler] = idle[handler] = None


def _sentence(why: str, address: str, limit: int) -> str:
    if why == "client":
        return (
            f"{address} has {limit} connections to this mirror, which is as many as one address may have"
            " ([server] max_client_connections): close some, or come again"
        )
    return f"this mirror has {limit} connections, which is as many as it may have ([server] max_connections): come again"


def _bound_stalls(transport: asyncio.Transport, stall_s: float) -> None:
    """Have the system cut the connection when its client takes nothing for that long: it alone knows (Linux)."""
    its_socket = transport.get_extra_info("socket")
    if its_socket is not None and its_socket.family != getattr(socket, "AF_UNIX", None):
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        if option is not None:
            its_socket.setsockopt(socket.IPPROTO_TCP, option, max(1, int(1000 * stall_s)))


def fitted(limits: Limits, open_files: int) -> Limits:
    """`limits` as far as so many open files allow: a connection may need another for what it reads. Pure."""
    total = max(1, min(limits.total, (open_files - _RESERVE) // 2))
    return Limits(total, min(limits.per_client, total), limits.request_s, limits.idle_s, limits.stall_s)


_RESERVE = 200
"""Files that are open beside clients' connections: the index, upstream connections, partial blobs, git."""


def raise_open_files() -> int:
    """Let this process open as many files as the system allows it to; returns how many."""
    if resource is None:
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):  # macOS has a limit of its own, which it does not tell
            log.debug("the limit of open files stays at %d", soft)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft
