"""Clients that we did not write, straight against the stand-in: if they are content, it answers as the Hub does."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.hub import LFS, Content, Fault, Hub, User

_PRELUDE = """
import json, os
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
def raised(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    return None
out = {}
"""


async def run(hub: Hub, home: Path, script: str, **environment: str) -> dict[str, Any]:
    """Run a script with huggingface_hub in a process of its own; what it put into `out`."""
    settings = {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }
    code = f"{_PRELUDE}{script}\nprint(json.dumps(out))"
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, env=settings, stdout=pipe, stderr=pipe)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    result: dict[str, Any] = json.loads(out.decode().strip().splitlines()[-1])
    return result


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


async def test_downloads_of_plain_and_lfs_files(hub: Hub, tmp_path: Path) -> None:
    content = Content(21_000_000, seed=2)
    commit = hub.repo("org/m").commit({"config.json": b'{"a": 1}' * 500, "model.bin": LFS(content)})
    script = """
for name in ("config.json", "model.bin"):
    out[name] = hf_hub_download("org/m", name)
out["blob"] = os.path.realpath(out["model.bin"])
"""
    hub.users["hf_good"] = User("bob")
    out = await run(hub, tmp_path, script, HF_TOKEN="hf_good")
    assert all(f"/snapshots/{commit}/" in out[name] for name in ("config.json", "model.bin"))
    assert _read(out["config.json"]) == b'{"a": 1}' * 500
    assert hashlib.sha256(_read(out["model.bin"])).hexdigest() == content.sha256
    assert out["blob"].endswith(f"/{content.sha256}")
    assert (hub.counters.requests("cdn"), hub.counters.bytes("cdn")) == (1, content.size)
    assert hub.log.find("hub", where=lambda one: one.header("authorization") == "Bearer hf_good")
    assert not hub.log.find("cdn", where=lambda one: one.header("authorization") is not None)


async def test_snapshot_of_1200_files_in_pages(hub: Hub, tmp_path: Path) -> None:
    repo = hub.repo("org/data", "datasets")
    commit = repo.commit({f"part/{number:04}.txt": f"row {number}" for number in range(1200)})
    script = """
HfApi().snapshot_download("org/data", repo_type="dataset", allow_patterns="part/*[05]0.txt")
out["files"] = len(HfApi().list_repo_files("org/data", repo_type="dataset"))
out["got"] = {name: open(p).read() for name in ("part/0000.txt", "part/1150.txt")
              for p in [hf_hub_download("org/data", name, repo_type="dataset")]}
"""
    out = await run(hub, tmp_path, script)
    assert out == {"files": 1200, "got": {"part/0000.txt": "row 0", "part/1150.txt": "row 1150"}}
    assert hub.counters.requests("hub", match=f"/tree/{commit}?") == 2


async def test_errors_become_the_exceptions_that_users_know(hub: Hub, tmp_path: Path) -> None:
    hub.users["hf_eve"] = User("eve")
    hub.repo("org/m").commit({"a": b"a"})
    hub.repo("org/g", gated="auto").commit({"a": b"a"})
    script = """
out["repo"] = raised(hf_hub_download, "org/none", "a")
out["revision"] = raised(hf_hub_download, "org/m", "a", revision="nope")
out["entry"] = raised(hf_hub_download, "org/m", "none")
out["gated"] = raised(hf_hub_download, "org/g", "a")
out["exists"] = HfApi().file_exists("org/m", "none"), HfApi().file_exists("org/m", "a")
"""
    assert await run(hub, tmp_path, script, HF_TOKEN="hf_eve") == {
        "repo": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "entry": "RemoteEntryNotFoundError",
        "gated": "GatedRepoError",
        "exists": [False, True],
    }


async def test_api_and_file_system_calls(hub: Hub, tmp_path: Path) -> None:
    repo = hub.repo("org/m")
    content = Content(3_000_000)
    first = repo.commit({"config.json": b"{}", "sub/model.bin": LFS(content)})
    repo.ref("refs/pr/1", first)
    repo.tag("v1", first)
    second = repo.commit({"config.json": b"{ }"}, title="Second")
    repo.rename("org/new")
    script = """
api = HfApi()
info = api.model_info("org/m", files_metadata=True)
out["info"] = [info.id, info.sha, [[s.rfilename, s.size, s.lfs.sha256 if s.lfs else None] for s in info.siblings]]
out["refs"] = [r.name for r in api.list_repo_refs("org/new", include_pull_requests=True).pull_requests]
out["commits"] = [c.commit_id for c in api.list_repo_commits("org/new")]
out["paths"] = [p.path for p in api.get_paths_info("org/new", ["sub", "config.json"], expand=True)]
out["pr"] = open(hf_hub_download("org/new", "config.json", revision="refs/pr/1")).read()
out["me"] = api.whoami()["name"]
out["models"] = [m.id for m in api.list_models(search="new")]
with HfFileSystem().open("org/new/sub/model.bin", "rb", block_size=1 << 16) as handle:
    handle.seek(1_500_000)
    out["bytes"] = handle.read(16).hex()
api.auth_check("org/new")
"""
    hub.users["hf_good"] = User("bob")
    files = [["config.json", 3, None], ["sub/model.bin", 3_000_000, content.sha256]]
    assert await run(hub, tmp_path, script, HF_TOKEN="hf_good") == {
        "info": ["org/new", second, files],
        "refs": ["1"],
        "commits": [second, first],
        "paths": ["sub", "config.json"],
        "pr": "{}",
        "me": "bob",
        "models": ["org/new"],
        "bytes": content.bytes(1_500_000, 1_500_016).hex(),
    }


async def test_hf_cache_verify_agrees_with_the_ids(hub: Hub, tmp_path: Path) -> None:
    hub.repo("org/m").commit({"config.json": b"{}", "model.bin": LFS(Content(2_000_000))})
    script = """
snapshot_download("org/m")
result = HfApi().verify_repo_checksums("org/m")
out["checked"], out["wrong"] = result.checked_count, [str(one) for one in result.mismatches]
"""
    assert await run(hub, tmp_path, script) == {"checked": 2, "wrong": []}


async def test_client_resumes_after_a_drop(hub: Hub, tmp_path: Path) -> None:
    """huggingface_hub goes on at the last 10 MiB step that it completed."""
    content = Content(25 << 20, seed=4)
    hub.repo("org/m").commit({"model.bin": LFS(content)})
    hub.faults.add(Fault.truncate(23 << 20), on="cdn", times=1)
    out = await run(hub, tmp_path, 'out["path"] = hf_hub_download("org/m", "model.bin")')
    assert hashlib.sha256(_read(out["path"])).hexdigest() == content.sha256
    ranges = [one.header("range") for one in hub.log.find("cdn")]
    assert ranges == [None, f"bytes={20 << 20}-"]


async def test_curl_follows_and_resumes(hub: Hub, tmp_path: Path) -> None:
    content = Content(3_000_000)
    hub.repo("org/m").commit({"model.bin": LFS(content)})
    target = tmp_path / "model.bin"
    target.write_bytes(content.bytes(0, 1_000_000))
    url = f"{hub.url}/org/m/resolve/main/model.bin"
    process = await asyncio.create_subprocess_exec("curl", "-sSfL", "-C", "-", "-o", str(target), url)
    assert await process.wait() == 0
    assert target.read_bytes() == content.bytes()
    assert hub.counters.bytes("cdn") == 2_000_000
