"""GET and HEAD of /-/sites/NAME/…: what a site of the operator's says, from the cache where HTTP allows it.

A site's answers are its own: no CORS of ours, and a page may show but not run, since it has the mirror's origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, closing, nullcontext
from dataclasses import dataclass

from aiohttp import web

from nearhub import trace
from nearhub.errors import (
    AccessRefused,
    NearhubError,
    NotRoutable,
    NotStored,
    ReadOnly,
    UpstreamError,
    UpstreamFailed,
)
from nearhub.reader import FilePiece
from nearhub.sites import Found, Keeping, Question, SiteCache
from nearhub.upstream.sites import SiteAnswer
from nearhub.web.callers import Callers
from nearhub.web.files import send_piece
from nearhub.web.links import Links
from nearhub.web.middleware import SPEECH, STATUS, TEXT, CutError, request_id
from nearhub.wire import http_cache
from nearhub.wire.cachestatus import CacheStatus, Forward
from nearhub.wire.fields import Fields
from nearhub.wire.freshness import Decision
from nearhub.wire.sites import MOUNT, Site, conditions_of, guards, passed_on, relocated, split


@dataclass(frozen=True, slots=True)
class Sites:
    """`sites` by name."""

    sites: Mapping[str, Site]
    cache: SiteCache
    callers: Callers
    links: Links

    async def serve(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """`path` as split_prefix returns it. Raises NearhubError before, CutError after the headers."""
        request[SPEECH] = TEXT
        if request.method not in ("GET", "HEAD"):
            raise ReadOnly("this is a read-only mirror: write to the site itself")
        name, tail = split(path, request.raw_path)
        site = self.sites.get(name)
        if site is None:
            raise NotRoutable(f"this mirror has no site of the name {name!r}")
        account = trace.account()
        account.what, account.repo, account.path = "site", f"sites/{name}", tail.partition("?")[0]
        self._admit(request, site)
        question = Question(site, tail, Fields(request.headers.items()), self.callers.for_a_site(request))
        async with AsyncExitStack() as stack:
            found = await self.cache.find(question)
            if found is not None:
                stack.enter_context(closing(found))
            decision = http_cache.decide(question.fields, found.stored if found else None, self.cache.clock())
            trace.note(f"site {name}: {'nothing stored' if found is None else 'stored'}: {decision.value}")
            if decision is Decision.FAIL:
                raise NotStored("nothing fresh is stored of this, and only that was wanted (only-if-cached)")
            if found is None:
                return await self._ask(request, question, None)
            if decision is Decision.USE:
                return await self._send_stored(request, question, found, CacheStatus())
            if decision is Decision.USE_AND_REFRESH:
                self.cache.refresh_soon(question, found.stored)
                return await self._send_stored(request, question, found, CacheStatus(detail="stale"))
            return await self._revalidate(request, question, found)

    def _admit(self, request: web.BaseRequest, site: Site) -> None:
        """Raises AccessRefused for who is not among those that the operator named."""
        if not site.who:
            return
        caller = self.callers.of(request)
        if not site.who & (caller.groups | {caller.name or ""}):
            status = 401 if caller.name is None else 403
            message = f"the site {site.name} is not open to you: it needs one of this mirror's own tokens"
            raise AccessRefused(message, status=status)

    async def _revalidate(self, request: web.BaseRequest, question: Question, found: Found) -> web.StreamResponse:
        try:
            return await self._ask(request, question, found)
        except UpstreamError as exc:
            if not http_cache.may_serve_stale(found.stored, self.cache.clock()):
                raise
            trace.note(f"answered stale: {exc.message}")
            return await self._send_stored(request, question, found, CacheStatus(detail="stale"))

    async def _ask(self, request: web.BaseRequest, question: Question, found: Found | None) -> web.StreamResponse:
        """The site. Raises UpstreamError while an answer from what is stored is still possible."""
        trace.forwarded()
        asked_at = self.cache.clock()
        conditions = list(http_cache.validators(found.stored.fields).items()) if found else conditions_of(question.fields)
        sent = question.sent(conditions)
        async with self.cache.ask(request.method, question, sent) as answer:
            if found is not None and http_cache.is_failure(answer.status) and self._may_hide(found):
                raise UpstreamFailed(f"the site {question.site.name} answered {answer.status}")
            if answer.status != 304:
                return await self._pass_on(request, question, found, sent, answer, asked_at)
            if found is not None:
                fresh = await self.cache.freshen(question, found.stored, answer, asked_at)
                if fresh is not None:
                    found.stored = fresh
                    return await self._send_stored(request, question, found, CacheStatus(Forward.STALE))
            elif conditions:
                return await self._pass_on(request, question, None, sent, answer, asked_at)
        raise UpstreamFailed(f"the site {question.site.name} answered 304 about something else than it was asked")

    def _may_hide(self, found: Found) -> bool:
        return http_cache.may_serve_stale(found.stored, self.cache.clock())

    async def _send_stored(
        self, request: web.BaseRequest, question: Question, found: Found, status: CacheStatus
    ) -> web.StreamResponse:
        answer = http_cache.answer(question.fields, found.stored, self.cache.clock())
        response = self._response(request, question, answer.status, answer.fields, status)
        if answer.status not in (204, 304):
            response.content_length = 0 if answer.span is None else len(answer.span)
        await response.prepare(request)
        if request.method == "GET" and answer.span:
            await send_piece(request, response, FilePiece(found.fd, answer.span))
        await response.write_eof()
        return response

    async def _pass_on(
        self,
        request: web.BaseRequest,
        question: Question,
        found: Found | None,
        sent: Fields,
        answer: SiteAnswer,
        asked_at: float,
    ) -> web.StreamResponse:
        """As it comes; stored meanwhile, if it may be. The end is held back until it is stored and known to be the end."""
        keeping = await self.cache.keeping(question, sent, answer, asked_at) if request.method == "GET" else None
        async with keeping or nullcontext():
            # Two pieces before the headers: what is cut early is still a clean error, and small answers are stored by then.
            piece = await _next(answer, keeping)
            following = await _next(answer, keeping) if piece else b""
            if not following and keeping:
                await keeping.keep()
            status = CacheStatus(Forward.STALE if found else Forward.URI_MISS, stored=keeping is not None)
            response = self._response(request, question, answer.status, passed_on(answer.fields), status)
            if answer.length is not None and answer.status not in (204, 304):
                response.content_length = answer.length
            await response.prepare(request)
            try:
                while following:
                    await send_piece(request, response, piece)
                    piece, following = following, await _next(answer, keeping)
                    if not following and keeping:
                        await keeping.keep()
                if piece:
                    await send_piece(request, response, piece)
            except NearhubError as exc:
                raise CutError(response, exc) from exc
            except TimeoutError:
                raise ConnectionResetError("the client stopped reading") from None
            await response.write_eof()
            return response

    def _response(
        self, request: web.BaseRequest, question: Question, http_status: int, fields: Fields, status: CacheStatus
    ) -> web.StreamResponse:
        request[STATUS] = status.word
        headers = fields.flat()
        for name in headers:
            if name.lower() == "location":
                mounted_at = f"{self.links.base(request)}{MOUNT}{question.site.name}"
                headers[name] = relocated(headers[name], question.site, mounted_at)
        headers |= guards(fields)
        headers |= {"X-Request-Id": request_id(request), "Cache-Status": _listed(fields.all("Cache-Status"), status)}
        return web.StreamResponse(status=http_status, headers=headers)


async def _next(answer: SiteAnswer, keeping: Keeping | None) -> bytes:
    data = await answer.read()
    if data and keeping is not None:
        await keeping.write(data)
    return data


def _listed(before: Sequence[str], status: CacheStatus) -> str:
    """RFC 9211 §2: the cache nearest to the client stands last."""
    return ", ".join([*before, str(status)])
