"""Sites besides the Hub, over real sockets: what is kept and for whom, what leaves, and what a broken site cannot do."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from nearhub.config import Config, load
from nearhub.store.tokens import TokenFile
from nearhub.web.app import listening
from tests.hub import Content
from tests.mirror import Mirror, environment, running

Headers = dict[str, str]


@dataclass(slots=True)
class Site:
    """A server of files that says what it is told to, and remembers what it was asked. `answer` may be changed."""

    url: str = ""
    status: int = 200
    headers: Headers = field(default_factory=dict)
    body: bytes = b""
    asked: list[tuple[str, str, Headers]] = field(default_factory=list)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append((request.method, request.raw_path, {name.lower(): value for name, value in request.headers.items()}))
        etag = self.headers.get("ETag")
        if etag is not None and request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers=self.headers)
        return web.Response(status=self.status, headers=self.headers, body=self.body)

    @property
    def last(self) -> Headers:
        return self.asked[-1][2]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site(headers={"Cache-Control": "max-age=600", "Content-Type": "application/zip"}, body=b"0123456789")
    async with listening(site.handle, "127.0.0.1", 0, 1.0) as port:
        site.url = f"http://127.0.0.1:{port}"
        yield site


def configured(folder: Path, url: str, more: str = "", **extra: str) -> Config:
    """A mirror of that site, which is called s; its Hub is not there."""
    file = folder / "nearhub.toml"
    file.write_text(f'[[sites]]\nname = "s"\nurl = "{url}"\n{more}')
    return load(file, environment(folder / "cache", ["http://127.0.0.1:1"], **extra), {})


@pytest.fixture
async def mirror(site: Site, tmp_path: Path) -> AsyncIterator[Mirror]:
    async with running(configured(tmp_path, f"{site.url}/pub")) as mirror:
        yield mirror


@dataclass(frozen=True, slots=True)
class Got:
    """An answer, read to its end."""

    status: int
    headers: Headers
    body: bytes

    @property
    def cache(self) -> str:
        return self.headers["Cache-Status"].removeprefix("nearhub; ")


async def get(mirror: Mirror, path: str = "/a", method: str = "GET", **headers: str) -> Got:
    """`path` behind /-/sites/s; names of headers with _ for -."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        url = f"{mirror.url}/-/sites/s{path}"
        async with session.request(method, url, headers=sent, allow_redirects=False) as response:
            return Got(response.status, dict(response.headers), await response.read())


async def test_it_is_asked_once(site: Site, mirror: Mirror) -> None:
    """Then it is answered from here, HEAD and ranges and conditions too, with its own headers and its age."""
    site.headers |= {"ETag": '"x"', "A": "1"}
    first = await get(mirror, "/a?b=c")
    assert (first.status, first.body, first.cache) == (200, b"0123456789", "fwd=uri-miss; stored")
    second = await get(mirror, "/a?b=c")
    assert (second.status, second.body, second.cache) == (200, b"0123456789", "hit")
    assert second.headers["A"] == "1" and int(second.headers["Age"]) < 60 and second.headers["Date"] == first.headers["Date"]
    head = await get(mirror, "/a?b=c", "HEAD")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", "10")
    part = await get(mirror, "/a?b=c", Range="bytes=-3")
    assert (part.status, part.body, part.headers["Content-Range"]) == (206, b"789", "bytes 7-9/10")
    assert (await get(mirror, "/a?b=c", Range="bytes=10-")).status == 416
    assert (await get(mirror, "/a?b=c", If_None_Match='"x"')).status == 304
    assert [asked[:2] for asked in site.asked] == [("GET", "/pub/a?b=c")]
    assert (await get(mirror, "/a?b=d")).cache == "fwd=uri-miss; stored"


async def test_what_is_stale_is_asked_about_and_not_fetched(site: Site, mirror: Mirror) -> None:
    """A 304 makes it fresh again; another body takes its place, and its file."""
    site.headers = {"ETag": '"1"', "Cache-Control": "max-age=0"}
    await get(mirror)
    again = await get(mirror)
    assert (again.body, again.cache, site.last["if-none-match"]) == (b"0123456789", "fwd=stale", '"1"')
    site.headers, site.body = {"ETag": '"2"', "Cache-Control": "max-age=600"}, b"new"
    assert ((await get(mirror)).body, (await get(mirror)).cache) == (b"new", "hit")
    assert len(site.asked) == 3
    assert [size for _, size, _ in mirror.front.sites.cache._bodies.scan()] == [4096]


