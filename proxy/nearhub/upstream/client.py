"""Upstream: one endpoint (the Hub, or a mirror of it). Asks for metadata and for spans of bytes; maps every failure to ours.

Redirects are followed by hand: signed URLs must go out byte for byte (aiohttp would re-quote them), only to allowed hosts, and
no token ever goes to another origin than the one it is for. Cookies are neither kept nor sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
from yarl import URL

from nearhub.connectivity import Connectivity
from nearhub.errors import (
    AccessRefused,
    EntryNotFound,
    HubRefusal,
    RefusedByHub,
    RepoNotFound,
    RevisionNotFound,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamLied,
    UpstreamUnreachable,
)
from nearhub.metrics import Metrics
from nearhub.upstream.hosts import GuardedResolver, HostPolicy
from nearhub.upstream.keys import Keyring
from nearhub.wire import lfs
from nearhub.wire.git import url_of
from nearhub.wire.headers import BlobId, FileMetadata, ObjectMetadata, normalise_etag, read_metadata
from nearhub.wire.ranges import format_range, parse_content_range
from nearhub.wire.spans import Span
from nearhub.wire.target import FileTarget, LfsTarget, Repo, format_api, format_file, is_commit

MAX_REDIRECTS = 5
MAX_RETRY_AFTER_S = 3600.0
METADATA_TIMEOUT_S = 8.0
"""Clients give up on a HEAD after 10 s."""
CONNECT_TIMEOUT_S = 5.0
MAX_DOCUMENT = 64 * 1024**2
"""Bytes of JSON that are read of one answer."""
_LARGE_DOCUMENT = 256 * 1024
"""From this size on, JSON is decoded in a thread."""
_PERSONAL_HEADERS = ("Content-Type", "X-Error-Code", "X-Error-Message", "Retry-After", "RateLimit", "RateLimit-Policy")
_NEXT = re.compile(r"<[^>?]*\?([^>]*)>\s*;\s*rel=\"?next\"?")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_ERROR_CODE = re.compile(r"[A-Za-z0-9_-]{1,64}\Z", re.ASCII)
_RATE_LIMIT = re.compile(r"r=(\d+).*?t=(\d+)|t=(\d+)")

ProxyFor = Callable[[str, str, int], str | None]
"""(scheme, host, port) → URL of the outbound proxy, or None."""


class LocationExpired(UpstreamFailed):
    """A signed URL no longer works: ask the Hub for a new one."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a blob's bytes are: the end of the redirects, and the validator it had there. Lives minutes; never stored."""

    url: URL
    validator: str | None


@dataclass(slots=True)
class Body:
    """An answer whose bytes are about to be read. `span` is what they are, which may be more than was asked for (a 200)."""

    span: Span
    location: Location
    _response: aiohttp.ClientResponse

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes of `span`, in order, in pieces as they arrive. Raises UpstreamFailed when cut, UpstreamLied on overrun."""
        left = len(self.span)
        with mapped_errors(self._response.url):
            while left > 0:
                chunk = await self._response.content.readany()
                if not chunk:
                    raise UpstreamFailed(f"{_origin(self._response.url)} ended the body {left} bytes early")
                if len(chunk) > left:
                    raise UpstreamLied(f"{_origin(self._response.url)} sent more bytes than it announced")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True, slots=True)
class Document:
    """An answer in JSON, of `source`. `next_query`: of the next page, from Link; None on the last. `size` in bytes, as sent."""

    value: Any
    next_query: str | None
    size: int
    source: str = ""


@dataclass(frozen=True, slots=True)
class Personal:
    """An answer that is meant for one caller: passed on as it is, and never kept."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def new_session(
    policy: HostPolicy, *, user_agent: str, ca_bundle: str | None = None, metrics: Metrics | None = None
) -> aiohttp.ClientSession:
    """The one session that upstreams share. The caller closes it. `metrics` count how often anybody outside is addressed."""
    context = ssl.create_default_context(cafile=ca_bundle) if ca_bundle else ssl.create_default_context()
    connector = aiohttp.TCPConnector(limit=0, resolver=GuardedResolver(policy), ssl=context, keepalive_timeout=30)
    return aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": user_agent, "Accept-Encoding": "identity"},
        max_line_size=32 * 1024,
        max_field_size=32 * 1024,
        read_bufsize=256 * 1024,
        trace_configs=[] if metrics is None else [_counting(metrics)],
    )


