"""Half-open spans, sets of them and block arithmetic: every case of small blobs, against sets of integers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.wire.spans import (
    BLOCK,
    Span,
    SpanSet,
    block_count,
    block_end,
    block_span,
    blocks_inside,
    blocks_touching,
)

SIZES_AND_BLOCKS = list(itertools.product(range(10), range(1, 5)))


def spans_of(size: int) -> list[Span]:
    """Every span of a blob of `size` bytes, empty ones too."""
    return [Span(a, b) for a, b in itertools.combinations_with_replacement(range(size + 1), 2)]


def positions(span: Span) -> set[int]:
    return set(range(span.start, span.stop))


def set_of(bits: int, width: int) -> tuple[SpanSet, set[int]]:
    """The bytes whose bit is set, as a SpanSet and as a plain set."""
    plain = {i for i in range(width) if bits >> i & 1}
    return SpanSet(Span(i, i + 1) for i in plain), plain


class TestSpan:
    @pytest.mark.parametrize(("start", "stop"), [(-1, 0), (-2, -1), (1, 0), (5, 4)])
    def test_a_span_never_ends_before_it_begins(self, start: int, stop: int) -> None:
        """Nor begins before byte 0."""
        with pytest.raises(ValueError, match="not a span"):
            Span(start, stop)

    def test_length_truth_and_membership_are_those_of_a_range(self) -> None:
        """Every span of 9 bytes, asked about every position around it."""
        for span in spans_of(9):
            plain = range(span.start, span.stop)
            assert len(span) == len(plain)
            assert bool(span) == bool(plain)
            assert [i in span for i in range(-1, 11)] == [i in plain for i in range(-1, 11)]

    def test_overlap_is_the_bytes_in_both(self) -> None:
        """Every pair of spans of 9 bytes; an empty overlap lies at a bound of the first."""
        for left, right in itertools.product(spans_of(9), repeat=2):
            overlap = left.overlap(right)
            assert positions(overlap) == positions(left) & positions(right)
            assert left.start <= overlap.start <= overlap.stop <= left.stop


class TestSpanSet:
    def test_every_set_of_seven_bytes_answers_like_a_plain_set(self) -> None:
        """count, covers, end_of_run, missing and iteration, for each of the 128 sets and each span."""
        for bits in range(2**7):
            spans, plain = set_of(bits, 7)
            assert spans.count() == len(plain)
            assert bool(spans) == bool(plain)
            assert [i for span in spans for i in range(span.start, span.stop)] == sorted(plain)
            for position in range(9):
                end = spans.end_of_run(position)
                assert end == next(i for i in range(position, 99) if i not in plain)
            for within in spans_of(9):
                assert spans.covers(within) == (positions(within) <= plain)
                missing = list(spans.missing(within))
                assert [i for span in missing for i in range(span.start, span.stop)] == sorted(positions(within) - plain)

    def test_runs_are_kept_as_long_as_they_can_be(self) -> None:
        """Spans never touch, are never empty, and missing() never splits a hole."""
        for bits in range(2**7):
            spans, _ = set_of(bits, 7)
            for runs in (list(spans), list(spans.missing(Span(0, 9)))):
                assert all(runs)
                assert all(left.stop < right.start for left, right in itertools.pairwise(runs))

    def test_adding_any_span_to_any_set_is_union(self) -> None:
        """128 sets × every span of 9 bytes, empty spans too; equal sets are equal however they came about."""
        for bits in range(2**7):
            for span in spans_of(9):
                spans, plain = set_of(bits, 7)
                spans.add(span)
                assert spans == SpanSet(Span(i, i + 1) for i in plain | positions(span))

    def test_a_copy_does_not_change_with_the_original(self) -> None:
        """Nor the original with the copy."""
        original = SpanSet([Span(0, 2)])
        copy = original.copy()
        copy.add(Span(5, 6))
        original.add(Span(2, 3))
        assert (repr(original), repr(copy)) == ("{[0, 3)}", "{[0, 2), [5, 6)}")
        assert original != copy

    @given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), max_size=40), st.integers(0, 400), st.integers(0, 99))
    def test_many_spans_in_any_order_are_their_union(self, adds: list[tuple[int, int]], start: int, length: int) -> None:
        """Larger sets than can be listed, added in random order."""
        spans, plain = SpanSet(), set[int]()
        for at, count in adds:
            spans.add(Span(at, at + count))
            plain |= set(range(at, at + count))
        assert spans.count() == len(plain)
        within = Span(start, start + length)
        assert {i for span in spans.missing(within) for i in positions(span)} == positions(within) - plain
        assert spans.covers(within) == (positions(within) <= plain)
        assert all(left.stop < right.start for left, right in itertools.pairwise(spans))


class TestBlocks:
    @pytest.mark.parametrize(("size", "block"), SIZES_AND_BLOCKS)
    def test_the_blocks_are_the_bytes_cut_every_block(self, size: int, block: int) -> None:
        """As slicing cuts them; an empty blob has none, the last may be short."""
        data = bytes(range(size))
        pieces = [data[i : i + block] for i in range(0, size, block)]
        assert block_count(size, block) == len(pieces)
        spans = [block_span(i, size, block) for i in range(len(pieces))]
        assert [data[span.start : span.stop] for span in spans] == pieces

    @pytest.mark.parametrize(("size", "block"), SIZES_AND_BLOCKS)
    def test_touching_blocks_cover_a_span_and_none_could_be_left_out(self, size: int, block: int) -> None:
        for span in spans_of(size):
            assert list(blocks_touching(span, block)) == sorted({i // block for i in positions(span)})

    @pytest.mark.parametrize(("size", "block"), SIZES_AND_BLOCKS)
    def test_blocks_inside_are_those_with_every_byte_in_the_span(self, size: int, block: int) -> None:
        """A short last block counts when the span reaches the end of the blob."""
        for span in spans_of(size):
            whole = [i for i in range(block_count(size, block)) if positions(block_span(i, size, block)) <= positions(span)]
            assert list(blocks_inside(span, size, block)) == whole

    @pytest.mark.parametrize(("size", "block"), SIZES_AND_BLOCKS)
    def test_block_end_is_the_end_of_the_block_that_holds_the_byte(self, size: int, block: int) -> None:
        for position in range(size):
            assert block_end(position, size, block) == block_span(position // block, size, block).stop

    @given(st.integers(0, 2**45), st.integers(0, 2**45), st.integers(0, 2**30))
    def test_large_blobs_keep_the_same_laws(self, size: int, start: int, length: int) -> None:
        """Touching blocks contain the span, blocks inside are contained in it, both within one block's distance."""
        start = min(start, size)
        span = Span(start, min(size, start + length))
        touching, inside = blocks_touching(span, BLOCK), blocks_inside(span, size, BLOCK)
        if touching:
            first, last = block_span(touching[0], size, BLOCK), block_span(touching[-1], size, BLOCK)
            assert first.start <= span.start < first.stop and last.start < span.stop <= last.stop
        if inside:
            assert block_span(inside[0], size, BLOCK).start >= span.start
            assert block_span(inside[-1], size, BLOCK).stop <= span.stop
        assert len(touching) - len(inside) <= 2
