"""The Range family: every range of small representations against slicing, and every malformed shape there is a name for."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nearhub.wire.ranges import (
    MAX_RANGES,
    Asked,
    Shape,
    Unsatisfiable,
    etag_matches,
    format_content_range,
    format_range,
    format_unsatisfied,
    if_range_holds,
    parse_content_range,
    parse_range,
)
from nearhub.wire.spans import Span

ETAG = "0a" * 20


def slices(specs: tuple[str, ...], size: int) -> list[bytes] | int:
    """What RFC 9110 §14 makes of well-formed `specs`, by slicing: the parts, [] for all of it, 416 for none."""
    data = bytes(range(size))
    parts: list[tuple[int, bytes]] = []
    for spec in specs:
        first, _, last = spec.partition("-")
        if first == "":
            start, part = max(0, size - int(last)), data[-int(last) :] if int(last) else b""
        elif last == "":
            start, part = int(first), data[int(first) :]
        elif int(last) < int(first):
            return []
        else:
            start, part = int(first), data[int(first) : int(last) + 1]
        if part:
            parts.append((start, part))
    if not parts:
        return 416
    taken = [i for start, part in parts for i in range(start, start + len(part))]
    return [part for _, part in parts] if len(set(taken)) == len(taken) else []


def parsed(header: str, size: int) -> list[bytes] | int:
    data = bytes(range(size))
    try:
        return [data[a.span.start : a.span.stop] for a in parse_range(header, size)]
    except Unsatisfiable:
        return 416


SPECS = (
    [f"{a}-{b}" for a in range(7) for b in range(7)]
    + [f"{a}-" for a in range(7)]
    + [f"-{n}" for n in range(7)]
    + ["0-99999999999999999999", "99999999999999999999-", "-99999999999999999999", "007-0008", "-007"]
)


class TestParseRange:
    @pytest.mark.parametrize("size", range(10))
    def test_every_single_range_is_the_slice_it_names(self, size: int) -> None:
        """Closed, open, suffix, reversed and huge ones, of representations of 0 to 9 bytes."""
        for spec in SPECS:
            assert parsed(f"bytes={spec}", size) == slices((spec,), size), spec

    @pytest.mark.parametrize("size", range(6))
    def test_every_pair_of_ranges_is_the_two_slices_or_nothing(self, size: int) -> None:
        """Overlapping ones get the whole representation, in either order; one that has no byte is left out."""
        small = [s for s in SPECS if len(s) <= 3 and "6" not in s]
        for pair in itertools.product(small, repeat=2):
            assert parsed("bytes=" + ",".join(pair), size) == slices(pair, size), pair

    def test_descending_ranges_keep_their_order(self) -> None:
        assert [a.span for a in parse_range("bytes=6-7, 3-4 ,0-0", 9)] == [Span(6, 8), Span(3, 5), Span(0, 1)]

    def test_the_shape_is_how_it_was_written_not_what_it_covers(self) -> None:
        """All three name the same bytes; what they may be given before verification differs."""
        asked = [parse_range(f"bytes={spec}", 9)[0] for spec in ("4-8", "4-", "-5")]
        assert {a.span for a in asked} == {Span(4, 9)}
        assert [a.shape for a in asked] == [Shape.CLOSED, Shape.OPEN, Shape.SUFFIX]

    @pytest.mark.parametrize("spec", ["-0", "9-", "9-9", "9-20", "99999999999999999999-99999999999999999999", "-0,9-"])
    def test_a_range_without_a_byte_is_unsatisfiable(self, spec: str) -> None:
        with pytest.raises(Unsatisfiable):
            parse_range(f"bytes={spec}", 9)

    @pytest.mark.parametrize("spec", ["0-", "0-0", "-1", "-0"])
    def test_no_range_of_an_empty_file_can_be_satisfied(self, spec: str) -> None:
        with pytest.raises(Unsatisfiable):
            parse_range(f"bytes={spec}", 0)

    @pytest.mark.parametrize(
        "header",
        [
            None,
            "",
            "bytes",
            "bytes=",
            "bytes=,",
            "bytes= , ,",
            "bytes=-",
            "bytes=--1",
            "bytes=5-3",
            "bytes=0-1,5-3",
            "bytes=+1-2",
            "bytes=1-+2",
            "bytes=-1-2",
            "bytes=1-2-3",
            "bytes=0x1-2",
            "bytes=1_0-12",
            "bytes=1 - 2",
            "bytes=1- 2",
            "bytes=0-1;2-3",
            "bytes=0-1\n",
            "bytes=\v0-1",
            "bytes=٠-١",
            "bytes=-٥",
            "bytes=²-3",
            "bytes:0-1",
            "bytes==0-1",
            "items=0-1",
            "octets=0-1",
            "bytesbytes=0-1",
            "0-1",
            "none",
        ],
    )
    def test_what_is_no_byte_range_is_ignored(self, header: str | None) -> None:
        """Unknown units, malformed text and digits that are not ASCII get the whole representation (RFC 9110 §14.2)."""
        assert parse_range(header, 9) == ()

    @pytest.mark.parametrize("header", ["bytes=2-4", "Bytes=2-4", "BYTES=2-4", "bytes= 2-4", "bytes=\t2-4 ", "bytes=,2-4,,"])
    def test_case_of_the_unit_blanks_around_and_empty_items_do_not_matter(self, header: str) -> None:
        assert parse_range(header, 9) == (Asked(Span(2, 5), Shape.CLOSED),)

    def test_eight_ranges_are_served_and_nine_are_not(self) -> None:
        eight = ",".join(f"{i * 2}-{i * 2}" for i in range(MAX_RANGES))
        assert len(parse_range(f"bytes={eight}", 99)) == MAX_RANGES == 8
        assert parse_range(f"bytes={eight},50-50", 99) == ()
        assert parse_range("bytes=" + ",".join(f"{i}-{i}" for i in range(1000)), 2000) == ()

    def test_numbers_of_absurd_length_are_clamped_and_cost_nothing(self) -> None:
        """Python refuses to convert them; nobody needs them converted."""
        absurd = "9" * 100_000
        assert parse_range(f"bytes=0-{absurd}", 9) == (Asked(Span(0, 9), Shape.CLOSED),)
        assert parse_range(f"bytes=-{absurd}", 9) == (Asked(Span(0, 9), Shape.SUFFIX),)
        assert parse_range(f"bytes={'0' * 100_000}1-2", 9) == (Asked(Span(1, 3), Shape.CLOSED),)
        assert parse_range(f"bytes={absurd}-{absurd[:-1]}", 9) == ()
        with pytest.raises(Unsatisfiable):
            parse_range(f"bytes={absurd}-", 9)

    @given(st.text(max_size=40) | st.text("bytes=0123456789-, \t").map("bytes=".__add__), st.integers(0, 20))
    @example("bytes=\ud800-1", 9)
    def test_no_text_does_worse_than_unsatisfiable(self, header: str, size: int) -> None:
        """And what is given back lies in the representation, without overlap."""
        try:
            asked = parse_range(header, size)
        except Unsatisfiable:
            return
        assert all(a.span and a.span.stop <= size for a in asked)
        ordered = sorted(a.span for a in asked)
        assert all(left.stop <= right.start for left, right in itertools.pairwise(ordered))
        assert len(asked) <= MAX_RANGES

    @given(st.integers(0, 2**60), st.integers(1, 2**60), st.integers(0, 2**60))
    def test_what_is_formatted_parses_to_the_same_span(self, start: int, length: int, beyond: int) -> None:
        span = Span(start, start + length)
        assert parse_range(format_range(span), span.stop + beyond) == (Asked(span, Shape.CLOSED),)


class TestContentRange:
    @given(st.integers(0, 2**60), st.integers(1, 2**60), st.integers(0, 2**60))
    def test_what_is_formatted_parses_to_the_same(self, start: int, length: int, beyond: int) -> None:
        span = Span(start, start + length)
        assert parse_content_range(format_content_range(span, span.stop + beyond)) == (span, span.stop + beyond)

    def test_a_star_is_an_unknown_length(self) -> None:
        assert parse_content_range("bytes 0-4/*") == (Span(0, 5), None)

    @pytest.mark.parametrize(
        "header",
        [
            None,
            "",
            "bytes",
            "bytes */9",
            "bytes 5-3/9",
            "bytes 0-4",
            "bytes=0-4/9",
            "items 0-4/9",
            "bytes 0-4/9 9",
            "bytes 0-4/-9",
            "bytes -4/9",
            "bytes 0-/9",
            "bytes ٠-٤/٩",
            "bytes 0-4/9\nX: y",
            f"bytes 0-4/{'9' * 5000}",
            f"bytes 0-{'9' * 5000}/*",
            f"bytes {'9' * 5000}-{'9' * 5000}/*",
        ],
    )
    def test_what_cannot_be_placed_with_certainty_is_none(self, header: str | None) -> None:
        assert parse_content_range(header) is None

    @given(st.text(max_size=40) | st.text("0123456789-/* ").map("bytes ".__add__))
    def test_no_text_raises(self, header: str) -> None:
        found = parse_content_range(header)
        assert found is None or found[0]

    def test_an_unsatisfied_answer_names_the_size(self) -> None:
        assert format_unsatisfied(0) == "bytes */0"


class TestValidators:
    @pytest.mark.parametrize(
        "header",
        [
            "*",
            " * ",
            f'"{ETAG}"',
            f'W/"{ETAG}"',
            f'"x", "{ETAG}"',
            f'"x",W/"{ETAG}" ,"y"',
            f'  "{ETAG}"  ',
        ],
    )
    def test_if_none_match_compares_weakly_and_takes_lists(self, header: str) -> None:
        """RFC 9110 §13.1.2."""
        assert etag_matches(header, ETAG)

    @pytest.mark.parametrize("header", ["", '""', '"x"', f'"{ETAG[:-1]}"', f'"{ETAG}0"', f'"{ETAG.upper()}"', '"x", "*"', ","])
    def test_another_etag_does_not_match(self, header: str) -> None:
        assert not etag_matches(header, ETAG)

    def test_if_range_holds_for_the_strong_etag_alone(self) -> None:
        """RFC 9110 §13.1.5; absent is no condition."""
        assert if_range_holds(None, ETAG)
        assert if_range_holds(f'"{ETAG}"', ETAG)
        assert if_range_holds(f' "{ETAG}" ', ETAG)

    @pytest.mark.parametrize(
        "header",
        ["", "*", ETAG, f'W/"{ETAG}"', f'"x", "{ETAG}"', '"x"', f'"{ETAG.upper()}"', "Tue, 15 Nov 1994 12:45:26 GMT"],
    )
    def test_if_range_fails_for_weak_tags_lists_and_dates(self, header: str) -> None:
        assert not if_range_holds(header, ETAG)