def _counting(metrics: Metrics) -> aiohttp.TraceConfig:
    async def looked_up(*_: object) -> None:
        metrics.upstream_contacts.labels("dns").inc()

    async def connected(*_: object) -> None:
        metrics.upstream_contacts.labels("connection").inc()

    config = aiohttp.TraceConfig()
    config.on_dns_resolvehost_start.append(looked_up)
    config.on_connection_create_start.append(connected)
    return config


class Upstream:
    """One endpoint. Stateless but for its session: health is the Dispatcher's.

    `keys`: of the Hub's own callers, for the one upstream that they are sent to.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        policy: HostPolicy,
        *,
        trusted: bool,
        proxy_for: ProxyFor = lambda scheme, host, port: None,
        keys: Keyring | None = None,
        connectivity: Connectivity | None = None,
        idle_s: float = 8.0,
    ) -> None:
        self.url = url
        self.trusted = trusted
        self._base = URL(url, encoded=True)
        self._session = session
        self._policy = policy
        self._proxy_for = proxy_for
        self._keys = keys or Keyring()
        self._connectivity = connectivity or Connectivity()
        self._body_timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=idle_s)

    def __repr__(self) -> str:
        return f"<Upstream {self.url}>"

    async def metadata(self, target: FileTarget) -> FileMetadata:
        """HEAD, following redirects until one answer carries the file's metadata. Raises HubRefusal or UpstreamError."""
        url = self._resolve_url(target)
        try:
            async with asyncio.timeout(METADATA_TIMEOUT_S):
                for _ in range(MAX_REDIRECTS):
                    async with self._request("HEAD", url, {}, about=target.repo) as response:
                        self._refuse_errors(response, target)
                        if response.status not in _REDIRECTS:
                            return self._told(read_metadata(response.headers, response.url.raw_path, is_redirect=False))
                        onward = self._redirect(response)
                        if response.headers.get("X-Linked-ETag") or onward.origin() != self._base.origin():
                            return self._told(read_metadata(response.headers, response.url.raw_path, is_redirect=True))
                        url = onward
        except TimeoutError:
            raise _silence(self.url) from None
        raise UpstreamFailed(f"{self.url} redirects {MAX_REDIRECTS} times and more")

    def _told(self, meta: FileMetadata) -> FileMetadata:
        return replace(meta, source=self.url)

    async def document(
        self, path: str, form: Mapping[str, Any] | None = None, *, about: Repo | None = None, media_type: str | None = None
    ) -> Document:
        """GET of `path`, raw and with its query, or POST of `form` as JSON. Raises HubRefusal or UpstreamError.

        `about` is the repo that the question is about, if it is about one; `media_type`: which JSON, both ways.
        """
        headers = {"Accept": media_type, "Content-Type": media_type} if media_type else {}
        url = URL(self.url + path, encoded=True)
        try:
            async with asyncio.timeout(METADATA_TIMEOUT_S):
                for _ in range(MAX_REDIRECTS):
                    async with self._request("POST" if form is not None else "GET", url, headers, form, about) as response:
                        if response.status in _REDIRECTS:
                            url = self._redirect_at_home(response)
                            continue
                        self._refuse_errors(response, about or path.partition("?")[0])
                        return await self._read_document(response)
        except TimeoutError:
            raise _silence(self.url) from None
        raise UpstreamFailed(f"{self.url} redirects {MAX_REDIRECTS} times and more")

    async def lfs_offers(self, repo: Repo, objects: Iterable[lfs.Wanted]) -> dict[str, lfs.Offer]:
        """What its LFS batch for `repo` says of these objects, by oid. Raises HubRefusal or UpstreamError."""
        asked = tuple(objects)
        path = f"{url_of('', repo)}.git/info/lfs/objects/batch"
        document = await self.document(path, lfs.question(asked), about=repo, media_type=lfs.MEDIA_TYPE)
        return lfs.read_offers(document.value, asked)

    async def _read_document(self, response: aiohttp.ClientResponse) -> Document:
        body = await self._read(response)
        try:
            if len(body) < _LARGE_DOCUMENT:
                value = _decoded(body)
            else:
                value = await asyncio.get_running_loop().run_in_executor(None, _decoded, body)
        except (ValueError, RecursionError):
            raise UpstreamFailed(f"{self.url} answered with something that is no JSON") from None
        link = _NEXT.search(response.headers.get("Link", ""))
        return Document(value, link[1] if link else None, len(body), self.url)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        pieces, size = [], 0
        with mapped_errors(response.url):
            async for piece in response.content.iter_any():
                pieces.append(piece)
                size += len(piece)
                if size > MAX_DOCUMENT:
                    response.close()
                    raise UpstreamFailed(f"{self.url} sent more than {MAX_DOCUMENT >> 20} MiB of JSON")
            if response.content_length is not None and size != response.content_length:
                raise UpstreamFailed(f"{self.url} ended an answer early")
        return b"".join(pieces)

    async def permits(self, repo: Repo, authorization: str) -> None:
        """Return if the Hub lets this token have the content of `repo`. Raises its HubRefusal, or UpstreamError."""
        url = URL(self.url + format_api(repo, "auth-check"), encoded=True)
        try:
            async with asyncio.timeout(METADATA_TIMEOUT_S):
                for _ in range(MAX_REDIRECTS):
                    async with self._request("GET", url, {"Authorization": authorization}) as response:
                        if response.status not in _REDIRECTS:
                            # Its canonical name is no answer to who asked by another: it may be all that he wants to know.
                            return self._refuse_errors(response, "this repo")
                        url = self._redirect_at_home(response)
        except TimeoutError:
            raise _silence(self.url) from None
        raise UpstreamFailed(f"{self.url} redirects {MAX_REDIRECTS} times and more")

    async def personal(self, path: str, authorization: str | None) -> Personal:
        """GET of `path` with the caller's own token, to this upstream's origin and nowhere else. Raises UpstreamError."""
        headers = {"Authorization": authorization} if authorization else {}
        try:
            async with asyncio.timeout(METADATA_TIMEOUT_S):
                async with self._request("GET", URL(self.url + path, encoded=True), headers) as response:
                    body = await self._read(response)
                    told = {name: _one_line(response.headers[name]) for name in _PERSONAL_HEADERS if name in response.headers}
                    return Personal(response.status, told, body)
        except TimeoutError:
            raise _silence(self.url) from None

    async def probe(self) -> None:
        """Return if this upstream answers at all. Raises UpstreamError."""
        with contextlib.suppress(HubRefusal):
            await self.document("/api/agent-harnesses")

    @asynccontextmanager
    async def fetch(
        self,
        target: FileTarget | LfsTarget,
        meta: FileMetadata | ObjectMetadata,
        span: Span,
        location: Location | None,
    ) -> AsyncIterator[Body]:
        """GET bytes `span` of `target`, a file at a commit or an LFS object; from `location` where that is known already.

        Everything is checked before the first byte is given out. Raises UpstreamError or HubRefusal; LocationExpired when
        `location` must be asked for again. Leaving the context early closes the connection.
        """
        url = location.url if location else await self._url_of(target, meta)
        headers = {"Range": format_range(span)}
        if location and location.validator:
            headers["If-Range"] = location.validator
        for _ in range(MAX_REDIRECTS + 1):
            async with self._request("GET", url, headers, about=target.repo) as response:
                if response.status in _REDIRECTS:
                    self._refuse_other_content(response, meta.blob)
                    url = self._redirect(response)
                    continue
                if response.url.origin() == self._base.origin():
                    self._refuse_errors(response, target)
                    self._refuse_other_content(response, meta.blob)
                elif response.status in (400, 401, 403, 404, 410):
                    raise LocationExpired(f"{_origin(response.url)} refuses the signed URL ({response.status})")
                else:
                    self._refuse_failures(response)
                body = _checked_body(response, span, meta.size, location)
                complete = False
                try:
                    yield body
                    complete = response.content.at_eof()
                finally:
                    if not complete:
                        response.close()
                return
        raise UpstreamFailed(f"{self.url} redirects more than {MAX_REDIRECTS} times")

    async def _url_of(self, target: FileTarget | LfsTarget, meta: FileMetadata | ObjectMetadata) -> URL:
        """Where to begin. An LFS object's is asked for: whatever host it names is checked as a redirect's is."""
        if isinstance(target, FileTarget):
            return self._resolve_url(target)
        offer = (await self.lfs_offers(target.repo, [lfs.Wanted(target.oid, meta.size)]))[target.oid]
        if offer.href is None:
            raise EntryNotFound(f"{self.url} does not give the LFS object {target}: {offer.message}")
        try:
            return URL(offer.href, encoded=True)
        except ValueError:
            raise UpstreamFailed(f"{self.url} offers an LFS object at something that is no URL") from None

    def _resolve_url(self, target: FileTarget) -> URL:
        return URL(self.url + format_file(target), encoded=True)

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        url: URL,
        headers: dict[str, str],
        form: Mapping[str, Any] | None = None,
        about: Repo | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The only place that sends anything. A token goes to this upstream's own origin: scheme, host and port."""
        self._connectivity.require()
        self._policy.check(url)
        if url.origin() == self._base.origin():
            headers = headers | self._keys.headers(about)
        proxy = self._proxy_for(url.scheme, url.host or "", url.port or 0)
        with mapped_errors(url):
            response = await self._session.request(
                method, url, headers=headers, json=form, proxy=proxy, allow_redirects=False, timeout=self._body_timeout
            )
        try:
            yield response
        finally:
            response.release()

    def _redirect(self, response: aiohttp.ClientResponse) -> URL:
        """Where to, byte for byte as upstream wrote it."""
        text = response.headers.get("Location", "")
        try:
            onward = URL(text, encoded=True)
            url = onward if onward.absolute else response.url.join(onward)
        except ValueError:
            raise UpstreamFailed(f"{self.url} redirects to something that is no URL") from None
        self._policy.check(url)
        return url

    def _redirect_at_home(self, response: aiohttp.ClientResponse) -> URL:
        """A redirect of an API call: to a repo's new name, on the same origin."""
        url = self._redirect(response)
        if url.origin() != self._base.origin():
            raise UpstreamFailed(f"{self.url} sends its callers on to {_origin(url)}: set that as --upstream, if it is right")
        return url

    def _refuse_errors(self, response: aiohttp.ClientResponse, what: object) -> None:
        if response.status in (400, 401, 403, 404, 410, 451):
            raise _refusal(response, what)
        self._refuse_failures(response)

    def _refuse_failures(self, response: aiohttp.ClientResponse) -> None:
        status = response.status
        origin = _origin(response.url)
        retry_after_s = _retry_after(response)
        if status == 429 or (status == 503 and retry_after_s is not None):
            wait_s = min(retry_after_s if retry_after_s is not None else 10.0, MAX_RETRY_AFTER_S)
            raise UpstreamBusy(f"{origin} asks us to wait {wait_s:.0f} s ({status})", retry_after_s=wait_s, status=status)
        if status == 416:
            raise UpstreamLied(f"{origin} has fewer bytes than announced (416)")
        if status not in (200, 206) and status not in _REDIRECTS:
            raise UpstreamFailed(f"{origin} answered {status}")

    def _refuse_other_content(self, response: aiohttp.ClientResponse, blob: BlobId) -> None:
        """P11: what the Hub now says this path is at this commit must be what it said before."""
        etag = normalise_etag(response.headers.get("X-Linked-ETag") or response.headers.get("ETag"))
        if etag is None:
            return
        try:
            named = BlobId.from_etag(etag)
        except ValueError:
            return
        if named.algo is blob.algo and named != blob:
            raise UpstreamLied(f"{self.url} names other content for the same commit and path: {named} instead of {blob}")


