"""Every way in which an upstream can fail (reliability B1 to B11) × every client: right bytes or a clear failure, never
wrong bytes that look complete; and once the fault is gone the next client gets right bytes.

Wrong content of the right length is in test_corruption.py, refs that move are in test_moves.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.clients.programs import MATRIX, MIB
from tests.clients.scene import besides, scene, troubles
from tests.hub import Fault

Script = Mapping[str, tuple[Fault, int | None]]
"""Fault, and how many answers for each file it spoils after the first good one; None: every one, from the start."""

CUT: Script = {
    "truncated": (Fault.truncate(after=MIB), 4),
    "reset": (Fault.reset(after=MIB), 4),
    "dropped every 3 MiB": (Fault.drop_every(3 * MIB), None),
    "signature expired": (Fault.expired(), 3),
}
MISPLACED: Script = {
    "overrun": (Fault.overrun(100), 3),
    "overrun, announced": (Fault.overrun(100, announced=True), 3),
    "Content-Range off": (Fault.shift_range(7), 3),
    "another total": (Fault.wrong_total(999), 3),
}
REFUSED: Script = {
    "another ETag": (Fault.other_etag(), 3),
    "HTML with 200": (Fault.html_200(), 3),
    "503": (Fault.status(503), 3),
    "429 for a second": (Fault.status(429, {"Retry-After": "1"}), 1),
}
SLOW: Script = {
    "range ignored": (Fault.ignore_range(), None),
    "stall": (Fault.stall(after=MIB), 2),
    "drip": (Fault.drip(2000), 2),
}


@pytest.mark.parametrize("script", [CUT, MISPLACED, REFUSED, SLOW], ids=["cut", "misplaced", "refused", "slow"])
async def test_a_fault_that_passes_is_not_seen(tmp_path: Path, script: Script) -> None:
    """It strikes while bytes flow to the clients; each of them has right bytes at the end, at its first attempt."""
    runs = {name: _ridden_out(tmp_path / name, fault, times) for name, (fault, times) in script.items()}
    assert await troubles(runs) == {}


async def _ridden_out(folder: Path, fault: Fault, times: int | None) -> dict[str, str]:
    """Who did not get right bytes."""
    async with scene(folder) as play:
        rules = play.spoil(fault, times=times, after=0 if times is None else 1)
        verdicts = await play.download()
        assert all(rule.hits for rule in rules)
        return besides(verdicts, "right")


AT_ONCE = {
    "truncated": Fault.truncate(after=1000),
    "HTML with 200": Fault.html_200(),
    "503": Fault.status(503),
    "signature expired": Fault.expired(),
}
MISLEADING = {
    "overrun, announced": Fault.overrun(100, announced=True),
    "Content-Range off": Fault.shift_range(7),
    "another total": Fault.wrong_total(999),
}
SPARING = {
    "reset": Fault.reset(after=1000),
    # More than the mirror waits for: clients hear of it. huggingface_hub then waits as long, hence no more.
    "429 for six seconds": Fault.status(429, {"Retry-After": "6"}),
    "drip": Fault.drip(2000),
}


@pytest.mark.parametrize(
    ("faults", "after"),
    [(AT_ONCE, 0), (AT_ONCE, 2), (MISLEADING, 2), (SPARING, 2)],
    ids=["from the start", "midway", "misleading", "sparing"],
)
async def test_a_fault_that_lasts_fails_cleanly(tmp_path: Path, faults: Mapping[str, Fault], after: int) -> None:
    """Nobody takes what came for the whole; when upstream is well again, the same clients go on to right bytes."""
    assert await troubles({name: _failed_cleanly(tmp_path / name, fault, after) for name, fault in faults.items()}) == {}


async def _failed_cleanly(folder: Path, fault: Fault, after: int) -> dict[str, str]:
    """Who took wrong bytes for right ones while it lasted, or did not get right bytes afterwards."""
    async with scene(folder, [client.impatient(20, 1) for client in MATRIX]) as play:
        rules = play.spoil(fault, after=after, times=1 if fault.status_code == 429 else None)
        during = besides(await play.download(), "right", "failed")
        assert all(rule.hits for rule in rules)
        play.heal()
        await play.restart_mirror()  # 429 is honoured for as long as upstream said: only a new process forgets it
        return during or besides(await play.download(), "right")
