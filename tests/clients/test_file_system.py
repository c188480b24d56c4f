"""HfFileSystem: find, glob, info, open, seek and read, in every state of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.lan import PREFIX, Lan, lan
from tests.clients.programs import MIB, sha256_of
from tests.hub import LFS, Content, Hub, git_blob_sha1
from tests.hub.content import Memory

SIZE = 9 * MIB + 5
WEIGHTS = Content(SIZE, seed=220)
CONFIG = b'{"hidden_size": 64}\n' * 100
FILES = {"README.md": b"# A model\n", "config.json": CONFIG, "data/a b/1.txt": b"one", "data/2.txt": b"two"}
SCRIPT = f"""
from huggingface_hub import HfFileSystem
fs = HfFileSystem()
out["find"] = fs.find("org/m")
out["sizes"] = {{name: info["size"] for name, info in fs.find("org/m@main", detail=True).items()}}
out["glob"] = fs.glob("org/m/**/*.txt")
out["ls"] = sorted(fs.ls("org/m/data", detail=False))
out["lfs"] = fs.info("org/m/model.safetensors")["lfs"]["sha256"]
out["fresh"] = fs.info("org/m/model.safetensors", refresh=True)["size"]
out["title"] = fs.info("org/m/config.json", expand_info=True)["last_commit"]["title"]
out["oid"] = fs.info("org/m/config.json")["blob_id"]
out["exists"] = fs.exists("org/m/none.txt"), fs.isdir("org/m/data"), fs.isfile("org/m/data")
out["config"] = fs.read_text("org/m/config.json")
with fs.open("org/m/model.safetensors", "rb", block_size=1 << 20) as file:
    spans = {{}}
    for start, stop in ((0, 8), ({SIZE} - 3, {SIZE}), (4_000_000, 4_000_016), (123_456, 3_000_000)):
        file.seek(start)
        spans[str(start)] = hashlib.sha256(file.read(stop - start)).hexdigest()
    file.seek({SIZE})
    out["end"] = file.read(10).hex()
out["spans"] = spans
out["whole"] = hashlib.sha256(fs.cat_file("org/m/model.safetensors")).hexdigest()
fs.get_file("org/m/model.safetensors", "copy")
out["copy"] = hashlib.sha256(pathlib.Path("copy").read_bytes()).hexdigest()
out["none"] = raised(fs.open, "org/m/none.txt", "rb")[0]
"""


def expected() -> dict[str, Any]:
    names = sorted(f"org/m/{path}" for path in (*FILES, "model.safetensors"))
    sizes = {f"org/m/{path}": len(data) for path, data in FILES.items()} | {"org/m/model.safetensors": SIZE}
    spans = ((0, 8), (SIZE - 3, SIZE), (4_000_000, 4_000_016), (123_456, 3_000_000))
    return {
        "find": names,
        "sizes": sizes,
        "glob": ["org/m/data/2.txt", "org/m/data/a b/1.txt"],
        "ls": ["org/m/data/2.txt", "org/m/data/a b"],
        "lfs": WEIGHTS.sha256,
        "fresh": SIZE,
        "title": "Upload files",
        "oid": git_blob_sha1(Memory(CONFIG)),
        "exists": [False, True, False],
        "config": CONFIG.decode(),
        "end": "",
        "spans": {str(start): sha256_of(WEIGHTS.bytes(start, stop)) for start, stop in spans},
        "whole": WEIGHTS.sha256,
        "copy": WEIGHTS.sha256,
        "none": "FileNotFoundError",
    }


async def look(net: Lan) -> None:
    found = await net.python(SCRIPT)
    found["sizes"] = {name.replace("@main", ""): size for name, size in found["sizes"].items()}
    assert found == expected()


@pytest.mark.parametrize("base", ["", PREFIX], ids=["root", "prefix"])
async def test_in_every_state_of_the_hub(hub: Hub, tmp_path: Path, base: str) -> None:
    """All it says is right. Cold: each byte once, few questions. Warm: none. Hub dead or refusing: as if it were not."""
    hub.repo("org/m").commit({**FILES, "model.safetensors": LFS(WEIGHTS)})
    async with lan(tmp_path, base, hub=hub) as net:
        await look(net)
        assert hub.counters.bytes("cdn") == SIZE
        # The commit, the tree, and what only the Hub knows: which commit changed an entry last.
        assert len(net.metadata_calls()) <= 3
        assert net.off_the_mirror() == []
        hub.log.clear()
        await look(net)
        assert [one.raw_path for one in hub.log] == []
        await net.hub_dies()
        await look(net)
        await net.hub_refuses()
        await look(net)
        assert net.refusals() > 0
        assert net.heard == []
