"""Raw URL path ↔ FileTarget: inverses for everything valid, one decoding, a clean refusal for everything else."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from nearhub.errors import BadTarget, EntryNotFound, NearhubError, NotRoutable, RepoNotFound
from nearhub.wire.target import (
    _PAGE_WORDS,
    _TOP_WORDS,
    DEFAULT_REVISION,
    MAX_PATH_BYTES,
    FileTarget,
    GitService,
    GitTarget,
    LfsCall,
    LfsTarget,
    ListCall,
    NamedCall,
    PageTarget,
    RawTarget,
    Repo,
    RepoCall,
    RepoKind,
    Target,
    Verb,
    format_api,
    format_file,
    format_lfs,
    format_page,
    format_short,
    is_commit,
    parse,
    parse_file,
    parse_repo_name,
    split_prefix,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = Repo(RepoKind.MODELS, "org/m")

SEGMENTS = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,20}[A-Za-z0-9_])?", fullmatch=True).filter(
    lambda name: "--" not in name and ".." not in name and not name.endswith(".git")
)
REPOS = st.builds(
    Repo,
    st.sampled_from(RepoKind),
    st.one_of(SEGMENTS, st.tuples(SEGMENTS, SEGMENTS).map("/".join)).filter(
        lambda name: name.partition("/")[0] not in ("datasets", "spaces")
    ),
)
NAMES = st.text(st.characters(exclude_characters="/\\\x7f", min_codepoint=0x20, exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
REVISIONS = st.one_of(
    st.just(COMMIT),
    st.sampled_from(["main", "v1.0", "refs/pr/1", "refs/convert/parquet", "feat/x", "héllo", "50%"]),
    PATHS.filter(lambda revision: len(revision) <= 255),
)


class TestInverse:
    @given(REPOS, REVISIONS, PATHS)
    @example(Repo(RepoKind.MODELS, "gpt2"), "refs/pr/1", "a b/é#x?.bin")
    @example(MODEL, "main", "resolve/main/x")
    @example(MODEL, "main", "%2e%2e")
    @example(MODEL, "main", "CON")
    @example(MODEL, "main", "trailing. ")
    def test_what_is_formatted_parses_to_the_same_target(self, repo: Repo, revision: str, path: str) -> None:
        """Through the prefix too, and the raw path is pure ASCII without anything a proxy would change."""
        assume("/" in repo.name or revision != "resolve")  # see the test of both readings
        assume(revision != "refs" or not path.startswith(("pr/", "convert/")))
        target = FileTarget(repo, revision, path)
        raw = format_file(target)
        assume(len(raw) <= MAX_PATH_BYTES)
        assert parse_file(raw) == target
        assert parse_file(split_prefix(f"/pre/fix{raw}?download=true", "/pre/fix")) == target
        assert raw.isascii() and "//" not in raw and not set(raw) & set(' "<>\\^`{|}?#')

    def test_two_segment_ids_win_where_both_readings_are_possible(self) -> None:
        """A one-segment id whose branch is called `resolve` cannot be told from an owner with a repo of that name."""
        assert parse_file("/a/resolve/resolve/x/y") == FileTarget(Repo(RepoKind.MODELS, "a/resolve"), "x", "y")
        assert parse_file("/a/resolve/resolve/x") == FileTarget(Repo(RepoKind.MODELS, "a"), "resolve", "x")

    def test_a_special_ref_wins_over_a_branch_called_refs(self) -> None:
        assert parse_file("/o/m/resolve/refs/pr/1/x").revision == "refs/pr/1"
        assert parse_file("/o/m/resolve/refs/pr/1") == FileTarget(Repo(RepoKind.MODELS, "o/m"), "refs", "pr/1")
        assert parse_file("/o/m/resolve/refs/x/1") == FileTarget(Repo(RepoKind.MODELS, "o/m"), "refs", "x/1")


class TestParse:
    @pytest.mark.parametrize(
        ("raw", "text"),
        [
            ("/org/m/resolve/main/config.json", "org/m@main:config.json"),
            ("/gpt2/resolve/main/config.json", "gpt2@main:config.json"),
            ("/datasets/squad/resolve/main/a/b.parquet", "datasets/squad@main:a/b.parquet"),
            ("/datasets/org/d/resolve/main/x", "datasets/org/d@main:x"),
            ("/spaces/org/s/resolve/main/app.py", "spaces/org/s@main:app.py"),
            ("/models/m/resolve/main/x", "models/m@main:x"),
            (f"/org/m/resolve/{COMMIT}/x", f"org/m@{COMMIT}:x"),
            ("/org/m/resolve/refs%2Fpr%2F1/x", "org/m@refs/pr/1:x"),
            ("/org/m/resolve/refs/pr/1/x", "org/m@refs/pr/1:x"),
            ("/datasets/org/d/resolve/refs%2Fconvert%2Fparquet/default/0.parquet", None),
            ("/datasets/org/d/resolve/refs/convert/parquet/default/0.parquet", None),
            ("/org/m/resolve/refs%2fconvert%2fparquet/x", "org/m@refs/convert/parquet:x"),
            ("/org/m/resolve/feat%2Fx/y", "org/m@feat/x:y"),
            ("/org/m/resolve/main/a%20b/%C3%A9%23x%3F.bin", "org/m@main:a b/é#x?.bin"),
            ("/org/m/resolve/main/a+b", "org/m@main:a+b"),
            ("/org/m/resolve/main/a%2Fb", "org/m@main:a/b"),
            ("/org/m/resolve/main/é", "org/m@main:é"),
            ("/org/m/resolve/main/resolve", "org/m@main:resolve"),
            ("/o%72g/m/resolve/main/x", "org/m@main:x"),
        ],
    )
    def test_every_spelling_that_clients_send(self, raw: str, text: str | None) -> None:
        assert str(parse_file(raw)) == (text or "datasets/org/d@refs/convert/parquet:default/0.parquet")

    @pytest.mark.parametrize(
        "path", ["..%252f..%252fetc", "%252e%252e", "%252e%252e/x", "%25", "a%2525", "%2500", "%255c", "CON", "x.", "x%20"]
    )
    def test_decoding_happens_once(self, path: str) -> None:
        """A name that would be hostile after a second decoding is an ordinary, absent name: names never become file names."""
        assert parse_file(f"/org/m/resolve/main/{path}").path == unquote(path)

    @pytest.mark.parametrize(
        "path",
        [
            "..",
            ".",
            "../x",
            "a/../b",
            "a/./b",
            "a/..",
            "%2e%2e",
            "%2E%2e/x",
            ".%2e/x",
            "a%2f..%2fb",
            "a//b",
            "%2fa",
            "a%2f",
            "a%2f%2fb",
            "%00",
            "a%00.bin",
            "a%0d%0aSet-Cookie:%20x",
            "a%0ab",
            "a%1b[31m",
            "a%7f",
            "%c0%ae%c0%ae/x",
            "%c0%af",
            "%e0%80%ae",
            "%ff",
            "%ed%a0%80",
            "%",
            "%2",
            "%zz",
            "%u002e",
            "a%2",
            "\udcff",
            "\ud800",
            "a\x00b",
            "a\nb",
        ],
    )
    def test_dot_segments_control_bytes_broken_escapes_and_bad_utf8_are_refused(self, path: str) -> None:
        """As 400, in the path and in the revision."""
        with pytest.raises(BadTarget):
            parse_file(f"/org/m/resolve/main/x/{path}/y")
        revision = path.replace("/", "%2F")
        with pytest.raises(BadTarget):
            parse_file(f"/org/m/resolve/{revision}/y")

    @pytest.mark.parametrize("path", ["a%5cb", "a\\b", "..%5c..%5cx", "%5C"])
    def test_a_backslash_names_no_file(self, path: str) -> None:
        """Windows users get their 404, not another file."""
        with pytest.raises(EntryNotFound):
            parse_file(f"/org/m/resolve/main/{path}")

    @pytest.mark.parametrize(
        "name",
        [
            "o--x/m",
            "o..x/m",
            "o/m.git",
            "-o/m",
            "o/m-",
            ".o/m",
            "o/m.",
            "o/%2e%2e",
            "../m",
            "o%2Fm/x",
            "o/a%2fb",
            "o/m%20",
            "оrg/m",
            "o/m%D0%B0",
            "o/" + "m" * 97,
            "o/m%5c",
            "o/m\u2044x",
            "o/١",
        ],
    )
    def test_a_name_no_repo_can_have_is_a_repo_that_is_not_there(self, name: str) -> None:
        """Look-alike letters and digits included."""
        with pytest.raises(RepoNotFound):
            parse_file(f"/{name}/resolve/main/x")

    @pytest.mark.parametrize(
        "raw",
        [
            "/",
            "",
            "/org",
            "/org/m/resolve",
            "/org/m/resolve/main",
            "/resolve/main/x",
            "/datasets/resolve/main/x",
            "/org/m/res%6Flve/main/x",
            "/-/healthz",
        ],
    )
    def test_what_is_no_resolve_url_is_not_routable(self, raw: str) -> None:
        with pytest.raises(NotRoutable):
            parse_file(raw)

    def test_an_empty_revision_is_refused_and_a_long_one_too(self) -> None:
        with pytest.raises(BadTarget):
            parse_file("/org/m/resolve//x")
        assert parse_file(f"/org/m/resolve/{'r' * 255}/x").revision == "r" * 255
        with pytest.raises(BadTarget):
            parse_file(f"/org/m/resolve/{'r' * 256}/x")

    def test_a_path_of_more_than_4096_bytes_is_refused(self) -> None:
        head = "/org/m/resolve/main/"
        assert parse_file(head + "x" * (MAX_PATH_BYTES - len(head))).path.startswith("xx")
        with pytest.raises(BadTarget):
            parse_file(head + "x" * (MAX_PATH_BYTES - len(head) + 1))

    @given(
        st.one_of(
            st.text(),
            st.text("/%.\\2eEfF0acd ").map("/org/m/resolve/main/".__add__),
            st.text("/%.\\2eEfF0acd ").map("/org/m/resolve/".__add__),
            st.lists(st.sampled_from(["resolve", "datasets", "spaces", "refs", "pr", "a", "", "%2F", "..", "%00"])).map(
                "/".join
            ),
            st.binary().map(lambda raw: "/org/m/resolve/main/" + raw.decode("utf-8", "surrogateescape")),
            st.binary().map(lambda raw: "/" + raw.decode("latin-1")),
        )
    )
    def test_no_text_does_worse_than_an_error_of_ours(self, raw: str) -> None:
        """Whatever bytes a client sends as its path; and what parses has a safe name and a canonical spelling."""
        try:
            target = parse_file(split_prefix(raw, "/pre"))
        except NearhubError:
            return
        for name in (*target.path.split("/"), *target.revision.split("/"), *target.repo.name.split("/")):
            assert name not in ("", ".", "..")
        assert not any(c < " " or c == "\x7f" or c == "\\" for c in target.path)
        if "/" in target.repo.name and target.revision != "refs":
            assert parse_file(format_file(target)) == target


DATA, GPT2 = Repo(RepoKind.DATASETS, "org/d"), Repo(RepoKind.MODELS, "gpt2")


def call(verb: Verb, repo: Repo = MODEL, revision: str = DEFAULT_REVISION, path: str = "") -> RepoCall:
    return RepoCall(verb, repo, revision, path)


class TestApi:
    @pytest.mark.parametrize(
        ("raw", "target"),
        [
            ("/api/models/org/m", call(Verb.INFO)),
            ("/api/models/org/m/", call(Verb.INFO)),
            ("/api/models/gpt2", call(Verb.INFO, GPT2)),
            ("/api/datasets/org/d", call(Verb.INFO, DATA)),
            ("/api/spaces/org/s", call(Verb.INFO, Repo(RepoKind.SPACES, "org/s"))),
            ("/api/models/org/m/revision/main", call(Verb.INFO)),
            ("/api/models/gpt2/revision/v1.0", call(Verb.INFO, GPT2, "v1.0")),
            (f"/api/models/org/m/revision/{COMMIT}", call(Verb.INFO, revision=COMMIT)),
            ("/api/models/org/m/revision/refs%2Fpr%2F1", call(Verb.INFO, revision="refs/pr/1")),
            ("/api/models/org/m/revision/refs/pr/1", call(Verb.INFO, revision="refs/pr/1")),
            ("/api/models/org/m/revision/refs", call(Verb.INFO, revision="refs")),
            ("/api/models/org/m/revision/feat%2Fx", call(Verb.INFO, revision="feat/x")),
            ("/api/models/org/m/tree/main", call(Verb.TREE)),
            ("/api/models/org/m/tree/main/", call(Verb.TREE)),
            ("/api/models/org/m/tree/main/a%20b%2Fc", call(Verb.TREE, path="a b/c")),
            ("/api/models/org/m/tree/main/a/b/", call(Verb.TREE, path="a/b")),
            ("/api/models/org/m/tree/refs/pr/1", call(Verb.TREE, revision="refs/pr/1")),
            ("/api/models/org/m/tree/refs/pr/1/sub", call(Verb.TREE, revision="refs/pr/1", path="sub")),
            ("/api/datasets/org/d/tree/refs%2Fconvert%2Fparquet/x", call(Verb.TREE, DATA, "refs/convert/parquet", "x")),
            ("/api/datasets/org/d/tree/refs/convert/parquet/x", call(Verb.TREE, DATA, "refs/convert/parquet", "x")),
            ("/api/models/gpt2/tree/main/tree", call(Verb.TREE, GPT2, path="tree")),
            ("/api/models/org/m/paths-info/main", call(Verb.PATHS_INFO)),
            ("/api/models/org/m/commits/refs/pr/1", call(Verb.COMMITS, revision="refs/pr/1")),
            ("/api/models/org/m/refs", call(Verb.REFS, path="refs")),
            ("/api/models/gpt2/refs", call(Verb.REFS, GPT2, path="refs")),
            ("/api/models/org/m/auth-check", call(Verb.AUTH_CHECK, path="auth-check")),
            ("/api/models/org/m/auth-check/write", call(Verb.AUTH_CHECK, path="auth-check/write")),
            (f"/api/models/org/m/xet-read-token/{COMMIT}", call(Verb.XET_TOKEN, path=f"xet-read-token/{COMMIT}")),
            ("/api/models/org/m/discussions", call(Verb.PASSED, path="discussions")),
            ("/api/models/org/m/compare/a%2Fb..c", call(Verb.PASSED, path="compare/a%2Fb..c")),
            (
                "/api/datasets/org/d/parquet/default/train/0.parquet",
                call(Verb.PASSED, DATA, path="parquet/default/train/0.parquet"),
            ),
            ("/api/models", ListCall(RepoKind.MODELS)),
            ("/api/datasets/", ListCall(RepoKind.DATASETS)),
            ("/api/whoami-v2", NamedCall("whoami-v2")),
            ("/api/telemetry/a%2Fb/c", NamedCall("telemetry/a%2Fb/c")),
            ("/api/agent-harnesses", NamedCall("agent-harnesses")),
            ("/api/spaces/semantic-search", NamedCall("spaces/semantic-search")),
            ("/api/models-tags-by-type", NamedCall("models-tags-by-type")),
            ("/org/m/raw/main/a/b", RawTarget(FileTarget(MODEL, "main", "a/b"))),
            ("/gpt2/raw/main/x", RawTarget(FileTarget(GPT2, "main", "x"))),
            ("/datasets/org/d/raw/refs/pr/1/x", RawTarget(FileTarget(DATA, "refs/pr/1", "x"))),
            ("/org/m/resolve/raw/x", FileTarget(MODEL, "raw", "x")),
            ("/org/m/resolve/main/raw/x", FileTarget(MODEL, "main", "raw/x")),
            ("/org/raw/resolve/main/x", FileTarget(Repo(RepoKind.MODELS, "org/raw"), "main", "x")),
            (f"/api/resolve-cache/models/org/m/{COMMIT}/a%20b", FileTarget(MODEL, COMMIT, "a b")),
            (f"/api/resolve-cache/models/gpt2/{COMMIT}/x", FileTarget(GPT2, COMMIT, "x")),
            (f"/api/resolve-cache/datasets/org/d/{COMMIT}/{COMMIT}/x", FileTarget(DATA, COMMIT, f"{COMMIT}/x")),
        ],
    )
    def test_every_question_that_clients_ask(self, raw: str, target: Target) -> None:
        """hub-protocol §2: encoded or not, with one segment or two, with a slash too many at the end."""
        assert parse(raw) == target

    @pytest.mark.parametrize(
        "raw",
        [
            "/api/models/org/m/nothing",
            "/api/models/org/m/revision",
            "/api/models/org/m/revision/feat/x",
            "/api/models/org/m/paths-info/main/x",
            "/api/models/org/m/commit/main",
            "/api/models/org/m/preupload/main",
            "/api/models/a/b/c",
            "/api/resolve-cache/models/org/m/main/x",
            f"/api/resolve-cache/models/org/m/{COMMIT}",
            "/org/m/raw/main",
            "/org",
            "/org/m/tree",
            "/org/m/blob/main",
            "/org/m/info/x",
            "/org/m/info/lfs",
            "/org/m/settings",
            "/git-upload-pack",
            "/info/refs",
            "/resolve/main/x",
            f"/-/lfs/models/org/m/{'0' * 63}",
            f"/-/lfs/models/{'0' * 64}",
            f"/-/lfs/users/org/m/{'0' * 64}",
        ],
    )
    def test_what_no_client_asks_is_not_routable(self, raw: str) -> None:
        with pytest.raises(NotRoutable):
            parse(raw)

    @pytest.mark.parametrize(
        "raw",
        [
            "/api/collections/../whoami-v2",
            "/api/collections/%2e%2e/whoami-v2",
            "/api/collections/a%2f..%2f..%2fwhoami-v2",
            "/api/papers/..",
            "/api/users/../overview",
            "/api/models/org/m/compare/../../x",
            "/api/models/org/m/discussions/%2e%2e/x",
            "/api/models/org/m/discussions/a%2F..%2Fx",
            "/api/models/org/m/tree/main/../x",
            "/api/models/org/m/tree/main/a%2f..%2fb",
            "/api/models/org/m/revision/%2e%2e",
            "/api/models/org/m/discussions/%",
            "/api/telemetry/%00",
        ],
    )
    def test_no_dots_lead_out_of_what_is_asked(self, raw: str) -> None:
        """What is passed on raw must mean upstream what it means here."""
        with pytest.raises(BadTarget):
            parse(raw)

    @given(REPOS, REVISIONS, PATHS, st.sampled_from(["tree", "revision", "commits", "paths-info"]))
    def test_what_is_formatted_parses_to_the_same_call(self, repo: Repo, revision: str, path: str, word: str) -> None:
        """Repos named like a verb apart, which cannot be told from a call."""
        words = {"refs", "auth-check", "xet-read-token", "tree", "revision", "commits", "paths-info", "resolve-cache"}
        words |= {"discussions", "compare", "treesize", "safetensors-metadata", "parquet", "semantic-search"}
        assume(not set(repo.name.split("/")) & words)
        path = path if word == "tree" else ""
        assume(revision != "refs" or not path.startswith(("pr/", "convert/")))
        raw = format_api(repo, word, revision, path)
        assume(len(raw) <= MAX_PATH_BYTES)
        verb = Verb.INFO if word == "revision" else Verb(word)
        assert parse(raw) == RepoCall(verb, repo, revision, path)
        assert raw.isascii() and not set(raw) & set(' "<>\\^`{|}?#')

    @given(
        st.text("/%.\\2eEfF0acd ").map("/api/models/".__add__)
        | st.text("/%.\\2eEfF0acd ").map("/api/".__add__)
        | st.lists(st.sampled_from(["api", "models", "tree", "refs", "pr", "1", "raw", "resolve", "a", "", "%2F", ".."])).map(
            lambda parts: "/" + "/".join(parts)
        )
    )
    def test_no_text_does_worse_than_an_error_of_ours(self, raw: str) -> None:
        """And what goes on to upstream raw has no segment that leads elsewhere."""
        try:
            target = parse(split_prefix(raw, "/pre"))
        except NearhubError:
            return
        handed_on = target.name if isinstance(target, NamedCall) else target.path if isinstance(target, RepoCall) else ""
        assert not {"..", "."} & set(unquote(handed_on).split("/"))

    def test_a_repo_id_in_json_is_checked_like_one_in_a_url(self) -> None:
        assert parse_repo_name(RepoKind.MODELS, "org/m") == MODEL
        assert Repo(RepoKind.MODELS, "Org/M").folded() == MODEL
        for name in ("", "a/b/c", "../m", "o/m.git", "o--x/m", " o/m", "o/m\n"):
            with pytest.raises(NearhubError):
                parse_repo_name(RepoKind.MODELS, name)


class TestPrefix:
    @pytest.mark.parametrize(
        ("raw", "prefix", "path"),
        [
            ("/org/m", "", "/org/m"),
            ("/pre/fix/org/m", "/pre/fix", "/org/m"),
            ("/pre/fix", "/pre/fix", "/"),
            ("/pre/fix/", "/pre/fix", "/"),
            ("/pre/fixer/m", "/pre/fix", "/pre/fixer/m"),
            ("/org/m", "/pre/fix", "/org/m"),
            ("//pre//fix///org//m", "/pre/fix", "/org/m"),
            ("/pre/fix/pre/fix/m", "/pre/fix", "/pre/fix/m"),
            ("/org/m?x=/pre/fix/..", "/pre/fix", "/org/m"),
            ("/org/m#frag?x", "", "/org/m"),
            ("/org/m?a?b#c", "", "/org/m"),
            ("org/m", "", "/org/m"),
            ("", "/pre", "/"),
            ("/pre%2Ffix/m", "/pre/fix", "/pre%2Ffix/m"),
        ],
    )
    def test_query_duplicate_slashes_and_prefix_go(self, raw: str, prefix: str, path: str) -> None:
        """A path outside the prefix is taken as it is: a reverse proxy may have stripped it."""
        assert split_prefix(raw, prefix) == path


class TestCommits:
    @pytest.mark.parametrize("revision", [COMMIT.upper(), COMMIT[:-1], COMMIT + "0", COMMIT + "\n", "main", "", "٠" * 40])
    def test_only_forty_lower_hex_digits_are_a_commit(self, revision: str) -> None:
        assert is_commit(COMMIT)
        assert not is_commit(revision)

    def test_a_target_is_pinned_at_a_commit_and_at_keeps_the_rest(self) -> None:
        target = FileTarget(MODEL, "main", "a/b")
        assert not target.is_pinned
        assert target.at(COMMIT) == FileTarget(MODEL, COMMIT, "a/b")
        assert target.at(COMMIT).is_pinned


class TestGit:
    @pytest.mark.parametrize(
        ("raw", "target"),
        [
            ("/org/m/info/refs", GitTarget(MODEL, None)),
            ("/org/m.git/info/refs", GitTarget(MODEL, None)),
            ("/gpt2.git/info/refs", GitTarget(GPT2, None)),
            ("/datasets/org/d.git/info/refs", GitTarget(DATA, None)),
            ("/org/m/git-upload-pack", GitTarget(MODEL, GitService.UPLOAD_PACK)),
            ("/datasets/org/d/git-upload-pack", GitTarget(DATA, GitService.UPLOAD_PACK)),
            ("/gpt2/git-receive-pack", GitTarget(GPT2, GitService.RECEIVE_PACK)),
            ("/org/m.git/info/lfs/objects/batch", LfsCall(MODEL, "objects/batch")),
            ("/org/m/info/lfs/locks/verify", LfsCall(MODEL, "locks/verify")),
            ("/gpt2.git/info/lfs/locks", LfsCall(GPT2, "locks")),
            ("/datasets/org/d.git/info/lfs/locks", LfsCall(DATA, "locks")),
        ],
    )
    def test_what_git_asks(self, raw: str, target: Target) -> None:
        assert parse(raw) == target

    @given(REPOS, st.text("0123456789abcdef", min_size=64, max_size=64))
    def test_an_lfs_object_has_one_url(self, repo: Repo, oid: str) -> None:
        assert parse(format_lfs(LfsTarget(repo, oid))) == LfsTarget(repo, oid)


class TestShortUrls:
    @pytest.mark.parametrize(
        ("raw", "target"),
        [
            ("/org/m/config.json", FileTarget(MODEL, "main", "config.json")),
            ("/org/m/onnx/model%20q4.onnx", FileTarget(MODEL, "main", "onnx/model q4.onnx")),
            ("/datasets/org/d/data/train.csv", FileTarget(DATA, "main", "data/train.csv")),
            ("/a/b/c/tree/main/x", FileTarget(Repo(RepoKind.MODELS, "a/b"), "main", "c/tree/main/x")),
            ("/org/m/blob/main/sub/x", FileTarget(MODEL, "main", "sub/x")),
            ("/org/m/blob/refs/pr/1/x", FileTarget(MODEL, "refs/pr/1", "x")),
            ("/org/m", PageTarget(MODEL, "main")),
            ("/org/m/", PageTarget(MODEL, "main")),
            ("/org/m.git", PageTarget(MODEL, "main")),
            ("/datasets/org/d", PageTarget(DATA, "main")),
            ("/org/m/tree/v1", PageTarget(MODEL, "v1")),
            ("/org/m/tree/refs%2Fpr%2F1/sub/dir", PageTarget(MODEL, "refs/pr/1", "sub/dir")),
        ],
    )
    def test_a_repo_and_its_files_by_name_alone(self, raw: str, target: Target) -> None:
        assert parse(raw) == target

    @given(REPOS, REVISIONS, PATHS)
    def test_a_short_url_stands_for_no_other_one(self, repo: Repo, revision: str, path: str) -> None:
        """Whatever format_file writes is read as that, and never as a short URL of another file."""
        assert parse(format_file(FileTarget(repo, revision, path))) == FileTarget(repo, revision, path)

    @given(REPOS, REVISIONS, PATHS)
    @example(MODEL, "main", "tree/main/x")
    @example(MODEL, "main", "info/refs")
    @example(MODEL, "main", "x/resolve/main/y")
    @example(Repo(RepoKind.MODELS, "org/api"), "main", "models/x")
    @example(Repo(RepoKind.MODELS, "gpt2"), "main", "a/b/c")
    def test_what_is_shortened_parses_to_the_same_file(self, repo: Repo, revision: str, path: str) -> None:
        assume("/" in repo.name or revision != "resolve")
        assume(revision != "refs" or not path.startswith(("pr/", "convert/")))
        target = FileTarget(repo, revision, path)
        short = format_short(target)
        assume(len(format_file(target)) <= MAX_PATH_BYTES)
        assert parse(short) == parse(split_prefix(f"/pre/fix{short}?download=true", "/pre/fix")) == target

    def test_a_file_is_shortened_where_it_can_be(self) -> None:
        assert format_short(FileTarget(MODEL, "main", "a b/c")) == "/org/m/a%20b/c"
        assert format_short(FileTarget(DATA, "main", "c")) == "/datasets/org/d/c"
        assert format_short(FileTarget(MODEL, "v1", "c")) == "/org/m/resolve/v1/c"
        assert format_short(FileTarget(MODEL, "main", "tree/c")) == "/org/m/resolve/main/tree/c"
        assert format_short(FileTarget(MODEL, "main", "c/resolve")) == "/org/m/resolve/main/c/resolve"

    @given(REPOS, REVISIONS, PATHS | st.just(""))
    def test_what_is_formatted_parses_to_the_same_page(self, repo: Repo, revision: str, path: str) -> None:
        """Of repos with an owner, whose names are no words of the Hub's."""
        assume("/" in repo.name and not (_PAGE_WORDS | _TOP_WORDS) & set(repo.name.split("/")))
        assume(revision != "refs" or not path.startswith(("pr/", "convert/")))
        target = PageTarget(repo, revision, path)
        raw = format_page(target)
        assume(len(raw) <= MAX_PATH_BYTES)
        assert parse(raw) == target

    @pytest.mark.parametrize(
        "raw",
        [
            "/gpt2/tree/main",
            "/gpt2/tree/main/x",
            "/gpt2/blob/main/config.json",
            "/gpt2/discussions/1",
            "/datasets/squad/tree/main",
            "/org/m/discussions",
            "/org/m/commits/main",
            "/org/m/commit/0123",
            "/org/m/%74ree",
            "/kernels/org/k/resolve/main/x",
            "/buckets/org/b/resolve/x",
            "/collections/org/slug",
            "/papers/2401.00001",
            "/docs/transformers/index",
            "/settings/tokens",
            "/oauth/authorize",
            "/v2/org/m/manifests/latest",
            "/v2/org/m/blobs/sha256:0123",
            "/models/org/m",
            "/%61pi/models/org/m",
            "/d%61tasets/org/d",
            "/wrong-prefix/api/models/org/m",
            "/wrong-prefix/org/m/resolve/main/x",
            "/wrong/prefix/org/m/%72esolve/main/x",
            "/wrong-prefix/datasets/org/d/resolve/main/x",
            "/datasets/org",
            "/favicon.ico",
            "/-/metrics/x",
        ],
    )
    def test_a_url_that_means_something_else_on_the_hub_is_no_short_one(self, raw: str) -> None:
        """Neither a file of main nor a page, however it is encoded."""
        with pytest.raises(NotRoutable):
            parse(raw)

    @pytest.mark.parametrize("raw", ["/org/m/../x", "/org/m/a/%2e%2e/b", "/org/m/a/./b", "/org/m/%00", "/org/m/a%zz"])
    def test_a_hostile_short_url_is_a_bad_target(self, raw: str) -> None:
        with pytest.raises(BadTarget):
            parse(raw)


@pytest.mark.parametrize("owner", ["api", "datasets", "spaces"])
def test_no_repo_has_the_url_of_something_else(owner: str) -> None:
    """A model of `datasets` would be asked for where a dataset is."""
    for raw in (f"/api/resolve-cache/models/{owner}/m/{COMMIT}/f", f"/api/models/{owner}/m"):
        with pytest.raises(RepoNotFound):
            parse(raw)
