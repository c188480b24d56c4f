"""Every client gets a large and a small file, cold and warm, at the root and under a prefix; and what that costs upstream."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nearhub.wire.spans import BLOCK
from tests.clients.programs import ALL, Client, Want, sha256_of
from tests.clients.scene import besides
from tests.hub import LFS, Content, Hub
from tests.mirror import configure, running

PLAIN = b'{"architectures": ["Tiny"], "hidden_size": 64}\n' * 100
REPOS = {client: f"org/for-{client.name.strip('-')}" for client in ALL}
CONTENTS = {client: Content(client.file_size, seed=70 + number) for number, client in enumerate(ALL)}


async def get_all(endpoint: str, path: str, folder: Path, revisions: dict[Client, str] | None = None) -> dict[str, str]:
    """All clients at once, each from its own repo into its own new folder; whose file is not right."""
    revisions = revisions or dict.fromkeys(ALL, "main")
    wants = {client: Want(endpoint, repo, path, revisions[client]) for client, repo in REPOS.items()}
    gots = await asyncio.gather(*(client.get(want, folder / client.name) for client, want in wants.items()))
    right = {client: CONTENTS[client].sha256 if path.endswith(".safetensors") else sha256_of(PLAIN) for client in ALL}
    return besides({client.name: got.verdict(right[client]) for client, got in zip(wants, gots, strict=True)}, "right")


def publish(hub: Hub) -> dict[Client, str]:
    """A repo for each client; its commit."""
    return {
        client: hub.repo(repo).commit({"model.safetensors": LFS(CONTENTS[client]), "sub/config.json": PLAIN})
        for client, repo in REPOS.items()
    }


def questions(hub: Hub, repo: str) -> int:
    """How often the Hub was asked about the repo for anything but content."""
    return hub.counters.requests("hub", match=f"/api/models/{repo}/") + hub.counters.requests(
        "hub", method="HEAD", match=f"{repo}/resolve/"
    )


@pytest.mark.parametrize("prefix", ["", "/some/prefix"], ids=["root", "prefix"])
async def test_cold_then_warm(hub: Hub, tmp_path: Path, prefix: str) -> None:
    """Cold: right bytes, which cross the WAN once, for one metadata question a repo. Warm: not one request upstream."""
    publish(hub)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], SERVER_PREFIX=prefix)
    async with running(config) as mirror:
        assert await get_all(mirror.url, "model.safetensors", tmp_path / "cold") == {}
        await mirror.settled()
        for client, repo in REPOS.items():
            size = CONTENTS[client].size
            assert size <= hub.counters.bytes("cdn", match=f"{repo}/") <= size + BLOCK
            assert questions(hub, repo) == 1
        hub.counters.reset()
        assert await get_all(mirror.url, "sub/config.json", tmp_path / "cold plain") == {}
        assert [questions(hub, repo) for repo in REPOS.values()] == [0] * len(REPOS)
        # All of these are one blob: the first to come pays for it, whatever the repo.
        assert len(PLAIN) <= hub.counters.bytes(method="GET") <= len(PLAIN) + 1024
        hub.counters.reset()
        assert await get_all(mirror.url, "model.safetensors", tmp_path / "warm") == {}
        assert await get_all(mirror.url, "sub/config.json", tmp_path / "warm plain") == {}
        assert hub.counters.requests() == 0


async def test_a_commit_needs_no_metadata_once_known(hub: Hub, tmp_path: Path) -> None:
    """A commit is asked about once, however old that is: the ref TTL, here 1 ms, does not apply."""
    commits = publish(hub)
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="1ms")
    async with running(config) as mirror:
        assert await get_all(mirror.url, "sub/config.json", tmp_path / "cold", commits) == {}
        assert [questions(hub, repo) for repo in REPOS.values()] == [1] * len(REPOS)
        hub.counters.reset()
        assert await get_all(mirror.url, "sub/config.json", tmp_path / "warm", commits) == {}
        assert hub.counters.requests() == 0
