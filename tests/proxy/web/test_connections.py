"""Limits on connections and on what clients may take in time, with real sockets; and the decision by itself."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.web.connections import Admission, Limits, decide, fitted
from tests.hub import LFS, Content, Hub
from tests.mirror import Mirror, configure, running

METRICS = b"GET /-/metrics HTTP/1.1\r\nHost: m\r\n\r\n"
HEALTH = b"GET /-/healthz HTTP/1.1\r\nHost: m\r\n\r\n"
FILE = b"GET /org/m/resolve/main/model.bin HTTP/1.1\r\nHost: m\r\n\r\n"


@dataclass
class Wire:
    """A connection of a client that speaks HTTP by hand."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        self.writer.write(request)
        return await self.answer()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(first.split()[1]), headers, await self.reader.readexactly(int(headers.get("content-length", 0)))

    async def closed(self) -> bool:
        """Wait until the other side has ended it; whether nothing more had come."""
        try:
            return await self.reader.read() == b""
        except ConnectionResetError:
            return True


class Client:
    """Opens connections, and closes them in the end."""

    def __init__(self, mirror: Mirror) -> None:
        self.port = int(mirror.url.rpartition(":")[2])
        self._open: list[Wire] = []

    async def connect(self, address: str = "127.0.0.1") -> Wire:
        """`address`: where it comes from; all of 127.0.0.0/8 is this machine."""
        wire = Wire(*await asyncio.open_connection("127.0.0.1", self.port, local_addr=(address, 0), limit=1 << 16))
        return self.adopt(wire)

    def adopt(self, wire: Wire) -> Wire:
        """Close it with the others."""
        self._open.append(wire)
        return wire

    async def close(self) -> None:
        while self._open:
            wire = self._open.pop()
            wire.writer.close()
            with contextlib.suppress(OSError):
                await wire.writer.wait_closed()


@contextlib.asynccontextmanager
async def clients_of(hub: Hub, tmp_path: Path, **settings: str) -> AsyncIterator[tuple[Client, Mirror]]:
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], **settings)) as mirror:
        client = Client(mirror)
        try:
            yield client, mirror
        finally:
            await client.close()


def refused(mirror: Mirror, why: str) -> float:
    return mirror.metrics.connections_refused.labels(why)._value.get()


async def test_an_idle_connection_gives_way_and_is_the_longest_idle_one(hub: Hub, tmp_path: Path) -> None:
    async with clients_of(hub, tmp_path, SERVER_MAX_CONNECTIONS="3") as (client, mirror):
        wires = [await client.connect() for _ in range(3)]
        for wire in (wires[1], wires[0], wires[2]):
            assert (await wire.ask(HEALTH))[0] == 200
        late = await client.connect()
        assert (await late.ask(HEALTH))[0] == 200
        assert await wires[1].closed()
        for wire in (wires[0], wires[2]):
            assert (await wire.ask(HEALTH))[0] == 200
        assert refused(mirror, "total") == 0


async def test_one_whose_answer_has_not_left_is_not_idle(hub: Hub, tmp_path: Path) -> None:
    """Its client takes little at a time: closing it would free nothing, and it would be counted no more."""
    deep = "/".join(["x" * 200] * 15)
    hub.repo("org/m").commit({f"{number:03d}/{deep}": b"" for number in range(990)})
    async with clients_of(hub, tmp_path, SERVER_MAX_CONNECTIONS="1") as (client, mirror):
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.setblocking(False)
        await asyncio.get_running_loop().sock_connect(small, ("127.0.0.1", client.port))
        slow = client.adopt(Wire(*await asyncio.open_connection(sock=small, limit=4096)))
        slow.writer.write(b"GET /api/models/org/m/revision/main?blobs=true HTTP/1.1\r\nHost: m\r\n\r\n")
        head = await slow.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert (await (await client.connect()).ask(FILE))[0] == 503
        assert refused(mirror, "total") == 1
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        assert len(await slow.reader.readexactly(length)) == length > 2_900_000


