"""RFC 9111 as a table of decisions. The public suite (tests/faults) asks the same of the whole mirror, over sockets."""

from __future__ import annotations

import json
from dataclasses import replace
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.wire.fields import Fields
from nearhub.wire.freshness import Decision
from nearhub.wire.http_cache import (
    Stored,
    age_s,
    answer,
    decide,
    fits,
    freshened,
    lifetime_s,
    may_serve_stale,
    may_store,
    validators,
    variant_of,
)
from nearhub.wire.spans import Span

T = 1_800_000_000.0
NONE = Fields()


def fields(**named: str) -> Fields:
    return Fields((name.replace("_", "-"), value) for name, value in named.items())


def stored(status: int = 200, *, size: int = 10, asked: Fields = NONE, **named: str) -> Stored:
    held = fields(**{"Date": formatdate(T, usegmt=True), **named})
    return Stored(status, held, variant_of(asked, held), T, T, "body", size)


@pytest.mark.parametrize(
    ("named", "status", "may"),
    [
        ({"Cache_Control": "max-age=5"}, 200, True),
        ({"Cache_Control": "s-maxage=5"}, 500, True),
        ({"Expires": "0"}, 404, True),
        ({"ETag": '"x"'}, 200, True),
        ({"Last_Modified": "x"}, 301, True),
        ({"ETag": '"x"'}, 302, False),
        ({}, 200, False),
        ({"Cache_Control": "max-age=5, no-store"}, 200, False),
        ({"Cache_Control": "max-age=5, private"}, 200, False),
        ({"Cache_Control": 'max-age=5, private="x"'}, 200, False),
        ({"Cache_Control": "max-age=5, must-understand"}, 599, False),
        ({"Cache_Control": "max-age=5", "Vary": "a, *"}, 200, False),
        ({"Cache_Control": "max-age=5", "Vary": "Cookie"}, 200, False),
        ({"Cache_Control": "public, max-age=5", "Vary": "Authorization"}, 200, False),
        ({"Cache_Control": "max-age=5"}, 206, False),
        ({"Cache_Control": "max-age=5"}, 304, False),
        ({"Cache_Control": "max-age=5"}, 103, False),
    ],
)
def test_what_may_be_stored(named: dict[str, str], status: int, may: bool) -> None:
    """§3; and nothing whose choice hangs on a secret: that would have to be written down."""
    assert may_store(NONE, status, fields(**named)) is may
    assert not may_store(fields(Cache_Control="no-store"), status, fields(**named))


@pytest.mark.parametrize(
    ("said", "may"),
    [("max-age=5", False), ("public, max-age=5", True), ("s-maxage=5", True), ("must-revalidate, max-age=5", True)],
)
def test_what_was_given_to_a_token_is_for_others_only_where_its_answer_says_so(said: str, may: bool) -> None:
    """§3.5."""
    assert may_store(fields(Authorization="Bearer x"), 200, fields(Cache_Control=said)) is may


@pytest.mark.parametrize(
    ("named", "life"),
    [
        ({"Cache_Control": "max-age=5"}, 5),
        ({"Cache_Control": "max-age=5, s-maxage=9"}, 9),
        ({"Cache_Control": "max-age=x", "Expires": formatdate(T + 99, usegmt=True)}, 0),
        ({"Expires": formatdate(T + 99, usegmt=True)}, 99),
        ({"Expires": formatdate(T - 99, usegmt=True)}, 0),
        ({"Expires": "0"}, 0),
        ({"Last_Modified": formatdate(T - 10**6, usegmt=True)}, 0),
    ],
)
def test_how_long_it_is_fresh(named: dict[str, str], life: int) -> None:
    """§4.2.1, without heuristics."""
    assert lifetime_s(stored(**named)) == life


def test_its_age_counts_the_way_here() -> None:
    """§4.2.3: by Age and the time that asking took, or by its Date, whichever is more; then the time it lay here."""
    assert age_s(stored(), T + 7) == 7
    assert age_s(stored(Age="100"), T + 7) == 107
    assert age_s(replace(stored(Age="100"), asked_at=T - 3), T + 7) == 110
    assert age_s(stored(Date=formatdate(T - 500, usegmt=True), Age="100"), T + 7) == 507
    assert age_s(stored(Age="junk"), T + 7) == 7
    assert age_s(stored(Age="9, 100"), T) == 9
    assert age_s(stored(), T - 50) == 0


USE, AGAIN, FETCH, FAIL, MEANWHILE = (
    Decision.USE,
    Decision.REVALIDATE,
    Decision.FETCH,
    Decision.FAIL,
    Decision.USE_AND_REFRESH,
)


