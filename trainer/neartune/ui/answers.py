"""Models in a process of their own, `neartune serve`, started when someone wants to chat: the page itself needs no torch."""

from __future__ import annotations

import asyncio
import os
import secrets
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from neartune.ui import jobs

_SAID = 20
"""Last lines that are kept, to say why it ended."""
_LONGEST = 2**22
"""Bytes of a line at most."""


class NotServing(Exception):
    """The server ended before it listened; the message is what it said last."""


@dataclass(frozen=True, slots=True)
class Serving:
    url: str
    token: str


class Answers:
    """At most one server of the runs in `home`."""

    def __init__(self, home: Path, folder: Path, mirror: Sequence[str]) -> None:
        self._words = ["serve", "--runs", str(home), "--port", "0", "--token-file", str(folder / "token")]
        self._mirror = tuple(mirror)
        self._token_file = folder / "token"  # which the words name
        self._lock = asyncio.Lock()
        self._process: Process | None = None
        self._serving: Serving | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        return self._serving is not None and self._process is not None and self._process.returncode is None

    async def serving(self) -> Serving:
        """The server, started if it is not there. Raises NotServing."""
        async with self._lock:
            if not self.is_up:
                await self._end()
                self._serving = await self._start()
            assert self._serving is not None
            return self._serving

    async def close(self) -> None:
        """Its memory is free on return."""
        async with self._lock:
            await self._end()

    async def _start(self) -> Serving:
        token = secrets.token_urlsafe(32)
        jobs.write_secret(self._token_file, token)
        words = jobs.command(*self._words, mirror=self._mirror)
        self._process = process = await asyncio.create_subprocess_exec(
            *words, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=jobs.environment(os.environ), limit=_LONGEST
        )
        said: deque[str] = deque(maxlen=_SAID)
        assert process.stdout is not None
        async for line in process.stdout:
            said.append(line.decode(errors="replace").rstrip())
            _, is_listening, url = said[-1].partition("listening on ")
            if is_listening:
                self._reading = asyncio.create_task(_drain(process.stdout))
                return Serving(url, token)
        await process.wait()
        raise NotServing("\n".join(said) or f"exit status {process.returncode}")

    async def _end(self) -> None:
        process, reading = self._process, self._reading
        self._process = self._serving = self._reading = None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()  # it has nothing to save, and would finish answers that nobody waits for
            await process.wait()
        if reading is not None:
            await reading


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(65536):
        pass
