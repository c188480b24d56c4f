"""Nearhub's settings: defaults, then a TOML file, then NEARHUB_* variables, then flags; all problems are told at once.

The only reader of the environment, which is handed in as a mapping. ``cli`` and ``web.app`` read a Config; every other
object is given the two or three values it needs. What a setting *does* must not be in here. The fields of the table
classes are the one list of settings: TOML keys, variables, flags, ``rendered`` and ``sample`` all follow from them.
"""

import difflib
import json
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nearhub.kinds import (
    BLOB_HOSTS,
    CONNECTIONS,
    CONTACT,
    COUNT,
    DIRECTORY,
    DIRECTORY_OR_NONE,
    DURATION,
    FILE_OR_NONE,
    FILES,
    FLAG,
    FOLLOW_KEYS,
    GIT_MIRRORS,
    HUB_BLOB_HOSTS,
    LISTEN_HOST,
    ORIGIN,
    POLICY_KEYS,
    PORT,
    PREFIX,
    PUBLIC_URL,
    RATE_OR_NONE,
    RULE_KEYS,
    SITE_KEYS,
    SIZE,
    SIZE_OR_NONE,
    TRUSTED_KEYS,
    UPSTREAM_URLS,
    BlobHost,
    GitMirror,
    Kind,
    PolicyTable,
    Proxies,
    SiteTable,
    UpstreamUrl,
    did_you_mean,
    follow_key_hint,
    policy_key_hint,
    rule_complaints,
    rule_key_hint,
    site_key_hint,
    split_authority,
)
from nearhub.schedule import Follow
from nearhub.toml_lines import KeyPath, line_of, locate
from nearhub.units import BadValue, shown
from nearhub.wire.rules import FORMATS, OTHER_FORMAT, Rule
from nearhub.wire.target import DEFAULT_REVISION


class ConfigError(Exception):
    """The settings cannot be used. ``problems`` holds every reason, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(" ".join(problem.splitlines()) for problem in problems)
        super().__init__("\n".join(self.problems))


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
    max_connections: int = field(
        metadata=_about(
            CONNECTIONS,
            4096,
            "Connections of all clients together; those that are idle give way first, then a new one hears 503. The system's "
            "limit of open files may allow fewer.",
        )
    )
    max_client_connections: int = field(
        metadata=_about(
            CONNECTIONS,
            512,
            "Connections of one client address; the default is never more than server.max_connections. Behind a front server "
            "all clients have its address.",
        )
    )
    request_timeout_s: float = field(
        metadata=_about(
            DURATION,
            "10s",
            "Time that the head of a new connection's first request may take, and that a request's body may keep the mirror "
            "waiting.",
            key="request_timeout",
        )
    )
    idle_timeout_s: float = field(
        metadata=_about(
            DURATION,
            "75s",
            "Time that a connection stays open without a request; more than a front server keeps its own for.",
            key="idle_timeout",
        )
    )
    stall_timeout_s: float = field(
        metadata=_about(
            DURATION,
            "60s",
            "Time that a client may take nothing of what it is sent, before its connection is cut (Linux).",
            key="stall_timeout",
        )
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
    max_size_bytes: int | None = field(
        metadata=_about(
            SIZE_OR_NONE,
            "",
            "What the blobs may take on disk; the least recently used ones leave to make room. Empty: what the disk holds, "
            "less 2 % of it (1 GiB at most).",
            key="max_size",
            flag="--max-size",
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
    offline: bool = field(
        metadata=_about(
            FLAG,
            False,
            "Ask nobody outside, ever: everything is answered from what is here. `nearhub offline on|off|auto` switches "
            "a running mirror until it ends.",
            flag="--offline",
        )
    )
    offline_after_s: float = field(
        metadata=_about(
            DURATION,
            "60s",
            "How long upstream may be silent before the mirror is offline of its own accord, until upstream answers again.",
            key="offline_after",
        )
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
class GitConfig:
    """What git clones from here: every repo of the Hub, and repos of other hosts by a name of yours."""

    mirrors: tuple[GitMirror, ...] = field(
        metadata=_about(
            GIT_MIRRORS,
            [],
            "Repos of other git hosts: each has a table of its own, and is cloned from this mirror as NAME.git.",
            flag="--git",
        )
    )
    max_repo_size_bytes: int = field(
        metadata=_about(
            SIZE,
            "20GiB",
            "What one repo's git objects may take on disk (LFS files, which are blobs, apart); a larger one is refused.",
            key="max_repo_size",
        )
    )
    fetch_timeout_s: float = field(
        metadata=_about(DURATION, "1h", "Time that bringing one repo's git objects may take.", key="fetch_timeout")
    )
    sessions: int = field(
        metadata=_about(COUNT, 16, "Clones and fetches that are answered at once; more of them wait for their turn.")
    )


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Who may have what, besides the policies and the rules, which stand at the end."""

    contact: str = field(
        metadata=_about(
            CONTACT, "", "Whom a refusal tells people to ask: an address, a URL or a name, in one line; empty: nobody."
        )
    )
    tokens: Path | None = field(
        metadata=_about(
            FILE_OR_NONE,
            "",
            "File of the mirror's own tokens, which `nearhub token add NAME --group GROUP` keeps: they name people to policies "
            "and rules, and are sent to nobody. Empty: there are none.",
        )
    )


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """Who got what, when, by which rule: CACHE/audit, for `nearhub audit verify`."""

    enabled: bool = field(
        metadata=_about(
            FLAG, False, "Write a line for every answer about a repo, and every refusal: addresses and names of people too."
        )
    )
    max_file_size_bytes: int = field(
        metadata=_about(SIZE, "64MiB", "A file of it is as large as this, then a new one is begun.", key="max_file_size")
    )
    keep_files: int = field(metadata=_about(FILES, 64, "So many files are kept; the oldest leave."))


