"""A public mirror, as there are some: it passes everything on to the Hub, with the Hub's own redirects and links in it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from yarl import URL

AGENT = "a public mirror"
_ENDS_HERE = {"host", "connection", "keep-alive", "transfer-encoding", "user-agent", "content-length"}


@dataclass(slots=True)
class PublicMirror:
    """`asked`: method and raw path, in order."""

    url: str = ""
    asked: list[str] = field(default_factory=list)


@asynccontextmanager
async def public_mirror(hub_url: str) -> AsyncIterator[PublicMirror]:
    """On a free port. What it asks of the Hub carries AGENT."""
    front = PublicMirror()
    async with aiohttp.ClientSession(auto_decompress=False) as session:

        async def pass_on(request: web.Request) -> web.Response:
            front.asked.append(f"{request.method} {request.raw_path}")
            headers = {key: value for key, value in request.headers.items() if key.lower() not in _ENDS_HERE}
            where = URL(hub_url + request.raw_path, encoded=True)
            body = await request.read()
            async with session.request(
                request.method, where, headers=headers | {"User-Agent": AGENT}, data=body or None, allow_redirects=False
            ) as answer:
                kept = [(key, value) for key, value in answer.headers.items() if key.lower() not in _ENDS_HERE]
                response = web.Response(status=answer.status, headers=kept, body=await answer.read())
                if request.method == "HEAD" and "Content-Length" in answer.headers:
                    response.headers["Content-Length"] = answer.headers["Content-Length"]
                return response

        app = web.Application(client_max_size=8 * 1024**2)
        app.router.add_route("*", r"/{path:[\s\S]*}", pass_on)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            front.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield front
        finally:
            await runner.cleanup()
