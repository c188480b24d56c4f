"""git itself against the mirror: clone, fetch and pull, cold, warm, after a push, and with upstream gone."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.hub import LFS, Content, Fault, Hub, User
from tests.mirror import Mirror, MirrorProcess, configure, run_client, running

NO_ONE = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_LFS_SKIP_SMUDGE": "1",
    **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "somebody"),
    **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "somebody@example.org"),
}


async def git(*arguments: str | Path, cwd: Path | None = None) -> str:
    """What git says; it must succeed."""
    status, output = await run_client("git", *map(str, arguments), env=NO_ONE, cwd=cwd)
    assert status == 0, output
    return output


async def refused(*arguments: str | Path, cwd: Path | None = None) -> str:
    """What git says; it must fail."""
    status, output = await run_client("git", *map(str, arguments), env=NO_ONE, cwd=cwd)
    assert status != 0, output
    return output


async def head(clone: Path) -> str:
    return (await git("rev-parse", "HEAD", cwd=clone)).strip()


def fast_import(repository: Path, stream: Path) -> None:
    with stream.open("rb") as file:
        subprocess.run(["git", "-C", repository, "fast-import", "--quiet"], stdin=file, check=True)


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    async with Hub() as hub:
        repo = hub.repo("org/m")
        repo.commit({"config.json": b'{"a": 1}', "sub/notes.txt": b"one\n"})
        repo.commit({"sub/notes.txt": b"two\n", "model.bin": LFS(Content(300_000, 1))})
        yield hub


@pytest.fixture(params=["", "/huggingface-proxy"], ids=["root", "prefix"])
async def mirror(hub: Hub, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Mirror]:
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], SERVER_PREFIX=request.param)) as mirror:
        yield mirror


def asked(hub: Hub) -> int:
    """How often git asked upstream for anything: each ls-remote and each fetch begins with one of these."""
    return hub.counters.requests(match="/info/refs")


@pytest.mark.parametrize("version", ["0", "2"])
@pytest.mark.parametrize("name", ["org/m", "org/m.git"])
async def test_a_clone_has_what_the_hub_has(hub: Hub, mirror: Mirror, tmp_path: Path, version: str, name: str) -> None:
    """Commit, history, tree and files; an LFS file as its pointer. Cold: a look and a fetch; warm: nothing."""
    await git("-c", f"protocol.version={version}", "clone", f"{mirror.url}/{name}", tmp_path / "cold")
    repo = hub.repo("org/m")
    assert await head(tmp_path / "cold") == repo.refs["refs/heads/main"]
    assert len((await git("log", "--format=%H", cwd=tmp_path / "cold")).split()) == len(repo.commits)
    assert (tmp_path / "cold" / "sub" / "notes.txt").read_bytes() == b"two\n"
    assert (tmp_path / "cold" / "model.bin").read_bytes().startswith(b"version https://git-lfs")
    assert asked(hub) == 2
    await git("-c", f"protocol.version={version}", "clone", f"{mirror.url}/{name}", tmp_path / "warm")
    assert await head(tmp_path / "warm") == await head(tmp_path / "cold")
    assert asked(hub) == 2


async def test_a_dataset_and_a_space_are_cloned_by_their_paths(hub: Hub, mirror: Mirror, tmp_path: Path) -> None:
    for kind in ("datasets", "spaces"):
        hub.repo("org/m", kind).commit({"README.md": kind.encode()})
        await git("clone", f"{mirror.url}/{kind}/org/m", tmp_path / kind)
        assert (tmp_path / kind / "README.md").read_text() == kind


async def test_a_shallow_and_a_partial_clone_get_the_rest_later(hub: Hub, mirror: Mirror, tmp_path: Path) -> None:
    shallow, partial = tmp_path / "shallow", tmp_path / "partial"
    await git("clone", "--depth=1", f"{mirror.url}/org/m", shallow)
    assert len((await git("log", "--format=%H", cwd=shallow)).split()) == 1
    await git("fetch", "--unshallow", cwd=shallow)
    assert len((await git("log", "--format=%H", cwd=shallow)).split()) == len(hub.repo("org/m").commits)
    await git("clone", "--filter=blob:none", f"{mirror.url}/org/m", partial)
    missing = await git("rev-list", "--objects", "--all", "--missing=print", cwd=partial)
    assert "?" in missing
    assert await git("show", "HEAD~1:sub/notes.txt", cwd=partial) == "one\n"


async def test_many_clones_at_once_cost_one_fetch(hub: Hub, mirror: Mirror, tmp_path: Path) -> None:
    await asyncio.gather(*(git("clone", "-q", f"{mirror.url}/org/m", tmp_path / str(number)) for number in range(20)))
    assert asked(hub) == 2
    assert {await head(tmp_path / str(number)) for number in range(20)} == {hub.repo("org/m").refs["refs/heads/main"]}


async def test_a_fetch_that_fails_once_is_not_noticed_and_one_that_fails_twice_is_tried_again_by_the_next(
    hub: Hub, tmp_path: Path
) -> None:
    """What failed for upstream's short troubles says nothing about the repo."""
    for name in ("org/once", "org/twice"):
        hub.repo(name).commit({"x": b"x"})
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror:
        hub.faults.add(Fault.status(503), match="org/once/git-upload-pack", after=2, times=1)
        await git("clone", f"{mirror.url}/org/once", tmp_path / "once")
        hub.faults.add(Fault.status(503), match="org/twice/git-upload-pack", after=1, times=2)
        assert "answered 503" in await refused("clone", f"{mirror.url}/org/twice", tmp_path / "twice")
        await git("clone", f"{mirror.url}/org/twice", tmp_path / "twice")


