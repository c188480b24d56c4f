"""--offline: every route that the mirror has is answered from what is here, at once, and nobody outside hears of it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.clients import test_datasets, test_transformers
from tests.clients.lan import NEWEST, PREFIX, VERSIONS, Lan, lan
from tests.hub import LFS, Content, Hub, User
from tests.mirror import run_client

WEIGHTS = Content(3_000_000, seed=5)
ABSENT = Content(100_000, seed=6)

CALLS = """
import time
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
api, took = HfApi(), {}
def call(name, ask):
    began = time.monotonic()
    try:
        out[name] = ask()
    except Exception as error:
        out[name] = f"{type(error).__name__}: {error}"
    took[name] = time.monotonic() - began
"""
ELEVEN = f"""{CALLS}
call("model_info", lambda: [api.model_info("org/m").sha, len(api.model_info("org/m", files_metadata=True).siblings)])
call("tree", lambda: sorted([e.path, getattr(e, "tree_id", "") or e.blob_id] for e in api.list_repo_tree("org/m")))
call("whole_tree", lambda: sorted(e.path for e in api.list_repo_tree("org/m", recursive=True)))
call("expanded_tree", lambda: sorted(e.path for e in api.list_repo_tree("org/m", recursive=True, expand=True)))
call("paths_info", lambda: [[e.path, e.size] for e in api.get_paths_info("org/m", ["sub/model.bin"])])
call("refs", lambda: [[b.name, b.target_commit] for b in api.list_repo_refs("org/m").branches])
call("commits", lambda: [c.commit_id for c in api.list_repo_commits("org/m")])
call("list_models", lambda: [m.id for m in api.list_models(search="M", author="org", sort="downloads", limit=5)])
call("whoami", lambda: api.whoami(token="hf_of_somebody")["name"])
call("hf_hub_download", lambda: pathlib.Path(hf_hub_download("org/m", "config.json")).read_text())
call("snapshot_download", lambda: hashes(snapshot_download("org/m")))
call("list_repo_files", lambda: sorted(api.list_repo_files("org/m")))
call("dataset_info", lambda: api.dataset_info("org/d").id)
call("list_datasets", lambda: [d.id for d in api.list_datasets(search="d")])
call("expand", lambda: [api.model_info("org/m", expand=["downloads", "gguf"]).downloads])
call("file_exists", lambda: [api.file_exists("org/m", name) for name in ("config.json", "no.json")])
call("file_system", lambda: [sorted(HfFileSystem().find("org/m")), HfFileSystem().read_bytes("org/m/config.json").decode()])
call("auth_check", lambda: api.auth_check("org/m"))
"""
UNKNOWN = """
call("unknown_repo", lambda: api.model_info("org/never"))
call("unknown_file", lambda: " ".join(raised(hf_hub_download, "org/half", "absent.bin")))
out["slow"] = {name: round(s, 2) for name, s in took.items() if s > 3}
"""


def publish(hub: Hub) -> str:
    """What a lab has: a model, a dataset, and a model of which one file was never asked for. The model's commit."""
    hub.repo("org/d", "datasets").commit({"README.md": b"# d\n"})
    hub.repo("org/half").commit({"config.json": b"{}", "absent.bin": LFS(ABSENT)})
    repo = hub.repo("org/m")
    attributes = b"*.bin filter=lfs diff=lfs merge=lfs -text\n"
    made = {".gitattributes": attributes, "config.json": b'{"a": 1}', "sub/model.bin": LFS(WEIGHTS), "sub/deep/x.txt": b"x"}
    return repo.commit(made)


async def downloaded(net: Lan) -> None:
    """As a full `hf download` leaves the cache."""
    home = net.new_home()
    await net.hf("download", "org/m", home=home)
    await net.hf("download", "org/d", "--repo-type", "dataset", home=home)
    await net.hf("download", "org/half", "config.json", home=home)


def go_offline(net: Lan) -> None:
    """The mirror starts again, offline; the Hub stays, to hear whether anybody asks it."""
    net.mirror.terminate()
    net.mirror.extra = {**net.mirror.extra, "UPSTREAM_OFFLINE": "true"}
    net.mirror.start()
    net.hub.log.clear()


