"""What every section uses: where to write, how much and how often to measure, the table, and the clients."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ParamSpec

from tests.hub import Content

MIB = 1024 * 1024
REPO = "bench/m"
FILE = f"/{REPO}/resolve/main/model.bin"
P = ParamSpec("P")


@dataclass
class Bench:
    """One run. `root` is a scratch directory, `size` the bytes of the big file, `rounds` the pairs per ratio."""

    root: Path
    size: int
    rounds: int
    met: int = 0
    missed: int = 0

    @cached_property
    def original(self) -> Path:
        """The big file, on disk."""
        content, path = Content(self.size, seed=11), self.root / "original.bin"
        with path.open("wb") as file:
            for start in range(0, content.size, MIB):
                file.write(content.read(start, start + MIB))
        return path

    def title(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def row(
        self,
        what: str,
        value: float,
        unit: str = "",
        *,
        digits: int = 2,
        least: float | None = None,
        most: float | None = None,
        note: str = "",
    ) -> None:
        """One figure, with its goal if it has one (`least` or `most`), judged as it is shown."""
        shown = f"{value:.{digits}f}"
        goal, verdict = "", ""
        if least is not None or most is not None:
            is_met = (least is None or float(shown) >= least) and (most is None or float(shown) <= round(most, digits))
            self.met, self.missed = self.met + is_met, self.missed + (not is_met)
            goal = f"≥ {least:g}" if least is not None else f"≤ {round(most or 0, digits):g}"
            verdict = "met" if is_met else "MISSED"
        print(f"  {what:<54}{shown:>8} {unit:<4}{goal:>8}  {verdict:<7} {note}".rstrip(), flush=True)

    def has(self, program: str, what: str) -> bool:
        """Whether `program` is installed; where it is not, a line says which figures are missing."""
        if shutil.which(program):
            return True
        print(f"  {what:<54} not measured: {program} is not installed", flush=True)
        return False


def median(values: list[float]) -> float:
    return statistics.median(values)


def timed(call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> float:
    """Seconds that the call took."""
    started = time.monotonic()
    call(*args, **kwargs)
    return time.monotonic() - started


def curl(url: str, *options: str) -> None:
    subprocess.run(["curl", "-sfL", "-o", "/dev/null", *options, url], check=True)


def curls(url: str, count: int) -> None:
    """`count` downloads at once; returns when the last has ended."""
    processes = [subprocess.Popen(["curl", "-sf", "-o", "/dev/null", url]) for _ in range(count)]
    if any([process.wait() for process in processes]):  # a list: all are waited for
        raise RuntimeError(f"a download of {url} failed")


def aria2c(url: str, connections: int) -> None:
    """Into memory where the system has such a place, so that no disk is measured."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="nearhub-bench-", dir=memory if memory.is_dir() else None) as target:
        options = [f"-x{connections}", f"-s{connections}", "-k1M", "--file-allocation=none", "--quiet", f"--dir={target}"]
        subprocess.run(["aria2c", "--no-conf", *options, "--out=f", url], check=True)
