"""Which hosts an upstream may send us to (SSRF). Pure, but for GuardedResolver, which checks what names resolve to.

A redirect is followed to the upstream's own origin and to listed hosts only; https never becomes http unless the operator named
the host with http; a host that the operator did not name must resolve to public addresses.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from nearhub.errors import UpstreamFailed

_DEFAULT_PORTS = {"https": 443, "http": 80}
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class HostRule:
    """`port` None: the scheme's default. `is_named`: by the operator, so private addresses are what he wants."""

    host: str
    port: int | None = None
    plain_http: bool = False
    is_named: bool = True


class HostPolicy:
    """The closed list of origins that content may come from. `proxy_urls`: outbound proxies, which the operator named too."""

    def __init__(self, upstream_urls: Iterable[str], rules: Iterable[HostRule], proxy_urls: Iterable[str] = ()) -> None:
        self._origins = frozenset(_origin(URL(url)) for url in upstream_urls)
        self._rules = tuple(replace(rule, host=_ascii(rule.host)) for rule in rules)
        self._named = {rule.host for rule in self._rules if rule.is_named} | {host for _, host, _ in self._origins}
        self._named |= {_ascii(URL(url).host or "") for url in proxy_urls}

    def check(self, url: URL) -> None:
        """Raises UpstreamFailed, naming the host and the setting, unless `url` may be fetched."""
        try:
            scheme, host, port = origin = _origin(url)
        except ValueError:  # no host: file:, data:, javascript:
            raise UpstreamFailed(f"upstream redirects to a {url.scheme or 'relative'!r} URL, which is not allowed") from None
        if origin in self._origins:
            return
        if url.user is None and any(_rule_allows(rule, origin) for rule in self._rules):
            return
        raise UpstreamFailed(
            f"upstream redirects to {scheme}://{host}:{port}, which is not allowed: "
            "if it is right, add it to [upstream] blob_hosts"
        )

    def is_named(self, host: str) -> bool:
        """Whether the operator wrote this host down himself."""
        return host.lower() in self._named


def _ascii(host: str) -> str:
    """As it stands in URLs and is asked of DNS: lower case, punycode."""
    return URL.build(scheme="https", host=host).raw_host or ""


def _origin(url: URL) -> tuple[str, str, int]:
    """(scheme, host, port), comparable however the URL is spelled. ValueError when it has no host."""
    if not url.raw_host or url.port is None:
        raise ValueError("no host")
    return url.scheme, url.raw_host.lower(), url.port


def _rule_allows(rule: HostRule, origin: tuple[str, str, int]) -> bool:
    scheme, host, port = origin
    if host != rule.host or scheme not in _DEFAULT_PORTS:
        return False
    if scheme == "http" and not rule.plain_http:
        return False
    return port == (rule.port or _DEFAULT_PORTS[scheme])


def is_public(address: str) -> bool:
    """Whether an IP address text is one of the open Internet; IPv4 inside IPv6 counts as what it is inside."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF) if ip in _NAT64 else None)
        if inner is not None:
            ip = inner
        elif ip not in _GLOBAL_UNICAST:  # is_global alone lets fec0:: and ::10.0.0.1 through
            return False
    return ip.is_global and not ip.is_multicast


class GuardedResolver(AbstractResolver):
    """Resolves names; for hosts that the operator did not name, private addresses are refused.

    aiohttp connects to the very addresses returned here, so a second answer (DNS rebinding) cannot slip in between.
    """

    def __init__(self, policy: HostPolicy, inner: AbstractResolver | None = None) -> None:
        self._policy = policy
        self._inner = inner or ThreadedResolver()

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
