"""What git is told and what it says."""

from __future__ import annotations

import hashlib
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.errors import (
    AccessRefused,
    GitUnfit,
    NearhubError,
    RepoNotFound,
    StoreFull,
    UpstreamBusy,
    UpstreamFailed,
    UpstreamUnreachable,
)
from nearhub.wire import git
from nearhub.wire.target import Repo, RepoKind

URL = "https://hub.example/org/m"
CUT = """error: RPC failed; curl 18 transfer closed with outstanding read data remaining
error: 32758 bytes of body are still expected
fetch-pack: unexpected disconnect while reading sideband packet
fatal: early EOF
fatal: fetch-pack: invalid index-pack output
"""
"""What git 2.39 says then."""
OID = "0123456789abcdef0123456789abcdef01234567"


class TestSettings:
    def test_only_the_scheme_of_the_url_is_allowed(self) -> None:
        settings = git.fetching(URL, proxy=None, ca_bundle=None)
        assert {key: value for key, value in settings.items() if key.startswith("protocol.")} == {
            "protocol.allow": "never",
            "protocol.https.allow": "always",
        }
        assert settings["http.followRedirects"] == "false"

    def test_git_reads_them_and_nothing_else(self) -> None:
        """Asked of git itself: every setting is in force as it was meant, and none comes from anywhere else."""
        settings = git.fetching(URL, proxy="http://user:secret@proxy:3128", ca_bundle="/ca.pem")
        environment = git.environment(settings, path="/usr/bin:/bin", directory=None, protocol="")
        told = subprocess.run(
            ["git", "config", "--list", "--show-scope"], env=environment, cwd="/", capture_output=True, text=True, check=True
        ).stdout
        lines = [line.split("\t", 1) for line in told.splitlines()]
        assert {scope for scope, _ in lines} == {"command"}
        assert dict(line.split("=", 1) for _, line in lines) == {key.lower(): value for key, value in settings.items()}

    def test_no_secret_stands_among_arguments(self) -> None:
        assert not any("secret" in word for word in (*git.LOOK, *git.FETCH, *git.INIT, *git.TIDY))

    def test_a_url_follows_a_double_dash(self) -> None:
        """So that none can be an option."""
        assert git.LOOK[-1] == git.FETCH[-1] == git.INIT[-1] == "--"


class TestProtocol:
    @pytest.mark.parametrize(
        ("header", "said"),
        [
            ("", ""),
            ("version=2", "version=2"),
            ("version=1:version=2", "version=2"),
            ("version=2:object-format=sha1", "version=2"),
            ("version=3", ""),
            ("version=2\n", ""),
            ("version=$(id)", ""),
            ("VERSION=2", ""),
        ],
    )
    def test_a_version_that_we_know_or_none(self, header: str, said: str) -> None:
        assert git.protocol_of(header) == said

    @given(st.text())
    def test_nothing_else_gets_into_the_environment(self, header: str) -> None:
        assert git.protocol_of(header) in ("", "version=0", "version=1", "version=2")

    def test_what_stands_before_an_advertisement_has_the_length_it_says(self) -> None:
        lead = git.lead_of("version=0")
        assert git.lead_of("version=2") == b""
        assert int(lead[:4], 16) == len(lead) - len(b"0000")


