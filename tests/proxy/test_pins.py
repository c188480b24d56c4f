"""Pins: what they keep as branches move, through evictions, purges, restarts, and when upstream closes the repo."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.errors import BadTarget
from nearhub.pins import kept, moved
from tests.clients.test_git import NO_ONE
from tests.hub import LFS, Content, Hub
from tests.mirror import Mirror, configure, run_client, running
from tests.proxy.test_verbs import Desk

BIG = Content(2_000_000, seed=1)
NEXT = Content(2_000_000, seed=2)
OTHER = [Content(2_000_000, seed=seed) for seed in range(10, 14)]

commits = st.lists(st.sampled_from("abcdef"), max_size=12)


@given(commits, st.integers(1, 3), st.sets(st.sampled_from("abcdef")))
def test_a_branch_keeps_its_last_commits_and_one_more_until_the_newest_is_whole(
    history: list[str], last: int, whole: set[str]
) -> None:
    """However it moves, back and forth: newest first, none twice, and never nothing that is whole while there was something."""
    named: tuple[str, ...] = ()
    for commit in history:
        named = moved(named, commit, last)
        assert named[0] == commit and len(set(named)) == len(named)
    is_whole = bool(named) and named[0] in whole
    chosen = kept(named, last, is_whole=is_whole)
    assert chosen == named[: len(chosen)]
    assert len(chosen) == min(len(named), last if is_whole else last + 1)


async def get(mirror: Mirror, path: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(mirror.url + path) as response:
        await response.read()
    await mirror.settled()
    return response.status


async def test_the_pinned_is_never_evicted_and_the_unpinned_is(hub: Hub, tmp_path: Path) -> None:
    """A cache with room for three files, a pinned one used longest ago, and four more; unpinned, it is the next to leave."""
    for number, content in enumerate([BIG, *OTHER]):
        hub.repo(f"org/m{number}").commit({"a.bin": LFS(content)})
    desk = Desk(tmp_path / "cache", hub)
    config = configure(desk.cache, [hub.url], [hub.cdn_host], CACHE_MAX_SIZE="7MB")
    async with running(config) as mirror:
        assert await get(mirror, "/org/m0/resolve/main/a.bin") == 200
        assert "nothing of org/never" in await desk.run("pin", "org/never", status=1)
        (row,) = await desk.ask("pin", "org/m0", "--group", "base")
        assert (row["cached_bytes"], row["was_public"]) == (BIG.size, True)
        for number in range(1, 5):
            assert await get(mirror, f"/org/m{number}/resolve/main/a.bin") == 200
        assert desk.blob(BIG).exists() and not desk.blob(OTHER[0]).exists()
        assert (await mirror.front.operations.ls("org/m0"))[0]["pins"] == ["org/m0"]
        assert (await mirror.front.operations.du())["bytes"]["pinned"] >= BIG.size
        (row,) = await desk.ask("pin", "--list")
        assert row["group"] == "base"
    async with running(config) as mirror:  # a pin outlives the process
        for number in range(1, 5):
            assert await get(mirror, f"/org/m{number}/resolve/main/a.bin") == 200
        assert desk.blob(BIG).exists()
        await desk.run("unpin", "--group", "base")
        assert await mirror.front.operations.pins() == []
        for number in range(1, 5):
            assert await get(mirror, f"/org/m{number}/resolve/main/a.bin") == 200
        assert not desk.blob(BIG).exists()


async def test_what_does_not_fit_beside_the_pinned_streams_through_and_evicts_nobody(hub: Hub, tmp_path: Path) -> None:
    """Nobody leaves for what could not fit anyway."""
    hub.repo("org/m0").commit({"a.bin": LFS(Content(4_000_000, seed=20))})
    hub.repo("org/m1").commit({"a.bin": LFS(BIG)})
    hub.repo("org/m2").commit({"a.bin": LFS(Content(4_500_000, seed=21))})
    desk = Desk(tmp_path / "cache", hub)
    async with running(configure(desk.cache, [hub.url], [hub.cdn_host], CACHE_MAX_SIZE="7MB")) as mirror:
        assert await get(mirror, "/org/m0/resolve/main/a.bin") == 200
        assert await get(mirror, "/org/m1/resolve/main/a.bin") == 200
        await mirror.front.operations.pin("org/m0")
        assert await get(mirror, "/org/m2/resolve/main/a.bin") == 200
        assert desk.blob(BIG).exists()


async def test_a_pinned_branch_that_moves(hub: Hub, tmp_path: Path) -> None:
    """The old commit is kept until all of the new one is here; then the new one alone; with --last 2 both."""
    repo = hub.repo("org/m")
    old = repo.commit({"a.bin": LFS(BIG)})
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="1ms")) as mirror:

        async def commits() -> list[str]:
            (row,) = await mirror.front.operations.pins()
            return [str(commit) for commit in row["commits"]]

        async def became(*expected: str) -> None:
            """Until these are the pin's commits: what an answer changed is worked out behind it."""
            async with asyncio.timeout(20):
                while set(await commits()) != set(expected):
                    pass

        async def pinned(files: int) -> None:
            """Until so many files are protected from eviction: what a fill or an answer changed is worked out behind it."""
            async with asyncio.timeout(20):
                while (await mirror.front.operations.du())["bytes"]["pinned"] // BIG.size != files:
                    pass

        assert await get(mirror, "/org/m/resolve/main/a.bin") == 200
        operations = mirror.front.operations
        await operations.pin("org/m", "main")
        assert await commits() == [old]
        new = repo.commit({"a.bin": LFS(NEXT)})
        assert await get(mirror, "/api/models/org/m/revision/main") == 200
        await became(old, new)
        await pinned(1)
        assert await get(mirror, f"/org/m/resolve/{new}/a.bin") == 200
        await became(new)
        await pinned(1)
        await operations.pin("org/m", last=2)
        assert set(await commits()) == {old, new}
        await pinned(2)
        await operations.unpin("org/m", "main")
        await operations.pin("org/m", old)
        assert await commits() == [old]
        with pytest.raises(BadTarget, match="a commit has no last ones"):
            await operations.pin("org/m", old, last=2)


