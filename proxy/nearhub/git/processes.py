"""Running git: without a shell, in a session of its own, with nothing of our environment, and never longer than it may."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from nearhub.errors import GitMissing, UpstreamFailed
from nearhub.tasks import uncancelled
from nearhub.wire.git import environment

MAX_COMPLAINT = 64 * 1024
"""Bytes of git's standard error that are kept."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a git ended. `status` is negative where a signal ended it."""

    status: int
    output: bytes
    complaint: str


@dataclass(slots=True)
class Running:
    """A git at work. Its standard error is read all the while."""

    process: asyncio.subprocess.Process
    _complaint: asyncio.Task[str]

    async def end(self) -> tuple[int, str]:
        """Its exit status, and what it complained of."""
        return await self.process.wait(), await asyncio.shield(self._complaint)


@asynccontextmanager
async def running(
    arguments: Sequence[str],
    settings: Mapping[str, str],
    *,
    directory: str | None = None,
    protocol: str = "",
    keeps: int | None = None,
    takes_input: bool = False,
    largest_file: int | None = None,
    memory: int | None = None,
) -> AsyncIterator[Running]:
    """A git at work in the repository at `directory`, and whatever it starts; all of it is killed on leaving.

    `keeps`: a lock that they hold as long as they live; the file says whose it is. `largest_file`: bytes that none of their
    files may exceed; `memory`: that none of them may ask for at once, nor any but its helpers for the network have mapped.
    Raises GitMissing.
    """
    program = shutil.which("git")
    if program is None:
        raise GitMissing("git is not installed where this mirror runs: install git 2.31 or later there")
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdin=asyncio.subprocess.PIPE if takes_input else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(settings, path=os.defpath, directory=directory, protocol=protocol, memory=memory),
        cwd=directory,
        start_new_session=True,
        pass_fds=() if keeps is None else (keeps,),
        limit=256 * 1024,
    )
    if keeps is not None:
        os.ftruncate(keeps, 0)
        os.pwrite(keeps, str(process.pid).encode(), 0)
    for limited, most in ((resource.RLIMIT_FSIZE, largest_file), (resource.RLIMIT_AS, memory)):
        if most is not None and hasattr(resource, "prlimit"):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, limited, (most, most))
    assert process.stderr is not None
    complaint = asyncio.get_running_loop().create_task(_kept(process.stderr), name="git's complaint")
    try:
        yield Running(process, complaint)
    finally:
        # The whole session, also when git itself is gone: what it started must not outlive the request.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await uncancelled(_buried(process, complaint))


async def _feed(process: asyncio.subprocess.Process, data: bytes) -> None:
    """While its output is read: a git that answers as it reads must not be waited for in vain."""
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):  # it ended first; its status tells why
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.close()


async def _buried(process: asyncio.subprocess.Process, complaint: asyncio.Task[str]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    await process.wait()
    await asyncio.wait([complaint])


async def _kept(stream: asyncio.StreamReader) -> str:
    kept = b""
    while piece := await stream.read(4096):
        kept = (kept + piece)[-MAX_COMPLAINT:]
    return kept.decode(errors="replace")


async def run(
    arguments: Sequence[str],
    settings: Mapping[str, str],
    *,
    timeout_s: float,
    most: int = 1024**2,
    directory: str | None = None,
    keeps: int | None = None,
    largest_file: int | None = None,
    memory: int | None = None,
    input: bytes | None = None,
) -> Done:
    """Run a git to its end. `input`: for its standard input.

    Raises TimeoutError after `timeout_s`, UpstreamFailed when it says more than `most` bytes.
    """
    async with (
        asyncio.timeout(timeout_s),
        running(
            arguments,
            settings,
            directory=directory,
            keeps=keeps,
            takes_input=input is not None,
            largest_file=largest_file,
            memory=memory,
        ) as git,
    ):
        stream = git.process.stdout
        assert stream is not None
        feeding = None if input is None else asyncio.ensure_future(_feed(git.process, input))
        output = bytearray()
        while piece := await stream.read(256 * 1024):
            output += piece
            if len(output) > most:
                raise UpstreamFailed(f"git {arguments[0]} got more than {most >> 20} MiB of an answer")
        status, complaint = await git.end()
        if feeding is not None:
            await feeding
        return Done(status, bytes(output), complaint)