def _checked_body(response: aiohttp.ClientResponse, asked: Span, size: int, location: Location | None) -> Body:
    """Refuse an answer whose bytes cannot be placed with certainty (reliability B2–B4, B8)."""
    origin = _origin(response.url)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UpstreamFailed(f"{origin} sent an encoded body although identity was asked for")
    validator = response.headers.get("ETag")
    if validator is not None and validator.startswith("W/"):
        validator = None
    if location is not None and location.validator and validator != location.validator:
        raise LocationExpired(f"{origin} has another object there now ({location.validator} became {validator})")
    if response.status == 206:
        content_range = parse_content_range(response.headers.get("Content-Range"))
        if content_range is None:
            raise UpstreamLied(f"{origin} answered 206 without a usable Content-Range")
        span, total = content_range
        if span.start != asked.start or span.stop > asked.stop or total not in (None, size):
            raise UpstreamLied(f"{origin} answered bytes {span.start}-{span.stop - 1}/{total} for {format_range(asked)}/{size}")
    else:
        span = Span(0, size)
    length = response.content_length
    if length is not None and length != len(span):
        raise UpstreamLied(f"{origin} announced {length} bytes where {len(span)} belong: not this file")
    return Body(span, Location(response.url, validator), response)


def _decoded(body: bytes) -> Any:
    """JSON, in which half a surrogate pair, which no UTF-8 can hold, is a replacement character."""
    value = json.loads(body)
    return _sound(value) if b"\\ud" in body or b"\\uD" in body else value