async def test_many_refs_are_one_file(hub: Hub, tmp_path: Path) -> None:
    """And stay what they are in the next fetch, which finds a branch moved, and one tag where a hundred below its name were."""
    repo = hub.repo("org/m")
    tip = repo.refs["refs/heads/main"]
    for number in range(100):
        repo.tag(f"t/{number}", tip)
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="0s")) as mirror:
        for _ in range(2):
            listed = await git("ls-remote", "--refs", f"{mirror.url}/org/m")
            assert {line.partition("\t")[2]: line[:40] for line in listed.splitlines()} == repo.refs
            (bare,) = (tmp_path / "cache" / "git").glob("*/*.git")
            assert [path for path in (bare / "refs").rglob("*") if path.is_file()] == []
            for name in [name for name in repo.refs if name.startswith("refs/tags/")]:
                repo.drop_ref(name)
            repo.tag("t", repo.commit({"x": b"y"}))


async def test_a_pull_brings_what_was_pushed_upstream(hub: Hub, tmp_path: Path) -> None:
    """With refs of no age: a look each time, a fetch only when something changed; branches that went are gone here too."""
    repo, clone = hub.repo("org/m"), tmp_path / "clone"
    repo.commit({"x": b"x"}, revision="side")
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="0s")) as mirror:
        await git("clone", f"{mirror.url}/org/m", clone)
        before = asked(hub)
        await git("pull", cwd=clone)
        assert asked(hub) == before + 1
        pushed = repo.commit({"sub/notes.txt": b"three\n"})
        repo.drop_ref("refs/heads/side")
        await git("pull", "--prune", cwd=clone)
        assert asked(hub) == before + 3
        assert await head(clone) == pushed
        assert (clone / "sub" / "notes.txt").read_bytes() == b"three\n"
        assert "side" not in await git("branch", "-r", cwd=clone)


async def test_a_long_negotiation_comes_packed_and_is_understood(hub: Hub, tmp_path: Path) -> None:
    """Some hundred commits that the mirror never heard of: git packs its request with gzip then."""
    clone = tmp_path / "clone"
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="0s")) as mirror:
        await git("clone", f"{mirror.url}/org/m", clone)
        parent = await head(clone)
        many = "".join(
            f"commit refs/heads/main\ncommitter a <a@example.org> {2_000_000_000 + number} +0000\ndata 0\n"
            + (f"from {parent}\n" if number == 0 else "")
            for number in range(300)
        )
        (tmp_path / "many").write_text(many)
        await asyncio.to_thread(fast_import, clone, tmp_path / "many")
        pushed = hub.repo("org/m").commit({"new": b"new"})
        status, output = await run_client("git", "fetch", "origin", env={**NO_ONE, "GIT_TRACE_CURL": "1"}, cwd=clone)
    assert status == 0, output
    assert "content-encoding: gzip" in output.lower()
    assert (await git("rev-parse", "origin/main", cwd=clone)).strip() == pushed


