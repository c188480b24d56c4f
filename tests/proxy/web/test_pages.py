"""The page of a repo over real sockets: what it lists, who may see it, and that nothing in a repo gets out of it."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDictProxy
from yarl import URL

from nearhub import resolve
from nearhub.web import pages
from nearhub.web.hypertext import View, commands
from nearhub.wire.headers import BlobId
from nearhub.wire.manifest import Entry
from nearhub.wire.target import PageTarget, Repo, RepoKind
from tests.hub import LFS, Hub
from tests.mirror import Mirror, configure, running

PREFIX = "/huggingface-proxy"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
COMMIT_PAGE = re.compile(r"/tree/[0-9a-f]{40}[^?]*\Z")
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
FILES: dict[str, Any] = {
    "README.md": b"# model\n",
    "a.txt": b"a",
    "a/b": b"b",
    "onnx/model.onnx": LFS(b"onnx" * 1000),
    "onnx/deep/er/config.json": b"{}",
    "pytorch_model.bin": LFS(b"weights" * 1000),
    "z dir/größe #1?.txt": b"100%",
    "tree/main/x": b"a directory called tree",
}
HOSTILE: dict[str, Any] = {
    "<script>alert(1)<": b"1",
    "\"onload='x'>&amp;": b"2",
    "photo\u202egpj.exe": b"3",
    "ملف/ملف.txt": b"4",
    "n" * 300: b"5",
    "javascript:alert(1)": b"6",
    "a'b [1]*?/$(id) `id`; \"x": LFS(b"7" * 50),
    "--help": b"8",
}


class Reading(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.rows: list[str] = []
        self.commands: list[str] = []
        self.blocks: dict[str, str] = {"style": "", "script": ""}
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "link"):
            self._open.append(tag)
        if tag == "a":
            self.links.append((dict(attrs)["href"] or "", ""))
        elif tag == "th" and ("scope", "row") in attrs:
            self.rows.append("")
        elif tag == "pre":
            self.commands.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in self.blocks:
            self.blocks[self._open[-1]] += data
        if "a" in self._open:
            href, text = self.links.pop()
            self.links.append((href, text + data))
        if "tbody" in self._open and "th" in self._open:
            self.rows[-1] += data
        if "pre" in self._open:
            self.commands[-1] += data


@dataclass
class Answer:
    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def page(self) -> Reading:
        return Reading(self.body.decode())


@dataclass
class Visitor:
    """A browser. Every page, whatever it says, is closed to whatever is in it."""

    session: aiohttp.ClientSession
    mirror: Mirror
    headers: dict[str, str] = field(default_factory=lambda: dict(BROWSER))

    @property
    def origin(self) -> str:
        return self.mirror.url.removesuffix(PREFIX)

    async def __call__(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """`path`: raw, of the origin."""
        async with self.session.request(
            method, URL(self.origin + path, encoded=True), headers={**self.headers, **headers}, allow_redirects=False
        ) as response:
            answer = Answer(response.status, response.headers, await response.read())
        if "html" in answer.headers.get("Content-Type", "") and method == "GET" and answer.body:
            _check(answer)
        return answer


def _check(answer: Answer) -> None:
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    page = answer.page
    for tag, text in page.blocks.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert page.tags.count(tag) == 1 and f"{tag}-src 'sha256-{digest}'" in policy
    assert not [name for name in page.attributes if name.startswith("on") or name in ("style", "src", "srcset")]
    assert not {"img", "iframe", "form", "object", "base", "input"} & set(page.tags)
    assert page.tags[:2] == ["html", "head"] and page.tags.count("h1") == 1
    assert all(href.startswith(("/", "#")) and not href.startswith("//") for href, _ in page.links)


@pytest.fixture
async def mirror(hub: Hub, tmp_path: Path) -> AsyncIterator[Mirror]:
    """A mirror under a prefix, of a Hub with a repo of each kind."""
    model = hub.repo("org/m")
    model.card = {"license": "apache-2.0"}
    model.tag("v1", model.commit(FILES))
    hub.repo("org/d", "datasets").commit(FILES)
    hub.repo("org/s", "spaces").commit(FILES)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], SERVER_PREFIX=PREFIX)
    async with running(config) as server:
        yield server


@pytest.fixture
async def visit(mirror: Mirror) -> AsyncIterator[Visitor]:
    async with aiohttp.ClientSession() as session:
        yield Visitor(session, mirror)


def content(given: Any) -> bytes:
    return given.given if isinstance(given, LFS) else given


async def walk(visit: Visitor, start: str) -> dict[str, bytes]:
    """Every file that links lead to, by its path; from page to page."""
    waiting, seen, found = [start], {start}, {}
    while waiting:
        answer = await visit(waiting.pop())
        assert answer.status == 200
        if "html" not in answer.headers["Content-Type"]:
            continue
        for href, text in answer.page.links:
            if href in seen or href.startswith("#") or COMMIT_PAGE.search(href):
                continue
            seen.add(href)
            if "/resolve/" in href:
                found[re.sub(r".*/resolve/[^/]*/", "", URL(href, encoded=True).path)] = (await visit(href)).body
            else:
                assert text, href
                waiting.append(href)
    return found


@pytest.mark.parametrize("prefix", ["", PREFIX])
async def test_links_lead_to_every_file_of_the_repo(visit: Visitor, prefix: str) -> None:
    """And stay under the prefix the client came by."""
    for repo in ("org/m", "datasets/org/d", "spaces/org/s"):
        found = await walk(visit, f"{prefix}/{repo}")
        assert found == {path: content(given) for path, given in FILES.items()}
        hrefs = [href for href, _ in (await visit(f"{prefix}/{repo}")).page.links if href != "#download"]
        assert all(href.startswith(f"{prefix}/{repo}") for href in hrefs)


async def test_a_page_says_what_the_repo_is_with_directories_before_files(visit: Visitor, hub: Hub) -> None:
    answer = await visit(f"{PREFIX}/org/m")
    page, text = answer.page, answer.body.decode()
    assert page.rows == ["a/", "onnx/", "tree/", "z dir/", "README.md", "a.txt", "pytorch_model.bin"]
    commit = hub.repo("org/m").refs["refs/heads/main"]
    size = sum(len(content(given)) for given in FILES.values())
    for said in ("<h1", "Model", "<bdi>main</bdi>", commit, "apache-2.0", f"{size / 1000:.1f} KB in 8 files", ">public<"):
        assert said in text
    assert '<html lang="en">' in text and 'name="viewport"' in text
    assert answer.headers["X-Repo-Commit"] == commit
    deep = await visit(f"{PREFIX}/org/m/tree/v1/onnx/deep/er")
    assert [text for _, text in deep.page.links][2:] == ["Commands to download", "m", "onnx", "deep", "config.json"]
    assert deep.page.rows == ["config.json"]
    assert (f"{PREFIX}/org/m/resolve/v1/onnx/deep/er/config.json", "config.json") in deep.page.links


async def test_a_page_costs_what_a_listing_costs_and_then_nothing(visit: Visitor, hub: Hub) -> None:
    await visit("/org/m")
    assert len(hub.log) == 2
    await visit("/org/m/tree/main/onnx")
    await visit("/org/m")
    assert len(hub.log) == 2


@pytest.mark.parametrize("path", ["/org/m", "/datasets/org/d/tree/main/onnx"])
async def test_a_page_is_revalidated_by_its_etag(visit: Visitor, path: str) -> None:
    """HEAD says what GET says; nobody can write."""
    varying = {"x-request-id", "date", "cache-status"}
    await visit(path)
    got, head = await visit(path), await visit(path, "HEAD")
    assert got.headers["Cache-Control"] == "no-cache" and int(got.headers["Content-Length"]) == len(got.body)
    assert head.body == b"" and head.status == 200
    told = [{k: v for k, v in one.headers.items() if k.lower() not in varying} for one in (got, head)]
    assert told[0] == told[1]
    again = await visit(path, **{"If-None-Match": got.headers["ETag"]})
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", got.headers["ETag"])
    assert (await visit(path, **{"If-None-Match": '"other"'})).status == 200
    refused = await visit(path, "POST")
    assert (refused.status, refused.headers["X-Error-Code"]) == (405, "ReadOnly")


async def test_nothing_in_a_repo_gets_out_of_its_page(visit: Visitor, hub: Hub) -> None:
    """Names that are markup, scripts, URLs, that turn text around, or that are very long; and what the card says."""
    repo = hub.repo("org/evil")
    repo.card = {"license": "</dd><script>alert(1)</script>\u202e"}
    repo.commit(HOSTILE)
    answer = await visit(f"{PREFIX}/org/evil")
    names = {path.partition("/")[0] + "/" * ("/" in path) for path in HOSTILE}
    assert {row.replace("U+202E", "\u202e") for row in answer.page.rows} == names
    assert "\u202e" not in answer.body.decode()
    assert await walk(visit, f"{PREFIX}/org/evil") == {path: content(given) for path, given in HOSTILE.items()}


async def test_a_long_directory_has_pages_of_one_commit(visit: Visitor, hub: Hub) -> None:
    """1,000 entries each; what is committed meanwhile is on none of them."""
    repo = hub.repo("org/long")
    files: dict[str, Any] = {f"data/{number:04}": b"%d" % number for number in range(1003)} | {"data/sub/x": b"x"}
    commit = repo.commit(files)
    first = (await visit(f"{PREFIX}/org/long/tree/main/data")).page
    assert pages.PAGE == 1000 and len(first.rows) == 1000
    repo.commit({"data/1002a": b"new"})
    [onward] = [href for href, text in first.links if text == "Next page"]
    assert onward.startswith(f"{PREFIX}/org/long/tree/{commit}/data?after=")
    second = (await visit(onward)).page
    assert second.rows == ["sub/", "1000", "1001", "1002"]
    assert [text for _, text in second.links].count("First page") == 1
    assert "Next page" not in [text for _, text in second.links]


async def test_a_tree_too_large_to_be_known_is_shown_by_upstream_s_pages(
    visit: Visitor, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "MAX_TREE_PAGES", 1)
    repo = hub.repo("org/huge")
    repo.commit({f"{number:04}": b"%d" % number for number in range(1003)} | {"sub/x": b"x"})
    first = await visit(f"{PREFIX}/org/huge")
    assert len(first.page.rows) == 1000 and "<dt>Size</dt>" not in first.body.decode()
    [onward] = [href for href, text in first.page.links if text == "Next page"]
    assert set(first.page.rows) | set((await visit(onward)).page.rows) == {f"{n:04}" for n in range(1003)} | {"sub/"}
    assert (await visit(f"{PREFIX}/org/huge/tree/main/sub")).page.rows == ["x"]


async def test_a_page_of_a_file_leads_to_the_file(visit: Visitor) -> None:
    """On the same origin, by a path alone, under the prefix the client came by."""
    for prefix in ("", PREFIX):
        for path in ("README.md", "onnx/model.onnx", "z%20dir/gr%C3%B6%C3%9Fe%20%231%3F.txt"):
            answer = await visit(f"{prefix}/org/m/tree/v1/{path}")
            assert (answer.status, answer.headers["Location"]) == (302, f"{prefix}/org/m/resolve/v1/{path}")
            assert (await visit(answer.headers["Location"])).status == 200


async def test_a_gated_repo_is_listed_and_offers_nothing(visit: Visitor, hub: Hub) -> None:
    """Also when it was open at the time its manifest was learnt."""
    repo = hub.repo("org/gated")
    commit = repo.commit({"config.json": b"{}", "sub/model.bin": LFS(b"weights")})
    assert (await visit("/org/gated")).page.commands != []
    repo.gated = "auto"
    await visit.mirror.front.pages.resolver.refresh(Repo(RepoKind.MODELS, "org/gated"), "main", "127.0.0.1")
    answer = await visit("/org/gated")
    assert answer.page.rows == ["sub/", "config.json"] and "gated" in answer.body.decode()
    assert answer.page.commands == [] and "/resolve/" not in answer.body.decode()
    refused = await visit(f"/org/gated/resolve/{commit}/config.json")
    assert refused.status == 401


async def test_who_opens_what_is_not_there_is_told_so(visit: Visitor, hub: Hub) -> None:
    """A browser by a page, a program by a line of text; with the code that all clients know."""
    hub.repo("org/closed", private=True).commit({"x": b"x"})
    for path, code in (
        ("/org/none", "RepoNotFound"),
        ("/org/closed", "RepoNotFound"),
        ("/org/m/tree/nope", "RevisionNotFound"),
        ("/org/m/tree/main/nope", "EntryNotFound"),
        ("/org/m/tree/main/<b>", "EntryNotFound"),
    ):
        answer = await visit(path)
        assert answer.status in (401, 404) and answer.headers["X-Error-Code"] == code
        assert answer.headers["X-Request-Id"] in answer.body.decode() and "<b>" not in answer.body.decode()
        plain = await visit(path, Accept="*/*")
        assert (plain.status, plain.headers["Content-Type"].partition(";")[0]) == (answer.status, "text/plain")
        assert "WWW-Authenticate" not in answer.headers


async def test_with_the_hub_away_what_is_known_is_shown(hub: Hub, tmp_path: Path) -> None:
    """And says that it may be old; what is not known says why."""
    hub.repo("org/m").commit(FILES)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="0s")
    async with running(config) as mirror, aiohttp.ClientSession() as session:
        visit = Visitor(session, mirror)
        before = await visit("/org/m")
        await hub.stop()
        answer = await visit("/org/m")
        assert answer.status == 200 and answer.page.rows == before.page.rows
        assert "does not answer" in answer.body.decode() and "does not answer" not in before.body.decode()
        assert "detail=stale" in answer.headers["Cache-Status"]
        unknown = await visit("/org/other")
        assert (unknown.status, unknown.headers["X-Error-Code"]) == (404, "UnknownOffline")


async def test_a_page_that_no_directory_has_is_refused(visit: Visitor) -> None:
    """And no query is an error of the mirror's."""
    for after in ("../x", "elsewhere/x", "%00", "%ff", "onnx/../x", "%ED%A0%80"):
        answer = await visit(f"/org/m/tree/main/onnx?after={after}")
        assert (answer.status, answer.headers["X-Error-Code"]) == (400, "BadTarget"), after
    for query in ("x=%ff", "after=", "cursor=%ff", "cursor=nearhub.x", "cursor=%ED%A0%80", "after=\udcff", "cursor=\udcff"):
        assert (await visit(f"/org/m?{query}")).status in (200, 400), query


