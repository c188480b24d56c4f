"""What goes to a site and what comes from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from nearhub.errors import BadTarget, ClientError, NotRoutable
from nearhub.wire.fields import Fields
from nearhub.wire.sites import MOUNT, Site, conditions_of, guards, passed_on, relocated, sent_to, split
from nearhub.wire.target import split_prefix

SITE = Site("s", "https://files.example.org/pub")
HERE = "http://mirror:8090/p/-/sites/s"


@pytest.mark.parametrize(
    ("raw", "name", "tail"),
    [
        ("/-/sites/s/", "s", "/"),
        ("/-/sites/s/a/b.whl", "s", "/a/b.whl"),
        ("/-/sites/s/a%20b/", "s", "/a%20b/"),
        ("/-/sites/s/a?x=../..&y=%2F", "s", "/a?x=../..&y=%2F"),
        ("/-/sites/s/?", "s", "/?"),
        ("/-/sites/s/..a/...", "s", "/..a/..."),
        ("/-/sites/s/%25%32%65/x", "s", "/%25%32%65/x"),
        ("/-/sites/s/@evil.example/x", "s", "/@evil.example/x"),
    ],
)
def test_the_rest_of_the_url_is_the_sites(raw: str, name: str, tail: str) -> None:
    """Byte for byte, its query too."""
    assert split(split_prefix(raw, ""), raw) == (name, tail)


@pytest.mark.parametrize(
    "raw",
    [
        "/-/sites/s/../x",
        "/-/sites/s/a/..",
        "/-/sites/s/%2e%2e/x",
        "/-/sites/s/a/.%2E",
        "/-/sites/s/./x",
        "/-/sites/s/..%2fx",
        "/-/sites/s/..%5cx",
        "/-/sites/s/a\\b",
        "/-/sites/s/%00",
        "/-/sites/s/%0d%0aX:1",
        "/-/sites/s/é",
        "/-/sites/s/a b",
        "/-/sites/s/" + 9000 * "a",
    ],
)
def test_nothing_leads_out_of_it(raw: str) -> None:
    """400: no dot segments in any spelling, no control bytes, no backslashes, nothing that should have been encoded."""
    with pytest.raises(BadTarget):
        split(split_prefix(raw, ""), raw)


def test_a_site_without_its_slash_is_no_page() -> None:
    """Relative links on it would lead elsewhere."""
    with pytest.raises(NotRoutable):
        split("/-/sites/s", "/-/sites/s")


@given(st.text(st.characters(codec="utf-8", categories=["L", "P", "N", "S"]), max_size=40))
def test_whatever_is_asked_stays_below_the_sites_url(rest: str) -> None:
    """Refused, or a URL of the same origin whose path, as every parser reads it, starts with the site's."""
    raw = MOUNT + "s/" + rest
    try:
        _, tail = split(split_prefix(raw, ""), raw)
    except ClientError:
        return
    url = URL(SITE.url + tail, encoded=True)
    assert url.origin() == URL(SITE.url).origin()
    assert URL(str(url)).path.startswith("/pub/")


def test_what_is_sent() -> None:
    """What is of this connection, of this client or of the mirror's origin stays here."""
    asked = Fields(
        [
            ("Host", "mirror"),
            ("Accept", "a"),
            ("Foo", "1"),
            ("Connection", "close, X-Hop"),
            ("X-Hop", "1"),
            ("TE", "trailers"),
            ("Cookie", "a=b"),
            ("Authorization", "Bearer x"),
            ("X-Forwarded-For", "10.0.0.1"),
            ("Forwarded", "for=10.0.0.1"),
            ("Range", "bytes=0-1"),
            ("Content-Length", "5"),
            ("If-None-Match", '"x"'),
        ]
    )
    assert sent_to(asked, None, []).pairs == (("Accept", "a"), ("Foo", "1"), ("Via", "1.1 nearhub"))
    sent = sent_to(asked, "Basic eA==", conditions_of(asked))
    assert sent.get("Authorization") == "Basic eA==" and sent.get("Range") == "bytes=0-1" and sent.get("If-None-Match") == '"x"'


def test_what_is_passed_on() -> None:
    """Nothing that holds for a connection, for all of an origin, or that could not be written again."""
    said = Fields(
        [
            ("A", "1"),
            ("Connection", "B"),
            ("B", "2"),
            ("Keep-Alive", "x"),
            ("Transfer-Encoding", "chunked"),
            ("Set-Cookie", "a=b"),
            ("Strict-Transport-Security", "max-age=9"),
            ("Clear-Site-Data", "*"),
            ("C", "\udcfc"),
            ("D", "a\rb"),
            ("Content-Length", "5"),
            ("E", "a\tb"),
        ]
    )
    assert passed_on(said).pairs == (("A", "1"), ("E", "a\tb"))


@pytest.mark.parametrize(
    ("location", "seen"),
    [
        ("https://files.example.org/pub/a/", f"{HERE}/a/"),
        ("https://files.example.org/pub", HERE),
        ("https://files.example.org/pub?x", f"{HERE}?x"),
        ("/pub/a", f"{HERE}/a"),
        ("//files.example.org/pub/a", f"{HERE}/a"),
        ("a/b", "a/b"),
        ("/other/a", "https://files.example.org/other/a"),
        ("/public/a", "https://files.example.org/public/a"),
        ("https://files.example.org/public", "https://files.example.org/public"),
        ("https://files.example.org.evil.example/pub/a", "https://files.example.org.evil.example/pub/a"),
        ("http://169.254.169.254/pub", "http://169.254.169.254/pub"),
        ("", ""),
    ],
)
def test_redirects_are_told_and_not_followed(location: str, seen: str) -> None:
    """Those that stay below the site stay on the mirror; others are the client's to follow."""
    assert relocated(location, SITE, HERE) == seen


def test_a_page_of_a_site_shows_and_does_not_run() -> None:
    """It has the mirror's origin."""
    assert guards(Fields([("Content-Type", "text/html; charset=utf-8")])) == {"Content-Security-Policy": "sandbox"}
    held = Fields([("Content-Type", "image/svg+xml"), ("Content-Security-Policy", "default-src 'self'")])
    assert guards(held) == {"Content-Security-Policy": "default-src 'self', sandbox"}
    assert guards(Fields([("Content-Type", "application/zip")])) == {} == guards(Fields())
