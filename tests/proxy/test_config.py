"""Settings: where they come from, which one wins, and what is said when they cannot be used."""

import dataclasses
import re
import string
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.config import SETTINGS, Config, ConfigError, Setting, load, rendered, sample
from nearhub.kinds import HUB_BLOB_HOSTS, RULE_KEYS, BlobHost, Proxies, UpstreamUrl
from nearhub.toml_lines import KeyPath, locate
from nearhub.units import BadValue, format_duration, format_size, parse_duration, parse_size
from nearhub.wire.rules import Action, Facts, Outcome, Rule, decide
from nearhub.wire.target import Repo, RepoKind

SAMPLE_FILE = Path(__file__).parents[2] / "deploy" / "nearhub.toml"
HOME = {"HOME": "/home/someone"}


def settings(environ: Mapping[str, str] | None = None, **flags: object) -> Config:
    """Load from variables and from flags written as ``server__port``."""
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return load(None, {**HOME, **(environ or {})}, named)


def problems(environ: Mapping[str, str] | None = None, **flags: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        settings(environ, **flags)
    return caught.value.problems


@dataclasses.dataclass
class File:
    """A nearhub.toml in the working directory, named relatively, as an operator would."""

    directory: Path

    def load(self, text: str, environ: Mapping[str, str] | None = None, **flags: object) -> Config:
        Path("nearhub.toml").write_text(text)
        named = {name.replace("__", "."): value for name, value in flags.items()}
        return load(Path("nearhub.toml"), {**HOME, **(environ or {})}, named)

    def problems(self, text: str, environ: Mapping[str, str] | None = None, **flags: object) -> tuple[str, ...]:
        with pytest.raises(ConfigError) as caught:
            self.load(text, environ, **flags)
        return caught.value.problems


@pytest.fixture
def in_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> File:
    monkeypatch.chdir(tmp_path)
    return File(tmp_path)


class TestSources:
    def test_defaults(self) -> None:
        """With nothing given, everything has the documented default and says so."""
        config = settings()
        assert (config.server.host, config.server.port) == ("127.0.0.1", 8090)
        assert (config.server.prefix, config.server.public_url, config.server.drain_s) == ("", "", 30.0)
        assert config.cache.dir == Path("/home/someone/.cache/nearhub")
        assert (config.cache.max_size_bytes, config.cache.index_dir, config.cache.allow_group) == (None, None, False)
        assert config.upstream.urls == (UpstreamUrl("https://huggingface.co", trusted=True),)
        assert [host.host for host in config.upstream.blob_hosts] == list(HUB_BLOB_HOSTS)
        assert not any(host.named or host.plain_http or host.port for host in config.upstream.blob_hosts)
        assert (config.upstream.ref_ttl_s, config.upstream.connections, config.upstream.ca_bundle) == (60.0, 32, None)
        assert (config.fill.connections, config.fill.client_connections) == (16, 24)
        assert config.fill.orphan_limit_bytes == 4 * 2**30
        assert config.proxies == Proxies(None, None, ())
        assert set(config.origins.values()) == {"default"}

    def test_later_sources_win(self, in_file: File) -> None:
        """A file overrides defaults, a variable the file, a flag the variable; each value knows its origin."""
        text = '[server]\nport = 1\ndrain = "1s"\nhost = "10.0.0.1"\n'
        environ = {"NEARHUB_SERVER_PORT": "2", "NEARHUB_SERVER_DRAIN": "2s"}
        config = in_file.load(text, environ, server__port="3")
        assert (config.server.host, config.server.drain_s, config.server.port) == ("10.0.0.1", 2.0, 3)
        assert config.origins["server.host"] == "nearhub.toml:4"
        assert config.origins["server.drain"] == "NEARHUB_SERVER_DRAIN"
        assert config.origins["server.port"] == "--port"
        assert config.origins["server.prefix"] == "default"

    def test_flags_not_given(self) -> None:
        """A flag that is None was not given and overrides nothing."""
        assert settings({"NEARHUB_SERVER_PORT": "2"}, server__port=None).server.port == 2

    def test_every_setting_has_a_variable(self) -> None:
        """Each setting can be given as NEARHUB_<TABLE>_<KEY>, and lists are separated by commas."""
        environ = {
            "NEARHUB_SERVER_HOST": "::",
            "NEARHUB_SERVER_PORT": "0",
            "NEARHUB_SERVER_PREFIX": "/hub",
            "NEARHUB_SERVER_PUBLIC_URL": "https://lan.example/hub",
            "NEARHUB_SERVER_DRAIN": "0s",
            "NEARHUB_SERVER_MAX_CONNECTIONS": "100",
            "NEARHUB_SERVER_MAX_CLIENT_CONNECTIONS": "50",
            "NEARHUB_SERVER_REQUEST_TIMEOUT": "5s",
            "NEARHUB_SERVER_IDLE_TIMEOUT": "30s",
            "NEARHUB_SERVER_STALL_TIMEOUT": "90s",
            "NEARHUB_CACHE_DIR": "/big",
            "NEARHUB_CACHE_MAX_SIZE": "2TB",
            "NEARHUB_CACHE_INDEX_DIR": "/fast",
            "NEARHUB_CACHE_ALLOW_GROUP": "true",
            "NEARHUB_UPSTREAM_URLS": "https://a.example, https://b.example",
            "NEARHUB_UPSTREAM_BLOB_HOSTS": "c.example,d.example:81",
            "NEARHUB_UPSTREAM_REF_TTL": "5min",
            "NEARHUB_UPSTREAM_CONNECTIONS": "9",
            "NEARHUB_UPSTREAM_CA_BUNDLE": "",
            "NEARHUB_UPSTREAM_OFFLINE": "true",
            "NEARHUB_UPSTREAM_OFFLINE_AFTER": "5min",
            "NEARHUB_PREFETCH_MAX_RATE": "50MB/s",
            "NEARHUB_FILL_CONNECTIONS": "8",
            "NEARHUB_FILL_CLIENT_CONNECTIONS": "7",
            "NEARHUB_FILL_ORPHAN_LIMIT": "1GB",
            "NEARHUB_GIT_MIRRORS": "tools=https://git.example/tools.git, more=http://git.example:81/more",
            "NEARHUB_GIT_MAX_REPO_SIZE": "1GB",
            "NEARHUB_GIT_FETCH_TIMEOUT": "5min",
            "NEARHUB_GIT_SESSIONS": "4",
            "NEARHUB_ACCESS_CONTACT": "the ML platform team",
            "NEARHUB_ACCESS_TOKENS": "/etc/nearhub/tokens",
            "NEARHUB_AUDIT_ENABLED": "true",
            "NEARHUB_AUDIT_MAX_FILE_SIZE": "1MiB",
            "NEARHUB_AUDIT_KEEP_FILES": "8",
            "NEARHUB_LOG_ORIGIN": "lan.example/-/log",
            "NEARHUB_IMPORT_TRUSTED_KEYS": "/etc/nearhub/vetting.pub",
        }
        config = settings(environ)
        assert set(environ) == {setting.variable for setting in SETTINGS} == set(config.origins.values())
        assert (config.cache.index_dir, config.cache.allow_group) == (Path("/fast"), True)
        assert config.cache.max_size_bytes == 2 * 10**12
        assert config.log.origin == "lan.example/-/log"
        assert [upstream.url for upstream in config.upstream.urls] == ["https://a.example", "https://b.example"]
        assert [host.host for host in config.upstream.blob_hosts if host.named] == ["c.example", "d.example"]
        assert config.fill.orphan_limit_bytes == 10**9
        assert [(mirror.name, mirror.url) for mirror in config.git.mirrors] == [
            ("tools", "https://git.example/tools.git"),
            ("more", "http://git.example:81/more"),
        ]

    def test_values_cannot_change(self) -> None:
        """A Config is a value: nothing can be assigned after loading."""
        config = settings()
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.server.port = 1  # type: ignore[misc]
        with pytest.raises(TypeError):
            config.origins["server.port"] = "x"  # type: ignore[index]


class TestPaths:
    def test_xdg_cache_home(self) -> None:
        """The cache is in XDG_CACHE_HOME where that is set; a relative one is ignored, as its standard says."""
        assert settings({"XDG_CACHE_HOME": "/var/tmp/x"}).cache.dir == Path("/var/tmp/x/nearhub")
        assert settings({"XDG_CACHE_HOME": "x"}).cache.dir == Path("/home/someone/.cache/nearhub")

    def test_no_home(self) -> None:
        """Without HOME there is no default cache, and none is made up; a cache that is given needs no HOME."""
        with pytest.raises(ConfigError) as caught:
            load(None, {}, {})
        assert caught.value.problems == (
            "cache.dir: '~/.cache/nearhub' starts at your home, but HOME is not set; write the whole path",
        )
        assert load(None, {}, {"cache.dir": "/big"}).cache.dir == Path("/big")

    def test_relative_paths(self, in_file: File) -> None:
        """A relative path starts at the directory of the file that names it, or at the working directory."""
        (in_file.directory / "etc").mkdir()
        (in_file.directory / "etc" / "n.toml").write_text('[cache]\ndir = "data"\n')
        assert load(Path("etc/n.toml"), HOME, {}).cache.dir == in_file.directory / "etc" / "data"
        assert settings(cache__dir="data").cache.dir == in_file.directory / "data"
        assert settings({"NEARHUB_CACHE_DIR": "."}).cache.dir == in_file.directory

    def test_home(self) -> None:
        """Only one's own home can be written as ~."""
        assert settings(cache__dir="~/hub").cache.dir == Path("/home/someone/hub")
        assert settings(cache__dir="~").cache.dir == Path("/home/someone")
        assert problems(cache__dir="~other/hub") == (
            "--cache-dir: '~other/hub' starts at another user's home; write the whole path",
        )

    @pytest.mark.parametrize("text", ["", "a\nb", "a\0b", "a\udc80b"])
    def test_not_a_path(self, text: str) -> None:
        """What could not be a path, or not be printed, is refused."""
        (problem,) = problems(cache__dir=text)
        assert problem.startswith("--cache-dir: ") and problem.endswith(" is not a path")

    def test_index_in_the_cache(self) -> None:
        """index_dir is for a disk that the cache is not on: in the cache it is a mistake."""
        (problem,) = problems({"NEARHUB_CACHE_INDEX_DIR": "/big/index"}, cache__dir="/big")
        assert problem.startswith("NEARHUB_CACHE_INDEX_DIR: /big/index is in the cache directory /big; ")
        assert settings({"NEARHUB_CACHE_INDEX_DIR": "/bigger"}, cache__dir="/big").cache.index_dir == Path("/bigger")


class TestProblems:
    def test_all_at_once(self, in_file: File) -> None:
        """Every problem of every source is told in one go, each on one line, each with its place."""
        text = '[server]\nport = 70000\n[upstream]\n\nref_tll = "60s"\nurls = [\n  "https://a",\n  5,\n]\n'
        environ = {"NEARHUB_FILL_CONNECTIONS": "abc", "NEARHUB_SERVR_PORT": "1"}
        found = in_file.problems(text, environ, upstream__ref_ttl="60")
        assert found == (
            "nearhub.toml:5: upstream.ref_tll: unknown key; did you mean ref_ttl?",
            "NEARHUB_SERVR_PORT: unknown variable; did you mean NEARHUB_SERVER_PORT?",
            "nearhub.toml:2: server.port: 70000 is not a port (0 to 65535)",
            "nearhub.toml:8: upstream.urls[1]: 5 is not text",
            "NEARHUB_FILL_CONNECTIONS: 'abc' is not a number of connections (1 to 1024)",
            "--ref-ttl: '60' has no unit; write for example \"60s\" (units: ms, s, min, h, d)",
        )
        assert str(ConfigError(found)).splitlines() == list(found)

    def test_one_line_each(self) -> None:
        """Line breaks in names and values do not break the lines of problems."""
        assert ConfigError(["a\nb", "c"]).problems == ("a b", "c")

    def test_an_overridden_value_is_still_read(self, in_file: File) -> None:
        """A wrong value in the file is told although a flag overrides it, and the flag's value is not blamed for it."""
        assert in_file.problems("[server]\nport = -1\n", server__port="1") == (
            "nearhub.toml:2: server.port: -1 is not a port (0 to 65535)",
        )

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("[upstrem]\nref_ttl = 1", "2: upstrem.ref_ttl: unknown key; did you mean upstream.ref_ttl?"),
            ("[upstrem]\nconnections = 1", "2: upstrem.connections: unknown key; did you mean upstream.connections?"),
            ("[upstrem]", "1: upstrem: unknown key; did you mean upstream?"),
            ("[server]\nref_ttl = 1", "2: server.ref_ttl: unknown key; did you mean upstream.ref_ttl?"),
            ("[server]\nref_tll = 1", "2: server.ref_tll: unknown key; did you mean upstream.ref_ttl?"),
            ("port = 1", "1: port: unknown key; did you mean server.port?"),
            ("[zzz]\nqqq = 1", "2: zzz.qqq: unknown key"),
            ("[[zzz]]\n[[zzz]]\nqqq = 1", "1: zzz[0]: unknown key|3: zzz[1].qqq: unknown key"),
            ("[server.tls]\nqqq.rrr = 1", "2: server.tls.qqq.rrr: unknown key"),
            ('["a b"]\n"c\\nd" = 1', '2: "a b"."c\\nd": unknown key'),
            (
                "[cache]\n\nmax_sise = 1\nxyz = 2",
                "3: cache.max_sise: unknown key; did you mean max_size?|4: cache.xyz: unknown key",
            ),
        ],
    )
    def test_unknown_keys(self, in_file: File, text: str, problem: str) -> None:
        """Every unknown key is named, as deep as it is, with the nearest key that exists, if one is near."""
        assert in_file.problems(text) == tuple(f"nearhub.toml:{part}" for part in problem.split("|"))

    @pytest.mark.parametrize("text", ["server = 1", "[[server]]", "server = []"])
    def test_a_table_that_is_none(self, in_file: File, text: str) -> None:
        """A value where a table belongs is told as such."""
        assert in_file.problems(text) == ("nearhub.toml:1: server: must be a table; write [server]",)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ('port = "8090"', "server.port: is text; write 8090, without quotes"),
            ("port = true", "server.port: True is not a port (0 to 65535)"),
            ("port = 80.0", "server.port: 80.0 is not a port (0 to 65535)"),
            ("port = {a = 1}", "server.port: {'a': 1} is not a port (0 to 65535)"),
            ("host = 1", "server.host: 1 is not text"),
            ("drain = 30", 'server.drain: 30 has no unit; write for example "30s" (units: ms, s, min, h, d)'),
            ("drain = true", "server.drain: True is not a duration; write a number and a unit, for example 60s"),
        ],
    )
    def test_types(self, in_file: File, text: str, problem: str) -> None:
        """TOML's types are not converted into one another: a boolean is no number, and text is none either."""
        assert in_file.problems(f"[server]\n{text}") == (f"nearhub.toml:2: {problem}",)

    def test_booleans(self, in_file: File) -> None:
        """Booleans are true and false, in the file without quotes, and nothing that looks like them."""
        where = "nearhub.toml:2: cache.allow_group"
        assert in_file.problems("[cache]\nallow_group = 1") == (f"{where}: 1 is neither true nor false",)
        assert in_file.problems('[cache]\nallow_group = "true"') == (f"{where}: is text; write true, without quotes",)
        (problem,) = problems({"NEARHUB_CACHE_ALLOW_GROUP": "yes"})
        assert problem == "NEARHUB_CACHE_ALLOW_GROUP: 'yes' is neither true nor false"

    def test_lists(self, in_file: File) -> None:
        """A list is written as a list, even with one item."""
        where = "nearhub.toml:2: upstream.urls"
        assert in_file.problems('[upstream]\nurls = "https://a"') == (f"{where}: must be a list: [ … ]",)
        assert in_file.problems("[upstream]\nurls = 5") == (f"{where}: 5 is not a list",)
        assert in_file.problems("[upstream]\nurls = []") == (f"{where}: is empty; name at least one upstream",)

    def test_long_values_are_cut(self) -> None:
        """A problem quotes at most 80 characters of the value."""
        (problem,) = problems({"NEARHUB_SERVER_PORT": "x" * 5000})
        assert len(problem) < 150

    @pytest.mark.parametrize(
        ("content", "start"),
        [
            (b"[server]\nport 80\n", "nearhub.toml:2: not valid TOML: Expected '=' after a key"),
            (b"[server]\nport =", "nearhub.toml:2: not valid TOML: Invalid value"),
            (b"[server]\nport = 1\nport = 2\n", "nearhub.toml:3: not valid TOML: Cannot overwrite a value"),
            (b"a = 1\n# \xff\n", "nearhub.toml:2: not valid TOML: the file must be UTF-8"),
        ],
    )
    def test_syntax(self, in_file: File, content: bytes, start: str) -> None:
        """A file that is not TOML is one problem with its line, and the other sources are still checked."""
        Path("nearhub.toml").write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load(Path("nearhub.toml"), HOME, {"server.port": "x"})
        syntax, flag = caught.value.problems
        assert syntax.startswith(start) and "(at " not in syntax
        assert flag == "--port: 'x' is not a port (0 to 65535)"

    def test_unreadable_file(self, in_file: File) -> None:
        """A file that is missing or a directory is one problem."""
        with pytest.raises(ConfigError) as caught:
            load(Path("none.toml"), HOME, {})
        assert caught.value.problems == ("none.toml: cannot be read: No such file or directory",)
        with pytest.raises(ConfigError) as caught:
            load(in_file.directory, HOME, {})
        assert caught.value.problems == (f"{in_file.directory}: cannot be read: Is a directory",)