@pytest.mark.parametrize(
    ("wants", "said", "age", "decision"),
    [
        ("", "max-age=10", 9, USE),
        ("", "max-age=10", 10, AGAIN),
        ("", "max-age=10", -1, AGAIN),
        ("", "max-age=10, no-cache", 0, AGAIN),
        ("no-cache", "max-age=10", 0, AGAIN),
        ("max-age=5", "max-age=10", 5, USE),
        ("max-age=5", "max-age=10", 6, AGAIN),
        ("min-fresh=5", "max-age=10", 4, USE),
        ("min-fresh=5", "max-age=10", 5, AGAIN),
        ("max-stale", "max-age=10", 99, USE),
        ("max-stale=5", "max-age=10", 15, USE),
        ("max-stale=5", "max-age=10", 16, AGAIN),
        ("max-stale", "max-age=10, must-revalidate", 11, AGAIN),
        ("max-stale", "s-maxage=10", 11, AGAIN),
        ("", "max-age=10, stale-while-revalidate=5", 14, MEANWHILE),
        ("", "max-age=10, stale-while-revalidate=5", 15, AGAIN),
        ("", "max-age=10, stale-while-revalidate=5, proxy-revalidate", 14, AGAIN),
        ("only-if-cached", "max-age=10", 5, USE),
        ("only-if-cached", "max-age=10", 11, FAIL),
    ],
)
def test_what_is_done(wants: str, said: str, age: int, decision: Decision) -> None:
    """§4 and §5.2, RFC 5861 §3."""
    asked = fields(Cache_Control=wants) if wants else NONE
    assert decide(asked, stored(Cache_Control=said), T + age) is decision


def test_without_anything_stored_the_site_is_asked() -> None:
    """Unless the client wants only what is here; and a Pragma counts where no Cache-Control stands."""
    assert decide(NONE, None, T) is FETCH
    assert decide(fields(Cache_Control="only-if-cached"), None, T) is FAIL
    assert decide(fields(Pragma="no-cache"), stored(Cache_Control="max-age=9"), T) is AGAIN
    assert decide(fields(Pragma="no-cache", Cache_Control="x"), stored(Cache_Control="max-age=9"), T) is USE


@pytest.mark.parametrize(
    ("said", "age", "may"),
    [
        ("max-age=10", 10**6, True),
        ("max-age=10, stale-if-error=5", 15, True),
        ("max-age=10, stale-if-error=5", 16, False),
        ("max-age=10, must-revalidate, stale-if-error=99", 11, False),
        ("s-maxage=10", 11, False),
        ("no-cache", 11, False),
    ],
)
def test_stale_when_the_site_fails(said: str, age: int, may: bool) -> None:
    """§4.2.4, RFC 5861 §4: what forbids it wins; a bound is kept."""
    assert may_serve_stale(stored(Cache_Control=said), T + age) is may


def test_what_vary_names_must_be_the_same() -> None:
    """§4.1: absent is not empty, white space in lists is nothing, order and case of values are something."""
    asked = Fields([("Accept", "a,b"), ("Foo", "1")])
    held = stored(asked=asked, Vary="accept, FOO")
    assert fits(asked, held)
    assert fits(Fields([("foo", "1"), ("accept", "a"), ("Accept", " b"), ("Bar", "9")]), held)
    for other in ([("Accept", "b, a"), ("Foo", "1")], [("Accept", "a, b")], [("Accept", "a, b"), ("Foo", "")]):
        assert not fits(Fields(other), held)
    assert fits(Fields([("Any", "thing")]), stored())


def test_a_304_brings_it_up_to_date() -> None:
    """§3.2: its headers replace the old ones, but for those of the body; Age is not carried on."""
    held = stored(ETag='"x"', Cache_Control="max-age=1", A="1", Age="5", Content_Encoding="gzip")
    news = Fields([("etag", 'W/"x"'), ("A", "2"), ("A", "3"), ("Content-Encoding", "br"), ("Cache-Control", "max-age=9")])
    fresh = freshened(held, news, T + 50, T + 51)
    assert fresh is not None and (fresh.body, fresh.size, fresh.variant) == (held.body, held.size, held.variant)
    assert fresh.fields.all("A") == ["2", "3"] and fresh.fields.get("Content-Encoding") == "gzip"
    assert lifetime_s(fresh) == 9 and fresh.fields.get("ETag") == '"x"' and "Age" not in fresh.fields
    assert (fresh.asked_at, fresh.got_at) == (T + 50, T + 51)
    assert freshened(held, fields(ETag='"y"'), T, T) is None
    assert validators(held.fields) == {"If-None-Match": '"x"'} and validators(NONE) == {}


