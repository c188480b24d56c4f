"""Watching a run: a thread that samples the machine, draws the panel and feeds the reporters, so that the thread that trains
only hands over numbers. Whatever fails here is said in one line, and the training goes on.

metrics.jsonl gets `"kind": "machine"` lines: one a second at first, ever rarer later, so that a day is some 2,200 of them.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from neartune.recipe import Recipe
from neartune.watch import panel, reporters
from neartune.watch.machine import Counters, Sample, between, open_gpus, read_counters
from neartune.watch.panel import View

Say = Callable[[str], None]
Log = Callable[[dict[str, Any]], None]
Wait = Callable[[threading.Event, float], bool]
"""(whether to end, seconds at most) → whether to end."""

THREAD = "neartune-monitor"
TICK = 1.0
"""Seconds between two samples, and two drawings, at least."""
PATIENCE = 30.0
"""Seconds that a run waits for the panel, and for each reporter, to end."""
MOST_POINTS = 1024
"""Of a curve; even."""


# — what is decided, from numbers alone ——————————————————————————————————————————————————————————


@dataclass(slots=True)
class History:
    """A curve of bounded size: means over `each` steps; when there are too many, neighbours become one."""

    points: list[float] = field(default_factory=list)
    each: int = 1
    open: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.open.append(value)
        if len(self.open) < self.each:
            return
        self.points.append(statistics.fmean(self.open))
        self.open.clear()
        if len(self.points) == MOST_POINTS:
            halves = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(first + second) / 2 for first, second in halves]
            self.each *= 2


def evaluations_left(step: int, total: int, eval_every: int) -> int:
    """After `step`: one every `eval_every` steps and one at the end. 0: none at all."""
    if not eval_every or step >= total:
        return 0
    return total // eval_every - step // eval_every + bool(total % eval_every)


def eta(step: int, total: int, seconds: Sequence[float], eval_every: int, eval_seconds: Sequence[float]) -> float | None:
    """Seconds to the end, by the medians of recent steps and recent evaluations. None before the first step is done."""
    if not seconds:
        return None
    evaluating = evaluations_left(step, total, eval_every) * statistics.median(eval_seconds) if eval_seconds else 0.0
    return (total - step) * statistics.median(seconds) + evaluating


def is_line_due(step: int, total: int, last_step: int, now: float, last: float, began: float) -> bool:
    """Where there is no panel: the first step (`last_step` is -1), each twentieth of the steps; between them after 10 s, or
    after a hundredth of the time so far where that is more."""
    return step * 20 // total > last_step * 20 // total or now - last >= max(10.0, (now - began) / 100)


def is_machine_due(now: float, last: float, began: float) -> bool:
    """Whether metrics.jsonl gets a sample: after a second, or a two-hundredth of the time so far, a minute at most."""
    return now - last >= min(60.0, max(TICK, (now - began) / 200))


@dataclass(slots=True)
class Progress:
    """What the training thread has handed over. `at`: when it did last; `said_at` and `said_step`: of the last plain line;
    `sampled_at`: of the last sample in metrics.jsonl."""

    title: str
    step: int
    total: int
    eval_every: int
    began: float
    losses: History = field(default_factory=History)
    line: Mapping[str, Any] | None = None
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=20))
    """(seconds, tokens) of steps."""
    eval_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    evaluations: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=2))
    sample: Sample | None = None
    said_step: int = -1
    at: float = field(init=False)
    said_at: float = field(init=False)
    sampled_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.at = self.said_at = self.sampled_at = self.began


def note(progress: Progress, line: Mapping[str, Any], now: float) -> None:
    """A line of metrics.jsonl. Evaluations, and the samples after them, take the time since the line before."""
    kind = line.get("kind")
    if kind is None:
        progress.step, progress.line = line["step"], line
        progress.losses.add(line["loss"])
        progress.recent.append((line["seconds"], line["tokens_per_second"] * line["seconds"]))
    elif kind == "eval":
        progress.eval_seconds.append(now - progress.at)
        progress.evaluations.append(line)
    elif kind == "samples" and progress.eval_seconds:
        progress.eval_seconds[-1] += now - progress.at
    progress.at = now


def view(progress: Progress, now: float) -> View:
    """A copy that another thread may draw."""
    seconds = [taken for taken, _ in progress.recent]
    left = eta(progress.step, progress.total, seconds, progress.eval_every, progress.eval_seconds)
    return View(
        title=progress.title,
        step=progress.step,
        total=progress.total,
        losses=tuple(progress.losses.points) or tuple(progress.losses.open),
        line=progress.line,
        rate=sum(tokens for _, tokens in progress.recent) / max(1e-9, sum(seconds)),
        evaluations=tuple(progress.evaluations),
        eta=None if left is None else max(0.0, left - (now - progress.at)),
        sample=progress.sample,
    )


# — what is done —————————————————————————————————————————————————————————————————————————————————


def terminal(is_wanted: bool) -> Any:
    """A rich console for the panel; None where it is not wanted, or where no terminal is that can show it."""
    if not is_wanted or not sys.stdout.isatty():
        return None
    from rich.console import Console

    console = Console(highlight=False)
    can = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return console if can else None


@dataclass(slots=True)
class Screen:
    """The panel below what is said. `live`: rich's; None where there is no panel, or none any more."""

    console: Any
    live: Any
    say_plainly: Say
    said: SimpleQueue[str] = field(default_factory=SimpleQueue)

    @property
    def is_up(self) -> bool:
        live = self.live  # which the other thread may end
        return live is not None and bool(live.is_started)

    def say(self, line: str) -> None:
        if self.is_up:
            self.said.put(line)
        else:
            self.say_plainly(line)

    def begin(self) -> None:
        if self.console is None:
            return
        try:
            from rich.live import Live

            self.live = Live(console=self.console, auto_refresh=False)
            self.live.start()
        except Exception as exc:  # noqa: BLE001 — a terminal may fail in any way
            self.end()
            self.say_plainly(f"monitor: this terminal shows no panel, and the training goes on: {exc!r}")

    def draw(self, now: View) -> None:
        for text in _drained(self.said):
            self.console.print(text, markup=False)
        self.live.update(_drawn(now, self.console), refresh=True)

    def end(self) -> None:
        live, self.live = self.live, None
        with suppress(Exception):
            live.stop()
        self.say_the_rest()

    def say_the_rest(self) -> None:
        for text in _drained(self.said):
            self.say_plainly(text)