class TestRefs:
    def test_head_and_all_refs(self) -> None:
        output = f"ref: refs/heads/main\tHEAD\n{OID}\tHEAD\n{OID}\trefs/heads/main\n".encode()
        refs = git.read_refs(output, URL)
        assert (refs.head, refs.count) == ("refs/heads/main", 2)

    def test_a_change_of_any_ref_or_of_head_is_seen(self) -> None:
        first = f"ref: refs/heads/main\tHEAD\n{OID}\trefs/heads/main\n"
        others = [
            first.replace("0123", "3210"),
            first.replace("heads/main\tHEAD", "heads/dev\tHEAD"),
            first + f"{OID}\trefs/x\n",
        ]
        assert len({git.read_refs(text.encode(), URL).digest for text in [first, *others]}) == 4

    @pytest.mark.parametrize("name", ["caf\u00e9", "a\u2028b", "a\u0085b", "\udcff"], ids=ascii)
    def test_a_name_is_any_bytes_that_git_allows(self, name: str) -> None:
        """A line of refs ends where git ends it, and nowhere else."""
        output = f"ref: refs/heads/{name}\tHEAD\n{OID}\trefs/heads/{name}\n".encode(errors="surrogateescape")
        refs = git.read_refs(output, URL)
        assert (refs.head, refs.count) == (f"refs/heads/{name}", 1)

    def test_an_empty_repo_has_none(self) -> None:
        assert git.read_refs(b"", URL) == git.Refs(None, hashlib.sha256(b"").hexdigest(), 0)

    @pytest.mark.parametrize("line", ["nonsense", f"{OID} refs/heads/main", f"{OID}\trefs/a b", f"{OID[:-1]}\trefs/x"])
    def test_nonsense_is_refused(self, line: str) -> None:
        with pytest.raises(UpstreamFailed):
            git.read_refs(line.encode(), URL)

    def test_refs_beyond_number_are_refused(self) -> None:
        with pytest.raises(UpstreamFailed, match="more than"):
            git.read_refs(f"{OID}\trefs/x\n".encode() * (git.MAX_REFS + 1), URL)

    @given(
        st.binary() | st.lists(st.sampled_from([OID, "\t", "refs/x", "ref: ", "HEAD", "\n", " "])).map("".join).map(str.encode)
    )
    def test_no_output_does_worse(self, output: bytes) -> None:
        try:
            refs = git.read_refs(output, URL)
        except UpstreamFailed:
            return
        assert refs.count <= output.count(b"\t") and len(refs.digest) == 64

    @given(st.dictionaries(st.from_regex(r"refs/heads/[a-z0-9/]{1,9}", fullmatch=True), st.just(OID)))
    def test_every_ref_is_counted(self, refs: dict[str, str]) -> None:
        output = "".join(f"{oid}\t{name}\n" for name, oid in refs.items()).encode()
        assert git.read_refs(output, URL).count == len(refs)


class TestExplain:
    @pytest.mark.parametrize(
        ("stderr", "error"),
        [
            ("fatal: repository 'https://hub.example/org/m/' not found\n", RepoNotFound),
            ("fatal: unable to access 'x': The requested URL returned error: 404\n", RepoNotFound),
            ("fatal: unable to access 'x': The requested URL returned error: 403\n", AccessRefused),
            ("fatal: unable to access 'x': The requested URL returned error: 429\n", UpstreamBusy),
            ("fatal: unable to access 'x': The requested URL returned error: 503\n", UpstreamFailed),
            ("fatal: could not read Username for 'https://hub.example': terminal prompts disabled\n", AccessRefused),
            ("fatal: unable to access 'x': Could not resolve host: hub.example\n", UpstreamUnreachable),
            ("fatal: unable to access 'x': Failed to connect to hub.example port 443\n", UpstreamUnreachable),
            ("fatal: unable to access 'x': Operation too slow. Less than 1000 bytes/sec\n", UpstreamUnreachable),
            ("error: object 12: gitmodulesUrl: disallowed submodule url\nfatal: fsck error in packed object\n", GitUnfit),
            ("fatal: Out of memory, malloc failed (tried to allocate 2000000001 bytes)\n", GitUnfit),
            ("fatal: attempting to allocate 2000000001 over limit 536870912\n", GitUnfit),
            (CUT, UpstreamFailed),
            ("fatal: write error: No space left on device\nfatal: fetch-pack: invalid index-pack output\n", StoreFull),
            ("", UpstreamFailed),
        ],
    )
    def test_whose_fault_it_is(self, stderr: str, error: type[NearhubError]) -> None:
        explained = git.explain(stderr, URL)
        assert type(explained) is error
        assert URL in explained.message

    @given(st.text())
    def test_whatever_git_says_is_an_error_of_ours(self, stderr: str) -> None:
        assert len(git.explain(stderr, URL).message) < 600


def test_where_git_finds_a_repo() -> None:
    assert git.url_of("https://hub.example", Repo(RepoKind.MODELS, "gpt2")) == "https://hub.example/gpt2"
    assert git.url_of("https://hub.example", Repo(RepoKind.DATASETS, "o/d")) == "https://hub.example/datasets/o/d"
