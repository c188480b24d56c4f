"""What a listing of the Hub's would find among repos that are known here. Pure: documents and a query in, documents out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_SORTED_BY_DATE = frozenset({"lastModified", "createdAt"})
_SORTED_BY_COUNT = frozenset({"downloads", "likes", "trendingScore"})


def matching(repos: Iterable[Mapping[str, Any]], query: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Those that `query` asks for: search, author, filter, pipeline_tag, gated; sort, direction, limit.

    What the Hub alone could judge (apps, inference, num_parameters …) leaves nothing out. Without `sort`: by name.
    """
    asked: dict[str, list[str]] = {}
    for name, value in query:
        asked.setdefault(name.removesuffix("[]"), []).append(value)
    found = [dict(about) for about in repos if _fits(about, asked)]
    found.sort(key=lambda about: str(about.get("id", "")).lower())
    sort = asked.get("sort", [""])[-1]
    if sort in _SORTED_BY_DATE | _SORTED_BY_COUNT:
        is_rising = asked.get("direction", ["-1"])[-1] == "1"
        found.sort(key=lambda about: _rank(about, sort), reverse=not is_rising)
    limit = asked.get("limit", [""])[-1]
    return found[: int(limit[:6])] if limit.isascii() and limit.isdigit() else found


def _fits(about: Mapping[str, Any], asked: Mapping[str, Sequence[str]]) -> bool:
    name = str(about.get("id", "")).lower()
    if not all(word in name for text in asked.get("search", ()) for word in text.lower().split()):
        return False
    if not all(name.startswith(f"{author.lower()}/") for author in asked.get("author", ()) if author):
        return False
    marks = set(_marks(about))
    if not all(mark.strip().lower() in marks for text in asked.get("filter", ()) for mark in text.split(",") if mark.strip()):
        return False
    if not all(tag.lower() == str(about.get("pipeline_tag")).lower() for tag in asked.get("pipeline_tag", ()) if tag):
        return False
    is_gated = about.get("gated") not in (None, False)
    return all(is_gated == (text.lower() == "true") for text in asked.get("gated", ()) if text.lower() in ("true", "false"))


def _marks(about: Mapping[str, Any]) -> Iterator[str]:
    """What `filter` may name: tags, and what the Hub makes tags of."""
    tags = about.get("tags")
    yield from (str(tag).lower() for tag in (tags if isinstance(tags, list) else ()))
    yield from (str(about[key]).lower() for key in ("pipeline_tag", "library_name", "sdk") if about.get(key))


def _rank(about: Mapping[str, Any], sort: str) -> Any:
    """Dates are ISO 8601, all in UTC: they sort as text."""
    value = about.get(sort)
    if sort in _SORTED_BY_DATE:
        return value if isinstance(value, str) else ""
    return value if isinstance(value, int | float) else 0
