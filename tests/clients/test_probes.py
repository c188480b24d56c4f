"""The acceptance probes of the Hub's protocol, byte by byte, at the root and under a prefix; and hostile requests."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from urllib.parse import quote, unquote

import aiohttp
import pytest
from yarl import URL

from tests.clients.programs import MIB
from tests.hub import LFS, Content, Hub, User, git_blob_sha1
from tests.hub.content import Memory
from tests.mirror import configure, run_client, running

CONFIG = b'{"model_type": "tiny", "hidden_size": 64}\n' * 40
WEIGHTS = Content(20 * MIB, seed=51)
EMPTY_BLOB = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
NAMES = {
    "a b.txt": b"space",
    "a#b.txt": b"hash",
    "a?b.txt": b"question",
    "100%.txt": b"percent",
    "a%20b.txt": b"percent twenty",
    "größe/模型.txt": b"unicode",
    "e\u0301.txt": b"decomposed",
    "\U0001f917.txt": b"beyond the BMP",
    "a+b&c=d;e,f.txt": b"reserved",
    "resolve/main/x.txt": b"the marker again",
    "dir.with.dots/...": b"three dots are a name",
}


@pytest.fixture(params=["", "/some/prefix"], ids=["root", "prefix"])
async def base(hub: Hub, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The URL of a mirror of a Hub with repos of each kind, what clients have as HF_ENDPOINT."""
    model = hub.repo("org/m")
    first = model.commit({"config.json": CONFIG, "model.safetensors": LFS(WEIGHTS), "empty.txt": b"", **NAMES})
    model.tag("v1.0", first)
    model.ref("refs/pr/1", model.commit({"README.md": b"# pull request\n"}, revision="pr-branch"))
    model.commit({"README.md": b"# feature\n"}, revision="feat/x")
    hub.repo("gpt-tiny").commit({"config.json": CONFIG})
    data = hub.repo("org/d", "datasets")
    data.commit({"data/train.jsonl": b'{"a": 1}\n'})
    data.ref("refs/convert/parquet", data.commit({"default/0.parquet": LFS(b"PAR1" * 100)}, revision="parquet-branch"))
    hub.repo("org/s", "spaces").commit({"app.py": b"print(1)\n"})
    hub.repo("org/closed", private=True).commit({"config.json": CONFIG})
    hub.repo("org/gated", gated=True).commit({"config.json": CONFIG, "model.safetensors": LFS(WEIGHTS)})
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], SERVER_PREFIX=str(request.param))
    async with running(config) as mirror:
        yield mirror.url


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as one:
        yield one


def url(base: str, path: str) -> URL:
    """The path exactly as written."""
    return URL(base + path, encoded=True)


async def ask(
    session: aiohttp.ClientSession, where: URL, headers: Mapping[str, str] | None = None, method: str = "GET"
) -> tuple[int, Mapping[str, str], bytes]:
    async with session.request(method, where, headers=headers, allow_redirects=False) as response:
        return response.status, response.headers, await response.read()


async def test_probe_1_a_plain_file(base: str, hub: Hub) -> None:
    """`curl -sI`: 200, a commit, the git oid as a strong ETag, the true length."""
    status, said = await run_client("curl", "-q", "-sI", f"{base}/org/m/resolve/main/config.json")
    assert status == 0 and said.startswith("HTTP/1.1 200")
    headers = dict(re.findall(r"^([A-Za-z0-9-]+): (.*?)\r?$", said, re.MULTILINE))
    commit = hub.repo("org/m").refs["refs/heads/main"]
    assert headers["X-Repo-Commit"] == commit
    assert headers["ETag"] == f'"{git_blob_sha1(Memory(CONFIG))}"'
    assert headers["Content-Length"] == str(len(CONFIG)) and headers["Accept-Ranges"] == "bytes"


