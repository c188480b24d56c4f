"""Whether a request to a server of this machine was made by a web page of somebody else's. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress


def is_known_host(header: str, *names: str) -> bool:
    """Whether a Host header names an address, this machine, or one of `names`: a page of another name that was made to resolve
    to this machine (DNS rebinding) has its own name there."""
    match = re.match(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::\d{1,5})?\Z", header)
    if match is None:
        return False
    name = (match[1] or match[2]).lower()
    if name == "localhost" or name in map(str.lower, names):
        return True
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


def foreign(headers: Mapping[str, str], names: Sequence[str]) -> str | None:
    """Why a browser may have been made to send this, by a page that is not of this server; None: it was not. Programs send none
    of these headers but Host, which a browser never leaves out. `names`: as of is_known_host()."""
    host = headers.get("Host")
    if host is not None and not is_known_host(host, *names):
        return f"{host!r:.80} is no name of this server: ask by address, or let --allow-host NAME make it one"
    if (site := headers.get("Sec-Fetch-Site")) not in (None, "same-origin", "none"):
        return f"a web page of another origin asks (Sec-Fetch-Site: {site:.20}): only programs may"
    origin = headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != host:
        return f"a web page of another origin asks (Origin: {origin:.80}): only programs may"
    return None
