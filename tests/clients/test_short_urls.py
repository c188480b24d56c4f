"""Short URLs and the repo page by the programs people use: at the root and under the prefix, cold and warm."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from html import unescape
from itertools import product
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
from playwright.async_api import Page, async_playwright, expect
from yarl import URL

from tests.clients.programs import MIB, made, sha256_of
from tests.hub import LFS, Content, Hub
from tests.mirror import Mirror, configure, run_client, running

PREFIX = "/huggingface-proxy"
CHROMIUM = "/usr/bin/chromium"
WEIGHTS = Content(2 * MIB, seed=67)
CONFIG = b'{"model_type": "opt"}\n' * 40
PLAIN = ("curl", "-q", "-fsS")
PROGRAMS = {
    "aria2c": ("aria2c", "--no-conf", "-q", "-k1M", "-x16", "-s16", "--file-allocation=none", "-o", "file"),
    "wget": ("wget", "--no-config", "-q", "-c", "-O", "file"),
    "curl": (*PLAIN, "-o", "file"),
    "curl -r": (*PLAIN, "-r", "0-", "-o", "file"),
}
VARYING = {"date", "x-request-id"}


@pytest.fixture
async def mirror(hub: Hub, tmp_path: Path) -> AsyncIterator[Mirror]:
    """Under a prefix: its URL has it, and without it the mirror answers too."""
    files = {"pytorch_model.bin": LFS(WEIGHTS), "config.json": CONFIG, "a'b [1]/x y#?.bin": LFS(b"x" * 500)}
    hub.repo("facebook/opt-6.7b").commit(files)
    hub.repo("org/d", "datasets").commit({"data/train.bin": LFS(WEIGHTS), "data/a b.csv": b"a,b\n"})
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], SERVER_PREFIX=PREFIX)
    async with running(config) as server:
        yield server


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["root", "prefix"])
async def test_a_short_url_is_downloaded_whole(mirror: Mirror, hub: Hub, tmp_path: Path, prefix: str) -> None:
    """Cold, then warm, and the same bytes by the long URL; each byte comes from upstream once."""
    contents = {program: Content(3 * MIB, seed=seed) for seed, program in enumerate(PROGRAMS)}
    hub.repo("org/many").commit({f"sub/{program}.bin": LFS(content) for program, content in contents.items()})
    base = f"{mirror.url.removesuffix(PREFIX)}{prefix}/org/many"

    async def thrice(program: str) -> None:
        path = f"sub/{quote(program)}.bin"
        for number, url in enumerate((f"{base}/{path}", f"{base}/{path}", f"{base}/resolve/main/{path}")):
            home = made(tmp_path / program / str(number))
            status, said = await run_client(*PROGRAMS[program], url, env={"no_proxy": "*", "HOME": str(home)}, cwd=home)
            assert (status, sha256_of((home / "file").read_bytes())) == (0, contents[program].sha256), said

    await asyncio.gather(*map(thrice, PROGRAMS))
    await mirror.settled()
    assert hub.counters.bytes("cdn") == sum(content.size for content in contents.values())


async def test_a_short_url_says_what_the_long_one_says(mirror: Mirror) -> None:
    """GET, HEAD, Range and conditions: status, body, and every header but the request's own id."""
    async with aiohttp.ClientSession() as session:

        async def ask(url: str, method: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
            async with session.request(method, URL(url, encoded=True), headers=headers, allow_redirects=False) as response:
                said = {k.lower(): v for k, v in response.headers.items() if k.lower() not in VARYING}
                return response.status, said, await response.read()

        for repo, path in (
            ("facebook/opt-6.7b", "pytorch_model.bin"),
            ("facebook/opt-6.7b", "config.json"),
            ("datasets/org/d", "data/a%20b.csv"),
        ):
            short, long = f"{mirror.url}/{repo}/{path}", f"{mirror.url}/{repo}/resolve/main/{path}"
            etag = (await ask(long, "GET", {}))[1]["etag"]
            await mirror.settled()
            conditions = ({}, {"Range": "bytes=2-5"}, {"Range": "bytes=999999999-"}, {"If-None-Match": etag})
            for query, method in product(("", "?download=true", "?x=/resolve/main/y"), ("HEAD", "GET")):
                for headers in conditions:
                    answer = await ask(short + query, method, headers)
                    assert answer == await ask(long + query, method, headers)
                    assert ("attachment" in answer[1]["content-disposition"]) == (query == "?download=true")


async def test_curl_s_head_and_range(mirror: Mirror, hub: Hub) -> None:
    """`curl -I` and `curl -r`, of what is not here yet."""
    url = f"{mirror.url}/facebook/opt-6.7b/pytorch_model.bin"
    status, said = await run_client(*PLAIN, "-I", url)
    headers = dict(re.findall(r"^([A-Za-z0-9-]+): (.*?)\r?$", said, re.MULTILINE))
    assert status == 0 and said.startswith("HTTP/1.1 200")
    assert headers["X-Repo-Commit"] == hub.repo("facebook/opt-6.7b").refs["refs/heads/main"]
    assert headers["ETag"] == f'"{WEIGHTS.sha256}"' and headers["Content-Length"] == str(WEIGHTS.size)
    status, said = await run_client(*PLAIN, "-r", "5-8", "-o", "/dev/null", "-w", "%{http_code} %{size_download}", url)
    assert (status, said) == (0, "206 4")


async def test_what_a_short_url_does_not_name_is_a_404(mirror: Mirror) -> None:
    """With the Hub's codes, as for long URLs; a directory is no file."""
    async with aiohttp.ClientSession() as session:
        for path, code in (
            ("/facebook/opt-6.7b/none.bin", "EntryNotFound"),
            ("/datasets/org/d/data", "EntryNotFound"),
            ("/facebook/none/config.json", "RepoNotFound"),
            ("/facebook", "NotRoutable"),
        ):
            async with session.head(mirror.url + path) as response:
                assert (response.status in (401, 404), response.headers["X-Error-Code"]) == (True, code)
        async with session.post(f"{mirror.url}/facebook/opt-6.7b/config.json") as response:
            assert response.status == 405


@pytest.mark.parametrize(
    ("page", "files"),
    [
        ("/facebook/opt-6.7b/tree/main/a'b%20%5B1%5D", {"a'b [1]/x y#?.bin"}),
        ("/datasets/org/d", {"data/train.bin", "data/a b.csv"}),
    ],
)
async def test_the_page_s_commands_do_what_they_say(mirror: Mirror, tmp_path: Path, page: str, files: set[str]) -> None:
    """As copied from a browser into a shell, on a machine that knows the mirror alone."""
    commands = await _commands(mirror.url + page)
    assert [re.sub(r"^\S+=\S+ ", "", command).split()[0] for command in commands] == ["hf", "git", "aria2c"]
    home = made(tmp_path / "home")
    env = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "NO_PROXY": "*",
        "no_proxy": "*",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }
    ends = await asyncio.gather(
        *(
            run_client("env", "-i", *(f"{k}={v}" for k, v in env.items()), "bash", "-euc", command, cwd=made(tmp_path / name))
            for name, command in zip(("hf", "git", "aria2c"), commands, strict=True)
        )
    )
    assert [status for status, _ in ends] == [0, 0, 0], ends
    [snapshot] = (home / "hf" / "hub").glob("*/snapshots/*")
    assert {file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()} == files
    [largest] = (tmp_path / "aria2c").iterdir()
    assert largest.name in {Path(file).name for file in files}
    [clone] = (tmp_path / "git").iterdir()
    assert all((clone / file).is_file() for file in files)