async def test_a_client_s_only_idle_connection_may_give_way_to_its_next(hub: Hub, tmp_path: Path) -> None:
    async with clients_of(hub, tmp_path, SERVER_MAX_CONNECTIONS="1") as (client, mirror):
        for _ in range(3):
            wire = await client.connect()
            assert (await wire.ask(HEALTH))[0] == 200
        await client.close()
        await only_one_left(await client.connect())
        assert refused(mirror, "total") + refused(mirror, "client") == 0


async def test_one_connection_too_many_hears_503_in_words_and_health_is_told_all_the_same(hub: Hub, tmp_path: Path) -> None:
    """Connections on which nothing has been asked yet are not idle: their requests may be on the way."""
    async with clients_of(hub, tmp_path, SERVER_MAX_CONNECTIONS="2") as (client, mirror):
        held = [await client.connect() for _ in range(2)]
        status, headers, body = await (await client.connect()).ask(FILE)
        assert (status, headers["x-error-code"], headers["retry-after"]) == (503, "TooManyConnections", "2")
        assert b"2 connections" in body and b"max_connections" in body and headers["connection"] == "close"
        other = await client.connect()
        assert (await other.ask(HEALTH))[0] == 200
        assert await other.closed()
        for wire in held:
            assert (await wire.ask(HEALTH))[0] == 200
        assert refused(mirror, "total") == 2


async def test_a_client_with_too_many_connections_is_told_and_others_are_not_hit(hub: Hub, tmp_path: Path) -> None:
    async with clients_of(hub, tmp_path, SERVER_MAX_CLIENT_CONNECTIONS="2") as (client, mirror):
        for _ in range(2):
            await client.connect("127.0.0.2")
        status, headers, body = await (await client.connect("127.0.0.2")).ask(FILE)
        assert (status, headers["x-error-code"]) == (503, "TooManyConnections")
        assert b"127.0.0.2" in body and b"max_client_connections" in body
        assert (await (await client.connect("127.0.0.3")).ask(HEALTH))[0] == 200
        assert refused(mirror, "client") == 1


async def test_a_flood_is_cut_at_once_and_leaves_no_trace(hub: Hub, tmp_path: Path) -> None:
    async with clients_of(hub, tmp_path, SERVER_MAX_CLIENT_CONNECTIONS="1") as (client, _):
        flood = [await client.connect("127.0.0.4") for _ in range(80)]
        cut = [wire for wire in flood[65:] if await wire.closed()]
        assert len(cut) == 15
        assert (await (await client.connect("127.0.0.5")).ask(HEALTH))[0] == 200
        await client.close()
        await only_one_left(await client.connect())


async def only_one_left(wire: Wire) -> None:
    """Ask by `wire` until the mirror says that no other connection is open."""
    while b"\nnearhub_connections 1.0\n" not in (await wire.ask(METRICS))[2]:
        pass


@pytest.mark.parametrize("sent", [b"", b"GET /org/m HTTP/1.1\r\nHost: m\r\nX-A: "])
async def test_a_head_that_does_not_come_ends_its_connection(hub: Hub, tmp_path: Path, sent: bytes) -> None:
    """Silence and slowloris: bytes that keep coming do not put it off."""
    async with clients_of(hub, tmp_path, SERVER_REQUEST_TIMEOUT="250ms") as (client, mirror):
        wire = await client.connect()
        dripping = asyncio.create_task(_drip(wire, sent)) if sent else None
        assert await wire.closed()
        if dripping:
            dripping.cancel()
        assert refused(mirror, "slow") == 1
        assert (await (await client.connect()).ask(HEALTH))[0] == 200


async def _drip(wire: Wire, sent: bytes) -> None:
    """Fifty bytes a second: that is how such a client is, and nothing is waited for."""
    with contextlib.suppress(OSError):
        while not wire.writer.is_closing():
            wire.writer.write(sent)
            sent = b"a"
            await wire.writer.drain()
            await asyncio.sleep(0.02)