async def contacts(net: Lan) -> float:
    """DNS questions, connections and runs of git that were to leave the mirror."""
    async with aiohttp.ClientSession() as session, session.get(f"{net.url}/-/metrics") as response:
        lines = (await response.text()).splitlines()
    assert "nearhub_offline 1.0" in lines
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("nearhub_upstream_contacts_total"))


async def assert_silent(net: Lan) -> None:
    """Nobody asked anybody but the mirror, and the mirror nobody at all."""
    assert [one.raw_path for one in net.hub.log] == []
    assert await contacts(net) == 0


async def admin(net: Lan, *arguments: str) -> Any:
    command = (sys.executable, "-m", "nearhub", arguments[0], "--cache-dir", str(net.mirror.cache), *arguments[1:], "--json")
    status, said = await run_client(*command)
    assert status == 0, said
    return json.loads(said)


@pytest.mark.parametrize("base", ["", PREFIX], ids=["root", "prefix"])
async def test_every_call_of_the_api_after_one_download(hub: Hub, tmp_path: Path, base: str) -> None:
    """The eleven calls that other mirrors were measured by, and more; none waits, none leaves, none claims what is not so."""
    commit = publish(hub)
    async with lan(tmp_path, base, hub=hub) as net:
        await downloaded(net)
        direct = await net.python(ELEVEN, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")
        go_offline(net)
        out = await net.python(ELEVEN + UNKNOWN)
        files = [".gitattributes", "config.json", "sub/deep/x.txt", "sub/model.bin"]
        assert out.pop("slow") == {}
        assert out["model_info"] == [commit, len(files)]
        for same in ("tree", "whole_tree", "paths_info", "refs", "hf_hub_download", "snapshot_download", "file_system"):
            assert out[same] == direct[same], same
        assert out["expanded_tree"] == out["whole_tree"] == sorted([*files, "sub", "sub/deep"])
        assert out["list_repo_files"] == files
        assert out["commits"][0] == commit
        assert out["list_models"] == ["org/m"] and out["list_datasets"] == ["org/d"]
        assert (out["dataset_info"], out["whoami"], out["auth_check"]) == ("org/d", "unknown-offline", None)
        assert out["file_exists"] == [True, False]
        for name in ("unknown_repo", "unknown_file"):
            assert "offline" in out[name] and "nearhub prefetch" in out[name], out[name]
        await assert_silent(net)
        assert net.heard == []


@pytest.mark.parametrize("version", [version for version in VERSIONS if version != NEWEST])
async def test_older_clients_too(hub: Hub, tmp_path: Path, version: str) -> None:
    publish(hub)
    script = f"""{CALLS}
call("model_info", lambda: len(api.model_info("org/m").siblings))
call("list_models", lambda: [m.id for m in api.list_models(search="m", author="org")])
call("refs", lambda: [b.name for b in api.list_repo_refs("org/m").branches])
call("whoami", lambda: api.whoami(token="hf_of_somebody")["name"])
call("snapshot_download", lambda: len(hashes(snapshot_download("org/m"))))
"""
    async with lan(tmp_path, hub=hub) as net:
        await downloaded(net)
        go_offline(net)
        out = await net.python(script, version=version)
        assert out == {
            "model_info": 4,
            "list_models": ["org/m"],
            "refs": ["main"],
            "whoami": "unknown-offline",
            "snapshot_download": 4,
        }
        await assert_silent(net)


async def test_logging_in_goes_on(hub: Hub, tmp_path: Path) -> None:
    """`hf auth login` and `whoami` end well, with a name that says what is the matter."""
    publish(hub)
    async with lan(tmp_path, hub=hub) as net:
        go_offline(net)
        home = net.new_home()
        await net.hf("auth", "login", "--token", "hf_of_somebody", home=home)
        assert "unknown-offline" in await net.hf("auth", "whoami", home=home)
        async with aiohttp.ClientSession() as session, session.get(f"{net.url}/api/whoami-v2") as response:
            assert response.status == 401
        await assert_silent(net)


async def test_git_and_lfs(hub: Hub, tmp_path: Path) -> None:
    """What was cloned or prefetched is cloned again, its LFS files too; what was not is refused in words, at once."""
    publish(hub)
    async with lan(tmp_path, hub=hub) as net:
        await admin(net, "prefetch", "org/m", "--git")
        await admin(net, "prefetch", "org/half", "--include", "*.json")
        go_offline(net)
        env = {"GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"), "GIT_TERMINAL_PROMPT": "0"}
        assert (await run_client("git", "lfs", "install", "--skip-repo", env=env))[0] == 0
        status, said = await run_client("git", "clone", f"{net.url}/org/m", str(tmp_path / "clone"), env=env)
        assert status == 0, said
        assert (tmp_path / "clone/sub/model.bin").read_bytes() == WEIGHTS.bytes()
        status, said = await run_client("git", "lfs", "locks", cwd=tmp_path / "clone", env=env)
        assert status == 0, said
        batch = {"operation": "download", "objects": [{"oid": ABSENT.sha256, "size": ABSENT.size}]}
        url, kind = f"{net.url}/org/half.git/info/lfs/objects/batch", "application/vnd.git-lfs+json"
        async with (
            aiohttp.ClientSession(headers={"Content-Type": kind}) as session,
            session.post(url, data=json.dumps(batch)) as response,
        ):
            (answer,) = (await response.json(content_type=kind))["objects"]
        assert answer["error"]["code"] == 404 and "offline" in answer["error"]["message"]
        status, said = await run_client("git", "clone", f"{net.url}/org/half", str(tmp_path / "half"), env=env)
        assert status != 0 and "offline" in said
        await assert_silent(net)