class TestVariables:
    def test_unknown(self) -> None:
        """A NEARHUB_ variable that is no setting is a problem, and its value is not told: it may be a secret."""
        assert problems({"NEARHUB_ZZZ": "hunter2"}) == ("NEARHUB_ZZZ: unknown variable",)
        (problem,) = problems({"NEARHUB_UPSTREAM_TOKEN": "hunter2"})
        assert problem.startswith("NEARHUB_UPSTREAM_TOKEN: unknown variable") and "hunter2" not in problem

    def test_others_are_ignored(self) -> None:
        """Variables of other programs are none of ours."""
        assert settings({"NEARHUBX": "1", "nearhub_server_port": "1", "PORT": "1"}) == settings()

    def test_kubernetes_service_links(self) -> None:
        """A Service called nearhub or nearhub-server puts variables into every pod; they are no settings."""
        links = {
            "NEARHUB_SERVICE_HOST": "10.96.0.1",
            "NEARHUB_SERVICE_PORT": "8090",
            "NEARHUB_SERVICE_PORT_HTTP": "8090",
            "NEARHUB_PORT": "tcp://10.96.0.1:8090",
            "NEARHUB_PORT_8090_TCP": "tcp://10.96.0.1:8090",
            "NEARHUB_PORT_8090_TCP_ADDR": "10.96.0.1",
            "NEARHUB_SERVER_SERVICE_HOST": "10.96.0.1",
            "NEARHUB_SERVER_PORT": "tcp://10.96.0.1:8090",
        }
        kubernetes = {"KUBERNETES_SERVICE_HOST": "10.96.0.2"}
        assert settings({**links, **kubernetes}).server.port == 8090
        assert settings({"NEARHUB_SERVER_PORT": "81", **kubernetes}).server.port == 81
        assert len(problems({"NEARHUB_SERVER_PORT": "x", **kubernetes})) == 1
        assert len(problems(links)) == len(links)


