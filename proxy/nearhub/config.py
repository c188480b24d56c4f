"""Nearhub's settings: defaults, then a TOML file, then NEARHUB_* variables, then flags; all problems are told at once.

The only reader of the environment, which is handed in as a mapping. ``cli`` and ``web.app`` read a Config; every other
object is given the two or three values it needs. What a setting *does* must not be in here. The fields of the table
classes are the one list of settings: TOML keys, variables, flags, ``rendered`` and ``sample`` all follow from them.
"""

import difflib
import ipaddress
import json
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nearhub.units import BadValue, format_duration, format_size, parse_duration, parse_size, shown

HUB_BLOB_HOSTS = (
    "us.aws.cdn.hf.co",
    "us.gcp.cdn.hf.co",
    "cas-bridge.xethub.hf.co",
    "cdn-lfs.hf.co",
    "cdn-lfs-us-1.hf.co",
    "cdn-lfs-eu-1.hf.co",
)


class ConfigError(Exception):
    """The settings cannot be used. ``problems`` holds every reason, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(" ".join(problem.splitlines()) for problem in problems)
        super().__init__("\n".join(self.problems))


# --- values ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UpstreamUrl:
    """One upstream, without trailing slash. An upstream that is not trusted carries bytes, and no names or tokens."""

    url: str
    trusted: bool


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


# --- kinds: how a value is read and written -------------------------------------------------------------------------


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


def _authority(text: str) -> tuple[str, int | None]:
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
    _authority(match[1])
    _check_segments((match[2] or "").removesuffix("/"))
    return text.removesuffix("/")


def _base_url_or_empty(value: object) -> str:
    return "" if value == "" else _base_url(value)


def _upstream_item(value: object) -> tuple[str, bool | None]:
    """One entry of ``urls``; trust is None where the entry leaves it to its position."""
    if not isinstance(value, dict):
        return _base_url(value), None
    if unknown := [key for key in value if key not in {"url", "trusted"}]:
        raise BadValue(*(f"unknown key {shown(key)}{_did_you_mean(key, ['url', 'trusted'])}" for key in unknown))
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


def _blob_host(value: object) -> BlobHost:
    text = _text(value)
    if "@" in text:
        raise BadValue("must not hold a user name or a password")
    scheme, separator, authority = text.rpartition("://")
    if separator and scheme not in {"http", "https"}:
        raise BadValue(f"{shown(text)} must start with http:// or https://, or with the host")
    host, port = _authority(authority)
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


PORT = Kind("PORT", _integer("a port", 0, 65535), _integer_from_text)
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
UPSTREAM_URLS = Kind(
    "URL",
    _upstream_item,
    _split,
    plain=lambda upstreams: [{"url": upstream.url, "trusted": upstream.trusted} for upstream in upstreams],
    gather=_gather_upstreams,
)
BLOB_HOSTS = Kind(
    "HOST",
    _blob_host,
    _split,
    plain=lambda hosts: [_plain_blob_host(host) for host in hosts if host.named],
    gather=_gather_blob_hosts,
)


# --- settings -------------------------------------------------------------------------------------------------------


def _about(kind: Kind, default: object, doc: str, *, key: str = "", flag: str = "") -> dict[str, Any]:
    """A field's metadata. ``default`` is as TOML would give it; ``key`` differs from a field that names its unit."""
    return {"kind": kind, "default": default, "doc": doc, "key": key, "flag": flag}


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where and under which name the mirror listens."""

    host: str = field(
        metadata=_about(
            LISTEN_HOST,
            "127.0.0.1",
            "Address to listen on; 0.0.0.0 for every IPv4 address of this machine.",
            flag="--host",
        )
    )
    port: int = field(metadata=_about(PORT, 8090, "Port to listen on; 0 takes any free one.", flag="--port"))
    prefix: str = field(
        metadata=_about(
            PREFIX,
            "",
            "Path that the mirror is served under, such as /huggingface-proxy; empty for the root.",
            flag="--prefix",
        )
    )
    public_url: str = field(
        metadata=_about(
            PUBLIC_URL,
            "",
            "What clients set as HF_ENDPOINT, any path included, where a front server changes host, scheme or path; "
            "empty: taken from each request.",
            flag="--public-url",
        )
    )
    drain_s: float = field(
        metadata=_about(DURATION, "30s", "Time that running downloads get to finish after SIGTERM.", key="drain")
    )


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Where the mirror keeps its files."""

    dir: Path = field(
        metadata=_about(
            DIRECTORY,
            "~/.cache/nearhub",
            "Directory of the cache; where XDG_CACHE_HOME is set, the default is nearhub in there.",
            flag="--cache-dir",
        )
    )
    index_dir: Path | None = field(
        metadata=_about(
            DIRECTORY_OR_NONE,
            "",
            "Local directory of the index, needed only when the cache is on a network file system; empty: in it.",
        )
    )
    allow_group: bool = field(
        metadata=_about(FLAG, False, "Start although the cache is writable for its group, as Kubernetes volumes are.")
    )


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """Where the mirror gets what it does not have."""

    urls: tuple[UpstreamUrl, ...] = field(
        metadata=_about(
            UPSTREAM_URLS,
            ["https://huggingface.co"],
            "Upstreams, the preferred one first. The first is trusted; the others carry bytes only, unless they are "
            'written as { url = "https://…", trusted = true }.',
            flag="--upstream",
        )
    )
    blob_hosts: tuple[BlobHost, ...] = field(
        metadata=_about(
            BLOB_HOSTS,
            [],
            "Hosts that upstream may redirect content to, besides the Hub's own, which are always allowed: "
            f"{', '.join(HUB_BLOB_HOSTS)}. HOST allows the scheme's default port, HOST:PORT exactly that one; "
            "http://HOST allows plain http.",
            flag="--blob-host",
        )
    )
    ref_ttl_s: float = field(
        metadata=_about(
            DURATION,
            "60s",
            "How long the commit that a branch or tag names is used before upstream is asked again.",
            key="ref_ttl",
            flag="--ref-ttl",
        )
    )
    connections: int = field(
        metadata=_about(COUNT, 32, "Connections to upstream, of all fills together.", flag="--connections")
    )
    ca_bundle: Path | None = field(
        metadata=_about(
            FILE_OR_NONE,
            "",
            "PEM file of the certificate authorities to trust for upstream; empty: the system's.",
            flag="--ca-bundle",
        )
    )


