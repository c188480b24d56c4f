"""A bar on a terminal, a line now and then elsewhere, nothing for what is over soon."""

from __future__ import annotations

import io
from typing import Any

from nearhub.progress import Progress
from tests.proxy.clock import Clock

MB = 1_000_000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line(done: int, **more: Any) -> dict[str, Any]:
    return {"done": done * MB, "of": 100 * MB, "files": 1, "of_files": 3, "what": "org/m@main", **more}


def test_on_a_terminal_bytes_files_rate_and_what_is_left(clock: Clock) -> None:
    terminal = Terminal()
    bar = Progress(terminal, clock)
    bar.show(line(50))  # was there before: no speed
    for done in (55, 60):
        clock.now += 1
        bar.show(line(done))
    last = terminal.getvalue().rpartition("\r")[2]
    assert last.startswith(
        "[" + "#" * 14 + "." * 10 + "] org/m@main:  60 %, 60.0 MB of 100 MB, 1/3 files, 5.00 MB/s, 0:08 left"
    )
    bar.end()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_elsewhere_a_plain_line_each_ten_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    bar = Progress(stream, clock)
    for _ in range(42):
        bar.show(line(10))
        clock.now += 0.5
    bar.end()
    assert stream.getvalue() == "org/m@main:  10 %, 10.0 MB of 100 MB, 1/3 files\n" * 2


def test_nothing_to_do_and_work_about_no_repo(clock: Clock) -> None:
    terminal = Terminal()
    bar = Progress(terminal, clock)
    bar.show({"done": 0, "of": 0})
    bar.end()
    assert terminal.getvalue() == ""
    bar.show({"done": 1, "of": 2})
    assert "50 %, 1 B of 2 B" in terminal.getvalue()
