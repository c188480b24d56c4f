"""Sizes and durations as people write them: ``500GB``, ``1.5TiB``, ``60s``, ``250ms``.

Exact, strict, and the inverse of its own formatting. What a size or a duration is *for* must not be in here.
"""

import re
from collections.abc import Mapping
from decimal import Decimal

_SIZES = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, letter in enumerate("KMGTP", start=1)
}
_DURATIONS_MS = {"ms": 1, "s": 1_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_MAX_SIZE = 2**63 - 1
_MAX_DURATION_MS = 36_500 * _DURATIONS_MS["d"]
_QUANTITY = re.compile(r"[ \t]*([0-9]{1,20}(?:\.[0-9]{1,20})?)[ \t]*([A-Za-z]*)[ \t]*")


class BadValue(ValueError):
    """A value that cannot be used; each argument is one complaint, on one line, without the name of the setting."""


def shown(value: object) -> str:
    """The value as a complaint quotes it: one line, bounded."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse_size(value: object) -> int:
    """Bytes; decimal (KB, MB, …) or binary (KiB, MiB, …) units, and a unit is required."""
    numerator, denominator = _scaled(value, _SIZES, "size", "GB")
    size, rest = divmod(numerator, denominator)
    if rest:
        raise BadValue(f"{shown(value)} is not a whole number of bytes")
    if size > _MAX_SIZE:
        raise BadValue(f"{shown(value)} is more than a file can hold")
    return size


def format_size(size_bytes: int) -> str:
    """The size in the largest unit that divides it: ``parse_size`` reads back the same number."""
    return _spelled(size_bytes, _SIZES, zero="0B")


def rough_size(size_bytes: int) -> str:
    """The size for people: three digits and a decimal unit, such as 1.24 GB."""
    unit = max((u for u in ("B", "KB", "MB", "GB", "TB", "PB") if size_bytes >= _SIZES[u]), key=_SIZES.__getitem__, default="B")
    if unit == "B":
        return f"{size_bytes} B"
    amount = size_bytes / _SIZES[unit]
    return f"{amount:.{2 if amount < 10 else 1 if amount < 100 else 0}f} {unit}"


def parse_duration(value: object) -> float:
    """Seconds, in whole milliseconds; a unit is required."""
    numerator, denominator = _scaled(value, _DURATIONS_MS, "duration", "s")
    duration_ms, rest = divmod(numerator, denominator)
    if rest:
        raise BadValue(f"{shown(value)} is finer than a millisecond")
    if duration_ms > _MAX_DURATION_MS:
        raise BadValue(f"{shown(value)} is more than {_spelled(_MAX_DURATION_MS, _DURATIONS_MS, zero='0s')}")
    return duration_ms / 1000


def format_duration(duration_s: float) -> str:
    """The duration in the largest unit that divides it: ``parse_duration`` reads back the same number."""
    return _spelled(round(duration_s * 1000), _DURATIONS_MS, zero="0s")


def _scaled(value: object, units: Mapping[str, int], what: str, example: str) -> tuple[int, int]:
    """The quantity as an exact fraction of the smallest unit."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match = _QUANTITY.fullmatch(str(value)) if is_number or isinstance(value, str) else None
    if match is None:
        raise BadValue(f"{shown(value)} is not a {what}; write a number and a unit, for example 60{example}")
    number, unit = match.groups()
    if not unit:
        raise BadValue(f'{shown(value)} has no unit; write for example "{number}{example}" (units: {", ".join(units)})')
    if unit not in units:
        meant = [known for known in units if known.lower() == unit.lower()]
        hint = f"did you mean {meant[0]}?" if meant else f"the units are {', '.join(units)}"
        raise BadValue(f"{shown(value)} has an unknown unit {unit!r}; {hint}")
    numerator, denominator = Decimal(number).as_integer_ratio()
    return numerator * units[unit], denominator


def _spelled(amount: int, units: Mapping[str, int], zero: str) -> str:
    if amount == 0:
        return zero
    unit = max((unit for unit in units if amount % units[unit] == 0), key=units.__getitem__)
    return f"{amount // units[unit]}{unit}"