@dataclass(frozen=True, slots=True)
class FillConfig:
    """How blobs are brought in."""

    connections: int = field(
        metadata=_about(
            COUNT,
            16,
            "Connections to upstream per blob; the default is never more than upstream.connections.",
        )
    )
    client_connections: int = field(
        metadata=_about(
            COUNT,
            24,
            "Connections to upstream per client address; the default is never more than upstream.connections.",
        )
    )
    orphan_limit_bytes: int = field(
        metadata=_about(
            SIZE,
            "4GiB",
            "A fill whose last reader left goes on if at most this much is missing, or if half of the blob is there.",
            key="orphan_limit",
        )
    )


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting, resolved and valid. ``origins`` tells where each came from, by name (``server.port``)."""

    server: ServerConfig
    cache: CacheConfig
    upstream: UpstreamConfig
    fill: FillConfig
    proxies: Proxies
    origins: Mapping[str, str] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Setting:
    """One declared field: its place in the file, its names elsewhere, and how to read it."""

    table: str
    field_name: str
    kind: Kind
    default: Any
    doc: str
    key: str
    flag: str

    @property
    def name(self) -> str:
        return f"{self.table}.{self.key}"

    @property
    def variable(self) -> str:
        return f"NEARHUB_{self.table}_{self.key}".upper()


_TABLES: Mapping[str, type[Any]] = {
    "server": ServerConfig,
    "cache": CacheConfig,
    "upstream": UpstreamConfig,
    "fill": FillConfig,
}
SETTINGS = tuple(
    Setting(table, declared.name, **{**declared.metadata, "key": declared.metadata["key"] or declared.name})
    for table, cls in _TABLES.items()
    for declared in fields(cls)
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}
_BY_VARIABLE = {setting.variable: setting for setting in SETTINGS}


# --- loading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given:
    """One value from one source. ``where`` begins its problems; ``item_wheres`` does for the items of a list."""

    setting: Setting
    value: Any
    origin: str
    where: str
    base: Path
    item_wheres: tuple[str, ...] = ()


def load(config_file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Config:
    """Resolve every setting, or raise ConfigError with all that is wrong.

    ``flags`` maps names such as ``server.port`` to text, to a list of texts, or to None where the flag was not given.
    A value that another source overrides must be readable all the same.
    """
    problems: list[str] = []
    given = [*_from_file(config_file, problems), *_from_environ(environ, problems), *_from_flags(flags)]
    given += _from_defaults(environ, besides={candidate.setting.name for candidate in given})
    values: dict[str, Any] = {}
    winners: dict[str, _Given] = {}
    for candidate in given:
        name = candidate.setting.name
        complaints = list(_read(candidate, environ, values))
        if complaints:
            values.pop(name, None)
        problems += complaints
        winners[name] = candidate
    for name in ("fill.connections", "fill.client_connections"):
        if winners[name].origin == "default" and "upstream.connections" in values:
            values[name] = min(values[name], values["upstream.connections"])
    problems += _conflicts(values, winners)
    proxies = _read_proxies(environ, problems)
    if problems:
        raise ConfigError(problems)
    tables = {
        table: cls(**{setting.field_name: values[setting.name] for setting in SETTINGS if setting.table == table})
        for table, cls in _TABLES.items()
    }
    origins = {name: winner.origin for name, winner in winners.items()}
    return Config(**tables, proxies=proxies, origins=MappingProxyType(origins))


def _from_defaults(environ: Mapping[str, str], besides: Set[str]) -> Iterator[_Given]:
    for setting in SETTINGS:
        if setting.name in besides:
            continue
        default = setting.default
        # XDG Base Directory: a relative XDG_CACHE_HOME is to be ignored.
        if setting.name == "cache.dir" and environ.get("XDG_CACHE_HOME", "").startswith("/"):
            default = f"{environ['XDG_CACHE_HOME']}/nearhub"
        yield _Given(setting, default, "default", setting.name, Path())


def _from_file(config_file: Path | None, problems: list[str]) -> Iterator[_Given]:
    if config_file is None:
        return
    try:
        text = config_file.read_bytes().decode()
        document = tomllib.loads(text)
    except OSError as error:
        problems.append(f"{config_file}: cannot be read: {error.strerror}")
        return
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problems.append(f"{config_file}:{line}: not valid TOML: the file must be UTF-8")
        return
    except ValueError as error:
        problems.append(_syntax_problem(config_file, text, str(error)))
        return

    lines = locate(text)
    problems += _unknown_keys(config_file, document, lines)
    for setting in SETTINGS:
        table = document.get(setting.table)
        if not isinstance(table, dict) or setting.key not in table:
            continue
        value, path = table[setting.key], (setting.table, setting.key)
        origin = f"{config_file}:{_line(lines, path)}"
        items = range(len(value)) if isinstance(value, list) else ()
        item_wheres = tuple(f"{config_file}:{_line(lines, (*path, i))}: {setting.name}[{i}]" for i in items)
        base = config_file.absolute().parent
        yield _Given(setting, value, origin, f"{origin}: {setting.name}", base, item_wheres)


def _syntax_problem(config_file: Path, text: str, message: str) -> str:
    """tomllib tells the place only in its message: move it to the front."""
    reason, place, _ = message.partition(" (at ")
    match = re.search(r"\(at line ([0-9]+), column ([0-9]+)\)", message)
    line, column = (match[1], f" (column {match[2]})") if match else (len(text.splitlines()) if place else 1, "")
    return f"{config_file}:{line}: not valid TOML: {reason}{column}"


def _from_environ(environ: Mapping[str, str], problems: list[str]) -> Iterator[_Given]:
    for variable, text in sorted(environ.items()):
        if not variable.startswith("NEARHUB_") or _is_service_link(variable, environ):
            continue
        if (setting := _BY_VARIABLE.get(variable)) is None:
            problems.append(f"{variable}: unknown variable{_did_you_mean(variable, _BY_VARIABLE)}")
        else:
            yield _Given(setting, setting.kind.from_text(text), variable, variable, Path.cwd())


def _is_service_link(variable: str, environ: Mapping[str, str]) -> bool:
    """Kubernetes describes each Service in variables; those of one called nearhub or nearhub-… look like settings."""
    link = r"NEARHUB_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
    return (
        "KUBERNETES_SERVICE_HOST" in environ
        and re.fullmatch(link, variable) is not None
        and (variable not in _BY_VARIABLE or "://" in environ[variable])
    )


def _from_flags(flags: Mapping[str, object]) -> Iterator[_Given]:
    for name, value in flags.items():
        if value is not None:
            setting = _BY_NAME[name]
            read = setting.kind.from_text(value) if isinstance(value, str) else value
            yield _Given(setting, read, setting.flag, setting.flag, Path.cwd())


def _read(given: _Given, environ: Mapping[str, str], values: dict[str, Any]) -> Iterator[str]:
    """Put the parsed value into ``values``, or yield what is wrong with it."""
    kind = given.setting.kind
    try:
        if isinstance(given.value, str) and (meant := kind.from_text(given.value)) != given.value:
            raise BadValue("must be a list: [ … ]" if kind.gather else f"is text; write {_toml(meant)}, without quotes")
        if kind.gather is None:
            value = kind.parse(given.value)
        elif isinstance(given.value, list):
            items = []
            for index, raw in enumerate(given.value):
                try:
                    items.append(kind.parse(raw))
                except BadValue as bad:
                    where = given.item_wheres[index] if given.item_wheres else given.where
                    yield from (f"{where}: {complaint}" for complaint in bad.args)
            if len(items) < len(given.value):
                return
            value = kind.gather(items)
        else:
            raise BadValue(f"{shown(given.value)} is not a list")
        values[given.setting.name] = _anchored(value, given.base, environ) if isinstance(value, Path) else value
    except BadValue as bad:
        yield from (f"{given.where}: {complaint}" for complaint in bad.args)


def _anchored(path: Path, base: Path, environ: Mapping[str, str]) -> Path:
    """An absolute path: ``~/`` starts at HOME, a relative one at ``base``."""
    if not path.parts[:1] or not path.parts[0].startswith("~"):
        return base / path
    if path.parts[0] != "~":
        raise BadValue(f"{shown(str(path))} starts at another user's home; write the whole path")
    if not environ.get("HOME", "").startswith("/"):
        raise BadValue(f"{shown(str(path))} starts at your home, but HOME is not set; write the whole path")
    return Path(environ["HOME"], *path.parts[1:])


def _conflicts(values: Mapping[str, Any], winners: Mapping[str, _Given]) -> Iterator[str]:
    """What is wrong though every value by itself can be read. A missing value has been complained about already."""
    total = values.get("upstream.connections")
    for name in ("fill.connections", "fill.client_connections"):
        if total is not None and values.get(name, 0) > total:
            yield (
                f"{winners[name].where}: {values[name]} is more than all connections to upstream together "
                f"({total}, {winners['upstream.connections'].origin}); raise upstream.connections or lower this"
            )
    cache_dir, index_dir = values.get("cache.dir"), values.get("cache.index_dir")
    if cache_dir and index_dir and index_dir.is_relative_to(cache_dir):
        yield (
            f"{winners['cache.index_dir'].where}: {index_dir} is in the cache directory {cache_dir}; "
            "name a directory on a local disk, or leave it out"
        )
    own_url = values.get("server.public_url")
    if own_url and own_url in (upstream.url for upstream in values.get("upstream.urls", ())):
        yield f"{winners['upstream.urls'].where}: {own_url} is this mirror's own public_url; it cannot fill from itself"
    if ca_bundle := values.get("upstream.ca_bundle"):
        yield from (f"{winners['upstream.ca_bundle'].where}: {complaint}" for complaint in _ca_complaints(ca_bundle))


def _ca_complaints(ca_bundle: Path) -> Iterator[str]:
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_bundle)
    except ssl.SSLError:
        yield f"{ca_bundle} holds no certificates in PEM form"
    except OSError as error:
        yield f"{ca_bundle} cannot be read: {error.strerror}"


def _read_proxies(environ: Mapping[str, str], problems: list[str]) -> Proxies:
    """Lower case wins, as in curl and urllib, even if empty. Complaints never quote a value: it may hold a password."""

    def proxy(variable: str) -> str | None:
        name = variable if variable in environ else variable.upper()
        text = environ.get(name, "").strip()
        if not text:
            return None
        url = text if "://" in text else f"http://{text}"
        match = re.fullmatch(r"https?://(?:[!-?A-~]*@)?([^/@]+)/?", url)
        try:
            if match is None:
                raise BadValue
            _authority(match[1])
        except BadValue:
            problems.append(f"{name}: is not a proxy; write http://HOST:PORT (SOCKS is not supported)")
        return url

    no_proxy = environ.get("no_proxy", environ.get("NO_PROXY", ""))
    return Proxies(proxy("https_proxy"), proxy("http_proxy"), tuple(re.findall(r"[^,\s]+", no_proxy)))


# --- writing --------------------------------------------------------------------------------------------------------


def rendered(config: Config) -> str:
    """The settings in force as a TOML file that loads to the same ones, with the origin of each beside it.

    What the file cannot hold follows in comments; the passwords of outbound proxies are left out.
    """
    blocks = []
    for table in _TABLES:
        section = getattr(config, table)
        lines = [
            f"{setting.key} = {_toml(setting.kind.plain(getattr(section, setting.field_name)))}  "
            f"# {config.origins[setting.name]}"
            for setting in SETTINGS
            if setting.table == table
        ]
        blocks.append("\n".join([f"[{table}]", *lines]))
    proxies = (("HTTPS_PROXY", config.proxies.https), ("HTTP_PROXY", config.proxies.http))
    remarks = [f"# {name}: {re.sub('//.*@', '//***@', url) if url else 'none'}" for name, url in proxies]
    remarks.append(f"# NO_PROXY: {', '.join(config.proxies.no_proxy) or 'none'}")
    remarks.append(f"# Blob hosts that are always allowed: {', '.join(HUB_BLOB_HOSTS)}")
    return "\n\n".join([*blocks, "\n".join(remarks)]) + "\n"


def sample() -> str:
    """deploy/nearhub.toml, word for word: every setting with its default, its meaning and its other names."""
    parts = [_SAMPLE_HEAD]
    for table, cls in _TABLES.items():
        parts.append(f"\n# {cls.__doc__}\n[{table}]\n")
        for setting in SETTINGS:
            if setting.table == table:
                names = f"{setting.variable}{f', {setting.flag}' if setting.flag else ''}"
                comment = "\n# ".join(textwrap.wrap(setting.doc, 118, break_on_hyphens=False))
                parts.append(f"\n# {comment}\n# ({names})\n#{setting.key} = {_toml(setting.default)}\n")
    return "".join(parts)


_SAMPLE_HEAD = """\
# Every setting of nearhub, with its default. To change one, remove the # before its key.
#
# A variable overrides this file, and a flag overrides both; they are named in parentheses. In a variable, the items of
# a list are separated by commas; a flag is repeated. Sizes need a unit (500GB, 4GiB), and so do durations (250ms, 60s,
# 5min, 2h, 1d). A relative path starts at this file's directory; in a variable or a flag, at the working directory.
# `nearhub check-config --config FILE` shows what is in force and where it came from.
#
# HTTPS_PROXY, HTTP_PROXY and NO_PROXY are read from the environment only.
"""


def _toml(value: object) -> str:
    """A value as TOML source; for what settings hold, JSON's strings, numbers and booleans are TOML's."""
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_toml_key(key)} = {_toml(item)}' for key, item in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


# --- unknown names --------------------------------------------------------------------------------------------------


def _did_you_mean(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str:
    nearest = difflib.get_close_matches(name, list(valid), n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]}?" if nearest else ""


KeyPath = tuple[str | int, ...]


def _unknown_keys(config_file: Path, document: Mapping[str, Any], lines: Mapping[KeyPath, int]) -> Iterator[str]:
    for table, content in document.items():
        if table in _TABLES and not isinstance(content, dict):
            yield f"{config_file}:{_line(lines, (table,))}: {table}: must be a table; write [{table}]"
            continue
        known = [setting.key for setting in SETTINGS if setting.table == table]
        for path in _leaves((table,), content, known):
            where = f"{config_file}:{_line(lines, path)}: {_dotted(path)}"
            yield f"{where}: unknown key{_key_hint(path, known)}"


def _leaves(path: KeyPath, value: Any, known: Sequence[str] = ()) -> Iterator[KeyPath]:
    """The paths of all keys under ``path`` that are not known, as deep as they go."""
    if isinstance(value, dict) and (value or known):
        for key in value:
            if key not in known:
                yield from _leaves((*path, key), value[key])
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves((*path, index), item)
    else:
        yield path


def _key_hint(path: KeyPath, known: Sequence[str]) -> str:
    """The nearest valid key: of the same table, else of any other, else by the name of an unknown table."""
    words = [word for word in path if isinstance(word, str)]
    full, key = ".".join(words), words[-1]
    near = difflib.get_close_matches(key, [setting.key for setting in SETTINGS], n=1)
    return (
        (len(words) == 2 and _did_you_mean(key, known))
        or _did_you_mean(full, [setting.name for setting in SETTINGS if setting.key in near], cutoff=0.0)
        or (words[0] not in _TABLES and _did_you_mean(full, [*_BY_NAME, *_TABLES]))
        or ""
    )


def _dotted(path: KeyPath) -> str:
    """The path as TOML writes it, with [index] for the tables of an array."""
    words = (f"[{word}]" if isinstance(word, int) else f".{_toml_key(word)}" for word in path)
    return "".join(words).removeprefix(".")


# --- lines of TOML keys ---------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""
      (?:\#[^\n]*|[ \t\r]+)                                                 # nothing: comments and blanks
    | (?P<token>
        \"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5}                         # strings of several lines
      | "(?:\\.|[^"\\])*" | '[^']*'
      | [\[\]{}=,.\n]
      | [^\s\[\]{}=,."'\#]+
      )
    """,
    re.VERBOSE | re.DOTALL,
)


