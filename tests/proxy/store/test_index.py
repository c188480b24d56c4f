"""The index: rows that stay, rows that nobody but nearhub wrote, and a file that is damaged."""

from __future__ import annotations

import itertools
import pickle
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nearhub.errors import StoreFailed, StoreRefused
from nearhub.store.index import Index

KEYS = st.text(st.sampled_from("ab/0. \x01é\uffff\U0001f600"), max_size=4)
"""Characters on both sides of "/", and those that UTF-16 would sort otherwise."""


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with closing(Index(tmp_path / "index")) as opened:
        yield opened


def edit(tmp_path: Path, statement: str, *values: object) -> None:
    """As somebody with write access to the directory could."""
    with closing(sqlite3.connect(tmp_path / "index" / "cache.db")) as database, database:
        database.execute(statement, values)


class Armed:
    """Leaves a trace when it is unpickled."""

    trace: Path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, (str(self.trace), "w"))  # type: ignore[return-value]


class TestRows:
    def test_rows_outlive_the_process(self, tmp_path: Path) -> None:
        row = {"etag": "é\n\0", "size": 2**60, "nested": [None, {"a": 1.5}]}
        with closing(Index(tmp_path / "index")) as index:
            index.put("file models/a@b:ü", row)
        with closing(Index(tmp_path / "index")) as index:
            assert index.get("file models/a@b:ü") == row
            assert index.get("absent") is None

    def test_a_later_row_takes_the_place_of_an_earlier_one(self, index: Index) -> None:
        """That a commit is for ever is the Catalog's business: it looks before it writes, in one transaction."""
        index.put("k", {"a": 1})
        index.put("k", {"a": 3})
        assert index.get("k") == {"a": 3}

    async def test_a_transaction_is_written_as_one(self, index: Index) -> None:
        """What was read in it holds until it ends; when it breaks, nothing of it is there."""

        def look_and_write(key: str, breaks: bool) -> None:
            with index.transaction():
                index.put(key, {"seen": index.get("k")})
                index.put_many([("many a", {}), ("many b", {})])
                if breaks:
                    raise ZeroDivisionError

        index.put("k", {"a": 1})
        with pytest.raises(ZeroDivisionError):
            await index.run(look_and_write, "one", True)
        assert index.get("one") is None and list(index.keys("many ")) == []
        await index.run(look_and_write, "one", False)
        assert index.get("one") == {"seen": {"a": 1}} and list(index.keys("many ")) == ["many a", "many b"]

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(KEYS, unique=True), KEYS.filter(bool), KEYS, st.none() | st.integers(0, 5))
    def test_a_scan_is_a_slice_of_the_sorted_keys(
        self, index: Index, names: list[str], prefix: str, start: str, limit: int | None
    ) -> None:
        """Those with the prefix, from `start` on, in order of code points, at most `limit`; each with its row."""
        index.delete_many(list(index.keys("k")))
        index.put_many((f"k{name}", {"name": name}) for name in names)
        expected = sorted(f"k{name}" for name in names if name.startswith(prefix) and f"k{name}" >= start)
        found = index.scan(f"k{prefix}", start, limit)
        assert found == [(name, {"name": name[1:]}) for name in expected[:limit]]

    def test_prune_keeps_those_written_last(self, index: Index) -> None:
        """By when they were written, not by name; others' rows are not touched."""
        for number in (3, 1, 2, 5, 4):
            index.put(f"doc {number}", {"n": number})
        index.put("dod", {})
        index.put("doc 3", {"n": 3, "again": True})
        index.prune("doc ", 3)
        assert list(index.keys("do")) == ["doc 3", "doc 4", "doc 5", "dod"]
        index.prune("doc ", 0)
        assert list(index.keys("do")) == ["dod"]

    def test_many_rows_are_written_all_or_none(self, index: Index) -> None:
        def rows() -> Iterator[tuple[str, dict[str, object]]]:
            yield "a", {}
            yield "b", {}
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            index.put_many(rows())
        assert list(index.keys("a")) + list(index.keys("b")) == []
        index.put_many([("a", {"x": 1}), ("b", {"x": 2})])
        index.delete_many(["a", "absent"])
        assert (index.get("a"), index.get("b")) == (None, {"x": 2})

    def test_keys_are_those_with_the_prefix(self, index: Index) -> None:
        """Exactly, whatever the characters beside it in the alphabet; in order."""
        names = [
            "seen a",
            "seen b",
            "seen",
            "seen ",
            "seen!",
            "seeo",
            "Seen a",
            "seen \U0010ffff",
            "x",
            "see",
            "seen %",
            "seen _",
        ]
        index.put_many((name, {}) for name in names)
        assert list(index.keys("seen ")) == sorted(name for name in names if name.startswith("seen "))

    def test_no_row_is_ever_dropped_to_make_space(self, index: Index) -> None:
        """diskcache's defaults would, silently, at 1 GiB."""
        assert (index._cache.eviction_policy, index._cache.cull_limit) == ("none", 0)
        assert index._cache.size_limit >= 2**60

    def test_rows_are_durable_on_return(self, index: Index) -> None:
        """SQLite loses acknowledged rows in a power cut below synchronous=FULL (2)."""
        assert index._thread.submit(lambda: index._cache._sql("PRAGMA synchronous").fetchone()[0]).result() == 2

    async def test_a_loop_has_its_calls_done_in_the_one_thread(self, index: Index) -> None:
        await index.run(index.put, "k", {"a": 1})
        assert await index.run(index.get, "k") == {"a": 1}


