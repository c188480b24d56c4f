"""Connectivity: may upstream be asked at all? Owner of that one decision, which the operator makes, or lasting silence does.

    on      nothing is asked: no request, no connection, no DNS question leaves this process
    off     upstream is asked whenever that is needed, however often it failed
    auto    as off; after `lasting_s` of silence what is here is all there is, and only probes go out, until one is answered

What is asked meanwhile is nobody's business here: Dispatcher, Upstream and GitMirrors come to this door before they send.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from enum import StrEnum

from nearhub.errors import Offline

log = logging.getLogger(__name__)

LASTING_S = 60.0


class Mode(StrEnum):
    """What the operator says of being offline."""

    ON = "on"
    OFF = "off"
    AUTO = "auto"


class Connectivity:
    """Clock: monotonic seconds."""

    def __init__(
        self, mode: Mode = Mode.AUTO, *, lasting_s: float = LASTING_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.mode = mode
        self._lasting_s = lasting_s
        self._clock = clock
        self._lost_at: float | None = None

    def __repr__(self) -> str:
        return f"<Connectivity {self.mode}: {self.why or 'online'}>"

    @property
    def is_closed(self) -> bool:
        """Whether nothing at all may leave, by the operator's word."""
        return self.mode is Mode.ON

    @property
    def is_offline(self) -> bool:
        """Whether what is here is all that there is: nobody waits for upstream."""
        return self.mode is Mode.ON or (
            self.mode is Mode.AUTO and self._lost_at is not None and self._clock() - self._lost_at >= self._lasting_s
        )

    @property
    def why(self) -> str:
        """Why this mirror is offline, in words; "" when it is not."""
        if not self.is_offline:
            return ""
        if self.mode is Mode.ON or self._lost_at is None:
            return "its operator set it so (nearhub offline auto ends that)"
        return f"upstream has not answered for {self._clock() - self._lost_at:.0f} s"

    def require(self) -> None:
        """Before anything is sent. Raises Offline."""
        if self.is_closed:
            raise self.error()

    def require_online(self) -> None:
        """Before a question to which an answer from here is the better one while there is nobody to ask. Raises Offline."""
        if self.is_offline:
            raise self.error()

    def error(self) -> Offline:
        """What a question hears that only upstream could answer."""
        return Offline(
            f"this mirror is offline: {self.why}; nearhub prefetch, on a mirror that is online, or nearhub import brings it"
        )

    def lost(self) -> None:
        """No upstream answers questions any more."""
        if self._lost_at is None:
            self._lost_at = self._clock()

    def found(self) -> None:
        """One does."""
        if self.is_offline and not self.is_closed:
            log.warning("online again")
        self._lost_at = None

    def switch(self, mode: Mode) -> None:
        """By the operator, until this process ends. Requests under way go on to their end."""
        log.warning("offline: %s; it was %s", mode, self.mode)
        self.mode = mode
