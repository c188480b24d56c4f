"""Bytes, times and shares for people, and bytes from people."""

from __future__ import annotations

import math
import re

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)\Z")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_EIGHTHS = "▏▎▍▌▋▊▉"


def parse_size(text: str) -> int:
    """Bytes of `12GB` or `1.5 GiB`. Raises ValueError."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError("a size with a unit, such as 12GB")
    return int(float(match[1]) * _UNITS[match[2]])


def size(count: float) -> str:
    """Bytes to three digits, in units of powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def clock(seconds: float) -> str:
    """3:12, or 1:02:05."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """5.2 s, 3 min 12 s, or 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def meter(share: float, width: int) -> str:
    """`share` of `width` cells filled, to an eighth of a cell."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest - 1] if rest else "")).ljust(width)
