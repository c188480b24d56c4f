"""A repo of 1,500 files: more than the Hub lists at once, and more than a page of its tree."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.clients.lan import NEWEST, PREFIX, Lan, lan
from tests.clients.old_client import OLDEST, VERSION
from tests.clients.programs import sha256_of
from tests.hub import LFS, Hub

COUNT = 1500
FILES = {f"part-{number % 7}/{number:04}.txt": f"row {number}\n".encode() for number in range(COUNT)}
FILES |= {"part-0/0000.bin": b"in LFS\n" * 10}
SNAPSHOT = """
from huggingface_hub import snapshot_download
out["files"] = hashes(snapshot_download("org/many", repo_type="dataset", max_workers=16, allow_patterns={patterns!r}))
"""
LISTINGS = """
from huggingface_hub import HfApi, HfFileSystem
api = HfApi()
out["tree"] = sorted(api.list_repo_files("org/many", repo_type="dataset"))
out["siblings"] = sorted(one.rfilename for one in api.dataset_info("org/many", files_metadata=True).siblings)
out["find"] = [name.removeprefix("datasets/org/many/") for name in HfFileSystem().find("datasets/org/many")]
out["paths"] = [one.path for one in api.get_paths_info("org/many", ["part-6/1497.txt", "part-6"], repo_type="dataset")]
out["none"] = api.file_exists("org/many", "part-6/1498.txt", repo_type="dataset")
"""
SOME = ["*77.txt", "*.bin"]


async def some_and_listings(net: Lan) -> None:
    """A new and an old client bring some files, and all listings are whole."""
    versions = (NEWEST, VERSION)
    listings, *snapshots = await asyncio.gather(
        net.python(LISTINGS), *(net.python(SNAPSHOT.format(patterns=SOME), version=version) for version in versions)
    )
    for name in ("tree", "siblings", "find"):
        assert listings[name] == sorted(FILES), name
    assert (sorted(listings["paths"]), listings["none"]) == (["part-6", "part-6/1497.txt"], False)
    some = {path: sha256_of(data) for path, data in FILES.items() if path.endswith(("77.txt", ".bin"))}
    assert [snapshot["files"] for snapshot in snapshots] == [some] * len(versions)


async def test_whole_and_in_part_in_every_state_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    """Cold, all of it, byte-equal: the Hub is asked for the commit and two pages of the tree, and for no file's metadata.

    Warm, the oldest client has all of it at the prefix, and nothing is asked; a dead and a refusing Hub change nothing.
    """
    hub.repo("org/many", "datasets").commit({p: LFS(data) if p.endswith(".bin") else data for p, data in FILES.items()})
    everything = {path: sha256_of(data) for path, data in FILES.items()}
    async with lan(tmp_path, PREFIX, hub=hub) as net:
        net.base = ""
        out = await net.python(SNAPSHOT.format(patterns=None))
        assert out["files"] == everything
        assert len(net.metadata_calls()) == 3, net.metadata_calls()[:10]
        # Equal content is one blob: a byte crosses once whatever it is called.
        assert sum(one.sent for one in hub.log if one.status in (200, 206) and "/api/datasets/" not in one.raw_path) == sum(
            len(data) for data in set(FILES.values())
        )
        assert net.off_the_mirror() == []
        hub.log.clear()
        net.base = PREFIX
        out = await net.python(SNAPSHOT.format(patterns=None), version=OLDEST)
        assert out["files"] == everything
        await some_and_listings(net)
        assert [one.raw_path for one in hub.log] == []
        await net.hub_dies()
        await some_and_listings(net)
        await net.hub_refuses()
        await some_and_listings(net)
        assert net.refusals() > 0
        assert net.heard == []
