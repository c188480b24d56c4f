"""FileMetadata from the Hub's answers as they were captured, and the headers of our own."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from nearhub.errors import UpstreamFailed
from nearhub.wire.headers import (
    EXPOSED,
    Algo,
    BlobId,
    FileMetadata,
    content_disposition,
    content_type,
    cors_headers,
    file_headers,
    normalise_etag,
    read_metadata,
)
from nearhub.wire.target import FileTarget, Repo, RepoKind

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHA1 = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
XET = "f" * 64
RESOLVE = "/org/m/resolve/main/x"
CACHE = f"/api/resolve-cache/models/org/m/{COMMIT}/x"
LINK = '<https://hub.example/api/models/org/m/xet-read-token/0>; rel="xet-auth"'
LFS = BlobId(Algo.SHA256, SHA256)
GIT = BlobId(Algo.SHA1, SHA1)

REDIRECT_TO_CDN = {
    "x-repo-commit": COMMIT,
    "x-linked-size": "5000000000",
    "x-linked-etag": f'"{SHA256}"',
    "etag": f'"{XET}"',
    "x-xet-hash": XET,
    "link": LINK,
    "content-length": "1369",
}


def read(headers: Mapping[str, str], path: str = RESOLVE, *, is_redirect: bool = False) -> FileMetadata:
    return read_metadata(CIMultiDict(headers), path, is_redirect=is_redirect)


class TestReadMetadata:
    def test_a_redirect_to_the_cdn_carries_everything(self) -> None:
        """X-Linked-* win over the ETag (a Xet hash) and the length of the note in the redirect."""
        assert read(REDIRECT_TO_CDN, is_redirect=True) == FileMetadata(COMMIT, LFS, 5_000_000_000)

    def test_x_linked_headers_win_on_direct_answers_too(self) -> None:
        assert read(REDIRECT_TO_CDN) == FileMetadata(COMMIT, LFS, 5_000_000_000)

    def test_a_plain_file_is_named_by_its_etag_and_measured_by_its_length(self) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{SHA1}"', "Content-Length": "713"}
        assert read(headers, CACHE) == FileMetadata(COMMIT, GIT, 713)

    def test_a_resolve_cache_answer_without_commit_has_it_in_the_path(self) -> None:
        headers = {"ETag": f'"{SHA1}"', "Content-Length": "713"}
        for path in (CACHE, f"/pre/fix{CACHE}", f"/api/resolve-cache/datasets/squad/{COMMIT}/a/b"):
            assert read(headers, path).commit == COMMIT

    def test_a_commit_elsewhere_in_a_path_is_not_believed(self) -> None:
        headers = {"ETag": f'"{SHA1}"', "Content-Length": "713"}
        for path in (f"/org/m/resolve/{COMMIT}/x", f"/org/m/resolve/main/{COMMIT}/x", f"/x?{CACHE[1:]}/"):
            with pytest.raises(UpstreamFailed, match="X-Repo-Commit"):
                read(headers, path)

    def test_the_length_of_a_redirects_note_is_never_a_size(self) -> None:
        """The 307 to resolve-cache: 262 bytes of text about a file of any size."""
        with pytest.raises(UpstreamFailed, match="no size"):
            read({"X-Repo-Commit": COMMIT, "ETag": f'"{SHA1}"', "Content-Length": "262"}, is_redirect=True)

    def test_an_encoded_length_is_never_a_size_but_identity_is_no_encoding(self) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{SHA1}"', "Content-Length": "99"}
        with pytest.raises(UpstreamFailed, match="no size"):
            read(headers | {"Content-Encoding": "gzip"})
        assert read(headers | {"Content-Encoding": "Identity"}).size == 99

    @pytest.mark.parametrize("etag", [f'W/"{SHA1}"', f'"{SHA1}"', SHA1, f' "{SHA1}" '])
    def test_weak_and_bare_etags_name_the_same_content(self, etag: str) -> None:
        assert read({"X-Repo-Commit": COMMIT, "ETag": etag, "Content-Length": "1"}).blob == GIT

    @pytest.mark.parametrize("missing", ["x-repo-commit", "x-linked-size"])
    def test_a_missing_piece_is_a_failure_of_upstream(self, missing: str) -> None:
        headers = {name: value for name, value in REDIRECT_TO_CDN.items() if name != missing}
        with pytest.raises(UpstreamFailed):
            read(headers, is_redirect=True)

    @pytest.mark.parametrize(
        "etag",
        ["", '""', '"x"', f'"{SHA1}-gzip"', f'"{SHA1.upper()}"', f'"{SHA1[:-1]}"', f'"{SHA256}0"', '"' + "٠" * 40 + '"', "W/"],
    )
    def test_an_etag_that_names_no_content_cannot_be_verified(self, etag: str) -> None:
        with pytest.raises(UpstreamFailed, match="cannot verify"):
            read({"X-Repo-Commit": COMMIT, "ETag": etag, "Content-Length": "1"})

    @pytest.mark.parametrize("commit", ["", "main", COMMIT[:-1], COMMIT.upper(), COMMIT + "\n", COMMIT + ", " + COMMIT])
    def test_what_is_no_commit_is_not_taken_for_one(self, commit: str) -> None:
        with pytest.raises(UpstreamFailed, match="X-Repo-Commit"):
            read({"X-Repo-Commit": commit, "ETag": f'"{SHA1}"', "Content-Length": "1"})

    @pytest.mark.parametrize("size", ["", "-1", "+1", "1.0", "1e3", "٣", "0x10", "1_0", "9" * 19, "12 13"])
    def test_what_is_no_size_is_not_taken_for_one(self, size: str) -> None:
        with pytest.raises(UpstreamFailed, match="no size"):
            read({"X-Repo-Commit": COMMIT, "X-Linked-ETag": f'"{SHA256}"', "X-Linked-Size": size}, is_redirect=True)

    @given(st.dictionaries(st.sampled_from(["X-Repo-Commit", "ETag", "X-Linked-ETag", "X-Linked-Size"]), st.text()), st.text())
    def test_no_headers_do_worse_than_a_failure_of_upstream(self, headers: dict[str, str], path: str) -> None:
        try:
            read(headers, path)
        except UpstreamFailed:
            return
        raise AssertionError("random text was taken for a Hub's answer")


class TestBlobId:
    def test_sixty_four_hex_are_a_sha256_and_forty_a_git_blob(self) -> None:
        assert BlobId.from_etag(SHA256) == LFS
        assert BlobId.from_etag(SHA1) == GIT
        assert (str(LFS), str(GIT)) == (f"sha256-{SHA256}", f"sha1-{SHA1}")

    @pytest.mark.parametrize("etag", ["", SHA1 + "\n", SHA256 + "\n", SHA1.upper(), "../" + SHA1, SHA1[:39], SHA256[:63]])
    def test_nothing_else_becomes_the_name_of_a_file(self, etag: str) -> None:
        with pytest.raises(ValueError, match="neither"):
            BlobId.from_etag(etag)

    @pytest.mark.parametrize(
        ("value", "opaque"),
        [(None, None), ("", None), ('""', None), ('W/"x"', "x"), ('"x"', "x"), ("x", "x"), (' W/"x" ', "x")],
    )
    def test_normalised_etags_are_opaque(self, value: str | None, opaque: str | None) -> None:
        assert normalise_etag(value) == opaque


def headers_of(revision: str, path: str = "a/model.bin", blob: BlobId = LFS) -> dict[str, str]:
    target = FileTarget(Repo(RepoKind.MODELS, "org/m"), revision, path)
    return file_headers(target, FileMetadata(COMMIT, blob, 7), attachment=False)


class TestFileHeaders:
    def test_the_headers_of_an_lfs_file(self) -> None:
        assert headers_of("main") == {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{SHA256}"',
            "X-Linked-ETag": f'"{SHA256}"',
            "X-Linked-Size": "7",
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "Content-Disposition": "inline; filename*=UTF-8''model.bin; filename=\"model.bin\";",
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
        }

    def test_a_git_file_has_no_linked_etag(self) -> None:
        headers = headers_of("main", blob=GIT)
        assert headers["ETag"] == f'"{SHA1}"'
        assert "X-Linked-ETag" not in headers

    def test_only_a_commit_may_be_cached_for_ever(self) -> None:
        """By what the client asked for, not by what it was resolved to."""
        assert headers_of(COMMIT)["Cache-Control"] == "public, max-age=31536000, immutable"
        for revision in ("main", COMMIT[:12], COMMIT.upper()):
            assert headers_of(revision)["Cache-Control"] == "no-cache"

    def test_xet_is_hidden(self) -> None:
        """Clients that see a Xet hash leave plain HTTP; ours never learn of one, whatever upstream sent."""
        meta = read(REDIRECT_TO_CDN, is_redirect=True)
        sent = file_headers(FileTarget(Repo(RepoKind.MODELS, "org/m"), "main", "x"), meta, attachment=False)
        assert not {name.lower() for name in sent} & {"x-xet-hash", "x-xet-refresh-route", "link", "location"}
        assert not any("xet" in value.lower() or XET in value for value in sent.values())

    def test_browsers_of_any_origin_may_read_what_the_hub_exposes(self) -> None:
        headers = cors_headers()
        assert headers["Access-Control-Allow-Origin"] == "*"
        assert headers["Access-Control-Expose-Headers"] == EXPOSED
        assert {"ETag", "X-Repo-Commit", "Content-Range", "X-Linked-Size"} <= set(EXPOSED.split(","))
        assert "Access-Control-Allow-Credentials" not in headers


class TestContentType:
    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("config.json", "application/json"),
            ("a/b.TXT", "text/plain; charset=utf-8"),
            ("a.png", "image/png"),
            ("model.safetensors", "application/octet-stream"),
            ("noextension", "application/octet-stream"),
            (".gitattributes", "application/octet-stream"),
            ("data.json.gz", "application/octet-stream"),
            ("a.csv.xz", "application/octet-stream"),
            ("x.html.gz", "application/octet-stream"),
        ],
    )
    def test_what_the_name_says(self, path: str, kind: str) -> None:
        assert content_type(path) == kind

    @pytest.mark.parametrize("path", ["x.html", "x.HTM", "x.svg", "x.xml", "x.js", "x.mjs", "x.xsl", "a/b/x.html", "é.html"])
    def test_what_a_browser_would_run_is_plain_text(self, path: str) -> None:
        """A stranger's repo must not script this mirror's origin."""
        assert content_type(path) == "text/plain; charset=utf-8"

    @pytest.mark.parametrize(
        "path",
        [
            "data:x,y",
            "data:text/cmd,x",
            "data:application/x-evil;y,z",
            "d/data:image/gif,",
            "data:multipart/x-mixed-replace;boundary=a,b",
        ],
    )
    def test_a_name_that_looks_like_a_url_brings_no_type(self, path: str) -> None:
        assert content_type(path) == "application/octet-stream"

    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_no_name_makes_a_type_that_is_scriptable_or_no_type(self, path: str) -> None:
        kind = content_type(path)
        assert re.fullmatch(r"[a-z0-9.+-]+/[A-Za-z0-9.+-]+(; charset=utf-8)?", kind)
        assert not re.search("html|xml|svg|script", kind)


class TestContentDisposition:
    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("a/b c.bin", "filename*=UTF-8''b%20c.bin; filename=\"b c.bin\";"),
            ("é.bin", "filename*=UTF-8''%C3%A9.bin; filename=\"_.bin\";"),
            ('x".bin', "filename*=UTF-8''x%22.bin; filename=\"x_.bin\";"),
            ("a\\b", "filename*=UTF-8''a%5Cb; filename=\"a_b\";"),
            ("x\r\nSet-Cookie: a=b", "filename*=UTF-8''x%0D%0ASet-Cookie%3A%20a%3Db; filename=\"x__Set-Cookie: a=b\";"),
            ("x;y='z'", "filename*=UTF-8''x%3By%3D%27z%27; filename=\"x;y='z'\";"),
        ],
    )
    def test_hostile_names_are_encoded(self, path: str, value: str) -> None:
        """RFC 8187 for the true name, a harmless ASCII fallback beside it, and no line break in either."""
        assert content_disposition(path, attachment=False) == f"inline; {value}"
        assert content_disposition(path, attachment=True) == f"attachment; {value}"

    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
    def test_any_name_gives_printable_ascii_that_clients_can_parse(self, name: str) -> None:
        value = content_disposition(name, attachment=False)
        assert all(" " <= c <= "~" for c in value)
        match = re.search(r'filename="(?P<filename>.*?)";', value)  # huggingface_hub's pattern
        assert match and len(match["filename"]) == len(name.rsplit("/", 1)[-1])
