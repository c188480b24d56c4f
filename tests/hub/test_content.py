"""Bytes, ids and ranges: compared with slicing, hashlib and git itself."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
from pathlib import Path

import pytest

from tests.hub import LFS, Content, Repo
from tests.hub.content import PAGE, OnDisk, file_of
from tests.hub.pace import Pacer
from tests.hub.ranges import Unsatisfiable, asked_span, still_valid, unchanged


def test_content_is_seekable_and_fixed_by_its_seed() -> None:
    """Any cut of a Content equals the same cut of the whole; another seed gives other bytes."""
    content = Content(2 * PAGE + 777, seed=3)
    everything = content.bytes()
    assert len(everything) == content.size
    assert everything == Content(content.size, seed=3).bytes()
    assert everything != Content(content.size, seed=4).bytes()
    for start, stop in itertools.combinations((0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, content.size), 2):
        assert content.bytes(start, stop) == everything[start:stop]
    assert content.sha256 == hashlib.sha256(everything).hexdigest()


def test_no_two_pages_of_a_content_are_alike() -> None:
    """A block stored at the wrong place is always noticed."""
    content = Content(64 * PAGE)
    assert len({content.bytes(number * PAGE, number * PAGE + 64) for number in range(64)}) == 64


def test_a_path_is_hashed_like_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    assert file_of(LFS(OnDisk(tmp_path / "file"))).sha256 == hashlib.sha256(b"hello").hexdigest()
    assert file_of(tmp_path / "file").git_oid == file_of(b"hello").git_oid


def test_ids_are_those_that_git_computes(tmp_path: Path) -> None:
    """Blob, tree and commit ids of a nested repository equal those of git."""
    repo = Repo("org/m")
    names = ("a.txt", "a/b.txt", "a/c/d.txt", "a-b", "z")
    repo.commit({name: name for name in names}, title="one")
    second = repo.commit({"big": LFS(b"content")}, delete=["z"], title="two")

    def git(*arguments: str, date: int = 0) -> str:
        who = {"GIT_AUTHOR_NAME": "alice", "GIT_AUTHOR_EMAIL": "alice@example.org"}
        who |= {"GIT_COMMITTER_NAME": "alice", "GIT_COMMITTER_EMAIL": "alice@example.org"}
        when = {"GIT_AUTHOR_DATE": f"{date} +0000", "GIT_COMMITTER_DATE": f"{date} +0000"}
        safe = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "PATH": os.environ["PATH"]}
        command = ["git", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, env={**who, **when, **safe}, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    with pytest.raises(ValueError, match="not a path"):
        repo.commit({"../x": b""})
    for commit in repo.history(repo.commits[second])[::-1]:
        git("rm", "-rqf", "--ignore-unmatch", ".")
        for name, file in commit.files.items():
            # git keeps "a.txt", "a-b" and "a/" in an order of its own, which is the point of these names
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(file.pointer if file.is_lfs else name.encode())
        git("add", "-A")
        git("commit", "-qm", commit.title, date=int(commit.date.timestamp()))
        assert git("rev-parse", "HEAD").strip() == commit.id
    assert git("rev-parse", "HEAD:a/c").strip() == repo.commits[second].directories["a/c"].oid


def test_revisions_are_found_under_every_name() -> None:
    repo = Repo("org/m")
    first, second = repo.commit({"a": b"1"}), repo.commit({"a": b"2"})
    repo.tag("v1", first)
    repo.ref("refs/pr/1", first)
    names = {"main": second, "HEAD": second, "v1": first, "refs/pr/1": first, first: first, first[:8]: first}
    assert {name: found.id for name in names if (found := repo.at(name))} == names
    assert repo.at("nope") is None
    assert repo.at("") is None
    repo.move("main", first)
    assert repo.head is repo.commits[first]


@pytest.mark.parametrize("size", range(5))
def test_every_range_of_a_small_file_means_what_slicing_says(size: int) -> None:
    data = bytes(range(size))
    for first, last in itertools.product(range(7), range(7)):
        for header, wanted in (
            (f"bytes={first}-{last}", data[first : last + 1]),
            (f"bytes={first}-", data[first:]),
            (f"bytes=-{last}", data[max(0, size - last) :]),
        ):
            try:
                span = asked_span(header, size)
            except Unsatisfiable:
                assert wanted == b""
                continue
            if span is None:
                assert header == f"bytes={first}-{last}"
                assert last < first
            else:
                assert data[span.start : span.stop] == wanted != b""


def test_other_units_and_several_ranges_are_ignored() -> None:
    assert [asked_span(header, 9) for header in (None, "", "items=0-1", "bytes=0-1,3-4", "bytes=-")] == [None] * 5


def test_validators_compare_as_rfc_9110_says() -> None:
    assert [still_valid(one, '"a"') for one in (None, '"a"', '"b"', 'W/"a"')] == [True, True, False, False]
    assert not still_valid('W/"a"', 'W/"a"')
    assert [unchanged(one, '"a"') for one in (None, '"a"', 'W/"a"', '"b", "a"', "*", '"b"')] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]


async def test_a_pacer_keeps_its_rate_when_it_wakes_up_late() -> None:
    """Oversleeping is made good; a pause between bodies is not saved up."""
    now = 100.0

    async def oversleep(seconds: float) -> None:
        nonlocal now
        now += seconds + 0.01

    pacer = Pacer(1000, clock=lambda: now, sleep=oversleep)
    for _ in range(2):
        began = now
        pacer.begin()
        for _ in range(500):
            await pacer.take(10)
        pacer.end()
        assert 4.999 <= now - began <= 5.02
        now += 1000
