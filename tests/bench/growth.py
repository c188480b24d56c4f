"""What a full cache costs: HEAD of files of which much else is known, and how long a mirror takes to start."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import os
import shutil
import time
from pathlib import Path

from nearhub.catalog import Catalog
from nearhub.metrics import Metrics
from nearhub.store.index import Index
from nearhub.store.layout import open_cache
from nearhub.wire.headers import BlobId
from nearhub.wire.manifest import Entry, Visibility
from nearhub.wire.target import Repo, RepoKind
from tests.bench.common import MIB, Bench, median, timed
from tests.mirror import MirrorProcess

UPSTREAM = "http://127.0.0.1:9"  # nobody: nothing is asked here
REPOS = 1000
ASKED = range(0, REPOS, 4)
COMMIT = "c" * 40


def growth(bench: Bench, few: int = 1, many: int = 1000) -> None:
    """HEAD of one file of many repos, each for the first time since the start: repos have few files, or many."""
    bench.title("growth of the index")
    caches = {per_repo: bench.root / f"index-{per_repo}" for per_repo in (few, many)}
    for per_repo, cache in caches.items():
        asyncio.run(_fill(cache, per_repo))
    taken: dict[int, list[float]] = {few: [], many: []}
    for _ in range(bench.rounds):
        for per_repo, cache in caches.items():
            asyncio.run(_see_repos(cache))
            with MirrorProcess(cache, [UPSTREAM]) as mirror:
                taken[per_repo].append(median(_heads(mirror.port, per_repo)))
    ratio = median([slow / fast for fast, slow in zip(taken[few], taken[many], strict=True)])
    size = sum(path.stat().st_size for path in (caches[many] / "index").iterdir()) / MIB
    note = f"median {1000 * median(taken[many]):.2f} ms; index {size:,.0f} MiB"
    bench.row(f"HEAD among {REPOS * many:,} files / among {REPOS * few:,}", ratio, most=1.2, note=note)
    for cache in caches.values():
        shutil.rmtree(cache)


async def _fill(cache: Path, per_repo: int) -> None:
    owned = open_cache(cache)
    index = Index(owned.index)
    catalog = Catalog(index, Metrics())
    for number in range(REPOS):
        entries = []
        for i in range(per_repo):
            name = hashlib.sha256(b"%d %d" % (number, i)).hexdigest()
            entries.append(Entry(_path(i), MIB, name[:40], BlobId.from_etag(name)))
        await catalog.note_entries(_repo(number), COMMIT, entries)
    index.close()
    owned.close()


async def _see_repos(cache: Path) -> None:
    """Nobody is asked about a repo that was seen in public just now."""
    owned = open_cache(cache)
    index = Index(owned.index)
    catalog = Catalog(index, Metrics())
    for number in ASKED:
        await catalog.note_seen(_repo(number), Visibility())
    index.close()
    owned.close()


def _heads(port: int, per_repo: int) -> list[float]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    taken = []
    for number in ASKED:
        url = f"/{_repo(number).name}/resolve/{COMMIT}/{_path(number % per_repo)}"
        started = time.monotonic()
        connection.request("HEAD", url)
        answer = connection.getresponse()
        answer.read()
        taken.append(time.monotonic() - started)
        if answer.status != 200:
            raise RuntimeError(f"HEAD {url}: {answer.status}")
    connection.close()
    return taken


def _repo(number: int) -> Repo:
    return Repo(RepoKind.MODELS, f"bench/m{number:04}")


def _path(number: int) -> str:
    return f"data/part-{number:05}.parquet"


def start(bench: Bench, blobs: int = 100_000) -> None:
    """From the command to `nearhub ready`, with so many (sparse) blobs and with none."""
    bench.title("start-up")
    cache = bench.root / "start"
    with MirrorProcess(cache, [UPSTREAM]):
        pass
    empty = [_start_s(cache) for _ in range(bench.rounds)]
    for number in range(blobs):
        name = os.urandom(32).hex()
        path = cache / "blobs" / "sha256" / name[:2] / name[2:4] / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(0o444)
        os.truncate(path, (1 + number % 64) * MIB)
    full = [_start_s(cache) for _ in range(bench.rounds)]
    bench.row(f"with {blobs:,} blobs", median(full), "s", most=3, note=f"empty: {median(empty):.2f} s")
    shutil.rmtree(cache)


def _start_s(cache: Path) -> float:
    mirror = MirrorProcess(cache, [UPSTREAM])
    try:
        return timed(mirror.start)
    finally:
        mirror.terminate()
