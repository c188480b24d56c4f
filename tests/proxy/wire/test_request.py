"""Requests by their shape (reliability C4): what is refused, with which status, and what keeps its connection."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.wire.request import METHODS, refusal

PROPER: dict[str, Any] = {"version": (1, 1), "method": "GET", "target": "/", "host": "mirror:8090", "is_chunked": False}


@pytest.mark.parametrize(
    ("shape", "status", "closes"),
    [
        ({"version": (0, 9)}, 400, True),
        ({"version": (2, 0)}, 505, True),
        ({"version": (3, 0)}, 505, True),
        ({"version": (1, 0), "is_chunked": True}, 400, True),
        ({"host": None}, 400, True),
        ({"host": "bad host"}, 400, True),
        ({"host": "user@host"}, 400, True),
        ({"host": "host/path"}, 400, True),
        ({"host": "host:80:80"}, 400, True),
        ({"host": "a, b"}, 400, True),
        ({"host": "[::1"}, 400, True),
        ({"host": "höst"}, 400, True),
        ({"host": "host\n"}, 400, True),
        ({"method": "DELETE"}, 405, False),
        ({"method": "get"}, 405, False),
        ({"method": "CONNECT", "target": "example.org:443"}, 405, False),
        ({"target": "http://169.254.169.254/"}, 421, False),
        ({"target": "*"}, 421, False),
        ({"target": ""}, 421, False),
    ],
)
def test_what_is_refused(shape: dict[str, Any], status: int, closes: bool) -> None:
    """Where the end or the addressee of a request is in doubt, its connection is closed."""
    refused = refusal(**PROPER | shape)
    assert refused is not None and (refused.http_status, refused.closes) == (status, closes)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"version": (1, 0), "host": None},
        {"version": (1, 2)},
        {"host": "mirror"},
        {"host": ""},
        {"host": "[2001:db8::1]:8090"},
        {"host": "10.0.0.1:80"},
        {"host": "my_host.lan"},
        {"is_chunked": True, "method": "POST"},
        {"target": "*", "method": "OPTIONS"},
        {"target": "//x"},
    ],
)
def test_what_may_be_looked_at(shape: dict[str, Any]) -> None:
    """None."""
    assert refusal(**PROPER | shape) is None


@given(
    st.tuples(st.integers(0, 9), st.integers(0, 9)), st.text(max_size=9), st.text(max_size=9), st.none() | st.text(max_size=20)
)
def test_any_shape(version: tuple[int, int], method: str, target: str, host: str | None) -> None:
    """A refusal or none, never an error; what passes is HTTP/1, for a path, of a method that is served."""
    refused = refusal(version=version, method=method, target=target, host=host, is_chunked=False)
    if refused is None:
        assert version[0] == 1 and method in METHODS and (target.startswith("/") or target == "*")
        assert host is None or not set(host) & set(" /@\r\n\0")
