"""Lines of the audit: JSON, each with the hash of the one before it, so that none can be changed or taken out unnoticed. Pure.

    {"n": 7, "at": "2026-01-31T12:00:00.123Z", "prev": "<64 hex>", "event": "answer", …}

`n` counts from 1, over all files; `prev` is the sha256 of the line before, without its newline. The hash of the last line, the
head, stands for all of them: who has noted it somewhere else can tell that nothing before it was rewritten or cut off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from nearhub.errors import AuditBroken

GENESIS = "0" * 64
"""What the first line of all has as `prev`."""
_OURS = ("n", "at", "prev")


@dataclass(frozen=True, slots=True)
class Link:
    """How far a chain goes: the number of its last line, and that line's hash."""

    number: int = 0
    head: str = GENESIS


def line(chain: Link, at: float, entry: Mapping[str, object]) -> tuple[bytes, Link]:
    """The next line, without its newline, and the chain with it. `at`: wall seconds.

    What is None in `entry` is left out; the chain's own fields are not its to set.
    """
    stamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    told: dict[str, object] = {"n": chain.number + 1, "at": stamp, "prev": chain.head}
    told |= {key: value for key, value in entry.items() if value is not None and key not in _OURS}
    data = json.dumps(told, separators=(",", ":")).encode()
    return data, Link(chain.number + 1, digest(data))


def digest(data: bytes) -> str:
    """Of a line without its newline."""
    return hashlib.sha256(data).hexdigest()


def follow(chain: Link | None, data: bytes) -> tuple[Link, str]:
    """The chain with line `data`, and when that was written. None: whatever stood before is not known.

    Raises AuditBroken where it is not the next line.
    """
    try:
        told = json.loads(data)
        number, at, prev = (told[key] for key in _OURS)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise AuditBroken("is no line of an audit") from None
    if type(number) is not int or not isinstance(at, str):
        raise AuditBroken("is no line of an audit")
    if chain is not None and number != chain.number + 1:
        raise AuditBroken(f"is line {number}, where line {chain.number + 1} is due: lines are missing, or were put in")
    if chain is not None and prev != chain.head:
        raise AuditBroken(f"does not follow from line {number - 1}: one of the two was changed")
    return Link(number, digest(data)), at
