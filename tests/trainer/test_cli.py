"""The command line: what the operating system refuses is said in one line."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from neartune import cli
from tests.trainer.bases import FACTS, settings_of, write_jsonl


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", FACTS)


@pytest.mark.parametrize(("below", "what"), [("", "File exists"), ("/run", "Not a directory")])
def test_an_output_dir_that_is_a_file_is_told_of_in_one_line(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str, what: str
) -> None:
    output = tmp_path / "taken"
    output.write_text("mine")
    assert cli.main(["train", *settings_of(Path(f"{output}{below}"), llama, data)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"neartune: {output}{below}: {what}: a file is where a directory is to be: remove it, or choose another place"
    ]
    assert output.read_text() == "mine"


def test_a_disk_that_is_full_is_told_of_in_one_line(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").symlink_to("/dev/full")
    assert cli.main(["train", *settings_of(tmp_path / "run", llama, data, ["max_steps=1"])]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == (
        "neartune: No space left on device: make room; a training goes on from its last checkpoint by the same command"
    )
    assert not [line for line in told if "Traceback" in line]


@pytest.mark.parametrize(
    ("exc", "text", "status"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x: Permission denied: you have no right", 2),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), "/runs/a: No space left on device: make room", 1),
        (PermissionError(errno.EACCES, "could not bind"), "could not bind: you have no right", 1),
        (OSError(errno.EIO, "Input/output error", "/runs/a"), "/runs/a: Input/output error", 1),
        (OSError("two\nlines"), "two lines", 1),
    ],
)
def test_it_says_which_place_and_what_to_do(exc: OSError, text: str, status: int) -> None:
    told = cli.of_the_machine(exc)
    assert (told[0][: len(text)], told[1]) == (text, status)