class TestServer:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1", "localhost", "my_box.lan"])
    def test_hosts(self, host: str) -> None:
        """One listens on addresses and on names."""
        assert settings(server__host=host).server.host == host

    @pytest.mark.parametrize("host", ["", "a b", "[::1]", "127.1", "0x7f000001", "1.2.3.256", "-a", "a..b", "a:80"])
    def test_not_hosts(self, host: str) -> None:
        """What is no name and no address, or an address in disguise, is refused."""
        assert len(problems(server__host=host)) == 1

    @pytest.mark.parametrize("prefix", ["", "/huggingface-proxy", "/a/b.c_d~e", "/-a"])
    def test_prefixes(self, prefix: str) -> None:
        """A prefix is empty or a clean path."""
        assert settings(server__prefix=prefix).server.prefix == prefix

    @pytest.mark.parametrize(
        ("prefix", "reason"),
        [
            ("hub", "must start with a slash"),
            ("/hub/", 'must not end with a slash; write "/hub"'),
            ("/", "must not end with a slash"),
            ("/a//b", "has a path segment ''"),
            ("/a/../b", "has a path segment '..'"),
            ("/a/.", "has a path segment '.'"),
            ("/a%20b", "has a path segment 'a%20b'"),
            ("/a?b", "has a path segment 'a?b'"),
            ("/ä", "has a path segment 'ä'"),
            ("/a\n", r"has a path segment 'a\n'"),
            ("/-", "is taken"),
            ("/-/x", "is taken"),
        ],
    )
    def test_not_prefixes(self, prefix: str, reason: str) -> None:
        """Any other prefix is explained, never repaired."""
        (problem,) = problems(server__prefix=prefix)
        assert problem.startswith("--prefix: ") and reason in problem

    def test_public_url(self) -> None:
        """A public URL may have a port and a path; one slash at its end means nothing."""
        assert settings(server__public_url="https://h.example:8443/a/").server.public_url == "https://h.example:8443/a"
        assert settings(server__public_url="http://[::1]:80").server.public_url == "http://[::1]:80"

    @pytest.mark.parametrize(
        "url",
        [
            *(
                "h.example",
                "//h",
                "ftp://h",
                "HTTPS://h",
                "https://",
                "https://h?a=b",
                "https://h#a",
                "https://u:p4ss@h",
            ),
            *("https://h:0", "https://h:65536", "https://h:x", "https://h//", "https://h/../a", "https://h\t"),
            *("https://::1", "https://[1]", "https://[::g]"),
        ],
    )
    def test_not_urls(self, url: str) -> None:
        """A URL that paths cannot simply be appended to is refused, and no password is told."""
        for found in (problems(server__public_url=url), problems(upstream__urls=[url])):
            assert len(found) == 1 and "p4ss" not in found[0]