@contextmanager
def watch(
    recipe: Recipe,
    write: Log,
    say: Say,
    *,
    title: str,
    step: int,
    total: int,
    eval_every: int,
    console: Any = None,
    clock: Callable[[], float] = time.monotonic,
    wait: Wait = threading.Event.wait,
    read: Callable[[Path], Counters] = read_counters,
    patience: float = PATIENCE,
) -> Iterator[tuple[Log, Say]]:
    """In place of `write` and `say` while a run goes on from `step`. With a `console` there is a panel, below what is said;
    else a plain line is said now and then. `eval_every`: steps between evaluations, 0 for none."""
    progress = Progress(title, step, total, eval_every, clock())
    lock = threading.Lock()  # of metrics.jsonl and of progress
    screen = Screen(console, None, say)
    feeds = [reporters.begin(name, recipe, step, screen.say, patience) for name in recipe.report_to]
    sample = _sampler(lambda: read(recipe.output_dir), screen.say)

    def keep(line: dict[str, Any]) -> None:
        write(line)
        for feed in feeds:
            feed.put(line)

    def log(line: dict[str, Any]) -> None:
        now = clock()
        with lock:
            keep(line)
            note(progress, line, now)
        if "kind" in line or screen.is_up:
            return
        if is_line_due(progress.step, total, progress.said_step, now, progress.said_at, progress.began):
            progress.said_step, progress.said_at = progress.step, now
            say(panel.plain(view(progress, now)))

    def look() -> None:
        now = clock()
        is_due = is_machine_due(now, progress.sampled_at, progress.began)
        found = sample() if is_due or screen.is_up else None
        if found is None:
            return
        with lock:
            progress.sample = found
            if is_due:
                progress.sampled_at = now
                keep(found.as_line() | {"step": progress.step})

    def draw() -> None:
        if screen.is_up:
            with lock:
                now = view(progress, clock())
            screen.draw(now)

    def work() -> None:
        try:
            while not wait(ended, TICK):
                look()
                draw()
            draw()
            screen.end()
        except Exception as exc:  # noqa: BLE001 — watching must never end what is watched
            screen.end()
            say(f"monitor: it ended, and the training goes on: {exc!r}")

    ended = threading.Event()
    thread = threading.Thread(target=work, name=THREAD, daemon=True)
    screen.begin()
    thread.start()
    try:
        yield log, screen.say
    finally:
        ended.set()
        _join("monitor", thread, patience, say)
        for feed in feeds:
            feed.lines.put(None)
        for feed in feeds:
            _join(feed.name, feed.thread, patience, say)
        screen.say_the_rest()


def _join(name: str, thread: threading.Thread, patience: float, say: Say) -> None:
    thread.join(patience)
    if thread.is_alive():
        say(f"{name}: it has not ended within {patience:.0f} s, and is left behind")


def _sampler(read: Callable[[], Counters], say: Say) -> Callable[[], Sample | None]:
    """How to take a sample since the one before. What cannot be read is said once, and is None from then on."""
    read_gpus = open_gpus(say)
    before: Counters | None = None
    is_broken = False

    def sample() -> Sample | None:
        nonlocal before, is_broken
        if is_broken:
            return None
        try:
            now = read()
        except Exception as exc:  # noqa: BLE001 — what a kernel tells is parsed by software that is not ours
            is_broken = True
            say(f"monitor: the machine cannot be read any more: {exc}")
            return None
        found = between(before, now, read_gpus()) if before is not None else None
        before = now
        return found

    sample()
    return sample


def _drawn(now: View, console: Any) -> Any:
    from rich.text import Text

    lines = [Text.assemble(*row, no_wrap=True, end="") for row in panel.rows(now, console.width, console.height)]
    return Text("\n", no_wrap=True).join(lines)


def _drained(queue: SimpleQueue[str]) -> Iterator[str]:
    with suppress(Empty):
        while True:
            yield queue.get_nowait()