async def test_probe_2_an_lfs_file(base: str, session: aiohttp.ClientSession) -> None:
    """The sha256 as ETag, the size; HEAD says what GET says, whatever state the file is in; nothing of Xet."""
    where = url(base, "/org/m/resolve/main/model.safetensors")
    cold, got, warm = [await ask(session, where, method=method) for method in ("HEAD", "GET", "HEAD")]
    assert got[2] == WEIGHTS.bytes()
    for status, headers, _ in (cold, got, warm):
        assert status == 200
        assert headers["ETag"] == headers["X-Linked-ETag"] == f'"{WEIGHTS.sha256}"'
        assert headers["X-Linked-Size"] == headers["Content-Length"] == str(WEIGHTS.size)
    varying = {"date", "x-request-id", "cache-status"}
    heads = [
        {key: value for key, value in headers.items() if key.lower() not in varying} for _, headers, _ in (cold, got, warm)
    ]
    assert heads[0] == heads[1] == heads[2]


async def test_probe_3_ranges(base: str, session: aiohttp.ClientSession) -> None:
    """206 with the exact Content-Range, 416 with the size: cold and warm, LFS and plain."""
    for name, data in (("model.safetensors", WEIGHTS.bytes()), ("config.json", CONFIG)):
        where, size = url(base, f"/org/m/resolve/main/{name}"), len(data)
        for _ in ("cold", "warm"):
            for asked, start, stop in (("0-0", 0, 1), ("5-9", 5, 10), ("-4", size - 4, size), (f"{size - 1}-", size - 1, size)):
                status, headers, body = await ask(session, where, {"Range": f"bytes={asked}"})
                assert (status, headers["Content-Range"]) == (206, f"bytes {start}-{stop - 1}/{size}")
                assert body == data[start:stop] and headers["Content-Length"] == str(stop - start)
            for asked in ("999999999999-", f"{size}-"):
                status, headers, _ = await ask(session, where, {"Range": f"bytes={asked}"})
                assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")
            assert (await ask(session, where))[2] == data


async def test_probe_4_nothing_is_compressed(base: str, session: aiohttp.ClientSession) -> None:
    """Text that would compress well, and a client that would like it."""
    for method in ("HEAD", "GET"):
        for encoding in ("gzip", "gzip, deflate, br, zstd", "*"):
            status, headers, body = await ask(
                session, url(base, "/org/m/resolve/main/config.json"), {"Accept-Encoding": encoding}, method
            )
            assert status == 200 and "Content-Encoding" not in headers
            assert headers["Content-Length"] == str(len(CONFIG)) and body in (b"", CONFIG)


async def test_probe_6_names_and_revisions(base: str, session: aiohttp.ClientSession) -> None:
    """Routing is on the raw path: encoded and plain revisions, and every character that a name may have."""
    for path, body in NAMES.items():
        where = url(base, f"/org/m/resolve/main/{quote(path)}")
        status, headers, got = await ask(session, where)
        assert (status, got) == (200, body), path
        name = quote(path.rpartition("/")[2], safe="")
        assert f"filename*=UTF-8''{name};" in headers["Content-Disposition"]
    for revision, path, body in (
        ("refs%2Fpr%2F1", "README.md", b"# pull request\n"),
        ("refs/pr/1", "README.md", b"# pull request\n"),
        ("feat%2Fx", "README.md", b"# feature\n"),
        ("v1.0", "config.json", CONFIG),
        ("HEAD", "config.json", CONFIG),
    ):
        assert (await ask(session, url(base, f"/org/m/resolve/{revision}/{path}")))[::2] == (200, body), revision
    for revision in ("refs%2Fconvert%2Fparquet", "refs/convert/parquet"):
        where = url(base, f"/datasets/org/d/resolve/{revision}/default/0.parquet")
        assert (await ask(session, where))[::2] == (200, b"PAR1" * 100)


async def test_kinds_ids_and_slashes(base: str, session: aiohttp.ClientSession) -> None:
    """Datasets, spaces, ids of one segment, doubled slashes; queries are no part of a file's name."""
    for path, body in (
        ("/datasets/org/d/resolve/main/data/train.jsonl", b'{"a": 1}\n'),
        ("/spaces/org/s/resolve/main/app.py", b"print(1)\n"),
        ("/gpt-tiny/resolve/main/config.json", CONFIG),
        ("//org/m/resolve/main/config.json", CONFIG),
        ("/org//m///resolve/main//config.json", CONFIG),
        ("//datasets/org/d/resolve/main/data//train.jsonl", b'{"a": 1}\n'),
        ("/org/m/resolve/main/config.json?download=true&x=%2F..%2F", CONFIG),
        ("/org/m/resolve/main/config.json?", CONFIG),
    ):
        assert (await ask(session, url(base, path)))[::2] == (200, body), path


