"""Links: the mirror's own URL as this client sees it, for the URLs that stand in answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aiohttp import web

from nearhub.wire.target import split_prefix

_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?\Z", re.ASCII)
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)+\Z", re.ASCII)
_FORWARDED = ("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto")


class Links:
    """`public_url` and `prefix` as configured; `upstreams`: bases of URLs that must become ours."""

    def __init__(self, public_url: str, prefix: str, upstreams: Sequence[str]) -> None:
        self._public_url = public_url.rstrip("/")
        self._prefix = prefix
        self.upstreams = tuple(upstreams)

    def base(self, request: web.BaseRequest) -> str:
        """What this client has as HF_ENDPOINT: as configured, else as the front server says, else as the request came.

        A forged header changes nothing but the forger's own answer: answers are not kept with these in them.
        """
        if self._public_url:
            return self._public_url
        said = request.headers
        scheme = _first(said.get("X-Forwarded-Proto", ""))
        host = _first(said.get("X-Forwarded-Host", "")) or request.headers.get("Host", "")
        prefix = said.get("X-Forwarded-Prefix", "").rstrip("/")
        if not _PREFIX.match(prefix):
            raw = split_prefix(request.raw_path, "")
            is_under = raw == self._prefix or raw.startswith(f"{self._prefix}/")
            prefix = self._prefix if is_under or any(name in said for name in _FORWARDED) else ""
        scheme = scheme if scheme in ("http", "https") else request.scheme
        return f"{scheme}://{host if _HOST.match(host) else 'localhost'}{prefix}"

    def path(self, request: web.BaseRequest) -> str:
        """The request's path below base(), raw, without its query."""
        return split_prefix(request.raw_path, self._prefix)


def _first(value: str) -> str:
    return value.partition(",")[0].strip()
