"""Kinds of settings: how a value is read from TOML or text, checked, and written back. No names of settings here."""

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nearhub.errors import NearhubError
from nearhub.schedule import Window
from nearhub.units import BadValue, format_duration, format_size, parse_duration, parse_size, shown
from nearhub.wire.rules import FORMATS, OTHER_FORMAT, Action, Rule, split_repo_pattern
from nearhub.wire.target import Repo, RepoKind, parse_repo_name
from nearhub.wire.tlog import is_name

HUB_BLOB_HOSTS = (
    "us.aws.cdn.hf.co",
    "us.gcp.cdn.hf.co",
    "cas-bridge.xethub.hf.co",
    "cdn-lfs.hf.co",
    "cdn-lfs-us-1.hf.co",
    "cdn-lfs-eu-1.hf.co",
)


@dataclass(frozen=True, slots=True)
class UpstreamUrl:
    """One upstream, without trailing slash. An upstream that is not trusted carries bytes, and no names or tokens."""

    url: str
    trusted: bool


@dataclass(frozen=True, slots=True)
class GitMirror:
    """A repo of another git host, cloned from here by `name`, one segment of a URL."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class PolicyTable:
    """A [[policies]] table: `who` may have `repos`, asked for with the token in `token_file`, if there is one."""

    name: str
    repos: tuple[str, ...]
    who: tuple[str, ...]
    token_file: Path | None = None
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class SiteTable:
    """A [[sites]] table: `url` is mirrored at /-/sites/NAME/, for `who`, or for everybody where it is empty."""

    name: str
    url: str
    who: tuple[str, ...] = ()
    max_file_size_bytes: int | None = None
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class BlobHost:
    """A host that upstream may redirect content to.

    ``host`` is lower case and without brackets; ``port`` None is the scheme's default. ``named``: the operator gave it,
    and only then may it have a private address.
    """

    host: str
    port: int | None
    plain_http: bool
    named: bool


@dataclass(frozen=True, slots=True)
class Proxies:
    """The outbound proxies that HTTPS_PROXY, HTTP_PROXY and NO_PROXY ask for. Their URLs may hold a password."""

    https: str | None = field(repr=False)
    http: str | None = field(repr=False)
    no_proxy: tuple[str, ...]

    def for_url(self, scheme: str, host: str, port: int) -> str | None:
        """The proxy to reach ``host`` (no brackets) through, or None to connect directly."""
        proxy = {"https": self.https, "http": self.http}.get(scheme)
        if proxy is None or any(_is_exempt(entry, host.lower(), port) for entry in self.no_proxy):
            return None
        return proxy


def _is_exempt(entry: str, host: str, port: int) -> bool:
    """Does one NO_PROXY entry (``*``, host, domain, address or network; a port may follow) cover this host?"""
    if entry == "*":
        return True
    if match := re.fullmatch(r"(?:\[(.+)\]|([^:]+)):([0-9]+)", entry):
        if int(match[3]) != port:
            return False
        entry = match[1] or match[2]
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        domain = entry.lower().removeprefix("*").lstrip(".")
        return host == domain or host.endswith(f".{domain}")


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Kind:
    """What a setting holds: how it is read from TOML's types, how text becomes those, and how it is written again."""

    metavar: str
    parse: Callable[[Any], Any]
    from_text: Callable[[str], Any] = _same
    plain: Callable[[Any], Any] = _same
    gather: Callable[[Sequence[Any]], Any] | None = None
    """Given for lists only: ``parse`` reads one item, and this makes the setting's value of all of them."""


def _origin(value: object) -> str:
    text = _text(value)
    if text and not is_name(text):
        raise BadValue(f"{shown(value)} is no name of a log: no spaces and no +, 200 characters at most")
    return text


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise BadValue(f"{shown(value)} is not text")
    return value


