"""Who may see what, at every door, with real tokens on a stand-in Hub: the matrix, the canary, git and git-lfs.

The Hub itself is the judge: what it answers to a caller, the mirror answers to that caller, whoever asked before.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nearhub.config import load
from tests.clients.test_git import NO_ONE
from tests.hub import LFS, Content, Fault, Hub, User
from tests.mirror import Mirror, MirrorProcess, configure, run_client, running

ALICE, BOB = "hf_canaryAliceAliceAliceAliceAlice", "hf_canaryBobBobBobBobBobBobBobBob"
SECRET, WEIGHTS = b"what only Alice may read\n" * 10, Content(300_000, 3)
REPOS = ("org/public", "org/gated", "org/private", "org/absent")
CALLERS = {"nobody": None, "alice": ALICE, "bob": BOB}


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    async with Hub() as hub:
        for name in REPOS[:-1]:
            repo = hub.repo(name, private=name == "org/private", gated=name == "org/gated")
            repo.commit({"secret.txt": SECRET, "model.bin": LFS(WEIGHTS)})
        hub.users[ALICE] = User("alice", {"org/gated", "org/private"})
        hub.users[BOB] = User("bob")
        yield hub


@dataclass(frozen=True)
class Door:
    """One way to ask for something of a repo. `is_content`: not merely what it holds."""

    name: str
    path: str
    is_content: bool
    method: str = "GET"
    body: bytes | None = None
    media: str = ""

    async def open(self, session: aiohttp.ClientSession, base: str, repo: str, token: str | None) -> tuple[int, str, bytes]:
        """(status, X-Error-Code, body)."""
        headers = {"Content-Type": self.media} if self.media else {}
        if token:
            basic = base64.b64encode(f"anybody:{token}".encode()).decode()
            headers["Authorization"] = f"Basic {basic}" if "git" in self.name else f"Bearer {token}"
        url = base + self.path.format(repo=repo)
        async with session.request(self.method, url, data=self.body, headers=headers, allow_redirects=True) as response:
            return response.status, response.headers.get("X-Error-Code", ""), await response.read()


def batch(oid: str, size: int) -> bytes:
    return json.dumps({"operation": "download", "objects": [{"oid": oid, "size": size}]}).encode()


LFS_MEDIA = "application/vnd.git-lfs+json"
DOORS = [
    Door("head", "/{repo}/resolve/main/secret.txt", True, "HEAD"),
    Door("get", "/{repo}/resolve/main/secret.txt", True),
    Door("raw", "/{repo}/raw/main/secret.txt", True),
    Door("auth-check", "/api/models/{repo}/auth-check", True),
    Door("info", "/api/models/{repo}", False),
    Door("revision", "/api/models/{repo}/revision/main?blobs=true", False),
    Door("tree", "/api/models/{repo}/tree/main?recursive=true", False),
    Door("refs", "/api/models/{repo}/refs", False),
    Door("commits", "/api/models/{repo}/commits/main", False),
    Door("paths-info", "/api/models/{repo}/paths-info/main", False, "POST", b'{"paths": ["secret.txt"]}', "application/json"),
]
"""Those that the Hub has too."""
OURS = [
    Door("lfs file", "/{repo}/resolve/main/model.bin", True),
    Door("short", "/{repo}/secret.txt", True),
    Door("page", "/{repo}", False),
    Door("git info/refs", "/{repo}.git/info/refs?service=git-upload-pack", True),
    Door("git-lfs batch", "/{repo}.git/info/lfs/objects/batch", True, "POST", batch(WEIGHTS.sha256, WEIGHTS.size), LFS_MEDIA),
]


def may(caller: str, repo: str, *, content: bool) -> bool:
    if repo == "org/public":
        return True
    if repo == "org/gated":
        return caller == "alice" or not content
    return repo == "org/private" and caller == "alice"


async def test_at_every_door_each_caller_hears_what_the_hub_tells_him_whoever_asked_before(hub: Hub, tmp_path: Path) -> None:
    """Alice opens everything first, and again in the middle: nothing of it opens for anybody else."""
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror, aiohttp.ClientSession() as session:
        for repo in REPOS:
            for door in DOORS + OURS:
                await door.open(session, mirror.url, repo, ALICE)
        await mirror.settled()
        wrong = []
        for caller in ("nobody", "bob", "alice", "bob", "nobody"):
            for repo in REPOS:
                for door in DOORS:
                    here = await door.open(session, mirror.url, repo, CALLERS[caller])
                    there = await door.open(session, hub.url, repo, CALLERS[caller])
                    # The Hub has no code on a 401 for what is absent; clients on plain http need one (hub-protocol §3).
                    code = there[1] or ("RepoNotFound" if there[0] == 401 else "")
                    if (here[0], here[1]) != (there[0], code):
                        wrong.append((caller, repo, door.name, here[:2], there[:2]))
                    if here[0] == 200 and door.name in ("get", "raw") and here[2] != there[2]:
                        wrong.append((caller, repo, door.name, "other bytes"))
                for door in OURS:
                    status, _, body = await door.open(session, mirror.url, repo, CALLERS[caller])
                    is_open = status == 200 and b'"error"' not in body
                    if is_open != may(caller, repo, content=door.is_content):
                        wrong.append((caller, repo, door.name, status))
        assert wrong == []


async def test_private_and_absent_look_the_same_to_who_may_not_know(hub: Hub, tmp_path: Path) -> None:
    """Status, code and body alike, but for the name that was asked for."""
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror, aiohttp.ClientSession() as session:
        for door in DOORS + OURS:
            await door.open(session, mirror.url, "org/private", ALICE)
        for token in (None, BOB):
            for door in DOORS + OURS:
                private, absent = [await door.open(session, mirror.url, repo, token) for repo in ("org/private", "org/absent")]
                assert private[:2] == absent[:2]
                assert private[2].replace(b"private", b"absent") == absent[2].replace(b"private", b"absent")


async def test_an_lfs_link_opens_for_whom_it_was_signed_until_he_is_shut_out(hub: Hub, tmp_path: Path) -> None:
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror, aiohttp.ClientSession() as session:
        _, _, body = await OURS[-1].open(session, mirror.url, "org/private", ALICE)
        href = json.loads(body)["objects"][0]["actions"]["download"]["href"]
        assert ALICE not in href

        async def status(url: str) -> int:
            async with session.get(url) as response:
                await response.read()
                return response.status

        assert await status(href) == 200
        assert await status(href.replace("&for=", "&off=")) == 403
        hub.users[ALICE].access.clear()
        grants = mirror.front.lfs.grants
        now = grants._clock
        grants._clock = lambda: now() + 61
        assert await status(href) == 403


async def test_git_with_a_token_clones_what_it_opens_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    """With git-lfs, from the same store; the token goes to the Hub alone, and stands in no file of the cache."""
    config = tmp_path / "gitconfig"
    config.write_text(
        '[filter "lfs"]\n\tsmudge = git-lfs smudge -- %f\n\tprocess = git-lfs filter-process\n\trequired = true\n'
    )
    environment = {key: value for key, value in NO_ONE.items() if "LFS" not in key} | {"GIT_CONFIG_GLOBAL": str(config)}
    hub.repo("org/private").commit({".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n"})
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror:

        async def clone(token: str | None, name: str) -> tuple[int, str]:
            url = mirror.url.replace("://", f"://user:{token}@" if token else "://")
            return await run_client("git", "clone", "-q", f"{url}/org/private", str(tmp_path / name), env=environment)

        assert (await clone(ALICE, "alice"))[0] == 0
        assert (tmp_path / "alice" / "model.bin").read_bytes() == WEIGHTS.bytes()
        assert (tmp_path / "alice" / "secret.txt").read_bytes() == SECRET
        for token, name in ((BOB, "bob"), (None, "nobody")):
            status, said = await clone(token, name)
            assert status != 0 and not (tmp_path / name).exists(), said


async def test_a_token_is_nowhere_but_where_it_belongs(hub: Hub, tmp_path: Path) -> None:
    """The canary: not in the log, the metrics, an error, the cache, or another origin's requests; also after faults."""
    with MirrorProcess(tmp_path / "cache", [hub.url], [hub.cdn_host]) as mirror:
        async with aiohttp.ClientSession() as session:
            said: list[Any] = []
            for token in (ALICE, BOB, "hf_canaryNotKnownToAnybody"):
                for repo in REPOS:
                    for door in DOORS + OURS:
                        said.append(await door.open(session, mirror.url, repo, token))
            bad = {"Authorization": f"Digest {ALICE}"}
            async with session.get(f"{mirror.url}/org/private/resolve/main/secret.txt", headers=bad) as response:
                said.append(await response.read())
            async with session.get(f"{mirror.url}/-/metrics") as response:
                said.append(await response.read())
            hub.faults.add(Fault.status(500), on="hub")
            said.append(await DOORS[1].open(session, mirror.url, "org/other", ALICE))
        mirror.terminate()
        assert mirror.log is not None
        log = mirror.log.read_bytes()
    canary = b"canary"
    assert canary not in log
    assert not [one for one in said if canary in repr(one).encode()]
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file():
            held = path.read_bytes()
            assert canary not in held and base64.b64encode(b"x" + ALICE.encode())[4:-8] not in held, path
    leaks = [one.path for one in hub.log if one.origin != "hub" and "canary" in json.dumps(one.to_json())]
    assert leaks == []
    assert any(ALICE in (one.header("Authorization") or "") for one in hub.log if one.origin == "hub")


