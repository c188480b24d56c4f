"""slowhttptest: clients that take places and do nothing with them. Others are served meanwhile, and the slow ones are cut.

Assumed time-outs: headers 10 s; a body that trickles 10 s (web/bodies.py), and 2 s more for its rest. Slow readers
are not cut in the time that this takes: they hold nothing that others need, since each response reads the store by itself.
"""

from __future__ import annotations

import asyncio
import csv
from pathlib import Path

import aiohttp

from tests.hub import LFS, Content, Hub
from tests.mirror import configure, run_client, running

CLIENTS = 40
LENGTH_S = 20
_COMMON = ["-c", str(CLIENTS), "-r", "40", "-l", str(LENGTH_S), "-i", "2", "-p", "5", "-g"]


def modes(url: str) -> dict[str, list[str]]:
    """How slowhttptest is slow, by what its clients are slow with."""
    batch = f"{url}/org/m.git/info/lfs/objects/batch"
    return {
        "headers": ["-H", "-u", f"{url}/org/m/resolve/main/small"],
        "body": ["-B", "-u", batch, "-t", "POST", "-f", "application/vnd.git-lfs+json", "-s", "8192"],
        "reading": ["-X", "-u", f"{url}/org/m/resolve/main/large", "-w", "512", "-y", "1024", "-n", "2", "-z", "512"],
    }


async def test_the_slow_do_not_hinder_the_quick(hub: Hub, tmp_path: Path) -> None:
    """120 slow connections of three kinds at once, as slowhttptest counts them; who asks all the while is answered."""
    hub.repo("org/m").commit({"large": LFS(Content(32 * 1024**2, 1)), "small": b"small"})
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror, aiohttp.ClientSession() as session:
        async with session.get(f"{mirror.url}/org/m/resolve/main/large") as response:
            await response.read()
        attacks = {
            kind: asyncio.create_task(run_client("slowhttptest", *_COMMON, "-o", str(tmp_path / kind), *how))
            for kind, how in modes(mirror.url).items()
        }
        answered = 0
        while not all(attack.done() for attack in attacks.values()):
            async with session.get(f"{mirror.url}/org/m/resolve/main/small") as response:
                assert (response.status, await response.read()) == (200, b"small")
            answered += 1
            await asyncio.wait(attacks.values(), timeout=0.1)
    assert answered > LENGTH_S
    seconds = {kind: list(csv.DictReader((tmp_path / f"{kind}.csv").read_text().splitlines())) for kind in attacks}
    for kind, rows in seconds.items():
        assert all(int(row["Service Available"]) for row in rows), (kind, rows)
        assert max(int(row["Connected"]) for row in rows) > CLIENTS // 2, (kind, "there was no attack", rows)
    for kind, attack in attacks.items():
        status, said = attack.result()
        assert status == 0, (kind, said[-2000:])
        assert kind == "reading" or "No open connections left" in said, (kind, "were not cut", seconds[kind])