async def test_with_upstream_gone_what_is_here_is_cloned_and_the_rest_refused_in_words(hub: Hub, tmp_path: Path) -> None:
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="0s")) as mirror:
        await git("clone", f"{mirror.url}/org/m", tmp_path / "before")
        await hub.stop()
        await git("clone", f"{mirror.url}/org/m", tmp_path / "after")
        assert await head(tmp_path / "after") == await head(tmp_path / "before")
        said = await refused("clone", f"{mirror.url}/org/unknown", tmp_path / "unknown")
        assert "remote: org/unknown is not in this mirror, and upstream cannot be asked" in said


async def test_an_answer_from_before_upstream_went_says_that_it_is_stale(hub: Hub, tmp_path: Path) -> None:
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="0s")) as mirror:
        await git("clone", f"{mirror.url}/org/m", tmp_path / "before")
        await hub.stop()
        status, output = await run_client(
            "curl", "-sD-", "-o/dev/null", f"{mirror.url}/org/m/info/refs?service=git-upload-pack"
        )
        assert status == 0 and "detail=stale" in output.lower().replace('"', ""), output


@pytest.mark.parametrize("name", ["org/private", "org/absent"])
async def test_who_brings_no_token_is_asked_for_one_and_a_wrong_one_is_refused_in_words(
    hub: Hub, mirror: Mirror, tmp_path: Path, name: str
) -> None:
    """As on the Hub; a private repo and one that is not there alike. Neither costs upstream's git anything."""
    hub.repo("org/private", private=True).commit({"x": b"secret"})
    hub.users["hf_bob"] = User("bob")
    assert "could not read Username" in await refused("clone", f"{mirror.url}/{name}", tmp_path / "clone")
    url = mirror.url.replace("://", "://bob:hf_bob@")
    said = await refused("clone", f"{url}/{name}", tmp_path / "clone")
    assert "remote: Repository not found" in said and "403" in said
    assert asked(hub) == 0


async def test_a_push_is_refused_in_words_and_never_forwarded(hub: Hub, mirror: Mirror, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    await git("clone", f"{mirror.url}/org/m", clone)
    await git("commit", "--allow-empty", "-m", "mine", cwd=clone)
    assert "remote: this is a read-only mirror: push to the Hub itself" in await refused("push", cwd=clone)
    assert hub.counters.requests(match="receive-pack") == 0


async def test_a_repo_of_another_host_is_cloned_by_its_name(hub: Hub, tmp_path: Path) -> None:
    """As `git clone http://mirror/lora-scripts-proxy.git`; the Hub is not asked for it."""
    async with Hub() as other:
        other.repo("somewhere/lora-scripts").commit({"train.sh": b"echo\n"})
        named = f"lora-scripts-proxy={other.url}/somewhere/lora-scripts.git"
        config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], GIT_MIRRORS=named, SERVER_PREFIX="/p")
        async with running(config) as mirror:
            for name in ("lora-scripts-proxy.git", "lora-scripts-proxy"):
                await git("clone", f"{mirror.url}/{name}", tmp_path / name)
                assert (tmp_path / name / "train.sh").read_bytes() == b"echo\n"
            _, output = await run_client(
                *("curl", "-s", "-XPOST", "-d{}", "-HContent-Type: application/vnd.git-lfs+json"),
                f"{mirror.url}/lora-scripts-proxy.git/info/lfs/objects/batch",
            )
            assert f"git config lfs.url {other.url}/somewhere/lora-scripts.git/info/lfs" in output
        assert hub.counters.requests() == 0