def locate(text: str) -> dict[KeyPath, int]:
    """The line of every key, table and array item in ``text``, which tomllib has accepted.

    tomllib tells no lines. Only the structure is followed here: values are skipped, whatever they are.
    """
    return _Locator(text).lines


def _line(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line of ``path``, or of what holds it."""
    return next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 1)


class _Locator:
    """Walks the tokens of one valid TOML document once and keeps the line of each path it meets."""

    def __init__(self, text: str) -> None:
        matches = list(_TOKEN.finditer(text))
        starts = accumulate((match[0].count("\n") for match in matches), initial=1)
        pairs = zip(matches, starts, strict=False)
        self._tokens = [(match["token"], line) for match, line in pairs if match["token"]]
        self._tokens.append(("\n", text.count("\n") + 1))
        self._at = 0
        self._array_sizes: dict[KeyPath, int] = {}
        self.lines: dict[KeyPath, int] = {}
        self._document()

    def _document(self) -> None:
        table: KeyPath = ()
        while self._at < len(self._tokens):
            if self._took("["):
                table = self._header()
            elif not self._took("\n"):
                self._pair(table)

    def _header(self) -> KeyPath:
        """``[a.b]`` or ``[[a.b]]``, after the first bracket; a name of an array stands for its latest table."""
        line = self._line()
        is_array = self._took("[")
        *parents, last = self._keys()
        path: KeyPath = ()
        for key in parents:
            path = self._latest((*path, key))
            self.lines.setdefault(path, line)
        path = (*path, last)
        if is_array:
            self.lines.setdefault(path, line)
            self._array_sizes[path] = self._array_sizes.get(path, 0) + 1
            path = self._latest(path)
        self.lines[path] = line
        while not self._took("\n"):
            self._at += 1
        return path

    def _latest(self, path: KeyPath) -> KeyPath:
        return (*path, self._array_sizes[path] - 1) if path in self._array_sizes else path

    def _pair(self, path: KeyPath) -> None:
        line = self._line()
        for key in self._keys():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self._took("=")
        self._value(path)

    def _keys(self) -> list[str]:
        keys: list[str] = []
        while not keys or self._took("."):
            token = self._tokens[self._at][0]
            self._at += 1
            keys.append(tomllib.loads(f"key = {token}")["key"] if token[0] in "\"'" else token)
        return keys

    def _value(self, path: KeyPath) -> None:
        if self._took("["):
            index = 0
            while not self._took("]"):
                if not self._took(",") and not self._took("\n"):
                    self.lines[(*path, index)] = self._line()
                    self._value((*path, index))
                    index += 1
        elif self._took("{"):
            while not self._took("}"):
                if not self._took(",") and not self._took("\n"):
                    self._pair(path)
        else:
            while self._tokens[self._at][0] not in {",", "]", "}", "\n"}:
                self._at += 1

    def _line(self) -> int:
        return self._tokens[self._at][1]

    def _took(self, text: str) -> bool:
        """Step over the next token if it is this one."""
        is_next = self._tokens[self._at][0] == text
        self._at += is_next
        return is_next
