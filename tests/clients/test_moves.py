"""P1c: a branch moves while clients download. No file is ever a splice of two commits, whoever resumes, and how late."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from tests.clients.programs import ALL, ARIA_4, ARIA_16, CURL_RESUMING, ELSEWHERE, HF, HF_OLD, MIB, WGET, Client, Got, Want
from tests.clients.scene import besides
from tests.hub import LFS, Content, Fault, Hub
from tests.mirror import MirrorProcess, configure, running

SIZE = 24 * MIB
OLD = Content(SIZE, seed=31)
NEW = Content(SIZE, seed=32)
LONGER = Content(SIZE + 3 * MIB, seed=33)
URL = "/org/m/resolve/main/model.bin"


@pytest.mark.parametrize("new", [NEW, LONGER], ids=["same length", "longer"])
async def test_a_get_after_a_head_is_of_the_same_commit(hub: Hub, tmp_path: Path, new: Content) -> None:
    """The branch moves between the two: HEAD's answer holds for the GET and for ranges; others have the new one."""
    repo = hub.repo("org/m")
    old_commit = repo.commit({"model.bin": LFS(OLD)})
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="1ms")
    async with running(config) as mirror, aiohttp.ClientSession() as session:
        async with session.head(mirror.url + URL) as head:
            assert head.headers["X-Repo-Commit"] == old_commit
        new_commit = repo.commit({"model.bin": LFS(new)})
        async with session.get(mirror.url + URL) as response:
            assert response.headers["X-Repo-Commit"] == old_commit
            assert response.headers["ETag"] == head.headers["ETag"] == f'"{OLD.sha256}"'
            assert await response.read() == OLD.bytes()
        async with session.get(mirror.url + URL, headers={"Range": f"bytes={SIZE - 9}-"}) as response:
            assert response.headers["X-Repo-Commit"] == old_commit
            assert await response.read() == OLD.bytes(SIZE - 9)
        stale = {"Range": f"bytes={MIB}-", "If-Range": f'"{OLD.sha256}"'}
        async with session.get(mirror.url + URL, headers=stale) as response:
            assert response.status in (200, 206)
            known = {old_commit: OLD, new_commit: new}[response.headers["X-Repo-Commit"]]
            assert (response.status == 206) == (known is OLD)
            assert await response.read() == known.bytes(MIB if known is OLD else 0)
        another = {"User-Agent": "another program at the same address"}
        async with session.head(mirror.url + URL, headers=another) as head:
            assert head.headers["X-Repo-Commit"] == new_commit
        async with session.get(mirror.url + URL, headers=another) as response:
            assert await response.read() == new.bytes()


@pytest.mark.parametrize("client", [HF, HF_OLD], ids=str)
async def test_hf_gets_what_its_head_promised(hub: Hub, tmp_path: Path, client: Client) -> None:
    """The branch moves after the Hub has answered what a HEAD needs, and before huggingface_hub has sent its GET."""
    repo = hub.repo("org/m")
    repo.commit({"model.bin": LFS(OLD), "config.json": b"{}"})
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="1ms")
    async with running(config) as mirror:
        # The repo is known to be public, so that one question upstream is all that the client's HEAD waits for.
        assert (await ELSEWHERE.get(Want(mirror.url, "org/m", "config.json"), tmp_path / "elsewhere")).is_claimed
        hub.log.clear()
        task = asyncio.create_task(client.get(Want(mirror.url, "org/m", "model.bin"), tmp_path / "home"))
        await hub.until(lambda: any(one.done for one in hub.log.find("hub", match="/revision/main")), timeout_s=60)
        repo.commit({"model.bin": LFS(NEW)})
        got = await task
        assert got.verdict(OLD.sha256) == "right"
        assert got.file.resolve().name == OLD.sha256


