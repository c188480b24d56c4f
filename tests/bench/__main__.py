"""`make bench`: the figures of this project, measured side by side in one run; prints one table and writes nothing.

Everything is on loopback, servers and clients on the same cores: ratios mean something, absolute numbers do not.
A ratio is the median of pairs. Needs curl; nginx and aria2c are used where they are installed. Not a test: a figure
that misses its goal says so, and the exit status stays 0.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import aiohttp
import psutil

from tests.bench.carry import carry
from tests.bench.cold import capped, cold, many
from tests.bench.common import MIB, Bench
from tests.bench.growth import growth, start
from tests.bench.head import head
from tests.bench.warm import warm

SECTIONS = {
    "warm": warm,
    "head": head,
    "cold": cold,
    "capped": capped,
    "many": many,
    "growth": growth,
    "start": start,
    "carry": carry,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help=" ".join(SECTIONS)
    )
    parser.add_argument("--size", type=int, default=1024, help="MiB of the big file (1024)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs per ratio (5)")
    options = parser.parse_args()
    load = psutil.getloadavg()[0]
    print(
        f"{psutil.cpu_count()} cores (load {load:.1f} before), Python {sys.version.split()[0]}, aiohttp {aiohttp.__version__}; "
        f"medians of {options.rounds} pairs"
    )
    with tempfile.TemporaryDirectory(prefix="nearhub-bench-") as scratch:
        bench = Bench(Path(scratch), options.size * MIB, options.rounds)
        for name in options.only:
            SECTIONS[name](bench)
    print(f"\n{bench.met} of {bench.met + bench.missed} goals met")


if __name__ == "__main__":
    main()