async def test_an_empty_file(base: str, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    """0 bytes: HEAD and GET agree, no range can be satisfied, curl makes a file of it."""
    where = url(base, "/org/m/resolve/main/empty.txt")
    for method in ("HEAD", "GET", "HEAD"):
        status, headers, body = await ask(session, where, method=method)
        assert (status, headers["Content-Length"], headers["ETag"], body) == (200, "0", f'"{EMPTY_BLOB}"', b"")
    status, headers, _ = await ask(session, where, {"Range": "bytes=0-0"})
    assert (status, headers["Content-Range"]) == (416, "bytes */0")
    status, _ = await run_client("curl", "-q", "-fsS", "-o", "empty", str(where), cwd=tmp_path)
    assert status == 0 and (tmp_path / "empty").read_bytes() == b""


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_probe_7_what_is_missing(base: str, session: aiohttp.ClientSession, hub: Hub, method: str) -> None:
    """File, revision, repo: the code that huggingface_hub reads is in a header, since over plain http it trusts no status."""
    commit = hub.repo("org/m").refs["refs/heads/main"]
    status, headers, _ = await ask(session, url(base, "/org/m/resolve/main/no.txt"), method=method)
    assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", commit)
    status, headers, _ = await ask(session, url(base, f"/org/m/resolve/{commit}/no.txt"), method=method)
    assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", commit)
    status, headers, _ = await ask(session, url(base, "/org/m/resolve/no-branch/config.json"), method=method)
    assert (status, headers["X-Error-Code"]) == (404, "RevisionNotFound")
    for repo in ("org/none", "none", "org/closed"):
        status, headers, _ = await ask(session, url(base, f"/{repo}/resolve/main/config.json"), method=method)
        assert status in (401, 404) and headers["X-Error-Code"] == "RepoNotFound"
        assert "\r" not in headers["X-Error-Message"]


async def test_the_closed_opens_to_its_tokens_and_those_go_to_the_hub_alone(
    base: str, session: aiohttp.ClientSession, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Private and gated repos are refused to who has no token, and open to who has one; the Hub hears it of them only."""
    token = "hf_canaryCanaryCanaryCanaryCanaryCan"
    hub.users[token] = User("reader", {"org/gated", "org/closed"})
    caplog.set_level("DEBUG")
    secret = {"Authorization": f"Bearer {token}", "Cookie": f"token={token}", "X-Xet-Token": token}
    for headers in (secret, {}):
        status, _, body = await ask(session, url(base, "/org/m/resolve/main/model.safetensors"), headers)
        assert status == 200 and body == WEIGHTS.bytes()
        # The bytes are here now, by the public repo: the gated one stays closed to who has no token.
        for path in ("/org/gated/resolve/main/model.safetensors", "/org/closed/resolve/main/config.json"):
            status, answer, body = await ask(session, url(base, path), headers)
            assert (status == 200) == bool(headers), path
            if not headers:
                assert (status, answer["X-Error-Code"]) == (401, "GatedRepo" if "gated" in path else "RepoNotFound")
                assert str(WEIGHTS.size) not in str(answer) and WEIGHTS.sha256 not in str(answer) + body.decode()
    assert {one.origin for one in hub.log} == {"hub", "cdn"}
    heard = [one for one in hub.log if "canary" in f"{one.raw_path} {one.headers}".lower()]
    assert heard and [one for one in heard if one.origin != "hub" or "/org/m/" in one.raw_path] == []
    assert [one for one in hub.log if one.header("Cookie") or one.header("X-Xet-Token")] == []
    assert "canary" not in caplog.text.lower()
    kept = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and b"hf_canary" in file.read_bytes()]
    assert kept == []


async def test_xet_is_hidden(base: str, session: aiohttp.ClientSession) -> None:
    """Whatever is asked, no answer names Xet: neither a header nor a link; the browser's offer is taken for plain."""
    accept = {"Accept": "application/vnd.xet-fileinfo+json, */*"}
    for path in ("model.safetensors", "config.json", "no.txt"):
        for method in ("HEAD", "GET"):
            for extra in ({}, accept, {**accept, "Range": "bytes=0-0"}):
                status, headers, _ = await ask(session, url(base, f"/org/m/resolve/main/{path}"), extra, method)
                assert status in (200, 206, 404)
                found = [key for key in headers if key.lower().startswith("x-xet") or key.lower() in ("link", "location")]
                assert found == [] and "xet" not in headers["Content-Type"]


HOSTILE = (
    "/org/m/resolve/main/../../../../etc/passwd",
    "/org/m/resolve/main/%2e%2e/%2e%2e/etc/passwd",
    "/org/m/resolve/main/..%2f..%2fetc%2fpasswd",
    "/org/m/resolve/main/..%252f..%252fetc%252fpasswd",
    "/org/m/resolve/main/..%5c..%5cwindows",
    "/org/m/resolve/main/a%00b",
    "/org/m/resolve/main/%c0%ae%c0%ae/x",
    "/org/m/resolve/main/%ff",
    "/org/m/resolve/main/%",
    "/org/m/resolve/main/%zz",
    "/org/m/resolve/main/a%0d%0aX-Injected:%20yes",
    "/org/m/resolve/main/.",
    "/org/m/resolve/main/",
    "/org/m/resolve/main",
    "/org/m/resolve/",
    "/org/m/resolve/../config.json",
    "/org/m/resolve/%2e%2e/config.json",
    "/../org/m/resolve/main/config.json",
    "/org/../resolve/main/config.json",
    "/org/m.git/resolve/main/config.json",
    "/org/m--x/resolve/main/config.json",
    "/a/b/c/d/resolve/main/config.json",
    "/org/m/resolve/main/" + "x" * 5000,
    "/" + "x" * 200 + "/m/resolve/main/config.json",
    "/-/../org/m/resolve/main/config.json",
    "/-/secret",
    "/robots.txt",
    "/",
)


async def test_hostile_paths(base: str, tmp_path: Path, hub: Hub) -> None:
    """`curl --path-as-is`: each is a clear 4xx with a code for machines or none; no file of this machine, no 5xx, no hang."""
    gate = asyncio.Semaphore(8)

    async def probe(path: str) -> tuple[str, str]:
        form = "%{http_code} %header{x-injected} %{size_download}"
        command = ["curl", "-q", "-sS", "--path-as-is", "--globoff", "--max-time", "30", "-o", "-", "-w", f"\n{form}"]
        async with gate:
            status, said = await run_client(*command, base + path)
        assert status == 0, said
        assert "root:" not in said
        return path, said.rpartition("\n")[2]

    answers = dict(await asyncio.gather(*map(probe, HOSTILE)))
    assert {path: said for path, said in answers.items() if not re.match(r"(400|404|414) ", said)} == {}
    assert not any("yes" in said for said in answers.values())
    # Decoded once, as a server does, no path that went upstream has a dot segment (a second decoding is nobody's).
    assert [one for one in hub.log if {".", ".."} & set(unquote(one.raw_path).split("/"))] == []


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "PROPFIND"])
async def test_writes_are_refused(base: str, session: aiohttp.ClientSession, hub: Hub, method: str) -> None:
    """405 with what is allowed; the Hub is never asked."""
    status, headers, _ = await ask(session, url(base, "/org/m/resolve/main/config.json"), method=method)
    assert status == 405 and headers["Allow"] == "GET, HEAD, OPTIONS"
    assert len(hub.log) == 0


async def test_conditional_requests(base: str, session: aiohttp.ClientSession) -> None:
    """If-None-Match: 304 without a body. If-Range: another or a weak validator gives the whole file, never a part."""
    where = url(base, "/org/m/resolve/main/model.safetensors")
    etag = f'"{WEIGHTS.sha256}"'
    for validator in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        status, headers, body = await ask(session, where, {"If-None-Match": validator})
        assert (status, body, headers["ETag"]) == (304, b"", etag)
    for validator, expected in ((etag, 206), ('"other"', 200), (f"W/{etag}", 200), ("Wed, 21 Oct 2015 07:28:00 GMT", 200)):
        status, _, body = await ask(session, where, {"Range": "bytes=5-9", "If-Range": validator})
        assert (status, len(body)) == (expected, 5 if expected == 206 else WEIGHTS.size)
