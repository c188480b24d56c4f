"""Whole repos by `hf download`, and by snapshot_download of three generations of huggingface_hub, in every state of the Hub."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.clients.lan import NEWEST, PREFIX, VERSIONS, Lan, lan
from tests.clients.programs import sha256_of
from tests.hub import LFS, Content, Hub

PROGRAMS = ("hf download", *VERSIONS)
REPOS = {program: f"org/for-{program.replace(' ', '-')}" for program in PROGRAMS}
WEIGHTS = {program: Content(3_000_000 + number, seed=200 + number) for number, program in enumerate(PROGRAMS)}
SMALL = {
    "README.md": b"# A model\n",
    "config.json": b'{"model_type": "tiny"}\n' * 60,
    "sub/a b/gr\u00f6\u00dfe.txt": "Größe\n".encode(),
}
SNAPSHOT = """
from huggingface_hub import snapshot_download
out["files"] = hashes(snapshot_download({repo!r}, revision={revision!r}))
"""
UNKNOWN = """
from huggingface_hub import hf_hub_download, snapshot_download
out["file"] = raised(hf_hub_download, "org/unknown", "config.json")
out["repo"] = raised(snapshot_download, "org/unknown")
"""


def publish(hub: Hub) -> dict[str, str]:
    """A repo of four files for each program; its commit."""
    return {
        # Plain files have the program's name in them, so that nobody's blob is another's.
        program: hub.repo(REPOS[program]).commit({**small(program), "model.safetensors": LFS(WEIGHTS[program])})
        for program in PROGRAMS
    }


def small(program: str) -> dict[str, bytes]:
    return {path: data + program.encode() for path, data in SMALL.items()}


def right(program: str) -> dict[str, str]:
    return {path: sha256_of(data) for path, data in small(program).items()} | {"model.safetensors": WEIGHTS[program].sha256}


async def download(net: Lan, program: str, revision: str, home: Path) -> dict[str, str]:
    """The whole repo as that program has it: path → sha256."""
    repo = REPOS[program]
    if program != "hf download":
        out = await net.python(SNAPSHOT.format(repo=repo, revision=revision), home=home, version=program)
        files: dict[str, str] = out["files"]
        return files
    await net.hf("download", repo, "--revision", revision, home=home)
    said = await net.hf("cache", "verify", repo, "--revision", revision, "--fail-on-missing-files", home=home)
    assert "4 file" in said, said
    [snapshot] = (home / "hf" / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots").iterdir()
    return {
        path.relative_to(snapshot).as_posix(): sha256_of(path.read_bytes()) for path in snapshot.rglob("*") if path.is_file()
    }


async def all_download(net: Lan, revisions: dict[str, str] | None = None) -> None:
    """Every program at once, each with an empty home; byte-equal."""
    asked = revisions or dict.fromkeys(PROGRAMS, "main")
    got = await asyncio.gather(*(download(net, program, asked[program], net.new_home()) for program in PROGRAMS))
    assert dict(zip(PROGRAMS, got, strict=True)) == {program: right(program) for program in PROGRAMS}


@pytest.mark.parametrize("base", ["", PREFIX], ids=["root", "prefix"])
async def test_in_every_state_of_the_hub(hub: Hub, tmp_path: Path, base: str) -> None:
    """Cold: two questions at most for four files. Warm, and pinned to a commit: none. Hub dead or refusing: as if it were not.

    `hf cache verify` agrees each time. A repo that nobody here ever asked for fails clearly while the Hub is dead.
    """
    commits = publish(hub)
    async with lan(tmp_path, base, hub=hub) as net:
        await all_download(net)
        for program, repo in REPOS.items():
            assert 1 <= len(net.metadata_calls(f"{repo}")) <= 2, (program, net.metadata_calls(repo))
            assert hub.counters.bytes("cdn", match=f"{repo}/") == WEIGHTS[program].size
        assert net.off_the_mirror() == []

        hub.log.clear()
        await all_download(net)
        await all_download(net, commits)
        assert [one.raw_path for one in hub.log] == []

        await net.hub_dies()
        await all_download(net)
        assert "detail=stale" in await net.cache_status(f"/{REPOS[NEWEST]}/resolve/main/config.json")
        await an_unknown_repo_fails_clearly(net)

        await net.hub_refuses()
        await all_download(net)
        assert net.refusals() > 0
        assert "detail=stale" in await net.cache_status(f"/{REPOS[NEWEST]}/resolve/main/config.json")
        assert net.heard == []


async def an_unknown_repo_fails_clearly(net: Lan) -> None:
    """Each generation of huggingface_hub raises what it has for this, and the mirror's own words are in it or its cause."""
    outs = await asyncio.gather(*(net.python(UNKNOWN, version=version) for version in VERSIONS))
    for version, out in zip(VERSIONS, outs, strict=True):
        for what in ("file", "repo"):
            kind, said = out[what]
            assert kind == "LocalEntryNotFoundError", (version, said)
            assert "org/unknown" in said and "is not in this mirror, and upstream cannot be asked" in said, (version, said)


async def test_a_new_commit_reaches_everyone_after_the_ref_ttl(hub: Hub, tmp_path: Path) -> None:
    """What changed is asked for and fetched, and nothing else: the manifest of the new commit, and the new content."""
    publish(hub)
    async with lan(tmp_path, hub=hub) as net:
        await all_download(net)
        new = Content(1_000_000, seed=300)
        for repo in REPOS.values():
            hub.repo(repo).commit({"more.safetensors": LFS(new)})
        hub.log.clear()
        hub.counters.reset()
        await net.later(hours=1)
        outs = await asyncio.gather(
            *(net.python(SNAPSHOT.format(repo=REPOS[version], revision="main"), version=version) for version in VERSIONS)
        )
        for version, out in zip(VERSIONS, outs, strict=True):
            assert out["files"] == right(version) | {"more.safetensors": new.sha256}
        assert hub.counters.bytes("cdn") == new.size
        assert net.off_the_mirror() == []


NAMES = """
from huggingface_hub import hf_hub_download, snapshot_download
for name in ("org/Old-Name", "ORG/New-NAME", "org/new-name"):
    out[name] = hashes(snapshot_download(name))
    out[name + " file"] = hashlib.sha256(open(hf_hub_download(name, "config.json"), "rb").read()).hexdigest()
"""


async def test_former_names_and_other_cases(hub: Hub, tmp_path: Path) -> None:
    """A renamed repo by its old name, and any name in other letters: each generation gets it, warm and without the Hub too.

    One mirror, at the root and then under the prefix.
    """
    repo = hub.repo("org/Old-Name")
    weights = Content(1_500_000, seed=210)
    repo.commit({**SMALL, "model.safetensors": LFS(weights)})
    repo.rename("org/New-Name")
    wanted = {path: sha256_of(data) for path, data in SMALL.items()} | {"model.safetensors": weights.sha256}
    async with lan(tmp_path, PREFIX, hub=hub) as net:
        for state in ("cold", "warm", "dead"):
            net.base = "" if state == "cold" else PREFIX
            if state == "dead":
                await net.hub_dies()
            outs = await asyncio.gather(*(net.python(NAMES, version=version) for version in VERSIONS))
            for out in outs:
                for name in ("org/Old-Name", "ORG/New-NAME", "org/new-name"):
                    assert (out[name], out[f"{name} file"]) == (wanted, wanted["config.json"])
            if state == "warm":
                assert [one.raw_path for one in hub.log] == []
            hub.log.clear()
        assert hub.counters.bytes("cdn") == weights.size
        assert net.off_the_mirror() == []
