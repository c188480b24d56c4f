"""A short run of the fuzzer, the same each time; `make fuzz` goes on for as long as told."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.faults.fuzz import READERS, fuzz


def test_no_reader_breaks_on_its_seeds() -> None:
    """They are examples of what each of them is for."""
    for read, seeds in READERS.values():
        for seed in seeds:
            read(seed)


async def test_a_short_run(tmp_path: Path) -> None:
    """20,000 tries, of all readers in turn, from the seeds on."""
    corpus = tmp_path / "any"
    corpus.mkdir()
    for place, (name, (_, seeds)) in enumerate(READERS.items()):
        for number, seed in enumerate(seeds):
            (corpus / f"{name}-{number}").write_bytes(bytes([place]) + seed)
    done = await asyncio.to_thread(fuzz, "any", "-runs=20000", corpus)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "stat::number_of_executed_units: 20000" in done.stdout