async def test_datasets_and_transformers(hub: Hub, tmp_path: Path) -> None:
    """load_dataset of three formats, plain and streaming, and from_pretrained, as with the Hub."""
    test_datasets.publish(hub)
    hub.repo("org/tiny").commit(test_transformers.tiny(tmp_path / "tiny"))
    names = [f"datasets/org/{way}-{form}" for way in test_datasets.WAYS for form in test_datasets.FORMATS]
    async with lan(tmp_path, hub=hub) as net:
        results = await admin(net, "prefetch", "org/tiny", *names)
        assert [one["failed"] for one in results] == [[]] * 7
        go_offline(net)
        await test_datasets.load(net)
        out = await net.python(test_transformers.SCRIPT)
        assert out["first"] == out["second"] and out["first"]["config"][0] == "bert"
        await assert_silent(net)


async def test_every_kind_of_question_by_hand(hub: Hub, tmp_path: Path) -> None:
    """Status, code and Cache-Status of each route; a refusal of what is not here is a 404 that says so, for HEAD too."""
    publish(hub)
    hub.repo("org/gated", gated="auto").commit({"config.json": b"{}"})
    hub.users["hf_friend"] = User("friend", {"org/gated"})
    async with lan(tmp_path, hub=hub) as net, aiohttp.ClientSession() as session:
        await downloaded(net)
        friend = {"Authorization": "Bearer hf_friend"}
        async with session.get(f"{net.url}/org/gated/resolve/main/config.json", headers=friend) as response:
            assert response.status == 200
        hub.repo("org/elsewhere").commit({"config.json": b"{}"})
        async with session.get(f"{net.url}/api/models") as response:
            assert "org/elsewhere" in [one["id"] for one in await response.json()]
        go_offline(net)

        async def ask(path: str, method: str = "GET", **more: Any) -> tuple[int, str, str]:
            async with session.request(method, net.url + path, allow_redirects=False, **more) as response:
                await response.read()
                return response.status, response.headers.get("X-Error-Code", ""), response.headers.get("Cache-Status", "")

        here = (200, "", "nearhub; hit; detail=offline")
        for path in (
            "/org/m/resolve/main/config.json",
            "/org/m/raw/main/sub/model.bin",
            "/org/m",
            "/api/models/org/m",
            "/api/models/org/m/revision/main",
            "/api/models/org/m/tree/main",
            "/api/models/org/m/refs",
            "/api/models/org/m/commits/main",
            "/api/models",
            "/api/spaces?search=none",
            "/api/agent-harnesses",
        ):
            assert await ask(path) == here, path
        assert await ask("/org/m/resolve/main/sub/model.bin", "HEAD") == here
        assert await ask("/api/models/org/m/paths-info/main", "POST", json={"paths": ["config.json"]}) == here
        async with session.get(f"{net.url}/api/models") as response:  # what is listed can be had, whatever was listed before
            assert [one["id"] for one in await response.json()] == ["org/gated", "org/half", "org/m"]
        refused = (404, "UnknownOffline", "nearhub; hit; detail=UnknownOffline")
        for path in (
            "/org/never/resolve/main/config.json",
            "/org/half/resolve/main/absent.bin",
            "/org/m/resolve/other/config.json",
            "/api/models/org/never",
            "/api/models/org/m/discussions",
            "/api/trending",
            "/org/never.git/info/refs?service=git-upload-pack",
        ):
            assert await ask(path) == refused, path
        assert await ask("/org/half/resolve/main/absent.bin", "HEAD") == refused
        assert (await ask("/org/m/resolve/main/no.txt"))[:2] == (404, "EntryNotFound")
        assert (await ask("/api/models/org/m/xet-read-token/main"))[:2] == (404, "NotRoutable")
        # Gated: whoever asks. A grant does not outlive its process, nor is it renewed: 403 is not asked again, as 503 would be.
        assert (await ask("/org/gated/resolve/main/config.json"))[:2] == (401, "GatedRepo")
        assert (await ask("/org/gated/resolve/main/config.json", headers=friend))[:2] == (403, "AccessOffline")
        async with session.get(f"{net.url}/-/readyz") as response:
            assert response.status == 200 and "offline" in await response.text()
        assert any("offline" in line for line in (await admin(net, "why", "/org/m/resolve/main/config.json"))["why"])
        await assert_silent(net)


