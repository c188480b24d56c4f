"""Who a request is from: its address, and the token that it brings. The only reader of the Authorization header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aiohttp import web

from nearhub.wire.credentials import EVERYONE, Caller, Local, caller_of


@dataclass(frozen=True, slots=True)
class Callers:
    """`locals_`: the mirror's own tokens, by their hash."""

    locals_: Mapping[str, Local] = field(default_factory=dict)

    def of(self, request: web.BaseRequest) -> Caller:
        """Raises BadTarget for a header that is no credential."""
        return caller_of(request.remote or "unknown", request.headers.get("Authorization", ""), self.locals_)

    def named(self, address: str, name: str) -> Caller:
        """Who has the local token of that name; nobody in particular, once there is none."""
        local = next((local for local in self.locals_.values() if local.name == name), None)
        return Caller(address) if local is None else Caller(address, None, name, local.groups | {EVERYONE})
