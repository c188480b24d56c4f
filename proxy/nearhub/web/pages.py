"""What a browser sees of a repo: a list of its files, with links and the commands to copy."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from nearhub.access import Access
from nearhub.errors import NotRoutable
from nearhub.resolve import Resolver
from nearhub.web.links import Links
from nearhub.wire.target import PageTarget


@dataclass(frozen=True, slots=True)
class Pages:
    """What answering needs."""

    access: Access
    resolver: Resolver
    links: Links

    async def serve(self, request: web.BaseRequest, target: PageTarget) -> web.StreamResponse:
        raise NotRoutable("…")
