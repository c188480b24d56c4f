"""The log on standard error: lines are gathered and written together, so that a line a request costs little.

A warning, or a fifth of a second, or the end of the process writes what was gathered. kill -9 loses that fifth of a second.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

FLUSH_EVERY_S = 0.2
_MOST_LINES = 256


class Gathered(logging.Handler):
    """Writes to `stream`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self._lines: list[str] = []
        self._second = -1
        self._stamp = ""
        self.setFormatter(logging.Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.add(f"{self._time(record.created)} {record.levelname} {record.name} {self.format(record)}\n")
            if record.levelno >= logging.WARNING:
                self.flush()
        except Exception:  # noqa: BLE001
            self.handleError(record)

    def access(self, text: str) -> None:
        """A line of the access log, as log.info would write it, at a fifth of the cost."""
        self.add(f"{self._time(time.time())} INFO nearhub.access {text}\n")

    def add(self, line: str) -> None:
        self._lines.append(line)
        if len(self._lines) >= _MOST_LINES:
            self.flush()

    def _time(self, at: float) -> str:
        second = int(at)
        if second != self._second:
            self._second, self._stamp = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return f"{self._stamp},{int(1000 * (at - second)):03d}"

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._stream.write("".join(lines))
            self._stream.flush()

    def close(self) -> None:
        self.flush()
        super().close()


_access: Callable[[str], None] = logging.getLogger("nearhub.access").info


def access(text: str) -> None:
    """Write a line to the access log."""
    _access(text)


def install() -> Gathered:
    """Log so from now on; keep_flushing() belongs to it."""
    # What no line of ours shows need not be found out for each of them.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = Gathered()
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    global _access
    _access = handler.access
    return handler


async def keep_flushing(handler: Gathered) -> None:
    """Until cancelled."""
    while True:
        await asyncio.sleep(FLUSH_EVERY_S)
        handler.flush()
