"""The file of the mirror's own tokens."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.errors import BadTarget, StoreFailed
from nearhub.store.tokens import TokenFile, parsed
from nearhub.wire.credentials import Local


def test_a_token_names_its_owner_until_it_is_removed(tmp_path: Path) -> None:
    """Also for a process that has read the file before."""
    file, other = TokenFile(tmp_path / "etc" / "tokens"), TokenFile(tmp_path / "etc" / "tokens")
    assert file.read() == {}
    token = other.add("carol", frozenset({"nlp", "vision"}))
    mark = hashlib.sha256(token.encode()).hexdigest()
    assert file.read() == {mark: Local("carol", frozenset({"nlp", "vision"}))}
    second = other.add("dave", frozenset())
    assert len(file.read()) == 2 and token != second
    other.remove("carol")
    assert [local.name for local in file.read().values()] == ["dave"]


def test_no_token_stands_in_the_file_and_nobody_else_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    token = TokenFile(path).add("carol", frozenset())
    assert token.removeprefix("nh_") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_name_is_had_once_and_is_one(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens")
    file.add("carol", frozenset())
    with pytest.raises(BadTarget, match="already"):
        file.add("carol", frozenset())
    for name, groups in (("a b", frozenset()), ("", frozenset()), ("x\ny", frozenset()), ("ok", frozenset({"a,b"}))):
        with pytest.raises(BadTarget):
            file.add(name, groups)
    with pytest.raises(BadTarget, match="no token called erin"):
        file.remove("erin")
    assert [local.name for local in file.read().values()] == ["carol"]


def test_without_a_file_there_are_none_and_none_can_be_made() -> None:
    assert TokenFile(None).read() == {}
    with pytest.raises(BadTarget, match=r"\[access\] tokens"):
        TokenFile(None).add("carol", frozenset())


@pytest.mark.parametrize(
    "line", ["carol", "carol abc", f"carol {'0' * 64} nlp more", f"ca/rol {'0' * 64}", f"c {'0' * 64} a,b!"]
)
def test_nonsense_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# head\n\n{line}\n")
    with pytest.raises(StoreFailed, match=":3: is no token"):
        TokenFile(path).read()


def test_a_file_that_cannot_be_read_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.mkdir()
    with pytest.raises(StoreFailed, match="cannot be read"):
        TokenFile(path).read()
    path.rmdir()
    path.write_bytes(b"\xff")
    with pytest.raises(StoreFailed, match="cannot be read"):
        TokenFile(path).read()


@given(st.text())
def test_no_text_does_worse_than_an_error_of_ours(text: str) -> None:
    try:
        parsed(text, "file")
    except StoreFailed as exc:
        assert exc.message.startswith("file:")
