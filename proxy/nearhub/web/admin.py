"""The operator's door: CACHE/admin.sock (0600), HTTP over it, a verb a route; answers are lines of JSON.

Who may open the socket may do everything: its directory is 0700. The last line is `{"result": …}`, or
`{"error": …, "fault": …}`; those before it tell of progress.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from nearhub.errors import BadTarget, NearhubError
from nearhub.operations import Operations

SOCKET = "admin.sock"
_LONGEST = 100
"""Bytes of a socket's path that every system takes."""


@asynccontextmanager
async def admin_listening(operations: Operations, cache: Path) -> AsyncIterator[None]:
    """Serve the verbs on `cache`/admin.sock; the file is gone on leaving."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return await _answer(request, operations)

    app = web.Application()
    app.router.add_post("/{verb}", answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with reachable(cache) as path:
            path.unlink(missing_ok=True)  # of a process that died: this one owns the cache now
            listener.bind(str(path))
            path.chmod(0o600)
        try:
            await web.SockSite(runner, listener).start()
            yield
        finally:
            await runner.cleanup()
            with suppress(FileNotFoundError):
                (cache / SOCKET).unlink()


class reachable:
    """The socket's path in a form short enough for the system, which allows about 100 bytes."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._fd = -1

    def __enter__(self) -> Path:
        path = self._cache / SOCKET
        if len(os.fsencode(path)) <= _LONGEST or not Path("/proc/self/fd").is_dir():
            return path
        self._fd = os.open(self._cache, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return Path(f"/proc/self/fd/{self._fd}/{SOCKET}")

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)


async def _answer(request: web.Request, operations: Operations) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    try:
        # Closed at once when who asked leaves: what was begun for him stops.
        async with aclosing(perform(operations, request.match_info["verb"], await request.json())) as lines:
            async for line in lines:
                await response.write(json.dumps(line).encode() + b"\n")
    except NearhubError as exc:
        await response.write(json.dumps({"error": exc.message, "fault": exc.fault}).encode() + b"\n")
    await response.write_eof()
    return response


async def perform(operations: Operations, verb: str, arguments: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    """Lines of one verb's answer, on a running mirror or not: progress, then {"result": …}. Raises NearhubError."""
    match verb:
        case "verify":
            last: dict[str, Any] = {}
            async for last in operations.verify():
                if "done" in last:
                    yield last
            yield {"result": last}
        case "prefetch":
            async with aclosing(operations.prefetch(**arguments)) as lines:
                async for line in lines:
                    yield line
        case "ls" | "du" | "stats" | "purge" | "why" | "offline" | "pin" | "unpin" | "pins" | "prove":
            yield {"result": await getattr(operations, verb)(**arguments)}
        case "export" | "import" | "import-hf-cache":
            async with aclosing(operations.carry(verb, arguments)) as lines:
                async for line in lines:
                    yield line
        case _:
            raise BadTarget(f"there is no verb {verb!r}")
