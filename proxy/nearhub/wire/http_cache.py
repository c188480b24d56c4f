"""A shared HTTP cache (RFC 9111, RFC 5861), as decisions: may it be stored, does it fit, is it fresh, what is answered.

For what comes from sites, of which nothing is known but what their answers say. No heuristic freshness: what does not say how
long it is good is asked about each time, which costs a 304. Only complete answers are stored; ranges are taken from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nearhub.wire import ranges
from nearhub.wire.fields import Fields, directives, http_date, items, seconds
from nearhub.wire.freshness import Decision
from nearhub.wire.spans import Span

_BY_DEFAULT = frozenset({200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501})
"""RFC 9110 §15.1: what a validator alone makes worth keeping."""
_FAILURES = frozenset({500, 502, 503, 504})
_STRICT = frozenset({"must-revalidate", "proxy-revalidate", "s-maxage", "no-cache"})
_FOR_AUTHORIZED = frozenset({"public", "must-revalidate", "s-maxage"})
_SECRET = frozenset({"authorization", "cookie"})
_OF_THE_BODY = ("Content-Length", "Content-Encoding", "Content-Range", "Content-MD5", "ETag", "Vary")
"""What a 304 does not change: of the body that is stored; and ETag and Vary, by which it was found."""
_IN_A_304 = frozenset({"cache-control", "content-location", "date", "etag", "expires", "last-modified", "vary"})


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored answer to GET. `variant`: what it was chosen by, as variant_of() says it. Times in wall seconds.

    `body`: its name on disk; `size`: its bytes.
    """

    status: int
    fields: Fields
    variant: str
    asked_at: float
    got_at: float
    body: str
    size: int

    def row(self) -> dict[str, Any]:
        """As JSON can hold it; read() gives it back."""
        return {
            "status": self.status,
            "fields": [list(pair) for pair in self.fields.pairs],
            "variant": self.variant,
            "asked_at": self.asked_at,
            "got_at": self.got_at,
            "body": self.body,
            "size": self.size,
        }

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Stored:
        return cls(**{**row, "fields": Fields((name, value) for name, value in row["fields"])})


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent of a stored answer: its bytes `span`, or none (None)."""

    status: int
    fields: Fields
    span: Span | None


# — may it be stored, and which request does it fit ———————————————————————————————————————————————————————————————————


def may_store(asked: Fields, status: int, fields: Fields) -> bool:
    """Whether the answer to a GET with the fields `asked`, as they were sent, may be kept for others (RFC 9111 §3)."""
    said = directives(fields.all("Cache-Control"))
    if status < 200 or status in (206, 304) or "no-store" in directives(asked.all("Cache-Control")):
        return False
    if "no-store" in said or "private" in said or {"*", *_SECRET} & set(items(fields.all("Vary"))):
        return False
    if "must-understand" in said and status not in _BY_DEFAULT:
        return False
    if "Authorization" in asked and not _FOR_AUTHORIZED & said.keys():
        return False
    is_explicit = "s-maxage" in said or "max-age" in said or "Expires" in fields
    return is_explicit or (status in _BY_DEFAULT and bool(validators(fields)))


def variant_of(asked: Fields, fields: Fields) -> str:
    """A digest of what the request said in the fields that the answer's Vary names, but for optional white space."""
    names = sorted(set(items(fields.all("Vary"))))
    values = [(name, None if name not in asked else ",".join(_listed(asked.all(name)))) for name in names]
    return hashlib.sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()


def _listed(values: list[str]) -> list[str]:
    return [" ".join(item.split()) for value in values for item in value.split(",")]


def fits(asked: Fields, stored: Stored) -> bool:
    """RFC 9111 §4.1."""
    return variant_of(asked, stored.fields) == stored.variant


# — is it fresh ———————————————————————————————————————————————————————————————————————————————————————————————————————


def lifetime_s(stored: Stored) -> int:
    """How long it is fresh (RFC 9111 §4.2.1), by s-maxage, max-age or Expires; 0 where nothing that can be read says so."""
    said = directives(stored.fields.all("Cache-Control"))
    for name in ("s-maxage", "max-age"):
        if name in said:
            return seconds(said[name])
    expires = stored.fields.all("Expires")
    at = http_date(expires[0], stored.got_at) if len(expires) == 1 else None
    return 0 if at is None else max(0, int(at - _date(stored)))


def age_s(stored: Stored, now: float) -> int:
    """RFC 9111 §4.2.3."""
    said = (stored.fields.get("Age") or "").partition(",")[0].strip()
    apparent = max(0.0, stored.got_at - _date(stored))
    corrected = seconds(said) + max(0.0, stored.got_at - stored.asked_at)
    return int(max(apparent, corrected) + max(0.0, now - stored.got_at))


def _date(stored: Stored) -> float:
    at = http_date(stored.fields.get("Date"), stored.got_at)
    return stored.got_at if at is None else at


