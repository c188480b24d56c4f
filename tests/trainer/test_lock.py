"""A directory belongs to one run at a time, whichever way that run ends."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neartune import lock, loop
from neartune.records import runs
from neartune.run import RunError, _alone
from tests.trainer.bases import FACTS, TRAINER, environment, lines, run_here, write_jsonl

HOLDER = """
import sys
from pathlib import Path
from neartune import lock
with lock.held(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def quiet(line: str) -> None:
    raise AssertionError(line)


def test_a_second_run_is_told_who_is_there_and_touches_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = write_jsonl(tmp_path / "data.jsonl", FACTS), tmp_path / "run"
    steps, seen = loop.steps, []

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        for result in steps(*arguments, **named):
            yield result
            monkeypatch.setattr(loop, "steps", steps)
            before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
            seen.append(runs.read(output, "run").state)
            with pytest.raises(RunError, match=rf"process {os.getpid()} on \S+ trains here .*let it end, or end it; or choose"):
                run_here(llama, data, output, max_steps=9)
            assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before

    monkeypatch.setattr(loop, "steps", meanwhile)
    run_here(llama, data, output, max_steps=2)
    assert [line["step"] for line in lines(output) if "kind" not in line] == [1, 2]
    assert (seen, runs.read(output, "run").state) == (["running", "running"], "finished")


def test_kill_9_lets_go(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"],
        env=environment(PYTHONPATH=str(TRAINER)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert lock.is_running(tmp_path / "run")
        with pytest.raises(lock.Taken, match=f"process {other.pid} on "), lock.held(tmp_path / "run", quiet):
            pass
        other.kill()
    assert (tmp_path / "run" / lock.FILE).exists(), "it had no time to take it away"
    assert not lock.is_running(tmp_path / "run")
    with lock.held(tmp_path / "run", quiet):
        assert (tmp_path / "run" / lock.FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_it_ends_with_the_run_and_takes_only_a_directory_of_its_own_away(tmp_path: Path) -> None:
    there, new, used = tmp_path / "there", tmp_path / "new", tmp_path / "used"
    there.mkdir()
    for folder in (there, new, used):
        with pytest.raises(ZeroDivisionError), lock.held(folder, quiet):
            assert lock.is_running(folder)
            (used / "file").touch() if folder == used else None
            raise ZeroDivisionError
        assert not lock.is_running(folder)
    assert list(there.iterdir()) == []
    assert [path.name for path in used.iterdir()] == ["file"]
    assert not new.exists()


def test_who_only_looks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the moment in which a run begins, another process looks whether one goes on."""
    looking = (tmp_path / lock.FILE).open("a+")
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: looking.close())
    with lock.held(tmp_path, quiet):
        assert looking.closed


def test_a_file_that_its_holder_took_away_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def late(stream: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / lock.FILE).unlink()
        flock(stream, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.held(tmp_path, quiet):
        assert lock.is_running(tmp_path)


def test_a_file_system_without_locks_is_told_of_and_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(stream: Any, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    said: list[str] = []
    with lock.held(tmp_path, said.append):
        assert not lock.is_running(tmp_path)
    assert said == [
        f"warning: {tmp_path}: its file system has no locks (Function not implemented): nothing keeps a second run out"
    ]


def test_all_processes_of_the_second_run_are_told(tmp_path: Path) -> None:
    other: Any = SimpleNamespace(is_first=False, gather=lambda items: ["process 7 on a-node", *items])
    with pytest.raises(RunError, match="process 7 on a-node trains here"), _alone(tmp_path, other, quiet):
        raise AssertionError