class TestUpstream:
    def test_trust(self, in_file: File) -> None:
        """The first upstream is trusted and the others are not, unless an entry says otherwise."""
        text = """
            [upstream]
            urls = ["https://a/", {url = "https://b", trusted = true}, {url = "https://c"}, "https://d/hub"]
        """
        assert in_file.load(text).upstream.urls == (
            UpstreamUrl("https://a", trusted=True),
            UpstreamUrl("https://b", trusted=True),
            UpstreamUrl("https://c", trusted=False),
            UpstreamUrl("https://d/hub", trusted=False),
        )

    @pytest.mark.parametrize(
        ("items", "problem"),
        [
            ('{ulr = "https://a", x = 1}', "urls[0]: unknown key 'ulr'; did you mean url?|urls[0]: unknown key 'x'"),
            ("{trusted = true}", 'urls[0]: has no url; write { url = "https://…", trusted = true }'),
            ('{url = "https://a", trusted = 1}', "urls[0]: 1 is neither true nor false"),
            ("5", "urls[0]: 5 is not text"),
            ('"https://a", "https://a/"', "urls: 'https://a' is there more than once"),
            (
                '{url = "https://a", trusted = false}',
                "urls: has no trusted upstream; names and commits are taken from trusted ones only",
            ),
        ],
    )
    def test_wrong_entries(self, in_file: File, items: str, problem: str) -> None:
        """An entry that says too little, too much, or the same again is refused."""
        expected = tuple(f"nearhub.toml:2: upstream.{part}" for part in problem.split("|"))
        assert in_file.problems(f"[upstream]\nurls = [{items}]") == expected

    def test_itself(self) -> None:
        """A mirror whose upstream is its own public URL would wait for itself."""
        (problem,) = problems(upstream__urls=["https://a/"], server__public_url="https://a")
        assert problem == "--upstream: https://a is this mirror's own public_url; it cannot fill from itself"

    @pytest.mark.parametrize(
        ("text", "host"),
        [
            ("cdn.example", BlobHost("cdn.example", None, plain_http=False, named=True)),
            ("CDN.Example:8443", BlobHost("cdn.example", 8443, plain_http=False, named=True)),
            ("https://cdn.example", BlobHost("cdn.example", None, plain_http=False, named=True)),
            ("http://10.0.0.7:9000", BlobHost("10.0.0.7", 9000, plain_http=True, named=True)),
            ("[FD00:0::1]:443", BlobHost("fd00::1", 443, plain_http=False, named=True)),
            ("[::1]", BlobHost("::1", None, plain_http=False, named=True)),
        ],
    )
    def test_blob_hosts(self, text: str, host: BlobHost) -> None:
        """A blob host is a host, perhaps with a port, perhaps for plain http; it comes on top of the Hub's own."""
        assert settings(upstream__blob_hosts=[text]).upstream.blob_hosts == (*settings().upstream.blob_hosts, host)

    @pytest.mark.parametrize(
        "text",
        [
            *(
                "",
                "::1",
                "[::1",
                "a/b",
                "http://a/",
                "ftp://a",
                "u:p4ss@a",
                "a:0",
                "a:99999",
                "a:",
                "2130706433",
                "*.a",
            ),
            *("[a]", "[10.0.0.1]", "a b", "ä.example"),
        ],
    )
    def test_not_blob_hosts(self, text: str) -> None:
        """Anything that is more or less than a host is refused: the list guards what the mirror connects to."""
        (problem,) = problems(upstream__blob_hosts=[text])
        assert problem.startswith("--blob-host: ") and "p4ss" not in problem

    def test_a_default_blob_host_that_is_named(self) -> None:
        """An operator who names one of the Hub's hosts vouches for it; it is there once."""
        hosts = settings(upstream__blob_hosts=["cdn-lfs.hf.co", "cdn-lfs.hf.co"]).upstream.blob_hosts
        assert [host.named for host in hosts if host.host == "cdn-lfs.hf.co"] == [True]
        assert len(hosts) == len(HUB_BLOB_HOSTS)

    def test_ca_bundle(self, tmp_path: Path) -> None:
        """A CA bundle must be there and hold certificates, since a bad one would only show at the first download."""
        bundle = tmp_path / "ca.pem"
        assert problems(upstream__ca_bundle=str(bundle)) == (
            f"--ca-bundle: {bundle} cannot be read: No such file or directory",
        )
        bundle.write_text("not a certificate")
        (problem,) = problems(upstream__ca_bundle=str(bundle))
        assert problem == f"--ca-bundle: {bundle} holds no certificates in PEM form"
        bundle.write_text(SELF_SIGNED)
        assert settings(upstream__ca_bundle=str(bundle)).upstream.ca_bundle == bundle


RULES = """\
[[rules]]
name = "a"
action = "deny"
[[rules]]
name = "everything"
action = "deny"
repos = ["org/*", "datasets/Org/x?", "gpt2", "*", "datasets/*", "**"]
not_repos = ["*/*"]
kinds = ["models", "datasets", "spaces"]
not_kinds = ["spaces"]
licences = ["mit", "cc-by-*", "unknown"]
not_licences = ["llama3.1"]
formats = ["pickle", "other", ".Engine"]
not_formats = ["safetensors"]
groups = ["trusted", "röntgen lab"]
not_groups = ["x"]
larger_than = "0B"
smaller_than = "1.5GB"
younger_than = "7d"
older_than = "250ms"
dry_run = true
[[rules]]
name = "b \\\\ ü"
action = "allow"
dry_run = false
"""


