"""Cache-Status: the complete table, and the grammar of RFC 9211."""

from __future__ import annotations

import itertools
import re

import pytest

from nearhub.wire.cachestatus import CacheStatus, Forward


@pytest.mark.parametrize(
    ("status", "header", "word"),
    [
        (CacheStatus(), "nearhub; hit", "hit"),
        (CacheStatus(detail="stale"), "nearhub; hit; detail=stale", "hit"),
        (CacheStatus(Forward.URI_MISS, stored=True), "nearhub; fwd=uri-miss; stored", "uri-miss"),
        (CacheStatus(Forward.PARTIAL, stored=True), "nearhub; fwd=partial; stored", "partial"),
        (CacheStatus(Forward.STALE), "nearhub; fwd=stale", "stale"),
        (CacheStatus(Forward.URI_MISS, collapsed=True, stored=True), "nearhub; fwd=uri-miss; stored; collapsed", "collapsed"),
        (
            CacheStatus(Forward.PARTIAL, collapsed=True, stored=True, detail="unverified"),
            "nearhub; fwd=partial; stored; collapsed; detail=unverified",
            "collapsed",
        ),
    ],
)
def test_the_table(status: CacheStatus, header: str, word: str) -> None:
    """The header, and the one word that labels metrics and logs."""
    assert (str(status), status.word) == (header, word)


def test_every_status_is_a_structured_field_list_of_one_item() -> None:
    """A token, then parameters: keys in lower case, values tokens or absent (RFC 8941 §3.1); hit and fwd exclude each other."""
    pattern = re.compile(r"nearhub(; [a-z*][a-z0-9_.*-]*(=[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*)?)+")
    flags = (False, True)
    for forward, collapsed, stored, detail in itertools.product((None, *Forward), flags, flags, (None, "stale", "unverified")):
        text = str(CacheStatus(forward, collapsed, stored, detail))
        assert pattern.fullmatch(text), text
        assert ("; hit" in text) != ("; fwd=" in text)