async def test_a_later_head_that_does_not_come_ends_its_connection_too(hub: Hub, tmp_path: Path) -> None:
    async with clients_of(hub, tmp_path, SERVER_IDLE_TIMEOUT="250ms") as (client, _):
        wire = await client.connect()
        assert (await wire.ask(HEALTH))[0] == 200
        dripping = asyncio.create_task(_drip(wire, b"GET /x HTTP/1.1\r\nX-A: "))
        assert await wire.closed()
        dripping.cancel()


@pytest.mark.parametrize(
    ("path", "media"),
    [
        ("/api/models/org/m/paths-info/main", "application/json"),
        ("/org/m.git/info/lfs/objects/batch", "application/vnd.git-lfs+json"),
        ("/org/m.git/git-upload-pack", "application/x-git-upload-pack-request"),
    ],
)
async def test_a_body_that_does_not_come_is_408(hub: Hub, tmp_path: Path, path: str, media: str) -> None:
    hub.repo("org/m").commit({"a": b"a"})
    async with clients_of(hub, tmp_path, SERVER_REQUEST_TIMEOUT="250ms") as (client, _):
        wire = await client.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: m\r\nContent-Type: {media}\r\nContent-Length: 1000\r\n\r\n{{"
        status, headers, _ = await wire.ask(head.encode())
        assert (status, headers["x-error-code"], headers["connection"]) == (408, "BodyTooSlow", "close")


async def test_a_body_of_ten_gigabytes_is_refused_before_it_comes(hub: Hub, tmp_path: Path) -> None:
    hub.repo("org/m").commit({"a": b"a"})
    async with clients_of(hub, tmp_path) as (client, _):
        for path, expected in (("/api/models/org/m/preupload/main", 405), ("/api/models/org/m/paths-info/main", 413)):
            wire = await client.connect()
            wire.writer.write(f"POST {path} HTTP/1.1\r\nHost: m\r\nContent-Length: 10000000000\r\n\r\n".encode())
            sending = asyncio.create_task(_send_forever(wire))
            status, _, _ = await wire.answer()
            sending.cancel()
            assert status == expected


async def _send_forever(wire: Wire) -> None:
    with contextlib.suppress(OSError):
        while not wire.writer.is_closing():
            wire.writer.write(bytes(65536))
            await wire.writer.drain()


async def test_a_client_that_takes_nothing_is_cut_and_holds_up_nobody(hub: Hub, tmp_path: Path) -> None:
    """The one who reads gets all of a file that is being fetched for both; the other's connection ends by itself."""
    content = Content(24 * 1024**2, 5)
    hub.repo("org/m").commit({"model.bin": LFS(content)})
    async with clients_of(hub, tmp_path, SERVER_STALL_TIMEOUT="500ms") as (client, mirror):
        stuck, quick = await client.connect("127.0.0.6"), await client.connect("127.0.0.7")
        stuck.writer.write(FILE)
        await stuck.reader.readuntil(b"\r\n\r\n")
        status, _, body = await quick.ask(FILE)
        assert status == 200 and body == content.bytes()
        await only_one_left(quick)
        assert mirror.metrics.readers_active._value.get() == 0


@given(st.integers(0, 10_000), st.integers(1, 10_000))
def test_who_is_within_the_limit_is_welcome_and_nobody_far_above_is_kept(count: int, limit: int) -> None:
    admission = decide(count, limit)
    assert (admission is Admission.WELCOME) == (count < limit)
    assert admission is Admission.CUT or count < limit + 64


@given(st.integers(1, 1_000_000), st.integers(1, 1_000_000), st.integers(64, 1 << 20))
def test_limits_fit_the_open_files(total: int, per_client: int, open_files: int) -> None:
    limits = fitted(Limits(total, per_client), open_files)
    assert 1 <= limits.per_client <= limits.total <= total
    assert limits.total == 1 or 2 * limits.total < open_files
