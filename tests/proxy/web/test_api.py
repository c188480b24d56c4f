"""`/api/…` and `…/raw/…` over real sockets: compared with what the stand-in Hub itself says, and counted there."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDictProxy
from yarl import URL

from nearhub import resolve
from tests.hub import LFS, Fault, Hub, Repo, User
from tests.mirror import Mirror, configure, running

MODEL = b"weights" * 1000
FILES: dict[str, Any] = {
    "README.md": b"# model\n",
    "config.json": b"{}",
    "a.txt": b"a",
    "a/b": b"b",
    "a0": b"0",
    "data/a b.txt": b"ab",
    "data/\u00e9#x?.bin": LFS(b"e" * 300),
    "model.bin": LFS(MODEL),
}


@dataclass
class Answer:
    """What came back. `json` only where the body is JSON."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.headers["X-Error-Code"]

    @property
    def next(self) -> str | None:
        """The URL of the next page."""
        match = re.fullmatch(r'<([^>]*)>; rel="next"', self.headers.get("Link", ""))
        return match[1] if match else None

    @property
    def cache(self) -> str:
        return self.headers["Cache-Status"]


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON document, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *texts(inner))


@dataclass
class Asker:
    """A client. Every answer of the mirror, whatever it is, keeps the promises that all answers keep."""

    session: aiohttp.ClientSession
    hub: Hub
    mirror: Mirror
    base: str = ""
    told: dict[str, str] = field(default_factory=dict)

    async def __call__(self, path: str, method: str = "GET", **more: Any) -> Answer:
        """`path` raw, or a whole URL, below the mirror."""
        url = path if path.startswith("http") else (self.base or self.mirror.url) + path
        answer = await self.plain(url, method, **more)
        self._check(answer, method)
        return answer

    async def of_hub(self, path: str, method: str = "GET", **more: Any) -> Any:
        """What the Hub says itself, without Xet. Not counted."""
        answer = await self.plain(self.hub.url + path, method, **more)
        assert answer.status == 200, answer
        return _without_xet(answer.json)

    async def plain(self, url: str, method: str, **more: Any) -> Answer:
        headers = {**self.told, **more.pop("headers", {})}
        async with self.session.request(
            method, URL(url, encoded=True), headers=headers, allow_redirects=False, **more
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    def _check(self, answer: Answer, method: str) -> None:
        headers = answer.headers
        assert headers["X-Request-Id"] and headers["Access-Control-Allow-Origin"] == "*"
        assert "X-Error-Code" in headers["Access-Control-Expose-Headers"]
        assert answer.status not in (301, 302, 303, 307, 308), "a mirror never redirects"
        if method != "OPTIONS":
            assert headers["Cache-Status"].startswith("nearhub; ")
        if answer.status >= 400 and "fwd=bypass" not in headers["Cache-Status"]:
            assert re.fullmatch(r"[A-Za-z]+", headers["X-Error-Code"])
            assert headers["X-Error-Message"].isascii()
            assert method == "HEAD" or answer.json["error"]
        written = [value for name, value in headers.items() if name != "X-Error-Message"]  # a sentence may name upstream
        if "json" in headers.get("Content-Type", "") and answer.body and answer.status < 400:
            written += texts(answer.json)
        for text in written:
            for elsewhere in (self.hub.url, self.hub.cdn_url, "huggingface.co", "xethub", "hf.co"):
                assert elsewhere not in text, f"{text!r} leads off the mirror"
            assert "xetHash" not in text or text == headers["Access-Control-Expose-Headers"]
        assert not [name for name in headers if name.lower().startswith("x-xet")]


def _without_xet(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_xet(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _without_xet(inner) for key, inner in value.items() if key != "xetHash"}
    return value


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def ask(session: aiohttp.ClientSession, hub: Hub, mirror: Mirror) -> Asker:
    return Asker(session, hub, mirror)


@pytest.fixture
def repo(hub: Hub) -> Repo:
    """Two commits; the second is main."""
    repo = hub.repo("Org/Model")
    repo.card = {"license": "mit", "url": f"{hub.url}/Org/Model"}
    repo.commit({"old.txt": b"old"}, title="First")
    repo.commit(FILES, replace=True, title="Second")
    repo.ref("refs/pr/1", repo.refs["refs/heads/main"])
    repo.tag("v1.0", repo.refs["refs/heads/main"])
    return repo


def head(repo: Repo) -> str:
    return repo.refs["refs/heads/main"]


def age(mirror: Mirror, seconds: float) -> None:
    """Let so much time have passed for everything that the mirror knows."""
    api = mirror.front.api

    def clock() -> float:
        return time.time() + seconds

    for owner in (api.access, api.catalog, api.resolver, api.documents, api.resolver._asking, api.documents._asking):
        owner._clock = clock  # type: ignore[attr-defined]


def calls(hub: Hub, match: str | None = None) -> int:
    """Questions that reached the Hub since the counters were reset; not those for content."""
    return hub.counters.requests("hub", match=match) - hub.counters.requests("hub", method="GET", match="/resolve")


# — what a repo says of itself ——————————————————————————————————————————————————————————————————————


class TestInfo:
    @pytest.mark.parametrize(
        "path",
        [
            "/api/models/Org/Model",
            "/api/models/Org/Model?blobs=true",
            "/api/models/Org/Model/revision/main?blobs=true&securityStatus=true",
            "/api/models/Org/Model/revision/v1.0?blobs=true",
            "/api/models/Org/Model/revision/refs%2Fpr%2F1?blobs=true",
            "/api/models/Org/Model/revision/COMMIT?blobs=true",
            "/api/models/Org/Model/revision/main?expand=sha&expand=siblings&expand=xetEnabled",
            "/api/models/Org/Model?nobody=knows&this=query",
        ],
    )
    async def test_it_is_what_the_hub_says(self, ask: Asker, repo: Repo, path: str) -> None:
        """Every field of it, with the commit in a header; and an unknown query is no error."""
        path = path.replace("COMMIT", head(repo))
        told = await ask.of_hub(path)
        told["cardData"]["url"] = f"{ask.mirror.url}/Org/Model"
        answer = await ask(path)
        assert (answer.status, answer.headers["X-Repo-Commit"]) == (200, head(repo))
        assert answer.json == told

    async def test_unencoded_refs_trailing_and_double_slashes_head(self, ask: Asker, repo: Repo) -> None:
        """All the spellings that clients have are one question; HEAD is the revision main."""
        expected = (await ask("/api/models/Org/Model/revision/main")).json
        for path in (
            "/api/models/Org/Model/",
            "//api//models/Org//Model",
            "/api/models/Org/Model/revision/refs/pr/1",
            "/api/models/Org/Model/revision/HEAD",
            "//api/models/Org/Model/revision/main/",
        ):
            answer = await ask(path)
            assert (answer.status, answer.json) == (200, expected), path

    async def test_head_has_the_headers_of_get(self, ask: Asker, repo: Repo) -> None:
        got = await ask("/api/models/Org/Model/revision/main")
        headed = await ask("/api/models/Org/Model/revision/main", "HEAD")
        assert (headed.status, headed.body) == (200, b"")
        for name in ("Content-Length", "ETag", "X-Repo-Commit", "Content-Type"):
            assert headed.headers[name] == got.headers[name]

    async def test_an_expansion_that_no_manifest_has_is_the_hubs(self, ask: Asker, repo: Repo) -> None:
        """Passed on, at the commit, kept; and without upstream a full document is better than none."""
        path = "/api/models/Org/Model?expand=gguf&expand%5B%5D=safetensors"
        assert (await ask(path)).status == 200
        [asked] = ask.hub.log.find("hub", match="gguf")
        assert f"/revision/{head(repo)}?expand=gguf&expand%5B%5D=safetensors" in asked.raw_path
        await ask(path)
        assert len(ask.hub.log.find("hub", match="gguf")) == 1
        await ask.hub.stop()
        answer = await ask("/api/models/Org/Model?expand=other")
        assert (answer.status, answer.json["sha"]) == (200, head(repo))

    async def test_an_unchanged_answer_is_304(self, ask: Asker, repo: Repo) -> None:
        """By its own ETag, weak or strong; a changed one is sent."""
        first = await ask("/api/models/Org/Model")
        etag = first.headers["ETag"]
        for sent in (etag, etag.removeprefix("W/"), f'"x", {etag}'):
            again = await ask("/api/models/Org/Model", headers={"If-None-Match": sent})
            assert (again.status, again.body, again.headers["ETag"]) == (304, b"", etag)
        repo.commit({"new": b"new"})
        age(ask.mirror, 3600)
        assert (await ask("/api/models/Org/Model", headers={"If-None-Match": etag})).status == 200

    async def test_all_kinds_and_one_segment_names(self, ask: Asker) -> None:
        for kind, name in (("datasets", "org/d"), ("spaces", "org/s"), ("models", "gpt2"), ("datasets", "squad")):
            ask.hub.repo(name, kind).commit({f"{kind}.txt": b"x"})  # type: ignore[arg-type]
            answer = await ask(f"/api/{kind}/{name}")
            assert (answer.status, answer.json["id"]) == (200, name)
            assert [file["rfilename"] for file in answer.json["siblings"]] == [f"{kind}.txt"]
            assert [file["path"] for file in (await ask(f"/api/{kind}/{name}/tree/main")).json] == [f"{kind}.txt"]

    async def test_a_repo_of_1500_files_is_told_whole(self, ask: Asker) -> None:
        """The Hub cuts its list at 1,000 without a word; old clients take it for all there is."""
        repo = ask.hub.repo("org/many")
        repo.commit({f"d{i % 3}/f{i:04}": b"%d" % i for i in range(1500)})
        answer = await ask("/api/models/org/many?blobs=true")
        assert [file["rfilename"] for file in answer.json["siblings"]] == sorted(repo.commits[head(repo)].files)
        assert calls(ask.hub) == 3
        assert (await ask("/org/many/resolve/main/d0/f1499", "HEAD")).code == "EntryNotFound"
        assert (await ask("/org/many/resolve/main/d2/f1499", "HEAD")).status == 200
        assert calls(ask.hub) == 3


# — trees ———————————————————————————————————————————————————————————————————————————————————————————


async def pages(ask: Asker, path: str) -> list[list[dict[str, Any]]]:
    """All pages, by Link as it is sent."""
    found, url = [], path
    while url:
        answer = await ask(url)
        assert answer.status == 200
        found.append(answer.json)
        assert len(found) < 100
        url = answer.next or ""
    return found


class TestTree:
    @pytest.mark.parametrize(
        "recursive", ["", "?recursive=false&expand=false", "?recursive=true", "?recursive=True&expand=False"]
    )
    @pytest.mark.parametrize("below", ["", "/", "/a", "/data", "/a%2Fb", "/data%2F%C3%A9%23x%3F.bin", "/data/a%20b.txt"])
    async def test_it_is_what_the_hub_says(self, ask: Asker, repo: Repo, below: str, recursive: str) -> None:
        """Entries, oids of directories too, sizes, LFS, order; of a directory, or of a file by its own name."""
        for revision in ("main", head(repo), "refs%2Fpr%2F1"):
            path = f"/api/models/Org/Model/tree/{revision}{below}{recursive}"
            answer = await ask(path)
            assert (answer.status, answer.headers["X-Repo-Commit"]) == (200, head(repo))
            assert answer.json == await ask.of_hub(path.replace(f"{below}?", f"{below.rstrip('/')}?"))
            assert answer.next is None

    @pytest.mark.parametrize("limit", [1, 2, 3, 7])
    @pytest.mark.parametrize("query", ["recursive=true", "recursive=false"])
    async def test_pages_are_one_listing(self, ask: Asker, repo: Repo, query: str, limit: int) -> None:
        """None longer than asked for; Link leads from one to the next on the mirror."""
        path = f"/api/models/Org/Model/tree/main?{query}"
        whole = await ask.of_hub(path)
        found = await pages(ask, f"{path}&limit={limit}")
        assert [entry for page in found for entry in page] == whole
        assert all(len(page) == limit for page in found[:-1])
        assert calls(ask.hub) == 1 + 2

    async def test_a_page_is_a_thousand(self, ask: Asker) -> None:
        """HfFileSystem splits by that; a greater limit is not kept to."""
        repo = ask.hub.repo("org/many")
        repo.commit({f"f{i:04}": b"x" for i in range(1001)})
        for query in ("recursive=true", "limit=100000", "limit=0x", ""):
            found = await pages(ask, f"/api/models/org/many/tree/main?{query}")
            assert [len(page) for page in found] == [1000, 1]

    async def test_the_pages_of_one_listing_are_of_one_commit(self, ask: Asker, repo: Repo) -> None:
        """main moves between two pages: the second page is still of the first one's commit."""
        path = "/api/models/Org/Model/tree/main?recursive=true"
        whole = await ask.of_hub(path)
        first = await ask(f"{path}&limit=5")
        repo.commit({"model.bin": b"other", "zzz": b"new"}, replace=True)
        age(ask.mirror, 3600)
        assert (await ask("/api/models/Org/Model")).headers["X-Repo-Commit"] == head(repo)
        assert first.next is not None
        assert [*first.json, *[entry for page in await pages(ask, first.next) for entry in page]] == whole

    async def test_expanded_is_the_hubs_own_with_its_pages(self, ask: Asker) -> None:
        """With each entry's last commit, 50 a page; kept, and without upstream given again."""
        repo = ask.hub.repo("org/many")
        repo.commit({f"f{i:03}": b"x" for i in range(120)})
        path = "/api/models/org/many/tree/main?recursive=true&expand=true"
        found = await pages(ask, path)
        assert [len(page) for page in found] == [50, 50, 20]
        assert found[0] == await ask.of_hub(path)
        assert all("lastCommit" in entry for page in found for entry in page)
        await ask.hub.stop()
        assert await pages(ask, path) == found

    async def test_expanded_without_upstream_is_plain_to_the_last_page(self, ask: Asker, repo: Repo) -> None:
        """No page twice, none left out, whatever upstream does between pages."""
        path = "/api/models/Org/Model/tree/main?recursive=true&expand=true"
        whole = await ask.of_hub("/api/models/Org/Model/tree/main?recursive=true")
        await ask("/api/models/Org/Model/tree/main")
        rule = ask.hub.faults.add(Fault.status(501), on="hub", match="expand=true")
        first = await ask(f"{path}&limit=5")
        assert first.json == whole[:5] and rule.hits
        rule.remove()
        assert first.next is not None
        assert [*first.json, *[entry for page in await pages(ask, first.next) for entry in page]] == whole

    async def test_a_cursor_of_upstreams_is_not_taken_for_ours(self, ask: Asker) -> None:
        """Expanded pages break off when upstream does: an error, and not the rest of another listing."""
        repo = ask.hub.repo("org/many")
        repo.commit({f"f{i:03}": b"x" for i in range(120)})
        first = await ask("/api/models/org/many/tree/main?recursive=true&expand=true")
        await ask("/api/models/org/many/tree/main")
        assert first.next is not None
        ask.hub.faults.add(Fault.status(501), on="hub", match="cursor=")
        assert (await ask(first.next)).status == 502

    @pytest.mark.parametrize("cursor", ["nearhub.%FF", "nearhub.a", "nearhub.____"])
    async def test_a_cursor_that_is_none_is_the_clients_fault(self, ask: Asker, repo: Repo, cursor: str) -> None:
        answer = await ask(f"/api/models/Org/Model/tree/main?cursor={cursor}")
        assert (answer.status, answer.code) == (400, "BadTarget")

    async def test_a_tree_too_large_to_bring_is_passed_on_page_by_page(
        self, ask: Asker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its paths, too, are asked for by themselves; each page and path once."""
        monkeypatch.setattr(resolve, "MAX_TREE_PAGES", 1)
        repo = ask.hub.repo("org/huge")
        repo.commit({f"f{i:04}": b"%d" % i for i in range(2500)})
        path = "/api/models/org/huge/tree/main?recursive=true"
        found = await pages(ask, path)
        assert [entry["path"] for page in found for entry in page] == sorted(repo.commits[head(repo)].files)
        for name, status in (("f2400", 200), ("f9999", 404)):
            answer = await ask(f"/org/huge/resolve/main/{name}", "HEAD")
            assert (answer.status, answer.headers["X-Repo-Commit"]) == (status, head(repo))
        listed = await ask("/api/models/org/huge/paths-info/main", "POST", json={"paths": ["f2401", "f9998"]})
        assert [entry["path"] for entry in listed.json] == ["f2401"]
        before = calls(ask.hub)
        assert await pages(ask, path) == found
        assert (await ask("/org/huge/resolve/main/f2400", "HEAD")).status == 200
        assert (await ask("/org/huge/resolve/main/f2401", "HEAD")).status == 200
        assert calls(ask.hub) == before

    @pytest.mark.parametrize("query", ["", "?recursive=true", "?expand=true"])
    async def test_what_is_not_there_is_entry_not_found(self, ask: Asker, repo: Repo, query: str) -> None:
        """With the commit; offline as well."""
        await ask("/api/models/Org/Model")
        for _ in range(2):
            answer = await ask(f"/api/models/Org/Model/tree/main/absent{query}")
            assert (answer.status, answer.code) == (404, "EntryNotFound")
            assert answer.headers["X-Repo-Commit"] == head(repo)
            await ask.hub.stop()

    async def test_without_upstream_directories_are_made_from_files(self, ask: Asker, repo: Repo) -> None:
        """The same entries with the same oids as the Hub has them."""
        whole = await ask.of_hub("/api/models/Org/Model/tree/main?recursive=true")
        await ask("/api/models/Org/Model")
        await ask.hub.stop()
        found = await pages(ask, "/api/models/Org/Model/tree/main?recursive=true&limit=3")
        assert [entry for page in found for entry in page] == whole
        listed = await ask("/api/models/Org/Model/paths-info/main", "POST", json={"paths": ["a", "model.bin"]})
        assert listed.json == [entry for entry in whole if entry["path"] in ("a", "model.bin")]


class TestPathsInfo:
    async def test_it_is_what_the_hub_says(self, ask: Asker, repo: Repo) -> None:
        """As Python's form and as JavaScript's JSON; files and directories; what is absent is left out."""
        path = "/api/models/Org/Model/paths-info/main"
        names = ["model.bin", "a", "data/a b.txt", "absent", "/config.json/", "../x", "", "a\\b"]
        form = [("paths", name) for name in names]
        for expand in ("false", "true"):
            for sent in (
                {"data": aiohttp.FormData([*form, ("expand", expand)])},
                {"json": {"paths": names, "expand": expand == "true"}},
            ):
                answer = await ask(path, "POST", **sent)
                assert (answer.status, answer.headers["X-Repo-Commit"]) == (200, head(repo))
                told = await ask.of_hub(path, "POST", json={"paths": names, "expand": expand == "true"})
                assert sorted(answer.json, key=lambda entry: entry["path"]) == sorted(told, key=lambda entry: entry["path"])
        assert (await ask(path, "POST", json={"paths": "config.json"})).json[0]["path"] == "config.json"
        assert (await ask(path, "POST", json={})).json == []

    async def test_a_single_question_costs_no_more_than_the_tree(self, ask: Asker, repo: Repo) -> None:
        for _ in range(3):
            await ask("/api/models/Org/Model/paths-info/main", "POST", json={"paths": ["a", "absent"]})
        assert calls(ask.hub) == 2

    @pytest.mark.parametrize(
        ("body", "kind"),
        [
            (b"{", "application/json"),
            (b"[]", "application/json"),
            (b'"x"', "application/json"),
            (b'{"paths": 7}', "application/json"),
            (b'{"paths": null}', "application/json"),
            (b'{"paths": {"a.txt": 1}}', "application/json"),
            (b'{"paths": [1]}', "application/json"),
            (b"[" * 100_000, "application/json"),
            (b'{"paths": [%s]}' % b",".join([b'"x"'] * 1001), "application/json"),
            (b"\xff\xfe", "application/x-www-form-urlencoded"),
            (b"&".join([b"paths=x"] * 1011), "application/x-www-form-urlencoded"),
        ],
    )
    async def test_a_body_that_is_none_is_the_clients_fault(self, ask: Asker, repo: Repo, body: bytes, kind: str) -> None:
        answer = await ask("/api/models/Org/Model/paths-info/main", "POST", data=body, headers={"Content-Type": kind})
        assert (answer.status, answer.code) == (400, "BadTarget")

    async def test_names_that_nothing_can_have_are_left_out(self, ask: Asker, repo: Repo) -> None:
        """Half a surrogate pair, which JSON can say; NUL; the index's own separators."""
        names = ["\ud800", "\0", "a\n", "a.txt", ":", "x" * 5000]
        body, headers = json.dumps({"paths": names}).encode(), {"Content-Type": "application/json"}
        answer = await ask("/api/models/Org/Model/paths-info/main", "POST", data=body, headers=headers)
        assert [entry["path"] for entry in answer.json] == ["a.txt"]

    async def test_a_body_of_more_than_a_mebibyte_is_refused(self, ask: Asker, repo: Repo) -> None:
        answer = await ask("/api/models/Org/Model/paths-info/main", "POST", data=io.BytesIO(b"x" * (1024**2 + 1)))
        assert answer.status == 413

    async def test_it_is_asked_by_post(self, ask: Asker, repo: Repo) -> None:
        assert (await ask("/api/models/Org/Model/paths-info/main")).status == 404


# — refs, commits, raw ——————————————————————————————————————————————————————————————————————————————


class TestRefsAndCommits:
    @pytest.mark.parametrize("query", ["", "?include_prs=1"])
    async def test_refs_are_what_the_hub_says_and_stay_when_it_is_gone(self, ask: Asker, repo: Repo, query: str) -> None:
        path = f"/api/models/Org/Model/refs{query}"
        told = await ask.of_hub(path)
        ask.hub.counters.reset()
        for _ in range(3):
            assert (await ask(path)).json == told
        assert calls(ask.hub, "/refs") == 1
        await ask.hub.stop()
        age(ask.mirror, 3600)
        answer = await ask(path)
        assert answer.json == told and "detail=stale" in answer.cache

    async def test_refs_nobody_asked_for_are_made_from_what_is_known(self, ask: Asker, repo: Repo) -> None:
        """llama.cpp begins with them; the keys that parsers need are there."""
        await ask("/api/models/Org/Model")
        await ask("/api/models/Org/Model/revision/refs%2Fconvert%2Fparquet")
        await ask.hub.stop()
        answer = await ask("/api/models/Org/Model/refs")
        assert answer.json == {
            "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": head(repo)}],
            "converts": [],
            "tags": [],
            "pullRequests": [],
        }

    async def test_commits_are_what_the_hub_says_page_by_page(self, ask: Asker, repo: Repo) -> None:
        for i in range(4):
            repo.commit({"n": b"%d" % i}, title=f"Number {i}")
        path = "/api/models/Org/Model/commits/main"
        told = await ask.of_hub(path)
        assert [commit for page in await pages(ask, f"{path}?limit=2") for commit in page] == told
        assert (await ask(f"{path}?expand%5B%5D=formatted")).json == told
        await ask.hub.stop()
        assert [commit for page in await pages(ask, f"{path}?limit=2") for commit in page] == told
        answer = await ask(f"/api/models/Org/Model/commits/{head(repo)}?other=1")
        assert [commit["id"] for commit in answer.json] == [head(repo)]


class TestRaw:
    @pytest.mark.parametrize("path", ["config.json", "data/a%20b.txt", "model.bin", "data/%C3%A9%23x%3F.bin"])
    async def test_it_is_what_git_stores_and_the_tree_names_it(self, ask: Asker, repo: Repo, path: str) -> None:
        """The pointer of an LFS file; its oid is the tree's, and the Hub's body byte for byte."""
        told = await ask.plain(f"{ask.hub.url}/Org/Model/raw/main/{path}", "GET")
        answer = await ask(f"/Org/Model/raw/main/{path}")
        assert (answer.status, answer.body, answer.headers["X-Repo-Commit"]) == (200, told.body, head(repo))
        [entry] = (await ask(f"/api/models/Org/Model/tree/main/{path}")).json
        git = hashlib.sha1(b"blob %d\0" % len(answer.body) + answer.body).hexdigest()
        assert entry["oid"] == git and answer.headers["ETag"] == f'"{git}"'
        again = await ask(f"/Org/Model/raw/main/{path}", headers={"If-None-Match": f'"{git}"'})
        assert (again.status, again.body) == (304, b"")
        assert (await ask(f"/Org/Model/raw/main/{path}", "HEAD")).headers["Content-Length"] == str(len(told.body))

    async def test_a_pointer_costs_no_content(self, ask: Asker, repo: Repo) -> None:
        await ask("/Org/Model/raw/main/model.bin")
        assert ask.hub.counters.requests("cdn") == 0

    async def test_what_is_not_there_is_entry_not_found(self, ask: Asker, repo: Repo) -> None:
        answer = await ask("/Org/Model/raw/main/absent")
        assert (answer.code, answer.headers["X-Repo-Commit"]) == ("EntryNotFound", head(repo))

    async def test_resolve_cache_is_the_file(self, ask: Asker, repo: Repo) -> None:
        """For whoever followed a redirect of the Hub's before; its query is of no matter."""
        path = f"/api/resolve-cache/models/Org/Model/{head(repo)}/config.json"
        for query in ("", "?%2FOrg%2FModel%2Fresolve%2Fmain%2Fconfig.json=&etag=%22x%22"):
            answer = await ask(path + query)
            assert (answer.status, answer.body) == (200, FILES["config.json"])
        assert (await ask(f"/api/resolve-cache/models/Org/Model/{head(repo)}/absent")).code == "EntryNotFound"


# — everything else —————————————————————————————————————————————————————————————————————————————————


class TestNamed:
    async def test_harnesses_and_telemetry_stay_here(self, ask: Asker) -> None:
        """Quickly, upstream or not; telemetry goes to nobody."""
        await ask.hub.stop()
        assert (await ask("/api/agent-harnesses")).json == {"standardEnvVars": [], "harnesses": {}}
        for method in ("HEAD", "GET", "POST"):
            answer = await ask("/api/telemetry/transformers/examples", method)
            assert (answer.status, answer.body) == (200, b"")
        assert ask.hub.counters.requests() == 0

    async def test_whoami_is_asked_with_the_callers_token_and_never_kept(
        self, ask: Asker, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Each token its own answer, each time; no token ends up on disk, in a log, or in what the mirror remembers."""
        caplog.set_level(0)
        ask.hub.users["hf_canary_one"] = User("one")
        ask.hub.users["hf_canary_two"] = User("two")
        for name in ("one", "two", "one"):
            answer = await ask("/api/whoami-v2", headers={"Authorization": f"Bearer hf_canary_{name}"})
            assert (answer.status, answer.json["name"]) == (200, name)
            assert answer.headers["Cache-Control"] == "no-store" and "bypass" in answer.cache
        assert calls(ask.hub) == 3
        for headers in ({}, {"Authorization": "Bearer hf_canary_wrong"}):
            assert (await ask("/api/whoami-v2", headers=headers)).status == 401
        await ask.hub.stop()
        answer = await ask("/api/whoami-v2", headers={"Authorization": "Bearer hf_canary_one"})
        assert (answer.status, answer.code) == (504, "UpstreamUnreachable")
        written = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        assert written and not [True for data in written if b"canary" in data]
        assert "canary" not in caplog.text

    async def test_no_other_question_carries_a_callers_token(self, ask: Asker, repo: Repo) -> None:
        """What is learnt with it could be shown to others."""
        ask.told = {"Authorization": "Bearer hf_canary", "Cookie": "token=hf_canary"}
        ask.hub.users["hf_canary"] = User("one", {"Org/Model"})
        await ask("/api/models/Org/Model")
        await ask("/api/models/Org/Model/tree/main")
        await ask("/api/models/Org/Model/tree/main?expand=true")
        await ask("/api/models?search=canary")
        await ask("/Org/Model/resolve/main/config.json")
        assert len(ask.hub.log) > 3
        for exchange in ask.hub.log:
            assert exchange.header("Authorization") is None and exchange.header("Cookie") is None

    @pytest.mark.parametrize("name", ["nothing", "whoami", "jobs/x", "settings/tokens", "models-tags", "../x", "collections"])
    async def test_what_is_not_on_the_list_stays_here(self, ask: Asker, name: str) -> None:
        answer = await ask(f"/api/{name}")
        assert answer.status in (400, 404) and answer.code in ("NotRoutable", "BadTarget", "RepoNotFound")
        assert calls(ask.hub) == (1 if name == "collections" else 0)

    async def test_what_is_on_the_list_is_passed_on_and_kept(self, ask: Asker) -> None:
        """With its query as it came, decoded and encoded once; URLs in it are the mirror's."""
        body = json.dumps({"url": f"{ask.hub.url}/api/x?y", "xetHash": "f" * 64}).encode()
        ask.hub.faults.add(Fault.status(200, {"Content-Type": "application/json"}, body), on="hub", match="/api/")
        for name in ("trending", "quicksearch", "models-tags-by-type", "collections/a/b-c", "users/x/overview", "daily_papers"):
            answer = await ask(f"/api/{name}?q=50%2525+a%26b&limit=")
            assert answer.json == {"url": f"{ask.mirror.url}/api/x?y"}
            [asked] = ask.hub.log.find("hub", match=f"/api/{name}")
            assert asked.raw_path == f"/api/{name}?limit=&q=50%2525%20a%26b"

    async def test_parts_of_a_repo_are_passed_on_when_the_repo_may_be_seen(self, ask: Asker, repo: Repo) -> None:
        body = json.dumps({"discussions": [], "count": 0}).encode()
        ask.hub.faults.add(Fault.status(200, {}, body), on="hub", match=re.compile("discussions|compare|parquet"))
        for part in ("discussions?p=0", "discussions/7", "compare/main..dev", "parquet/default/train"):
            assert (await ask(f"/api/models/Org/Model/{part}")).json == {"discussions": [], "count": 0}
        ask.hub.repo("org/secret", private=True).commit({"a": b"a"})
        assert (await ask("/api/models/org/secret/discussions")).code == "RepoNotFound"
        assert not ask.hub.log.find("hub", match="org/secret/discussions")

    async def test_xet_is_not_here(self, ask: Asker, repo: Repo) -> None:
        """Stripped everywhere, and its token is 404."""
        answer = await ask(f"/api/models/Org/Model/xet-read-token/{head(repo)}")
        assert (answer.status, answer.code) == (404, "NotRoutable")

    async def test_auth_check(self, ask: Asker, repo: Repo) -> None:
        """Yes for reading what is public; nobody may write here."""
        answer = await ask("/api/models/Org/Model/auth-check")
        assert (answer.status, answer.body) == (200, b"")
        assert (await ask("/api/models/Org/Model/auth-check/write")).status == 403


class TestListings:
    @pytest.fixture
    def shelf(self, hub: Hub) -> list[Repo]:
        shelf = [hub.repo(name) for name in ("Org/Model", "org/tiny", "lab/Model-2")]
        for repo in shelf:
            repo.commit({"a.txt": b"a"})
        hub.repo("org/data", "datasets").commit({"a.txt": b"a"})
        hub.repo("org/secret", private=True).commit({"a.txt": b"a"})
        return shelf

    async def test_they_are_the_hubs_with_its_pages(self, ask: Asker, shelf: list[Repo]) -> None:
        """Kept for a minute; the order of a query's parts is of no matter."""
        for query in ("search=model", "author=org", "search=model&limit=1", "filter=b&filter=a", "full=true"):
            found = await pages(ask, f"/api/models?{query}")
            told = await ask.of_hub(f"/api/models?{re.sub('&limit=1', '', query)}")
            assert [repo["id"] for page in found for repo in page] == [repo["id"] for repo in told]
        ask.hub.counters.reset()
        assert (await ask("/api/models?limit=1&search=model")).status == 200
        assert calls(ask.hub) == 0
        assert [repo["id"] for repo in (await ask("/api/datasets")).json] == ["org/data"]

    async def test_without_upstream_they_are_what_is_known(self, ask: Asker, shelf: list[Repo]) -> None:
        """Never an error; a kept one first; private repos are in none."""
        for name in ("Org/Model", "lab/Model-2", "org/secret"):
            await ask(f"/api/models/{name}")
        kept = (await ask("/api/models?search=tiny")).json
        await ask.hub.stop()
        assert (await ask("/api/models?search=tiny")).json == kept != []
        for query, names in (
            ("", ["lab/Model-2", "Org/Model"]),
            ("search=MODEL", ["lab/Model-2", "Org/Model"]),
            ("search=model&limit=1", ["lab/Model-2"]),
            ("author=lab", ["lab/Model-2"]),
            ("search=nothing", []),
        ):
            answer = await ask(f"/api/models?{query}&x=1")
            assert [repo["id"] for repo in answer.json] == names
            assert "detail=stale" in answer.cache
        assert (await ask("/api/spaces")).json == []

    @pytest.mark.parametrize(
        "fault", [Fault.status(500), Fault.status(429, {"Retry-After": "60"}), Fault.html_200(), Fault.reset()]
    )
    async def test_a_search_is_never_an_error(self, ask: Asker, shelf: list[Repo], fault: Fault) -> None:
        hurry(ask.mirror)
        await ask("/api/models/Org/Model")
        ask.hub.faults.add(fault, on="hub")
        answer = await ask("/api/models?search=x")
        assert (answer.status, answer.json) == (200, [])


def hurry(mirror: Mirror) -> None:
    """Troubles of upstream are borne without waiting."""

    async def no_time(seconds: float) -> None:
        await asyncio.sleep(0)

    mirror.front.api.dispatcher._sleep = no_time


# — who may see what ————————————————————————————————————————————————————————————————————————————————


class TestWhoMaySee:
    async def test_a_gated_repo_tells_its_files_and_gives_none(self, ask: Asker) -> None:
        """Info, tree and refs as the Hub; content, raw and auth-check are 401 GatedRepo, offline too."""
        repo = ask.hub.repo("org/gated", gated="manual")
        repo.commit({"a.txt": b"a", "m.bin": LFS(b"m")})
        for _ in range(2):
            info = await ask("/api/models/org/gated")
            assert (info.status, info.json["gated"]) == (200, "manual")
            assert len((await ask("/api/models/org/gated/tree/main")).json) == 2
            assert (await ask("/api/models/org/gated/refs")).status == 200
            for path in ("/org/gated/resolve/main/a.txt", "/org/gated/raw/main/m.bin", "/api/models/org/gated/auth-check"):
                answer = await ask(path)
                assert (answer.status, answer.code) == (401, "GatedRepo"), path
            await ask.hub.stop()

    async def test_a_private_repo_is_as_absent_as_one_that_is_not(self, ask: Asker) -> None:
        """The same answer but for the name, to everything that can be asked."""
        ask.hub.repo("org/secret", private=True).commit({"a.txt": b"a"})
        for path in (
            "/api/models/NAME",
            "/api/models/NAME/tree/main",
            "/api/models/NAME/refs",
            "/api/models/NAME/commits/main",
            "/api/models/NAME/auth-check",
            f"/api/models/NAME/revision/{'a' * 40}",
            "/NAME/resolve/main/a.txt",
            "/NAME/raw/main/a.txt",
        ):
            answers = []
            for name in ("org/secret", "org/nobody"):
                answer = await ask(path.replace("NAME", name))
                assert answer.code == "RepoNotFound", path
                answers.append((answer.status, answer.json["error"].replace(name, "NAME"), answer.headers["X-Error-Code"]))
            assert answers[0] == answers[1]

    async def test_a_repo_that_closes_is_closed_within_a_minute(self, ask: Asker, repo: Repo) -> None:
        """P5: and opens again; the same for one that is deleted."""
        paths = (
            "/api/models/Org/Model",
            "/api/models/Org/Model/tree/main",
            "/api/models/Org/Model/refs",
            "/Org/Model/resolve/main/a0",
        )
        for path in paths:
            assert (await ask(path)).status == 200
        repo.private = True
        age(ask.mirror, 61)
        for path in paths:
            assert (await ask(path)).code == "RepoNotFound"
        repo.private = False
        age(ask.mirror, 120)
        assert (await ask(paths[0])).status == 200
        repo.delete()
        age(ask.mirror, 181)
        for path in paths:
            assert (await ask(path)).code == "RepoNotFound"

    async def test_a_disabled_repo_is_told_in_the_hubs_words(self, ask: Asker, repo: Repo) -> None:
        repo.disabled = True
        answer = await ask("/api/models/Org/Model")
        assert (answer.status, answer.headers["X-Error-Message"]) == (403, "Access to this resource is disabled.")


class TestNames:
    async def test_another_case_and_a_former_name_are_the_repo(self, ask: Asker, repo: Repo) -> None:
        """Answered at once under the name that was asked for, `id` the Hub's; never a redirect; offline too."""
        repo.rename("Org/Renamed")
        for _ in range(2):
            for name in ("Org/Model", "org/renamed", "ORG/MODEL", "Org/Renamed"):
                assert (await ask(f"/api/models/{name}")).json["id"] == "Org/Renamed"
                assert (await ask(f"/api/models/{name}/tree/main")).status == 200
                assert (await ask(f"/{name}/resolve/main/config.json")).body == FILES["config.json"]
            await ask.hub.stop()

    async def test_pages_stay_under_the_name_that_was_asked_for(self, ask: Asker, repo: Repo) -> None:
        repo.rename("Org/Renamed")
        first = await ask("/api/models/Org/Model/tree/main?limit=2")
        assert first.next is not None and first.next.startswith(f"{ask.mirror.url}/api/models/Org/Model/tree/")

    async def test_a_repo_renamed_while_it_is_used_loses_nothing(self, ask: Asker, repo: Repo) -> None:
        """New commits are found under the old name, and never said to lack a file."""
        await ask("/api/models/Org/Model")
        repo.rename("Org/Renamed")
        commit = repo.commit({"late.txt": b"late"})
        answer = await ask(f"/Org/Model/resolve/{commit}/late.txt")
        assert (answer.status, answer.body) == (200, b"late")


# — errors, refusals, and what it costs —————————————————————————————————————————————————————————————


class TestRefusals:
    @pytest.mark.parametrize(
        "path",
        [
            "/api/models/Org/Model/commit/main",
            "/api/models/Org/Model/preupload/main",
            "/api/models/Org/Model/branch/x",
            "/api/models/Org/Model",
            "/api/models/Org/Model/refs",
            "/api/models/Org/Model/tree/main",
            "/api/models",
            "/api/repos/create",
            "/api/validate-yaml",
            "/api/whoami-v2",
            "/Org/Model/resolve/main/a0",
            "/Org/Model/raw/main/a0",
            "/Org/Model/upload/main",
        ],
    )
    async def test_a_write_is_405_and_goes_nowhere(self, ask: Asker, repo: Repo, path: str) -> None:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            answer = await ask(path, method, data=b"x", headers={"Authorization": "Bearer hf_canary"})
            assert (answer.status, answer.code) == (405, "ReadOnly"), method
            assert "read-only mirror" in answer.headers["X-Error-Message"]
        assert ask.hub.counters.requests() == 0

    async def test_browsers_may_ask(self, ask: Asker) -> None:
        """The preflight of huggingface.js for any path; upstream hears nothing."""
        for path in ("/api/models/org/m/tree/main", "/api/models/org/m/paths-info/main", "/api/whoami-v2"):
            answer = await ask(path, "OPTIONS", headers={"Origin": "https://x.test", "Access-Control-Request-Method": "POST"})
            assert (answer.status, answer.body) == (204, b"")
            assert {"Authorization", "Content-Type"} <= set(answer.headers["Access-Control-Allow-Headers"].split(", "))
            assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        assert ask.hub.counters.requests() == 0

    async def test_a_revision_that_is_not_there(self, ask: Asker, repo: Repo) -> None:
        for path in (
            "/api/models/Org/Model/revision/absent",
            f"/api/models/Org/Model/tree/{'a' * 40}",
            "/Org/Model/resolve/absent/x",
        ):
            answer = await ask(path)
            assert (answer.status, answer.code) == (404, "RevisionNotFound"), path

    async def test_what_nobody_here_knows_with_a_dead_upstream(self, ask: Asker, repo: Repo) -> None:
        """404 at once, with a code that claims nothing: clients go on with what they have."""
        await ask("/api/models/Org/Model")
        await ask.hub.stop()
        for path in (
            "/api/models/org/nobody",
            "/api/models/org/nobody/tree/main",
            "/api/models/org/nobody/refs",
            "/org/nobody/resolve/main/x",
            "/api/models/Org/Model/revision/absent",
            f"/api/models/Org/Model/revision/{'a' * 40}",
            f"/Org/Model/resolve/{'a' * 40}/x",
            "/api/models/Org/Model/discussions",
            "/api/trending",
        ):
            answer = await ask(path)
            assert (answer.status, answer.code) == (404, "UnknownOffline"), path
            assert "X-Repo-Commit" not in answer.headers

    async def test_a_bug_of_the_mirrors_is_a_500_with_a_code_and_an_id(
        self, ask: Asker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And tells no more than where to look."""

        async def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError("secret")

        monkeypatch.setattr("nearhub.access.Access.authorise", broken)
        answer = await ask("/api/models/org/m")
        assert (answer.status, answer.code) == (500, "InternalError")
        assert answer.headers["X-Request-Id"] in answer.json["error"] and "secret" not in answer.json["error"]


class TestBudget:
    async def test_a_cold_download_costs_two_questions_a_warm_one_none(self, ask: Asker, repo: Repo) -> None:
        """P7: as huggingface_hub asks: info, tree by commit, HEAD of each file; then all of it again, and pinned."""
        commit = head(repo)
        names = ["config.json", "a0", "a/b", "data/a%20b.txt", "model.bin", "absent.txt"]
        budget = 2
        for _ in range(3):
            assert (await ask("/api/models/Org/Model/revision/main")).json["sha"] == commit
            assert len((await ask(f"/api/models/Org/Model/tree/{commit}?recursive=true&expand=false")).json) > 5
            for revision in (commit, "main"):
                for name in names:
                    answer = await ask(f"/Org/Model/resolve/{revision}/{name}", "HEAD")
                    assert answer.status == (404 if name.startswith("absent") else 200)
                    assert answer.headers["X-Repo-Commit"] == commit
            assert calls(ask.hub) == budget
            ask.hub.counters.reset()
            budget = 0

    async def test_a_download_after_main_has_moved_costs_two(self, ask: Asker, repo: Repo) -> None:
        """The manifest of what main is now, and its tree."""
        await ask("/api/models/Org/Model/revision/main")
        ask.hub.counters.reset()
        commit = repo.commit({"new": b"new"})
        age(ask.mirror, 3600)
        assert (await ask("/api/models/Org/Model/revision/main")).json["sha"] == commit
        await ask(f"/api/models/Org/Model/tree/{commit}?recursive=true")
        assert (await ask(f"/Org/Model/resolve/{commit}/new", "HEAD")).status == 200
        assert calls(ask.hub) == 2

    async def test_only_what_waits_for_upstream_says_so(self, ask: Asker, repo: Repo) -> None:
        """Cache-Status: a miss, then hits, the one in the background of which upstream is asked too; then stale."""
        path = "/api/models/Org/Model"
        assert (await ask(path)).cache == "nearhub; fwd=uri-miss"
        assert (await ask(path)).cache == "nearhub; hit"
        age(ask.mirror, 45)
        for _ in range(3):
            assert (await ask(path)).cache == "nearhub; hit"
        await ask.hub.until(lambda: calls(ask.hub) == 2)
        await asyncio.gather(*ask.mirror.front.api.resolver._asking._tasks.values())
        age(ask.mirror, 3600)
        await ask.hub.stop()
        assert (await ask(path)).cache == "nearhub; hit; detail=stale"

    async def test_a_public_repo_costs_one_question_a_minute_whoever_asks(self, ask: Asker, repo: Repo) -> None:
        """P7: pinned or not; none for each token."""
        await ask("/api/models/Org/Model")
        ask.hub.counters.reset()
        age(ask.mirror, 130)
        for token in "abc":
            for revision in (head(repo), "main"):
                answer = await ask(
                    f"/Org/Model/resolve/{revision}/config.json", "HEAD", headers={"Authorization": f"Bearer hf_{token}"}
                )
                assert answer.status == 200
        assert calls(ask.hub) == 1


class TestTroubles:
    @pytest.mark.parametrize(
        "fault", [Fault.status(500), Fault.status(503), Fault.status(502), Fault.reset(), Fault.html_200()]
    )
    async def test_two_troubles_in_a_row_are_borne(self, ask: Asker, repo: Repo, fault: Fault) -> None:
        """The info call is repeated by no client: one 503 of the mirror's would end snapshot_download."""
        hurry(ask.mirror)
        rule = ask.hub.faults.add(fault, on="hub", times=2)
        answer = await ask("/api/models/Org/Model")
        assert (answer.status, rule.hits) == (200, 2)

    async def test_a_429_is_never_passed_on_where_an_answer_is_known(self, ask: Asker, repo: Repo) -> None:
        """Stale, and said so; what is unknown is 429, with the Hub's wish."""
        paths = (
            "/api/models/Org/Model",
            "/api/models/Org/Model/tree/main",
            "/api/models/Org/Model/refs",
            "/Org/Model/resolve/main/a0",
        )
        for path in paths:
            assert (await ask(path)).status == 200
        ask.hub.faults.add(Fault.status(429, {"Retry-After": "60"}), on="hub")
        age(ask.mirror, 3600)
        for path in paths:
            answer = await ask(path, "HEAD")
            assert answer.status == 200 and "detail=stale" in answer.cache, path
        answer = await ask("/api/models/org/other")
        assert (answer.status, answer.code) == (429, "UpstreamBusy")
        assert 1 <= int(answer.headers["Retry-After"]) <= 60

    async def test_upstream_back_is_asked_again(self, ask: Asker, repo: Repo) -> None:
        """No restart: a new commit is seen once upstream answers."""
        await ask("/api/models/Org/Model")
        await ask.hub.stop()
        age(ask.mirror, 3600)
        assert "detail=stale" in (await ask("/api/models/Org/Model")).cache
        await ask.hub.start()
        repo.commit({"new": b"new"})
        age(ask.mirror, 3700)
        answer = await ask("/api/models/Org/Model")
        assert answer.json["sha"] == head(repo) and "stale" not in answer.cache

    async def test_a_lie_about_a_commit_is_an_alarm_and_changes_nothing(self, ask: Asker, repo: Repo) -> None:
        """P11, over the wire."""
        told = (await ask("/api/models/Org/Model?blobs=true")).json["siblings"]
        ask.hub.faults.add(Fault.other_file("config.json", b"[]"), on="hub", match="/tree/")
        tree = (await ask("/api/models/Org/Model/tree/main?recursive=true")).json
        oids = {entry["path"]: entry["oid"] for entry in tree}
        assert all(oids[file["rfilename"]] == file["blobId"] for file in told)
        assert ask.mirror.metrics.alarms._value.get() == 1


# — where the mirror is ——————————————————————————————————————————————————————————————————————————————


@pytest.mark.parametrize(
    ("extra", "headers", "asked", "base"),
    [
        ({}, {}, "", "OWN"),
        ({"SERVER_PREFIX": "/pre/fix"}, {}, "/pre/fix", "OWN/pre/fix"),
        ({"SERVER_PREFIX": "/pre/fix"}, {}, "/pre//fix", "OWN/pre/fix"),
        ({"SERVER_PREFIX": "/pre/fix"}, {}, "", "OWN"),
        ({}, {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "hf.lab"}, "", "https://hf.lab"),
        ({}, {"X-Forwarded-Proto": "https, http", "X-Forwarded-Host": "hf.lab:8443, x"}, "", "https://hf.lab:8443"),
        ({}, {"X-Forwarded-Prefix": "/a/b/"}, "", "OWN/a/b"),
        ({"SERVER_PREFIX": "/pre"}, {"X-Forwarded-Host": "hf.lab"}, "", "http://hf.lab/pre"),
        ({"SERVER_PREFIX": "/pre"}, {"X-Forwarded-Host": "hf.lab"}, "/pre", "http://hf.lab/pre"),
        ({"SERVER_PUBLIC_URL": "https://hf.lab/x"}, {"X-Forwarded-Host": "evil"}, "", "https://hf.lab/x"),
        ({}, {"X-Forwarded-Host": "evil/><script>"}, "", "http://localhost"),
        ({}, {"X-Forwarded-Proto": "javascript", "X-Forwarded-Prefix": "//evil"}, "", "OWN"),
    ],
)
async def test_links_are_where_the_client_sees_the_mirror(
    session: aiohttp.ClientSession,
    hub: Hub,
    repo: Repo,
    tmp_path: Path,
    extra: dict[str, str],
    headers: dict[str, str],
    asked: str,
    base: str,
) -> None:
    """Prefix, front server, public URL; clients follow Link as it is (hub-protocol §2.2). Nothing of it is kept."""
    async with running(configure(tmp_path / "other", [hub.url], [hub.cdn_host], **extra)) as mirror:
        root = mirror.url.removesuffix(extra.get("SERVER_PREFIX", ""))
        base = base.replace("OWN", root)
        ask = Asker(session, hub, mirror, base=root + asked, told=headers)
        answer = await ask("/api/models/Org/Model/tree/main?limit=2")
        assert answer.next is not None
        assert answer.next.startswith(f"{base}/api/models/Org/Model/tree/{head(repo)}?limit=2&cursor=")
        info = await ask("/api/models/Org/Model")
        assert info.json["cardData"]["url"] == f"{base}/Org/Model"
        ask.told = {}
        plain = await Asker(session, hub, mirror, base=root)("/api/models/Org/Model")
        assert plain.json["cardData"]["url"].startswith((root, extra.get("SERVER_PUBLIC_URL", root)))


async def test_paths_are_the_same_under_the_prefix(
    session: aiohttp.ClientSession, hub: Hub, repo: Repo, tmp_path: Path
) -> None:
    """Every kind of URL, with the slashes that careless endpoints add."""
    async with running(configure(tmp_path / "other", [hub.url], [hub.cdn_host], SERVER_PREFIX="/pre/fix")) as mirror:
        ask = Asker(session, hub, mirror)
        for path in (
            "/api/models/Org/Model",
            "/api/models/Org/Model/tree/main",
            "/Org/Model/raw/main/a0",
            "/api/agent-harnesses",
        ):
            expected = (await ask(path)).body
            for url in (f"{mirror.url}/{path}", mirror.url.replace("/pre/fix", "") + path):
                answer = await ask(url)
                assert (answer.status, len(answer.body) > 0) == (200, True)
                assert path.startswith("/api/models") or answer.body == expected
