"""What every request meets, whatever it asks for: ids, errors as the Hub renders them, refusals, the mirror's own pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from nearhub.config import load
from nearhub.web.app import listening
from tests.hub import LFS, Content, Hub
from tests.mirror import Mirror, environment, running


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """A plain client."""
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


async def raw(mirror: Mirror, request: bytes) -> bytes:
    """Send bytes as they are; everything that comes back until the mirror closes."""
    host, port = mirror.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_a_write_is_refused_and_never_forwarded(
    hub: Hub, mirror: Mirror, client: aiohttp.ClientSession, method: str
) -> None:
    """405 with a sentence and Allow; upstream hears nothing of it."""
    headers = {"Authorization": "Bearer hf_canary"}
    async with client.request(method, f"{mirror.url}/api/models/org/m/commit/main", data=b"x", headers=headers) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "GET, HEAD, OPTIONS"
        assert "read-only mirror" in response.headers["X-Error-Message"]
    assert hub.counters.requests() == 0


async def test_an_error_is_told_in_headers_and_in_json(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """HEAD has no body, so code and message are headers; GET has them in the body too; the client's trace id comes back."""
    hub.repo("org/m").commit({"a.txt": b"a"})
    url = f"{mirror.url}/org/m/resolve/main/absent"
    async with client.head(url, headers={"X-Amzn-Trace-Id": "trace-1234567890"}) as response:
        assert response.status == 404
        assert response.headers["X-Error-Code"] == "EntryNotFound"
        assert response.headers["X-Request-Id"] == "trace-1234567890"
        assert len(response.headers["X-Repo-Commit"]) == 40
    async with client.get(url) as response:
        assert (await response.json())["error"] == response.headers["X-Error-Message"]


async def test_a_request_id_that_could_break_a_log_line_is_replaced(mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """Only plain tokens are echoed."""
    async with client.head(f"{mirror.url}/-/healthz", headers={"X-Request-Id": "evil id <script>"}) as response:
        assert "evil" not in response.headers["X-Request-Id"]


async def test_this_is_no_forward_proxy(mirror: Mirror) -> None:
    """An absolute-form request for another host is 421, whatever that host is."""
    answer = await raw(mirror, b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 421 ")
    assert b"HF_ENDPOINT" in answer


async def test_browsers_may_ask(mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """CORS preflight: Range and Authorization are allowed, and the Hub's headers are exposed on every answer."""
    async with client.options(f"{mirror.url}/org/m/resolve/main/a") as response:
        assert response.status == 204
        assert "Range" in response.headers["Access-Control-Allow-Headers"]
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "X-Repo-Commit" in response.headers["Access-Control-Expose-Headers"]


async def test_the_mirrors_own_pages(hub: Hub, mirror: Mirror, client: aiohttp.ClientSession) -> None:
    """Health, and metrics that have counted the request before."""
    hub.repo("org/m").commit({"a.txt": b"hello"})
    async with client.get(f"{mirror.url}/org/m/resolve/main/a.txt") as response:
        assert await response.read() == b"hello"
    async with client.get(f"{mirror.url}/-/healthz") as response:
        assert response.headers["Cache-Status"] == "nearhub; hit"
        assert (response.status, await response.text()) == (200, "ok\n")
    async with client.get(f"{mirror.url}/-/metrics") as response:
        text = await response.text()
    assert 'nearhub_requests_total{cache="uri-miss",status="200"} 1.0' in text
    assert 'nearhub_upstream_bytes_total{kind="fill"} 5.0' in text
    async with client.get(f"{mirror.url}/-/nothing") as response:
        assert response.status == 404


async def test_what_the_mirror_does_not_serve_is_404_and_stays_here(
    hub: Hub, mirror: Mirror, client: aiohttp.ClientSession
) -> None:
    """Unknown URLs never become upstream requests."""
    for path in (
        "/",
        "/favicon.ico",
        "/api/nothing",
        "/api/models/org/m/nothing",
        "/org",
        "/org/m/settings",
        "/org/m/info/nothing",
        "/robots.txt",
    ):
        async with client.get(mirror.url + path) as response:
            assert response.status == 404, path
            assert response.headers["X-Error-Message"]
    assert hub.counters.requests() == 0


async def test_upstream_is_reached_through_the_outbound_proxy(hub: Hub, tmp_path: Path, client: aiohttp.ClientSession) -> None:
    """HTTP_PROXY names a host of the LAN, by a name that resolves to a private address: all goes through it, CDN too."""
    content = Content(3_000_000, 5)
    hub.repo("org/m").commit({"model.bin": LFS(content)})
    carried: list[str] = []

    async def forward(request: web.BaseRequest) -> web.StreamResponse:
        carried.append(request.raw_path)
        headers = {key: value for key, value in request.headers.items() if key in ("Range", "If-Range", "Accept-Encoding")}
        async with client.request(
            request.method, URL(request.raw_path, encoded=True), headers=headers, allow_redirects=False
        ) as answer:
            kept = {key: value for key, value in answer.headers.items() if key != "Content-Length"}
            return web.Response(status=answer.status, headers=kept, body=await answer.read())

    async with listening(forward, "127.0.0.1", 0, 1.0) as port:
        variables = environment(tmp_path / "cache", [hub.url], [hub.cdn_host])
        config = load(None, variables | {"HTTP_PROXY": f"http://localhost:{port}"}, {})
        async with (
            running(config) as mirror,
            client.get(f"{mirror.url}/org/m/resolve/main/model.bin") as response,
        ):
            assert response.status == 200 and await response.read() == content.bytes()
    assert any(url.startswith(hub.cdn_url) for url in carried)
    assert len(carried) == hub.counters.requests()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /-/healthz HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"GET /-/healthz\r\nHost: x\r\n\r\n", 400),
        (b"GET /-/healthz HTTP/1.1\r\nHost: bad host\r\n\r\nGET /-/healthz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"POST /org/m/git-upload-pack HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\nConnection: close\r\n\r\n", 405),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 204),
    ],
)
async def test_a_request_of_an_odd_shape(mirror: Mirror, request_: bytes, status: int) -> None:
    """One answer, and then the connection is closed (reliability C4): what follows on it is nobody's."""
    answer = await raw(mirror, request_)
    assert answer.split(b" ")[1] == str(status).encode() and answer.count(b"\nHTTP/1.") == 0
