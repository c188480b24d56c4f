"""The operator's verbs as a user types them: on a running mirror through admin.sock, and on the directory when none runs."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.hub import LFS, Content, Hub, User
from tests.mirror import Mirror, configure, run_client, running

SHARED = Content(3_000_000, seed=1)
OWN = Content(1_000_000, seed=2)
NO_SMUDGE = {"GIT_LFS_SKIP_SMUDGE": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}


@dataclass
class Desk:
    """A cache with two repos that share a blob, and the command line."""

    cache: Path
    hub: Hub
    mirror: Mirror | None = None

    async def run(self, *arguments: str, status: int = 0) -> str:
        """`nearhub …` on this cache; its output."""
        command = (sys.executable, "-m", "nearhub", arguments[0], "--cache-dir", str(self.cache), *arguments[1:])
        got, output = await run_client(*command)
        assert got == status, output
        return output

    async def ask(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(await self.run(*arguments, "--json", status=status))

    async def get(self, path: str, method: str = "GET") -> aiohttp.ClientResponse:
        assert self.mirror is not None
        async with aiohttp.ClientSession() as session, session.request(method, self.mirror.url + path) as response:
            await response.read()
            await self.mirror.settled()
            return response

    def blob(self, content: Content) -> Path:
        digest = content.sha256
        return self.cache / "blobs" / "sha256" / digest[:2] / digest[2:4] / digest


@asynccontextmanager
async def desk(folder: Path) -> AsyncIterator[Desk]:
    """Both repos were downloaded; the mirror runs."""
    async with Hub() as hub:
        hub.repo("org/one").commit({"config.json": b"{}", "shared.bin": LFS(SHARED)})
        hub.repo("org/two", "datasets").commit({"own.bin": LFS(OWN), "shared.bin": LFS(SHARED), "not-asked.txt": b"x"})
        one = Desk(folder / "cache", hub)
        async with running(configure(one.cache, [hub.url], [hub.cdn_host])) as one.mirror:
            for path in ("/org/one", "/datasets/org/two"):
                names = ("config.json", "shared.bin") if path == "/org/one" else ("own.bin", "shared.bin")
                for name in names:
                    assert (await one.get(f"{path}/resolve/main/{name}")).status == 200
            yield one


async def on_directory_too(one: Desk, *arguments: str) -> tuple[Any, Any]:
    """What a verb says of the running mirror, and of a copy of the directory that nobody serves."""
    live = await one.ask(*arguments)
    copy = Desk(one.cache.with_name("copy"), one.hub)
    await run_client("cp", "-a", str(one.cache), str(copy.cache))
    return live, await copy.ask(*arguments)


async def test_ls_and_du_say_the_same_of_a_running_mirror_and_of_the_directory(tmp_path: Path) -> None:
    """Each repo with what it has and what is cached; bytes that repos share are told apart."""
    async with desk(tmp_path) as one:
        live, still = await on_directory_too(one, "ls")
        assert live == still
        rows = {row["repo"]: row for row in live}
        assert (rows["org/one"]["cached_files"], rows["org/one"]["files"]) == (2, 2)
        assert (rows["datasets/org/two"]["cached_files"], rows["datasets/org/two"]["files"]) == (2, 3)
        assert rows["datasets/org/two"]["cached_bytes"] == SHARED.size + OWN.size
        assert rows["org/one"]["revisions"] == ["main"]
        assert "datasets/org/two" not in await one.run("ls", "org/one")
        live, still = await on_directory_too(one, "du")
        assert live["repos"] == still["repos"] and live["bytes"]["complete"] == still["bytes"]["complete"]
        assert live["blobs"] == 3 and live["bytes"]["complete"] >= SHARED.size + OWN.size + 2
        assert live["bytes"]["unlisted"] == 0
        [own] = [row["own"] for row in live["repos"] if row["repo"] == "datasets/org/two"]
        assert OWN.size <= own < OWN.size + 8192


@pytest.mark.parametrize("is_running", [True, False])
async def test_purge_takes_what_only_this_repo_has(tmp_path: Path, is_running: bool) -> None:
    """Shared content stays, a dry run takes nothing, and a purged repo is served again when it is asked for."""
    async with desk(tmp_path) as one:
        where = one
        if not is_running:
            where = Desk(tmp_path / "copy", one.hub)
            await run_client("cp", "-a", str(one.cache), str(where.cache))
        would = await where.ask("purge", "--dry-run", "datasets/org/two")
        assert where.blob(OWN).exists() and would["removed"] == 1 and would["shared"] == 1
        done = await where.ask("purge", "datasets/org/two")
        assert done == would | {"dry_run": False}
        assert not where.blob(OWN).exists() and where.blob(SHARED).exists()
        assert [row["repo"] for row in await where.ask("ls")] == ["org/one"]
        assert "nothing of datasets/org/two" in await where.run("purge", "datasets/org/two", status=1)
        if is_running:
            assert (await one.get("/datasets/org/two/resolve/main/own.bin")).status == 200
            assert one.blob(OWN).exists()


async def test_a_private_repo_is_listed_and_purged_like_any_other(tmp_path: Path) -> None:
    """Under the name that it was asked for by, too, which only who may see it could learn."""
    async with desk(tmp_path) as one:
        assert one.mirror is not None
        one.hub.repo("Org/Private", private=True).commit({"secret.bin": LFS(Content(1_000_000, seed=9))})
        one.hub.users["hf_alice"] = User("alice", {"Org/Private"})
        url, headers = f"{one.mirror.url}/org/private/resolve/main/secret.bin", {"Authorization": "Bearer hf_alice"}
        async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as response:
            assert response.status == 200
            await response.read()
        await one.mirror.settled()
        [row] = await one.ask("ls", "org/private")
        assert (row["repo"], row["cached_files"]) == ("Org/Private", 1)
        assert one.blob(Content(1_000_000, seed=9)).exists()
        assert (await one.ask("purge", "org/private"))["removed"] == 1
        assert not one.blob(Content(1_000_000, seed=9)).exists()
        assert await one.ask("ls", "org/private") == []


async def test_a_git_mirror_is_counted_explained_and_purged_with_its_repo(tmp_path: Path) -> None:
    async with desk(tmp_path) as one:
        assert one.mirror is not None
        status, output = await run_client("git", "clone", f"{one.mirror.url}/org/one", str(tmp_path / "clone"), env=NO_SMUDGE)
        assert status == 0, output
        live, still = await on_directory_too(one, "du")
        assert live["repos"] == still["repos"] and live["bytes"]["git"] == still["bytes"]["git"] > 0
        assert {row["repo"]: row["git"] > 0 for row in live["repos"]} == {"org/one": True, "datasets/org/two": False}
        assert " bytes in " in await one.run("why", "/org/one.git/info/refs")
        assert "no mirror of it yet" in await one.run("why", "/datasets/org/two.git/info/refs")
        assert "an LFS object of org/one" in await one.run("why", f"/-/lfs/models/org/one/{SHARED.sha256}")
        (bare,) = (one.cache / "git").glob("*/*.git")
        assert (await one.ask("purge", "--dry-run", "org/one"))["removed"] == 2  # config.json, and the mirror
        assert bare.is_dir()
        await one.ask("purge", "org/one")
        assert not bare.exists()
        assert "no git mirror tools.git" in await one.run("purge", "tools.git", status=1)


async def test_purge_of_a_revision_and_of_a_blob(tmp_path: Path) -> None:
    """One revision goes and the others stay; a blob goes by its hash, whoever has it."""
    async with desk(tmp_path) as one:
        one.hub.repo("org/one").commit({"config.json": b"{}", "shared.bin": LFS(OWN)}, revision="dev")
        assert (await one.get("/org/one/resolve/dev/shared.bin")).status == 200
        assert (await one.ask("purge", "org/one@dev"))["removed"] == 0
        assert [row["revisions"] for row in await one.ask("ls", "org/one")] == [["main"]]
        assert (await one.ask("purge", "--blob", SHARED.sha256))["removed"] == 1
        assert not one.blob(SHARED).exists()
        assert "neither a sha256 nor a git blob sha1" in await one.run("purge", "--blob", "abc", status=1)


@pytest.mark.parametrize("is_running", [True, False])
async def test_verify_finds_a_flipped_bit_and_removes_the_blob(tmp_path: Path, is_running: bool) -> None:
    """All right first; then one wrong blob is named, the exit status is 1, and a client gets the right bytes again."""
    async with desk(tmp_path) as one:
        where = one
        if not is_running:
            where = Desk(tmp_path / "copy", one.hub)
            await run_client("cp", "-a", str(one.cache), str(where.cache))
        assert (await where.ask("verify"))["bad"] == []
        path = where.blob(OWN)
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(500_000)
            file.write(bytes([file.read(1)[0] ^ 1]))
        assert "WRONG" in await where.run("verify", status=1)
        assert not path.exists() and where.blob(SHARED).exists()
        assert (await where.ask("verify"))["bad"] == []
        if is_running:
            response = await one.get("/datasets/org/two/resolve/main/own.bin")
            assert response.status == 200 and path.exists()


async def test_why_tells_of_a_url_without_asking_upstream_and_of_a_request_by_its_id(tmp_path: Path) -> None:
    """Rule, age of the ref, manifest, content, upstream; and what was decided for one answered request."""
    async with desk(tmp_path) as one:
        before = len(one.hub.log)
        assert one.mirror is not None
        told = "\n".join((await one.ask("why", f"{one.mirror.url}/org/one/resolve/main/shared.bin"))["why"])
        for expected in ("seen in public", "main was", "all its files", SHARED.sha256, "complete, in", one.hub.url):
            assert expected in told
        told = "\n".join((await one.ask("why", "/org/one/resolve/main/absent"))["why"])
        assert "not in the manifest: 404" in told
        told = "\n".join((await one.ask("why", "/org/never/resolve/main/x"))["why"])
        assert "never seen in public" in told
        told = "\n".join((await one.ask("why", "/org/one/resolve/main/../x"))["why"])
        assert "refused: 400" in told
        assert len(one.hub.log) == before
        response = await one.get("/datasets/org/two/resolve/main/not-asked.txt")
        past = await one.ask("why", response.headers["X-Request-Id"])
        assert past["outcome"] == "200" and past["path"] == "/datasets/org/two/resolve/main/not-asked.txt"
        assert any("ref main" in line for line in past["why"])
        assert any("a fill brings it" in line for line in past["why"])
        assert "neither a URL nor the id" in await one.run("why", "nonsense", status=1)


async def test_stats_are_the_running_mirrors_counters(tmp_path: Path) -> None:
    async with desk(tmp_path) as one:
        stats = await one.ask("stats")
        assert stats["running"] and stats["counters"]["nearhub_fills_total{outcome=complete}"] == 3
        assert stats["upstreams"][0]["url"] == one.hub.url
        copy = Desk(tmp_path / "copy", one.hub)
        await run_client("cp", "-a", str(one.cache), str(copy.cache))
        assert "no mirror runs" in await copy.run("stats")


async def test_the_socket_is_its_owners_alone_and_gone_after_a_stop(tmp_path: Path) -> None:
    """0600 in a directory of 0700; reachable under a path longer than sockets may have; a dead mirror's is no hindrance."""
    folder = tmp_path / ("x" * 60) / ("y" * 60)
    folder.mkdir(parents=True)
    async with desk(folder) as one:
        socket = one.cache / "admin.sock"
        assert socket.stat().st_mode & 0o777 == 0o600
        assert (await one.ask("stats"))["running"]
    assert not socket.exists()
    await asyncio.to_thread(_leave_dead_socket, socket.parent)
    assert [row["repo"] for row in await one.ask("ls")] == ["datasets/org/two", "org/one"]


def _leave_dead_socket(cache: Path) -> None:
    import socket

    from nearhub.web.admin import reachable

    with socket.socket(socket.AF_UNIX) as dead, reachable(cache) as path:
        dead.bind(str(path))


async def test_a_cache_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    nowhere = Desk(tmp_path / "nowhere", Hub())
    assert "there is no cache here" in await nowhere.run("ls", status=1)
    assert not nowhere.cache.exists()