class TestRules:
    def test_every_key(self, in_file: File) -> None:
        """Rules are read in the order of the file, and each knows its place."""
        first, second, third = in_file.load(RULES).rules
        assert first == Rule("a", Action.DENY) and third == Rule("b \\ ü", Action.ALLOW)
        assert second == Rule(
            "everything",
            Action.DENY,
            repos=("org/*", "datasets/Org/x?", "gpt2", "*", "datasets/*", "**"),
            not_repos=("*/*",),
            kinds=(RepoKind.MODELS, RepoKind.DATASETS, RepoKind.SPACES),
            not_kinds=(RepoKind.SPACES,),
            licences=("mit", "cc-by-*", "unknown"),
            not_licences=("llama3.1",),
            formats=("pickle", "other", ".Engine"),
            not_formats=("safetensors",),
            groups=("trusted", "röntgen lab"),
            not_groups=("x",),
            larger_than_bytes=0,
            smaller_than_bytes=1_500_000_000,
            younger_than_s=604_800.0,
            older_than_s=0.25,
            is_dry_run=True,
        )
        assert [rule.where for rule in (first, second, third)] == ["nearhub.toml:1", "nearhub.toml:4", "nearhub.toml:22"]
        assert {field.name for field in dataclasses.fields(Rule)} - {"where"} == {name for name, _ in RULE_KEYS.values()}

    def test_none(self, in_file: File) -> None:
        """Without rules there are none, wherever else settings come from."""
        assert settings().rules == () == in_file.load("[server]\n").rules

    def test_rendered_loads_to_the_same(self, in_file: File) -> None:
        """check-config prints them as they are, each with its place."""
        config = in_file.load('[access]\ncontact = "https://lab.example/help"\n' + RULES)
        text = rendered(config)
        assert in_file.load(text) == config and len(config.rules) == 3
        assert '[[rules]]  # nearhub.toml:3\nname = "a"\naction = "deny"\n\n' in text
        assert "dry_run = false" not in text and 'larger_than = "0B"\n' in text

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ('foramts = ["pickle"]', "foramts: unknown key; did you mean formats?"),
            ('license = ["mit"]', "license: unknown key; did you mean licences?"),
            ("qqq = 1", "qqq: unknown key"),
            ('min_age = "7d"', "min_age: unknown key; write younger_than, in a rule that denies"),
            ('max_size = "7GB"', "max_size: unknown key; write larger_than, in a rule that denies"),
            ("formats.x = 1", "formats: {'x': 1} is not a list"),
            ('repos = "org/*"', "repos: must be a list: [ … ]"),
            ("repos = []", "repos: is empty; name what it is about, or leave it out"),
            (
                'repos = ["org/a", "a/b/c"]',
                "repos[1]: 'a/b/c' is not a pattern of repos; write OWNER/NAME, OWNER/*, or * for all of them",
            ),
            ('repos = [""]', "repos[0]: '' is not a pattern of repos; write OWNER/NAME, OWNER/*, or * for all of them"),
            ('repos = ["org/"]', "repos[0]: 'org/' is not a pattern of repos; write OWNER/NAME, OWNER/*, or * for all of them"),
            (
                'repos = ["[a]/b"]',
                "repos[0]: '[a]/b' is not a pattern of repos; write OWNER/NAME, OWNER/*, or * for all of them",
            ),
            ('repos = ["meta-llama*"]', "repos[0]: 'meta-llama*' is about repos without an owner; write 'meta-llama*/*'"),
            ("repos = [5]", "repos[0]: 5 is not text"),
            ('kinds = ["model"]', "kinds[0]: 'model' is none of models, datasets, spaces; did you mean models?"),
            ("kinds = [true]", "kinds[0]: True is none of models, datasets, spaces"),
            (
                'licences = ["Apache 2.0"]',
                "licences[0]: 'Apache 2.0' is not a licence as the Hub writes them, such as apache-2.0, cc-by-nc-* or unknown",
            ),
            ('groups = [""]', "groups[0]: '' is not a group"),
            ('larger_than = "5"', "larger_than: '5' has no unit; write for example \"5GB\" (units: B, "),
            ("younger_than = 7", 'younger_than: 7 has no unit; write for example "7s" (units: ms, s, min, h, d)'),
            ('dry_run = "true"', "dry_run: is text; write true, without quotes"),
        ],
    )
    def test_wrong_keys_and_values(self, in_file: File, line: str, problem: str) -> None:
        """Each is told with its line, and with what was meant."""
        (found,) = in_file.problems(f'[[rules]]\nname = "a"\naction = "deny"\n{line}\n')
        assert found.startswith(f"nearhub.toml:4: rules[0].{problem}")
        if not problem.endswith(", "):
            assert found == f"nearhub.toml:4: rules[0].{problem}"

    @pytest.mark.parametrize(
        ("value", "hint"),
        [
            ("safetensor", "safetensors"),
            ("Pickle", "pickle"),
            ("bin", "pickle"),
            ("npz", "numpy"),
            ("zip", "archive"),
            ("x", ""),
        ],
    )
    def test_formats_that_are_none(self, in_file: File, value: str, hint: str) -> None:
        """A suffix without its dot is told the format that has it."""
        (found,) = in_file.problems(f'[[rules]]\nname = "a"\naction = "deny"\nformats = ["{value}"]\n')
        assert found.startswith(f"nearhub.toml:4: rules[0].formats[0]: {value!r} is no format (safetensors, pickle, ")
        assert found.endswith(f"nor a suffix such as .zip{f'; did you mean {hint}?' if hint else ''}")

    @pytest.mark.parametrize("name", ["", " a", "a\\nb", "x" * 61, 'say \\"no\\"'])
    def test_names_that_no_sentence_can_quote(self, in_file: File, name: str) -> None:
        """A name stands in every refusal, in one line and between quotes."""
        (found,) = in_file.problems(f'[[rules]]\nname = "{name}"\naction = "deny"\n')
        assert found.startswith("nearhub.toml:2: rules[0].name: ")

    def test_what_each_rule_must_have(self, in_file: File) -> None:
        """A name and an action; an action is one of two."""
        assert in_file.problems('[[rules]]\n[[rules]]\nname = "a"\naction = "denny"') == (
            "nearhub.toml:1: rules[0]: has no name",
            "nearhub.toml:1: rules[0]: has no action",
            "nearhub.toml:4: rules[1].action: 'denny' is none of allow, deny; did you mean deny?",
        )

    def test_a_name_is_one_rule_s_own(self, in_file: File) -> None:
        """Refusals are traced by it, so it is told even where the rules are wrong otherwise."""
        text = '[[rules]]\nname = "a"\naction = "no"\n[[rules]]\nname = "A"\naction = "deny"\n'
        assert in_file.problems(text)[1] == "nearhub.toml:4: rules[1]: 'A' is the name of the rule at nearhub.toml:1 too"

    @pytest.mark.parametrize(
        ("lines", "problem"),
        [
            ('action = "allow"\ndry_run = true', "dry_run is for rules that deny: one that allows refuses nothing"),
            (
                'action = "deny"\nlarger_than = "1GB"\nsmaller_than = "1GB"',
                "never matches: no file is larger than 1GB and smaller than 1GB",
            ),
            (
                'action = "deny"\nlarger_than = "4B"\nsmaller_than = "5B"',
                "never matches: no file is larger than 4B and smaller than 5B",
            ),
            (
                'action = "deny"\nolder_than = "1d"\nyounger_than = "1h"',
                "never matches: no commit is older than 1d and younger than 1h",
            ),
            (
                'action = "deny"\nolder_than = "1d"\nyounger_than = "24h"',
                "never matches: no commit is older than 1d and younger than 1d",
            ),
        ],
    )
    def test_rules_that_could_never_do_anything(self, in_file: File, lines: str, problem: str) -> None:
        """Values that are fine each, and make no sense together."""
        assert in_file.problems(f'[[rules]]\nname = "a"\n{lines}') == (f"nearhub.toml:1: rules[0]: {problem}",)

    def test_limits_with_something_between_them(self, in_file: File) -> None:
        """One byte, one moment is enough."""
        limits = 'larger_than = "4B"\nsmaller_than = "6B"\nolder_than = "1h"\nyounger_than = "2h"'
        text = f'[[rules]]\nname = "a"\naction = "deny"\n{limits}'
        assert len(in_file.load(text).rules) == 1

    @pytest.mark.parametrize("text", ["rules = 1", "[rules]", "rules = [1]", 'rules = ["a"]'])
    def test_rules_that_are_no_tables(self, in_file: File, text: str) -> None:
        """They are told how to write them."""
        assert in_file.problems(text) == ("nearhub.toml:1: rules: must be tables; write [[rules]] above each",)

    def test_a_misspelt_table(self, in_file: File) -> None:
        """Rules under another name would be no rules, and nothing would be refused."""
        assert in_file.problems('[[rule]]\nname = "a"') == ("nearhub.toml:2: rule[0].name: unknown key; did you mean rules?",)

    def test_all_at_once(self, in_file: File) -> None:
        """Problems of rules come with all the others, rule by rule."""
        text = '[server]\nport = -1\n[[rules]]\nname = 5\naction = "deny"\nkinds = ["x", "y"]\n[[rules]]\nqqq = 1\n'
        assert [found.split(": ")[:2] for found in in_file.problems(text)] == [
            ["nearhub.toml:4", "rules[0].name"],
            ["nearhub.toml:6", "rules[0].kinds[0]"],
            ["nearhub.toml:6", "rules[0].kinds[1]"],
            ["nearhub.toml:7", "rules[1]"],
            ["nearhub.toml:7", "rules[1]"],
            ["nearhub.toml:8", "rules[1].qqq"],
            ["nearhub.toml:2", "server.port"],
        ]

    @pytest.mark.parametrize("contact", ["a\nb", " a", "x" * 121, "\x1b[31m"])
    def test_not_a_contact(self, contact: str) -> None:
        """A contact ends a refusal, which is one line of a header."""
        (problem,) = problems({"NEARHUB_ACCESS_CONTACT": contact})
        assert problem.startswith("NEARHUB_ACCESS_CONTACT: ") and problem.endswith(
            " is not one line of text of at most 120 characters"
        )

    def test_contact(self) -> None:
        """Nobody, or what is written."""
        assert settings().access.contact == ""
        assert settings({"NEARHUB_ACCESS_CONTACT": "ask Röntgen lab"}).access.contact == "ask Röntgen lab"

    def test_the_examples_of_the_sample_are_what_they_say(self, tmp_path: Path) -> None:
        """Its rules, uncommented as one file, refuse and let through what their comments promise."""
        file = tmp_path / "nearhub.toml"
        file.write_text("\n".join(re.findall(r"^#   (.*)$", SAMPLE_FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)))
        config = load(file, HOME, {})
        (policy,) = config.policies
        assert (policy.repos, policy.who, policy.token_file) == (("our-lab/*",), ("lab",), Path("/etc/nearhub/hub-token"))
        owners, formats, ages, licences = config.rules
        ours = Facts(Repo.from_text("our-lab/m"), frozenset(), ("mit",), "model.safetensors", 5, 8 * 86400.0)
        expected = [
            (owners, {"repo": Repo.from_text("other/m")}),
            (owners, {"repo": Repo.from_text("allenai/m")}),
            (formats, {"path": "pytorch_model.bin"}),
            (ages, {"age_s": 6 * 86400.0}),
        ]
        for rule, facts in expected:
            assert decide([rule], ours).outcome is Outcome.ALLOWED
            assert decide([rule], dataclasses.replace(ours, **facts)).outcome is Outcome.DENIED
        for facts in ({"path": "config.json"}, {"path": "a.pt", "groups": frozenset({"trusted"})}):
            assert decide([owners, formats, ages], dataclasses.replace(ours, **facts)).outcome is Outcome.ALLOWED
        datasets = dataclasses.replace(ours, repo=Repo.from_text("datasets/allenai/c4"), path="a.pt")
        assert decide([owners, formats], datasets).outcome is Outcome.ALLOWED
        verdict = decide([licences], dataclasses.replace(ours, licences=("gpl-3.0",)))
        assert (verdict.outcome, verdict.would_refuse) == (Outcome.ALLOWED, (licences,))