async def test_a_mirror_that_left_to_make_room_is_brought_anew(hub: Hub, tmp_path: Path) -> None:
    """Two repos of 30 MB of git objects each and room for one: the one used last stays."""
    for name in ("org/a", "org/b"):
        hub.repo(name).commit({f"{part}.bin": Content(10_000_000, part) for part in range(3)})
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], CACHE_MAX_SIZE="50MB")) as mirror:
        for round_, name in enumerate(("org/a", "org/b", "org/a")):
            await git("clone", "-q", "--bare", f"{mirror.url}/{name}", tmp_path / str(round_))
        assert mirror.metrics.evicted_blobs._value.get() >= 1
        assert await git("rev-parse", "HEAD", cwd=tmp_path / "2") == await git("rev-parse", "HEAD", cwd=tmp_path / "0")


async def test_a_mirror_killed_in_the_middle_of_a_fetch_is_usable_afterwards(tmp_path: Path) -> None:
    """kill -9 of the mirror alone: its git lives on, and is in the way until the next mirror ends it."""
    async with Hub() as hub:
        hub.repo("org/m").commit({f"{part}.bin": Content(4_000_000, part) for part in range(4)})
        hub.cap(per_connection=6_000_000)
        with MirrorProcess(tmp_path / "cache", [hub.url], [hub.cdn_host]) as mirror:
            clone = asyncio.create_task(run_client("git", "clone", f"{mirror.url}/org/m", str(tmp_path / "a"), env=NO_ONE))
            await hub.until(lambda: hub.counters.bytes(match="git-upload-pack") > 3_000_000)
            mirror.kill()
            assert (await clone)[0] != 0
            (bare,) = (tmp_path / "cache" / "git").glob("*/*.git")
            assert list(bare.glob("objects/pack/tmp_pack_*")), "it was to be killed in the middle"
            hub.cap()
            mirror.start()
            await git("clone", f"{mirror.url}/org/m", tmp_path / "b")
        assert await head(tmp_path / "b") == hub.repo("org/m").refs["refs/heads/main"]
        assert not list(bare.glob("objects/pack/tmp_pack_*"))
        await git("fsck", "--full", "--strict", cwd=bare)


async def test_a_whole_clone_with_lfs_has_what_a_download_has_and_costs_its_bytes_once(tmp_path: Path) -> None:
    """git clone with git-lfs installed, then `hf download` of the same; and the other way about."""
    lfs = tmp_path / "gitconfig"
    lfs.write_text('[filter "lfs"]\n\tsmudge = git-lfs smudge -- %f\n\tprocess = git-lfs filter-process\n\trequired = true\n')
    environment = {key: value for key, value in NO_ONE.items() if key != "GIT_LFS_SKIP_SMUDGE"} | {
        "GIT_CONFIG_GLOBAL": str(lfs)
    }
    attributes = b"*.bin filter=lfs diff=lfs merge=lfs -text\n"
    async with Hub() as hub:
        contents = {name: Content(2_000_000, seed) for seed, name in enumerate(("org/a", "org/b"))}
        for name, content in contents.items():
            hub.repo(name).commit({".gitattributes": attributes, "model.bin": LFS(content)})
        async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], SERVER_PREFIX="/p")) as mirror:
            for name, is_clone_first in (("org/a", True), ("org/b", False)):
                clone, download = tmp_path / name / "clone", tmp_path / name / "download"
                clone.parent.mkdir(parents=True)
                steps = [
                    ("git", "clone", "-q", f"{mirror.url}/{name}", str(clone)),
                    ("aria2c", "-q", "-d", str(download), f"{mirror.url}/{name}/resolve/main/model.bin"),
                ]
                for command in steps if is_clone_first else reversed(steps):
                    status, output = await run_client(*command, env=environment)
                    assert status == 0, output
                await mirror.settled()
                assert (clone / "model.bin").read_bytes() == contents[name].bytes() == (download / "model.bin").read_bytes()
                status, output = await run_client("git", "lfs", "fsck", env=environment, cwd=clone)
                assert status == 0 and "Git LFS fsck OK" in output, output
        assert hub.counters.bytes("cdn") == sum(content.size for content in contents.values())
