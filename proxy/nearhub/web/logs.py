"""The log on standard error: lines are gathered and written together, so that a line a request costs little.

A warning, or a fifth of a second, or the end of the process writes what was gathered. kill -9 loses that fifth of a second.

Whatever stands in a message, it stays one line, and shows what a terminal would act on as escapes; lines of a traceback are
indented, so that none can pass for a line of ours.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

from aiohttp.http_exceptions import HttpProcessingError

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
            told = escaped(record.getMessage())
            if record.exc_info:
                trace = (self.formatter or logging.Formatter()).formatException(record.exc_info)
                told = "\n    ".join([told, *map(escaped, trace.split("\n"))])
            self.add(f"{self._time(record.created)} {record.levelname} {record.name} {told}\n")
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


def escaped(text: str) -> str:
    """In one line, with escapes for what is not printable."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _NoBytesOfClients(logging.Filter):
    """What aiohttp says of what is no HTTP, in a line, and without the bytes that came: they may hold a token."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.levelno, record.levelname, record.exc_info = logging.INFO, "INFO", None
            record.msg, record.args = f"{record.msg}: %s", (*(record.args or ()), type(error).__name__)
        return True


HTTP = logging.getLogger("nearhub.http")
"""aiohttp's server writes here."""
HTTP.addFilter(_NoBytesOfClients())

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
