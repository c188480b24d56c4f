"""Scripted misbehaviour: what can go wrong, whom it hits, and how often. The sending itself is in send.py.

A :class:`Fault` is a value; adding one to :class:`Faults` gives a :class:`Rule`, the live thing that counts its hits
and can be released or removed. The first rule that matches and has something to bite on wins; one fault per request.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from tests.hub.content import Content, Given, read_all, source_of


class Act(Enum):
    """Every way in which the Hub or its CDN can be made to fail."""

    STATUS = "status"
    LATENCY = "latency"
    RESET = "reset"
    TRUNCATE = "truncate"
    CORRUPT = "corrupt"
    STALL = "stall"
    DRIP = "drip"
    DROP_EVERY = "drop_every"
    OVERRUN = "overrun"
    IGNORE_RANGE = "ignore_range"
    OTHER_ETAG = "other_etag"
    OTHER_FILE = "other_file"
    WRONG_COMMIT = "wrong_commit"
    SHIFT_RANGE = "shift_range"
    WRONG_TOTAL = "wrong_total"


BODY_ACTS = frozenset({Act.TRUNCATE, Act.CORRUPT, Act.STALL, Act.DRIP, Act.DROP_EVERY, Act.OVERRUN})
OFFSET_ACTS = frozenset({Act.TRUNCATE, Act.CORRUPT, Act.STALL, Act.DROP_EVERY, Act.RESET})
"""Those that happen where a body has come to an offset."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of misbehaviour. Use the constructors below; the fields are for the server."""

    act: Act
    status_code: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    at: int | None = None
    after: int | None = None
    number: float = 0
    text: str = ""
    content: Content | bytes | None = None

    @classmethod
    def status(cls, code: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Fault:
        """Answer with this status instead."""
        return cls(Act.STATUS, status_code=code, headers=headers or {}, body=body)

    @classmethod
    def html_200(cls, body: bytes = b"<!doctype html><title>Just a moment...</title>Are you human?") -> Fault:
        """200 text/html, as a captive portal or a captcha answers."""
        return cls.status(200, {"Content-Type": "text/html; charset=utf-8"}, body)

    @classmethod
    def expired(cls) -> Fault:
        """403, as the CDN answers when a signed URL has run out."""
        body = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>Expired</Message></Error>'
        return cls.status(403, {"Content-Type": "application/xml"}, body)

    @classmethod
    def latency(cls, seconds: float) -> Fault:
        """Wait before the headers, then answer properly."""
        return cls(Act.LATENCY, number=seconds)

    @classmethod
    def reset(cls, after: int | None = None) -> Fault:
        """TCP reset: instead of an answer, or after so many body bytes."""
        return cls(Act.RESET, after=after)

    @classmethod
    def truncate(cls, at: int | None = None, *, after: int | None = None) -> Fault:
        """Announce everything, stop at this offset of the file (or after n bytes of this answer), close."""
        return cls(Act.TRUNCATE, at=at, after=after)

    @classmethod
    def corrupt(cls, at: int) -> Fault:
        """Flip the byte at this offset of the file, whichever range it is asked in."""
        return cls(Act.CORRUPT, at=at)

    @classmethod
    def stall(cls, at: int | None = None, *, after: int | None = None) -> Fault:
        """Send up to the offset, then nothing until the rule is released or the client goes away."""
        return cls(Act.STALL, at=at, after=after)

    @classmethod
    def drip(cls, bytes_per_s: float) -> Fault:
        """Send the body this slowly."""
        return cls(Act.DRIP, number=bytes_per_s)

    @classmethod
    def drop_every(cls, n: int) -> Fault:
        """Cut each connection once it has carried n body bytes."""
        return cls(Act.DROP_EVERY, after=n)

    @classmethod
    def overrun(cls, n: int, *, announced: bool = False) -> Fault:
        """n bytes too many: after the announced body, then close; or announced in Content-Length and Content-Range."""
        return cls(Act.OVERRUN, number=n, text="announced" if announced else "")

    @classmethod
    def ignore_range(cls) -> Fault:
        """Answer a Range request with 200 and the whole file."""
        return cls(Act.IGNORE_RANGE)

    @classmethod
    def other_etag(cls, content: Content | bytes | None = None) -> Fault:
        """The file was replaced: another ETag, and if given other content (keep the length, or not)."""
        return cls(Act.OTHER_ETAG, content=content)

    @classmethod
    def other_file(cls, path: str, content: Content | bytes) -> Fault:
        """The same commit suddenly holds another file at `path`: headers, tree, info and body agree on the lie."""
        return cls(Act.OTHER_FILE, text=path, content=content)

    @classmethod
    def wrong_commit(cls, commit: str = "f" * 40) -> Fault:
        """X-Repo-Commit names another commit."""
        return cls(Act.WRONG_COMMIT, text=commit)

    @classmethod
    def shift_range(cls, by: int) -> Fault:
        """A 206 whose Content-Range is off by so many bytes; the body is what was asked."""
        return cls(Act.SHIFT_RANGE, number=by)

    @classmethod
    def wrong_total(cls, total: int) -> Fault:
        """A 206 whose Content-Range names another total size."""
        return cls(Act.WRONG_TOTAL, number=total)

    def to_json(self) -> dict[str, Any]:
        """For the control endpoint."""
        content = self.content
        packed: Any = {"size": content.size, "seed": content.seed} if isinstance(content, Content) else _packed(content)
        return {
            **{one.name: getattr(self, one.name) for one in fields(self)},
            "act": self.act.value,
            "headers": dict(self.headers),
            "body": _packed(self.body),
            "content": packed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fault:
        content = data.get("content")
        unpacked = Content(**content) if isinstance(content, dict) else _unpacked(content)
        body = _unpacked(data.get("body")) or b""
        return cls(**{**data, "act": Act(data["act"]), "body": body, "content": unpacked})


def _packed(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def _unpacked(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def content_source(given: Given) -> Content | bytes:
    """A fault's content as something that the control endpoint can carry."""
    return given if isinstance(given, Content | bytes) else read_all(source_of(given))


@dataclass(eq=False)
class Rule:
    """One scripted fault at work."""

    fault: Fault
    on: str | None
    method: str | None
    match: str | re.Pattern[str] | None
    times: int | None
    after: int
    id: int
    remove: Callable[[], None] = field(repr=False)
    pulse: Callable[[], None] = field(repr=False)
    hits: int = 0
    """How many answers it has spoilt."""
    stalled: int = 0
    """How many answers stand still because of it right now."""
    _passed: int = 0
    _released: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def matches(self, origin: str, method: str, subject: str) -> bool:
        if (self.on and self.on != origin) or (self.method and self.method.upper() != method):
            return False
        if self.match is None:
            return True
        return self.match in subject if isinstance(self.match, str) else bool(self.match.search(subject))

    @property
    def is_spent(self) -> bool:
        return self.times is not None and self.hits >= self.times

    def take(self) -> bool:
        """Count one answer that this rule could spoil; whether it does."""
        if self.is_spent:
            return False
        if self._passed < self.after:
            self._passed += 1
            return False
        self.hits += 1
        self.pulse()
        return True

    def release(self) -> None:
        """Let everything that this rule stalls go on, now and later."""
        self._released.set()

    async def hold(self) -> None:
        """Stand still until released."""
        self.stalled += 1
        self.pulse()
        try:
            await self._released.wait()
        finally:
            self.stalled -= 1
            self.pulse()


class Faults:
    """The script: an ordered list of rules, changed at any time."""

    def __init__(self, pulse: Callable[[], None]) -> None:
        self.rules: list[Rule] = []
        self.known: dict[int, Rule] = {}
        """Every rule ever added, for a control that only has the number."""
        self._pulse = pulse

    def add(
        self,
        fault: Fault,
        *,
        on: str | None = None,
        match: str | re.Pattern[str] | None = None,
        method: str | None = None,
        times: int | None = None,
        after: int = 0,
    ) -> Rule:
        """Script a fault for an origin ("hub" or "cdn"), a substring or pattern of the path and query (for the CDN also
        "org/m/path"), a method; at most `times` times, and only `after` that many answers that it could have spoilt."""
        rule = Rule(
            fault=fault,
            on=on,
            method=method,
            match=match,
            times=times,
            after=after,
            id=len(self.known) + 1,
            remove=lambda: self.rules.remove(rule) if rule in self.rules else None,
            pulse=self._pulse,
        )
        self.known[rule.id] = rule
        self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget every rule, and let what stalls go on."""
        for rule in self.rules:
            rule.release()
        self.rules.clear()