class TestConnections:
    def test_more_than_all(self, in_file: File) -> None:
        """One blob or one client cannot have more connections than there are in all."""
        text = "[fill]\nconnections = 40\nclient_connections = 33\n[upstream]\n"
        first, second = in_file.problems(text)
        assert first == (
            "nearhub.toml:2: fill.connections: 40 is more than all connections to upstream together (32, default); "
            "raise upstream.connections or lower this"
        )
        assert second.startswith("nearhub.toml:3: fill.client_connections: 33 is more ")

    def test_defaults_follow(self) -> None:
        """Who lowers the total alone gets lower defaults, not an error about numbers never written."""
        config = settings(upstream__connections="8")
        assert (config.fill.connections, config.fill.client_connections) == (8, 8)

    def test_no_conflict_with_an_unreadable_value(self) -> None:
        """A total that cannot be read is one problem, and nothing is compared with a number nobody wrote."""
        found = problems({"NEARHUB_FILL_CONNECTIONS": "64"}, upstream__connections="many")
        assert found == ("--connections: 'many' is not a number of connections (1 to 1024)",)

    def test_no_conflict_with_an_overridden_value(self, in_file: File) -> None:
        """Where the last word on a setting cannot be read, an earlier one is not taken instead."""
        text = "[upstream]\nconnections = 8\n[fill]\nconnections = 16\n"
        found = in_file.problems(text, upstream__connections="many")
        assert found == ("--connections: 'many' is not a number of connections (1 to 1024)",)


class TestProxies:
    def test_variables(self) -> None:
        """Lower case wins over upper case, even if empty; a proxy without scheme is an http one."""
        upper = {
            "HTTPS_PROXY": "http://u:p@proxy.example:3128/",
            "HTTP_PROXY": "proxy.example:80",
            "NO_PROXY": "a, b ,,c",
        }
        expected = Proxies("http://u:p@proxy.example:3128/", "http://proxy.example:80", ("a", "b", "c"))
        assert settings(upper).proxies == expected
        lower = {"https_proxy": "", "http_proxy": "http://other.example", "no_proxy": ""}
        assert settings({**upper, **lower}).proxies == Proxies(None, "http://other.example", ())

    @pytest.mark.parametrize("url", ["socks5://u:p4ss@h:1", "http://", "http://u:p4ss@h:x", "http://h/p4ss", "h\ti"])
    def test_not_proxies(self, url: str) -> None:
        """What is no HTTP proxy is told by the variable's name only: it may hold a password."""
        assert problems({"https_proxy": url, "HTTPS_PROXY": "http://fine"}) == (
            "https_proxy: is not a proxy; write http://HOST:PORT (SOCKS is not supported)",
        )

    def test_no_password_in_repr(self) -> None:
        """A Config can be logged without telling the proxy's password."""
        assert "p4ss" not in repr(settings({"HTTPS_PROXY": "http://u:p4ss@h", "HTTP_PROXY": "http://u:p4ss@h"}))

    def test_scheme(self) -> None:
        """Each scheme has its own proxy."""
        proxies = Proxies("http://s", "http://p", ())
        assert proxies.for_url("https", "a", 443) == "http://s"
        assert proxies.for_url("http", "a", 80) == "http://p"
        assert proxies.for_url("ftp", "a", 21) is None
        assert Proxies(None, "http://p", ()).for_url("https", "a", 443) is None

    @pytest.mark.parametrize(
        ("entry", "host", "port", "direct"),
        [
            ("*", "any.example", 443, True),
            ("corp.example", "corp.example", 443, True),
            ("corp.example", "a.b.corp.example", 443, True),
            ("corp.example", "xcorp.example", 443, False),
            ("corp.example", "example", 443, False),
            ("a.corp.example", "corp.example", 443, False),
            (".corp.example", "a.corp.example", 443, True),
            (".corp.example", "corp.example", 443, True),
            ("*.corp.example", "a.corp.example", 443, True),
            ("*.corp.example", "acorp.example", 443, False),
            ("Corp.Example", "A.corp.example", 443, True),
            ("corp.example:8443", "corp.example", 8443, True),
            ("corp.example:8443", "a.corp.example", 8443, True),
            ("corp.example:8443", "corp.example", 443, False),
            ("10.1.2.3", "10.1.2.3", 443, True),
            ("10.1.2.3", "10.1.2.33", 443, False),
            ("10.1.2.3:80", "10.1.2.3", 443, False),
            ("10.0.0.0/8", "10.200.0.1", 443, True),
            ("10.9.9.9/8", "10.200.0.1", 443, True),
            ("10.0.0.0/8", "11.0.0.1", 443, False),
            ("10.0.0.0/8", "10.0.0.0.example", 443, False),
            ("10.0.0.0/8", "fd00::1", 443, False),
            ("fd00::/8", "fd00::1", 443, True),
            ("::1", "0:0:0:0:0:0:0:1", 443, True),
            ("[::1]", "::1", 443, True),
            ("[::1]:443", "::1", 443, True),
            ("[::1]:443", "::1", 80, False),
        ],
    )
    def test_no_proxy(self, entry: str, host: str, port: int, direct: bool) -> None:
        """NO_PROXY covers exact hosts, whole domains, addresses, networks, each perhaps at one port, or everything."""
        proxies = Proxies("http://s", None, ("unrelated.example", entry))
        assert proxies.for_url("https", host, port) == (None if direct else "http://s")


