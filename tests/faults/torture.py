"""`python -m tests.faults.torture --minutes N`: kill -9 and power cuts, again and again, with other sizes, caps and moments.

Rounds of both kinds alternate. A round has one cache directory, some cycles, and an end at which every download is compared.
Exit status 1 on a wrong byte, a file that cannot be finished, or bytes lost beyond the blocks in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.audit import check_index
from tests.faults.ordeal import MIB, Ordeal
from tests.faults.powercut import PowerCutDisk, PowerCutError
from tests.hub import HubProcess
from tests.mirror import MirrorProcess

KILLS = 20
CUTS = 5


@dataclass(slots=True)
class Tally:
    """What happened in all rounds of one kind."""

    name: str
    rounds: int = 0
    cycles: int = 0
    downloads: int = 0
    durable: int = 0
    """Blocks that had survived when a round ended."""
    wrong_blocks: int = 0
    wrong_bytes: int = 0
    lost: int = 0
    most_lost: int = 0
    failed: int = 0

    @property
    def is_good(self) -> bool:
        return not (self.wrong_blocks or self.wrong_bytes or self.failed)

    def row(self) -> str:
        mean = self.lost / max(1, self.cycles) / MIB
        return (
            f"{self.name:<10} {self.rounds:>6} {self.cycles:>6} {self.downloads:>9} {self.durable:>8} {self.wrong_blocks:>8} "
            f"{self.wrong_bytes:>7} {mean:>9.1f} {self.most_lost / MIB:>9.1f} {self.failed:>7}"
        )


HEADER = "kind       rounds cycles downloads  durable  wrong    wrong   lost MiB  most MiB  failed\n" + (
    "                                      blocks   blocks    bytes   a crash    a blob  rounds"
)


def main(arguments: list[str] | None = None) -> int:
    """Parse, run until the time is over, print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="begin no new round after this time (10)")
    parser.add_argument("--seed", type=int, help="of the first round; a round prints its own (default: random)")
    options = parser.parse_args(arguments)
    seeds = random.Random(options.seed)
    seed = options.seed if options.seed is not None else secrets.randbits(32)
    until = time.monotonic() + 60 * options.minutes
    tallies = {"kill -9": Tally("kill -9"), "power cut": Tally("power cut")}
    while True:
        for tally in tallies.values():
            _one(tally, seed)
            seed = seeds.getrandbits(32) if options.seed is not None else secrets.randbits(32)
        if time.monotonic() >= until:
            break
    print(HEADER, *(tally.row() for tally in tallies.values()), sep="\n")
    return 0 if all(tally.is_good for tally in tallies.values()) else 1


def _one(tally: Tally, seed: int) -> None:
    print(f"{tally.name}, seed {seed}", flush=True)
    tally.rounds += 1
    try:
        with _place(tally.name) as (cache, disk), HubProcess(stderr=sys.stderr) as hub:
            asyncio.run(_round(tally, random.Random(seed), hub, cache, disk))
    except PowerCutError:
        raise
    except Exception as error:  # noqa: BLE001  the next round may show more
        tally.failed += 1
        print(f"FAILED with seed {seed}: {type(error).__name__}: {error}", flush=True)


@contextmanager
def _place(name: str) -> Iterator[tuple[Path, PowerCutDisk | None]]:
    if name == "power cut":
        with PowerCutDisk() as disk:
            yield disk.mount, disk
    else:
        with tempfile.TemporaryDirectory(prefix="torture-") as directory:
            yield Path(directory) / "cache", None


async def _round(tally: Tally, rng: random.Random, hub: HubProcess, cache: Path, disk: PowerCutDisk | None) -> None:
    connections, at_once = rng.randint(1, 6), rng.randint(1, 4)
    speed = rng.randrange(24 * MIB, 96 * MIB)
    hub.cap(total=speed, per_connection=rng.choice([None, speed / connections / at_once]))

    def crash(mirror: MirrorProcess) -> None:
        if disk is None:
            mirror.kill()
        else:
            disk.cut(mirror.kill)
            disk.restore()

    # Without our recovery, the mirror's own meets what the crash left.
    recovers = rng.random() < 0.5
    ordeal = Ordeal(hub, cache, rng, crash, connections=connections, recovers=recovers, compares_all=disk is not None)
    print(f"  {connections} connections a blob, {at_once} blobs at once, {speed / MIB:.0f} MiB/s, {recovers=}")
    for _ in range(KILLS if disk is None else CUTS):
        ordeal.publish(rng.randrange(24 * MIB, 160 * MIB) for _ in range(at_once - len(ordeal.large)))
        ordeal.publish([rng.randrange(1, 1 << rng.randint(1, 24))])
        ordeal.publish([rng.randrange(1, 1 << rng.randint(1, 20))], is_lfs=False)
        cycle = await ordeal.cycle(rng.randrange(at_once * connections * 12 * MIB))
        _count(tally, cycle.lost, cycle.most_lost)
        tally.cycles += 1
        tally.wrong_blocks += cycle.wrong_blocks
        print(f"  {cycle.line()}", flush=True)
        if cycle.most_lost > ordeal.loss_limit:
            raise AssertionError(f"{cycle.most_lost / MIB:.1f} MiB of one blob were lost: more than the blocks in flight")
        await asyncio.to_thread(check_index, cache, ordeal.acknowledged())
    tally.durable += ordeal.last.blocks
    hub.cap()
    last = await ordeal.finish()
    print(f"  {last.line()}", flush=True)
    tally.wrong_blocks += last.wrong_blocks
    tally.wrong_bytes += ordeal.wrong_bytes
    tally.downloads += len(ordeal.downloads)
    if not all(download.is_right for download in ordeal.downloads) or last.complete != len(ordeal.downloads):
        raise AssertionError(f"not finished: {[one for one in ordeal.downloads if not one.is_right]}")


def _count(tally: Tally, lost: int, most_lost: int) -> None:
    tally.lost += lost
    tally.most_lost = max(tally.most_lost, most_lost)


if __name__ == "__main__":
    sys.exit(main())
