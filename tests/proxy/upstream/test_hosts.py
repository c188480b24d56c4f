"""Which hosts an upstream may send us to, and which addresses their names may have (SSRF)."""

from __future__ import annotations

import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from nearhub.errors import UpstreamFailed
from nearhub.upstream.hosts import GuardedResolver, HostPolicy, HostRule, is_public

POLICY = HostPolicy(
    ["https://hub.example", "http://10.1.2.3:8080/prefix"],
    [
        HostRule("cdn.example", is_named=False),
        HostRule("named.example"),
        HostRule("ported.example", 8443),
        HostRule("plain.example", plain_http=True),
        HostRule("plain-ported.example", 9000, plain_http=True),
        HostRule("bücher.example"),
        HostRule("fd00::1", 8443),
    ],
)


def allows(url: str) -> bool:
    try:
        POLICY.check(URL(url, encoded=True))
    except UpstreamFailed:
        return False
    return True


class TestHostPolicy:
    @pytest.mark.parametrize(
        "url",
        [
            "https://hub.example/x?y",
            "https://hub.example:443/x",
            "https://HUB.Example/x",
            "http://10.1.2.3:8080/elsewhere",
            "https://cdn.example/x",
            "https://cdn.example:443/x",
            "https://ported.example:8443/x",
            "http://plain.example/x",
            "http://plain.example:80/x",
            "https://plain.example/x",
            "http://plain-ported.example:9000/x",
            "https://plain-ported.example:9000/x",
            "https://xn--bcher-kva.example/x",
            "https://[fd00::1]:8443/x",
        ],
    )
    def test_the_upstreams_own_origins_and_listed_hosts_are_allowed(self, url: str) -> None:
        """A host at its scheme's default port, a host with port at exactly that one."""
        assert allows(url)

    @pytest.mark.parametrize(
        "url",
        [
            "http://hub.example/x",
            "https://hub.example:8443/x",
            "https://evil.hub.example/x",
            "https://hub.example.evil/x",
            "https://hub.example./x",
            "http://10.1.2.3/x",
            "https://10.1.2.3:8080/x",
            "http://cdn.example/x",
            "https://cdn.example:8443/x",
            "https://ported.example/x",
            "https://ported.example:443/x",
            "https://ported.example:8444/x",
            "http://ported.example:8443/x",
            "http://named.example/x",
            "http://plain.example:8080/x",
            "http://plain-ported.example/x",
            "https://other.example/x",
            "https://169.254.169.254/latest/meta-data",
            "http://127.0.0.1/x",
            "https://[::1]/x",
            "https://user:secret@cdn.example/x",
            "https://user@cdn.example/x",
            "https://cdn.example@evil.example/x",
            "https://bucher.example/x",
            "https://сdn.example/x",
            "https://xn--dn-vmc.example/x",
            "https://CDN.example.evil/",
            "ftp://cdn.example/x",
            "ftp://hub.example/x",
            "file:///etc/passwd",
            "data:text/plain,x",
            "javascript:alert(1)",
            "/relative",
            "",
            "gopher://plain.example:80/x",
        ],
    )
    def test_everything_else_is_refused(self, url: str) -> None:
        """Other ports, downgrades to http, userinfo, look-alikes, addresses, and what has no host at all."""
        assert not allows(url)

    def test_the_refusal_names_the_host_and_the_setting_but_no_secret(self) -> None:
        """Signed URLs are secrets."""
        with pytest.raises(UpstreamFailed) as caught:
            POLICY.check(URL("https://u:pw@other.example:8443/path?Signature=abc", encoded=True))
        message = caught.value.message
        assert "https://other.example:8443, " in message and "[upstream] blob_hosts" in message
        assert not any(secret in message for secret in ("pw", "path", "Signature"))

    def test_named_is_what_the_operator_wrote_down(self) -> None:
        """His upstreams and his blob hosts, not the defaults; by the name that DNS is asked for."""
        named = ["hub.example", "10.1.2.3", "named.example", "xn--bcher-kva.example", "fd00::1"]
        assert all(POLICY.is_named(host) for host in named)
        assert not any(POLICY.is_named(host) for host in ("cdn.example", "evil.example", "x.named.example", ""))


class TestPublicAddresses:
    @pytest.mark.parametrize(
        "address",
        [
            "8.8.8.8",
            "1.1.1.1",
            "172.32.0.1",
            "100.63.255.255",
            "2606:4700::1111",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
            "2002:808:808::1",
        ],
    )
    def test_the_open_internet_is_public(self, address: str) -> None:
        assert is_public(address)

    @pytest.mark.parametrize(
        "address",
        [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "127.8.8.8",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.2.1",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::10.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::10.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::10.0.0.1",
            "2002:a00:1::1",
            "2002:7f00:1::1",
            "2001:db8::1",
            "2001:0:a00:1::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fe80::1%eth0",
            "fec0::1",
            "ff02::1",
            "ff0e::1",
        ],
    )
    def test_everything_else_is_not(self, address: str) -> None:
        """Private, link-local (cloud metadata), loopback, CGNAT, ULA, multicast; also written into an IPv6 address."""
        assert not is_public(address)


class FixedResolver(AbstractResolver):
    """Answers every name with the addresses it was given."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.is_closed = False

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0) for address in self.addresses
        ]

    async def close(self) -> None:
        self.is_closed = True


async def resolved(host: str, *addresses: str) -> list[str]:
    resolver = GuardedResolver(POLICY, FixedResolver(*addresses))
    return [result["host"] for result in await resolver.resolve(host, 443)]


class TestGuardedResolver:
    async def test_private_addresses_of_a_host_nobody_named_are_left_out(self) -> None:
        assert await resolved("cdn.example", "10.0.0.1", "8.8.8.8", "::1", "2606:4700::1") == ["8.8.8.8", "2606:4700::1"]

    @pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1", "fd00::1"])
    async def test_a_host_nobody_named_with_private_addresses_only_is_refused(self, address: str) -> None:
        """As an OSError, which the connector turns into a failed connection; the message names the setting."""
        with pytest.raises(OSError, match=r"cdn\.example .* blob_hosts"):
            await resolved("cdn.example", address)

    @pytest.mark.parametrize("host", ["named.example", "hub.example", "xn--bcher-kva.example"])
    async def test_a_host_that_the_operator_named_may_be_private(self, host: str) -> None:
        assert await resolved(host, "10.0.0.1", "8.8.8.8") == ["10.0.0.1", "8.8.8.8"]

    async def test_closing_it_closes_what_it_asks(self) -> None:
        inner = FixedResolver()
        await GuardedResolver(POLICY, inner).close()
        assert inner.is_closed
