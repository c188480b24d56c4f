"""A public mirror is the only upstream: it answers with the Hub's own links and redirects; the Hub itself is left alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.clients.lan import PREFIX, VERSIONS, lan
from tests.clients.programs import sha256_of
from tests.clients.public_mirror import AGENT, public_mirror
from tests.hub import LFS, Content, Hub

COUNT = 1100
MANY = {f"{number:04}.txt": f"row {number}\n".encode() for number in range(COUNT)}
SMALL = {"config.json": b'{"model_type": "tiny"}\n' * 80, "README.md": b"# A model\n", "sub/a b.txt": b"text"}
WEIGHTS = Content(5_000_000, seed=240)
SCRIPT = """
from huggingface_hub import HfApi, snapshot_download
api = HfApi()
out["model"] = hashes(snapshot_download("org/m"))
out["part"] = hashes(snapshot_download("org/many", allow_patterns="*99.txt"))
out["names"] = sorted(one.rfilename for one in api.model_info("org/many", files_metadata=True).siblings)
out["commits"] = [one.title for one in api.list_repo_commits("org/m")]
out["branches"] = [one.name for one in api.list_repo_refs("org/m").branches]
out["found"] = sorted(one.id for one in api.list_models(author="org"))
"""


async def test_a_public_mirror_is_enough(hub: Hub, tmp_path: Path) -> None:
    """Whole repos, listings of many pages, commits and searches: through it, each byte once; the Hub's origin is left alone."""
    weights_and_more = {**SMALL, "model.safetensors": LFS(WEIGHTS)}
    model = hub.repo("org/m")
    model.commit(weights_and_more, title="First")
    for number in range(60):
        model.commit({"README.md": b"# %d\n" % number}, title=f"Edit {number}")
    hub.repo("org/many").commit(MANY)
    wanted = {path: sha256_of(data) for path, data in SMALL.items()} | {
        "README.md": sha256_of(b"# 59\n"),
        "model.safetensors": WEIGHTS.sha256,
    }
    part = {path: sha256_of(data) for path, data in MANY.items() if path.endswith("99.txt")}
    async with (
        public_mirror(hub.url) as front,
        lan(tmp_path, PREFIX, hub=hub, upstreams=[front.url], blob_hosts=[hub.cdn_host]) as net,
    ):
        for state in ("cold", "warm"):
            outs = await asyncio.gather(*(net.python(SCRIPT, version=version) for version in VERSIONS))
            for out in outs:
                assert (out["model"], out["part"], out["names"]) == (wanted, part, sorted(MANY))
                assert out["commits"] == [*(f"Edit {number}" for number in reversed(range(60))), "First"]
                assert (out["branches"], out["found"]) == (["main"], ["org/m", "org/many"])
            if state == "warm":
                assert front.asked == []
            else:
                assert [one for one in front.asked if one.startswith("HEAD ")] == []
                assert any("/tree/" in one and "cursor=" in one for one in front.asked), "the second page"
            front.asked.clear()
        assert {one.header("User-Agent") for one in hub.log.find("hub")} == {AGENT}
        assert hub.counters.bytes("cdn") == WEIGHTS.size
        assert net.heard == []
        # Its own trouble is like the Hub's: what is known is served.
        await net.hub_dies()
        out = await net.python(SCRIPT)
        assert (out["model"], out["part"], out["names"]) == (wanted, part, sorted(MANY))