async def test_it_survives_a_restart(site: Site, tmp_path: Path) -> None:
    """And what a crash left half-written does not."""
    config = configured(tmp_path, site.url)
    async with running(config) as mirror:
        await get(mirror)
    half = tmp_path / "cache" / "sites" / "new-0123"
    half.write_bytes(b"half")
    async with running(config) as mirror:
        assert ((await get(mirror)).cache, half.exists()) == ("hit", False)
    assert len(site.asked) == 1


async def test_a_body_that_was_evicted_is_fetched_again(site: Site, mirror: Mirror) -> None:
    """It counts against the cache's size, and may leave; its row then tells nobody anything."""
    await get(mirror)
    bodies = [body for body, _, _ in mirror.front.sites.cache._bodies.scan()]
    space = mirror.front.sites.cache._space
    assert space.on_disk == 4096 and await space.remove(bodies[0]) and space.on_disk == 0
    assert (await get(mirror)).cache == "fwd=uri-miss; stored"


async def test_when_it_is_down_what_is_here_is_served_stale(site: Site, tmp_path: Path) -> None:
    """Unless its answer forbids that; and what is not here is its fault."""
    async with running(configured(tmp_path, site.url)) as mirror:
        site.headers = {"ETag": '"1"', "Cache-Control": "max-age=0"}
        await get(mirror, "/kept")
        site.headers = {"ETag": '"1"', "Cache-Control": "max-age=0, must-revalidate"}
        await get(mirror, "/strict")
        site.headers, site.status = {}, 503
        assert ((await get(mirror, "/kept")).body, (await get(mirror, "/kept")).cache) == (b"0123456789", "hit; detail=stale")
        assert (await get(mirror, "/strict")).status == 503
    async with running(configured(tmp_path, "http://127.0.0.1:1")) as mirror:
        assert (await get(mirror, "/other")).headers["X-Error-Code"] == "UpstreamUnreachable"
        assert (await get(mirror, "/other", Cache_Control="only-if-cached")).headers["X-Error-Code"] == "NotStored"


async def test_stale_while_revalidate(site: Site, mirror: Mirror) -> None:
    """The answer does not wait for the site; the next one has its news."""
    site.headers = {"ETag": '"1"', "Cache-Control": "max-age=0, stale-while-revalidate=60"}
    await get(mirror)
    site.headers, site.body = {"ETag": '"2"', "Cache-Control": "max-age=600"}, b"new"
    assert ((await get(mirror)).body) == b"0123456789"
    await asyncio.wait(mirror.front.sites.cache._refreshing._tasks.values())
    assert ((await get(mirror)).body, len(site.asked)) == (b"new", 2)


@pytest.mark.parametrize(
    ("token", "arrives"),
    [
        ("Bearer theirs", "Bearer theirs"),
        ("Digest x", "Digest x"),
        ("Bearer hf_canary", None),
        (f"Basic {base64.b64encode(b'user:hf_canary').decode()}", None),
        ("token hf_canary", None),
        ("LOCAL", None),
    ],
)
async def test_a_token_goes_where_it_is_for(site: Site, tmp_path: Path, token: str, arrives: str | None) -> None:
    """The Hub's and the mirror's own never reach a site; what one got with a token of its own, another does not get."""
    tokens = TokenFile(tmp_path / "tokens")
    local = f"Bearer {tokens.add('alice', frozenset({'lab'}))}"
    async with running(configured(tmp_path, site.url, ACCESS_TOKENS=str(tmp_path / "tokens"))) as mirror:
        await get(mirror, Authorization=local if token == "LOCAL" else token, Cookie="a=b")
        assert (site.last.get("authorization"), site.last.get("cookie")) == (arrives, None)
        assert (await get(mirror)).cache == ("fwd=uri-miss; stored" if arrives else "hit")


async def test_a_site_for_some(site: Site, tmp_path: Path) -> None:
    """Who is not named hears nothing of it, whatever is stored."""
    tokens = TokenFile(tmp_path / "tokens")
    alice, bob = (f"Bearer {tokens.add(name, frozenset({group}))}" for name, group in (("alice", "lab"), ("bob", "other")))
    config = configured(tmp_path, site.url, 'who = ["lab"]\n', ACCESS_TOKENS=str(tmp_path / "tokens"))
    async with running(config) as mirror:
        assert (await get(mirror, Authorization=alice)).status == 200
        assert (await get(mirror, Authorization=bob)).status == 403
        assert (await get(mirror)).status == (await get(mirror, Authorization="Bearer nonsense")).status == 401
    assert len(site.asked) == 1


