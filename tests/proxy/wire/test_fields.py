"""Header sections: lists over several lines, directives, dates."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.wire.fields import Fields, directives, http_date, items, seconds

NOW = datetime(2026, 11, 28, tzinfo=UTC).timestamp()
TOKENS = st.text("abcdefgh-", min_size=1, max_size=8)


def test_names_have_no_case_and_lines_are_one_list() -> None:
    """What proxies may do to a message changes nothing."""
    fields = Fields([("Vary", "a"), ("ETag", '"x"'), ("vary", " b ")])
    assert fields.all("VARY") == ["a", "b"] and fields.get("etag") == '"x"' and fields.get("Date") is None
    assert "vAry" in fields and "Date" not in fields
    assert fields.joined("Vary") == "a, b" and fields.joined("Date") is None
    assert fields.flat() == {"Vary": "a, b", "ETag": '"x"'}
    assert fields.without(["vary"]).pairs == (("ETag", '"x"'),)
    assert fields == Fields(fields.pairs) and fields != Fields() and "x" not in repr(fields)
    assert items(["A, b", " ,C"]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no-store", {"no-store": ""}),
        ("Max-Age=5 , PUBLIC", {"max-age": "5", "public": ""}),
        ('max-age="5", private="a, b"', {"max-age": "5", "private": "a, b"}),
        ('ext="a\\"b, no-store", max-age=1', {"ext": 'a\\"b, no-store', "max-age": "1"}),
        ("max-age =5, no-store", {"no-store": ""}),
        ("max-age= 5", {}),
        ("max-age=9, max-age=3", {"max-age": "3"}),
        ("max-age=3, max-age=9", {"max-age": "3"}),
        ("max-age=9, max-age=x", {"max-age": "x"}),
        ('a="b, no-store', {"no-store": ""}),
        (", ,,", {}),
        ("", {}),
    ],
)
def test_directives(text: str, found: dict[str, str]) -> None:
    """Of two, the stricter; what is malformed is skipped, and hides nothing behind it."""
    assert directives([text]) == found
    assert directives(["x", text]) == {"x": ""} | found


@given(st.text(max_size=60))
def test_directives_of_any_text(text: str) -> None:
    """Never an error, never an endless loop; names are tokens."""
    assert all(name and name == name.lower() and "," not in name for name in directives([text]))


@given(st.dictionaries(TOKENS, st.integers(0, 10**6), max_size=5))
def test_directives_come_back(said: dict[str, int]) -> None:
    """Whatever lists of arguments say is found, split over lines or not."""
    texts = [f"{name}={value}" for name, value in said.items()]
    expected = {name: str(value) for name, value in said.items()}
    assert directives(texts) == directives([", ".join(texts)]) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("60", 60), ("99999999999999999999", 2**31), ("-1", 0), ("1.5", 0), ("", 0), ("٣", 0), (" 5", 0), ("5a", 0)],
)
def test_seconds(text: str, value: int) -> None:
    """What is no number of seconds is none."""
    assert seconds(text) == value


@given(st.datetimes(datetime(1970, 1, 1), datetime(2069, 12, 31)))
def test_a_date_in_each_of_its_forms(at: datetime) -> None:
    """RFC 9110 §5.6.7: the one to write, and the two to read; the last for dates that it can name."""
    at = at.replace(microsecond=0, tzinfo=UTC)
    assert http_date(format_datetime(at, usegmt=True), NOW) == at.timestamp()
    assert http_date(f"{at:%a %b} {at.day:2d} {at:%H:%M:%S %Y}", NOW) == at.timestamp()
    if 1977 <= at.year <= 2075:
        assert http_date(f"{at:%A, %d-%b-%y %H:%M:%S} GMT", NOW) == at.timestamp()


@pytest.mark.parametrize(
    "text",
    [
        None,
        "0",
        "-1",
        "Sat, 28 Nov 2026 00:00:00 CET",
        "Sat 28 Nov 2026 00:00:00 GMT",
        "Sat, 31 Feb 2026 00:00:00 GMT",
        "Sat, 28 Foo 2026 00:00:00 GMT",
        "Sat, 28 Nov 2026 24:00:00 GMT",
        "Sat, 28 Nov 0000 00:00:00 GMT",
        "Sat, 28 Nov 2026 00:00:00 GMT\n",
    ],
)
def test_what_is_no_date(text: str | None) -> None:
    """None, never an error and never a guess."""
    assert http_date(text, NOW) is None


@given(st.text(max_size=40))
def test_a_date_of_any_text(text: str) -> None:
    """A number or None."""
    assert http_date(text, NOW) is None or text.isascii()
