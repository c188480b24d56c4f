"""Every way in which an upstream can fail (reliability B1 to B11) × every client: right bytes or a clear failure, never
wrong bytes that look complete; and once the fault is gone the next client gets right bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.programs import ALL, MIB
from tests.clients.scene import SIZE, all_of, scene
from tests.hub import Content, Fault, Hub

OTHER = Content(SIZE, seed=99)

RIDDEN_OUT = {
    "truncated": (Fault.truncate(after=MIB), 4),
    "reset": (Fault.reset(after=MIB), 4),
    "dropped every 3 MiB": (Fault.drop_every(3 * MIB), None),
    "overrun": (Fault.overrun(100), 3),
    "overrun, announced": (Fault.overrun(100, announced=True), 3),
    "range ignored": (Fault.ignore_range(), None),
    "Content-Range off": (Fault.shift_range(7), 3),
    "another total": (Fault.wrong_total(999), 3),
    "another ETag": (Fault.other_etag(), 3),
    "another ETag and content": (Fault.other_etag(OTHER), 3),
    "HTML with 200": (Fault.html_200(), 3),
    "503": (Fault.status(503), 3),
    "429 for a second": (Fault.status(429, {"Retry-After": "1"}), 1),
    "stall": (Fault.stall(after=MIB), 2),
    "drip": (Fault.drip(2000), 2),
    "signature expired": (Fault.expired(), 3),
}
"""Faults that pass. The second figure: how many answers they spoil, after the first good one; None: all of them."""


@pytest.mark.parametrize(("fault", "times"), RIDDEN_OUT.values(), ids=RIDDEN_OUT.keys())
async def test_a_fault_that_passes_is_not_seen(hub: Hub, tmp_path: Path, fault: Fault, times: int | None) -> None:
    """It strikes while bytes flow to the clients; each of them has right bytes at the end, at its first attempt."""
    async with scene(hub, tmp_path) as play:
        rules = play.spoil(fault, times=times, after=0 if times is None else 1)
        assert all_of(await play.download(), "right")
        assert all(rule.hits for rule in rules)


LASTING = {
    "truncated at once": Fault.truncate(after=1000),
    "reset at once": Fault.reset(after=1000),
    "overrun, announced": Fault.overrun(100, announced=True),
    "Content-Range off": Fault.shift_range(7),
    "another total": Fault.wrong_total(999),
    "another ETag and content": Fault.other_etag(OTHER),
    "HTML with 200": Fault.html_200(),
    "503": Fault.status(503),
    "drip": Fault.drip(2000),
    "signature expired": Fault.expired(),
}


@pytest.mark.parametrize("after", [0, 2], ids=["from the start", "midway"])
@pytest.mark.parametrize("fault", LASTING.values(), ids=LASTING.keys())
async def test_a_fault_that_lasts_fails_cleanly(hub: Hub, tmp_path: Path, fault: Fault, after: int) -> None:
    """Nobody takes what came for the whole; afterwards the same clients go on to right bytes, and so do newcomers."""
    clients = [client.impatient(10, 2) for client in ALL]
    async with scene(hub, tmp_path, clients) as play:
        rules = play.spoil(fault, after=after)
        assert all_of(await play.download(), "right", "failed")
        assert all(rule.hits for rule in rules)
        play.heal()
        assert all_of(await play.download(), "right")
        assert all_of(await play.download_afresh(), "right")
