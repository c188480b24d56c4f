"""Who got what, when, by which rule: what the audit says of real downloads, also after kill -9."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nearhub.config import load
from nearhub.store.audit import files_of
from tests.clients.test_access import ALICE, DOORS, OURS, REPOS, SECRET, WEIGHTS, hub
from tests.hub import Hub
from tests.mirror import Mirror, MirrorProcess, run_client, running

__all__ = ["hub"]  # the fixture
RULES = """
[audit]
enabled = true
[access]
tokens = "tokens"
[[policies]]
name = "lab"
repos = ["org/private"]
who = ["lab"]
token_file = "hub-token"
[[rules]]
name = "plain files for all"
action = "allow"
formats = ["other"]
[[rules]]
name = "no pickles"
action = "deny"
formats = ["pickle"]
not_groups = ["lab"]
"""


def lines(cache: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for path in files_of(cache / "audit") for text in path.read_text().splitlines()]


@pytest.fixture
async def carol(hub: Hub, tmp_path: Path) -> str:
    """The token of somebody in the lab, whose policy opens org/private."""
    (tmp_path / "nearhub.toml").write_text(RULES)
    (tmp_path / "hub-token").write_text(f"{ALICE}\n")
    command = ["token", "add", "carol", "--group", "lab", "--config", str(tmp_path / "nearhub.toml")]
    status, said = await run_client(sys.executable, "-m", "nearhub", *command)
    assert status == 0, said
    return said.split()[0]


async def audited(hub: Hub, tmp_path: Path, *asked: tuple[str, str, str | None], linked_for: str = "") -> list[dict[str, Any]]:
    """What the audit says of some doors, each (name, repo, token), opened one after the other.

    `linked_for`: a token with whose LFS link an object is fetched at the end.
    """
    environment = {"NEARHUB_CACHE_DIR": str(tmp_path / "cache"), "NEARHUB_UPSTREAM_URLS": hub.url}
    environment["NEARHUB_UPSTREAM_BLOB_HOSTS"] = f"http://{hub.cdn_host}"
    config = load(tmp_path / "nearhub.toml", environment, {})
    doors = {door.name: door for door in DOORS + OURS}
    async with running(config) as mirror, aiohttp.ClientSession() as session:
        for name, repo, token in asked:
            await doors[name].open(session, mirror.url, repo, token)
        if linked_for:
            await _object(session, mirror, linked_for)
    status, said = await run_client(sys.executable, "-m", "nearhub", "audit", "verify", "--cache-dir", str(tmp_path / "cache"))
    assert status == 0 and "the chain holds" in said, said
    first, *answers = lines(tmp_path / "cache")
    assert first["event"] == "opened"
    return answers


async def _object(session: aiohttp.ClientSession, mirror: Mirror, token: str) -> None:
    """The LFS object of org/private, by the link that a batch gives to who has `token`."""
    batch = next(door for door in OURS if door.name == "git-lfs batch")
    _, _, body = await batch.open(session, mirror.url, "org/private", token)
    async with session.get(json.loads(body)["objects"][0]["actions"]["download"]["href"]) as response:
        assert response.status == 200 and len(await response.read()) == WEIGHTS.size


async def test_it_says_who_got_what_and_on_which_grounds(hub: Hub, tmp_path: Path, carol: str) -> None:
    told = await audited(
        hub,
        tmp_path,
        ("get", "org/public", None),
        ("get", "org/public", None),
        ("lfs file", "org/public", None),
        ("get", "org/gated", ALICE),
        ("lfs file", "org/private", carol),
        ("raw", "org/private", None),
        linked_for=carol,
    )
    public, again, refused, by_grant, by_policy, shut, batch, linked = told
    commit = hub.repo("org/public").refs["refs/heads/main"]
    for one in (public, again):
        assert (one["what"], one["repo"], one["commit"], one["path"]) == ("file", "org/public", commit, "secret.txt")
        assert (one["outcome"], one["bytes"], one["grounds"]) == ("200", len(SECRET), "public")
        assert (one["rule"], one["address"]) == ("plain files for all", "127.0.0.1") and "who" not in one
    assert (refused["outcome"], refused["rule"], refused["path"]) == ("403", "no pickles", "model.bin")
    assert (by_grant["outcome"], by_grant["grounds"]) == ("200", "grant") and by_grant["who"].startswith("token:")
    assert (by_policy["who"], by_policy["grounds"], by_policy["policy"]) == ("carol", "policy", "lab")
    assert by_policy["blob"] == f"sha256-{WEIGHTS.sha256}"
    assert (shut["outcome"], shut["what"]) == ("401", "raw") and "who" not in shut
    assert (batch["what"], batch["who"]) == ("lfs", "carol")
    assert (linked["what"], linked["who"], linked["blob"]) == ("lfs", "carol", f"sha256-{WEIGHTS.sha256}")
    assert all(one["id"] and one["at"].endswith("Z") for one in told)


async def test_it_notes_git_pages_and_api_and_no_more_heads_than_refusals(hub: Hub, tmp_path: Path, carol: str) -> None:
    names = ("git info/refs", "page", "tree", "info", "head")
    told = await audited(hub, tmp_path, *((name, "org/gated", None) for name in names))
    assert [(one["what"], one["method"], one["outcome"]) for one in told] == [
        ("git", "GET", "401"),
        ("page", "GET", "200"),
        ("api tree", "GET", "200"),
        ("api info", "GET", "200"),
        ("file", "HEAD", "401"),
    ]
    assert not [one for one in told if "rule" in one], "a rule that waits for the format has decided nothing"


async def test_what_gives_nothing_is_not_noted(hub: Hub, tmp_path: Path, carol: str) -> None:
    """A HEAD, a 304, the mirror's own pages, and what is about no repo."""
    config = load(
        tmp_path / "nearhub.toml", {"NEARHUB_CACHE_DIR": str(tmp_path / "cache"), "NEARHUB_UPSTREAM_URLS": hub.url}, {}
    )
    async with running(config) as mirror, aiohttp.ClientSession() as session:
        path = "/org/public/resolve/main/secret.txt"
        async with session.head(mirror.url + path) as response:
            etag = response.headers["ETag"]
        for asked, expected in ((path, 304), ("/-/healthz", 200), ("/api/whoami-v2", 401), ("/nothing", 404)):
            async with session.get(mirror.url + asked, headers={"If-None-Match": etag}) as response:
                assert response.status == expected
    assert [one["event"] for one in lines(tmp_path / "cache")] == ["opened"]