class TestPlanted:
    @pytest.mark.parametrize("mode", [2, 3, 4, 0, 5])
    def test_a_row_that_is_no_text_in_itself_is_refused_and_never_unpickled(
        self, index: Index, tmp_path: Path, mode: int
    ) -> None:
        """CVE-2025-69872: the mode column decides; 4 is pickle, 2 and 3 are files beside the database."""
        index.put("k", {"a": 1})
        Armed.trace = tmp_path / "unpickled"
        edit(tmp_path, "UPDATE Cache SET mode = ?, value = ?", mode, pickle.dumps(Armed()))
        with pytest.raises(StoreFailed, match="nearhub did not write"):
            index.get("k")
        assert not Armed.trace.exists()

    @pytest.mark.parametrize("mode", [0, 2, 3, 4])
    def test_text_under_another_mode_is_refused_too(self, index: Index, tmp_path: Path, mode: int) -> None:
        index.put("k", {"a": 1})
        edit(tmp_path, "UPDATE Cache SET mode = ?", mode)
        with pytest.raises(StoreFailed, match="nearhub did not write"):
            index.get("k")

    def test_a_row_that_names_a_file_is_refused(self, index: Index, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text('{"a": "secret"}')
        index.put("k", {"a": 1})
        for mode, value in itertools.product((1, 2, 3, 4), (None, "{}")):
            edit(tmp_path, "UPDATE Cache SET mode = ?, filename = ?, value = ?", mode, "../secret", value)
            with pytest.raises(StoreFailed, match="nearhub did not write"):
                index.get("k")

    @pytest.mark.parametrize("value", [b"bytes", 7, None, 1.5])
    def test_a_value_that_is_no_text_is_refused(self, index: Index, tmp_path: Path, value: object) -> None:
        index.put("k", {"a": 1})
        edit(tmp_path, "UPDATE Cache SET value = ?", value)
        with pytest.raises(StoreFailed, match="nearhub did not write"):
            index.get("k")

    @pytest.mark.parametrize("value", ["", "{", "[1]x", "nul", "[1]", "null", "7"])
    def test_text_that_is_no_json_is_an_error_and_not_a_row(self, index: Index, tmp_path: Path, value: str) -> None:
        index.put("k", {"a": 1})
        edit(tmp_path, "UPDATE Cache SET value = ?", value)
        with pytest.raises(StoreFailed, match="nearhub did not write"):
            index.get("k")

    def test_a_pickled_key_is_no_key(self, index: Index, tmp_path: Path) -> None:
        index.put("seen a", {"a": 1})
        Armed.trace = tmp_path / "unpickled"
        edit(tmp_path, "UPDATE Cache SET key = ?, raw = 0", pickle.dumps(Armed()))
        assert list(index.keys("seen ")) == [] and index.get("seen a") is None
        with pytest.raises(StoreFailed):
            list(index._thread.submit(lambda: list(index._cache)).result())
        assert not Armed.trace.exists()

    @pytest.mark.parametrize("value", [b"bytes", 7, ["list"], None])
    def test_only_text_can_be_stored(self, index: Index, value: object) -> None:
        with pytest.raises(TypeError, match="text"):
            index._cache.set("k", value)
        with pytest.raises(TypeError, match="text"):
            index._cache.set(b"k" if value is None else value, "text")


class TestDamage:
    @pytest.mark.parametrize("at", [0, 20, 100, 4096, 3 * 4096])
    def test_a_damaged_index_is_moved_aside_and_begun_anew(self, tmp_path: Path, at: int) -> None:
        """With what was in it, for whoever wants to look; blobs are kept, and can be asked for again."""
        with closing(Index(tmp_path / "index")) as index:
            index.put_many((f"key {i}", {"value": "x" * 100}) for i in range(300))
        file = tmp_path / "index" / "cache.db"
        raw = bytearray(file.read_bytes())
        raw[at : at + 64] = b"\xff" * 64
        file.write_bytes(raw)
        with closing(Index(tmp_path / "index")) as index:
            assert index.get("key 1") is None
            index.put("key 1", {})
        aside = [path for path in tmp_path.iterdir() if path.name.startswith("index.broken-")]
        assert len(aside) == 1 and (aside[0] / "cache.db").read_bytes()[at : at + 64] == b"\xff" * 64

    @pytest.mark.parametrize("length", [10, 100, 5000, 20_000])
    def test_a_torn_index_is_moved_aside_too(self, tmp_path: Path, length: int) -> None:
        with closing(Index(tmp_path / "index")) as index:
            index.put_many((f"key {i}", {"value": "x" * 100}) for i in range(300))
        file = tmp_path / "index" / "cache.db"
        file.write_bytes(file.read_bytes()[:length])
        with closing(Index(tmp_path / "index")) as index:
            assert index.get("key 1") is None
        assert any(path.name.startswith("index.broken-") for path in tmp_path.iterdir())

    def test_an_index_that_only_cannot_be_opened_is_kept(self, tmp_path: Path) -> None:
        """A full disk, a lock, a missing permission say nothing about what is in it: P11 lives there."""
        (tmp_path / "index" / "cache.db").mkdir(parents=True)
        with pytest.raises(StoreRefused, match="cannot be opened"):
            Index(tmp_path / "index")
        assert [path.name for path in tmp_path.iterdir()] == ["index"]
