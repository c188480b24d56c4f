"""From a mirror that sees the Hub, through a bundle, to one that never did: what real clients get there."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from nearhub.config import load
from tests.hub import LFS, Content, Hub, User
from tests.mirror import Mirror, run_client
from tests.proxy.bundle.gap import Side, fetched, get, inside, outside, serving

WEIGHTS = Content(3_000_000, seed=1)
FILES = {"config.json": b'{"a": 1}', "empty.txt": b"", "weights.bin": LFS(WEIGHTS), "sub/dir/notes.txt": b"notes"}
ALICE = "hf_AliceAliceAliceAliceAlice"
GIT = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_LFS_SKIP_SMUDGE": "1", "GIT_TERMINAL_PROMPT": "0"}
HF = str(Path(sys.executable).with_name("hf"))


@pytest.mark.parametrize("is_running", [True, False])
async def test_a_public_repo_crosses_and_hf_downloads_it_there(tmp_path: Path, hub: Hub, is_running: bool) -> None:
    """Exported from a running mirror, imported into a running one or into a directory: the same bytes, and the same API."""
    commit = hub.repo("org/m").commit(FILES)
    async with outside(tmp_path / "out", hub) as (out, mirror):
        await fetched(mirror, "org/m", *FILES)
        log = await get(f"{mirror.url}/api/models/org/m/commits/main")
        assert log[0] == 200
        told = await out.ask("export", "org/m", "--to", str(tmp_path / "b"), "--max-part", "1MiB")
        await out.run("export", "org/m", "--to", str(tmp_path / "delta"), "--since", str(tmp_path / "b"))
    assert json.loads((tmp_path / "delta" / "bundle.json").read_bytes())["repos"][0]["documents"] == []
    assert told["parts"] == 3 and told["missing"] == 0 and told["repos"][0]["revisions"] == [commit]
    side = inside(tmp_path / "in")
    if is_running:
        async with serving(side) as mirror:
            assert (await get(f"{mirror.url}/org/m/resolve/main/config.json"))[0] == 404
            await side.run("import", str(tmp_path / "b"))
            await _downloads(mirror.url, tmp_path / "got")
            assert await get(f"{mirror.url}/api/models/org/m/commits/main") == log
    else:
        await side.run("import", str(tmp_path / "b"))
        async with serving(side) as mirror:
            await _downloads(mirror.url, tmp_path / "got")


async def _downloads(url: str, folder: Path) -> None:
    env = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    status, said = await run_client(HF, "download", "org/m", "--local-dir", str(folder / "m"), env=env)
    assert status == 0, said
    assert (folder / "m" / "sub/dir/notes.txt").read_bytes() == b"notes"
    assert hashlib.sha256((folder / "m" / "weights.bin").read_bytes()).hexdigest() == WEIGHTS.sha256
    status, _ = await get(f"{url}/org/m/resolve/main/nothing")
    assert status == 404


async def git(*arguments: str | Path) -> str:
    status, said = await run_client("git", *map(str, arguments), env=GIT)
    assert status == 0, said
    return said


# — who may have it ————————————————————————————————————————————————————————————————————————————————


@pytest.mark.parametrize("name", ["org/gated", "org/private"])
async def test_what_was_not_public_is_refused_there_but_by_a_policy(tmp_path: Path, hub: Hub, name: str) -> None:
    """At every door, to everybody, a token that opened it outside included; and open to whom the operator there named."""
    hub.repo(name, private="private" in name, gated="gated" in name).commit(FILES)
    hub.users[ALICE] = User("alice", {name})
    async with outside(tmp_path / "out", hub) as (out, mirror):
        await fetched(mirror, name, *FILES, token=ALICE)
        if "gated" in name:  # its listing is public
            assert (await get(f"{mirror.url}/api/models/{name}"))[0] == 200
        told = await out.ask("export", name, "--to", str(tmp_path / "b"))
        assert told["repos"][0]["status"] == {"org/gated": "gated", "org/private": "restricted"}[name]
    settings = tmp_path / "nearhub.toml"
    settings.write_text(f'[access]\ntokens = "tokens"\n[[policies]]\nname = "lab"\nrepos = ["{name}"]\nwho = ["lab"]\n')
    made = await run_client(*_nearhub("token", "add", "carol", "--group", "lab", "--config", settings))
    carol = made[1].split()[0]
    side = inside(tmp_path / "in")
    await side.run("import", str(tmp_path / "b"))
    async with serving(side, settings) as mirror:
        paths = [f"{name}/resolve/main/{path}" for path in FILES] + [f"{name}/config.json", f"{name}/raw/main/config.json"]
        for path in paths:
            for token in (None, ALICE):
                status, body = await get(f"{mirror.url}/{path}", token)
                assert status in (401, 403, 404, 503) and b"notes" not in body, path
        listed = (await get(f"{mirror.url}/api/models/{name}"))[0]
        assert listed == (200 if "gated" in name else 404)
        assert await get(f"{mirror.url}/{name}/resolve/main/sub/dir/notes.txt", carol) == (200, b"notes")
        status, body = await get(f"{mirror.url}/api/models/{name}/revision/main", carol)
        assert status == 200 and len(json.loads(body)["siblings"]) == len(FILES)


def _nearhub(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "nearhub", *map(str, arguments)]


# — git ————————————————————————————————————————————————————————————————————————————————————————————


async def test_git_clones_there_and_a_delta_moves_its_refs(tmp_path: Path, hub: Hub) -> None:
    """All objects and refs cross; then what is new: a commit more, a branch less. Nothing new is no object at all."""
    repo = hub.repo("org/m")
    repo.commit(FILES)
    repo.commit({"config.json": b"dev"}, revision="dev")
    side = inside(tmp_path / "in", CACHE_DIR=str(tmp_path / "in"))
    async with outside(tmp_path / "out", hub, UPSTREAM_REF_TTL="1ms") as (out, mirror):
        await fetched(mirror, "org/m", *FILES)
        await git("clone", "-q", f"{mirror.url}/org/m", tmp_path / "c1")
        await out.run("export", "org/m", "--git", "--to", str(tmp_path / "b1"))
        commit = repo.commit({"config.json": b"news"})
        del repo.refs["refs/heads/dev"]
        for path in ("api/models/org/m", f"org/m/resolve/{commit}/config.json"):
            assert (await get(f"{mirror.url}/{path}"))[0] == 200
        await git("clone", "-q", f"{mirror.url}/org/m", tmp_path / "c2")
        told = await out.ask("export", "org/m", "--git", "--to", str(tmp_path / "b2"), "--since", str(tmp_path / "b1"))
        assert told["items"] == 3, "a blob, git's, and proofs"
        told = await out.ask("export", "org/m", "--git", "--to", str(tmp_path / "b3"), "--since", str(tmp_path / "b2"))
        assert told["items"] == 0
    await side.run("import", str(tmp_path / "b1"))
    async with serving(side) as mirror:
        await git("clone", "-q", f"{mirror.url}/org/m", tmp_path / "d1")
        assert "origin/dev" in await git("-C", tmp_path / "d1", "branch", "-r")
        for number in "23":
            await side.run("import", str(tmp_path / f"b{number}"))
        await git("clone", "-q", f"{mirror.url}/org/m", tmp_path / "d2")
        assert (await git("-C", tmp_path / "d2", "rev-parse", "HEAD")).strip() == commit
        assert "origin/dev" not in await git("-C", tmp_path / "d2", "branch", "-r")
        assert not list((tmp_path / "in" / "incoming").iterdir())


# — copies —————————————————————————————————————————————————————————————————————————————————————————


async def test_a_cache_of_huggingface_hub_is_taken_in(tmp_path: Path, hub: Hub) -> None:
    """What scan_cache_dir sees there is what is served here; a damaged blob, a copy and a planted link are left, and named."""
    from huggingface_hub import scan_cache_dir

    hub.repo("org/m").commit(FILES)
    hub.repo("org/d", "datasets").commit({"train.csv": b"a,b"})
    home = tmp_path / "home" / "hub"
    async with outside(tmp_path / "out", hub) as (_, mirror):
        for what in (("org/m",), ("org/d", "--repo-type", "dataset")):
            env = {"HF_ENDPOINT": mirror.url, "HF_HUB_CACHE": str(home)}
            status, said = await run_client(HF, "download", *what, env=env)
            assert status == 0, said
    seen = {(repo.repo_id, file.file_name) for repo in scan_cache_dir(home).repos for r in repo.revisions for file in r.files}
    assert len(seen) == 5
    (snapshot,) = (home / "models--org--m" / "snapshots").iterdir()
    secret = tmp_path / "secret"
    secret.write_text("not for everybody")
    (snapshot / "planted").symlink_to(secret)
    (snapshot / "plain").write_text("a copy")
    side = inside(tmp_path / "in")
    told = await side.ask("import-hf-cache", str(home), "--public")
    assert [(row["repo"], row["status"], row["wrong"]) for row in told["repos"]] == [
        ("datasets/org/d", "public", 0),
        ("org/m", "public", 0),
    ]
    assert {one.split(":")[0].split("/", 1)[1] for row in told["repos"] for one in row["left"]} == {"planted", "plain"}
    async with serving(side) as mirror:
        await _downloads(mirror.url, tmp_path / "got")
        assert await get(f"{mirror.url}/datasets/org/d/resolve/main/train.csv") == (200, b"a,b")
        assert (await get(f"{mirror.url}/org/m/resolve/main/planted"))[0] == 404


async def test_a_copy_says_nothing_of_who_may_see_it(tmp_path: Path, hub: Hub) -> None:
    """Without upstream and without --public: restricted. Wrong bytes are no blob, and the exit status says so."""
    hub.repo("org/m").commit(FILES)
    home = tmp_path / "hub"
    async with outside(tmp_path / "out", hub) as (_, mirror):
        await run_client(HF, "download", "org/m", env={"HF_ENDPOINT": mirror.url, "HF_HUB_CACHE": str(home)})
    side = inside(tmp_path / "in")
    assert "nobody has them but by a policy" in await side.run("import-hf-cache", str(home))
    async with serving(side) as mirror:
        assert (await get(f"{mirror.url}/org/m/resolve/main/config.json"))[0] == 404
    blob = home / "models--org--m" / "blobs" / WEIGHTS.sha256
    blob.write_bytes(Content(WEIGHTS.size, seed=2).bytes())
    side = inside(tmp_path / "in2")
    told = await side.ask("import-hf-cache", str(home), "--public", status=1)
    assert told["repos"][0]["wrong"] == 1 and len(side.blobs()) == 3
    async with serving(side) as mirror:
        assert (await get(f"{mirror.url}/org/m/resolve/main/weights.bin"))[0] == 404
        assert (await get(f"{mirror.url}/org/m/resolve/main/config.json"))[0] == 200


async def test_where_upstream_answers_it_says_what_a_copy_is_worth(tmp_path: Path, hub: Hub) -> None:
    """A running mirror asks: a public repo is public, a gated one gated, and a commit that never was is contradicted."""
    hub.repo("org/m").commit(FILES)
    hub.repo("org/gated", gated=True).commit(FILES)
    hub.users[ALICE] = User("alice", {"org/gated"})
    home = tmp_path / "hub"
    async with outside(tmp_path / "out", hub) as (_, mirror):
        for name in ("org/m", "org/gated"):
            env = {"HF_ENDPOINT": mirror.url, "HF_HUB_CACHE": str(home), "HF_TOKEN": ALICE}
            status, said = await run_client(HF, "download", name, env=env)
            assert status == 0, said
    (snapshot,) = (home / "models--org--m" / "snapshots").iterdir()
    made_up = "f" * 40
    shutil.copytree(snapshot, snapshot.with_name(made_up), symlinks=True)
    (snapshot.with_name(made_up) / "weights.bin").unlink()
    async with outside(tmp_path / "in", hub) as (side, mirror):
        told = await side.ask("import-hf-cache", str(home), status=1)
        (refused,) = [one for row in told["repos"] for one in row["refused"]]
        assert refused.startswith(f"{made_up}: upstream knows no such commit")
        assert (await get(f"{mirror.url}/org/m/resolve/{made_up}/config.json"))[0] == 404
        assert {(row["repo"], row["status"], row["checked_upstream"]) for row in told["repos"]} == {
            ("org/m", "public", True),
            ("org/gated", "gated", True),
        }
        sent = sum(one.sent for one in hub.log if one.origin == "cdn" or "/resolve/" in one.raw_path)
        await fetched(mirror, "org/m", *FILES)
        assert (await get(f"{mirror.url}/org/gated/resolve/main/config.json"))[0] == 401
        assert sum(one.sent for one in hub.log if one.origin == "cdn" or "/resolve/" in one.raw_path) == sent


@pytest.mark.parametrize("is_bare", [False, True])
async def test_a_git_clone_is_taken_in(tmp_path: Path, hub: Hub, is_bare: bool) -> None:
    """The commit that is checked out, whole: files of git's, LFS objects that were pulled, and their names."""
    commit = hub.repo("org/m").commit(FILES)
    clone = tmp_path / "clone"
    pull = {**GIT, "GIT_LFS_SKIP_SMUDGE": "0"}
    async with outside(tmp_path / "out", hub) as (_, mirror):
        status, said = await run_client("git", "clone", "-q", f"{mirror.url}/org/m", str(clone), env=pull)
        assert status == 0, said
        status, said = await run_client("git", "lfs", "pull", env=pull, cwd=clone)
        assert status == 0, said
    assert len(list((clone / ".git" / "lfs" / "objects").rglob("?" * 64))) == 1, "git-lfs brought nothing"
    if is_bare:
        clone = clone / ".git"
    side = inside(tmp_path / "in")
    told = await side.ask("import", str(clone), "--public")
    assert told["repos"][0] | {"left": []} == told["repos"][0]
    assert (told["repos"][0]["repo"], told["repos"][0]["commits"]) == ("org/m", [commit])
    async with serving(side) as mirror:
        await _downloads(mirror.url, tmp_path / "got")
        status, body = await get(f"{mirror.url}/api/models/org/m/tree/main?recursive=true")
        assert status == 200 and {one["path"] for one in json.loads(body)} == {*FILES, "sub", "sub/dir"}


