"""How far long work is, on standard error: a bar that moves on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from nearhub.units import rough_size

PLAIN_EVERY_S = 10.0
RATE_S = 5.0
"""The rate is that of about so many seconds."""
_WIDTH = 24


def described(line: Mapping[str, Any], rate: float | None) -> str:
    """`line` has done and of, in bytes; files, of_files and what, if it is about a repo. `rate` in bytes per second."""
    done, of = int(line["done"]), int(line["of"])
    parts = [f"{100 * done // of:3d} %", f"{rough_size(done)} of {rough_size(of)}"]
    if "files" in line:
        parts.append(f"{line['files']}/{line['of_files']} files")
    if rate:
        parts += [f"{rough_size(round(rate))}/s", f"{_clock((of - done) / rate)} left"]
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(min(seconds, 359_999)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


class Progress:
    """Clock: monotonic seconds."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._clock = clock
        self._rate: float | None = None
        self._last: tuple[float, int] | None = None
        self._printed_at = clock()
        self._was_drawn = False

    def show(self, line: Mapping[str, Any]) -> None:
        now, done, of = self._clock(), int(line["done"]), int(line["of"])
        self._measure(now, done)
        if not of:
            return
        text = (f"{line['what']}: " if "what" in line else "") + described(line, self._rate)
        if self._is_terminal:
            filled = _WIDTH * done // of
            self._stream.write(f"\r[{'#' * filled}{'.' * (_WIDTH - filled)}] {text}\x1b[K")
            self._was_drawn = True
        elif now - self._printed_at >= PLAIN_EVERY_S:
            self._stream.write(f"{text}\n")
            self._printed_at = now
        self._stream.flush()

    def _measure(self, now: float, done: int) -> None:
        """A mean that forgets; what was there at the start is no speed."""
        if self._last is not None and now > self._last[0]:
            elapsed = now - self._last[0]
            latest = max(0, done - self._last[1]) / elapsed
            weight = min(1.0, elapsed / RATE_S)
            self._rate = latest if self._rate is None else (1 - weight) * self._rate + weight * latest
        self._last = (now, done)

    def end(self) -> None:
        if self._was_drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
