"""Reader: one response's cursor over a blob, complete or being filled. Says which bytes may be sent now; never writes.

What may leave before verification is decided in release.py; here it is waited for. When a fill ends for want of room, its
readers go on, each by a Passage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nearhub.errors import StoreFull, UpstreamFailed
from nearhub.release import DRIP_EVERY_S, TAIL, Ledger, Release, charge, release
from nearhub.wire.cachestatus import CacheStatus, Forward
from nearhub.wire.headers import BlobId
from nearhub.wire.ranges import Asked, Shape
from nearhub.wire.spans import Span, SpanSet

PIECE = 1024 * 1024
"""Bytes a reader is given at a time …"""
COMPLETE_PIECE = 4 * PIECE
"""… and of what is verified: fewer, larger pieces cost less."""


@dataclass(frozen=True, slots=True)
class FilePiece:
    """Bytes to send from an open file."""

    fd: int
    span: Span


class Reading(Protocol):
    """What a response sends from, a Reader or a Passage: `await ready()`, `await next_piece()` until None, then close()."""

    @property
    def status(self) -> CacheStatus:
        """How this read is answered; to be asked once ready() has returned."""
        ...

    async def ready(self, *, is_first: bool = True) -> None:
        """Wait until the first bytes may leave, so that an error is still a clean answer. Raises NearhubError.

        `is_first` of the response's parts: a later one must not keep a connection to upstream until it is its turn.
        """
        ...

    async def next_piece(self) -> FilePiece | bytes | None:
        """The next bytes to send; None at the end. Raises NearhubError: then the connection must be cut."""
        ...

    def close(self) -> None: ...


class Filling(Protocol):
    """What a reader needs of the fill it reads from."""

    blob: BlobId
    written: SpanSet
    is_verified: bool
    has_flown: bool
    """Whether anything was asked of an upstream."""
    began_empty: bool

    @property
    def fd(self) -> int: ...
    def raise_error(self) -> None: ...
    def can_serve(self, span: Span) -> bool: ...
    def first_byte_wait_s(self) -> float | None: ...
    async def news_for_readers(self, timeout_s: float | None) -> None: ...
    def ledger(self, address: str) -> Ledger: ...
    async def note_reader(self, address: str) -> None: ...
    def want_whole(self) -> None: ...
    async def divert(self, reader: Reader) -> Reading: ...
    def detach(self, reader: Reader) -> None: ...


class Reader:
    """One response's cursor over a blob. Gives spans that may be sent now; the bytes are read from `fd`.

    A Reading. Cancel-safe: a reader changes nothing on disk.
    """

    def __init__(
        self, asked: Asked, size: int, address: str, *, fill: Filling | None = None, fd: int = -1, on_close: Callable[[], None]
    ) -> None:
        """Of a `fill`, or of the complete blob that `fd` is open on, which the reader then owns."""
        self.span = asked.span
        self.size = size
        self.address = address
        self.position = asked.span.start
        # P1a: footers are asked for by closed and suffix ranges; an open range is a download, and waits for its tail.
        self.is_footer = asked.shape is not Shape.OPEN
        self._fd = fd
        self._fill = fill
        self._is_late = fill is not None and fill.has_flown
        self._on_close = on_close
        self._sent_at = float("-inf")
        self._closed = False
        self._onward: Reading | None = None
        """How it goes on without a fill."""

    def __repr__(self) -> str:
        return f"<Reader {self.position} of [{self.span.start}, {self.span.stop}) for {self.address}>"

    @property
    def fd(self) -> int:
        return self._fill.fd if self._fill else self._fd

    @property
    def status(self) -> CacheStatus:
        if self._onward is not None:
            return self._onward.status
        fill = self._fill
        if fill is None or not fill.has_flown:
            return CacheStatus()
        forward = Forward.URI_MISS if fill.began_empty else Forward.PARTIAL
        unverified_footer = self.is_footer and not fill.is_verified and self.span.stop > self.size - TAIL
        return CacheStatus(forward, self._is_late, stored=True, detail="unverified" if unverified_footer else None)

    async def ready(self, *, is_first: bool = True) -> None:
        try:
            await self._ready()
        except StoreFull:
            await (await self._divert()).ready(is_first=is_first)

    async def next_piece(self) -> FilePiece | bytes | None:
        if self._onward is None:
            try:
                span = await self.next_span()
            except StoreFull:
                await self._divert()
            else:
                return None if span is None else FilePiece(self.fd, span)
        assert self._onward is not None
        return await self._onward.next_piece()

    async def _divert(self) -> Reading:
        assert self._fill is not None
        self._onward = await self._fill.divert(self)
        return self._onward

    async def _ready(self) -> None:
        while self._fill is not None:
            fill = self._fill
            if fill.is_verified:
                return
            fill.raise_error()
            wait_s = fill.first_byte_wait_s()
            if wait_s is None and fill.can_serve(self.span):
                grant = self._grant(fill)
                if grant.end > self.position or (not self.span and fill.is_verified):
                    return
                self._want_verification(fill)
                wait_s = grant.again_s
            await fill.news_for_readers(wait_s)

    async def next_span(self) -> Span | None:
        """The next bytes to send, at most a piece; None at the end. Raises NearhubError: then the connection must be cut."""
        while self.position < self.span.stop:
            if self._fill is None or self._fill.is_verified:
                return self._advance(min(self.span.stop, self.position + COMPLETE_PIECE))
            fill = self._fill
            fill.raise_error()
            grant = self._grant(fill)
            if grant.end > self.position:
                end = min(grant.end, self.position + PIECE)
                # Charged before the await: another reader of this address must see it when it asks what is left.
                ledger = fill.ledger(self.address)
                charge(ledger, start=self.position, stop=end, size=self.size, is_footer=self.is_footer)
                span = self._advance(end)
                if ledger.streamed:
                    await fill.note_reader(self.address)
                return span
            self._want_verification(fill)
            if grant.is_exhausted and time.monotonic() - self._sent_at > 2 * DRIP_EVERY_S:
                raise UpstreamFailed(f"{fill.blob} could not be verified in time: the rest was withheld")
            await fill.news_for_readers(grant.again_s)
        return None

    def _grant(self, fill: Filling) -> Release:
        return release(
            position=self.position,
            stop=self.span.stop,
            there=fill.written.end_of_run(self.position),
            size=self.size,
            ledger=fill.ledger(self.address),
            is_footer=self.is_footer,
            silent_s=time.monotonic() - self._sent_at,
            sent_any=self.position > self.span.start,
        )

    def _want_verification(self, fill: Filling) -> None:
        """Bytes are there but may not leave: only verification helps, and that takes the whole blob."""
        if fill.written.end_of_run(self.position) > self.position or not self.span:
            fill.want_whole()

    def _advance(self, end: int) -> Span:
        span = Span(self.position, end)
        self.position = end
        self._sent_at = time.monotonic()
        return span

    def close(self) -> None:
        """Leave the fill, which then follows its own policy (P4)."""
        if self._closed:
            return
        self._closed = True
        self._on_close()
        if self._onward is not None:
            self._onward.close()
        if self._fill is not None:
            self._fill.detach(self)
        else:
            os.close(self._fd)