def decide(asked: Fields, stored: Stored | None, now: float) -> Decision:
    """What is to be done; FAIL where the client wants nothing that is not here. A clock that was set back makes stale."""
    wants = directives(asked.all("Cache-Control"))
    if "Cache-Control" not in asked and "no-cache" in items(asked.all("Pragma")):
        wants = {"no-cache": ""}
    otherwise = Decision.FAIL if "only-if-cached" in wants else Decision.REVALIDATE
    if stored is None:
        return Decision.FAIL if otherwise is Decision.FAIL else Decision.FETCH
    said = directives(stored.fields.all("Cache-Control"))
    age, life = age_s(stored, now), lifetime_s(stored)
    if "no-cache" in wants or "no-cache" in said or now < stored.got_at:
        return otherwise
    if "max-age" in wants and age > seconds(wants["max-age"]):
        return otherwise
    if age + seconds(wants.get("min-fresh", "0")) < life:
        return Decision.USE
    stale_s = age - life
    if _STRICT & said.keys() or stale_s < 0:
        return otherwise
    if "max-stale" in wants and (not wants["max-stale"] or stale_s <= seconds(wants["max-stale"])):
        return Decision.USE
    if "stale-while-revalidate" in said and stale_s < seconds(said["stale-while-revalidate"]):
        return Decision.USE_AND_REFRESH
    return otherwise


def may_serve_stale(stored: Stored, now: float) -> bool:
    """When its site does not answer: unless it forbids that, and for as long as its stale-if-error says, if it says so."""
    said = directives(stored.fields.all("Cache-Control"))
    if _STRICT & said.keys():
        return False
    return "stale-if-error" not in said or age_s(stored, now) - lifetime_s(stored) <= seconds(said["stale-if-error"])


def is_failure(status: int) -> bool:
    """What stale-if-error is for (RFC 5861 §4)."""
    return status in _FAILURES


# — revalidation ——————————————————————————————————————————————————————————————————————————————————————————————————————


def validators(fields: Fields) -> dict[str, str]:
    """What asks whether an answer with these fields is still good; {} when it has no validator."""
    named = (("If-None-Match", fields.get("ETag")), ("If-Modified-Since", fields.get("Last-Modified")))
    return {name: value for name, value in named if value}


def freshened(stored: Stored, fields: Fields, asked_at: float, got_at: float) -> Stored | None:
    """`stored` after a 304 with `fields` (RFC 9111 §3.2); None when that is about another representation."""
    etag = fields.get("ETag")
    if etag is not None and _opaque(etag) != _opaque(stored.fields.get("ETag") or ""):
        return None
    news = fields.without(_OF_THE_BODY)
    kept = stored.fields.without({"Age", *(name for name, _ in news.pairs)})
    return replace(stored, fields=Fields(kept.pairs + news.pairs), asked_at=asked_at, got_at=got_at)


# — what is answered from it ——————————————————————————————————————————————————————————————————————————————————————————


def answer(asked: Fields, stored: Stored, now: float) -> Answer:
    """To GET or HEAD, of a stored answer that may be used: 304, 206, 416, or all of it (RFC 9110 §13.2.2)."""
    fields = Fields((*stored.fields.without(["Age", "Content-Length"]).pairs, ("Age", str(age_s(stored, now)))))
    whole = Answer(stored.status, fields, Span(0, stored.size))
    if stored.status != 200:
        return whole
    if _is_unchanged(asked, stored):
        return Answer(304, Fields(pair for pair in fields.pairs if pair[0].lower() in _IN_A_304 or pair[0] == "Age"), None)
    fields = Fields((*fields.without(["Accept-Ranges"]).pairs, ("Accept-Ranges", "bytes")))
    whole = replace(whole, fields=fields)
    if not _if_range_holds(asked, stored):
        return whole
    try:
        parts = ranges.parse_range(asked.get("Range"), stored.size)
    except ranges.Unsatisfiable:
        return Answer(416, Fields((*fields.pairs, ("Content-Range", ranges.format_unsatisfied(stored.size)))), None)
    if len(parts) != 1:
        return whole
    content_range = ranges.format_content_range(parts[0].span, stored.size)
    return Answer(206, Fields((*fields.pairs, ("Content-Range", content_range))), parts[0].span)


def _is_unchanged(asked: Fields, stored: Stored) -> bool:
    etag, since = stored.fields.get("ETag"), asked.get("If-Modified-Since")
    if "If-None-Match" in asked:
        return etag is not None and ranges.etag_matches(asked.joined("If-None-Match") or "", _opaque(etag))
    known = http_date(since, stored.got_at)
    modified = http_date(stored.fields.get("Last-Modified"), stored.got_at)
    return known is not None and (modified if modified is not None else _date(stored)) <= known


def _if_range_holds(asked: Fields, stored: Stored) -> bool:
    """RFC 9110 §13.1.5. A date must be exactly the stored one, and that one strong: older than its answer."""
    held = asked.get("If-Range")
    if held is None:
        return True
    if '"' in held:
        return held == stored.fields.get("ETag") and not held.startswith("W/")
    modified = http_date(stored.fields.get("Last-Modified"), stored.got_at)
    return held == stored.fields.get("Last-Modified") and modified is not None and modified < _date(stored)


def _opaque(etag: str) -> str:
    return etag.strip().removeprefix("W/").strip('"')
