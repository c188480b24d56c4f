"""An upstream that lies, on real sockets: what it sends is written byte by byte, and counted where it must not lead.

Each test asks one Upstream as the mirror makes it, with the mirror's own session and list of hosts.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import ResolveResult
from yarl import URL

from nearhub.errors import NearhubError, RefusedByHub, UpstreamError, UpstreamFailed, UpstreamUnreachable
from nearhub.upstream import client, hosts
from nearhub.upstream.client import MAX_REDIRECTS, Location, Upstream, new_session
from nearhub.upstream.hosts import HostPolicy, HostRule
from nearhub.upstream.keys import Keyring
from nearhub.wire.headers import Algo, BlobId, FileMetadata, ObjectMetadata
from nearhub.wire.spans import Span
from nearhub.wire.target import FileTarget, LfsTarget, Repo, RepoKind, Scope

REPO = Repo(RepoKind.MODELS, "org/m")
COMMIT, OID = "a" * 40, "b" * 64
FILE, META = FileTarget(REPO, COMMIT, "model.bin"), FileMetadata(COMMIT, BlobId(Algo.SHA256, OID), 10)
PATH = "/api/models/org/m"
TOKEN = "Bearer hf_canary"


@dataclass
class Server:
    """Answers each request (its head, as text) with the bytes that `answer` makes of it, and closes."""

    answer: Callable[[str], bytes] = lambda _: b""
    heads: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            writer.write(self.answer(head))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def listening(server: Server, context: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    loop = asyncio.get_running_loop()
    made = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context)
    loop.set_exception_handler(lambda *_: None)  # what clients refuse in a TLS handshake is no news
    try:
        server.port = made.sockets[0].getsockname()[1]
        yield server
    finally:
        made.close()
        await made.wait_closed()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """The Hub."""
    async with listening(Server()) as one:
        yield one


@pytest.fixture
async def victim() -> AsyncIterator[Server]:
    """A service of the LAN that no upstream may send the mirror to."""
    async with listening(Server(lambda _: answer(200, b'"a secret of the LAN"'))) as one:
        yield one


def answer(status: int, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def onward(to: str, status: int = 302) -> bytes:
    return answer(status, b"", f"Location: {to}")


@asynccontextmanager
async def asking(url: str, *rules: HostRule, keys: Keyring | None = None) -> AsyncIterator[Upstream]:
    policy = HostPolicy([url], rules)
    session = new_session(policy, user_agent="nearhub/test")
    try:
        yield Upstream(url, session, policy, trusted=True, keys=keys)
    finally:
        await session.close()


async def fetched(upstream: Upstream, location: Location | None = None) -> bytes:
    async with upstream.fetch(FILE, META, Span(0, 10), location) as body:
        return b"".join([chunk async for chunk in body.chunks()])


async def lfs_fetched(upstream: Upstream) -> bytes:
    async with upstream.fetch(LfsTarget(REPO, OID), ObjectMetadata(META.blob, 10), Span(0, 10), None) as body:
        return b"".join([chunk async for chunk in body.chunks()])


ASKS: dict[str, Callable[[Upstream], Any]] = {
    "metadata": lambda upstream: upstream.metadata(FILE),
    "document": lambda upstream: upstream.document(PATH),
    "permits": lambda upstream: upstream.permits(REPO, TOKEN),
    "personal": lambda upstream: upstream.personal("/api/whoami-v2", TOKEN),
    "content": fetched,
}


# — where it may lead (B15, B16) ———————————————————————————————————————————————————————————————————————


def spellings(port: int) -> list[str]:
    """Ways to write this machine, and others that are nobody's business."""
    addresses = ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "localhost", "LOCALHOST."]
    addresses += ["[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[::]", "127.0.0.1.nip.io"]
    urls = [f"http://{address}:{port}/x" for address in addresses]
    return [*urls, f"//127.0.0.1:{port}/x", f"http://hub@127.0.0.1:{port}/x", "http://169.254.169.254/latest/meta-data"]


async def test_a_redirect_leads_to_no_host_that_nobody_named(server: Server, victim: Server) -> None:
    """However it is spelled, and whatever was asked; nothing is even connected to."""
    async with asking(server.url) as upstream:
        for url in [
            *spellings(victim.port),
            "file:///etc/passwd",
            "gopher://127.0.0.1/",
            "http://",
            "\\\\host\\x",
            "http://[::1",
        ]:
            server.answer = lambda _, url=url: onward(url)  # type: ignore[misc]
            for name, ask in ASKS.items():
                if name == "personal":  # follows nothing: the redirect is the answer, and Location is not passed on
                    assert "Location" not in (await ask(upstream)).headers
                    continue
                with pytest.raises(UpstreamError):
                    await ask(upstream)
    assert victim.heads == []