async def test_no_token_stands_in_it(hub: Hub, tmp_path: Path, carol: str) -> None:
    doors = [(door.name, repo, token) for token in (ALICE, carol) for repo in REPOS for door in DOORS + OURS]
    told = json.dumps(await audited(hub, tmp_path, *doors, linked_for=carol))
    assert "canary" not in told and carol not in told and "nh_" not in told


async def test_kill_9_leaves_a_chain_that_goes_on(hub: Hub, tmp_path: Path) -> None:
    extra = {"AUDIT_ENABLED": "true"}
    with MirrorProcess(tmp_path / "cache", [hub.url], [hub.cdn_host], extra) as mirror:
        async with aiohttp.ClientSession() as session:
            for lives_left in (3, 2, 1, 0):
                for _ in range(20):
                    async with session.get(f"{mirror.url}/org/public/resolve/main/secret.txt") as response:
                        assert await response.read() == SECRET
                if lives_left:
                    await asyncio.to_thread(mirror.kill)
                    mirror.start()
    command = [sys.executable, "-m", "nearhub", "audit", "verify", "--cache-dir", str(tmp_path / "cache"), "--json"]
    status, said = await run_client(*command)
    report = json.loads(said)
    assert status == 0 and report["problems"] == [] and report["files"] == 1
    assert [one["event"] for one in lines(tmp_path / "cache")].count("opened") == 4
    path = tmp_path / "cache" / "audit" / "audit-00000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"127.0.0.1", b"127.0.0.2", 1))
    status, said = await run_client(*command[:-1])
    assert status == 1 and "BROKEN audit-00000001.jsonl:" in said
