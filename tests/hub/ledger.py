"""What the stand-in saw: one record per request, and counters of requests and of body bytes both ways. No HTTP here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Match = str | re.Pattern[str] | None


@dataclass(eq=False)
class Exchange:
    """One request and what became of it."""

    origin: str
    method: str
    raw_path: str
    """Path and query, exactly as on the wire."""
    headers: tuple[tuple[str, str], ...]
    subject: str
    """What matches are tried on: raw path and query, its decoded form and, on the CDN, "org/m/path"."""
    status: int = 0
    sent: int = 0
    """Body bytes handed to the socket."""
    received: int = 0
    """Bytes of the request's body, as encoded on the wire."""
    fault: str = ""
    aborted: bool = False
    """The client went away before the answer was complete."""
    done: bool = False

    def header(self, name: str) -> str | None:
        """The first value of a request header."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def to_json(self) -> dict[str, Any]:
        return {**{key: value for key, value in vars(self).items() if key != "headers"}, "headers": list(self.headers)}


def is_match(match: Match, subject: str) -> bool:
    if match is None:
        return True
    return match in subject if isinstance(match, str) else bool(match.search(subject))


@dataclass(eq=False)
class Counters:
    """Requests and body bytes since the last reset, by (origin, method, subject)."""

    _requests: dict[tuple[str, str, str], int] = field(default_factory=dict, repr=False)
    _bytes: dict[tuple[str, str, str], int] = field(default_factory=dict, repr=False)
    _received: dict[tuple[str, str, str], int] = field(default_factory=dict, repr=False)
    _active: dict[str, int] = field(default_factory=dict)
    _peak: dict[str, int] = field(default_factory=dict)

    def requests(self, origin: str | None = None, *, method: str | None = None, match: Match = None) -> int:
        """Requests that arrived."""
        return self._sum(self._requests, origin, method, match)

    def bytes(self, origin: str | None = None, *, method: str | None = None, match: Match = None) -> int:
        """Body bytes handed to the sockets, those of unfinished and aborted answers included."""
        return self._sum(self._bytes, origin, method, match)

    def received(self, origin: str | None = None, *, method: str | None = None, match: Match = None) -> int:
        """Bytes of requests' bodies, as encoded on the wire."""
        return self._sum(self._received, origin, method, match)

    def reset(self) -> None:
        """Start again from zero; bodies under way count what they send from now on."""
        self._requests.clear()
        self._bytes.clear()
        self._received.clear()
        self._peak = dict(self._active)

    def active(self, origin: str) -> int:
        return self._active.get(origin, 0)

    def peak(self, origin: str) -> int:
        return self._peak.get(origin, 0)

    def began(self, exchange: Exchange) -> None:
        key = (exchange.origin, exchange.method, exchange.subject)
        self._requests[key] = self._requests.get(key, 0) + 1
        active = self._active[exchange.origin] = self.active(exchange.origin) + 1
        self._peak[exchange.origin] = max(self.peak(exchange.origin), active)

    def sent(self, exchange: Exchange, size: int) -> None:
        key = (exchange.origin, exchange.method, exchange.subject)
        self._bytes[key] = self._bytes.get(key, 0) + size
        exchange.sent += size

    def took(self, exchange: Exchange, size: int) -> None:
        key = (exchange.origin, exchange.method, exchange.subject)
        self._received[key] = self._received.get(key, 0) + size
        exchange.received += size

    def ended(self, exchange: Exchange) -> None:
        self._active[exchange.origin] -= 1

    def to_json(self) -> dict[str, Any]:
        tables = {"requests": self._requests, "bytes": self._bytes, "received": self._received}
        rows = [
            {"origin": key[0], "method": key[1], "subject": key[2], **{name: one.get(key, 0) for name, one in tables.items()}}
            for key in {key: None for one in tables.values() for key in one}
        ]
        return {"rows": rows, "active": dict(self._active), "peak": dict(self._peak)}

    @staticmethod
    def _sum(table: dict[tuple[str, str, str], int], origin: str | None, method: str | None, match: Match) -> int:
        return sum(
            count
            for (at, verb, subject), count in table.items()
            if (origin is None or at == origin) and (method is None or verb == method) and is_match(match, subject)
        )


@dataclass(eq=False)
class Log:
    """The requests in order of arrival."""

    records: list[Exchange] = field(default_factory=list)

    def __iter__(self) -> Iterator[Exchange]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Exchange:
        return self.records[index]

    def find(
        self,
        origin: str | None = None,
        *,
        method: str | None = None,
        match: Match = None,
        where: Callable[[Exchange], bool] = lambda exchange: True,
    ) -> list[Exchange]:
        """The requests of that origin, method and path, for which `where` holds."""
        return [
            one
            for one in self.records
            if (origin is None or one.origin == origin)
            and (method is None or one.method == method)
            and is_match(match, one.subject)
            and where(one)
        ]

    def clear(self) -> None:
        self.records.clear()
