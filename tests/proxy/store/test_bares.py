"""Bare mirrors on disk: names, use, locks, what a killed git leaves behind."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nearhub.errors import StoreFailed
from nearhub.store.bares import BareId, BareStore, Said
from nearhub.store.blobs import USED_EVERY_S
from nearhub.wire.target import Repo, RepoKind

BARE = BareId.of(Repo(RepoKind.DATASETS, "org/d"))


@pytest.fixture
def store(tmp_path: Path) -> BareStore:
    return BareStore(tmp_path)


def made(store: BareStore, bare: BareId = BARE) -> Path:
    """A mirror as it is after a fetch, of one file."""
    lock = store.lock(bare)
    assert lock is not None
    os.close(lock)
    store.note_said(bare, Said(1.0, "refs"))
    return store.path_of(bare)


def test_a_name_from_a_url_is_no_file_name(store: BareStore, tmp_path: Path) -> None:
    for name in ("../../etc", "a/b", "-u", "x" * 900):
        path = store.path_of(BareId(name))
        assert path.parent.parent == tmp_path and len(path.name) == 68


def test_an_operator_reads_whose_it_is() -> None:
    assert BARE.shown() == "datasets/org/d"
    assert BareId.of(Repo(RepoKind.MODELS, "gpt2")).shown() == "gpt2"
    assert BareId.named("tools").shown() == "tools.git"


def test_what_was_said_is_remembered_and_damage_to_it_means_nothing_was(store: BareStore) -> None:
    directory = made(store)
    assert store.said(BARE) == Said(1.0, "refs")
    for damage in (b"", b"{", b'{"at": 1}', b"[]"):
        (directory / "nearhub.json").write_bytes(damage)
        assert store.said(BARE) is None
    assert store.said(BareId("never/there")) is None


def test_all_of_it_counts_and_is_found_again_under_its_name(store: BareStore) -> None:
    directory = made(store)
    (directory / "objects").mkdir()
    (directory / "objects" / "pack").write_bytes(bytes(100_000))
    ((bare, size, used_at),) = store.scan()
    assert bare == BARE
    assert size == store.held(BARE).bytes >= 100_000
    assert abs(used_at - time.time()) < 60


def test_use_is_written_once_an_hour(store: BareStore) -> None:
    description = made(store) / "description"
    long_ago = time.time() - 2 * USED_EVERY_S
    os.utime(description, (long_ago, long_ago))
    store.note_use(BARE)
    ((_, _, used_at),) = store.scan()
    assert used_at > long_ago + USED_EVERY_S
    recently = time.time() - USED_EVERY_S / 2
    os.utime(description, (recently, recently))
    store.note_use(BARE)
    assert abs(description.stat().st_mtime - recently) < 1


def test_one_in_use_is_not_removed(store: BareStore) -> None:
    directory = made(store)
    with store.hold(BARE), store.hold(BARE):
        assert store.is_held(BARE)
    assert not store.is_held(BARE)
    with store.hold(BARE), pytest.raises(StoreFailed):
        store.remove(BARE)
    assert directory.is_dir()
    store.remove(BARE)
    assert not directory.exists() and list(store.scan()) == []
    store.remove(BARE)


def test_what_a_crash_left_of_making_or_removing_one_goes_at_the_start(store: BareStore, tmp_path: Path) -> None:
    directory = made(store)
    for name in ("new-x.git", "removed-x.git"):
        (directory.parent / name / "objects").mkdir(parents=True)
    store.recover()
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_what_a_killed_git_left_is_swept_away_and_nothing_else(store: BareStore) -> None:
    directory = made(store)
    left = [
        "HEAD.lock",
        "packed-refs.lock",
        "refs/heads/a/b.lock",
        "objects/pack/tmp_pack_x",
        "objects/pack/.tmp-1-pack-y.pack",
        "objects/pack/multi-pack-index.lock",
        "objects/pack/pack-1.keep",
        "objects/pack/pack-without-index.pack",
        "refs/heads/emptied-by-a-power-cut",
    ]
    left += ["objects/ab/tmp_obj_z", "objects/info/commit-graphs/commit-graph-chain.lock", "objects/incoming-1/pack/p.pack"]
    kept = [
        "HEAD",
        "packed-refs",
        "objects/pack/pack-1.pack",
        "objects/pack/pack-1.idx",
        "objects/ab/cdef",
        "nearhub.json",
        "nearhub.lock",
    ]
    for name in left + kept:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    refs = {"refs/heads/a/c": "1" * 40, "refs/heads/d": "2" * 64, "refs/heads/e": "ref: refs/heads/d"}
    for name, said in refs.items():
        (directory / name).write_text(f"{said}\n")
    store.sweep(BARE)
    there = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert there == {*kept, *refs, "description"}


def test_a_writer_that_outlived_its_mirror_is_ended(store: BareStore) -> None:
    """It holds the inherited lock, and the file names its process group."""
    lock = store.lock(BARE)
    assert lock is not None
    script = "import sys; print('here', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(lock,), start_new_session=True
    ) as orphan:
        assert orphan.stdout is not None and orphan.stdout.readline() == b"here\n"
        os.pwrite(lock, str(orphan.pid).encode(), 0)
        os.close(lock)
        assert store.lock(BARE) is None
        assert orphan.wait(timeout=30) < 0
    again = store.lock(BARE)
    assert again is not None
    os.close(again)


def test_a_lock_that_names_nobody_kills_nobody(store: BareStore) -> None:
    directory = made(store)
    fd = os.open(directory / "nearhub.lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    for text in (b"", b"0", b"1", b"-1", b"nonsense"):
        os.ftruncate(fd, 0)
        os.pwrite(fd, text, 0)
        assert store.lock(BARE) is None
    os.close(fd)
