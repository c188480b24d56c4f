"""Every client gets a large and a small file, cold and warm, at the root and under a prefix; and what that costs upstream."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nearhub.wire.spans import BLOCK
from tests.clients.programs import ALL, MIB, Client, Want
from tests.hub import LFS, Content, Hub
from tests.mirror import configure, running

PLAIN = b'{"architectures": ["Tiny"], "hidden_size": 64}\n' * 100


@pytest.mark.parametrize("prefix", ["", "/some/prefix"], ids=["root", "prefix"])
@pytest.mark.parametrize("client", ALL, ids=str)
async def test_cold_then_warm(hub: Hub, tmp_path: Path, client: Client, prefix: str) -> None:
    """Cold: right bytes, which cross the WAN once, with one metadata question a file. Warm: not one request upstream."""
    content = Content(client.file_size, seed=7)
    hub.repo("org/model").commit({"model.safetensors": LFS(content), "sub/config.json": PLAIN})
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], SERVER_PREFIX=prefix)
    async with running(config) as mirror:
        large = Want(mirror.url, "org/model", "model.safetensors")
        plain = Want(mirror.url, "org/model", "sub/config.json")
        assert (await client.get(large, tmp_path / "cold")).verdict(content.sha256) == "right"
        assert hub.counters.bytes("cdn") <= content.size + BLOCK
        assert hub.counters.requests("hub", method="HEAD") == 1
        hub.counters.reset()
        assert (await client.get(plain, tmp_path / "cold plain")).verdict(hashlib.sha256(PLAIN).hexdigest()) == "right"
        # The Hub answers a plain file's HEAD by a redirect on its own origin: one question, two requests.
        assert hub.counters.requests("hub", method="HEAD") <= 2
        assert hub.counters.bytes(match="config.json", method="GET") <= len(PLAIN) + 1024
        hub.counters.reset()
        assert (await client.get(large, tmp_path / "warm")).verdict(content.sha256) == "right"
        assert (await client.get(plain, tmp_path / "warm plain")).verdict(hashlib.sha256(PLAIN).hexdigest()) == "right"
        assert hub.counters.requests() == 0


@pytest.mark.parametrize("client", ALL, ids=str)
async def test_a_commit_needs_no_metadata_once_known(hub: Hub, tmp_path: Path, client: Client) -> None:
    """A file named by its commit is asked about once, however old that is: the ref TTL, here 1 ms, does not apply."""
    content = Content(4 * MIB, seed=8)
    commit = hub.repo("org/model").commit({"model.safetensors": LFS(content)})
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="1ms")
    async with running(config) as mirror:
        want = Want(mirror.url, "org/model", "model.safetensors", revision=commit)
        assert (await client.get(want, tmp_path / "cold")).verdict(content.sha256) == "right"
        assert hub.counters.requests("hub", method="HEAD") == 1
        hub.counters.reset()
        assert (await client.get(want, tmp_path / "warm")).verdict(content.sha256) == "right"
        assert hub.counters.requests() == 0
