"""SiteClient: asks sites other than the Hub. Follows no redirect, keeps no cookie, and goes only where it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from nearhub.errors import UpstreamBusy, UpstreamFailed
from nearhub.upstream.client import CONNECT_TIMEOUT_S, ProxyFor, mapped_errors
from nearhub.wire.fields import Fields

ANSWER_TIMEOUT_S = 30.0
IDLE_S = 30.0
CONNECTIONS = 32
"""To all sites together."""
PLACE_WAIT_S = 8.0
BUSY_RETRY_S = 10.0


@dataclass(frozen=True, slots=True)
class SiteAnswer:
    """`length` in bytes, as announced; None: the end of the body will tell. `is_delimited`: the end can be told from a cut."""

    status: int
    fields: Fields
    length: int | None
    is_delimited: bool
    _response: aiohttp.ClientResponse

    async def read(self) -> bytes:
        """The next bytes; empty at the end. Raises UpstreamFailed when cut."""
        with mapped_errors(self._response.url):
            return await self._response.content.readany()


class SiteClient:
    """`session`: one whose policy allows the sites' hosts, and those alone. Closed by its owner."""

    def __init__(self, session: aiohttp.ClientSession, proxy_for: ProxyFor) -> None:
        self._session = session
        self._proxy_for = proxy_for
        self._places = asyncio.Semaphore(CONNECTIONS)

    @asynccontextmanager
    async def ask(self, method: str, url: str, fields: Fields) -> AsyncIterator[SiteAnswer]:
        """One request, GET or HEAD. Leaving early closes the connection. Raises UpstreamError."""
        target = URL(url, encoded=True)
        proxy = self._proxy_for(target.scheme, target.host or "", target.port or 0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=IDLE_S)
        async with self._place():
            with mapped_errors(target):
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    response = await self._session.request(
                        method, target, headers=CIMultiDict(fields.pairs), proxy=proxy, allow_redirects=False, timeout=timeout
                    )
            complete = False
            try:
                yield _read(response)
                complete = response.content.at_eof()
            finally:
                if complete:
                    response.release()
                else:
                    response.close()

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(PLACE_WAIT_S):
                await self._places.acquire()
        except TimeoutError:
            raise UpstreamBusy("all connections to sites are taken", retry_after_s=BUSY_RETRY_S, status=503) from None
        try:
            yield
        finally:
            self._places.release()


def _read(response: aiohttp.ClientResponse) -> SiteAnswer:
    fields = Fields((name.decode("latin-1"), _text(value)) for name, value in response.raw_headers)
    length = response.content_length
    if length is not None and length < 0:
        raise UpstreamFailed("a site announced a body of less than nothing")
    is_delimited = length is not None or "Transfer-Encoding" in fields or response.status in (204, 304)
    return SiteAnswer(response.status, fields, length, is_delimited, response)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
