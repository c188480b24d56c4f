"""Across an air gap: import beside cp + sha256sum, a repo of many small files, and a delta with nothing new."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.bench.common import FILE, MIB, REPO, Bench, curl, median, timed
from tests.hub import LFS, HubProcess
from tests.mirror import MirrorProcess

SMALL_FILES = 1000


def carry(bench: Bench) -> None:
    bench.title("across an air gap: a bundle")
    cache, bundle, there = bench.root / "vetted", bench.root / "bundle", bench.root / "there"
    with HubProcess() as hub:
        hub.repo(REPO).commit({"model.bin": LFS(bench.original)})
        hub.repo("bench/many").commit({f"d{n % 10}/f{n}.json": b'{"n": %d}' % n for n in range(SMALL_FILES)})
        with MirrorProcess(cache, [hub.url], [hub.cdn_host]) as mirror:
            curl(mirror.url + FILE)
            for n in range(SMALL_FILES):
                curl(f"{mirror.url}/bench/many/resolve/main/d{n % 10}/f{n}.json")
        wrote = timed(_nearhub, cache, "export", REPO, "--to", bundle)
        bench.row(f"export of {bench.size // MIB} MiB", bench.size / MIB / wrote, "MiB/s", digits=0)
        ratios, idle = [], []
        for _ in range(bench.rounds):
            copy = timed(_copy_and_sum, bundle, bench.root / "copy")
            idle.append(timed(_nearhub, there, "ls"))
            ratios.append(copy / (timed(_nearhub, there, "import", bundle) - idle[-1]))
            shutil.rmtree(there)
        bench.row(f"{bench.size // MIB} MiB: speed of import (less its start) / (cp + sha256sum)", median(ratios), least=0.8)
        many = bench.root / "many"
        bench.row(f"{SMALL_FILES} files: export", timed(_nearhub, cache, "export", "bench/many", "--to", many), "s", most=5)
        bench.row(f"{SMALL_FILES} files: import", timed(_nearhub, there, "import", many), "s", most=5)
        delta = bench.root / "delta"
        _nearhub(cache, "export", "bench/many", "--to", delta, "--since", many)
        kilobytes = sum(path.stat().st_size for path in delta.iterdir()) / 1000
        bench.row("delta of an unchanged repo", kilobytes, "kB", digits=1, most=100)
    for folder in (cache, bundle, there, many, delta):
        shutil.rmtree(folder)


def _copy_and_sum(bundle: Path, copy: Path) -> None:
    subprocess.run(["cp", "-r", str(bundle), str(copy)], check=True)
    subprocess.run(["sha256sum", *map(str, sorted(copy.iterdir()))], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(copy)


def _nearhub(cache: Path, verb: str, *arguments: str | Path) -> None:
    cache.mkdir(mode=0o700, exist_ok=True)
    command = [sys.executable, "-m", "nearhub", verb, "--cache-dir", str(cache), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