async def test_a_repo_that_is_closed_stops_within_a_minute_and_opens_with_a_token(hub: Hub, tmp_path: Path) -> None:
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror, aiohttp.ClientSession() as session:
        get = DOORS[1]
        assert (await get.open(session, mirror.url, "org/public", None))[0] == 200
        hub.repo("org/public").private = True
        hub.users[ALICE].access.add("org/public")
        passed(mirror, 61)
        assert (await get.open(session, mirror.url, "org/public", None))[:2] == (401, "RepoNotFound")
        assert (await get.open(session, mirror.url, "org/public", ALICE))[0] == 200
        hub.repo("org/public").private = False
        passed(mirror, 122)
        assert (await get.open(session, mirror.url, "org/public", None))[0] == 200


def passed(mirror: Mirror, seconds: float) -> None:
    """Let so much time have passed for all that is known of access."""
    api = mirror.front.api
    for owner in (api.access, api.catalog, api.resolver, api.access._grants, api.resolver._asking):
        owner._clock = lambda: time.time() + seconds  # type: ignore[attr-defined]


async def test_what_is_learnt_with_a_token_is_kept_apart_and_by_nobody_on_the_way(hub: Hub, tmp_path: Path) -> None:
    """No row of it among those that everybody's questions are answered from; and no shared cache may keep an answer."""
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror, aiohttp.ClientSession() as session:
        for door in DOORS + OURS:
            await door.open(session, mirror.url, "org/private", ALICE)
        await mirror.settled()
        keys = [key for kind in ("ref ", "manifest ", "path ", "lfs ", "doc ") for key in mirror.front.index.keys(kind)]
        assert any(" restricted " in key and "org/private" in key for key in keys)
        assert [key for key in keys if "private" in key and " public " in key] == []
        commit = hub.repo("org/private").refs["refs/heads/main"]
        for path in (f"/org/private/resolve/{commit}/secret.txt", "/api/models/org/private"):
            async with session.get(mirror.url + path, headers={"Authorization": f"Bearer {ALICE}"}) as response:
                assert response.headers["Cache-Control"] == "private, no-cache"