async def test_a_clone_that_does_not_say_what_it_is_of(tmp_path: Path) -> None:
    """Made here, without a remote: --repo names it. No clone at all, and no bundle: said."""
    clone = tmp_path / "work"
    await git("init", "-q", "-b", "main", clone)
    side = inside(tmp_path / "in")
    assert "git cannot read it" in await side.run("import", str(clone), status=1)
    (clone / "a.txt").write_text("a")
    author = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    await git("-C", clone, "add", ".")
    await git("-C", clone, *author, "commit", "-q", "-m", "x")
    assert "name it with --repo" in await side.run("import", str(clone), status=1)
    assert "datasets/org/d  restricted" in await side.run("import", str(clone), "--repo", "datasets/org/d")
    assert "no bundle here" in await side.run("import", str(tmp_path / "in" / "blobs"), status=1)
    assert "no cache of huggingface_hub" in await side.run("import-hf-cache", str(tmp_path), status=1)


# — as an operator does it —————————————————————————————————————————————————————————————————————————


async def test_keygen_sign_verify_and_trust(tmp_path: Path, hub: Hub) -> None:
    """keygen, export --sign, minisign on the way, sha256sum -c, import --check, trusted_keys; and a tampered bundle refused."""
    hub.repo("org/m").commit(FILES)
    bundle, key = tmp_path / "b", tmp_path / "vetting"
    made = await run_client(*_nearhub("keygen", key))
    assert made[0] == 0 and made[1].startswith("RW") and key.stat().st_mode & 0o777 == 0o600
    assert (await run_client(*_nearhub("keygen", key)))[0] == 1
    async with outside(tmp_path / "out", hub) as (out, mirror):
        await fetched(mirror, "org/m", *FILES)
        assert "signed by " in await out.run("export", "org/m", "--to", str(bundle), "--sign", str(key))
    check = await run_client("minisign", "-V", "-p", f"{key}.pub", "-m", str(bundle / "bundle.json"))
    assert check[0] == 0, check[1]
    summed = await run_client("sha256sum", "--strict", "-c", "SHA256SUMS", cwd=bundle)
    assert summed[0] == 0, summed[1]
    side = inside(tmp_path / "in", IMPORT_TRUSTED_KEYS=f"{key}.pub")
    assert "nothing was imported" in await side.run("import", "--check", str(bundle))
    stranger = inside(tmp_path / "in", IMPORT_TRUSTED_KEYS="RWQ" + 53 * "A")
    assert "trusted are" in await stranger.run("import", str(bundle), status=1)
    assert "public  main  1 revisions" in await side.run("import", str(bundle))
    assert load(None, {"NEARHUB_IMPORT_TRUSTED_KEYS": f"{key}.pub", "HOME": "/x"}, {}).imports.trusted_keys == (f"{key}.pub",)
    manifest = bundle / "bundle.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"sequence":1', b'"sequence":2'))
    assert "changed" in await side.run("import", str(bundle), status=1)


