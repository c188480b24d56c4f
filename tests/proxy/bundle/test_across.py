"""From a mirror that sees the Hub, through a bundle, to one that never did: what real clients get there."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from tests.hub import LFS, Content, Hub
from tests.mirror import run_client
from tests.proxy.bundle.gap import fetched, get, inside, outside, serving

WEIGHTS = Content(3_000_000, seed=1)
FILES = {"config.json": b'{"a": 1}', "weights.bin": LFS(WEIGHTS), "sub/dir/notes.txt": b"notes"}
HF = str(Path(sys.executable).with_name("hf"))


@pytest.mark.parametrize("is_running", [True, False])
async def test_a_public_repo_crosses_and_hf_downloads_it_there(tmp_path: Path, hub: Hub, is_running: bool) -> None:
    """Exported from a running mirror, imported into a running one or into a directory: the same bytes, and the same API."""
    commit = hub.repo("org/m").commit(FILES)
    async with outside(tmp_path / "out", hub) as (out, mirror):
        await fetched(mirror, "org/m", *FILES)
        told = await out.ask("export", "org/m", "--to", str(tmp_path / "b"), "--max-part", "1MiB")
    assert told["parts"] == 3 and told["missing"] == 0 and told["repos"][0]["revisions"] == [commit]
    side = inside(tmp_path / "in")
    if is_running:
        async with serving(side) as mirror:
            assert (await get(f"{mirror.url}/org/m/resolve/main/config.json"))[0] == 404
            await side.run("import", str(tmp_path / "b"))
            await _downloads(mirror.url, tmp_path / "got")
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