async def _commands(url: str) -> list[str]:
    async with aiohttp.ClientSession() as session, session.get(URL(url, encoded=True)) as response:
        return [unescape(command) for command in re.findall(r"<pre><code>(.*?)</code></pre>", await response.text())]


async def test_a_browser_shows_the_page_wide_and_narrow_and_runs_nothing_of_a_repo_s(mirror: Mirror, hub: Hub) -> None:
    """Hostile names included: no dialog, no error, nothing cut off; Copy copies; links lead down and up.

    Without scripts all but the buttons is there.
    """
    names = ("<script>alert(1)<", "<img src=x onerror=alert(1)>", "n" * 300, "photo\u202egpj.exe", "\"' onload=alert(1) x='")
    hub.repo("org/evil").commit({f"sub/{name}": b"x" for name in names} | {"README.md": b"x"})
    complaints: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (1280, 400):
            page = await browser.new_page(viewport={"width": width, "height": 800})
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda message: complaints.append(message.text))
            page.on("dialog", lambda dialog: complaints.append(dialog.message))
            page.on("request", lambda asked: asked.url.startswith(mirror.url) or complaints.append(asked.url))
            await page.goto(f"{mirror.url}/org/evil")
            await _looked_at(page)
            await page.get_by_role("link", name="sub/").click()
            await expect(page.get_by_role("row")).to_have_count(1 + len(names))
            await _looked_at(page)
            await page.get_by_role("navigation", name="Directory").get_by_role("link", name="evil").click()
            await expect(page).to_have_url(f"{mirror.url}/org/evil")
            await page.close()
        page = await browser.new_page(java_script_enabled=False)
        await page.goto(f"{mirror.url}/facebook/opt-6.7b")
        await expect(page.get_by_role("row")).to_have_count(4)
        await expect(page.locator("pre")).to_have_count(3)
        await expect(page.get_by_role("button")).to_have_count(0)
        await browser.close()
    assert complaints == []


async def _looked_at(page: Page) -> None:
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert await page.evaluate("getComputedStyle(document.querySelector('table')).borderCollapse") == "collapse"
    await page.get_by_role("button", name="Copy").first.click()
    await expect(page.get_by_role("button", name="Copied")).to_have_count(1)