async def test_a_token_is_for_the_first_upstream_alone(hub: Hub, tmp_path: Path) -> None:
    """Another one, trusted or not, is asked nothing about what is not public, also when the first fails."""
    async with Hub() as other:
        upstreams = [hub.url, other.url]
        async with (
            running(configure(tmp_path / "cache", upstreams, [hub.cdn_host])) as mirror,
            aiohttp.ClientSession() as session,
        ):
            assert (await DOORS[1].open(session, mirror.url, "org/private", ALICE))[0] == 200
            hub.faults.add(Fault.status(500), on="hub", match="org/private")
            await DOORS[2].open(session, mirror.url, "org/private", ALICE)
            await OURS[0].open(session, mirror.url, "org/private", ALICE)
        assert [one.raw_path for one in other.log if "private" in one.raw_path or one.header("Authorization")] == []


async def test_the_operators_own_tokens_policies_and_rules(hub: Hub, tmp_path: Path) -> None:
    """As an operator sets them up: a token for Carol, a policy for her group with a token of the Hub, and two rules."""
    settings = tmp_path / "nearhub.toml"
    (tmp_path / "hub-token").write_text(f"{ALICE}\n")
    settings.write_text(
        '[access]\ntokens = "tokens"\ncontact = "ml-team"\n'
        '[[policies]]\nname = "lab"\nrepos = ["org/private"]\nwho = ["lab"]\ntoken_file = "hub-token"\n'
        '[[rules]]\nname = "no gated"\naction = "deny"\nrepos = ["org/gated"]\n'
        '[[rules]]\nname = "no pickles"\naction = "deny"\nformats = ["pickle"]\nnot_groups = ["lab"]\n'
    )
    made = await run_client(
        sys.executable, "-m", "nearhub", "token", "add", "carol", "--group", "lab", "--config", str(settings)
    )
    assert made[0] == 0
    carol = made[1].split()[0]
    environment = {"NEARHUB_CACHE_DIR": str(tmp_path / "cache"), "NEARHUB_UPSTREAM_URLS": hub.url}
    environment["NEARHUB_UPSTREAM_BLOB_HOSTS"] = f"http://{hub.cdn_host}"
    get, lfs_file, short, git, batch = DOORS[1], OURS[0], OURS[1], OURS[3], OURS[4]
    async with running(load(settings, environment, {})) as mirror, aiohttp.ClientSession() as session:

        async def statuses(repo: str, token: str | None) -> list[int]:
            return [(await door.open(session, mirror.url, repo, token))[0] for door in (get, lfs_file, short, git, batch)]

        assert await statuses("org/private", carol) == [200] * 5
        assert 200 not in await statuses("org/private", BOB) + await statuses("org/private", None)
        before = len(hub.log)
        for token in (ALICE, carol, None):
            assert await statuses("org/gated", token) == [403] * 5
        assert len(hub.log) == before, "a rule about names is asked before upstream is"
        assert await statuses("org/public", carol) == [200] * 5
        status, code, body = await lfs_file.open(session, mirror.url, "org/public", None)
        assert (status, code) == (403, "RuleRefused") and b"no pickles" in body and b"ml-team" in body
        assert (await get.open(session, mirror.url, "org/public", None))[0] == 200
        _, _, told = await batch.open(session, mirror.url, "org/public", None)
        assert json.loads(told)["objects"][0]["error"]["code"] == 403
    assert [one for one in hub.log if carol in repr(one.headers)] == []