async def test_purge_refuses_what_is_pinned(hub: Hub, tmp_path: Path) -> None:
    """By repo, by revision, by blob; --force removes it, and the pins that are about nothing else."""
    hub.repo("org/m").commit({"a.bin": LFS(BIG)})
    hub.repo("org/two").commit({"a.txt": b"a"})
    desk = Desk(tmp_path / "cache", hub)
    async with running(configure(desk.cache, [hub.url], [hub.cdn_host])) as mirror:
        assert await get(mirror, "/org/m/resolve/main/a.bin") == 200
        assert await get(mirror, "/api/models/org/two") == 200
        operations = mirror.front.operations
        await operations.pin("org/m", "main")
        for what in (("org/m",), ("org/m", "main"), ("", "", BIG.sha256)):
            with pytest.raises(BadTarget, match="pinned"):
                await operations.purge(*what)
        assert (await operations.purge("org/m", dry_run=True))["removed"] == 1
        assert desk.blob(BIG).exists()
        assert (await operations.purge("org/m", force=True))["removed"] == 1
        assert not desk.blob(BIG).exists() and await operations.pins() == []
        with pytest.raises(BadTarget, match="no pin of org/m"):
            await operations.unpin("org/m")
        await operations.pin("org/two")
        with pytest.raises(BadTarget, match="or a group"):  # and not all pins that are in none
            await operations.unpin("")
        assert len(await operations.pins()) == 1


async def test_on_the_directory_when_no_mirror_runs(hub: Hub, tmp_path: Path) -> None:
    hub.repo("org/m").commit({"a.bin": LFS(BIG)})
    desk = Desk(tmp_path / "cache", hub)
    async with running(configure(desk.cache, [hub.url], [hub.cdn_host])) as mirror:
        assert await get(mirror, "/org/m/resolve/main/a.bin") == 200
    await desk.run("pin", "org/m@main", "--last", "2")
    assert "--force" in await desk.run("purge", "org/m", status=1)
    assert "org/m@main" in await desk.run("pin", "--list")
    await desk.run("purge", "org/m", "--force")
    assert not desk.blob(BIG).exists()


@pytest.mark.parametrize("how", ["deleted", "made private", "gated"])
async def test_a_repo_pinned_while_it_was_public_stays_open_when_upstream_closes_it(hub: Hub, tmp_path: Path, how: str) -> None:
    """P5: the pinned one is served as it was, to files, API and git. Its twin, not pinned, is not; nor once unpinned."""
    for name in ("kept", "lost"):
        hub.repo(f"org/{name}").commit({"a.bin": LFS(BIG), "sub/config.json": b"{}"})
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="1ms", AUDIT_ENABLED="true")
    async with running(config) as mirror:
        for name in ("kept", "lost"):
            assert await get(mirror, f"/org/{name}/resolve/main/a.bin") == 200
        assert (await run_client("git", "clone", "-q", f"{mirror.url}/org/kept", str(tmp_path / "one"), env=NO_ONE))[0] == 0
        await mirror.front.operations.pin("org/kept")
    for name in ("kept", "lost"):
        repo = hub.repo(f"org/{name}")
        match how:
            case "deleted":
                repo.delete()
            case "made private":
                repo.private = True
            case "gated":
                repo.gated = "manual"
    # More than a minute later, as far as visibility is concerned: nothing is believed from before.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearhub.access.PUBLIC_TTL_S", 0.0)
        async with running(config) as mirror:
            refused = 401 if how == "gated" else 404
            assert await get(mirror, "/org/lost/resolve/main/a.bin") in (401, refused)
            for _ in range(2):
                for path in (
                    "/org/kept/resolve/main/a.bin",
                    "/org/kept/resolve/main/sub/config.json",
                    "/api/models/org/kept",
                    "/api/models/org/kept/tree/main?recursive=true",
                    "/api/models/org/kept/refs",
                ):
                    if path.endswith("config.json") and how != "gated":
                        continue  # which was never asked for, and cannot be had any more
                    assert await get(mirror, path) == (401 if path.endswith("config.json") else 200), path
            status, said = await run_client("git", "clone", "-q", f"{mirror.url}/org/kept", str(tmp_path / "two"), env=NO_ONE)
            assert status == 0, said
            await mirror.front.operations.offline("on")
            async with aiohttp.ClientSession() as session, session.get(f"{mirror.url}/api/models?author=org") as response:
                assert [one["id"] for one in await response.json()] == (
                    ["org/kept", "org/lost"] if how == "gated" else ["org/kept"]
                )
            await mirror.front.operations.offline("off")
            await mirror.front.operations.unpin("org/kept")
            assert await get(mirror, "/org/kept/resolve/main/a.bin") in (401, 404)
    told = (tmp_path / "cache" / "audit" / "audit-00000001.jsonl").read_text()
    assert '"grounds":"pin"' in told and '"repo":"org/lost"' in told


async def test_a_pin_of_a_gated_repo_opens_nothing(hub: Hub, tmp_path: Path) -> None:
    """Only what was public when it was pinned stays so."""
    hub.repo("org/m", gated="auto").commit({"config.json": b"{}"})
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror:
        assert await get(mirror, "/api/models/org/m") == 200
        (row,) = await mirror.front.operations.pin("org/m")
        assert row["was_public"] is False
        assert await get(mirror, "/org/m/resolve/main/config.json") == 401
