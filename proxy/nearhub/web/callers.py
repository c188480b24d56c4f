"""Who a request is from: its address, and the token that it brings. The only reader of the Authorization header."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from nearhub.store.tokens import TokenFile
from nearhub.wire.credentials import EVERYONE, Caller, caller_of, is_for_others


@dataclass(frozen=True, slots=True)
class Callers:
    """`tokens`: the mirror's own; any other is the Hub's."""

    tokens: TokenFile

    def of(self, request: web.BaseRequest) -> Caller:
        """Raises BadTarget for a header that is no credential."""
        address, brought = request.remote or "unknown", request.headers.get("Authorization", "")
        return caller_of(address, brought, self.tokens.read()) if brought else Caller(address)

    def named(self, address: str, name: str) -> Caller:
        """Who has the local token of that name; nobody in particular, once there is none."""
        local = next((local for local in self.tokens.read().values() if local.name == name), None)
        return Caller(address) if local is None else Caller(address, None, name, local.groups | {EVERYONE})

    def for_a_site(self, request: web.BaseRequest) -> str | None:
        """The Authorization header for a site other than the Hub: never one that holds this mirror's or the Hub's token."""
        brought = request.headers.get("Authorization", "")
        return brought if brought and is_for_others(brought, self.tokens.read()) else None