@dataclass(frozen=True, slots=True)
class PrefetchConfig:
    """What `nearhub prefetch` and the repos that are followed, see below, may take of the link."""

    max_rate_bytes: int | None = field(
        metadata=_about(
            RATE_OR_NONE,
            "",
            "Bytes a second for all that nobody waits for yet, such as 50MB/s; empty: what clients leave, over a quarter of "
            "the connections at most. Of a file that a client asks for meanwhile, the rest comes at full speed.",
            key="max_rate",
            flag="--max-rate",
        )
    )


@dataclass(frozen=True, slots=True)
class LogConfig:
    """The transparency log of what upstreams said, under /-/log/."""

    origin: str = field(
        metadata=_about(
            ORIGIN,
            "",
            "Name of the log, such as mirror.example.org/-/log; it keeps the one it began with. Empty: one made of its key.",
        )
    )


@dataclass(frozen=True, slots=True)
class ImportConfig:
    """Which bundles are let in."""

    trusted_keys: tuple[str, ...] = field(
        metadata=_about(
            TRUSTED_KEYS,
            [],
            "Public keys of who may sign bundles, as `nearhub keygen` or minisign print them, or files of them by their whole "
            "path. Empty: any bundle is imported, also one that nobody signed.",
        )
    )


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting, resolved and valid. ``origins`` tells where each came from, by name (``server.port``).

    ``rules``, ``policies``, ``sites``, ``follow``: the tables of these names, in the order of the file; each knows its place.
    """

    server: ServerConfig
    cache: CacheConfig
    upstream: UpstreamConfig
    fill: FillConfig
    git: GitConfig
    log: LogConfig
    access: AccessConfig
    audit: AuditConfig
    prefetch: PrefetchConfig
    imports: ImportConfig
    rules: tuple[Rule, ...]
    policies: tuple[PolicyTable, ...]
    sites: tuple[SiteTable, ...]
    follow: tuple[Follow, ...]
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
    "access": AccessConfig,
    "audit": AuditConfig,
    "log": LogConfig,
    "git": GitConfig,
    "prefetch": PrefetchConfig,
    "import": ImportConfig,
}
_FIELDS = {"import": "imports"}
"""Tables whose name Python does not take for a field."""
SETTINGS = tuple(
    Setting(table, declared.name, **{**declared.metadata, "key": declared.metadata["key"] or declared.name})
    for table, cls in _TABLES.items()
    for declared in fields(cls)
)
_NEVER_MORE = {
    "fill.connections": "upstream.connections",
    "fill.client_connections": "upstream.connections",
    "server.max_client_connections": "server.max_connections",
}
"""Settings whose defaults give way to another setting."""
_NAMED = "git.mirrors"
"""The one setting whose items are tables in the file: [git.NAME]."""
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
    arrays: dict[str, list[Any]] = {name: [] for name in _ARRAY_NAMES}
    given = [*_from_file(config_file, environ, arrays, problems), *_from_environ(environ, problems), *_from_flags(flags)]
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
    for name, most in _NEVER_MORE.items():
        if winners[name].origin == "default" and most in values:
            values[name] = min(values[name], values[most])
    problems += _conflicts(values, winners)
    proxies = _read_proxies(environ, problems)
    if problems:
        raise ConfigError(problems)
    tables = {
        _FIELDS.get(table, table): cls(
            **{setting.field_name: values[setting.name] for setting in SETTINGS if setting.table == table}
        )
        for table, cls in _TABLES.items()
    }
    origins = {name: winner.origin for name, winner in winners.items()}
    made: dict[str, Any] = {name: tuple(found) for name, found in arrays.items()}
    return Config(**tables, **made, proxies=proxies, origins=MappingProxyType(origins))


def _from_defaults(environ: Mapping[str, str], besides: Set[str]) -> Iterator[_Given]:
    for setting in SETTINGS:
        if setting.name in besides:
            continue
        default = setting.default
        # XDG Base Directory: a relative XDG_CACHE_HOME is to be ignored.
        if setting.name == "cache.dir" and environ.get("XDG_CACHE_HOME", "").startswith("/"):
            default = f"{environ['XDG_CACHE_HOME']}/nearhub"
        yield _Given(setting, default, "default", setting.name, Path())


def _from_file(
    config_file: Path | None, environ: Mapping[str, str], arrays: Mapping[str, list[Any]], problems: list[str]
) -> Iterator[_Given]:
    """The file's settings; what its arrays of tables say goes into ``arrays``."""
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
    for array in _ARRAYS:
        problems += _read_array(array, config_file, document.get(array.name, []), lines, environ, arrays[array.name])
    for setting in SETTINGS:
        table = document.get(setting.table)
        base = config_file.absolute().parent
        if setting.name == _NAMED and isinstance(table, dict):
            if named := {name: about for name, about in table.items() if isinstance(about, dict)}:
                paths = [(setting.table, name) for name in named]
                value = [{**about, "name": name} for name, about in named.items()]
                item_wheres = tuple(f"{config_file}:{line_of(lines, path)}: [{_dotted(path)}]" for path in paths)
                origin = f"{config_file}:{line_of(lines, paths[0])}"
                yield _Given(setting, value, origin, f"{origin}: {setting.name}", base, item_wheres)
            continue
        if not isinstance(table, dict) or setting.key not in table:
            continue
        value, path = table[setting.key], (setting.table, setting.key)
        origin = f"{config_file}:{line_of(lines, path)}"
        items = range(len(value)) if isinstance(value, list) else ()
        item_wheres = tuple(f"{config_file}:{line_of(lines, (*path, i))}: {setting.name}[{i}]" for i in items)
        yield _Given(setting, value, origin, f"{origin}: {setting.name}", base, item_wheres)


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of tables in the file: what its keys are, and what is made of each table."""

    name: str
    noun: str
    keys: Mapping[str, tuple[str, Kind]]
    needed: tuple[str, ...]
    hint: Callable[[str], str]
    make: Callable[..., Any]
    complaints: Callable[[Any], Iterable[str]]
    called: Callable[[Mapping[str, Any]], str | None] = lambda values: values.get("name")
    """By what a table is told from the others, of the values that could be read."""

    def rendered(self, made: Any) -> str:
        fields_of = {key: (getattr(made, name), kind) for key, (name, kind) in self.keys.items()}
        given = {
            key: kind.plain(value)
            for key, (value, kind) in fields_of.items()
            if value is not None and value is not False and value != () and not (key == "keep" and not value)
        }
        return "\n".join([f"[[{self.name}]]  # {made.where}", *(f"{key} = {_toml(value)}" for key, value in given.items())])


def _followed(values: Mapping[str, Any]) -> str | None:
    return f"{values['repo']}@{values.get('revision', DEFAULT_REVISION)}" if "repo" in values else None


_ARRAYS = (
    _Array("rules", "rule", RULE_KEYS, ("name", "action"), rule_key_hint, Rule, rule_complaints),
    _Array("policies", "policy", POLICY_KEYS, ("name", "repos", "who"), policy_key_hint, PolicyTable, lambda policy: ()),
    _Array("sites", "site", SITE_KEYS, ("name", "url"), site_key_hint, SiteTable, lambda site: ()),
    _Array("follow", "table", FOLLOW_KEYS, ("repo",), follow_key_hint, Follow, lambda follow: (), _followed),
)
_ARRAY_NAMES = tuple(array.name for array in _ARRAYS)


def _read_array(
    array: _Array, config_file: Path, tables: Any, lines: Mapping[KeyPath, int], environ: Mapping[str, str], made: list[Any]
) -> Iterator[str]:
    """Put what the tables say into ``made``, or yield what is wrong with them."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        yield f"{config_file}:{line_of(lines, (array.name,))}: {array.name}: must be tables; write [[{array.name}]] above each"
        return
    names: dict[str, str] = {}
    for index, table in enumerate(tables):
        place = f"{config_file}:{line_of(lines, (array.name, index))}"
        where = f"{place}: {array.name}[{index}]"
        values: dict[str, Any] = {}
        complaints = [f"{where}: has no {key}" for key in array.needed if key not in table]
        for key, value in table.items():
            path = (array.name, index, key)
            key_where = f"{config_file}:{line_of(lines, path)}: {_dotted(path)}"
            if key not in array.keys:
                complaints.append(f"{key_where}: unknown key{array.hint(key)}")
                continue
            name, kind = array.keys[key]
            items = range(len(value)) if isinstance(value, list) else ()
            item_wheres = tuple(f"{config_file}:{line_of(lines, (*path, i))}: {_dotted((*path, i))}" for i in items)
            setting = Setting(array.name, name, kind, None, "", name, "")
            given = _Given(setting, value, place, key_where, config_file.absolute().parent, item_wheres)
            complaints += _read(given, environ, values)
        read = {name.removeprefix(f"{array.name}."): value for name, value in values.items()}
        called = array.called(read)
        if called is not None and called.casefold() in names:
            complaints.append(f"{where}: {shown(called)} is the name of the {array.noun} at {names[called.casefold()]} too")
        elif called is not None:
            names[called.casefold()] = place
        if not complaints:
            one = array.make(**read, where=place)
            complaints += (f"{where}: {complaint}" for complaint in array.complaints(one))
            made.append(one)
        yield from complaints


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
            problems.append(f"{variable}: unknown variable{did_you_mean(variable, _BY_VARIABLE)}")
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
            split_authority(match[1])
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
        section = getattr(config, _FIELDS.get(table, table))
        lines = [
            f"{setting.key} = {_toml(setting.kind.plain(getattr(section, setting.field_name)))}  "
            f"# {config.origins[setting.name]}"
            for setting in SETTINGS
            if setting.table == table and setting.name != _NAMED
        ]
        blocks.append("\n".join([f"[{table}]", *lines]))
    for mirror in config.git.mirrors:
        name = f"[git.{_toml_key(mirror.name)}]"
        blocks.append(f"{name}\nurl = {_toml(mirror.url)}  # {config.origins[_NAMED]}")
    blocks += (array.rendered(one) for array in _ARRAYS for one in getattr(config, array.name))
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
            if setting.table == table and setting.name != _NAMED:
                names = f"{setting.variable}{f', {setting.flag}' if setting.flag else ''}"
                comment = "\n# ".join(textwrap.wrap(setting.doc, 118, break_on_hyphens=False))
                parts.append(f"\n# {comment}\n# ({names})\n#{setting.key} = {_toml(setting.default)}\n")
    named = _BY_NAME[_NAMED]
    comment = "\n# ".join(textwrap.wrap(named.doc, 118, break_on_hyphens=False))
    parts.append(f"\n# {comment}\n# ({named.variable}, {named.flag}: {named.kind.metavar})\n")
    parts.append('#   [git.lora-scripts-proxy]\n#   url = "https://git.example.org/lora-scripts.git"\n')
    return "".join(parts) + _SAMPLE_FOLLOW + _SAMPLE_RULES


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