async def test_switched_while_it_runs(hub: Hub, tmp_path: Path) -> None:
    """on: nobody is asked from the next request on. auto: news come again, without a restart."""
    publish(hub)
    async with lan(tmp_path, hub=hub, UPSTREAM_REF_TTL="1ms") as net, aiohttp.ClientSession() as session:
        await downloaded(net)

        async def head() -> str:
            async with session.get(f"{net.url}/api/models/org/m/revision/main") as response:
                return str((await response.json())["sha"])

        assert (await admin(net, "offline"))["offline"] is False
        assert (await admin(net, "offline", "on"))["offline"] is True
        old = await head()
        net.hub.log.clear()
        new = hub.repo("org/m").commit({"config.json": b'{"a": 2}'})
        assert await head() == old
        async with asyncio.timeout(10), session.get(f"{net.url}/org/half/resolve/main/absent.bin") as response:
            assert response.status == 404
        assert [one.raw_path for one in net.hub.log] == []
        assert (await admin(net, "offline", "auto"))["offline"] is False
        assert await head() == new


async def test_lasting_silence_is_offline_and_ends_by_itself(hub: Hub, tmp_path: Path) -> None:
    """Nothing is waited for once upstream was silent for long: what is not here is a 404 at once. It ends by itself."""
    publish(hub)
    async with lan(tmp_path, hub=hub, UPSTREAM_OFFLINE_AFTER="0s", UPSTREAM_REF_TTL="1ms") as net:
        await downloaded(net)
        await hub.stop()
        async with aiohttp.ClientSession() as session:

            async def absent() -> int:
                async with session.get(f"{net.url}/org/half/resolve/main/absent.bin") as response:
                    return response.status

            for _ in range(3):  # as many failures as an upstream is forgiven
                async with session.get(f"{net.url}/api/models/org/never-{_}") as response:
                    assert response.status == 404
            assert (await admin(net, "offline"))["offline"] is True
            assert await absent() == 404
            async with session.get(f"{net.url}/api/models") as response:
                assert "detail=offline" in response.headers["Cache-Status"]
            await hub.start()
            async with asyncio.timeout(30):
                while (await admin(net, "offline"))["offline"]:
                    pass
            assert await absent() == 200