class TestWriting:
    def test_sample_is_current(self) -> None:
        """deploy/nearhub.toml is what the declared settings say; write sample() there after changing one."""
        assert SAMPLE_FILE.read_text(encoding="utf-8") == sample()

    def test_sample_loads_to_the_defaults(self, tmp_path: Path) -> None:
        """With every key uncommented the sample is a valid file that sets every setting to its default."""
        active = re.sub(r"^#(?=\w+ = )", "", SAMPLE_FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
        file = tmp_path / "nearhub.toml"
        file.write_text(active, encoding="utf-8")
        config = load(file, HOME, {})
        assert config == settings()
        assert all(origin.startswith(f"{file}:") for name, origin in config.origins.items() if name != "git.mirrors")
        assert len(config.origins) == len(SETTINGS)

    def test_sample_changes_nothing_as_it_is(self) -> None:
        """As shipped, no key of the sample is active."""
        assert set(load(SAMPLE_FILE, HOME, {}).origins.values()) == {"default"}

    @pytest.mark.parametrize(
        "setting", [setting for setting in SETTINGS if setting.name != "git.mirrors"], ids=lambda setting: setting.name
    )
    def test_sample_names(self, setting: Setting) -> None:
        """Each key stands in the sample beside its variable and its flag."""
        names = f"({setting.variable}{', ' + setting.flag if setting.flag else ''})"
        assert f"# {names}\n#{setting.key} = " in SAMPLE_FILE.read_text(encoding="utf-8")

    def test_the_named_mirror_of_the_sample_is_one(self, tmp_path: Path) -> None:
        """Its example is a comment; as a file it says what it seems to."""
        example = re.findall(r"^#   (.*)$", SAMPLE_FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
        file = tmp_path / "nearhub.toml"
        file.write_text("\n".join(example), encoding="utf-8")
        (mirror,) = load(file, HOME, {}).git.mirrors
        assert (mirror.name, mirror.url) == ("lora-scripts-proxy", "https://git.example.org/lora-scripts.git")

    def test_rendered_loads_to_the_same(self, tmp_path: Path) -> None:
        """What check-config prints is itself a file with the same meaning, whatever the values."""
        config = settings(
            {
                "NEARHUB_CACHE_INDEX_DIR": '/odd "name" \\ ü',
                "NEARHUB_CACHE_ALLOW_GROUP": "true",
                "NEARHUB_CACHE_MAX_SIZE": "1.5TB",
            },
            server__drain="1500ms",
            server__prefix="/hub",
            upstream__urls=["https://a", "http://b:81/c"],
            upstream__blob_hosts=["http://c:81", "[::1]:82", "d", "cdn-lfs.hf.co"],
            upstream__connections="5",
            git__mirrors=["tools=https://git.example/tools.git", "b.c=http://d:81/e"],
        )
        file = tmp_path / "rendered.toml"
        file.write_text(rendered(config), encoding="utf-8")
        assert load(file, HOME, {}) == config

    def test_rendered_origins(self) -> None:
        """Each line tells where its value came from."""
        text = rendered(settings({"NEARHUB_FILL_ORPHAN_LIMIT": "1024MiB"}, server__port="1"))
        assert "port = 1  # --port\n" in text
        assert 'host = "127.0.0.1"  # default\n' in text
        assert 'orphan_limit = "1GiB"  # NEARHUB_FILL_ORPHAN_LIMIT\n' in text

    def test_rendered_proxies(self) -> None:
        """The outbound proxies are shown, and their passwords are not."""
        text = rendered(settings({"HTTPS_PROXY": "http://u:p4ss@h:1", "NO_PROXY": "a,b"}))
        assert "# HTTPS_PROXY: http://***@h:1\n# HTTP_PROXY: none\n# NO_PROXY: a, b\n" in text


SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
SIZE_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
DURATION_UNITS_MS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
BLANKS = st.text(" \t", max_size=3)


class TestUnits:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("500GB", 500 * 10**9),
            ("500GiB", 500 * 2**30),
            ("1.5TB", 1_500_000_000_000),
            ("0B", 0),
            ("0.5KiB", 512),
            ("9007199254740993B", 9007199254740993),
            ("1.000000000000001PB", 10**15 + 1),
        ],
    )
    def test_sizes(self, text: str, size: int) -> None:
        """Sizes are exact, also where a float would not be."""
        assert parse_size(text) == size

    @pytest.mark.parametrize(
        ("text", "duration_s"),
        [
            ("60s", 60.0),
            ("5min", 300.0),
            ("2h", 7200.0),
            ("250ms", 0.25),
            ("1d", 86400.0),
            ("1.5h", 5400.0),
            ("0s", 0.0),
        ],
    )
    def test_durations(self, text: str, duration_s: float) -> None:
        """Durations come out in seconds."""
        assert parse_duration(text) == duration_s

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (500, 'has no unit; write for example "500GB"'),
            ("500", 'has no unit; write for example "500GB"'),
            (1.5, 'has no unit; write for example "1.5GB"'),
            ("500gb", "has an unknown unit 'gb'; did you mean GB?"),
            ("500G", "has an unknown unit 'G'; the units are B, KB, "),
            ("0.3B", "is not a whole number of bytes"),
            ("9000000PB", "is more than a file can hold"),
            ("-1GB", "is not a size"),
            ("1e3GB", "is not a size"),
            ("1,5GB", "is not a size"),
            ("٣GB", "is not a size"),
            (True, "is not a size"),
            (None, "is not a size"),
            (float("inf"), "is not a size"),
            ([], "is not a size"),
        ],
    )
    def test_not_sizes(self, value: object, reason: str) -> None:
        """What is not exactly a size is refused with what to write instead."""
        with pytest.raises(BadValue) as caught:
            parse_size(value)
        assert reason in str(caught.value)

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (60, 'write for example "60s"'),
            ("5m", "the units are ms, s, min, h, d"),
            ("5H", "did you mean h?"),
            ("0.5ms", "is finer than a millisecond"),
            ("99999d", "is more than 36500d"),
            (False, "is not a duration"),
        ],
    )
    def test_not_durations(self, value: object, reason: str) -> None:
        """What is not exactly a duration is refused with what to write instead."""
        with pytest.raises(BadValue) as caught:
            parse_duration(value)
        assert reason in str(caught.value)

    @given(st.integers(0, 2**63 - 1))
    def test_size_round_trip(self, size: int) -> None:
        """A size that is written is read back as it was."""
        assert parse_size(format_size(size)) == size

    @given(st.integers(0, 36_500 * 86_400_000))
    def test_duration_round_trip(self, duration_ms: int) -> None:
        """A duration of whole milliseconds that is written is read back as it was."""
        assert parse_duration(format_duration(duration_ms / 1000)) == duration_ms / 1000

    @given(st.integers(0, 8191), st.integers(0, 8191), st.sampled_from(sorted(SIZE_UNITS)))
    def test_sizes_are_monotone(self, low: int, high: int, unit: str) -> None:
        """In one unit, more is more; and a unit is worth what its name says."""
        assert (parse_size(f"{low}{unit}") < parse_size(f"{high}{unit}")) == (low < high)
        assert parse_size(f"{low}{unit}") == low * SIZE_UNITS[unit]

    @given(st.integers(0, 36_500), st.integers(0, 36_500), st.sampled_from(sorted(DURATION_UNITS_MS)))
    def test_durations_are_monotone(self, short: int, long: int, unit: str) -> None:
        """In one unit, longer is longer; and a unit is worth what its name says."""
        assert (parse_duration(f"{short}{unit}") < parse_duration(f"{long}{unit}")) == (short < long)
        assert parse_duration(f"{short}{unit}") == short * DURATION_UNITS_MS[unit] / 1000

    @given(BLANKS, BLANKS, BLANKS)
    def test_blanks(self, before: str, between: str, after: str) -> None:
        """Blanks around the number and the unit mean nothing."""
        assert parse_size(f"{before}15{between}MiB{after}") == 15 * 2**20
        assert parse_duration(f"{before}15{between}min{after}") == 900

    @given(
        st.text()
        | st.from_regex(r"[ 0-9.]{0,50}[A-Za-z]{0,4}", fullmatch=True)
        | st.integers()
        | st.floats()
        | st.none()
        | st.booleans()
        | st.lists(st.text(), max_size=2)
    )
    def test_junk(self, value: object) -> None:
        """Whatever comes in, either a number in range comes out, or BadValue with one line."""
        for parse, limit in ((parse_size, 2**63 - 1), (parse_duration, 36_500 * 86_400)):
            try:
                parsed = parse(value)
            except BadValue as bad:
                assert len(str(bad).splitlines()) == 1
            else:
                assert isinstance(value, str) and 0 <= parsed <= limit


class TestLocate:
    def test_a_document_with_everything(self) -> None:
        """Keys are found in tables, arrays of tables, dotted and quoted keys, inline tables, and after long values."""
        text = LOCATED.replace("\\Q", '"""')
        tomllib.loads(text)
        lines = locate(text)
        numbered = enumerate(text.split("\n"), 1)
        marked = {match[1]: number for number, line in numbered if (match := re.search(r"@(\S+)", line))}
        expected: dict[str, KeyPath] = {
            "top": ("top",),
            "dotted": ("a", "b.c", "d"),
            "quoted": ("tab\tkey",),
            "text": ("text",),
            "literal": ("literal",),
            "after": ("after",),
            "table": ("server",),
            "port": ("server", "port"),
            "urls": ("server", "urls"),
            "item0": ("server", "urls", 0),
            "item1": ("server", "urls", 1),
            "item2": ("server", "urls", 2),
            "nested": ("server", "urls", 2, 1, 0),
            "rule0": ("rules", 0),
            "rule1": ("rules", 1),
            "name1": ("rules", 1, "name"),
            "sub1": ("rules", 1, "sub"),
            "deep1": ("rules", 1, "sub", "deep"),
            "last": ("server", "tls", "last"),
        }
        assert {name: lines.get(path) for name, path in expected.items()} == marked
        assert lines[("server", "urls", 1, "trusted")] == marked["item1"]

    def test_windows_line_ends(self) -> None:
        """Carriage returns before line ends change nothing."""
        assert locate("[a]\r\n\r\nb = 1\r\nc = '''\r\n'''\r\nd = 2") == locate("[a]\n\nb = 1\nc = '''\n'''\nd = 2")

    @given(st.data())
    def test_generated_documents(self, data: st.DataObject) -> None:
        """For any document, every key that tomllib finds is found, on the line it was written on."""
        text, written = data.draw(documents())
        lines = locate(text)
        assert set(key_paths(tomllib.loads(text))) == set(lines)
        assert {path: lines[path] for path in written} == written


KEYS = st.text(string.ascii_letters + string.digits + "_- .\"'#=[]{},\\é\n", min_size=1, max_size=4)
STRINGS = st.text(string.ascii_letters + " .\"'#=[]{},\\é", max_size=8)