async def test_the_configured_url_is_the_one_to_copy(hub: Hub, tmp_path: Path) -> None:
    hub.repo("org/m").commit(FILES)
    config = configure(tmp_path / "cache", [hub.url], SERVER_PREFIX=PREFIX, SERVER_PUBLIC_URL="https://mirror.example/hf")
    async with running(config) as mirror, aiohttp.ClientSession() as session:
        page = (await Visitor(session, mirror)(f"{PREFIX}/org/m")).page
    assert page.commands == [
        "HF_ENDPOINT=https://mirror.example/hf hf download org/m",
        "git clone https://mirror.example/hf/org/m",
        "aria2c -x16 -s16 https://mirror.example/hf/org/m/pytorch_model.bin",
    ]


@pytest.mark.parametrize(
    ("kind", "revision", "path", "expected"),
    [
        ("datasets", "main", "", ["hf download o/r --repo-type dataset", "git clone U/datasets/o/r", "U/datasets/o/r/d/big"]),
        ("spaces", "main", "", ["hf download o/r --repo-type space", "git clone U/spaces/o/r", "U/spaces/o/r/d/big"]),
        ("models", "v1", "", ["hf download o/r --revision v1", "git clone -b v1 U/o/r", "U/o/r/resolve/v1/d/big"]),
        ("models", "refs/pr/1", "", ["hf download o/r --revision refs/pr/1", "U/o/r/resolve/refs%2Fpr%2F1/d/big"]),
        ("models", COMMIT, "", [f"hf download o/r --revision {COMMIT}", f"U/o/r/resolve/{COMMIT}/d/big"]),
        ("models", "main", "d", ["hf download o/r --include d/*", "git clone U/o/r", "U/o/r/d/big"]),
        ("models", "main", "a[b*\u202e", ["hf download o/r --include a[[]b[*]?/*", "git clone U/o/r"]),
        ("models", "x\u202ey", "", [f"hf download o/r --revision {COMMIT}", "U/o/r/resolve/x%E2%80%AEy/d/big"]),
    ],
)
def test_commands_name_kind_revision_and_directory(kind: str, revision: str, path: str, expected: list[str]) -> None:
    """As words of a POSIX shell."""
    blob = BlobId.from_etag(COMMIT)
    files = [Entry("small", 1, blob=blob), Entry("d/big", 9, blob=blob)]
    target = PageTarget(Repo(RepoKind(kind), "o/r"), revision, path)
    told = [command for _, command in commands(View("U", target, COMMIT, {}, [], files))]
    for command, words in zip(told, expected, strict=True):
        assert command.isprintable()
        said = " ".join(shlex.split(command))
        assert said in (words, f"HF_ENDPOINT=U {words}", f"aria2c -x16 -s16 {words}")
