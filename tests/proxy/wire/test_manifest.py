"""The Hub's JSON about repos: read however hostile it is, and told again as git itself would name it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nearhub.errors import NearhubError, UpstreamFailed
from nearhub.wire.headers import Algo, BlobId
from nearhub.wire.manifest import (
    SIBLINGS_TRUSTED,
    Entry,
    below,
    entry_from_row,
    entry_row,
    git_oid,
    pointer,
    read_info,
    read_tree,
    rewritten,
    sibling,
    tree_item,
    tree_order,
    with_directories,
)
from nearhub.wire.target import FileTarget, Repo, RepoKind, format_file, parse_file

COMMIT, SHA1, SHA256 = "c" * 40, "a" * 40, "b" * 64
REPO = Repo(RepoKind.MODELS, "org/m")
FILE = Entry("a.txt", 7, SHA1, BlobId(Algo.SHA1, SHA1))
LFS = Entry("m.bin", 9, "d" * 40, BlobId(Algo.SHA256, SHA256), 126)

HEX1, HEX256 = st.text("0123456789abcdef", min_size=40, max_size=40), st.text("0123456789abcdef", min_size=64, max_size=64)
NAMES = st.text(st.characters(exclude_characters="/\\\x7f", min_codepoint=0x20, exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
SIZES = st.integers(0, 2**60 - 1)
DIRECTORIES = st.builds(Entry, PATHS, oid=st.none() | HEX1)
PLAIN = st.builds(lambda path, size, oid: Entry(path, size, oid, BlobId(Algo.SHA1, oid)), PATHS, SIZES, HEX1)
LARGE = st.builds(
    lambda path, size, oid, sha, length: Entry(path, size, oid, BlobId(Algo.SHA256, sha), length),
    PATHS,
    SIZES,
    st.none() | HEX1,
    HEX256,
    st.none() | st.integers(1, 1024),
)
ENTRIES = DIRECTORIES | PLAIN | LARGE
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.sampled_from([SHA1, SHA256, "a/b"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "id",
                    "sha",
                    "siblings",
                    "rfilename",
                    "size",
                    "blobId",
                    "lfs",
                    "oid",
                    "sha256",
                    "pointerSize",
                    "path",
                    "type",
                    "gated",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


def info(**changed: Any) -> dict[str, Any]:
    """A document about a repo of one file; None takes a key out."""
    told = {"id": "org/m", "sha": COMMIT, "siblings": [told_sibling()], "private": False, "gated": False} | changed
    return {key: value for key, value in told.items() if value is not None}


def told_sibling(path: object = "a.txt", size: object = 7, oid: object = SHA1, **more: object) -> dict[str, Any]:
    return {"rfilename": path, "size": size, "blobId": oid, **more}


class TestInfo:
    def test_a_document_of_the_hub(self) -> None:
        """Commit, name, visibility, files with both hashes; what is about the repo stays, its files and Xet do not."""
        large = told_sibling("m.bin", 9, "d" * 40, lfs={"sha256": SHA256, "size": 9, "pointerSize": 126}, xetHash="e" * 64)
        known = read_info(RepoKind.MODELS, info(siblings=[told_sibling(), large], gated="auto", tags=["x"], xetEnabled=True))
        assert (known.repo, known.commit) == (REPO, COMMIT)
        assert known.visibility.is_gated and not known.visibility.is_disabled
        assert known.entries == (FILE, LFS) and known.is_complete
        assert known.about == {"id": "org/m", "sha": COMMIT, "private": False, "gated": "auto", "tags": ["x"]}

    @pytest.mark.parametrize(
        "document",
        [
            None,
            [],
            "x",
            7,
            {},
            info(sha=""),
            info(sha=7),
            info(sha=["c" * 40]),
            info(sha="C" * 40),
            info(sha="main"),
            info(id=7),
            info(id=""),
            info(id="a/b/c"),
            info(id="../m"),
            info(id="o/m\ud800"),
            info(id="o%2Fm"),
            {"sha": COMMIT},
            {"id": "org/m"},
        ],
    )
    def test_what_names_no_repo_or_no_commit_is_upstreams_fault(self, document: object) -> None:
        with pytest.raises(UpstreamFailed):
            read_info(RepoKind.MODELS, document)

    @pytest.mark.parametrize(
        "bad",
        [
            told_sibling(oid=None),
            told_sibling(oid="main"),
            told_sibling(oid=7),
            told_sibling(oid=["a"]),
            told_sibling(oid="A" * 40),
            told_sibling(size=-1),
            told_sibling(size=2**60),
            told_sibling(size=10**300),
            told_sibling(lfs={"sha256": "short"}),
        ],
    )
    def test_a_file_without_a_name_for_its_content_or_with_no_possible_size_spoils_the_answer(
        self, bad: dict[str, Any]
    ) -> None:
        """Serving it would mean serving what cannot be verified; leaving it out would say that it does not exist."""
        with pytest.raises(UpstreamFailed):
            read_info(RepoKind.MODELS, info(siblings=[told_sibling("b.txt"), bad]))

    @pytest.mark.parametrize("siblings", [None, {}, "x", [{"rfilename": "a.txt"}], [None], ["a.txt"], [told_sibling(size="7")]])
    def test_a_list_without_sizes_tells_nothing_of_the_files(self, siblings: object) -> None:
        """And so nobody may conclude from it that a file does not exist."""
        known = read_info(RepoKind.MODELS, info(siblings=siblings))
        assert known.entries is None and not known.is_complete

    @pytest.mark.parametrize("lfs", [True, "x", ["y"], 7, {"sha256": 7}, {"sha256": ["z"]}])
    def test_lfs_of_another_type_is_no_error_of_the_mirrors(self, lfs: object) -> None:
        """The git oid stands."""
        assert read_info(RepoKind.MODELS, info(siblings=[told_sibling(lfs=lfs)])).entries == (FILE,)

    @pytest.mark.parametrize(
        "path",
        ["", "/a", "a/", "a//b", "..", "a/../b", ".", "a\\b", "a\0b", "a\nb", "\x7f", "\ud800", None, 7, ["a"], "a/\udcff"],
    )
    def test_a_path_that_no_url_can_name_is_left_out(self, path: object) -> None:
        known = read_info(RepoKind.MODELS, info(siblings=[told_sibling(path), told_sibling()]))
        assert known.entries == (FILE,)

    def test_from_a_thousand_files_on_the_list_may_be_cut_short(self) -> None:
        """As the Hub counts them: a file that no URL can name is one of the thousand."""
        many = [told_sibling(f"f{i}") for i in range(SIBLINGS_TRUSTED)]
        assert read_info(RepoKind.MODELS, info(siblings=many[1:])).is_complete
        assert not read_info(RepoKind.MODELS, info(siblings=many)).is_complete
        assert not read_info(RepoKind.MODELS, info(siblings=[told_sibling("a\\b"), *many[1:]])).is_complete

    @given(JSON)
    @settings(max_examples=300)
    def test_no_json_does_worse_than_an_error_of_ours(self, document: Any) -> None:
        """And everything that is read can be stored and asked for by URL."""
        for read in (lambda: read_info(RepoKind.DATASETS, document).entries, lambda: read_tree(document)):
            try:
                entries = read() or ()
            except NearhubError:
                continue
            for entry in entries:
                json.dumps(entry_row(entry)).encode()
                target = FileTarget(REPO, "main", entry.path)
                assert len(entry.path) > 500 or parse_file(format_file(target)) == target

    @given(JSON)
    @settings(max_examples=200)
    def test_whatever_stands_in_a_well_formed_document(self, inner: Any) -> None:
        """The same with hostile values where files are listed."""
        for document in (info(siblings=[told_sibling(), inner]), info(siblings=inner), info(siblings=[told_sibling(inner)])):
            try:
                read_info(RepoKind.MODELS, document)
            except UpstreamFailed:
                continue


class TestTree:
    def test_a_page_of_the_hub(self) -> None:
        """A directory by the oid that upstream names; an LFS file by both; `oid` or `sha256`, Xet never."""
        page = [
            {"type": "directory", "oid": "e" * 40, "size": 0, "path": "sub"},
            {"type": "file", "oid": SHA1, "size": 7, "path": "a.txt"},
            {"type": "file", "oid": "d" * 40, "size": 9, "path": "m.bin", "xetHash": "f" * 64}
            | {"lfs": {"oid": SHA256, "size": 9, "pointerSize": 126}},
        ]
        assert read_tree(page) == (Entry("sub", oid="e" * 40), FILE, LFS)

    def test_only_a_file_in_lfs_has_a_pointer(self) -> None:
        assert read_tree([{"path": "a.txt", "oid": SHA1, "size": 7, "lfs": {"pointerSize": 126}}]) == (FILE,)

    @pytest.mark.parametrize("document", [None, {}, "x", [None], [[]], [7]])
    def test_what_is_no_list_of_entries_is_upstreams_fault(self, document: object) -> None:
        with pytest.raises(UpstreamFailed):
            read_tree(document)

    @pytest.mark.parametrize(
        "item",
        [
            {"type": "file", "path": "a"},
            {"type": "file", "path": "a", "oid": SHA1},
            {"type": "file", "path": "a", "oid": SHA1, "size": None},
            {"type": "file", "path": "a", "oid": SHA1, "size": 1.5},
            {"type": "file", "path": "a", "oid": SHA1, "size": True},
            {"type": "file", "path": "a", "oid": "*" * 64, "size": 1},
            {"type": "file", "path": "a", "oid": SHA1, "size": 1, "lfs": {"oid": SHA1}},
            {"type": "submodule", "path": "a", "oid": 1, "size": 1},
        ],
    )
    def test_a_file_without_size_or_content_spoils_the_page(self, item: dict[str, Any]) -> None:
        with pytest.raises(UpstreamFailed):
            read_tree([item])

    @pytest.mark.parametrize("lfs", [True, "x", ["y"], 7])
    def test_lfs_of_another_type_is_no_error_of_the_mirrors(self, lfs: object) -> None:
        assert read_tree([{"type": "file", "path": "a.txt", "oid": SHA1, "size": 7, "lfs": lfs}]) == (FILE,)

    def test_a_directory_whose_oid_is_nonsense_has_none(self) -> None:
        assert read_tree([{"type": "directory", "path": "d", "oid": 7}]) == (Entry("d"),)


class TestRows:
    @given(ENTRIES)
    @example(Entry("d"))
    def test_what_is_written_is_read_again(self, entry: Entry) -> None:
        """Through JSON, as the index has it."""
        assert entry_from_row(entry.path, json.loads(json.dumps(entry_row(entry)))) == entry

    @given(ENTRIES)
    def test_what_is_told_is_read_again(self, entry: Entry) -> None:
        """A mirror of this mirror learns the same, from its trees and from its siblings."""
        [again] = read_tree([tree_item(entry)])
        assert again.agrees(entry) and again.path == entry.path
        assert again.oid == git_oid(entry) or entry.is_directory
        if not entry.is_directory:
            document = info(siblings=[sibling(entry, with_blobs=True)])
            assert read_info(RepoKind.MODELS, document).entries == (again,)

    @given(ENTRIES, ENTRIES)
    def test_entries_that_differ_do_not_agree(self, one: Entry, other: Entry) -> None:
        """P11: in path, size, content or git's name; not being told git's name is no difference."""
        told = one.oid is not None and other.oid is not None
        different = (one.path, one.size, one.blob) != (other.path, other.size, other.blob) or (told and one.oid != other.oid)
        assert one.agrees(other) == other.agrees(one) == (not different)
        assert one.agrees(one)


class TestPointer:
    def test_the_pointer_and_its_oid_are_gits(self, tmp_path: Path) -> None:
        """As `git hash-object` names the text that git-lfs writes."""
        entry = Entry("m.bin", 12345, None, BlobId(Algo.SHA256, SHA256))
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{SHA256}\nsize 12345\n"
        assert pointer(entry).decode() == text
        assert git_oid(entry) == git(tmp_path, "hash-object", "--stdin", given=text.encode()).strip()
        assert tree_item(entry)["lfs"]["pointerSize"] == len(text)


def git(where: Path, *arguments: str, given: bytes = b"") -> str:
    """Run git without anybody's configuration."""
    environment = {"GIT_CONFIG_NOSYSTEM": "1", "HOME": str(where), "PATH": "/usr/bin:/bin:/usr/local/bin"}
    command = ["git", "-c", "core.quotePath=false", *arguments]
    return subprocess.run(command, cwd=where, input=given, capture_output=True, check=True, env=environment).stdout.decode()