def quoted(text: str) -> str:
    """The text as a TOML basic string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[KeyPath, int]]:
    """A TOML document, and the line of each key at the start of a line."""
    lines: list[str] = []
    written: dict[KeyPath, int] = {}

    def pairs(table: KeyPath) -> None:
        for key in draw(st.lists(KEYS, unique=True, max_size=3)):
            written[(*table, key)] = len(lines) + 1
            lines.extend(f"{quoted(key)} = {draw(values())}".split("\n"))
            lines.extend(draw(st.sampled_from([[], [""], ["  # [a] = 'b"]])))

    pairs(())
    taken = {path[0] for path in written}
    for name in draw(st.lists(KEYS.filter(lambda key: key not in taken), unique=True, max_size=3)):
        if draw(st.booleans()):
            written[(name,)] = len(lines) + 1
            lines.append(f"[ {quoted(name)} ] # ]")
            pairs((name,))
        else:
            for index in range(draw(st.integers(1, 3))):
                written[(name, index)] = len(lines) + 1
                lines.append(f"[[{quoted(name)}]]")
                pairs((name, index))
    return "\n".join(lines), written


def values() -> st.SearchStrategy[str]:
    """TOML source of a value, perhaps over several lines."""
    scalars = st.sampled_from(["1", "-1.5e3", "true", "1979-05-27 07:32:00", "inf", "[]", "{}", "'''''a'''''"])
    texts = STRINGS.map(quoted) | STRINGS.map(lambda text: '"""\n' + quoted(text)[1:-1] + '\n"#""""')
    return st.recursive(
        scalars | texts,
        lambda inner: (
            st.lists(inner, max_size=3).map(lambda items: "[ # ]\n" + ",\n".join(items) + "\n]")
            | st.dictionaries(KEYS, scalars | STRINGS.map(quoted), max_size=3).map(
                lambda table: "{" + ", ".join(f"{quoted(key)} = {value}" for key, value in table.items()) + "}"
            )
        ),
        max_leaves=5,
    )


def key_paths(value: Any, path: KeyPath = ()) -> list[KeyPath]:
    """The paths of all keys and items in a parsed document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [below for key, inner in entries for below in [(*path, key), *key_paths(inner, (*path, key))]]


LOCATED = r"""# [server] is not a table here
top = 1 # @top
a."b.c" . d = "x # y" # @dotted
"tab\tkey" = '"' # @quoted
text = \Q @text
[server]
port = 1 \" \\\Q" # one more quote than it takes
literal = ''' @literal
a = "b
'''
after = 1979-05-27T07:32:00Z # @after

[ server ] # @table
port = 1.5 # @port
urls = [ # @urls
  "a]", # @item0

  {url = "}", trusted = true}, # @item1
  [[1, 2], # @item2
   [3]], # @nested
]

[[rules]] # @rule0
name = ""
[[rules]] # @rule1
name = '' # @name1
[rules.sub] # @sub1
deep = 1 # @deep1
[server.tls]
last = 0 # @last
"""

SELF_SIGNED = """\
-----BEGIN CERTIFICATE-----
MIIBhjCCASugAwIBAgIUb2K52QIhT9ccYgA1Kw3m7bhNpJEwCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMbmVhcmh1Yi10ZXN0MCAXDTI2MTEyNDE2MzgyNVoYDzIxMjYx
MDMxMTYzODI1WjAXMRUwEwYDVQQDDAxuZWFyaHViLXRlc3QwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAASw2NOrQhW/BZdobXpZt1NI8+5vpRc6KCleCa+ID9e7hXYW
XUo20zdM1ExYOHUbNavASc6DNn4AsVCpcxTudvsko1MwUTAdBgNVHQ4EFgQUCYdV
wjMsDUkPARE7kZlKtfWnwZswHwYDVR0jBBgwFoAUCYdVwjMsDUkPARE7kZlKtfWn
wZswDwYDVR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNJADBGAiEAxAvHS+SQZtOp
GNWrsTEiqOqOLzHipIrKtMlInJS/enACIQCN97Vz08V8BSA1iApSJK/f0ip548jR
5eYWdHgmkC5QMg==
-----END CERTIFICATE-----
"""


class TestPolicies:
    def test_every_mistake_is_told_at_once_by_its_line(self, tmp_path: Path) -> None:
        file = tmp_path / "nearhub.toml"
        file.write_text(
            '[[policies]]\nname = "lab"\nrepos = ["org/*"]\nwho = ["lab"]\n'
            '[[policies]]\nname = "Lab"\nrepos = ["a b"]\nwho = []\ntoken_fil = "x"\n[[policies]]\nwho = ["x"]\n'
        )
        with pytest.raises(ConfigError) as caught:
            load(file, HOME, {})
        told = "\n".join(caught.value.problems)
        for words in (":5: policies[1]: 'Lab' is the name of the policy at", ":7: policies[1].repos[0]: 'a b'", ":8: ", ":9: "):
            assert words in told
        assert "unknown key; did you mean token_file?" in told
        assert "policies[2]: has no name" in told and "policies[2]: has no repos" in told

    def test_a_token_file_is_found_from_the_files_own_directory_and_shown_by_check_config(self, tmp_path: Path) -> None:
        file = tmp_path / "nearhub.toml"
        file.write_text('[[policies]]\nname = "lab"\nrepos = ["org/*"]\nwho = ["lab"]\ntoken_file = "hub-token"\n')
        config = load(file, HOME, {})
        assert config.policies[0].token_file == tmp_path / "hub-token"
        again = tmp_path / "again.toml"
        again.write_text(rendered(config))
        assert load(again, HOME, {}).policies == config.policies


class TestRates:
    @pytest.mark.parametrize("text", ["50MB/s", "50MB", "50000KB/s"])
    def test_bytes_a_second(self, text: str, tmp_path: Path) -> None:
        config = settings({"NEARHUB_PREFETCH_MAX_RATE": text})
        assert config.prefetch.max_rate_bytes == 50_000_000
        again = tmp_path / "again.toml"
        again.write_text(rendered(config))
        assert 'max_rate = "50MB/s"' in again.read_text()
        assert load(again, HOME, {}).prefetch == config.prefetch

    @pytest.mark.parametrize("text", ["0MB/s", "50", "50MB/min", "/s", "-1MB"])
    def test_what_is_no_rate(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"NEARHUB_PREFETCH_MAX_RATE: "):
            settings({"NEARHUB_PREFETCH_MAX_RATE": text})


class TestFollow:
    def test_defaults_and_what_check_config_shows_is_the_same_again(self, tmp_path: Path) -> None:
        file = tmp_path / "nearhub.toml"
        file.write_text(
            '[[follow]]\nrepo = "models/org/m"\n'
            '[[follow]]\nrepo = "datasets/org/d"\nrevision = "dev"\ninclude = ["*.json"]\nexclude = ["old/"]\nevery = "30min"\n'
            'window = "22:00-06:00"\nkeep = 3\n'
        )
        config = load(file, HOME, {})
        plain, full = config.follow
        assert (str(plain), plain.every_s, plain.window, plain.keep) == ("org/m@main", 6 * 3600, None, 0)
        assert (str(full), full.include, full.exclude, full.every_s) == ("datasets/org/d@dev", ("*.json",), ("old/",), 1800)
        assert (str(full.window), full.keep) == ("22:00-06:00", 3)
        again = tmp_path / "again.toml"
        again.write_text(rendered(config))
        assert load(again, HOME, {}).follow == config.follow

    def test_every_mistake_is_told_at_once_by_its_line(self, tmp_path: Path) -> None:
        file = tmp_path / "nearhub.toml"
        file.write_text(
            '[[follow]]\nrepo = "org/m"\n[[follow]]\nrepo = "org/m"\nrevision = "main"\n'
            '[[follow]]\nrepo = "a b"\nwindow = "22-6"\nevery = "5s"\nkeep = 0\ninclude = [""]\nrevison = "x"\n'
            "[[follow]]\nkeep = 1\n"
        )
        with pytest.raises(ConfigError) as caught:
            load(file, HOME, {})
        told = "\n".join(caught.value.problems)
        for words in (
            ":3: follow[1]: 'org/m@main' is the name of the table at",
            ":7: follow[2].repo: 'a b' is not a repo",
            ":8: follow[2].window: '22-6' is not a window",
            ":9: follow[2].every: '5s' is more often than once a minute",
            ":10: follow[2].keep: 0 is not a number of commits to keep",
            ":11: follow[2].include[0]: '' is not a pattern",
            ":12: follow[2].revison: unknown key; did you mean revision?",
            ":13: follow[3]: has no repo",
        ):
            assert words in told, told