_SAMPLE_FOLLOW = """
# What is followed is brought again and again, before anybody asks. Each repo has a table [[follow]]:
# repo                      "OWNER/NAME", "datasets/OWNER/NAME"
# revision                  a branch or a tag; "main" if it is left out
# include, exclude          patterns of paths, as huggingface_hub's allow_patterns and ignore_patterns
# every                     "6h" if it is left out; a failure is tried again sooner
# window                    only in these hours of the local day, such as "22:00-06:00"; what is not done goes on the next time
# keep                      so many of its last commits are pinned: they are never evicted. Left out: none
#   [[follow]]
#   repo = "our-lab/base"
#   include = ["*.json", "*.safetensors"]
#   every = "12h"
#   window = "22:00-06:00"
#   keep = 2
"""

_SAMPLE_RULES = """
# Sites: other servers of files, mirrored over plain HTTP at /-/sites/NAME/ as their answers allow it (RFC 9111). Each has a
# table [[sites]]:
# name                      its name in URLs
# url                       what is mirrored: all that is below it
# who                       groups, or names of tokens (see [access] tokens); without it, everybody who can reach the mirror
# max_file_size             larger files are not kept, such as "50GB"; without it, what the cache can hold
#   [[sites]]
#   name = "wheels"
#   url = "https://files.example.org/wheels"

# Policies say who may have repos that are not public, beyond what callers' own tokens open. Each has a table [[policies]]:
# name                      for the log
# repos                     as rules have them, see below
# who                       groups, or names of tokens (see [access] tokens); "everyone" is everybody who can reach the mirror
# token_file                file with a token of the Hub, to ask for them with; without it, only what is here is served
#   [[policies]]
#   name = "the lab's own"
#   repos = ["our-lab/*"]
#   who = ["lab"]
#   token_file = "/etc/nearhub/hub-token"

# Rules say what may be had from this mirror, and by whom. Each has a table [[rules]]; the first that matches decides, and
# what none matches may be had. A rule matches when all that it says holds; one that says nothing matches everything.
# name                      quoted by refusals (X-Error-Code: RuleRefused), which end with the contact above
# action                    "allow" or "deny"
# repos                     "OWNER/NAME" with * and ?, in any case: "OWNER/*", "datasets/OWNER/*", "*" for all of them
# kinds                     models, datasets, spaces
# licences                  as the repo's card says, with * and ?; "unknown" where it says none
# formats                   @FORMATS@; or a suffix: ".zip"
# groups                    the caller is in one of these
# not_repos, not_kinds, …   each of these five lists has a twin that holds when none of its items fits
# larger_than, smaller_than of the file, such as "50GB"
# younger_than, older_than  of the commit, such as "7d"
# dry_run                   true: what it would refuse is logged, and not refused
# `nearhub check-config --config FILE --explain REPO FILE` shows what they make of one file. Some to start from:

# Only these owners' repos.
#   [[rules]]
#   name = "only these owners"
#   action = "deny"
#   not_repos = ["our-lab/*", "meta-llama/*", "datasets/allenai/*"]

# Weights as safetensors only; configurations, tokenizers and the like are "other". One group may have the rest.
#   [[rules]]
#   name = "safetensors only"
#   action = "deny"
#   kinds = ["models"]
#   not_formats = ["safetensors", "other"]
#   not_groups = ["trusted"]

# No commit younger than 7 days.
#   [[rules]]
#   name = "a week of quarantine"
#   action = "deny"
#   younger_than = "7d"

# Only these licences; first see whom it would hit.
#   [[rules]]
#   name = "licences we may use"
#   action = "deny"
#   not_licences = ["apache-2.0", "mit", "bsd-*", "cc-by-4.0"]
#   dry_run = true
""".replace("@FORMATS@", ", ".join([*FORMATS, OTHER_FORMAT]))


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


