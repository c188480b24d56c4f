"""git smart HTTP for clone and fetch, by real `git upload-pack`; and the errors of all that git and git-lfs ask."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

from multidict import CIMultiDict

from tests.hub import lfs
from tests.hub.files import renamed
from tests.hub.reply import Ask, HubError, Reply
from tests.hub.routes import GitRoute, Route
from tests.hub.world import World

UPLOAD_PACK = "git-upload-pack"
REQUEST = f"application/x-{UPLOAD_PACK}-request"
_BUFFER = 256 * 1024
_SETTINGS = {
    "uploadpack.allowFilter": "true",
    "uploadpack.allowAnySHA1InWant": "true",
    "core.bigFileThreshold": "1m",  # larger blobs are streamed from disk
    "pack.compression": "0",  # four times as fast where most bytes are random
    "safe.directory": "*",
}


def is_streamed(route: Route | None) -> bool:
    """Whether the request's body is read while the answer flows."""
    return isinstance(route, GitRoute) and route.service == UPLOAD_PACK


def as_bearer(ask: Ask) -> Ask:
    """git sends the token as the password of Basic, with any user name."""
    scheme, _, value = ask.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return ask
    try:
        token = base64.b64decode(value).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        token = ""
    headers = CIMultiDict(ask.headers)
    headers["Authorization"] = f"Bearer {token}"
    return replace(ask, headers=headers)


def answer_git(world: World, ask: Ask, route: GitRoute) -> Reply:
    """Everything under /{id}[.git]/ that git and git-lfs ask for. The token must be a Bearer's by now."""
    is_lfs = route.service.startswith("info/lfs/")
    try:
        repo = world.readable(route.kind, route.repo_id, ask)
        if repo.id != route.repo_id:
            return renamed(ask, route.repo_id, repo.id)
        if is_lfs:
            return lfs.answer_lfs(world, ask, repo, route.service)
        protocol = ask.headers.get("Git-Protocol", "")
        _check_service(ask, route.service)
    except HubError as error:
        return _refused(error, is_lfs=is_lfs)
    kind = "advertisement" if route.service == "info/refs" else "result"
    headers = {"Content-Type": f"application/x-{UPLOAD_PACK}-{kind}", "Cache-Control": "no-cache"}
    stream = UploadPack(lambda: world.shelf.folder(repo), protocol, ask.pieces)
    return Reply(200, CIMultiDict(headers), stream=stream)


def _check_service(ask: Ask, service: str) -> None:
    wanted = parse_qs(ask.query).get("service", [""])[0] if service == "info/refs" else service
    if wanted == "git-receive-pack":
        raise HubError(403, None, "You are not authorized to push to this repo.")
    if wanted != UPLOAD_PACK or ask.method != ("GET" if service == "info/refs" else "POST"):
        raise HubError(404, None, "Not Found")
    if service == UPLOAD_PACK and ask.headers.get("Content-Type") != REQUEST:
        raise HubError(415, None, f"Expected {REQUEST}")


def _refused(error: HubError, *, is_lfs: bool) -> Reply:
    """An error as git and git-lfs show it to people; 401 makes them ask for a password."""
    answer = lfs.refusal(error) if is_lfs else error.as_text()
    if error.status == 401:
        answer.headers["WWW-Authenticate"] = 'Basic realm="Authentication required"'
    return answer


class UploadPack:
    """What `git upload-pack` says. It starts when it is first read, and is fed the request's body meanwhile.

    Without a body it advertises the refs. How it ends does not matter: it tells its errors in its answer.
    """

    def __init__(self, folder: Callable[[], Awaitable[Path]], protocol: str, body: AsyncIterator[bytes] | None) -> None:
        self._folder, self._protocol, self._body = folder, protocol, body
        self._process: asyncio.subprocess.Process | None = None
        self._feeder: asyncio.Task[None] | None = None
        self._is_over = False
        is_plain = body is None and "version=2" not in protocol.split(":")
        self._head = b"001e# service=git-upload-pack\n0000" if is_plain else b""

    async def read(self, limit: int) -> bytes:
        """Some bytes, at most `limit`; none at the end."""
        process = self._process or await self._start()
        if self._head:
            piece, self._head = self._head[:limit], self._head[limit:]
            return piece
        assert process.stdout is not None
        piece = await process.stdout.read(limit)
        if not piece:
            self._is_over = True
            if self._feeder is not None and self._feeder.done():
                self._feeder.result()
        return piece

    async def close(self) -> None:
        """End the process, if there is one. One that has said everything ends by itself.

        A connection that is cut on purpose cancels whoever is in here: that waits until all is done.
        """
        ending = asyncio.create_task(self._end())
        try:
            await asyncio.wait([ending])
        except asyncio.CancelledError:
            await asyncio.wait([ending])
            raise

    async def _end(self) -> None:
        if self._feeder is not None:
            self._feeder.cancel()
            await asyncio.wait([self._feeder])
        process = self._process
        if process is None:
            return
        if not self._is_over and process.returncode is None:
            process.kill()
        assert process.stdout is not None
        while await process.stdout.read(_BUFFER):
            continue
        await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        how = ["--stateless-rpc", *(["--advertise-refs"] if self._body is None else [])]
        command = ["git", *settings, "upload-pack", *how, str(await self._folder())]
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        stdin = nothing if self._body is None else pipe
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "GIT_PROTOCOL": self._protocol}
        process = self._process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdin=stdin, stdout=pipe, stderr=nothing, limit=_BUFFER
        )
        if self._body is not None:
            self._feeder = asyncio.create_task(_feed(process, self._body))
        return process


async def _feed(process: asyncio.subprocess.Process, body: AsyncIterator[bytes]) -> None:
    """Hand over the body as it arrives, as far as the process wants it."""
    assert process.stdin is not None
    try:
        async for piece in body:
            process.stdin.write(piece)
            try:
                await process.stdin.drain()
            except (BrokenPipeError, ConnectionResetError):
                return
    finally:
        process.stdin.close()