def git_listing(where: Path, paths: list[str]) -> list[Entry]:
    """What `git ls-tree -r -t` says of files at `paths`, each with its own path as content; git's order."""
    git(where, "init", "-q")
    commands = []
    for path in paths:
        data = path.encode()
        quoted = path.encode().replace(b"\\", b"\\\\").replace(b'"', b'\\"')
        commands.append(b'M 100644 inline "%s"\ndata %d\n%s\n' % (quoted, len(data), data))
    head = b"commit refs/heads/main\ncommitter a <a@b> 0 +0000\ndata 0\n\n"
    git(where, "fast-import", "--quiet", given=head + b"".join(commands))
    found = []
    for line in git(where, "ls-tree", "-r", "-t", "-z", "--full-tree", "main").split("\0")[:-1]:
        mode, kind, oid, path = *line.partition("\t")[0].split(" "), line.partition("\t")[2]
        assert mode in ("100644", "040000")
        if kind == "tree":
            found.append(Entry(path, oid=oid))
        else:
            found.append(Entry(path, len(path.encode()), oid, BlobId(Algo.SHA1, oid)))
    return found


def without_clashes(paths: list[str]) -> list[str]:
    """No path is both a file and a directory."""
    directories = {path[:i] for path in paths for i, c in enumerate(path) if c == "/"}
    return sorted({path for path in paths if path not in directories})