def _unknown_keys(config_file: Path, document: Mapping[str, Any], lines: Mapping[KeyPath, int]) -> Iterator[str]:
    for table, content in document.items():
        if table in _ARRAY_NAMES:  # they are read one by one, and tell it themselves
            continue
        if table in _TABLES and not isinstance(content, dict):
            yield f"{config_file}:{line_of(lines, (table,))}: {table}: must be a table; write [{table}]"
            continue
        known = [setting.key for setting in SETTINGS if setting.table == table and setting.name != _NAMED]
        if table == "git":  # [git.NAME]: its kind tells what is wrong with it
            content = {key: value for key, value in content.items() if not isinstance(value, dict)}
        for path in _leaves((table,), content, known):
            where = f"{config_file}:{line_of(lines, path)}: {_dotted(path)}"
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
    if words == ["git", "mirrors"]:
        return "; write a table [git.NAME] for each"
    in_file = [setting for setting in SETTINGS if setting.name != _NAMED]
    near = difflib.get_close_matches(key, [setting.key for setting in in_file], n=1)
    return (
        (len(words) == 2 and did_you_mean(key, known))
        or did_you_mean(full, [setting.name for setting in in_file if setting.key in near], cutoff=0.0)
        or (words[0] not in _TABLES and did_you_mean(full, [*(setting.name for setting in in_file), *_TABLES]))
        or (words[0] not in _TABLES and did_you_mean(words[0], _ARRAY_NAMES, cutoff=0.8))
        or ""
    )


def _dotted(path: KeyPath) -> str:
    """The path as TOML writes it, with [index] for the tables of an array."""
    words = (f"[{word}]" if isinstance(word, int) else f".{_toml_key(word)}" for word in path)
    return "".join(words).removeprefix(".")
