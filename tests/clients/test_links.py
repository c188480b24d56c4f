"""No URL in any answer leads off the mirror: every header and all JSON, page by page, at the root and under a prefix."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from tests.clients.lan import PREFIX, Lan, lan
from tests.hub import LFS, Content, Hub, User

TOKEN = "hf_oneOfTheHubsUsersAndNobodyElse"
WEIGHTS = Content(300_000, seed=250)
REPOS = ("/api/models/org/m", "/api/datasets/org/d", "/api/spaces/org/s")
ABOUT_A_REPO = (
    "",
    "?blobs=true",
    "?expand=sha&expand=cardData&expand=siblings",
    "?expand=gguf",
    "/revision/main?blobs=true",
    "/revision/HEAD?securityStatus=true",
    "/revision/{commit}",
    "/tree/main",
    "/tree/main?recursive=true",
    "/tree/main?recursive=true&limit=2",
    "/tree/{commit}/sub?expand=true&limit=1",
    "/tree/main?recursive=true&expand=true&limit=2",
    "/refs?include_prs=1",
    "/commits/main?limit=2",
    "/auth-check",
)
ELSE = ("/api/models?limit=1&full=true", "/api/datasets?search=d", "/api/spaces?author=org", "/api/agent-harnesses")
FILES = ("config.json", "model.safetensors", "sub/a b.txt", "none.txt")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s\"'<>\\]+", re.IGNORECASE)


def publish(hub: Hub) -> None:
    """A repo of each kind with five commits, whose card names the Hub."""
    for repo_id, kind in (("org/m", "models"), ("org/d", "datasets"), ("org/s", "spaces")):
        repo = hub.repo(repo_id, kind)  # type: ignore[arg-type]
        repo.card = {"homepage": f"{hub.url}/org/m", "see": [f"{hub.url}/datasets/org/d?x=1", {"deep": hub.url}]}
        repo.commit({"config.json": b"{}" * 900, "model.safetensors": LFS(WEIGHTS), "sub/a b.txt": b"a", "sub/b.txt": b"b"})
        for number in range(4):
            commit = repo.commit({"README.md": b"# %d\n" % number})
        repo.ref("refs/pr/1", commit)
    hub.users[TOKEN] = User("reader")


class Walk:
    """One client that reads everything, and looks at every answer."""

    def __init__(self, net: Lan, session: aiohttp.ClientSession) -> None:
        self.net = net
        self.session = session
        self.commit = net.hub.repo("org/m").refs["refs/heads/main"]
        self.answers = 0
        self.rewritten = 0

    async def everything(self, *, is_open: bool) -> None:
        """`is_open`: the Hub answers."""
        for path in ELSE:
            await self.pages(path)
        for repo in REPOS:
            # Each repo has the same commits' contents, and so the same commit.
            for about in ABOUT_A_REPO:
                await self.pages(repo + about.format(commit=self.commit))
            for form in (
                {"data": {"paths": "config.json", "expand": "true"}},
                {"json": {"paths": ["model.safetensors", "sub"]}},
            ):
                found = await self.ask("POST", f"{self.net.url}{repo}/paths-info/main", **form)
                assert isinstance(found, list) and found
        for method in ("HEAD", "GET"):
            for path in FILES:
                for way in (
                    f"/org/m/resolve/main/{path}",
                    f"/datasets/org/d/raw/main/{path}",
                    f"/api/resolve-cache/models/org/m/{self.commit}/{path}",
                ):
                    await self.ask(method, self.net.url + way.replace(" ", "%20"))
        await self.ask("GET", f"{self.net.url}/api/models/org/m/xet-read-token/main")
        await self.ask("GET", f"{self.net.url}/api/models/org/none/revision/main")
        if is_open:
            said = await self.ask("GET", f"{self.net.url}/api/whoami-v2", headers={"Authorization": f"Bearer {TOKEN}"})
            assert said["name"] == "reader"

    async def pages(self, path: str) -> None:
        """All pages, by the links that the answers have; together they are what one large page is."""
        url, found = self.net.url + path, []
        for _ in range(20):
            page = await self.ask("GET", url)
            if isinstance(page, list):
                found += page
            if (url := self.next_url) == "":
                break
        assert url == ""
        if "limit=" in path and "/tree/" in path:
            whole = await self.ask("GET", self.net.url + re.sub(r"limit=\d+", "limit=50", path))
            assert found == whole and len(found) > 1

    async def ask(self, method: str, url: str, **more: Any) -> Any:
        """The answer's JSON, when every URL in the answer and in its headers is the mirror's own."""
        async with self.session.request(method, URL(url, encoded=True), allow_redirects=False, **more) as response:
            body = await response.read()
            if response.status == 429 and "/org/none/" in url:
                return None  # what it does not know it asks the Hub for, and says to people who refused
            assert response.status < 300 or response.status in (400, 401, 404), (url, response.status, body[:300])
            is_content = "/resolve" in url or "/raw/" in url
            assert "Location" not in response.headers, url
            self.check(url, response.headers, "" if is_content and response.status == 200 else body.decode())
            self.next_url = str(response.links.get("next", {}).get("url", ""))
            if response.status == 200 and not is_content and body:
                return json.loads(body)
            return None

    def check(self, url: str, headers: Mapping[str, str], body: str) -> None:
        self.answers += 1
        # Names of headers that a browser may read are no links.
        said = {name: value for name, value in headers.items() if name != "Access-Control-Expose-Headers"}
        text = "\n".join([*said, *said.values(), body])
        own = self.net.url
        off = [one for one in _URL.findall(text) if one != own and not one.startswith((f"{own}/", f"{own}?"))]
        assert off == [], url
        for host in (self.net.hub.url, self.net.hub.cdn_url, "http://huggingface.co", "http://hf.co"):
            assert host.partition("://")[2] not in text, url
        assert "xet" not in text.lower() or "/xet-read-token/" in url, url
        self.rewritten += text.count(own)


async def test_no_url_leads_off_the_mirror(hub: Hub, tmp_path: Path) -> None:
    """The same mirror at the root, under the prefix, and at the root again: no kept answer carries the other's URLs.

    So it is while the Hub is there, is dead and refuses.
    """
    publish(hub)
    async with lan(tmp_path, PREFIX, hub=hub) as net, aiohttp.ClientSession() as session:
        for state in ("up", "dead", "refusing"):
            if state == "dead":
                await net.hub_dies()
            elif state == "refusing":
                await net.hub_refuses()
            for base in ("", PREFIX, ""):
                net.base = base
                walk = Walk(net, session)
                await walk.everything(is_open=state == "up")
                assert walk.answers > 60 and walk.rewritten > 60
        assert net.heard == []
