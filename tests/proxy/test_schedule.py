"""When a followed repo is due: pure arithmetic, against a look at every minute."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.schedule import DAY_MIN, Follow, Past, Window, wait_s
from nearhub.units import BadValue

NOON = datetime(2026, 11, 28, 12)
HOUR = 3600.0


def window(text: str) -> Window:
    return Window.from_text(text)


@pytest.mark.parametrize(
    ("past", "now_s", "expected"),
    [
        (None, 5.0, 0.0),
        (Past(1000.0), 1000.0, 6 * HOUR),
        (Past(1000.0), 1000.0 + 5 * HOUR, HOUR),
        (Past(1000.0), 1000.0 + 60 * HOUR, 0.0),
        (Past(1000.0, failures=1), 1010.0, 50.0),
        (Past(1000.0, failures=3), 1000.0, 240.0),
        (Past(1000.0, failures=400), 1000.0, 6 * HOUR),
        (Past(9e9), 1000.0, 6 * HOUR),
    ],
    ids=["never", "just now", "an hour to go", "long ago", "failed", "failed thrice", "fails for ever", "clock set back"],
)
def test_without_a_window(past: Past | None, now_s: float, expected: float) -> None:
    assert wait_s(Follow("org/m"), past, now_s, NOON) == expected


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("22:00-06:00", NOON, 10 * HOUR),
        ("22:00-06:00", NOON.replace(hour=23), 0.0),
        ("22:00-06:00", NOON.replace(hour=5, minute=59), 0.0),
        ("22:00-06:00", NOON.replace(hour=6), 16 * HOUR),
        ("12:00-13:00", NOON, 0.0),
        ("11:00-12:00", NOON, 23 * HOUR),
        ("00:00-24:00", NOON, 0.0),
    ],
)
def test_in_its_window_only(text: str, at: datetime, expected: float) -> None:
    follow = Follow("org/m", window=window(text))
    assert wait_s(follow, None, 0.0, at) == expected
    assert wait_s(follow, Past(0.0), 1 * HOUR, at) == max(expected, 5 * HOUR)


@pytest.mark.parametrize(
    "text", ["22-6", "22:00-22:00", "24:00-06:00", "22:00-24:30", "22:60-06:00", "", "22:00 - 06:00", "٢2:00-06:00"]
)
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(BadValue):
        Window.from_text(text)


@given(st.integers(0, DAY_MIN - 1), st.integers(1, DAY_MIN - 1), st.integers(0, DAY_MIN - 1))
def test_a_window_against_a_look_at_every_minute(start: int, length: int, minute: int) -> None:
    """It opens at the first minute that is in it, and closes at the first that is not."""
    one = Window(start, (start + length) % DAY_MIN)
    inside = {(start + offset) % DAY_MIN for offset in range(length)}
    now = NOON.replace(hour=0) + timedelta(minutes=minute)
    opens = next(wait for wait in range(DAY_MIN) if (minute + wait) % DAY_MIN in inside)
    assert one.opens_in_s(now) == opens * 60
    if minute in inside:
        closes = next(wait for wait in range(DAY_MIN) if (minute + wait) % DAY_MIN not in inside)
        assert one.closes_in_s(now) == closes * 60
    assert Window.from_text(str(one)) == one