async def test_a_branch_that_moves_while_all_download(hub: Hub, tmp_path: Path) -> None:
    """Every client, while the branch of its repo goes from commit to commit and back: each file is one of them, whole."""
    repos = {client: hub.repo(f"org/for-{client.name.strip('-')}") for client in ALL}
    commits = {repo: [repo.commit({"model.bin": LFS(content)}) for content in (OLD, NEW, LONGER)] for repo in repos.values()}
    for repo, three in commits.items():
        repo.move("main", three[0])
    hub.cap(per_connection=1.5 * MIB)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="1ms", FILL_CONNECTIONS="4")
    async with running(config) as mirror:
        wants = {client: Want(mirror.url, repo.id, "model.bin") for client, repo in repos.items()}
        tasks = [asyncio.create_task(client.get(want, tmp_path / client.name)) for client, want in wants.items()]
        for number in range(1, 7):
            await hub.until(lambda seen=number: hub.counters.bytes("cdn") > seen * 3 * MIB, timeout_s=60)  # type: ignore[misc]
            for repo, three in commits.items():
                repo.move("main", three[number % 3])
        gots = await asyncio.gather(*tasks)
    verdicts = {client.name: got.verdict(OLD.sha256, NEW.sha256, LONGER.sha256) for client, got in zip(ALL, gots, strict=True)}
    assert besides(verdicts, "right") == {}


@pytest.mark.parametrize(
    ("client", "neighbour_agent"),
    [(ARIA_4, "a browser"), (ARIA_16, "aria2/1.36.0")],
    ids=["another program", "the same program"],
)
async def test_a_neighbour_at_the_same_address_moves_nobody(
    hub: Hub, tmp_path: Path, client: Client, neighbour_agent: str
) -> None:
    """aria2c is under way when the branch moves and its neighbour asks for the new state: its ranges stay on its commit."""
    repo = hub.repo("org/m")
    repo.commit({"model.bin": LFS(OLD)})
    hub.cap(per_connection=1.5 * MIB)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="1ms", FILL_CONNECTIONS="4")
    async with running(config) as mirror, aiohttp.ClientSession() as neighbour:
        task = asyncio.create_task(client.get(Want(mirror.url, "org/m", "model.bin"), tmp_path / "home"))
        await hub.until(lambda: hub.counters.bytes("cdn") > 6 * MIB, timeout_s=60)
        repo.commit({"model.bin": LFS(NEW)})
        for method in ("HEAD", "GET"):
            async with neighbour.request(method, mirror.url + URL, headers={"User-Agent": neighbour_agent}) as response:
                assert response.status == 200
        assert besides({client.name: (await task).verdict(OLD.sha256)}, "right", "failed") == {}


@pytest.mark.parametrize("restarted", [False, True], ids=["same process", "mirror restarted"])
async def test_a_resume_after_a_move_is_no_splice(hub: Hub, tmp_path: Path, restarted: bool) -> None:
    """Cut at a third, the branch moves, the mirror is killed and started again or not, the client resumes by Range."""
    repo = hub.repo("org/m")
    repo.commit({"model.bin": LFS(OLD)})
    stall = hub.faults.add(Fault.stall(at=SIZE // 3), on="cdn")
    extra = {"UPSTREAM_REF_TTL": "1ms", "FILL_CONNECTIONS": "1"}
    process = MirrorProcess(tmp_path / "cache", [hub.url], [hub.cdn_host], extra)
    clients = (CURL_RESUMING, WGET, ARIA_4, ARIA_16)
    with process:
        want = Want(process.url, "org/m", "model.bin")

        async def all_get(silence_s: int, tries: int) -> list[Got]:
            patient = [client.impatient(silence_s, tries) for client in clients]
            return await asyncio.gather(*(client.get(want, tmp_path / client.name) for client in patient))

        first = await all_get(4, 1)
        assert [got.is_claimed for got in first] == [False] * len(clients)
        assert all(got.size > 0 for got in first)
        repo.commit({"model.bin": LFS(NEW)})
        stall.release()
        hub.faults.clear()
        if restarted:
            process.kill()
            process.start()
        second = await all_get(30, 3)
        assert {c.name: got.verdict(OLD.sha256) for c, got in zip(clients, second, strict=True)} == {
            client.name: "right" for client in clients
        }
        got = await ELSEWHERE.get(want, tmp_path / "elsewhere")
        assert got.verdict(NEW.sha256) == "right"
