"""git clone, fetch and pull, answered by git itself from a bare mirror; nothing of a pack is ever held here.

git shows text/plain errors line by line, so they are plain.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from nearhub import trace
from nearhub.access import Access
from nearhub.errors import AccessRefused, BadTarget, GitFailed, NotRoutable, RepoNotFound, TokenWanted
from nearhub.git.mirrors import Bare, GitMirrors
from nearhub.git.processes import Running, running
from nearhub.metrics import Metrics
from nearhub.resolve import Resolver
from nearhub.upstream.dispatch import Slots
from nearhub.web import bodies
from nearhub.web.callers import Callers
from nearhub.web.files import WRITE_TIMEOUT_S
from nearhub.web.middleware import SPEECH, STATUS, TEXT, CutError, base_headers, metadata_status
from nearhub.wire import git as words
from nearhub.wire.credentials import Caller
from nearhub.wire.target import DEFAULT_REVISION, GitService, GitTarget, Repo

MAX_REQUEST = 64 * 1024**2
"""Bytes of one request, unpacked: wants and haves of 50 bytes each."""
SHARE = 3 / 4
"""Of the sessions, one client address may have at once."""
_PIECE = 64 * 1024
_MEDIA = "application/x-git-upload-pack-"


@dataclass(frozen=True, slots=True)
class Git:
    """What answering needs. `sessions`: how many are answered at once."""

    access: Access
    callers: Callers
    resolver: Resolver
    mirrors: GitMirrors
    metrics: Metrics
    sessions: int
    _places: Slots = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_places", Slots(self.sessions, max(1, int(self.sessions * SHARE))))

    async def serve(self, request: web.BaseRequest, target: GitTarget) -> web.StreamResponse:
        """Everything that git asks. Raises NearhubError before, CutError after the headers."""
        request[SPEECH] = TEXT
        is_advertisement = target.service is None
        _refuse_others(request, target)
        trace.account().what = "git"
        caller = self.callers.of(request)
        client = caller.address
        repo = await self._permitted(target.repo, caller)
        protocol = words.protocol_of(request.headers.get("Git-Protocol", ""))
        async with (
            self.mirrors.lend(repo, client, must_be_fresh=is_advertisement) as bare,
            self._place(client, repo),
            running(
                words.upload_pack(str(bare.path), is_advertisement=is_advertisement),
                words.serving(),
                protocol=protocol,
                takes_input=True,
            ) as git,
        ):
            return await _answer(request, git, bare, words.lead_of(protocol) if is_advertisement else None)

    async def _permitted(self, repo: Repo, caller: Caller) -> Repo:
        """As for files. Who brought no token and is refused is asked for one: git takes it as the password of any user."""
        if self.mirrors.named_url(repo) is not None:
            trace.account().repo, trace.account().grounds = f"{repo.name}.git", "public"
            return repo
        try:
            repo = await self.access.authorise(repo, DEFAULT_REVISION, caller)
        except (AccessRefused, RepoNotFound) as exc:
            if caller.is_anonymous:
                raise TokenWanted(exc.message, code=exc.error_code) from exc
            raise AccessRefused(exc.message, status=403, code=exc.error_code) from exc
        if self.access.has_rules:  # what is in LFS is asked for by itself
            current = await self.resolver.commit(repo, DEFAULT_REVISION, caller.address)
            files = await self.resolver.files(repo, current.commit, caller.address)
            plain = [(file.path, file.size) for file in files if not file.is_lfs]
            await self.access.admit(repo, current.commit, plain, caller)
        return repo

    @asynccontextmanager
    async def _place(self, client: str, repo: Repo) -> AsyncIterator[None]:
        async with self._places.hold(client, repo):
            with self.metrics.git_sessions.track_inprogress():
                yield


def _refuse_others(request: web.BaseRequest, target: GitTarget) -> None:
    """What is no clone, fetch or pull. Raises ClientError or AccessRefused."""
    asked = request.query.get("service", "") if target.service is None else target.service.value
    if asked == GitService.RECEIVE_PACK:
        raise AccessRefused("this is a read-only mirror: push to the Hub itself (git remote set-url --push)", status=403)
    if asked != GitService.UPLOAD_PACK:
        raise BadTarget("git's old dumb protocol is not served: use git 1.6.6 or later")
    method = "GET" if target.service is None else "POST"
    if request.method != method:
        raise NotRoutable(f"git asks this with {method}")
    if method == "POST" and request.content_type != f"{_MEDIA}request":
        raise BadTarget(f"this is for git, which sends {_MEDIA}request")


async def _answer(request: web.BaseRequest, git: Running, bare: Bare, lead: bytes | None) -> web.StreamResponse:
    """`lead`: what stands before an advertisement; None: the answer to a request with a body."""
    process = git.process
    assert process.stdin is not None and process.stdout is not None
    feeding = asyncio.ensure_future(_feed(request, process.stdin) if lead is None else _closed(process.stdin))
    try:
        piece = await _first_piece(process.stdout, feeding)
        if not piece and (ended := await git.end())[0] != 0:
            raise GitFailed(f"git failed on this request: {ended[1].strip()[-300:] or ended[0]}")
        status = metadata_status(is_stale=bare.is_stale)
        request[STATUS] = status.word
        media = f"{_MEDIA}{'result' if lead is None else 'advertisement'}"
        headers = base_headers(request) | {"Content-Type": media, "Cache-Control": "no-cache", "Cache-Status": str(status)}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        try:
            piece = (lead or b"") + piece
            while piece:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await response.write(piece)
                piece = await process.stdout.read(_PIECE)
        except TimeoutError:
            raise ConnectionResetError("the client stopped reading") from None
        exit_status, complaint = await git.end()
        if exit_status < 0:  # one that failed of itself has told the client so
            raise CutError(response, GitFailed(f"git was ended by signal {-exit_status}: {complaint.strip()[-300:]}"))
        await response.write_eof()
        return response
    finally:
        feeding.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await feeding


async def _first_piece(stdout: asyncio.StreamReader, feeding: asyncio.Future[None]) -> bytes:
    """What git says first. An error in what it was to read comes before that: nothing has been answered yet."""
    reading = asyncio.ensure_future(stdout.read(_PIECE))
    both: set[asyncio.Future[Any]] = {reading, feeding}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if feeding.done():
            feeding.result()
        return await reading
    finally:
        reading.cancel()


async def _feed(request: web.BaseRequest, stdin: asyncio.StreamWriter) -> None:
    """The request's body, as it comes. Raises TooLarge, BodyTooSlow, BadTarget."""
    try:
        async for piece in bodies.pieces(request, MAX_REQUEST, "git"):
            stdin.write(piece)
            await stdin.drain()
    except (BrokenPipeError, ConnectionResetError):
        return  # git has read all it needs, or has complained: its answer tells
    finally:
        stdin.close()


async def _closed(stdin: asyncio.StreamWriter) -> None:
    stdin.close()
