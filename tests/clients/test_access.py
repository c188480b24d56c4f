"""Who may see what, at every door, with real tokens on a stand-in Hub: the matrix, the canary, git and git-lfs.

The Hub itself is the judge: what it answers to a caller, the mirror answers to that caller, whoever asked before.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nearhub.config import load
from nearhub.store.tokens import TokenFile
from nearhub.verbs import run_verb
from tests.clients.test_git import NO_ONE
from tests.hub import LFS, Content, Fault, Hub, User
from tests.mirror import Mirror, MirrorProcess, configure, environment, run_client, running

ALICE, BOB = "hf_canaryAliceAliceAliceAliceAlice", "hf_canaryBobBobBobBobBobBobBobBob"
SECRET, WEIGHTS = b"what only Alice may read\n" * 10, Content(300_000, 3)
REPOS = ("org/public", "org/gated", "org/private", "org/absent")
CALLERS = {"nobody": None, "alice": ALICE, "bob": BOB}


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    async with Hub() as hub:
        for name in REPOS[:-1]:  # three times the same commit
            repo = hub.repo(name, private=name == "org/private", gated=name == "org/gated")
            repo.commit({"secret.txt": SECRET, "model.bin": LFS(WEIGHTS)})
            assert repo.refs["refs/heads/main"] == COMMIT
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
    more: Mapping[str, str] = field(default_factory=dict)

    async def open(self, session: aiohttp.ClientSession, base: str, repo: str, token: str | None) -> tuple[int, str, bytes]:
        """(status, X-Error-Code, body)."""
        headers = {"X-Request-Id": "the-same-for-all", **self.more, **({"Content-Type": self.media} if self.media else {})}
        if token:
            basic = base64.b64encode(f"anybody:{token}".encode()).decode()
            headers["Authorization"] = f"Basic {basic}" if "git" in self.name else f"Bearer {token}"
        url = base + self.path.format(repo=repo)
        async with session.request(self.method, url, data=self.body, headers=headers, allow_redirects=True) as response:
            return response.status, response.headers.get("X-Error-Code", ""), await response.read()


def batch(oid: str, size: int) -> bytes:
    return json.dumps({"operation": "download", "objects": [{"oid": oid, "size": size}]}).encode()


LFS_MEDIA = "application/vnd.git-lfs+json"
GIT_REQUEST = "application/x-git-upload-pack-request"
V2 = {"Git-Protocol": "version=2"}
LS_REFS = b"0014command=ls-refs\n0000"
COMMIT = "bc8d6d58503d4545c847a9da906bea42271c5474"
DOORS = [
    Door("head", "/{repo}/resolve/main/secret.txt", True, "HEAD"),
    Door("get", "/{repo}/resolve/main/secret.txt", True),
    Door("range", "/{repo}/resolve/main/secret.txt", True, more={"Range": "bytes=5-9"}),
    Door("commit", f"/{{repo}}/resolve/{COMMIT}/secret.txt", True),
    Door("resolve-cache", f"/api/resolve-cache/models/{{repo}}/{COMMIT}/secret.txt", True),
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
    Door("download", "/{repo}/blob/main/secret.txt?download=true", True),
    Door("lfs range", "/{repo}/resolve/main/model.bin", True, more={"Range": "bytes=-9"}),
    Door("page", "/{repo}", False, more={"Accept": "text/html"}),
    Door("directory", "/{repo}/tree/main", False, more={"Accept": "text/html"}),
    Door("git info/refs", "/{repo}.git/info/refs?service=git-upload-pack", True),
    Door("git info/refs v2", "/{repo}/info/refs?service=git-upload-pack", True, more=V2),
    Door("git upload-pack v2", "/{repo}.git/git-upload-pack", True, "POST", LS_REFS, GIT_REQUEST, V2),
    Door("git-lfs batch", "/{repo}.git/info/lfs/objects/batch", True, "POST", batch(WEIGHTS.sha256, WEIGHTS.size), LFS_MEDIA),
]


def door_called(name: str) -> Door:
    (found,) = (door for door in DOORS + OURS if door.name == name)
    return found


GET, BATCH = door_called("get"), door_called("git-lfs batch")


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
                    is_open = status in (200, 206) and b'"error"' not in body
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
        _, _, body = await BATCH.open(session, mirror.url, "org/private", ALICE)
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
            said.append(await GET.open(session, mirror.url, "org/other", ALICE))
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
        get = GET
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
            assert (await GET.open(session, mirror.url, "org/private", ALICE))[0] == 200
            hub.faults.add(Fault.status(500), on="hub", match="org/private")
            await door_called("raw").open(session, mirror.url, "org/private", ALICE)
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
    get, lfs_file, short, git, batch = GET, OURS[0], OURS[1], door_called("git info/refs"), BATCH
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


async def test_private_and_absent_cost_the_same_questions(hub: Hub, tmp_path: Path) -> None:
    """A10: who measures time learns nothing either. Under any spelling, and also of one that the Hub has given a new name."""
    hub.repo("org/private").rename("org/secret-new-name")
    hub.users[ALICE].access.add("org/secret-new-name")
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror, aiohttp.ClientSession() as session:
        for name in ("org/private", "ORG/Private", "org/secret-new-name"):
            for door in DOORS + OURS:
                await door.open(session, mirror.url, name, ALICE)
        await mirror.settled()
        aliases = list(mirror.front.index.keys("alias "))
        assert aliases and [key for key in aliases if " restricted " not in key] == []
        names, different, waited_s = ("org/private", "ORG/Private", "org/absent", "ORG/Absent"), [], 0
        for door in DOORS + OURS:
            for token in (None, BOB, "hf_canaryNotKnownToAnybody"):
                heard = {}
                for name in names:
                    passed(mirror, waited_s := waited_s + 61)
                    before = len(hub.log)
                    status, code, body = await door.open(session, mirror.url, name, token)
                    questions = [
                        (
                            one.method,
                            one.raw_path.replace("secret-new-name", "X").replace(name, "X").lower(),
                            one.header("Authorization"),
                        )
                        for one in hub.log[before:]
                    ]
                    heard[name] = (
                        status,
                        code,
                        body.replace(name.encode(), b"X"),
                        [(a, b.replace("org/x", "x"), c) for a, b, c in questions],
                    )
                if len({repr(one) for one in heard.values()}) != 1:
                    different.append((door.name, token, heard))
        assert different == []


async def test_with_the_hub_away_only_the_public_the_granted_and_what_a_policy_names_is_served(
    hub: Hub, tmp_path: Path
) -> None:
    """A3, A4: at once, after the grants have run out, and after a restart; the private then looks like the absent."""
    settings = tmp_path / "nearhub.toml"
    settings.write_text('[access]\ntokens = "tokens"\n[[policies]]\nname = "lab"\nrepos = ["org/private"]\nwho = ["lab"]\n')
    carol = TokenFile(tmp_path / "tokens").add("carol", frozenset({"lab"}))
    dave = TokenFile(tmp_path / "tokens").add("dave", frozenset({"other"}))
    config = load(settings, environment(tmp_path / "cache", [hub.url], [hub.cdn_host]), {})
    content = [door for door in DOORS + OURS if door.is_content]

    async def opened(mirror: Mirror, repo: str, token: str | None) -> set[bool]:
        answers = [await door.open(session, mirror.url, repo, token) for door in content]
        return {status in (200, 206) and b'"error"' not in body for status, _, body in answers}

    async with aiohttp.ClientSession() as session:
        async with running(config) as mirror:
            for repo in REPOS[:-1]:
                assert await opened(mirror, repo, ALICE) == {True}
            await mirror.settled()
            await hub.stop()
            assert await opened(mirror, "org/private", ALICE) == await opened(mirror, "org/gated", ALICE) == {True}
            passed(mirror, 61)
            assert (await GET.open(session, mirror.url, "org/gated", ALICE))[:2] == (503, "AccessUnknown")
        async with running(config) as mirror:
            assert await opened(mirror, "org/public", None) == {True}
            assert await opened(mirror, "org/private", carol) == {True}
            for token in (None, ALICE, BOB, dave):
                assert await opened(mirror, "org/private", token) | await opened(mirror, "org/gated", token) == {False}
                here, absent = [await GET.open(session, mirror.url, name, token) for name in ("org/private", "org/absent")]
                assert here[2].replace(b"private", b"absent") == absent[2] and here[:2] == absent[:2]
            assert await opened(mirror, "org/gated", carol) == {False}


async def test_a_policy_without_a_token_opens_what_is_here_and_asks_nobody_for_more(hub: Hub, tmp_path: Path) -> None:
    """A8: nobody's own token is used for others. Alice's, which opened the repo a moment ago, is for her questions alone."""
    settings = tmp_path / "nearhub.toml"
    settings.write_text('[access]\ntokens = "tokens"\n[[policies]]\nname = "lab"\nrepos = ["org/private"]\nwho = ["lab"]\n')
    carol = TokenFile(tmp_path / "tokens").add("carol", frozenset({"lab"}))
    variables = environment(tmp_path / "cache", [hub.url], [hub.cdn_host], UPSTREAM_REF_TTL="1ms")
    async with running(load(settings, variables, {})) as mirror, aiohttp.ClientSession() as session:
        git = door_called("git info/refs")
        nothing = [(await door.open(session, mirror.url, "org/private", carol))[0] for door in (GET, git)]
        assert nothing == [404, 404], "nothing of it is here"
        for name in ("get", "git info/refs"):
            assert (await door_called(name).open(session, mirror.url, "org/private", ALICE))[0] == 200
        await mirror.settled()
        newest = hub.repo("org/private").commit({"new.txt": b"for Alice only, as yet"})
        before = len(hub.log)
        for name in ("get", "range", "raw", "tree", "git info/refs", "page"):
            assert (await door_called(name).open(session, mirror.url, "org/private", carol))[0] in (200, 206), name
        lfs_file, new = OURS[0], Door("new", "/{repo}/resolve/main/new.txt", True)
        assert [(await one.open(session, mirror.url, "org/private", carol))[0] for one in (lfs_file, new)] == [504, 404]
        told = await BATCH.open(session, mirror.url, "org/private", carol)
        assert told[0] == 200
        assert [one.raw_path for one in hub.log[before:] if one.header("Authorization")] == []
        assert (await new.open(session, mirror.url, "org/private", ALICE))[0] == 200, "hers goes on as before"
        assert newest.encode() in (await git.open(session, mirror.url, "org/private", ALICE))[2]


async def test_a_token_of_a_mirrors_own_never_leaves_and_ends_when_it_is_removed(hub: Hub, tmp_path: Path) -> None:
    """Also one that was removed, or is of another mirror: it opens nothing, a link that was signed for it included."""
    settings, tokens = tmp_path / "nearhub.toml", TokenFile(tmp_path / "tokens")
    (tmp_path / "hub-token").write_text(ALICE)
    settings.write_text(
        '[access]\ntokens = "tokens"\n'
        '[[policies]]\nname = "lab"\nrepos = ["org/private"]\nwho = ["carol"]\ntoken_file = "hub-token"\n'
    )
    carol = tokens.add("carol", frozenset())
    config = load(settings, environment(tmp_path / "cache", [hub.url], [hub.cdn_host]), {})
    whoami = Door("whoami", "/api/whoami-v2", False)
    async with running(config) as mirror, aiohttp.ClientSession() as session:
        for door in DOORS + OURS:
            assert (await door.open(session, mirror.url, "org/private", carol))[0] in (200, 206), door.name
        assert b"carol" in (await whoami.open(session, mirror.url, "", carol))[2]
        told = await BATCH.open(session, mirror.url, "org/private", carol)
        href = json.loads(told[2])["objects"][0]["actions"]["download"]["href"]
        async with session.get(href) as response:
            assert response.status == 200 and carol not in href
        # Her own token of the Hub wins over what the operator's would open, at its own risk.
        assert (await GET.open(session, mirror.url, "org/private", BOB))[0] == 404
        tokens.remove("carol")
        for token in (carol, "nh_ofAnotherMirrorAnotherMirrorAnotherMirror"):
            for door in [*DOORS, *OURS, whoami]:
                answer = await door.open(session, mirror.url, "org/private", token)
                assert answer[0] in (401, 404), (door.name, answer)
            assert (await GET.open(session, mirror.url, "org/public", token))[0] == 200
        async with session.get(href) as response:
            assert response.status == 403
    assert [one for one in hub.log if "nh_" in json.dumps(one.to_json())] == []
    assert [
        one
        for one in hub.log
        for token in (carol, "nh_ofAnother")
        if base64.b64encode(f"anybody:{token}".encode())[:20].decode() in json.dumps(one.to_json())
    ] == []


async def test_no_token_stands_where_an_operator_looks(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The canary: ls, du, stats, why, the admin socket's answers, and the arguments of every program that the mirror runs."""
    with MirrorProcess(tmp_path / "cache", [hub.url], [hub.cdn_host]) as mirror:
        async with aiohttp.ClientSession() as session:
            for door in DOORS + OURS:
                await door.open(session, mirror.url, "org/private", ALICE)
            ids = []
            for path in ("/org/private/resolve/main/secret.txt", "/api/whoami-v2", "/api/models?search=hf_canary", "/org/none"):
                async with session.get(mirror.url + path, headers={"Authorization": f"Bearer {ALICE}"}) as response:
                    ids.append(response.headers["X-Request-Id"])
            # A git that asks the Hub with Alice's token, and stands still.
            hub.repo("org/private").commit({"news.txt": b"n"})
            rule = hub.faults.add(Fault.stall(after=0), on="hub", match="info/refs")
            hub.users[ALICE].access.add("org/second")
            hub.repo("org/second", private=True).commit({"x": b"x"})
            asking = asyncio.ensure_future(door_called("git info/refs").open(session, mirror.url, "org/second", ALICE))
            await hub.until(lambda: rule.stalled == 1)
            running_now = arguments_below(mirror.pid)
            rule.release()
            assert (await asking)[0] == 200
        config = load(None, environment(tmp_path / "cache", [hub.url]), {})
        asked: list[tuple[str, dict[str, str]]] = [("ls", {}), ("du", {}), ("stats", {})]
        asked += [("why", {"what": one}) for one in (*ids, "/org/private/resolve/main/secret.txt")]
        for verb, arguments in asked:
            for as_json in (False, True):
                assert await asyncio.to_thread(run_verb, config, verb, arguments, as_json=as_json) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any("ls-remote" in one for one in running_now)
    assert [one for one in [*running_now, *shown] if "canary" in one.lower() or secret_in(one)] == []
    assert any("org/private" in one for one in shown)


def arguments_below(pid: int) -> list[str]:
    """Of every process that descends from `pid`, as ps shows them."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    told = []
    for one in found - {pid}:
        with contextlib.suppress(OSError):
            told.append(Path(f"/proc/{one}/cmdline").read_text().replace("\0", " "))
    return told


def secret_in(text: str) -> bool:
    """Whether Alice's token stands there as git has it."""
    return base64.b64encode(f"token:{ALICE}".encode()).decode()[:24] in text
