"""Ordeal: one cache directory, a mirror that is killed again and again in mid-fill, clients that resume, and the accounts.

A cycle: start the mirror, let the clients go on, crash once so many bytes have come from upstream, compare the disk with the
truth. How it crashes is the caller's: kill -9, or a power cut.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from nearhub.wire.headers import BlobId
from nearhub.wire.spans import BLOCK
from tests.faults.audit import Audit, audit
from tests.hub import LFS, Content, HubProcess
from tests.mirror import MirrorProcess

MIB = 1024 * 1024
REPO = "org/m"
_DEADLINE_S = 60.0
_POLL_S = 0.01


@dataclass(slots=True, eq=False)
class Download:
    """One file, downloaded by a client that resumes with Range where it was cut. Every byte is compared as it comes."""

    path: str
    content: Content
    commit: str
    is_lfs: bool = True
    position: int = 0
    wrong_bytes: int = 0
    is_acknowledged: bool = False
    """Whether an answer's headers came: what they say must be in the index for ever."""
    failures: list[str] = field(default_factory=list)
    """Attempts that were answered with an error status."""
    cuts: list[str] = field(default_factory=list)
    """Attempts whose connection ended before its time."""
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def __repr__(self) -> str:
        last = (self.failures + self.cuts)[-1:]
        return f"<Download {self.path} {self.position}/{self.content.size} {last}>"

    @property
    def blob(self) -> BlobId:
        return BlobId.from_etag(self.content.sha256 if self.is_lfs else self.content.git_sha1)

    @property
    def is_done(self) -> bool:
        return self.position == self.content.size

    @property
    def is_right(self) -> bool:
        return self.is_done and not self.wrong_bytes and self._digest.hexdigest() == self.content.sha256

    def start_over(self) -> None:
        assert self.is_right
        self.position, self._digest = 0, hashlib.sha256()

    async def go_on(self, session: aiohttp.ClientSession, base: str) -> None:
        """One attempt: until the end, an error status, or the connection's end."""
        headers = {"Range": f"bytes={self.position}-"} if self.position else {}
        try:
            async with session.get(f"{base}/{REPO}/resolve/{self.commit}/{self.path}", headers=headers) as response:
                if response.status not in (200, 206):
                    self.failures.append(f"{response.status} {await response.text()}")
                    return
                assert response.status == (206 if self.position else 200)
                assert response.content_length == self.content.size - self.position
                self.is_acknowledged = True
                async for chunk in response.content.iter_any():
                    self._take(chunk)
        except (aiohttp.ClientError, ConnectionError) as error:
            self.cuts.append(f"at {self.position}: {type(error).__name__} {error}")

    def _take(self, chunk: bytes) -> None:
        truth = self.content.bytes(self.position, self.position + len(chunk))
        if chunk != truth:
            self.wrong_bytes += sum(a != b for a, b in zip(chunk, truth, strict=False)) + abs(len(chunk) - len(truth))
        self._digest.update(chunk)
        self.position += len(chunk)


@dataclass(frozen=True, slots=True)
class Cycle:
    """The account of one cycle. Bytes: `received` by clients, `fetched` from upstream, `lost`: fetched and gone."""

    number: int
    received: int
    fetched: int
    lost: int
    most_lost: int
    """Of one blob."""
    blocks: int
    """Blocks that the store vouched for after the crash."""
    kept: int
    """… of these in blobs that were not complete: what the next mirror goes on with."""
    wrong_blocks: int
    complete: int
    unfinished: int

    def line(self) -> str:
        return (
            f"cycle {self.number:3}: received {_mib(self.received)}, fetched {_mib(self.fetched)}, lost {_mib(self.lost)} "
            f"({_mib(self.most_lost)} of one blob); "
            f"{self.blocks} blocks durable ({self.kept} in partial blobs), {self.wrong_blocks} wrong; "
            f"{self.complete} blobs complete, {self.unfinished} not"
        )


def _mib(count: int) -> str:
    return f"{count / MIB:.1f} MiB"