async def test_a_thousand_files_unchanged_are_a_small_delta(tmp_path: Path, hub: Hub) -> None:
    """The second bundle of a repo that did not change has less than 100 kB, whatever is in it."""
    hub.repo("org/many").commit({f"d{n % 10}/f{n}.txt": b"%d" % n for n in range(1500)})
    async with outside(tmp_path / "out", hub) as (out, mirror):
        assert (await get(f"{mirror.url}/api/models/org/many/tree/main?recursive=true"))[0] == 200
        assert (await get(f"{mirror.url}/org/many/resolve/main/d0/f0.txt"))[0] == 200
        full = await out.ask("export", "org/many", "--to", str(tmp_path / "1"))
        assert full["missing"] == 1499
        await _small(out, tmp_path)
    side = inside(tmp_path / "in")
    for number in "12":
        await side.run("import", str(tmp_path / number))
    async with serving(side) as mirror:
        await _lists_all(mirror)


async def _small(out: Side, folder: Path) -> None:
    delta = await out.ask("export", "org/many", "--to", str(folder / "2"), "--since", str(folder / "1"))
    assert sum(path.stat().st_size for path in (folder / "2").iterdir()) < 100_000 and delta["items"] == 0


async def _lists_all(mirror: Mirror) -> None:
    status, body = await get(f"{mirror.url}/api/models/org/many/revision/main")
    assert status == 200 and len(json.loads(body)["siblings"]) == 1500
