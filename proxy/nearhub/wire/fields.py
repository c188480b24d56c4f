"""Fields: the header section of a message as it came, several lines of one name included. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_CLOCK = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_DATES = (
    re.compile(rf"[a-z]{{3}}, (?P<day>[0-9]{{2}}) (?P<month>[a-z]{{3}}) (?P<year>[0-9]{{4}}) {_CLOCK} gmt\Z", re.I | re.A),
    re.compile(rf"[a-z]+day, (?P<day>[0-9]{{2}})-(?P<month>[a-z]{{3}})-(?P<year>[0-9]{{2}}) {_CLOCK} gmt\Z", re.I | re.A),
    re.compile(rf"[a-z]{{3}} (?P<month>[a-z]{{3}}) (?P<day>[0-9 ][0-9]) {_CLOCK} (?P<year>[0-9]{{4}})\Z", re.I | re.A),
)
"""IMF-fixdate, and the two that RFC 9110 §5.6.7 calls obsolete."""
_DIRECTIVE = re.compile(r'\s*([!#$%&\'*+.^_`|~0-9A-Za-z-]+)(?:=(?:"((?:[^"\\]|\\.)*)"|([^\s",]*)))?\s*(?:,|\Z)')


class Fields:
    """Pairs of name and value, in order. Names compare without case."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self.pairs = tuple((name, value) for name, value in pairs)

    def __repr__(self) -> str:
        return f"Fields({', '.join(name for name, _ in self.pairs)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fields) and self.pairs == other.pairs

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, name: str) -> bool:
        return any(True for _ in self._values(name))

    def all(self, name: str) -> list[str]:
        """The value of each line of that name."""
        return list(self._values(name))

    def get(self, name: str) -> str | None:
        """The first; what may stand once only is read from it."""
        return next(self._values(name), None)

    def joined(self, name: str) -> str | None:
        """All lines as one list (RFC 9110 §5.3)."""
        values = self.all(name)
        return ", ".join(values) if values else None

    def without(self, names: Iterable[str]) -> Fields:
        dropped = {name.lower() for name in names}
        return Fields(pair for pair in self.pairs if pair[0].lower() not in dropped)

    def flat(self) -> dict[str, str]:
        """One line a name, in the spelling of its first."""
        names = {name.lower(): name for name, _ in reversed(self.pairs)}
        return {names[lower]: self.joined(lower) or "" for lower in dict.fromkeys(name.lower() for name, _ in self.pairs)}

    def _values(self, name: str) -> Iterator[str]:
        lower = name.lower()
        return (value.strip() for other, value in self.pairs if other.lower() == lower)


def items(values: Iterable[str]) -> list[str]:
    """The members of a list of tokens, in lower case, from all lines of a field."""
    return [item.strip().lower() for value in values for item in value.split(",") if item.strip()]


def directives(values: Iterable[str]) -> dict[str, str]:
    """Cache-Control: name in lower case → its argument, "" without one. Of one that is there twice, the smaller argument.

    What is not of the form is skipped, up to the next comma.
    """
    found: dict[str, str] = {}
    for value in values:
        position = 0
        while position < len(value):
            match = _DIRECTIVE.match(value, position)
            if match is None:
                position = len(value) if (comma := value.find(",", position)) < 0 else comma + 1
                continue
            position = match.end()
            name, argument = match[1].lower(), match[2] if match[2] is not None else match[3] or ""
            found[name] = min(found[name], argument, key=seconds) if name in found else argument
    return found


def seconds(text: str) -> int:
    """delta-seconds (RFC 9111 §1.2.2), at most 2³¹; 0 for what is none: no freshness is invented."""
    return min(int(text[:12]), 2**31) if text.isascii() and text.isdigit() else 0


def http_date(text: str | None, now: float) -> float | None:
    """Wall seconds; None for what is no HTTP-date. `now` tells the century of a year of two digits."""
    match = next((match for form in _DATES if text and (match := form.match(text))), None)
    if match is None or match["month"].lower() not in _MONTHS:
        return None
    year = int(match["year"])
    if len(match["year"]) == 2:
        this = datetime.fromtimestamp(now, UTC).year
        year += this - this % 100
        year -= 100 * (year > this + 50)
    month, day = _MONTHS.index(match["month"].lower()) + 1, int(match["day"])
    hour, minute, second = (int(match[part]) for part in ("hour", "minute", "second"))
    try:
        return datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None