LM = formatdate(T - 1000, usegmt=True)


@pytest.mark.parametrize(
    ("asked", "status", "span"),
    [
        ({}, 200, Span(0, 10)),
        ({"If_None_Match": '"x"'}, 304, None),
        ({"If_None_Match": 'W/"x"'}, 304, None),
        ({"If_None_Match": '"a", "x"'}, 304, None),
        ({"If_None_Match": "*"}, 304, None),
        ({"If_None_Match": '"y"', "If_Modified_Since": LM}, 200, Span(0, 10)),
        ({"If_Modified_Since": LM}, 304, None),
        ({"If_Modified_Since": formatdate(T - 1001, usegmt=True)}, 200, Span(0, 10)),
        ({"If_Modified_Since": "junk"}, 200, Span(0, 10)),
        ({"Range": "bytes=2-4"}, 206, Span(2, 5)),
        ({"Range": "bytes=-3"}, 206, Span(7, 10)),
        ({"Range": "bytes=8-"}, 206, Span(8, 10)),
        ({"Range": "bytes=10-"}, 416, None),
        ({"Range": "bytes=0-1,3-4"}, 200, Span(0, 10)),
        ({"Range": "lines=0-1"}, 200, Span(0, 10)),
        ({"Range": "bytes=2-4", "If_Range": '"x"'}, 206, Span(2, 5)),
        ({"Range": "bytes=2-4", "If_Range": 'W/"x"'}, 200, Span(0, 10)),
        ({"Range": "bytes=2-4", "If_Range": '"y"'}, 200, Span(0, 10)),
        ({"Range": "bytes=2-4", "If_Range": LM}, 206, Span(2, 5)),
        ({"Range": "bytes=2-4", "If_Range": formatdate(T - 999, usegmt=True)}, 200, Span(0, 10)),
        ({"Range": "bytes=2-4", "If_None_Match": '"x"'}, 304, None),
    ],
)
def test_what_is_answered_from_it(asked: dict[str, str], status: int, span: Span | None) -> None:
    """RFC 9110 §13.2.2: If-None-Match, else If-Modified-Since, then Range under If-Range."""
    held = stored(ETag='"x"', Last_Modified=LM, Cache_Control="max-age=9", Content_Type="a/b")
    told = answer(fields(**asked), held, T + 4)
    assert (told.status, told.span) == (status, span)
    assert (
        told.fields.get("Age") == "4" and told.fields.get("ETag") == '"x"' and told.fields.get("Cache-Control") == "max-age=9"
    )
    assert ("Content-Type" in told.fields) is (status != 304)
    ranged = {206: f"bytes {span.start}-{span.stop - 1}/10" if span else "", 416: "bytes */10"}
    assert told.fields.get("Content-Range") == ranged.get(status)


def test_what_is_no_200_is_answered_as_it_is() -> None:
    """Conditions and ranges are about what a 200 would say (RFC 9110 §13.2.1)."""
    told = answer(fields(Range="bytes=0-1", If_None_Match="*"), stored(404, ETag='"x"'), T)
    assert (told.status, told.span) == (404, Span(0, 10))


def test_a_weak_validator_joins_no_bytes() -> None:
    """A Last-Modified of the answer's own second may have changed since; a weak ETag says only that it means the same."""
    now = formatdate(T, usegmt=True)
    assert answer(fields(Range="bytes=0-1", If_Range=now), stored(Last_Modified=now), T).status == 200
    assert answer(fields(Range="bytes=0-1", If_Range='W/"x"'), stored(ETag='W/"x"'), T).status == 200


TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


@given(
    st.lists(
        st.tuples(st.sampled_from(["Cache-Control", "Vary", "ETag", "Expires", "Age", "Date", "Range", "If-Range"]), TEXTS)
    )
)
def test_any_headers_can_be_decided_about(pairs: list[tuple[str, str]]) -> None:
    """Whatever a client or a site says: an answer, never an error; and it survives its row."""
    said = Fields(pairs)
    held = Stored(200, said, variant_of(said, said), T, T, "body", 10)
    assert Stored.read(json.loads(json.dumps(held.row()))) == held
    assert fits(said, held)
    may_store(said, 200, said)
    may_serve_stale(held, T)
    decide(said, held, T + 5)
    assert answer(said, held, T + 5).status in (200, 206, 304, 416)