def _sound(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case list():
            return [_sound(item) for item in value]
        case dict():
            return {_sound(key): _sound(item) for key, item in value.items()}
    return value


def _refusal(response: aiohttp.ClientResponse, what: object) -> HubRefusal:
    """`what` was asked for, in words."""
    named = _ERROR_CODE.match(response.headers.get("X-Error-Code", ""))
    code = named[0] if named else None
    said = _one_line(response.headers.get("X-Error-Message", ""))
    status = response.status
    if code == "EntryNotFound":
        commit = response.headers.get("X-Repo-Commit", "")
        return EntryNotFound(said or f"no such file: {what}", commit if is_commit(commit) else None)
    if code == "RevisionNotFound":
        return RevisionNotFound(said or f"no such revision: {what}")
    if code == "RepoNotFound" and status == 404:
        return RepoNotFound(said or f"no such repo: {what}")
    if code == "GatedRepo":
        return AccessRefused(said or f"{what} is gated", status=status, code=code)
    if status == 401:
        # The Hub's answer to anybody for what is absent or private; without a code, clients on plain http misread it.
        return AccessRefused(f"{what} does not exist, or is private", status=401, code="RepoNotFound")
    if status == 400:
        return RefusedByHub(said or f"upstream calls {what} a bad request")
    if status == 404:
        return RepoNotFound(said or f"upstream does not have {what}")
    return AccessRefused(said or f"upstream refuses {what} ({status})", status=403, code=code)


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds to wait, from Retry-After (seconds or date) or the Hub's RateLimit header; None when neither is there."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None
    match = _RATE_LIMIT.search(response.headers.get("RateLimit", "")) if response.status == 429 else None
    return float(match[2] or match[3]) + 1.0 if match else None


def _silence(url: str) -> UpstreamUnreachable:
    return UpstreamUnreachable(f"{url} did not answer within {METADATA_TIMEOUT_S:g} s", is_silence=True)


def _one_line(text: str) -> str:
    return "".join(c if " " <= c <= "~" else " " for c in text)[:300].strip()


def _origin(url: URL) -> str:
    """Never more of a URL than this in a message: signed URLs are secrets."""
    return str(url.origin())


class mapped_errors:
    """aiohttp's and the system's errors → ours, at the one place that touches the network."""

    def __init__(self, url: URL) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        if exc is None or isinstance(exc, (UpstreamError, HubRefusal)):
            return
        origin = _origin(self._url)
        match exc:
            case aiohttp.ServerTimeoutError() if not isinstance(exc, aiohttp.SocketTimeoutError):
                raise UpstreamUnreachable(f"{origin} did not answer in time", is_silence=True) from exc
            case TimeoutError():
                raise UpstreamFailed(f"{origin} stalled") from exc
            case aiohttp.ClientConnectorError() | aiohttp.ClientProxyConnectionError():
                raise UpstreamUnreachable(f"{origin} cannot be reached: {exc.os_error.strerror or exc.os_error}") from exc
            case aiohttp.ClientError() | OSError():
                raise UpstreamFailed(f"{origin} broke the connection ({type(exc).__name__})") from exc
            case _:
                return