async def test_cookies_and_what_is_for_an_origin_stay_there(site: Site, mirror: Mirror) -> None:
    """Also a page, which may not run; there is no CORS of ours on it."""
    site.headers |= {"Set-Cookie": "a=b", "Clear-Site-Data": "*", "Content-Type": "text/html"}
    for _ in range(2):
        got = await get(mirror)
        assert not {"Set-Cookie", "Clear-Site-Data", "Access-Control-Allow-Origin"} & got.headers.keys()
        assert got.headers["Content-Security-Policy"] == "sandbox"


async def test_a_redirect_is_the_clients_to_follow(site: Site, tmp_path: Path) -> None:
    """Below the site it stays on the mirror, under its prefix; a foreign one is told, and never asked."""
    async with running(configured(tmp_path, f"{site.url}/pub", SERVER_PREFIX="/hub")) as mirror:
        site.status, site.headers = 301, {"Location": f"{site.url}/pub/dir/", "Cache-Control": "max-age=600"}
        for _ in range(2):
            got = await get(mirror, "/dir")
            assert (got.status, got.headers["Location"]) == (301, f"{mirror.url}/-/sites/s/dir/")
        site.headers = {"Location": "http://169.254.169.254/latest"}
        assert (await get(mirror, "/evil")).headers["Location"] == "http://169.254.169.254/latest"
    assert len(site.asked) == 2


async def test_a_range_of_what_is_not_here_is_passed_through(site: Site, mirror: Mirror) -> None:
    """And not kept: only whole answers are."""
    site.status, site.headers = 206, {"Content-Range": "bytes 0-9/100", "Cache-Control": "max-age=600"}
    got = await get(mirror, Range="bytes=0-9")
    assert (got.status, got.headers["Content-Range"], site.last["range"]) == (206, "bytes 0-9/100", "bytes=0-9")
    await get(mirror, Range="bytes=0-9")
    assert len(site.asked) == 2


async def test_what_is_too_large_streams_through(site: Site, tmp_path: Path) -> None:
    """By its announced length, or as soon as it shows."""
    async with running(configured(tmp_path, site.url, 'max_file_size = "9B"\n')) as mirror:
        assert ((await get(mirror)).body, (await get(mirror)).cache) == (b"0123456789", "fwd=uri-miss")
        assert mirror.front.sites.cache._space.spoken_for == 0


@pytest.mark.parametrize("path", ["/../secret", "/%2e%2e/secret", "/a/..%2f..%2fsecret", "/a%5c..%5csecret", "/%00"])
async def test_nothing_but_the_site_is_reached(site: Site, mirror: Mirror, path: str) -> None:
    """400, and nobody is asked. Raw bytes, since clients would tidy the path up."""
    host, port = mirror.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /-/sites/s{path} HTTP/1.1\r\nHost: mirror\r\nConnection: close\r\n\r\n".encode())
    assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
    writer.close()
    assert site.asked == []


async def test_it_is_read_only_and_has_a_name(site: Site, mirror: Mirror) -> None:
    """405 for writes, 404 for names that the operator did not give."""
    assert (await get(mirror, method="POST")).status == (await get(mirror, method="PUT")).status == 405
    async with aiohttp.ClientSession() as session:
        for path in ("/-/sites/t/a", "/-/sites/s", "/-/sites/"):
            async with session.get(mirror.url + path) as response:
                assert response.status == 404
    assert site.asked == []