class Ordeal:
    """`cache` is the directory that suffers; `crash` ends `self.mirror`, and what else it likes, and makes `cache` readable."""

    def __init__(
        self,
        hub: HubProcess,
        cache: Path,
        rng: random.Random,
        crash: Callable[[MirrorProcess], None],
        *,
        connections: int,
        recovers: bool,
        compares_all: bool,
    ) -> None:
        self.hub = hub
        self.cache = cache
        self.rng = rng
        self.connections = connections
        self.mirror = MirrorProcess(cache, [hub.url], [hub.cdn_host], {"FILL_CONNECTIONS": str(connections)})
        self.downloads: list[Download] = []
        self.cycles: list[Cycle] = []
        self.last = Audit()
        self._crash = crash
        self._recovers = recovers
        self._trusted: set[tuple[BlobId, int]] | None = None if compares_all else set()
        self._fetched: dict[BlobId, int] = {}

    def publish(self, sizes: Iterable[int], *, is_lfs: bool = True) -> None:
        """New files at the Hub, one commit each, that clients will download from the next cycle on."""
        for size in sizes:
            number = len(self.downloads)
            content = Content(size, seed=self.rng.randrange(2**31))
            path = f"{number:04}.bin"
            commit = self.hub.repo(REPO).commit({path: LFS(content) if is_lfs else content})
            self.downloads.append(Download(path, content, commit, is_lfs))

    @property
    def unfinished(self) -> list[Download]:
        return [download for download in self.downloads if not download.is_done]

    @property
    def large(self) -> list[Download]:
        """The unfinished ones that are not small."""
        return [download for download in self.unfinished if download.content.size > MIB]

    @property
    def wrong_bytes(self) -> int:
        return sum(download.wrong_bytes for download in self.downloads)

    @property
    def wrong_blocks(self) -> int:
        return sum(cycle.wrong_blocks for cycle in self.cycles)

    @property
    def kept(self) -> int:
        """Blocks of partial blobs that a mirror found after a crash, of all crashes."""
        return sum(cycle.kept for cycle in self.cycles)

    @property
    def lost(self) -> int:
        return sum(cycle.lost for cycle in self.cycles)

    @property
    def loss_limit(self) -> int:
        """What one blob may lose in one crash: a block per connection is being received, and as many are whole and wait
        for their sync."""
        return 2 * self.connections * BLOCK

    def usual_loss(self, blobs: int) -> int:
        """What `blobs` may lose in the mean of many crashes: what is being received, as if every block were nearly whole."""
        return blobs * self.connections * BLOCK

    async def cycle(self, fetch: int, at_once: int | None = None) -> Cycle:
        """Crash once upstream has sent `fetch` bytes of large files, or when the clients have all finished.

        `at_once`: how many clients, of the downloads begun first; None: all that are not done.
        """
        received = await self._download(self.unfinished[:at_once], fetch)
        await asyncio.to_thread(self._crash, self.mirror)
        return await self._account(received, crashed=True)

    async def finish(self) -> Cycle:
        """No crash: every download to its end, then a clean stop; the account has what was fetched for it.

        A client may have had its last verified byte before the crash took the blob: then it is downloaded once more.
        """
        for one in self.downloads:
            if one.is_done and one.blob not in self.last.complete:
                one.start_over()
        received = await self._download(self.unfinished, None)
        assert await asyncio.to_thread(self.mirror.terminate) == 0
        return await self._account(received, crashed=False)

    async def _download(self, chosen: Sequence[Download], fetch: int | None) -> int:
        """The clients' bytes, until the moment to crash or their end."""
        await asyncio.to_thread(self.mirror.start)
        before = sum(one.position for one in chosen)
        stop = threading.Event()
        target = None if fetch is None else sum(self._fetched.values()) + fetch
        timeout = aiohttp.ClientTimeout(total=None, sock_read=_DEADLINE_S)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session, asyncio.timeout(_DEADLINE_S):
            clients = {asyncio.create_task(one.go_on(session, self.mirror.url)) for one in chosen}
            moment = asyncio.create_task(asyncio.to_thread(self._await_fetched, target, stop))
            try:
                running = {moment, *clients}
                while not moment.done() and running > {moment}:
                    ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
            finally:
                # What is still under way is cut by the crash; here the clients only let go of it.
                stop.set()
                for task in clients:
                    task.cancel()
                await asyncio.wait([moment, *clients])
        return sum(one.position for one in chosen) - before

    def _await_fetched(self, target: int | None, stop: threading.Event) -> None:
        while not stop.wait(_POLL_S):
            if target is not None and self.hub.bytes(method="GET") >= target:
                return

    async def _account(self, received: int, *, crashed: bool) -> Cycle:
        truth = {download.blob: download.content for download in self.downloads}
        trusted = self._trusted if crashed else None
        before, after = self.last, await asyncio.to_thread(audit, self.cache, truth, recover=self._recovers, trusted=trusted)
        fetched = await asyncio.to_thread(self._fetched_by_blob)
        new = {blob: fetched[blob] - self._fetched.get(blob, 0) for blob in truth}
        lost = {blob: new[blob] - (after.durable[blob] - before.durable.get(blob, 0)) for blob in truth}
        assert not after.strangers, after.strangers
        self.last, self._fetched = after, fetched
        cycle = Cycle(
            number=len(self.cycles) + 1,
            received=received,
            fetched=sum(new.values()),
            lost=sum(lost.values()),
            most_lost=max(lost.values()),
            blocks=after.blocks,
            kept=after.partial,
            wrong_blocks=len(after.wrong),
            complete=len(after.complete),
            unfinished=len(self.unfinished),
        )
        self.cycles.append(cycle)
        return cycle

    def _fetched_by_blob(self) -> dict[BlobId, int]:
        """Body bytes that upstream sent for each blob, once it has noticed that nobody listens any more."""
        deadline = time.monotonic() + _DEADLINE_S
        while any(self.hub.active(origin) for origin in ("cdn", "hub")):
            assert time.monotonic() < deadline, "upstream still sends to a mirror that is dead"
            time.sleep(_POLL_S)
        rows = self.hub.do("counters")["rows"]
        return {
            one.blob: sum(
                row["bytes"]
                for row in rows
                if row["method"] == "GET"
                and (row["origin"] == "cdn") is one.is_lfs
                and ("resolve-cache" in row["subject"] or one.is_lfs)
                and one.path in row["subject"]
            )
            for one in self.downloads
        }

    def acknowledged(self) -> list[tuple[str, str, int]]:
        """(key, etag, size) of every file whose headers a client has seen."""
        return [
            (f"{REPO}@{one.commit}:{one.path}", one.blob.hex, one.content.size) for one in self.downloads if one.is_acknowledged
        ]