def _integer(what: str, low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadValue(f"{shown(value)} is not {what} ({low} to {high})")
        return value

    return parse


def _integer_from_text(text: str) -> int | str:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise BadValue(f"{shown(value)} is neither true nor false")
    return value


def _split(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")] if text.strip() else []


def _path(value: object) -> Path:
    text = _text(value)
    if not text or not text.isprintable():
        raise BadValue(f"{shown(value)} is not a path")
    return Path(text)


def _path_or_none(value: object) -> Path | None:
    return None if value == "" else _path(value)


def _size_or_none(value: object) -> int | None:
    return None if value == "" else parse_size(value)


def _rate_or_none(value: object) -> int | None:
    """Bytes per second; the unit may stand without its `/s`."""
    if value == "":
        return None
    rate = parse_size(value.removesuffix("/s") if isinstance(value, str) else value)
    if rate == 0:
        raise BadValue(f"{shown(value)} would bring nothing; leave it out for no limit")
    return rate


def _host(text: str) -> str:
    """A name or address in lower case. What resolvers would take for an address in disguise (``127.1``) is refused."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        label = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
        is_name = len(text) <= 253 and re.fullmatch(rf"{label}(?:\.{label})*", text) is not None
        if not is_name or re.search(r"(?:^|\.)(?:[0-9]+|0[xX][0-9A-Fa-f]*)$", text):
            raise BadValue(f"{shown(text)} is not a host name or an IP address") from None
        return text.lower()


def split_authority(text: str) -> tuple[str, int | None]:
    """``HOST``, ``HOST:PORT``, ``[v6]`` or ``[v6]:PORT`` as host and port."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)\]|([^:\[\]]+))(?::([0-9]{1,5}))?", text)
    if match is None:
        raise BadValue(f"{shown(text)} is not HOST or HOST:PORT (an IPv6 address goes in brackets)")
    port = None if match[3] is None else _integer("a port", 1, 65535)(int(match[3]))
    return _host(match[1] or match[2]), port


def _listen_host(value: object) -> str:
    if not _text(value):
        raise BadValue("must name an address; write 0.0.0.0 (or ::) to listen on all of them")
    return _host(_text(value))


def _check_segments(path: str) -> None:
    """A path is ``/a/b``: each segment starts with a slash, and would mean the same to every URL parser."""
    for segment in path.split("/")[1:]:
        if segment in {"", ".", ".."} or not re.fullmatch(r"[A-Za-z0-9._~-]+", segment):
            raise BadValue(f"{shown(path)} has a path segment {segment!r}; use letters, digits, and . _ ~ - only")


def _prefix(value: object) -> str:
    text = _text(value)
    if not text:
        return text
    if not text.startswith("/"):
        raise BadValue(f"{shown(text)} must start with a slash, as in /huggingface-proxy")
    if text.endswith("/"):
        raise BadValue(f'{shown(text)} must not end with a slash; write "{text.rstrip("/")}"')
    _check_segments(text)
    if text.split("/")[1] == "-":
        raise BadValue(f"{shown(text)} is taken: the mirror's own routes live under /-/")
    return text


def _base_url(value: object) -> str:
    """An absolute http(s) URL that paths can be appended to; one trailing slash is dropped."""
    text = _text(value)
    if "@" in text:
        raise BadValue("must not hold a user name or a password")
    if "?" in text or "#" in text:
        raise BadValue(f"{shown(text)} must not have a query or a fragment")
    match = re.fullmatch(r"https?://([^/]+)(/.*)?", text)
    if match is None:
        raise BadValue(f"{shown(text)} is not an absolute URL; write it with http:// or https:// and a host")
    split_authority(match[1])
    _check_segments((match[2] or "").removesuffix("/"))
    return text.removesuffix("/")


def _base_url_or_empty(value: object) -> str:
    return "" if value == "" else _base_url(value)


def _upstream_item(value: object) -> tuple[str, bool | None]:
    """One entry of ``urls``; trust is None where the entry leaves it to its position."""
    if not isinstance(value, dict):
        return _base_url(value), None
    if unknown := [key for key in value if key not in {"url", "trusted"}]:
        raise BadValue(*(f"unknown key {shown(key)}{did_you_mean(key, ['url', 'trusted'])}" for key in unknown))
    if "url" not in value:
        raise BadValue('has no url; write { url = "https://…", trusted = true }')
    return _base_url(value["url"]), _boolean(value["trusted"]) if "trusted" in value else None


def _gather_upstreams(items: Sequence[tuple[str, bool | None]]) -> tuple[UpstreamUrl, ...]:
    urls = [url for url, _ in items]
    if not urls:
        raise BadValue("is empty; name at least one upstream")
    if repeated := {url for url in urls if urls.count(url) > 1}:
        raise BadValue(*(f"{shown(url)} is there more than once" for url in sorted(repeated)))
    upstreams = tuple(
        UpstreamUrl(url, index == 0 if trusted is None else trusted) for index, (url, trusted) in enumerate(items)
    )
    if not any(upstream.trusted for upstream in upstreams):
        raise BadValue("has no trusted upstream; names and commits are taken from trusted ones only")
    return upstreams


def _git_mirror(value: object) -> GitMirror:
    """``NAME=URL``, or a table [git.NAME] with its name added."""
    if not isinstance(value, dict):
        name, separator, url = _text(value).partition("=")
        if not separator:
            raise BadValue(f"{shown(value)} is not NAME=URL")
        value = {"name": name.strip(), "url": url.strip()}
    if unknown := [key for key in value if key not in {"name", "url"}]:
        raise BadValue(*(f"unknown key {shown(key)}{did_you_mean(key, ['url'])}" for key in unknown))
    if "url" not in value:
        raise BadValue('has no url; write url = "https://…/name.git"')
    name = value["name"]
    is_name = re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?", name) and "--" not in name and ".." not in name
    if not is_name or name.endswith(".git") or name in {"api", "datasets", "spaces", "models"}:
        raise BadValue(f"{shown(name)} cannot be a name in a URL; use letters, digits, and . _ - inside, without .git")
    return GitMirror(name, _base_url(value["url"]))


def _gather_git_mirrors(items: Sequence[GitMirror]) -> tuple[GitMirror, ...]:
    names = [mirror.name for mirror in items]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise BadValue(*(f"{shown(name)} is there more than once" for name in sorted(repeated)))
    return tuple(items)


def _blob_host(value: object) -> BlobHost:
    text = _text(value)
    if "@" in text:
        raise BadValue("must not hold a user name or a password")
    scheme, separator, authority = text.rpartition("://")
    if separator and scheme not in {"http", "https"}:
        raise BadValue(f"{shown(text)} must start with http:// or https://, or with the host")
    host, port = split_authority(authority)
    return BlobHost(host, port, plain_http=scheme == "http", named=True)


def _gather_blob_hosts(items: Sequence[BlobHost]) -> tuple[BlobHost, ...]:
    """The Hub's own hosts and the operator's; a host that is both is the operator's."""
    defaults = (BlobHost(host, None, plain_http=False, named=False) for host in HUB_BLOB_HOSTS)
    named = tuple(dict.fromkeys(items))
    return tuple(host for host in defaults if replace(host, named=True) not in named) + named


def _plain_blob_host(blob_host: BlobHost) -> str:
    host = f"[{blob_host.host}]" if ":" in blob_host.host else blob_host.host
    port = "" if blob_host.port is None else f":{blob_host.port}"
    return f"{'http://' if blob_host.plain_http else ''}{host}{port}"


def _line(limit: int) -> Callable[[object], str]:
    """Text of one line, to be shown to people."""

    def parse(value: object) -> str:
        text = _text(value)
        if len(text) > limit or not text.isprintable() or text != text.strip():
            raise BadValue(f"{shown(text)} is not one line of text of at most {limit} characters")
        return text

    return parse


def _rule_name(value: object) -> str:
    name = _line(60)(value)
    if not name or '"' in name:
        raise BadValue(f"{shown(name)} is not a name; refusals quote it: use words, without quotes")
    return name


def _site_name(value: object) -> str:
    name = _text(value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise BadValue(f"{shown(name)} cannot be a name in a URL; use letters, digits, and . _ - inside")
    return name


def _one_of(words: type[Action] | type[RepoKind]) -> Callable[[object], Action | RepoKind]:
    def parse(value: object) -> Action | RepoKind:
        word = next((word for word in words if word == value), None)
        if word is None:
            raise BadValue(f"{shown(value)} is none of {', '.join(words)}{_meant(value, words)}")
        return word

    return parse


def _meant(value: object, words: Iterable[str]) -> str:
    return did_you_mean(value.lower(), words) if isinstance(value, str) else ""


def _repo_pattern(value: object) -> str:
    text = _text(value)
    _, owner, name = split_repo_pattern(text)
    if not all(re.fullmatch(r"[a-z0-9._*?-]+", part) for part in (name, *([] if owner is None else [owner]))):
        raise BadValue(f"{shown(text)} is not a pattern of repos; write OWNER/NAME, OWNER/*, or * for all of them")
    if owner is None and name != "**" and re.search(r"[*?]", name):
        raise BadValue(f"{shown(text)} is about repos without an owner; write {shown(f'{text}/*')}")
    return text


def _licence_pattern(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(r"[A-Za-z0-9.+_*?-]+", text):
        raise BadValue(f"{shown(text)} is not a licence as the Hub writes them, such as apache-2.0, cc-by-nc-* or unknown")
    return text


def _format(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"\.[^\s/]+", value):
        return value
    known = [*FORMATS, OTHER_FORMAT]
    if value not in known:
        by_suffix = next((f"; did you mean {name}?" for name in FORMATS if f".{value}" in FORMATS[name]), "")
        hint = by_suffix or _meant(value, known)
        raise BadValue(f"{shown(value)} is no format ({', '.join(known)}), nor a suffix such as .zip{hint}")
    return str(value)


def _group(value: object) -> str:
    if not _line(60)(value):
        raise BadValue("'' is not a group")
    return str(value)


def _repo(value: object) -> str:
    text = _text(value).removeprefix("models/")
    repo = Repo.from_text(text)
    try:
        return str(parse_repo_name(repo.kind, repo.name))
    except NearhubError:
        raise BadValue(f"{shown(value)} is not a repo; write OWNER/NAME, datasets/OWNER/NAME or spaces/OWNER/NAME") from None


def _revision(value: object) -> str:
    text = _text(value)
    if not text or not text.isprintable() or " " in text:
        raise BadValue(f"{shown(text)} is not a branch, a tag or a commit")
    return text


def _pattern(value: object) -> str:
    if not _text(value):
        raise BadValue("'' is not a pattern of paths; write for example *.safetensors")
    return str(value)


def _interval(value: object) -> float:
    seconds = parse_duration(value)
    if seconds < 60:
        raise BadValue(f"{shown(value)} is more often than once a minute")
    return seconds


def _items(items: Sequence[Any]) -> tuple[Any, ...]:
    if not items:
        raise BadValue("is empty; name what it is about, or leave it out")
    return tuple(items)


def rule_complaints(rule: Rule) -> Iterator[str]:
    """What is wrong with a rule of which every value by itself is fine."""
    if rule.is_dry_run and rule.action is Action.ALLOW:
        yield "dry_run is for rules that deny: one that allows refuses nothing"
    low, high = rule.larger_than_bytes, rule.smaller_than_bytes
    if low is not None and high is not None and high - low < 2:
        yield f"never matches: no file is larger than {format_size(low)} and smaller than {format_size(high)}"
    old, young = rule.older_than_s, rule.younger_than_s
    if old is not None and young is not None and young <= old:
        yield f"never matches: no commit is older than {format_duration(old)} and younger than {format_duration(young)}"


PORT = Kind("PORT", _integer("a port", 0, 65535), _integer_from_text)
CONNECTIONS = Kind("N", _integer("a number of connections", 1, 1_000_000), _integer_from_text)
FILES = Kind("N", _integer("a number of files", 1, 1_000_000), _integer_from_text)
COUNT = Kind("N", _integer("a number of connections", 1, 1024), _integer_from_text)
FLAG = Kind("BOOL", _boolean, lambda text: {"true": True, "false": False}.get(text, text))
LISTEN_HOST = Kind("HOST", _listen_host)
PREFIX = Kind("PATH", _prefix)
PUBLIC_URL = Kind("URL", _base_url_or_empty)
DIRECTORY = Kind("DIR", _path, plain=str)
DIRECTORY_OR_NONE = Kind("DIR", _path_or_none, plain=lambda path: str(path or ""))
FILE_OR_NONE = Kind("FILE", _path_or_none, plain=lambda path: str(path or ""))
DURATION = Kind("DURATION", parse_duration, plain=format_duration)
SIZE = Kind("SIZE", parse_size, plain=format_size)
SIZE_OR_NONE = Kind("SIZE", _size_or_none, plain=lambda size: "" if size is None else format_size(size))
RATE_OR_NONE = Kind("SIZE/s", _rate_or_none, plain=lambda rate: "" if rate is None else f"{format_size(rate)}/s")


def _trusted_key(value: object) -> str:
    """A public key of minisign in its 56 letters, or the whole path of a file of one."""
    text = _text(value)
    if not re.fullmatch(r"RW[A-Za-z0-9+/]{54}", text) and not (text.startswith("/") and text.isprintable()):
        raise BadValue(f"{shown(text)} is neither a public key (56 letters that begin with RW) nor the whole path of a file")
    return text


RATE_OR_NONE = Kind("SIZE/s", _rate_or_none, plain=lambda rate: "" if rate is None else f"{format_size(rate)}/s")
UPSTREAM_URLS = Kind(
    "URL",
    _upstream_item,
    _split,
    plain=lambda upstreams: [{"url": upstream.url, "trusted": upstream.trusted} for upstream in upstreams],
    gather=_gather_upstreams,
)
GIT_MIRRORS = Kind(
    "NAME=URL",
    _git_mirror,
    _split,
    plain=lambda mirrors: [{"name": mirror.name, "url": mirror.url} for mirror in mirrors],
    gather=_gather_git_mirrors,
)
BLOB_HOSTS = Kind(
    "HOST",
    _blob_host,
    _split,
    plain=lambda hosts: [_plain_blob_host(host) for host in hosts if host.named],
    gather=_gather_blob_hosts,
)
CONTACT = Kind("TEXT", _line(120))
ORIGIN = Kind("NAME", _origin)
TRUSTED_KEYS = Kind("KEY", _trusted_key, _split, plain=list, gather=tuple)


def _list_of(metavar: str, parse: Callable[[Any], Any]) -> Kind:
    return Kind(metavar, parse, _split, plain=list, gather=_items)


_LISTS = {
    "repos": _list_of("REPO", _repo_pattern),
    "kinds": _list_of("KIND", _one_of(RepoKind)),
    "licences": _list_of("LICENCE", _licence_pattern),
    "formats": _list_of("FORMAT", _format),
    "groups": _list_of("GROUP", _group),
}
RULE_KEYS: Mapping[str, tuple[str, Kind]] = {
    "name": ("name", Kind("NAME", _rule_name)),
    "action": ("action", Kind("ACTION", _one_of(Action))),
    **{name: (name, kind) for key, kind in _LISTS.items() for name in (key, f"not_{key}")},
    "larger_than": ("larger_than_bytes", SIZE),
    "smaller_than": ("smaller_than_bytes", SIZE),
    "younger_than": ("younger_than_s", DURATION),
    "older_than": ("older_than_s", DURATION),
    "dry_run": ("is_dry_run", FLAG),
}
"""Every key of a [[rules]] table, with the field of Rule that it sets."""
POLICY_KEYS: Mapping[str, tuple[str, Kind]] = {
    "name": ("name", Kind("NAME", _rule_name)),
    "repos": ("repos", _LISTS["repos"]),
    "who": ("who", _LISTS["groups"]),
    "token_file": ("token_file", Kind("FILE", _path, plain=str)),
}
"""Every key of a [[policies]] table, with the field of PolicyTable that it sets."""

SITE_KEYS: Mapping[str, tuple[str, Kind]] = {
    "name": ("name", Kind("NAME", _site_name)),
    "url": ("url", Kind("URL", _base_url)),
    "who": ("who", _LISTS["groups"]),
    "max_file_size": ("max_file_size_bytes", SIZE),
}
"""Every key of a [[sites]] table, with the field of SiteTable that it sets."""


def site_key_hint(key: str) -> str:
    """What to write instead of a key that sites do not have."""
    return did_you_mean(key, SITE_KEYS)


FOLLOW_KEYS: Mapping[str, tuple[str, Kind]] = {
    "repo": ("repo", Kind("REPO", _repo)),
    "revision": ("revision", Kind("REV", _revision)),
    "include": ("include", _list_of("PATTERN", _pattern)),
    "exclude": ("exclude", _list_of("PATTERN", _pattern)),
    "every": ("every_s", Kind("DURATION", _interval, plain=format_duration)),
    "window": ("window", Kind("HH:MM-HH:MM", lambda value: Window.from_text(_text(value)), plain=str)),
    "keep": ("keep", Kind("N", _integer("a number of commits to keep", 1, 1000))),
}
"""Every key of a [[follow]] table, with the field of Follow that it sets."""


def follow_key_hint(key: str) -> str:
    """What to write instead of a key that what is followed does not have."""
    return did_you_mean(key, FOLLOW_KEYS)


def policy_key_hint(key: str) -> str:
    """What to write instead of a key that policies do not have."""
    return did_you_mean(key, POLICY_KEYS)


_OTHER_WORDS = {"min_age": "younger_than", "max_age": "older_than", "min_size": "smaller_than", "max_size": "larger_than"}


def rule_key_hint(key: str) -> str:
    """What to write instead of a key that rules do not have."""
    meant = _OTHER_WORDS.get(key)
    return f"; write {meant}, in a rule that denies" if meant else did_you_mean(key, RULE_KEYS)


def did_you_mean(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str:
    nearest = difflib.get_close_matches(name, list(valid), n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]}?" if nearest else ""
