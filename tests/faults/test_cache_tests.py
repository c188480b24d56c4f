"""The mount of a site is a shared HTTP cache, says a suite that we did not write."""

from __future__ import annotations

import json
from pathlib import Path

from tests.faults.cache_tests import RECORD, results

_FAMILIES = ("other-authorization", "conditional-etag-", "vary-", "partial-", "freshness-", "304-", "headers-", "status-")
"""What has to be among the required tests, whatever is recorded."""


async def test_what_http_requires(tmp_path: Path) -> None:
    """Each required test passes. With another version of the suite, or more of it passing: record it anew."""
    required = json.loads(RECORD.read_text())["required"]
    assert all(any(test.startswith(family) for test in required) for family in _FAMILIES) and len(required) > 180
    found = await results(tmp_path, required)
    assert sorted(found) == sorted(required)
    # Some count on an answer within 2 s, while all the others are asked too: what failed so is asked again by itself.
    if again := [test for test, (_, wrong) in found.items() if wrong is not None]:
        found = await results(tmp_path, again)
    assert {test: wrong for test, (_, wrong) in found.items() if wrong is not None} == {}