async def test_an_lfs_link_leads_to_no_host_that_nobody_named(server: Server, victim: Server) -> None:
    async with asking(server.url) as upstream:
        for url in [*spellings(victim.port), "file:///etc/passwd", "http://[::1", "\x00", ""]:
            offer = {"oid": OID, "size": 10, "actions": {"download": {"href": url, "header": {"Authorization": TOKEN}}}}
            server.answer = lambda _, offer=offer: answer(200, json.dumps({"objects": [offer]}).encode())  # type: ignore[misc]
            with pytest.raises(UpstreamError):
                await lfs_fetched(upstream)
    assert victim.heads == []


async def test_a_next_page_is_one_of_the_same_question(server: Server, victim: Server) -> None:
    """Of Link only the query is taken: a page is asked for where the first was."""
    link = f'Link: <http://127.0.0.1:{victim.port}/evil?cursor=x>; rel="next"'
    server.answer = lambda _: answer(200, b"[]", link)
    async with asking(server.url) as upstream:
        assert (await upstream.document(PATH)).next_query == "cursor=x"
    assert victim.heads == []


async def test_a_name_that_changes_its_address_is_connected_to_at_the_one_that_was_checked(
    server: Server, victim: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the name is public when it is looked at, and this machine when it is looked at again."""
    answers = [["203.0.113.7", "127.0.0.1"], ["127.0.0.1"], ["::ffff:127.0.0.1", "fd00::1", "169.254.169.254"]]

    class Rebinding(hosts.ThreadedResolver):
        async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
            assert host == "cdn.example"
            found = answers.pop(0)
            return [ResolveResult(hostname=host, host=one, port=port, family=family, proto=0, flags=0) for one in found]

    monkeypatch.setattr(hosts, "ThreadedResolver", Rebinding)
    server.answer = lambda _: onward(f"http://cdn.example:{victim.port}/x")
    async with asking(server.url, HostRule("cdn.example", victim.port, plain_http=True, is_named=False)) as upstream:
        while answers:
            with pytest.raises(UpstreamUnreachable):
                await fetched(upstream)
    assert victim.heads == []


@pytest.mark.parametrize("name", ["metadata", "document", "permits", "content"])
async def test_a_chain_of_redirects_ends(server: Server, name: str) -> None:
    server.answer = lambda _: onward(f"{server.url}/{len(server.heads)}")
    async with asking(server.url) as upstream:
        with pytest.raises(UpstreamFailed, match="redirects") as caught:
            await ASKS[name](upstream)
    assert caught.value.http_status == 502 and len(server.heads) <= MAX_REDIRECTS + 1 <= 10


async def test_https_never_becomes_http() -> None:
    policy = HostPolicy(["https://hub.example"], [HostRule("cdn.example"), HostRule("plain.example", plain_http=True)])
    for url in ("http://hub.example/x", "http://cdn.example/x", "http://cdn.example:443/x"):
        with pytest.raises(UpstreamFailed):
            policy.check(URL(url))
    policy.check(URL("http://plain.example/x"))


# — what is sent with a question (A6, A8) ————————————————————————————————————————————————————————————————


async def test_a_token_goes_to_its_own_origin_and_about_its_own_repo_only(server: Server, victim: Server) -> None:
    """Another port is another origin; another repo is nobody's business."""
    keys = Keyring()
    restricted = Repo(REPO.kind, REPO.name, Scope.RESTRICTED)
    keys.put(restricted, TOKEN)
    victim.answer = lambda _: answer(200, b"0123456789")
    async with asking(server.url, HostRule("127.0.0.1", victim.port, plain_http=True), keys=keys) as upstream:
        server.answer = lambda _: onward(f"{victim.url}/x")
        async with upstream.fetch(FileTarget(restricted, COMMIT, "x"), META, Span(0, 10), None) as body:
            assert b"".join([chunk async for chunk in body.chunks()]) == b"0123456789"
        server.answer = lambda _: answer(200, b"{}")
        await upstream.document("/api/models/org/other", about=Repo(REPO.kind, "org/other", Scope.RESTRICTED))
        await upstream.document(PATH, about=REPO)
    assert "hf_canary" in server.heads[0] and "hf_canary" not in "".join(server.heads[1:] + victim.heads)


# — what it may be (B8, B12, B13, B14, B17) ——————————————————————————————————————————————————————————————


async def test_bombs_and_floods_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is unpacked: identity was asked for. What has no end is given up after so many bytes, or lines."""
    monkeypatch.setattr(client, "MAX_DOCUMENT", 100_000)
    bomb = gzip.compress(b" " * 50_000_000)
    floods = {
        "packed": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b"{}"),
        "a bomb": answer(200, bomb, "Content-Encoding: gzip"),
        "packed without a word": answer(200, bomb),
        "long": answer(200, b"[" + b"1," * 60_000 + b"1]"),
        "deep": answer(200, b"[" * 90_000),
        "without end": b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 200_000,
        "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;" + b"x" * 5_000_000,
        "trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 1_000_000,
        "headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1_000_000,
        "one header": b"HTTP/1.1 200 OK\r\nA: " + b"b" * 5_000_000,
        "status line": b"HTTP/1.1 200 " + b"b" * 5_000_000,
        "early responses": b"HTTP/1.1 103 Early\r\nLink: <x>\r\n\r\n" * 1000,
        "nothing": b"",
        "nonsense": b"\x00\x01\x02\r\n\r\n",
        "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        "length and chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        "short": b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{}",
        "a captcha": answer(200, b"<html>Are you human?</html>", "Content-Type: text/html"),
    }
    async with asking(server.url) as upstream:
        for name, flood in floods.items():
            server.answer = lambda _, flood=flood: flood  # type: ignore[misc]
            with pytest.raises(UpstreamError):
                print(name, await upstream.document(PATH))
            with pytest.raises(UpstreamError):
                print(name, await fetched(upstream))


@pytest.mark.parametrize("status", [100, 204, 205, 304, 400, 405, 418, 500, 501])
async def test_a_status_that_brings_nothing_is_no_content(server: Server, status: int) -> None:
    """Of all these, 304 above all: the mirror asks without a validator, so nothing can be unchanged (B14)."""
    server.answer = lambda _: answer(status)
    async with asking(server.url) as upstream:
        for ask in (upstream.document(PATH), upstream.metadata(FILE), fetched(upstream)):
            with pytest.raises((UpstreamError, RefusedByHub)):
                await ask


HOSTILE_VALUES = ["a\tb", "a\x01b", "a\x7fb", "a\x9b31mb", "a\rb: c", "a\r\n X-Folded: yes", "é", "x" * 5000]


@pytest.mark.parametrize("value", HOSTILE_VALUES)
async def test_what_its_refusals_say_is_words_that_a_header_holds(server: Server, value: str) -> None:
    """C5: code, message and commit go on to clients: in one line, printable, of sane length, or not at all."""
    said = [f"X-Error-Code: {value}", f"X-Error-Message: {value}"]
    async with asking(server.url) as upstream:
        for status, headers in (
            (403, said),
            (404, said),
            (404, ["X-Error-Code: EntryNotFound", f"X-Repo-Commit: {value}", said[1]]),
        ):
            server.answer = lambda _, status=status, headers=headers: answer(status, b"", *headers)  # type: ignore[misc]
            with pytest.raises(NearhubError) as caught:
                await upstream.document(PATH)
            for told in (caught.value.message, caught.value.error_code, *caught.value.headers().values()):
                assert told.isascii() and told.isprintable() and len(told) <= 300
        server.answer = lambda _: answer(401, b"{}", *said, "Set-Cookie: session=1", f"Content-Type: {value}")
        try:
            told_headers = (await upstream.personal("/api/whoami-v2", TOKEN)).headers
        except UpstreamFailed:
            return  # aiohttp refuses the answer as a whole
        assert "Set-Cookie" not in told_headers
        assert all(told.isascii() and told.isprintable() for told in told_headers.values())


@pytest.fixture
def context(tmp_path: Path) -> ssl.SSLContext:
    """Of a server that vouches for itself."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    made += ["-subj", "/CN=hub", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


async def test_a_certificate_that_nobody_vouches_for_is_no_answer(context: ssl.SSLContext) -> None:
    """B17: neither with TLS regardless, nor without it."""
    async with listening(Server(lambda _: answer(200, b"{}")), context) as secure:
        async with asking(f"https://127.0.0.1:{secure.port}") as upstream:
            with pytest.raises(UpstreamUnreachable):
                await upstream.document(PATH)
        assert secure.heads == []
