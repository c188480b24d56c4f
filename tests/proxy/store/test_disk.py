"""The store's system calls: all of what was asked, or StoreFailed in words."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from nearhub.errors import StoreFailed
from nearhub.store.disk import Disk


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.mark.parametrize("most", range(1, 12))
@pytest.mark.parametrize("buffers", [[b"hello world"], [b"hel", b"", b"lo ", b"w", b"orld"], [b""] * 3, []])
def test_a_short_write_is_continued_where_it_stopped(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, buffers: list[bytes]
) -> None:
    """At every length a write may stop after: in a buffer, between two, before an empty one."""
    pwritev = os.pwritev

    def short(fd: int, views: Sequence[memoryview], offset: int) -> int:
        return pwritev(fd, [b"".join(views)[:most]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    fd = disk.open_data(tmp_path / "file", create=True)
    disk.write_at(fd, [b"0123456789abcdef"], 0)
    disk.write_at(fd, [memoryview(buffer) for buffer in buffers], 2)
    os.close(fd)
    text = b"".join(buffers)
    assert (tmp_path / "file").read_bytes() == b"01" + text + b"0123456789abcdef"[2 + len(text) :]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EIO, "Input/output error")],
)
def test_what_the_disk_refuses_is_an_error_of_the_store(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """Which is answered 507, in words an operator understands; the name of the file stays inside."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("pwritev", "fsync", "ftruncate"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("nearhub.store.disk._sync_data", refuse)
    fd = disk.open_data(tmp_path / "file", create=True)
    for operation in (
        lambda: disk.write_at(fd, [b"x"], 0),
        lambda: disk.truncate(fd, 1),
        lambda: disk.sync_data(fd),
        lambda: disk.sync_file(fd),
        lambda: disk.sync_dir(tmp_path),
        lambda: disk.write_file(tmp_path / "other", b"x"),
    ):
        with pytest.raises(StoreFailed, match=words) as caught:
            operation()
        assert caught.value.http_status == 507 and str(tmp_path) not in caught.value.message
    os.close(fd)
    assert not (tmp_path / "other").exists()


def test_only_regular_files_are_opened_and_none_twice_created(disk: Disk, tmp_path: Path) -> None:
    """Links are not followed, pipes do not keep us waiting."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(StoreFailed, match="not a regular file"):
            disk.open_read(tmp_path / name)
        with pytest.raises(StoreFailed, match="not a regular file"):
            disk.open_data(tmp_path / name, create=False)
    with pytest.raises(FileExistsError):
        disk.open_data(tmp_path / "file", create=True)
    with pytest.raises(FileNotFoundError):
        disk.open_data(tmp_path / "absent", create=False)
    fd = disk.open_data(tmp_path / "new", create=True)
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    os.close(fd)


def test_a_file_is_replaced_whole_or_not_at_all(disk: Disk, tmp_path: Path) -> None:
    """Also over a leftover of an earlier crash, and never through a planted link."""
    path = tmp_path / "file"
    disk.write_file(path, b"one")
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "victim")
    disk.write_file(path, b"two")
    assert path.read_bytes() == b"two" and (tmp_path / "victim").read_bytes() == b"precious"
    assert sorted(child.name for child in tmp_path.iterdir()) == ["file", "victim"]

    class Failing(Disk):
        def sync_file(self, fd: int) -> None:
            raise StoreFailed("EIO")

    with pytest.raises(StoreFailed):
        Failing().write_file(path, b"three")
    assert path.read_bytes() == b"two"


def test_removing_takes_what_is_there_and_minds_nothing_that_is_not(disk: Disk, tmp_path: Path) -> None:
    """Trees, files and links; what a link points at stays."""
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    disk.remove_tree(tmp_path / "link")
    assert (tmp_path / "tree" / "deep" / "file").exists()
    for name in ("tree", "tree", "absent"):
        disk.remove_tree(tmp_path / name)
    (tmp_path / "file").write_bytes(b"x")
    disk.unlink(tmp_path / "file" / "below")
    disk.unlink(tmp_path)
    disk.remove_tree(tmp_path / "file")
    disk.unlink(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_new_directories_are_synced_into_their_parents_and_old_ones_are_not(tmp_path: Path) -> None:
    synced = []

    class Watching(Disk):
        def sync_dir(self, path: Path) -> None:
            synced.append(path)
            super().sync_dir(path)

    Watching().make_dirs(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    Watching().make_dirs(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
