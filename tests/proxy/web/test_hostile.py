"""Requests made to do harm, and what they must not get into: the log, headers, other clients' answers, the Hub.

Bytes go over real sockets, to a mirror as a user starts it where its log is read.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from nearhub.web import logs
from nearhub.web.app import listening
from tests.hub import LFS, Content, Hub, User
from tests.mirror import Mirror, MirrorProcess, environment

WEIGHTS = Content(100_000, 7)
CANARY = "hf_canaryCanaryCanary"
_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [a-z.]+ \S")


async def exchange(url: str, request: bytes) -> bytes:
    """Send bytes as they are, and nothing more; what comes back until the mirror closes."""
    where = URL(url)
    reader, writer = await asyncio.open_connection(where.host, where.port)
    writer.write(request)
    async with asyncio.timeout(10):
        said = await reader.read()
    writer.close()
    return said


def asked(path: str, *headers: str, method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: mirror", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


# — the log (C15, A7, A9) ——————————————————————————————————————————————————————————————————————————————

FORGED = "2026-01-01 00:00:00,000 INFO nearhub.access GET /forged 200"
LOGGED = [
    asked(f"/org/m/resolve/main/a%0A{FORGED.replace(' ', '%20')}"),
    asked("/org/m/resolve/main/%1b%5b31m%C2%9b31m%C2%85%E2%80%A8%E2%80%AEx"),
    asked("/org/m/resolve/%C2%85x/y"),
    asked("/org/none%C2%85/resolve/main/y"),
    asked("/x", "User-Agent: \x1b[31m", f"X-Request-Id: a\x1b[31m {FORGED}"),
    asked("/x", f"X-Amzn-Trace-Id: Root=1\t{FORGED}", "Referer: \x9b"),
    asked(f"http://user:{CANARY}@mirror/x"),
    asked(f"/x#{CANARY}"),
    asked(f"/api/models?token={CANARY}&limit=1"),
    asked(f"/org/m/resolve/main/x?token={CANARY}"),
    asked(f"{CANARY}"),
    asked(f"user:{CANARY}@mirror:443", method="CONNECT"),
    asked("/x", f"Authorization: Bearer {CANARY}\x00"),
    asked("/x", f"Authorization: Bearer {CANARY}", "Bad Header: x"),
    asked("/x", f"Authorization: Digest {CANARY}"),
    asked("/x\x1b[31m\xff", f"Cookie: {CANARY}"),
    asked("/x", f"Authorization: Bearer {CANARY}", "Content-Length: 1", "Content-Length: 2"),
    asked("/x", f"Authorization: Bearer {CANARY}", "Content-Length: 1", "Transfer-Encoding: chunked", method="POST"),
    f"GET /x\r\n {CANARY}\x1b\n\n".encode(),
    f"\x16\x03\x01{CANARY}\n{FORGED}\n\n".encode(),
]


async def test_nothing_that_is_sent_breaks_a_line_of_the_log_or_puts_a_secret_there(hub: Hub, tmp_path: Path) -> None:
    """Newlines and colours in paths, names and headers, in any encoding; tokens where none belongs; what is no HTTP at all."""
    hub.repo("org/m").commit({"a.txt": b"a", "\x9b31m\x85\u2028.txt": b"b"})
    with MirrorProcess(tmp_path / "cache", [hub.url], [hub.cdn_host]) as mirror:
        for request in LOGGED:
            said = await exchange(mirror.url, request)
            assert re.match(rb"HTTP/1\.[01] [24]\d\d ", said), (request, said)
        why = subprocess.run(  # noqa: ASYNC221
            [sys.executable, "-m", "nearhub", "why", "/org/m/resolve/main/%C2%9b31m%C2%85.txt"],
            env=os.environ | environment(tmp_path / "cache", [hub.url]),
            capture_output=True,
            check=True,
        )
        mirror.terminate()
        assert mirror.log is not None
        log = mirror.log.read_bytes().decode()
    assert all(line.isprintable() for line in why.stdout.decode().splitlines()) and b"31m" in why.stdout
    lines = log.split("\n")[:-1]
    assert len(lines) > len(LOGGED)
    assert [line for line in lines if not line.isprintable() or not _LINE.match(line)] == []
    assert [line for line in lines if line.startswith(FORGED[:23])] == []
    assert "canary" not in log and "Traceback" not in log
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()] == []


@given(st.text())
def test_a_record_of_the_log_is_one_line_whatever_is_in_it(text: str) -> None:
    shown = logs.escaped(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


# — what is no HTTP (C3) ———————————————————————————————————————————————————————————————————————————————

SMUGGLED = b"GET /-/healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
BROKEN = {
    "length and chunks": b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks, twice": b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
    "not quite chunks": b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 40\r\n\r\n",
    "a signed length": b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: +0\r\n\r\n",
    "a length in arabic digits": "POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: \u0660\r\n\r\n".encode(),
    "a chunk of negative size": b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
    "a folded header": b"GET /x HTTP/1.1\r\nHost: x\r\nA: b\r\n Content-Length: 5\r\n\r\n",
    "a blank before the colon": b"GET /x HTTP/1.1\r\nHost: x\r\nContent-Length : 40\r\n\r\n",
    "a lone CR": b"GET /x HTTP/1.1\r\nHost: x\rContent-Length: 40\r\n\r\n",
    "NUL in a header": b"GET /x HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n",
    "a header without a name": b"GET /x HTTP/1.1\r\nHost: x\r\n: x\r\n\r\n",
}


@pytest.mark.parametrize("name", BROKEN)
async def test_what_two_servers_could_read_in_two_ways_is_400_and_ends_the_connection(mirror: Mirror, name: str) -> None:
    """Request smuggling: what follows on the connection is never answered as a request of its own."""
    said = await exchange(mirror.url, BROKEN[name] + SMUGGLED)
    assert said.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 ", b"HTTP/1.1 405 ")), said
    assert b"ok\n" not in said


async def test_a_mirror_without_the_strict_parser_does_not_start(hub: Hub, tmp_path: Path) -> None:
    """aiohttp has another one, in Python, which takes more shapes than that."""
    mirror = MirrorProcess(tmp_path / "cache", [hub.url])
    os.environ["AIOHTTP_NO_EXTENSIONS"] = "1"
    try:
        with pytest.raises(RuntimeError, match="cannot start: aiohttp") as caught:
            mirror.start()
    finally:
        del os.environ["AIOHTTP_NO_EXTENSIONS"]
    assert "status 1" in str(caught.value)


# — what one client says is no other's answer (B18) ————————————————————————————————————————————————————————————

EVIL = {
    "Host": "evil.example",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Prefix": "/evil",
    "X-Forwarded-Port": "666",
    "X-Host": "evil.example",
    "Forwarded": "host=evil.example;proto=https",
    "X-Original-URL": "/evil",
    "X-Rewrite-URL": "/evil",
    "X-HTTP-Method-Override": "DELETE",
    "X-Method-Override": "POST",
    "Origin": "https://evil.example",
    "Range": "bytes=0-3",
    "Accept-Language": "evil",
    "X-Evil": "evil",
}
ANSWERS = [
    ("GET", "/api/models/org/m/tree/main?limit=1", b""),
    ("GET", "/api/models/org/m?blobs=true", b""),
    ("GET", "/api/models?limit=1", b""),
    ("GET", "/api/models/org/m/commits/main?limit=1", b""),
    ("GET", "/org/m/resolve/main/a.txt", b""),
    ("HEAD", "/org/m/resolve/main/a.txt", b""),
    ("GET", "/org/m/resolve/main/none.txt", b""),
    ("GET", "/org/m", b""),
    ("GET", "/org/m/resolve/main/model.bin", b""),
    ("POST", "/org/m.git/info/lfs/objects/batch", b"lfs"),
]


async def test_what_one_client_says_of_itself_is_in_no_other_clients_answer(hub: Hub, mirror: Mirror) -> None:
    """Cache poisoning: each question is put first with every header and query that could get into an answer, then plainly."""
    for number in range(3):
        hub.repo("org/m").commit({"a.txt": b"%d" % number, "model.bin": LFS(WEIGHTS), f"{number}.txt": b"x"})
    hub.repo("org/other").commit({"a.txt": b"x"})
    batch = {"operation": "download", "objects": [{"oid": WEIGHTS.sha256, "size": WEIGHTS.size}]}
    links = 0
    async with aiohttp.ClientSession() as session:

        async def ask(method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
            sent = json.dumps(batch).encode() if body else None
            media = {"Content-Type": "application/vnd.git-lfs+json"} if body else {}
            html = {"Accept": "text/html"} if path == "/org/m" else {}
            async with session.request(method, mirror.url + path, data=sent, headers=headers | media | html) as response:
                return response.status, f"{dict(response.headers)} {(await response.read())!r}"

        for method, path, body in ANSWERS:
            for extra in ("", "&evil=evil&download=true&cb=//evil.example" if "?" in path else "?evil=evil&callback=evil"):
                await ask(method, path + extra, body, EVIL)
            status, said = await ask(method, path, body, {})
            assert status == (404 if "none" in path else 200), said
            assert "evil" not in said and ":666" not in said, said
            links += mirror.url in said
    assert links >= 4, "Link, href and pages name the mirror as the plain client sees it"
    assert {one.method for one in hub.log} <= {"GET", "HEAD"}, "no method but the request's own"
    assert [one for one in hub.log if "evil" in json.dumps(one.to_json()) and "evil=" not in one.raw_path] == []


async def test_nothing_of_upstreams_headers_is_passed_on_that_is_not_listed(hub: Hub, mirror: Mirror) -> None:
    """A11, C5: cookies, hop-by-hop headers and whatever else an upstream thinks of."""
    hub.repo("org/m").commit({"a.txt": b"a", "model.bin": LFS(WEIGHTS)})
    hub.users[CANARY] = User("alice")
    more = {"Set-Cookie": "session=evil", "X-Evil": "evil", "Keep-Alive": "evil", "Refresh": "0; url=//evil", "Server": "evil"}
    more |= {"Content-Disposition": 'attachment; filename="evil"', "Content-Type": "text/evil", "Trailer": "X-Evil"}
    adorn = hub._adorn

    def adorned(origin: str, ask: object, reply: object) -> None:
        adorn(origin, ask, reply)
        reply.headers.update(more)  # type: ignore[attr-defined]

    hub._adorn = adorned
    heard = []
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {CANARY}"}) as session:
        for path in (
            "/org/m/resolve/main/a.txt",
            "/org/m/resolve/main/model.bin",
            "/api/models/org/m",
            "/api/models",
            "/api/models/org/m/refs",
            "/api/whoami-v2",
            "/org/m/resolve/main/none",
            "/org/none/resolve/main/a",
        ):
            async with session.get(mirror.url + path) as response:
                heard.append(f"{path} {dict(response.headers)}")
    assert [one for one in heard if "evil" in one.replace("text/evil", "")] == []


async def test_no_request_names_a_host_that_is_asked(hub: Hub, mirror: Mirror) -> None:
    """SSRF by parameter, path or header: what is asked upstream is made of a repo's name, a revision and a path."""
    asked_of_victim: list[str] = []

    async def victim(request: web.BaseRequest) -> web.Response:
        asked_of_victim.append(request.raw_path)
        return web.Response(text="INTERNAL-SECRET-PAGE")

    hub.repo("org/m").commit({"a.txt": b"a", "model.bin": LFS(WEIGHTS)})
    async with listening(victim, "127.0.0.1", 0, 1.0) as port, aiohttp.ClientSession() as session:
        there = f"http://127.0.0.1:{port}/"
        headers = {name: there for name in ("Referer", "X-Forwarded-Server", "X-Original-URL", "Destination", "Origin", "Link")}
        headers |= {"X-Forwarded-Host": f"127.0.0.1:{port}", "Authorization": f"Bearer {CANARY}"}
        for path in (
            f"/repos/a/b/c/redir?oriloc={there}",
            f"/repos/aa/bb/{'c' * 64}/{WEIGHTS.sha256}?oriloc={there}",
            f"/org/m/resolve/main/a.txt?url={there}&redirect={there}&oriloc={there}",
            f"/org/m/resolve/main/{there}",
            f"/org/m/resolve/main/model.bin?response-content-disposition={there}",
            f"/api/models?url={there}&cursor={there}",
            f"/api/models/org/m/tree/main?cursor={there}",
            f"/api/models/org/m/{there}",
            f"/-/lfs/models/org/m/{WEIGHTS.sha256}?href={there}",
            f"/{there}",
            f"/127.0.0.1:{port}/x/resolve/main/a",
            f"/@127.0.0.1:{port}/x",
        ):
            async with session.get(URL(mirror.url + path, encoded=True), headers=headers, allow_redirects=False) as response:
                body = await response.read()
            assert b"INTERNAL" not in body and response.status < 500, path
            assert str(port) not in response.headers.get("Location", ""), path
    assert asked_of_victim == []
    assert not any(
        CANARY in (one.header("Authorization") or "")
        for one in hub.log
        if "whoami" not in one.raw_path and "auth-check" not in one.raw_path
    )