@asynccontextmanager
async def saying(answer: bytes) -> AsyncIterator[str]:
    """A site that answers every request with these bytes and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


FRESH = b"HTTP/1.1 200 OK\r\nCache-Control: max-age=600\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        FRESH + b"Content-Length: 10\r\n\r\n01234",
        FRESH + b"Content-Length: 10\r\n\r\n",
        FRESH + b"Transfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n",
        FRESH + b"Transfer-Encoding: chunked\r\n\r\n5\r\n012",
        FRESH + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n01234\r\n0\r\n\r\n",
        FRESH + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n01234",
    ],
)
async def test_a_cut_answer_is_never_whole(tmp_path: Path, answer: bytes) -> None:
    """502 while nothing has left, a cut connection after that; and it is not stored."""
    async with saying(answer) as url, running(configured(tmp_path, url)) as mirror:
        for _ in range(2):
            try:
                assert (await get(mirror)).status == 502
            except aiohttp.ClientError:
                continue
        assert list(mirror.front.sites.cache._bodies.scan()) == []
        assert mirror.front.sites.cache._space.spoken_for == 0


async def test_a_large_body_streams_and_is_kept(site: Site, mirror: Mirror) -> None:
    """More than one piece, the last of which waits for the disk."""
    site.body = Content(3_000_001, 7).bytes()
    for cache in ("fwd=uri-miss; stored", "hit"):
        got = await get(mirror)
        assert (got.body == site.body, got.cache) == (True, cache)
    assert (await get(mirror, Range="bytes=1000000-2999999")).body == site.body[1_000_000:3_000_000]


@pytest.mark.parametrize("framing", [b"Content-Length: 3000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n2dc6c0\r\n"])
async def test_a_large_body_that_is_cut_is_cut_here_too(tmp_path: Path, framing: bytes) -> None:
    """Its headers have left: the connection breaks, and nothing is kept."""
    async with saying(FRESH + framing + bytes(2_000_000)) as url, running(configured(tmp_path, url)) as mirror:
        with pytest.raises(aiohttp.ClientError):
            await get(mirror)
        assert list(mirror.front.sites.cache._bodies.scan()) == []
        assert mirror.front.sites.cache._space.spoken_for == 0


async def test_what_turns_out_too_large_streams_through(tmp_path: Path) -> None:
    """A body that did not say how long it is: all of it is sent, nothing is kept, and the room that it had is free again."""
    answer = FRESH + b"Transfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n"
    async with saying(answer) as url, running(configured(tmp_path, url, 'max_file_size = "9B"\n')) as mirror:
        assert (await get(mirror)).body == b"0123456789"
        assert list(mirror.front.sites.cache._bodies.scan()) == []
        assert mirror.front.sites.cache._space.spoken_for == 0
    async with saying(answer) as url, running(configured(tmp_path, url, 'max_file_size = "10B"\n')) as mirror:
        assert [(await get(mirror)).cache for _ in range(2)] == ["fwd=uri-miss; stored", "hit"]


async def test_an_end_that_cannot_be_told_from_a_cut_is_not_kept(tmp_path: Path) -> None:
    """A body that ends with its connection is passed on; who knows whether it was all."""
    async with saying(FRESH + b"\r\n01234") as url, running(configured(tmp_path, url)) as mirror:
        assert [(await get(mirror)).cache for _ in range(2)] == ["fwd=uri-miss"] * 2


async def test_a_304_that_nobody_asked_for(tmp_path: Path) -> None:
    """Is none of the client's business (reliability B14)."""
    async with saying(b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\n\r\n') as url, running(configured(tmp_path, url)) as mirror:
        assert (await get(mirror)).status == 502
        assert (await get(mirror, If_None_Match='"x"')).status == 304


async def test_the_settings(tmp_path: Path) -> None:
    """What is wrong with a table is told with its line."""
    from nearhub.config import ConfigError, rendered

    config = configured(tmp_path, "https://files.example.org/pub", 'who = ["lab"]\nmax_file_size = "5GB"\n')
    again = tmp_path / "again.toml"
    again.write_text(rendered(config))
    assert load(again, {"HOME": "/"}, {}).sites == config.sites
    with pytest.raises(ConfigError) as told:
        configured(tmp_path, "file:///etc", 'wo = 1\n[[sites]]\nname = "a/b"\nurl = "https://x"\n[[sites]]\n')
    problems = "\n".join(told.value.problems)
    for words in (":3: sites[0].url: 'file:///etc' is not an absolute URL", ":4: sites[0].wo: unknown key; did you mean who?"):
        assert words in problems
    assert "sites[1].name: 'a/b' cannot be a name" in problems and "sites[2]: has no url" in problems


async def test_offline_it_is_not_asked(site: Site, mirror: Mirror) -> None:
    """What is here is served, however old; the rest is a 404 that says so."""
    site.headers = {"ETag": '"1"', "Cache-Control": "max-age=0"}
    await get(mirror, "/kept")
    await mirror.front.operations.offline("on")
    site.asked.clear()
    assert (await get(mirror, "/kept")).body == b"0123456789"
    for part in ({}, {"Range": "bytes=0-1"}):
        never = await get(mirror, "/never", **part)
        assert (never.status, never.headers["X-Error-Code"]) == (404, "UnknownOffline")
    assert site.asked == []
