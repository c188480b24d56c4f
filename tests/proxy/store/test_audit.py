"""The audit's chain: what it must notice, and that no crash, full disk or rotation breaks it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.errors import AuditBroken, StoreFailed, StoreFull, StoreRefused
from nearhub.metrics import Metrics
from nearhub.store.audit import AuditLog, files_of, shown, verify
from nearhub.store.disk import Disk
from nearhub.wire.audit import GENESIS, Link, digest, follow, line
from tests.proxy.clock import Clock
from tests.proxy.store.disks import Crash, LosingDisk

ENTRIES = st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=20), max_size=4)


def opened(root: Path, *, max_file_bytes: int = 1 << 20, keep_files: int = 99, disk: Disk | None = None) -> AuditLog:
    log = AuditLog(root, Metrics(), max_file_bytes=max_file_bytes, keep_files=keep_files, clock=Clock(), disk=disk)
    log.open()
    return log


def written(root: Path, count: int, **settings: int) -> None:
    """Lines "opened" and then `count` answers, a flush each."""
    log = opened(root, **settings)
    for number in range(count):
        log.add({"event": "answer", "path": f"file {number}\n\x1b[31m"})
        log.flush()


def events(root: Path) -> list[dict[str, object]]:
    return [json.loads(text) for path in files_of(root) for text in path.read_bytes().splitlines()]


@given(st.lists(ENTRIES, min_size=1, max_size=6))
def test_a_chain_can_be_followed_from_its_beginning(entries: Sequence[dict[str, object]]) -> None:
    chain = reached = Link()
    for entry in entries:
        data, chain = line(chain, 1_700_000_000.5, entry)
        assert b"\n" not in data
        reached, at = follow(reached, data)
        assert reached == chain and at == "2023-11-14T22:13:20.500Z"
    assert chain.number == len(entries)


def test_an_entry_cannot_pass_for_the_chain_s_own_fields() -> None:
    data, _ = line(Link(), 0.0, {"prev": "f" * 64, "n": 7, "at": "now", "what": "file"})
    assert json.loads(data) == {"n": 1, "at": "1970-01-01T00:00:00.000Z", "prev": GENESIS, "what": "file"}


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'"n"', b"\xff", b'{"n":true,"at":"","prev":""}', b'{"n":1,"at":1,"prev":""}']
)
def test_what_is_no_line_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(AuditBroken, match="no line"):
        follow(None, data)


class TestVerify:
    def test_a_whole_chain_holds(self, tmp_path: Path) -> None:
        written(tmp_path, 3)
        report = verify(tmp_path)
        assert (report.problems, report.files, report.lines, report.first, report.last) == ([], 1, 4, 1, 4)
        assert report.head == digest(next(files_of(tmp_path)).read_bytes().splitlines()[-1])
        assert "the chain holds" in shown(report) and report.head in shown(report)
        assert b"\x1b" not in next(files_of(tmp_path)).read_bytes()

    def test_every_flipped_bit_is_found_by_who_knows_the_head(self, tmp_path: Path) -> None:
        written(tmp_path, 2)
        path, head = next(files_of(tmp_path)), verify(tmp_path).head
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            assert verify(tmp_path, head).problems, at

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda lines: lines.pop(2), "line 4, where line 3 is due"),
            (lambda lines: lines.insert(2, lines[1]), "line 2, where line 3 is due"),
            (lambda lines: lines.insert(1, lines.pop(2)), "line 3, where line 2 is due"),
            (lambda lines: lines.insert(2, lines.pop(2).replace(b"file 1", b"file 7")), "one of the two was changed"),
        ],
    )
    def test_lines_taken_out_put_in_moved_or_changed_are_found(
        self, tmp_path: Path, change: Callable[[list[bytes]], object], told: str
    ) -> None:
        written(tmp_path, 4)
        path = next(files_of(tmp_path))
        lines = path.read_bytes().splitlines(keepends=True)
        change(lines)
        path.write_bytes(b"".join(lines))
        report = verify(tmp_path)
        assert told in report.problems[0] and "BROKEN" in shown(report)

    def test_an_end_that_was_cut_off_is_found_by_who_knows_the_head(self, tmp_path: Path) -> None:
        written(tmp_path, 4)
        path, head = next(files_of(tmp_path)), verify(tmp_path).head
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
        assert verify(tmp_path).problems == []
        assert "cut off" in verify(tmp_path, head).problems[0]

    def test_a_file_that_is_missing_is_found(self, tmp_path: Path) -> None:
        written(tmp_path, 9, max_file_bytes=300)
        list(files_of(tmp_path))[1].unlink()
        assert any("missing" in problem for problem in verify(tmp_path).problems)

    def test_where_there_is_none_it_says_so(self, tmp_path: Path) -> None:
        for root in (tmp_path, tmp_path / "none"):
            with pytest.raises(StoreFailed, match="there is no audit"):
                verify(root)


class TestWriting:
    def test_it_goes_on_where_it_ended(self, tmp_path: Path) -> None:
        for _ in range(3):
            written(tmp_path, 2)
        assert verify(tmp_path).problems == [] and verify(tmp_path).lines == 9
        assert [one["event"] for one in events(tmp_path)] == 3 * ["opened", "answer", "answer"]

    def test_files_rotate_and_the_oldest_leave_in_one_chain(self, tmp_path: Path) -> None:
        written(tmp_path, 40, max_file_bytes=600, keep_files=3)
        report = verify(tmp_path)
        assert report.problems == [] and report.files == 3 and report.last == 41 and report.first > 1
        assert "rotated away" in shown(report)
        assert all(path.stat().st_size <= 600 for path in files_of(tmp_path))

    @pytest.mark.parametrize("torn", [b'{"n":4,"at":"2023', b"\0" * 100, b"\xff\n\xfe", b"nonsense\n" * 3])
    def test_what_a_crash_left_is_cut_off_and_said(self, tmp_path: Path, torn: bytes) -> None:
        written(tmp_path, 2)
        with next(files_of(tmp_path)).open("ab") as file:
            file.write(torn)
        written(tmp_path, 1)
        assert verify(tmp_path).problems == []
        assert [one.get("cut_bytes") for one in events(tmp_path) if one["event"] == "opened"] == [None, len(torn)]
        assert [path.read_bytes() for path in tmp_path.glob("*.cut")] == [torn]

    def test_a_crash_right_after_a_rotation_breaks_nothing(self, tmp_path: Path) -> None:
        written(tmp_path, 2)
        (tmp_path / "audit-00000002.jsonl").touch()
        written(tmp_path, 1)
        assert verify(tmp_path).problems == [] and verify(tmp_path).lines == 5

    @pytest.mark.parametrize("seed", range(3))
    def test_a_power_cut_at_any_operation_leaves_a_chain_that_holds(self, tmp_path: Path, seed: int) -> None:
        """Whatever was not synced is there, or not, or in parts; what was handed over a flush before is there."""
        rng = random.Random(seed)
        for left in range(80):
            root = tmp_path / f"{left}" / "root"
            root.mkdir(parents=True)
            disk = LosingDisk(root)
            disk.left = left
            done = 0
            try:
                log = opened(root / "audit", max_file_bytes=400, disk=disk)
                for number in range(6):
                    for part in "abc":
                        log.add({"event": "answer", "path": f"{number}{part}"})
                    log.flush()
                    done = number + 1
            except Crash:
                disk.cut(rng)
            else:
                assert left > 30
                disk.close()
                break
            written(root / "audit", 1)
            assert verify(root / "audit").problems == []
            paths = [one.get("path") for one in events(root / "audit")]
            assert {f"{n}{part}" for n in range(done) for part in "abc"} <= set(paths)

    def test_a_full_disk_loses_nothing_that_fits_in_memory(self, tmp_path: Path) -> None:
        class Full(Disk):
            is_full = False

            def write_at(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
                if self.is_full:
                    super().write_at(fd, [bytes(buffers[0])[:10]], offset)
                    raise StoreFull("the disk is full")
                super().write_at(fd, buffers, offset)

        disk = Full()
        log = opened(tmp_path, disk=disk)
        size = (tmp_path / "audit-00000001.jsonl").stat().st_size
        disk.is_full = True
        for number in range(50_010):
            log.add({"event": "answer", "path": str(number)})
            if number % 10_000 == 0:
                log.flush()
        assert (tmp_path / "audit-00000001.jsonl").stat().st_size == size
        disk.is_full = False
        log.flush()
        told = events(tmp_path)
        assert verify(tmp_path).problems == []
        assert told[0]["event"] == "opened" and told[-1] == {**told[-1], "event": "lost", "lines": 10}
        assert [one["path"] for one in told[1:-1]] == [str(number) for number in range(50_000)]

    def test_a_place_that_cannot_be_written_is_told_at_the_start(self, tmp_path: Path) -> None:
        (tmp_path / "audit").write_text("a file")
        with pytest.raises(StoreRefused, match="audit"):
            opened(tmp_path / "audit")
