"""The shape of a request, before anybody looks at what it asks for: version, target form, method, Host, framing. Pure.

What the parser of the server refuses itself (two Hosts, obs-fold, a length beside chunks …) never comes here.
"""

from __future__ import annotations

import functools
import re

from nearhub.errors import ClientError, HostRejected, Malformed, ReadOnly, VersionRefused

METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST"})
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]{0,5})?\Z", re.ASCII)


def refusal(*, version: tuple[int, int], method: str, target: str, host: str | None, is_chunked: bool) -> ClientError | None:
    """Why a request of this shape gets no answer; None: it may be looked at. `is_chunked`: it has a Transfer-Encoding."""
    if version != (1, 1):
        if version[0] == 0:
            return Malformed("the request line has no HTTP version, or one of a time before headers")
        if version[0] != 1:
            return VersionRefused(f"this mirror speaks HTTP/1.1 here, not HTTP/{version[0]}.{version[1]}")
        if is_chunked:
            return Malformed("HTTP/1.0 has no Transfer-Encoding: where this request ends cannot be told (RFC 9112 §6.1)")
    if host is None and version != (1, 0):
        return Malformed("the request has no Host")
    if host is not None and not _is_host(host):
        return Malformed("the Host header is no host and port")
    if method not in METHODS:
        return ReadOnly("this is a read-only mirror: write to the Hub itself")
    if target == "*" and method == "OPTIONS":
        return None
    if not target.startswith("/"):
        return HostRejected("this is a mirror, not a forward proxy: ask for paths, and set HF_ENDPOINT instead of HTTP_PROXY")
    return None


@functools.lru_cache(1024)
def _is_host(text: str) -> bool:
    """RFC 3986 §3.2.2, with a port."""
    return _HOST.match(text) is not None
