"""Real git and git-lfs straight against the stand-in: clone, fetch, pull, and every way in which that is refused or spoilt."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.hub import LFS, Content, Fault, Hub, HubProcess, Repo, User
from tests.hub.git import REQUEST
from tests.hub.raw_client import Answer, ask, fetch

ATTRIBUTES = "*.bin filter=lfs diff=lfs merge=lfs -text\n"
PLAIN = Content(1_500_000, seed=1)
WEIGHTS = Content(400_000, seed=2)
OLD_WEIGHTS = Content(300_000, seed=3)
WANT = "git-upload-pack"
needs_lfs = pytest.mark.skipif(shutil.which("git-lfs") is None, reason="git-lfs is not installed")


@dataclass(frozen=True)
class Ran:
    """How a command ended and all that it said."""

    status: int
    said: str


@dataclass(frozen=True)
class Client:
    """git in a directory of its own, with no settings but these."""

    home: Path

    async def __call__(self, *arguments: str | Path, at: str = ".", protocol: int = 2) -> Ran:
        command = ["git", "-c", f"protocol.version={protocol}", "-c", "advice.detachedHead=false", *map(str, arguments)]
        settings = {"PATH": os.environ["PATH"], "HOME": str(self.home), "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}
        pipe, one = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
        process = await asyncio.create_subprocess_exec(
            *command, cwd=self.home / at, env={**settings, "LC_ALL": "C"}, stdout=pipe, stderr=one
        )
        try:
            said = (await process.communicate())[0].decode()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.communicate()
        assert process.returncode is not None
        return Ran(process.returncode, said.strip())

    async def must(self, *arguments: str | Path, at: str = ".", protocol: int = 2) -> str:
        """What a command said that had to succeed."""
        ran = await self(*arguments, at=at, protocol=protocol)
        assert ran.status == 0, ran.said
        return ran.said

    async def pull_lfs(self, at: str) -> None:
        await self.must("lfs", "install", "--local", at=at)
        await self.must("lfs", "pull", at=at)

    async def refs(self, url: str) -> dict[str, str]:
        """What a server advertises."""
        lines = (await self.must("ls-remote", url)).splitlines()
        return {name: oid for oid, name in (line.split("\t") for line in lines)}


@pytest.fixture
def git(tmp_path: Path) -> Client:
    return Client(tmp_path)


@pytest.fixture
def repo(hub: Hub) -> Repo:
    """Three commits on main: an LFS file that changes, a large plain file, directories, a branch, a tag, a PR."""
    made = hub.repo("org/m")
    first = made.commit({".gitattributes": ATTRIBUTES, "a.txt": "one", "model.bin": LFS(OLD_WEIGHTS)}, title="first")
    second = made.commit({"a/b/c.txt": "deep", "a-b": "", "plain.dat": PLAIN}, title="second")
    made.commit({"a.txt": "three", "model.bin": LFS(WEIGHTS)}, title="third")
    made.move("feature/x", second)
    made.tag("v1", first)
    made.ref("refs/pr/1", made.commit({"pr.txt": "pr"}, "refs/pr/1"))
    return made


def batch(*objects: tuple[str, int], operation: str = "download") -> bytes:
    return json.dumps({"operation": operation, "objects": [{"oid": oid, "size": size} for oid, size in objects]}).encode()


def running() -> set[str]:
    """Names of the processes below this one."""
    return {child.name() for child in psutil.Process().children(recursive=True)}


async def posted(hub: Hub, body: bytes, token: str = "", repo_id: str = "org/m") -> Answer:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return await fetch(f"{hub.url}/{repo_id}.git/info/lfs/objects/batch", "POST", headers, body)


@pytest.mark.parametrize("protocol", [0, 2])
async def test_a_clone_is_the_repository_bit_for_bit(hub: Hub, git: Client, repo: Repo, protocol: int) -> None:
    await git.must("clone", "-q", "--mirror", f"{hub.url}/org/m", "copy", protocol=protocol)
    await git.must("fsck", "--strict", "--full", at="copy")
    lines = (await git.must("for-each-ref", "--format=%(refname) %(objectname)", at="copy")).splitlines()
    assert dict(line.split() for line in lines) == repo.refs
    assert await git.must("symbolic-ref", "HEAD", at="copy") == "refs/heads/main"
    listed = (await git.must("ls-tree", "-r", "--format=%(path) %(objectname)", "main", at="copy")).splitlines()
    assert repo.head is not None
    assert dict(line.split() for line in listed) == {path: file.git_oid for path, file in repo.head.files.items()}
    pointer = await git.must("cat-file", "blob", "main:model.bin", at="copy")
    assert pointer.encode() + b"\n" == repo.head.files["model.bin"].pointer
    said = {record.header("Git-Protocol") for record in hub.log if record.subject.startswith("/org/m")}
    assert said == ({"version=2"} if protocol == 2 else {None})


async def test_every_kind_and_spelling_of_an_address(hub: Hub, git: Client) -> None:
    for kind, prefix in (("models", ""), ("datasets", "datasets/"), ("spaces", "spaces/")):
        for name in ("one", "org/two"):
            commit = hub.repo(name, kind).commit({"a": f"{kind} {name}"})  # type: ignore[arg-type]
            for suffix in ("", ".git"):
                url = f"{hub.url}/{prefix}{name}{suffix}"
                answer = await fetch(f"{url}/info/refs?service=git-upload-pack")
                assert (answer.status, commit.encode() in answer.body) == (200, True)
            heads = await git.refs(url)
            assert heads == {"HEAD": commit, "refs/heads/main": commit}


@pytest.mark.parametrize("protocol", [0, 2])
async def test_shallow_and_partial_clones_are_that(hub: Hub, git: Client, repo: Repo, protocol: int) -> None:
    await git.must("clone", "-q", "--depth=1", f"{hub.url}/org/m.git", "shallow", protocol=protocol)
    assert await git.must("rev-list", "--count", "HEAD", at="shallow") == "1"
    await git.must("fetch", "-q", "--unshallow", at="shallow", protocol=protocol)
    assert await git.must("rev-list", "--count", "HEAD", at="shallow") == "3"
    hub.counters.reset()
    options = ("--filter=blob:none", "--no-checkout")
    await git.must("clone", "-q", *options, f"{hub.url}/org/m.git", "partial", protocol=protocol)
    assert hub.counters.bytes("hub", match=WANT) < 10_000
    missing = await git.must("rev-list", "--objects", "--missing=print", "HEAD", at="partial")
    assert repo.head is not None
    assert f"?{repo.head.files['plain.dat'].git_oid}" in missing.splitlines()
    await git.must("checkout", "-q", "main", at="partial", protocol=protocol)
    assert (git.home / "partial/plain.dat").read_bytes() == PLAIN.bytes()


async def test_any_commit_can_be_fetched_by_its_id(hub: Hub, git: Client, repo: Repo) -> None:
    lost = repo.commit({"lost": "x"}, "gone")
    repo.drop_ref("gone")
    for protocol in (0, 2):
        await git.must("init", "-q", f"copy{protocol}")
        await git.must("fetch", "-q", f"{hub.url}/org/m", lost, at=f"copy{protocol}", protocol=protocol)
        assert await git.must("rev-parse", "FETCH_HEAD", at=f"copy{protocol}") == lost
    del repo.commits[lost]
    await git.must("init", "-q", "late")
    assert "not our ref" in (await git("fetch", f"{hub.url}/org/m", lost, at="late")).said


async def test_the_copy_on_disk_follows_and_writes_only_what_is_new(hub: Hub, git: Client, repo: Repo) -> None:
    await git.must("clone", "-q", f"{hub.url}/org/m", "copy")
    folder = await hub.world.shelf.folder(repo)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("objects/*/*")}
    first = repo.refs["refs/tags/v1"]
    newest = repo.commit({"a.txt": "four"})
    repo.move("back", newest)
    await git.must("pull", "-q", at="copy")
    assert (git.home / "copy/a.txt").read_text() == "four"
    after = {path: path.stat().st_mtime_ns for path in folder.glob("objects/*/*")}
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 3
    repo.move("main", first)
    repo.drop_ref("feature/x")
    repo.tag("v2", newest)
    await git.must("fetch", "-q", "--prune", "--tags", at="copy")
    heads = await git.must("for-each-ref", "--format=%(refname:short)", "refs/remotes", "refs/tags", at="copy")
    assert heads.split() == ["origin/HEAD", "origin/back", "origin/main", "v1", "v2"]
    assert await git.must("rev-parse", "origin/main", at="copy") == first
    assert (await git.refs(f"{hub.url}/org/m"))["refs/tags/v2"] == newest


@needs_lfs
async def test_lfs_brings_the_files_of_main_and_of_all_history(hub: Hub, git: Client, repo: Repo) -> None:
    await git.must("clone", "-q", f"{hub.url}/org/m", "copy")
    assert (git.home / "copy/model.bin").stat().st_size < 200
    await git.pull_lfs("copy")
    assert (git.home / "copy/model.bin").read_bytes() == WEIGHTS.bytes()
    assert hub.counters.bytes("cdn") == WEIGHTS.size
    await git.must("lfs", "fetch", "--all", at="copy")
    old = repo.commits[repo.refs["refs/tags/v1"]].files["model.bin"].sha256
    kept = git.home / f"copy/.git/lfs/objects/{old[:2]}/{old[2:4]}/{old}"
    assert kept.read_bytes() == OLD_WEIGHTS.bytes()


@needs_lfs
async def test_lfs_of_a_private_repo_and_over_a_cdn_that_cuts(hub: Hub, git: Client) -> None:
    hub.users["hf_good"] = User("bob", {"org/p"})
    hub.repo("org/p", private=True).commit({".gitattributes": ATTRIBUTES, "model.bin": LFS(WEIGHTS)})
    rule = hub.faults.add(Fault.truncate(200_000), on="cdn", times=1)
    await git.must("clone", "-q", hub.url.replace("://", "://x:hf_good@") + "/org/p", "copy")
    await git.pull_lfs("copy")
    assert (git.home / "copy/model.bin").read_bytes() == WEIGHTS.bytes()
    assert rule.hits == 1
    assert all(record.header("Authorization") is None for record in hub.log.find("cdn"))


async def test_batches_name_what_is_wrong_with_each_object(hub: Hub, repo: Repo) -> None:
    old = (OLD_WEIGHTS.sha256, OLD_WEIGHTS.size)
    answer = await posted(hub, batch(old, (WEIGHTS.sha256, 7), ("0" * 64, 1)))
    told = json.loads(answer.body)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/vnd.git-lfs+json")
    assert [one.get("error", {}).get("code") for one in told["objects"]] == [None, 422, 404]
    assert [(one["oid"], one["size"]) for one in told["objects"]] == [old, (WEIGHTS.sha256, 7), ("0" * 64, 1)]
    assert told["objects"][0]["authenticated"] is True
    action = told["objects"][0]["actions"]["download"]
    assert action["href"].startswith(hub.cdn_url)
    assert hashlib.sha256((await fetch(action["href"])).body).hexdigest() == OLD_WEIGHTS.sha256
    hub.world.clock = lambda: 9e9
    assert (await fetch(action["href"])).status == 403


async def test_batches_that_are_refused(hub: Hub, repo: Repo) -> None:
    good, wrong = batch((WEIGHTS.sha256, 1)), ("x", -1)
    bodies = {
        b"{": 422,
        b"[]": 422,
        b'{"operation": "download"}': 422,
        b'{"operation": "download", "objects": [1]}': 422,
        batch((WEIGHTS.sha256, -1)): 422,
        batch(wrong): 422,
        good.replace(b"}]", b'}], "hash_algo": "sha512"'): 422,
        batch(*[("0" * 64, 1)] * 1001): 413,
        batch((WEIGHTS.sha256, 1), operation="upload"): 403,
        good: 200,
    }
    for body, status in bodies.items():
        assert (await posted(hub, body)).status == status, body[:80]
    for method, path in (("POST", "locks/verify"), ("GET", "locks"), ("GET", "objects/batch")):
        answer = await fetch(f"{hub.url}/org/m.git/info/lfs/{path}", method)
        assert (answer.status, json.loads(answer.body)["message"]) == (404, "Not Found")


@pytest.mark.parametrize(
    ("name", "token", "status"),
    [
        ("org/absent", "", 401),
        ("org/private", "", 401),
        ("org/gated", "", 401),
        ("org/private", "hf_wrong", 401),
        ("org/absent", "hf_stranger", 404),
        ("org/private", "hf_stranger", 404),
        ("org/gated", "hf_stranger", 403),
        ("org/m", "hf_stranger", 200),
        ("org/private", "hf_good", 200),
        ("org/gated", "hf_good", 200),
    ],
)
async def test_who_may_read(hub: Hub, git: Client, repo: Repo, name: str, token: str, status: int) -> None:
    """The status of refs, of a batch, and what git makes of it; Basic and Bearer mean the same."""
    hub.users.update({"hf_good": User("bob", {"org/private", "org/gated"}), "hf_stranger": User("eve")})
    for hidden in (hub.repo("org/private", private=True), hub.repo("org/gated", gated=True)):
        hidden.commit({"a": "b"})
    basic = {"Authorization": "Basic " + base64.b64encode(f"any:{token}".encode()).decode()} if token else {}
    bearer = {"Authorization": f"Bearer {token}"} if token else {}
    for headers in (basic, bearer):
        refs = await fetch(f"{hub.url}/{name}/info/refs?service=git-upload-pack", headers=headers)
        asked = await fetch(f"{hub.url}/{name}.git/info/lfs/objects/batch", "POST", headers, batch(("0" * 64, 1)))
        assert (refs.status, asked.status) == (status, status)
        wants_password = 'Basic realm="Authentication required"' if status == 401 else None
        assert {one.headers.get("www-authenticate") for one in (refs, asked)} == {wants_password}
    if name == "org/absent" or not token:
        return
    ran = await git("ls-remote", hub.url.replace("://", f"://x:{token}@") + f"/{name}")
    heard = {200: "refs/heads/main", 401: "", 403: "not in the authorized list", 404: "Repository not found"}
    assert (ran.status == 0, heard[status] in ran.said) == (status == 200, True)


async def test_absent_and_private_repos_sound_the_same(hub: Hub, git: Client) -> None:
    hub.repo("org/private", private=True).commit({"a": "b"})
    answers = [await fetch(f"{hub.url}/org/{name}/info/refs?service=git-upload-pack") for name in ("private", "absent")]
    told = [(one.status, one.body, {**one.headers, "x-request-id": "", "date": "", "ratelimit": ""}) for one in answers]
    assert told[0] == told[1]
    assert (await git("clone", f"{hub.url}/org/private", "copy")).status == 128
    hub.users["hf_good"] = User("bob", {"org/private"})
    await git.must("clone", "-q", hub.url.replace("://", "://x:hf_good@") + "/org/private", "copy")
    assert (git.home / "copy/a").read_text() == "b"


async def test_what_is_not_for_readers(hub: Hub, repo: Repo) -> None:
    url = f"{hub.url}/org/m.git"
    assert (await fetch(f"{url}/info/refs?service=git-receive-pack")).status == 403
    assert (await fetch(f"{url}/git-receive-pack", "POST")).status == 403
    assert (await fetch(f"{url}/info/refs")).status == 404
    assert (await fetch(f"{url}/git-upload-pack")).status == 404
    assert (await fetch(f"{url}/git-upload-pack", "POST")).status == 415


@needs_lfs
async def test_a_renamed_repo_redirects(hub: Hub, git: Client, repo: Repo) -> None:
    repo.rename("org/new")
    got = await fetch(f"{hub.url}/org/m.git/info/refs?service=git-upload-pack")
    assert (got.status, got.headers["location"]) == (307, "/org/new.git/info/refs?service=git-upload-pack")
    await git.must("clone", "-q", f"{hub.url}/org/m", "copy")
    await git.pull_lfs("copy")
    assert (git.home / "copy/model.bin").read_bytes() == WEIGHTS.bytes()
    assert hub.log.find(method="POST", match="/org/new/git-upload-pack")


async def test_a_repository_that_somebody_else_wrote(hub: Hub, git: Client) -> None:
    await git.must("init", "-q", "--bare", "-b", "trunk", "made.git")
    told = "\n".join(
        ["commit refs/heads/trunk", "committer <a@example.org> 0 +0000", "data 0", "M 120000 inline link", "data 2", ".."]
    )
    command = ["git", "-C", str(git.home / "made.git"), "fast-import", "--quiet"]
    await asyncio.to_thread(subprocess.run, command, input=told.encode(), check=True)
    hub.users["hf_good"] = User("bob", {"org/made"})
    made = hub.git("org/made", git.home / "made.git")
    await git.must("clone", "-q", f"{hub.url}/org/made", "copy")
    assert str((git.home / "copy/link").readlink()) == ".."
    made.private = True
    assert (await git("ls-remote", f"{hub.url}/org/made")).status != 0
    with pytest.raises(ValueError, match="not a git repository"):
        hub.git("org/none", git.home / "none")


async def test_the_ledger_counts_both_ways(hub: Hub, git: Client, repo: Repo) -> None:
    await git.must("clone", "-q", "--bare", f"{hub.url}/org/m", "copy")
    assert hub.counters.requests("hub", method="GET", match="/org/m/info/refs") == 1
    assert hub.counters.requests("hub", method="POST", match="/org/m/git-upload-pack") == 2
    packs = list((git.home / "copy/objects/pack").glob("*.pack"))
    sent = hub.counters.bytes("hub", match=WANT)
    assert packs[0].stat().st_size < sent < packs[0].stat().st_size * 1.01 + 10_000
    lengths = [int(one.header("Content-Length") or 0) for one in hub.log.find(method="POST")]
    assert hub.counters.received("hub", match=WANT) == sum(lengths) > 200
    assert [(one.status, one.aborted, one.done) for one in hub.log] == [(200, False, True)] * 3


async def test_bodies_may_be_packed_or_come_in_chunks(hub: Hub, repo: Repo) -> None:
    """The same question plain, as gzip, in chunks after 100 Continue: one answer. What is not gzip is cut off."""
    url = f"{hub.url}/org/m/git-upload-pack"
    told = {"Content-Type": REQUEST, "Git-Protocol": "version=2"}
    body = b"0014command=ls-refs\n00010000"
    plain = await fetch(url, "POST", told, body)
    assert (plain.status, plain.body.count(b"refs/")) == (200, 4)
    packed = gzip.compress(body)
    assert (await fetch(url, "POST", {**told, "Content-Encoding": "gzip"}, packed)).body == plain.body
    assert hub.log[-1].received == len(packed)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(hub.url.rpartition(":")[2]))
    lines = ["POST /org/m/git-upload-pack HTTP/1.1", "Host: hub", "Transfer-Encoding: chunked", "Expect: 100-continue"]
    lines += [*(f"{name}: {value}" for name, value in told.items()), "Connection: close", "", ""]
    writer.write("\r\n".join(lines).encode())
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    for at in range(len(body)):
        writer.write(b"1\r\n%c\r\n" % body[at])
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    assert plain.body in await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    assert hub.log[-1].received == len(body)
    broken = await fetch(url, "POST", {**told, "Content-Encoding": "gzip"}, body)
    assert (broken.body, hub.log[-1].aborted) == (b"", True)


async def test_a_pack_that_is_cut_fails_once_and_only_where_it_is_long_enough(hub: Hub, git: Client, repo: Repo) -> None:
    rule = hub.faults.add(Fault.truncate(after=500_000), match=WANT, times=1)
    assert (await git("clone", f"{hub.url}/org/m", "copy")).status == 128
    assert [(one.fault, one.sent) for one in hub.log.find(method="POST")][1:] == [("truncate", 500_000)]
    assert hub.log[1].fault == ""
    assert rule.hits == 1
    await git.must("clone", "-q", f"{hub.url}/org/m", "copy")


@pytest.mark.parametrize(
    "fault",
    [
        Fault.status(503, {}, b"busy"),
        Fault.html_200(),
        Fault.reset(),
        Fault.reset(after=500_000),
        Fault.corrupt(500_000),
        Fault.drop_every(500_000),
        Fault.overrun(9),
    ],
)
async def test_faults_of_files_are_faults_of_packs(hub: Hub, git: Client, repo: Repo, fault: Fault) -> None:
    rule = hub.faults.add(fault, method="POST", match=WANT)
    assert (await git("clone", f"{hub.url}/org/m", "copy")).status != 0
    assert rule.hits == (2 if fault == Fault.reset() else 1)  # curl tries a kept connection that breaks once more


async def test_a_pack_that_stalls_goes_on_when_released_and_ends_with_its_client(hub: Hub, git: Client, repo: Repo) -> None:
    rule = hub.faults.add(Fault.stall(after=500_000), match=WANT)
    cloning = asyncio.create_task(git.must("clone", "-q", f"{hub.url}/org/m", "copy"))
    await hub.until(lambda: rule.stalled == 1)
    assert hub.log[-1].sent == 500_000
    rule.release()
    await cloning
    hub.faults.clear()
    rule = hub.faults.add(Fault.stall(after=20), match="/info/refs")
    conversation = await ask(f"{hub.url}/org/m/info/refs?service=git-upload-pack")
    await hub.until(lambda: rule.stalled == 1)
    await conversation.close()
    await hub.until(lambda: hub.active("hub") == 0)
    assert (hub.log[-1].aborted, hub.log[-1].sent) == (True, 20)


async def test_no_process_outlives_its_client(hub: Hub, repo: Repo) -> None:
    """Of a client that leaves in the middle of its pack; and half a question that is wrong is answered at once."""
    rule = hub.faults.add(Fault.stall(after=1000), match=WANT, times=1)
    url = f"{hub.url}/org/m/git-upload-pack"
    told = {"Content-Type": REQUEST, "Git-Protocol": "version=2"}
    body = b"0011command=fetch00010032want %s\n0009done\n0000" % repo.refs["refs/heads/main"].encode()
    conversation = await ask(url, "POST", told, body)
    await hub.until(lambda: rule.stalled == 1)
    assert "git" in running()
    await conversation.close()
    await hub.until(lambda: hub.active("hub") == 0)
    assert "git" not in running()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(hub.url.rpartition(":")[2]))
    lines = ["POST /org/m/git-upload-pack HTTP/1.1", "Host: hub", "Content-Length: 1000"]
    lines += [*(f"{name}: {value}" for name, value in told.items()), "", "0009wrong"]
    writer.write("\r\n".join(lines).encode())
    async with asyncio.timeout(5):
        assert (await reader.readuntil(b"\r\n0\r\n\r\n")).startswith(b"HTTP/1.1 200")
    writer.close()
    await writer.wait_closed()


async def test_caps_and_drips_pace_a_pack(hub: Hub, git: Client, repo: Repo) -> None:
    clock = asyncio.get_running_loop().time
    hub.cap(total=5e6)
    began = clock()
    await git.must("clone", "-q", "--bare", f"{hub.url}/org/m", "capped")
    assert clock() - began > 1.5e6 / 5e6
    hub.cap()
    hub.faults.add(Fault.drip(3000), match="/info/refs")
    began = clock()
    await git.refs(f"{hub.url}/org/m")
    sent = hub.log.find(match="/info/refs")[-1].sent
    assert clock() - began > sent / 3000 / 2 > 0


async def test_the_disk_is_left_clean_and_a_stopped_hub_returns(
    git: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    async with Hub() as hub:
        commit = hub.repo("org/m").commit({"a": PLAIN})
        rule = hub.faults.add(Fault.stall(after=500_000), match=WANT)
        cloning = asyncio.create_task(git("clone", "-q", f"{hub.url}/org/m", "copy"))
        await hub.until(lambda: rule.stalled == 1)
        assert list((tmp_path / "scratch").iterdir()) != []
        await hub.stop()
        assert (await cloning).status == 128
        assert list((tmp_path / "scratch").iterdir()) == []
        hub.faults.clear()
        await hub.start()
        assert (await git.refs(f"{hub.url}/org/m"))["HEAD"] == commit
    assert list((tmp_path / "scratch").iterdir()) == []


async def test_a_hub_in_another_process_serves_git(git: Client) -> None:
    await git.must("init", "-q", "--bare", "empty.git")
    with HubProcess() as hub:
        repo = hub.repo("org/m")
        repo.move("x", repo.commit({"a": "b"}))
        commit = repo.commit({"a": "c"})
        repo.drop_ref("x")
        hub.git("org/empty", git.home / "empty.git")
        assert await git.refs(f"{hub.url}/org/m") == {"HEAD": commit, "refs/heads/main": commit}
        assert await git.refs(f"{hub.url}/org/empty") == {}
        assert hub.received(match="/org/m/git-upload-pack") > 100
        assert hub.requests(match="/org/empty") == 1 + 1
