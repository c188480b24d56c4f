"""URLs and headers of the sites that are mirrored besides the Hub, at /-/sites/NAME/…. Pure.

What is sent to a site and what is sent on from it is decided here. A site shares this mirror's origin with everything else, so
nothing of its answers may set what holds for an origin as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urlsplit

from nearhub.errors import BadTarget, NotRoutable
from nearhub.wire.fields import Fields, items

MOUNT = "/-/sites/"
MAX_URL = 8192
_VISIBLE = re.compile(r"[\x21-\x7e]*\Z")
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authentication-info", "proxy-authorization"}
_HOP_BY_HOP |= {"proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
_OURS = {"authorization", "content-length", "content-type", "cookie", "expect", "forwarded", "host", "via", "x-real-ip"}
_OURS |= {"x-request-id"}
CONDITIONS = {"if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range", "range"}
"""What a client asks under; sent on only where nothing is stored."""
_OF_AN_ORIGIN = {"alt-svc", "clear-site-data", "nel", "public-key-pins", "report-to", "reporting-endpoints"}
_OF_AN_ORIGIN |= {"service-worker-allowed", "set-cookie", "set-cookie2", "strict-transport-security"}
_OF_THIS_ANSWER = {"content-length", "x-request-id"}
_ACTIVE = re.compile(r"html|xml|svg", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Site:
    """`url` without trailing slash; everything below it is mirrored. `who`: local tokens and groups; empty: everybody.

    `max_file_bytes`: what is larger is not kept.
    """

    name: str
    url: str
    who: frozenset[str] = frozenset()
    max_file_bytes: int | None = None


def split(path: str, raw_path: str) -> tuple[str, str]:
    """The site's name, and what is asked of it: a path with its query, to be put behind Site.url. Raises ClientError.

    `path` as split_prefix returns it; `raw_path` as it came.
    """
    name, slash, rest = path.removeprefix(MOUNT).partition("/")
    if not slash:
        raise NotRoutable(f"this mirror has no such page: sites are at {MOUNT}NAME/, with the slash")
    _, question, query = raw_path.partition("#")[0].partition("?")
    tail = f"/{rest}{question}{query}"
    if not _VISIBLE.match(tail):
        raise BadTarget("the URL has characters that must be percent-encoded")
    if len(tail) > MAX_URL:
        raise BadTarget(f"the URL has {len(tail)} bytes, {MAX_URL} are allowed")
    decoded = unquote_to_bytes(rest)
    if any(byte < 0x20 or byte == 0x7F for byte in decoded) or b"\\" in decoded:
        raise BadTarget("the URL path has a control character or a backslash")
    if {b".", b".."} & set(decoded.split(b"/")):
        raise BadTarget("the URL path has '.' or '..' segments, which are not allowed")
    return name, tail


def sent_to(fields: Fields, authorization: str | None, conditions: Sequence[tuple[str, str]]) -> Fields:
    """A request's fields as they go to the site: what is the client's own and this connection's, taken out."""
    kept = [pair for pair in fields.without(_dropped(fields, _OURS | CONDITIONS)).pairs if not _is_ours(pair[0])]
    secrets = [("Authorization", authorization)] if authorization else []
    return Fields([*kept, *conditions, *secrets, ("Via", "1.1 nearhub")])


def conditions_of(fields: Fields) -> list[tuple[str, str]]:
    """The client's own conditions and Range."""
    return [(name, value) for name, value in fields.pairs if name.lower() in CONDITIONS]


def passed_on(fields: Fields) -> Fields:
    """An answer's fields as they are kept and sent on. What this machine could not write again is dropped."""
    kept = fields.without(_dropped(fields, _OF_AN_ORIGIN | _OF_THIS_ANSWER))
    return Fields((name, value) for name, value in kept.pairs if _is_sound(value))


def guards(fields: Fields) -> dict[str, str]:
    """What keeps a page of a site from acting as a page of this mirror: it may show, and not run."""
    active = _ACTIVE.search(fields.get("Content-Type") or "")
    said = fields.joined("Content-Security-Policy")
    return {"Content-Security-Policy": f"{said}, sandbox" if said else "sandbox"} if active else {}


def relocated(location: str, site: Site, mounted_at: str) -> str:
    """A Location of a site, for the client: below Site.url it becomes ours; anything else stays what the site meant.

    `mounted_at`: our URL of the site, without trailing slash. A redirect is never followed here.
    """
    parts = urlsplit(site.url)
    if location.startswith("//"):
        location = f"{parts.scheme}:{location}"
    elif location.startswith("/"):
        location = f"{parts.scheme}://{parts.netloc}{location}"
    rest = location.removeprefix(site.url)
    return mounted_at + rest if rest != location and rest[:1] in ("", "/", "?", "#") else location


def _dropped(fields: Fields, more: Iterable[str]) -> set[str]:
    return {*_HOP_BY_HOP, *items(fields.all("Connection")), *more}


def _is_ours(name: str) -> bool:
    return name.lower().startswith("x-forwarded-")


def _is_sound(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return not any((char < " " and char != "\t") or char == "\x7f" for char in value)
