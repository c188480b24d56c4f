"""A run's directory belongs to one run at a time: OUTPUT/.lock, a lock of the kernel's that ends with the process that has it,
however that ends. The file says who has it, and goes when the run ends by itself."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

FILE = ".lock"
_TRIES, _PAUSE = 20, 0.01
"""is_running() has the lock for a moment: whoever wants it asks so often, so many seconds apart."""


class Taken(Exception):
    """Another process has the directory; the message says which."""


@contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """No other process has `folder` meanwhile, which is made if it is not there, and goes again if nothing was put into it.
    Raises Taken, OSError."""
    is_new = not folder.exists()
    stream = _taken(folder, say)
    try:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}\n")
        stream.flush()
        yield
    finally:
        (folder / FILE).unlink(missing_ok=True)
        stream.close()
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def is_running(folder: Path) -> bool:
    """Whether a run goes on in `folder`."""
    try:
        with (folder / FILE).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as exc:
        return isinstance(exc, BlockingIOError)
    return False


def _taken(folder: Path, say: Callable[[str], None]) -> TextIO:
    for _ in range(_TRIES):
        if stream := _try(folder, say):
            return stream
        time.sleep(_PAUSE)
    try:
        raise Taken((folder / FILE).read_text(encoding="utf-8").strip())
    except FileNotFoundError:  # it ended just now
        raise Taken("another process") from None


def _try(folder: Path, say: Callable[[str], None]) -> TextIO | None:
    """None: another has it, or had it and took the file away."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        stream = (folder / FILE).open("a+", encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = _is_there(stream, folder / FILE)
    except BlockingIOError:
        is_ours = False
    except OSError as exc:
        say(f"warning: {folder}: its file system has no locks ({exc.strerror}): nothing keeps a second run out")
        is_ours = True
    if is_ours:
        return stream
    stream.close()
    return None


def _is_there(stream: TextIO, file: Path) -> bool:
    """Whether `file` is still the one that was opened."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False