PARTS = ["a", "a.b", "a0", "a-", "é", "\U0001f600", "\uffff", "b c"]
NASTY = [
    "a.txt",
    "a/b",
    "a/b.txt",
    "a0",
    "a-b",
    "a b/c",
    "a b.c",
    "A/x",
    "b/a/a",
    "b/a.a",
    "b/a0/z",
    "é/ü",
    "é.x",
    "中/文",
    "z",
]


class TestDirectories:
    def test_trees_made_from_files_are_gits(self, tmp_path: Path) -> None:
        """The oid of every directory and the order of all entries, as `git ls-tree -r -t` has them."""
        expected = git_listing(tmp_path, NASTY)
        assert any(entry.is_directory for entry in expected)
        files = [entry for entry in expected if not entry.is_directory]
        assert with_directories(files) == expected
        assert with_directories(reversed(files)) == expected

    @settings(max_examples=15, deadline=None)
    @given(paths=st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("/".join), min_size=1, max_size=12))
    def test_whatever_the_names(self, tmp_path_factory: pytest.TempPathFactory, paths: list[str]) -> None:
        """Beyond the BMP too, where UTF-16 would sort otherwise."""
        paths = without_clashes(paths)
        assume(paths)
        expected = git_listing(tmp_path_factory.mktemp("git"), paths)
        assert with_directories([entry for entry in expected if not entry.is_directory]) == expected

    def test_files_that_come_once_are_enough(self) -> None:
        """An iterator is an Iterable too."""
        assert [entry.path for entry in with_directories(iter([FILE]))] == ["a.txt"]

    @given(st.lists(st.sampled_from(NASTY), max_size=15))
    def test_below_is_what_a_directory_holds(self, paths: list[str]) -> None:
        """Everything below the top is everything; one level is those without a further slash; a file's own name gives it."""
        entries = with_directories([Entry(path, 1, SHA1, FILE.blob) for path in without_clashes(paths)])
        assert below(entries, "", recursive=True) == entries
        for entry in entries:
            inside = below(entries, entry.path, recursive=True)
            if entry.is_directory:
                assert inside and inside == [one for one in entries if one.path.startswith(f"{entry.path}/")]
                flat = below(entries, entry.path, recursive=False)
                assert flat == [one for one in inside if one.path.count("/") == entry.path.count("/") + 1]
            else:
                assert inside == [entry]
        assert below(entries, "absent", recursive=True) == []

    def test_git_sorts_a_directory_as_if_its_name_ended_in_a_slash(self) -> None:
        assert sorted([Entry("a0", 1, SHA1, FILE.blob), Entry("a"), Entry("a.txt", 1, SHA1, FILE.blob)], key=tree_order) == [
            Entry("a.txt", 1, SHA1, FILE.blob),
            Entry("a"),
            Entry("a0", 1, SHA1, FILE.blob),
        ]


class TestRewritten:
    def test_urls_of_upstreams_become_the_mirrors_and_xet_goes(self) -> None:
        """At any depth; text that only looks like it, and other hosts, stay."""
        bases = ["https://hub.test", "http://10.0.0.1:8090/pre"]
        document = {
            "a": ["https://hub.test/api/x?y", {"b": "https://hub.test", "xetHash": "f" * 64}],
            "c": "http://10.0.0.1:8090/pre/z",
            "d": ["https://hub.testing/x", "see https://hub.test/x", "http://10.0.0.1:8090/prefix", None, 1, True],
            "e": "https://hub.test?q",
            "xetEnabled": True,
        }
        assert rewritten(document, bases, "http://m:1/p") == {
            "a": ["http://m:1/p/api/x?y", {"b": "http://m:1/p"}],
            "c": "http://m:1/p/z",
            "d": ["https://hub.testing/x", "see https://hub.test/x", "http://10.0.0.1:8090/prefix", None, 1, True],
            "e": "http://m:1/p?q",
        }
