"""Which hosts an upstream may send us to (SSRF). Pure, but for GuardedResolver, which checks what names resolve to.

A redirect is followed to the upstream's own origin and to listed hosts only; https never becomes http unless the operator named
the host with http; a host that the operator did not name must resolve to public addresses.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from nearhub.errors import UpstreamFailed

_DEFAULT_PORTS = {"https": 443, "http": 80}


@dataclass(frozen=True, slots=True)
class HostRule:
    """`port` None: the scheme's default. `is_named`: by the operator, so private addresses are what he wants."""

    host: str
    port: int | None = None
    plain_http: bool = False
    is_named: bool = True


class HostPolicy:
    """The closed list of origins that content may come from."""

    def __init__(self, upstream_urls: Iterable[str], rules: Iterable[HostRule]) -> None:
        self._origins = frozenset(URL(url).origin() for url in upstream_urls)
        self._rules = tuple(rules)

    def check(self, url: URL) -> None:
        """Raises UpstreamFailed, naming the host and the setting, unless `url` may be fetched."""
        if url.origin() in self._origins:
            return
        if any(_rule_allows(rule, url) for rule in self._rules):
            return
        raise UpstreamFailed(
            f"upstream redirects to {url.scheme}://{url.host}:{url.port}, which is not allowed: "
            "if it is right, add it to [upstream] blob_hosts"
        )

    def is_named(self, host: str) -> bool:
        """Whether the operator wrote this host down himself."""
        named = {rule.host for rule in self._rules if rule.is_named} | {origin.host for origin in self._origins}
        return host in named


def _rule_allows(rule: HostRule, url: URL) -> bool:
    if url.host != rule.host or url.scheme not in _DEFAULT_PORTS or url.user is not None:
        return False
    if url.scheme == "http" and not rule.plain_http:
        return False
    return url.port == (rule.port or _DEFAULT_PORTS[url.scheme])


def is_public(address: str) -> bool:
    """Whether an IP address text is one of the open Internet; IPv4 inside IPv6 counts as what it is inside."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


class GuardedResolver(AbstractResolver):
    """Resolves names; for hosts that the operator did not name, private addresses are refused.

    aiohttp connects to the very addresses returned here, so a second answer (DNS rebinding) cannot slip in between.
    """

    def __init__(self, policy: HostPolicy) -> None:
        self._policy = policy
        self._inner = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        results = await self._inner.resolve(host, port, family)
        if self._policy.is_named(host):
            return results
        public = [result for result in results if is_public(result["host"])]
        if not public:
            raise OSError(None, f"{host} resolves to private addresses only; name it in [upstream] blob_hosts to allow that")
        return public

    async def close(self) -> None:
        await self._inner.close()
