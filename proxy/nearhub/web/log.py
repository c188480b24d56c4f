"""The transparency log over HTTP, as C2SP tlog-tiles has it: below `/-/log/`, open to everybody."""

from __future__ import annotations

import asyncio

from aiohttp import web

from nearhub.errors import BadProof, NotRoutable, ReadOnly
from nearhub.store.log import TransparencyLog
from nearhub.web.middleware import base_headers, metadata_status
from nearhub.wire.tlog import TileId

_FOR_EVER = "public, max-age=31536000, immutable"


class Log:
    """No state: the log's."""

    def __init__(self, record: TransparencyLog) -> None:
        self._record = record

    async def serve(self, request: web.BaseRequest, path: str) -> web.Response:
        """`path`: below the log. Raises NotRoutable for what the log does not have (yet)."""
        if request.method == "POST":
            raise ReadOnly("the log is read-only: this mirror alone adds to it")
        headers = base_headers(request) | {"Cache-Status": str(metadata_status())}
        if path in ("checkpoint", "vkey"):
            text = self._record.checkpoint if path == "checkpoint" else f"{self._record.key}\n"
            return web.Response(text=text, headers=headers | {"Cache-Control": "no-cache"})
        try:
            data = await asyncio.to_thread(self._record.read, TileId.from_path(path))
        except BadProof:
            data = None
        if data is None:
            raise NotRoutable(f"the log has no {path}: it has checkpoint, vkey, and the tiles that its checkpoint covers")
        headers |= {"Content-Type": "application/octet-stream", "Cache-Control": _FOR_EVER}
        return web.Response(body=data, headers=headers)
