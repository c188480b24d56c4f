"""Watching a run: readings, drawing, decisions; the thread by an injected clock; reporters; and a real terminal."""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from neartune import loop, units
from neartune.recipe import RecipeError
from neartune.watch import machine, monitor, panel, reporters
from neartune.watch.machine import Counters, Gpu, Sample, between, open_gpus, read_counters
from neartune.watch.panel import View
from tests.trainer.bases import (
    FACTS,
    TRAINER,
    command,
    environment,
    lines,
    losses,
    recipe_of,
    run_here,
    settings_of,
    write_jsonl,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", FACTS)


# — readings —————————————————————————————————————————————————————————————————————————————————————

STILL = Counters(
    at=100.0,
    busy=50.0,
    idle=150.0,
    process_busy=7.0,
    cores=4,
    process_memory=3,
    memory_used=5,
    memory_total=10,
    disk_free=99,
    disk_read=1000,
    disk_written=2000,
    received=300,
    sent=400,
)


def later(**changes: Any) -> Counters:
    return Counters(**{name: getattr(STILL, name) for name in Counters.__slots__} | changes)


def test_a_sample_is_the_difference_of_two_readings() -> None:
    now = later(at=102.0, busy=52.0, idle=156.0, process_busy=11.0, disk_read=1500, disk_written=2001, received=800, sent=410)
    assert between(STILL, now) == Sample(
        cpu=25.0,
        process_cpu=50.0,
        cores=4,
        process_memory=3,
        memory_used=5,
        memory_total=10,
        disk_free=99,
        disk_read=250.0,
        disk_write=0.5,
        net_in=250.0,
        net_out=5.0,
    )


def test_a_counter_that_falls_is_no_rate() -> None:
    found = between(STILL, later(at=101.0, disk_read=0, received=0))
    assert (found.disk_read, found.net_in, found.cpu) == (0.0, 0.0, 0.0)


def test_this_machine_is_read(tmp_path: Path) -> None:
    before = read_counters(tmp_path)
    until = time.process_time() + 0.1
    while time.process_time() < until:
        sum(range(1000))
    now = read_counters(tmp_path)
    assert now.process_busy - before.process_busy >= 0.08
    assert before.at < now.at
    assert now.busy > before.busy
    assert now.cores == os.cpu_count()
    assert now.memory_total == psutil.virtual_memory().total
    assert 10**7 < now.process_memory < now.memory_total
    assert 0 < now.disk_free < psutil.disk_usage(str(tmp_path)).total


def test_loopback_is_no_network_and_a_container_may_hide_its_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = type(next(iter(psutil.net_io_counters(pernic=True).values())))
    cards = {"lo": card(7, 7, 0, 0, 0, 0, 0, 0), "eth0": card(1, 2, 0, 0, 0, 0, 0, 0), "eth1": card(10, 20, 0, 0, 0, 0, 0, 0)}
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: cards)
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    found = read_counters(tmp_path)
    assert (found.sent, found.received, found.disk_read, found.disk_written) == (11, 22, 0, 0)


def test_a_kernel_without_counters_of_disks_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise NotImplementedError("/proc/diskstats is not available on this system")

    monkeypatch.setattr(psutil, "disk_io_counters", fail)
    found = read_counters(tmp_path)
    assert (found.disk_read, found.disk_written) == (0, 0)
    assert found.memory_total == psutil.virtual_memory().total


class Driver:
    """In place of libnvidia-ml.so.1: two GPUs, of which the second tells neither its power nor its use. `broken`: what each
    call returns once the driver has died."""

    broken = 0
    silent = pynvml.NVML_ERROR_NOT_SUPPORTED

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments: self.broken or self.call(name, *arguments)

    def call(self, name: str, *arguments: Any) -> int:
        def out(position: int) -> Any:
            return arguments[position]._obj

        match name:
            case "nvmlInitWithFlags":
                return 0
            case "nvmlDeviceGetCount_v2":
                out(0).value = 2
            case "nvmlDeviceGetHandleByIndex_v2":
                ctypes.cast(arguments[1], ctypes.POINTER(ctypes.c_void_p))[0] = arguments[0].value + 1
            case "nvmlDeviceGetName":
                arguments[1].value = b"H100"
            case "nvmlDeviceGetTemperature":
                out(2).value = 64
            case "nvmlDeviceGetMemoryInfo":
                out(1).used, out(1).total = 3 * 10**9, 80 * 10**9
            case "nvmlDeviceGetUtilizationRates" if self.number(arguments[0]) == 1:
                out(1).gpu = 83
            case "nvmlDeviceGetPowerUsage" if self.number(arguments[0]) == 1:
                out(1).value = 412_300
            case "nvmlDeviceGetEnforcedPowerLimit":
                out(1).value = 700_000
            case _:
                return self.silent
        return 0

    def number(self, handle: Any) -> int:
        return ctypes.cast(handle, ctypes.c_void_p).value or 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(pynvml, "nvmlLib", made)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    return made


@pytest.mark.parametrize(
    "silent",
    [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND],
)
def test_gpus_are_read_and_what_one_does_not_tell_is_none(driver: Driver, silent: int) -> None:
    driver.silent = silent
    said: list[str] = []
    assert open_gpus(said.append)() == (
        Gpu("H100", 83.0, 3 * 10**9, 80 * 10**9, 64, 412.3, 700.0),
        Gpu("H100", None, 3 * 10**9, 80 * 10**9, 64, None, 700.0),
    )
    assert said == []


def test_a_driver_that_is_broken_in_its_own_way_is_said_and_the_training_goes_on(
    driver: Driver, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Driver, name: str, *arguments: Any) -> int:
        raise OSError("libnvidia-ml.so.1: another version")

    monkeypatch.setattr(Driver, "call", fail)
    with Watched(tmp_path / "run", data) as (log, _, watched):
        log(step_line(1))
        watched.ticks.tick()
    assert watched.said[0] == "monitor: the GPUs cannot be read: OSError('libnvidia-ml.so.1: another version')"
    assert [line.get("kind") for line in watched.written] == [None, "machine"]


def test_a_driver_that_dies_takes_its_gpus_along_and_that_is_said_once(driver: Driver) -> None:
    said: list[str] = []
    read = open_gpus(said.append)
    assert len(read()) == 2
    driver.broken = pynvml.NVML_ERROR_GPU_IS_LOST
    assert (read(), read()) == ((), ())
    assert len(said) == 1
    assert said[0].startswith("monitor: the GPUs cannot be read any more: ")


def test_without_a_driver_there_are_no_gpus_and_nothing_is_said(driver: Driver) -> None:
    driver.broken = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    said: list[str] = []
    assert (open_gpus(said.append)(), said) == ((), [])


# — drawing ——————————————————————————————————————————————————————————————————————————————————————

NUMBERS = st.lists(st.integers(-1000, 1000).map(float), min_size=1, max_size=400)
WIDTHS, HEIGHTS = st.integers(2, 60), st.integers(1, 10)


def dots(drawn: list[str]) -> list[list[int]]:
    """Of each column of dots, from the left: the rows from the top that are set. Read from Unicode's own names."""
    import unicodedata

    places = {"1": (0, 0), "2": (0, 1), "3": (0, 2), "4": (1, 0), "5": (1, 1), "6": (1, 2), "7": (0, 3), "8": (1, 3)}
    columns: list[list[int]] = [[] for _ in range(2 * len(drawn[0]))]
    for row, line in enumerate(drawn):
        for place, char in enumerate(line):
            for digit in unicodedata.name(char).removeprefix("BRAILLE PATTERN ").removeprefix("DOTS-").replace("BLANK", ""):
                x, y = places[digit]
                columns[2 * place + x].append(4 * row + y)
    return columns


@given(NUMBERS, WIDTHS, HEIGHTS)
def test_a_curve_fills_its_frame_and_is_joined(values: list[float], width: int, height: int) -> None:
    drawn = panel.curve(values, width, height)
    assert [len(line) for line in drawn] == [width] * height
    columns = dots(drawn)
    assert all(columns), "each column has a dot"
    for column, after in pairwise(columns):
        joined = sorted({*column, *after})
        assert joined == list(range(joined[0], joined[-1] + 1)), "no gap between neighbours"
    if len(values) <= 2 * width and len(set(values)) > 1 and values[0] in (min(values), max(values)):
        highest_first = values[0] == max(values)
        assert columns[0][0] == (0 if highest_first else 4 * height - 1)


@given(st.lists(st.integers(-50, 50).map(float), min_size=2, max_size=100), st.integers(1, 8))
def test_the_least_value_is_in_the_lowest_row_and_the_greatest_in_the_highest(values: list[float], height: int) -> None:
    """A column of dots for each value: where it stands is known."""
    values = values + values[-1:] * (len(values) % 2)
    columns = dots(panel.curve(values, len(values) // 2, height))
    if min(values) < max(values):
        assert 0 in columns[values.index(max(values))]
        assert 4 * height - 1 in columns[values.index(min(values))]


@given(NUMBERS, WIDTHS, HEIGHTS, st.sampled_from([0.25, 2.0, 8.0]), st.sampled_from([-64.0, 0.0, 4.0]))
def test_units_do_not_change_a_curve(values: list[float], width: int, height: int, scale: float, shift: float) -> None:
    few = values[: 2 * width]
    line = [few[0]] * (2 * width) if len(few) < 2 * width else few
    assert panel.curve([scale * value + shift for value in line], width, height) == panel.curve(line, width, height)


def test_a_falling_line_falls() -> None:
    assert panel.curve([4.0, 3.0, 2.0, 1.0], 2, 1) == ["⠑⢄"]
    assert panel.curve([1.0, 1.0, 1.0], 3, 1) == ["⠤⠤⠤"]


GPU = Gpu("NVIDIA H100 80GB HBM3", 83.0, 61_200_000_000, 85_520_809_984, 64, 412.3, 700.0)
SAMPLE = Sample(
    34.2, 30.1, 16, 2_213_000_000, 21_300_000_000, 64_000_000_000, 1_230_000_000_000, 0, 3.1e6, 1200, 8e4, (GPU, GPU)
)
LINE = {"step": 140, "loss": 1.3341, "learning_rate": 2.9e-4, "grad_norm": 0.8123, "seconds": 1.21, "tokens_per_second": 300.0}
FULL = View(
    title="SmolLM2-135M · text-generation · cuda",
    step=140,
    total=500,
    losses=tuple(1.2 + 3 / (1 + number / 9) for number in range(140)),
    line=LINE,
    rate=312.4,
    evaluations=({"kind": "eval", "step": 100, "loss": 1.4821}, {"kind": "eval", "step": 125, "loss": 1.4122, "f1": 0.5}),
    eta=437.2,
    sample=SAMPLE,
)


def text_of(view: View, width: int, height: int = 30) -> list[str]:
    return ["".join(piece for piece, _ in row) for row in panel.rows(view, width, height)]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_panel_shows_everything_within_its_columns(width: int) -> None:
    shown = text_of(FULL, width)
    assert max(len(line) for line in shown) <= width
    assert len(shown) <= 30
    whole = "\n".join(shown)
    assert not re.search("…", whole), "nothing is cut"
    for part in (
        *(
            "SmolLM2-135M",
            "step 140/500",
            "28%",
            "ETA 7:18",
            "loss 1.334",
            "lr 2.9e-04",
            "grad 0.812",
            "312 tok/s",
            "1.21 s/step",
        ),
        *("step 125  loss 1.412  f1 0.5", " 83 %", "61.2 GB of 85.5 GB", "64 °C", "412", "34 % of 16 cores, this run 30 %"),
        *("21.3 GB of 64 GB, this run 2.21 GB", "1.23 TB free, read 0 B/s, write 3.1 MB/s", "in 1.2 kB/s, out 80 kB/s"),
    ):
        assert part in whole
    assert [line for line in shown if line.startswith("gpu 1")]
    assert sum("⠀" in line for line in shown) == panel.HIGHEST
    assert ("of 700 W" in whole) is (width == 120)


@given(st.integers(40, 200), st.integers(4, 60), st.integers(0, 1), st.booleans())
def test_at_any_size_no_row_is_wider_and_the_curve_gives_way(width: int, height: int, known: int, has_sample: bool) -> None:
    view = View(
        title="x" * 300 * known,
        step=7,
        total=10,
        losses=FULL.losses[:known],
        line=LINE if known else None,
        sample=SAMPLE if has_sample else None,
    )
    shown = text_of(view, width, height)
    assert max(len(line) for line in shown) <= width
    without = text_of(View(**{name: getattr(view, name) for name in View.__slots__} | {"losses": ()}), width, height)
    assert len(shown) <= max(height, len(without))


def rendered(**options: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=30, **options)
    console.print(monitor._drawn(FULL, console))
    return stream.getvalue()


def test_only_a_theme_s_own_colours_are_used_and_no_color_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    codes = {
        int(code) for found in re.findall(r"\x1b\[([\d;]*)m", rendered(color_system="truecolor")) for code in found.split(";")
    }
    assert codes <= {0, 1, 2, *range(31, 37)}, "bold, dim, and no background, white or black"
    assert codes & set(range(31, 37))
    monkeypatch.setenv("NO_COLOR", "1")
    without = {int(code) for found in re.findall(r"\x1b\[([\d;]*)m", rendered()) for code in found.split(";")}
    assert without <= {0, 1, 2}


def test_a_meter_is_red_only_when_it_is_nearly_full() -> None:
    styles = [dict(panel._metered("cpu", share, "", 8, 80))[units.meter(share, 8)] for share in (0.1, 0.7, 0.95)]
    assert styles == ["green", "yellow", "red"]


@given(st.floats(-1, 2), st.integers(1, 50))
def test_a_meter_is_as_wide_as_asked_and_fills_in_proportion(share: float, width: int) -> None:
    drawn = units.meter(share, width)
    assert len(drawn) == width
    full = drawn.count("█") + ("▏▎▍▌▋▊▉".index(drawn.strip("█ ")) + 1) / 8 if drawn.strip("█ ") else drawn.count("█")
    assert abs(full - width * min(1.0, max(0.0, share))) <= 1 / 16


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234, "1.23 kB"), (99_949, "99.9 kB"), (99_950, "100 kB")),
        *((999_499, "999 kB"), (999_500, "1 MB"), (61_200_000_000, "61.2 GB"), (128_000_000_000, "128 GB")),
        *((1.23e12, "1.23 TB"), (1.234e15, "1234 TB")),
    ],
)
def test_sizes(count: float, shown: str) -> None:
    assert units.size(count) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.2, "1:00"), (192, "3:12"), (3725, "1:02:05")])
def test_durations(seconds: float, shown: str) -> None:
    assert units.clock(seconds) == shown


def test_the_plain_line() -> None:
    view = View("x", 40, 200, line=LINE | {"loss": 1.234}, rate=312.4, eta=192.0)
    assert panel.plain(view) == "step 40/200  loss 1.234  lr 2.9e-04  312 tok/s  ETA 3:12"


# — decisions ————————————————————————————————————————————————————————————————————————————————————


@given(st.integers(0, 60), st.integers(1, 60), st.integers(0, 70))
def test_evaluations_left_are_those_that_the_run_will_do(step: int, total: int, eval_every: int) -> None:
    due = [at for at in range(step + 1, total + 1) if eval_every and (at % eval_every == 0 or at == total)]
    assert monitor.evaluations_left(step, total, eval_every) == len(due)


def test_the_time_left_counts_steps_and_evaluations_by_their_medians() -> None:
    assert monitor.eta(40, 100, [1.0, 1.0, 90.0, 2.0, 2.0], 25, [7.0, 5.0, 600.0]) == 60 * 2.0 + 3 * 7.0
    assert monitor.eta(40, 100, [1.0], 25, []) == 60.0
    assert monitor.eta(40, 100, [1.0], 0, [7.0]) == 60.0
    assert monitor.eta(100, 100, [1.0], 25, [7.0]) == 0.0
    assert monitor.eta(0, 100, [], 25, [7.0]) is None


def told(total: int, seconds: float, began: float = 50.0) -> list[int]:
    """Steps at which a plain line is said, when each takes so long."""
    last, last_at, found = -1, began, []
    for step in range(1, total + 1):
        now = began + step * seconds
        if monitor.is_line_due(step, total, last, now, last_at, began):
            last, last_at = step, now
            found.append(step)
    return found


def test_plain_lines_are_the_first_step_each_twentieth_the_last_and_every_ten_seconds() -> None:
    assert told(200, 0.01) == [1, *range(10, 201, 10)]
    assert told(7, 0.01) == [1, 2, 3, 4, 5, 6, 7]
    assert told(10, 30.0) == list(range(1, 11))
    assert told(1000, 1.0)[:8] == [1, 11, 21, 31, 41, 50, 60, 70]
    assert len(told(86_400, 1.0)) < 900, "a day is not ten thousand lines"


def test_samples_are_kept_a_second_apart_at_first_and_a_day_of_them_is_small() -> None:
    began, last, kept = 50.0, 50.0, []
    for tick in range(1, 86_401):
        now = began + tick * 1.0
        if monitor.is_machine_due(now, last, began):
            last = now
            kept.append(tick)
    assert kept[:100] == list(range(1, 101))
    assert 2000 < len(kept) < 2300
    assert max(after - before for before, after in pairwise(kept)) == 60
    assert not monitor.is_machine_due(began + 0.9, began, began)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5000))
def test_a_long_history_is_bounded_and_its_means_are_right(values: list[int]) -> None:
    history = monitor.History()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "MOST_POINTS", 16)
        for value in values:
            history.add(float(value))
    assert len(history.points) < 16
    whole = [*(point for point in history.points for _ in range(history.each)), *history.open]
    assert len(whole) == len(values)
    assert math.isclose(sum(whole), sum(values))
    for number, point in enumerate(history.points):
        assert math.isclose(point, sum(values[number * history.each : (number + 1) * history.each]) / history.each)


def test_evaluations_and_the_samples_after_them_take_the_time_since_the_line_before() -> None:
    progress = monitor.Progress("x", 0, 100, 10, 0.0)
    step = {"loss": 2.0, "seconds": 2.0, "tokens_per_second": 50.0, "learning_rate": 1.0, "grad_norm": 1.0}
    monitor.note(progress, {"kind": "eval", "step": 0, "loss": 3.0}, 4.0)
    monitor.note(progress, {"step": 1, **step}, 6.0)
    monitor.note(progress, {"kind": "eval", "step": 1, "loss": 2.5}, 10.0)
    monitor.note(progress, {"kind": "samples", "step": 1}, 11.0)
    shown = monitor.view(progress, 12.0)
    assert list(progress.eval_seconds) == [4.0, 5.0]
    assert (shown.step, shown.losses, shown.rate) == (1, (2.0,), 50.0)
    assert shown.eta == 99 * 2.0 + 10 * 4.5 - 1.0


# — the thread ———————————————————————————————————————————————————————————————————————————————————


class Ticks:
    """A clock that stands, and a wait that ends when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waiting, self.going = threading.Semaphore(0), threading.Semaphore(0)

    def clock(self) -> float:
        return self.now

    def wait(self, ended: threading.Event, seconds: float) -> bool:
        assert seconds == monitor.TICK
        self.waiting.release()
        while not self.going.acquire(timeout=0.01):
            if ended.is_set():
                return True
        return ended.is_set()

    def tick(self, seconds: float = 1.0) -> None:
        """Time passes, and the thread does all it has to do."""
        self.waiting.acquire()
        self.now += seconds
        self.going.release()
        self.waiting.acquire()
        self.waiting.release()


def step_line(step: int, loss: float = 2.0) -> dict[str, Any]:
    return LINE | {"step": step, "loss": loss}


class Watched:
    """A watched run without a trainer: what was written and what was said."""

    def __init__(self, output: Path, data: Path, **options: Any) -> None:
        self.ticks, self.written, self.said = Ticks(), list[dict[str, Any]](), list[str]()
        settings = {name: options.pop(name) for name in ("report_to",) if name in options}
        self.recipe = recipe_of(output.parent, data, output, **settings)
        output.mkdir(exist_ok=True)
        usual: dict[str, Any] = {"title": "base", "step": 0, "total": 100, "eval_every": 0}
        usual |= {"clock": self.ticks.clock, "wait": self.ticks.wait, "read": self.read}
        self.context = monitor.watch(self.recipe, self.written.append, self.said.append, **usual | options)

    def read(self, folder: Path) -> Counters:
        return later(at=self.ticks.now, received=int(self.ticks.now) * 7)

    def __enter__(self) -> tuple[monitor.Log, monitor.Say, Watched]:
        return *self.context.__enter__(), self

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


def test_samples_stand_among_the_steps_with_the_step_they_were_taken_at(tmp_path: Path, data: Path) -> None:
    with Watched(tmp_path / "run", data) as (log, _, watched):
        watched.ticks.tick()
        log(step_line(1))
        watched.ticks.tick()
        watched.ticks.tick(0.5)
        log(step_line(2))
        watched.ticks.tick(0.5)
    assert [(line.get("kind"), line["step"]) for line in watched.written] == [
        *(("machine", 0), (None, 1), ("machine", 1), (None, 2), ("machine", 2))
    ]
    sample = watched.written[0]
    assert (sample["net_in"], sample["cores"], sample["gpus"]) == (7.0, 4, ())
    assert json.loads(json.dumps(sample))["memory_total"] == 10
    assert THREADS() == 0


def THREADS() -> int:
    return sum(thread.name == monitor.THREAD for thread in threading.enumerate())


def test_two_threads_never_write_at_once(tmp_path: Path, data: Path) -> None:
    inside, overlapped, written = False, False, 0
    now = iter(range(10**9))

    def write(line: dict[str, Any]) -> None:
        nonlocal inside, overlapped, written
        overlapped |= inside
        inside = True
        time.sleep(0)  # the other thread may run here
        inside = False
        written += "kind" in line

    recipe = recipe_of(tmp_path, data, tmp_path / "run")
    with monitor.watch(
        recipe,
        write,
        lambda line: None,
        title="",
        step=0,
        total=10**6,
        eval_every=0,
        clock=lambda: next(now) * 1000.0,
        wait=lambda ended, seconds: ended.is_set(),
        read=lambda folder: STILL,
    ) as (log, _):
        step = 0
        while step < 300 or written < 300:
            log(step_line(step := step + 1))
    assert not overlapped


def test_plain_lines_are_said_where_there_is_no_panel(tmp_path: Path, data: Path) -> None:
    with Watched(tmp_path / "run", data) as (log, say, watched):
        say("hello")
        log(step_line(1))
        log(step_line(2))
        watched.ticks.now += 10
        log(step_line(3))
    assert watched.said == [
        "hello",
        "step 1/100  loss 2.000  lr 2.9e-04  300 tok/s  ETA 2:00",
        "step 3/100  loss 2.000  lr 2.9e-04  300 tok/s  ETA 1:58",
    ]


def screen(written: str) -> str:
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)


def test_the_panel_is_drawn_below_what_is_said(tmp_path: Path, data: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=30)
    with Watched(tmp_path / "run", data, console=console, title="the title") as (log, say, watched):
        before = stream.getvalue()
        log(step_line(1, 3.5))
        say("[bold]as it is[/bold]")
        assert stream.getvalue() == before, "the training thread draws nothing"
        watched.ticks.tick()
        drawn = screen(stream.getvalue())
        assert drawn.index("[bold]as it is[/bold]") < drawn.rindex("the title")
        assert all(part in drawn for part in ("step 1/100", "loss 3.500", "of 4 cores", "in 7 B/s"))
        log(step_line(2))
        say("last words")
    ended = screen(stream.getvalue())
    assert "last words" in ended
    assert "step 2/100" in ended
    assert watched.said == [], "with a panel no plain lines"
    assert stream.getvalue().endswith("\x1b[?25h"), "the cursor is back"


def test_a_machine_that_cannot_be_read_is_said_once_and_the_rest_goes_on(tmp_path: Path, data: Path) -> None:
    def fail(folder: Path) -> Counters:
        raise PermissionError(13, "no entry")

    with Watched(tmp_path / "run", data, read=fail) as (log, _, watched):
        watched.ticks.tick()
        log(step_line(1))
        watched.ticks.tick()
    assert [line["step"] for line in watched.written] == [1]
    assert watched.said[0] == "monitor: the machine cannot be read any more: [Errno 13] no entry"
    assert len(watched.said) == 2


def test_a_monitor_that_fails_ends_alone(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=30)
    monkeypatch.setattr(panel, "rows", lambda *arguments: 1 / 0)
    with Watched(tmp_path / "run", data, console=console) as (log, say, watched):
        watched.ticks.waiting.acquire()
        watched.ticks.going.release()
        while THREADS():
            threading.Event().wait(0.001)
        log(step_line(1))
        say("goes on")
    assert watched.written[-1] == step_line(1)
    assert watched.said[0] == "monitor: it ended, and the training goes on: ZeroDivisionError('division by zero')"
    assert [line.partition("  ")[0] for line in watched.said[1:]] == ["step 1/100", "goes on"]


class Terminal(io.StringIO):
    """One that fails, or waits, as it is written to."""

    def __init__(self, write: Callable[[], Any]) -> None:
        super().__init__()
        self.before_writing = write

    def write(self, text: str) -> int:
        self.before_writing()
        return super().write(text)


def test_a_terminal_that_cannot_show_the_panel_gets_plain_lines(tmp_path: Path, data: Path) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    console = Console(file=Terminal(fail), force_terminal=True, width=80, height=30)
    with Watched(tmp_path / "run", data, console=console) as (log, say, watched):
        log(step_line(1))
        say("goes on")
        watched.ticks.tick()
    assert [line.partition("  ")[0] for line in watched.said] == [
        "monitor: this terminal shows no panel, and the training goes on: OSError(5, 'Input/output error')",
        *("step 1/100", "goes on"),
    ]
    assert sys.stdout is not console.file and THREADS() == 0


def test_a_run_ends_though_its_terminal_does_not_answer_and_what_was_said_is_not_lost(tmp_path: Path, data: Path) -> None:
    answers, is_stuck = threading.Event(), threading.Event()
    answers.set()

    def write() -> None:
        if not answers.is_set():
            is_stuck.set()
            answers.wait()

    console = Console(file=Terminal(write), force_terminal=True, width=80, height=30)
    with Watched(tmp_path / "run", data, console=console, patience=0.0) as (log, say, watched):
        answers.clear()
        log(step_line(1))
        watched.ticks.waiting.acquire()
        watched.ticks.going.release()
        is_stuck.wait()
        say("last words")
    assert watched.written[0] == step_line(1)
    assert watched.said == ["monitor: it has not ended within 0 s, and is left behind", "last words"]
    answers.set()
    for thread in [one for one in threading.enumerate() if one.name == monitor.THREAD]:
        thread.join()


def test_an_error_of_the_training_passes_and_leaves_no_thread(tmp_path: Path, data: Path) -> None:
    with pytest.raises(loop.OutOfMemory), Watched(tmp_path / "run", data):
        assert THREADS() == 1
        raise loop.OutOfMemory
    assert THREADS() == 0


# — reporters ————————————————————————————————————————————————————————————————————————————————————


def test_the_numbers_of_a_line_have_names() -> None:
    assert reporters.scalars({"step": 3, "loss": 2.0, "micro_batch": 4}) == {"train/loss": 2.0, "train/micro_batch": 4.0}
    assert reporters.scalars({"kind": "eval", "step": 3, "f1": 0.5, "labels": ["a"], "confusion": [[1]]}) == {"eval/f1": 0.5}
    assert reporters.scalars({"kind": "samples", "step": 3, "samples": [{"prompt": "x"}]}) == {}
    found = reporters.scalars(SAMPLE.as_line() | {"step": 3})
    assert found["machine/gpus/1/temperature"] == 64.0
    assert found["machine/net_out"] == 8e4
    assert "machine/gpus/0/name" not in found


def events(output: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(name)]


def as_float32(value: float) -> float:
    return ctypes.c_float(value).value


def test_tensorboard_has_the_losses_of_metrics_jsonl(llama: Path, data: Path, tmp_path: Path) -> None:
    run_here(llama, data, tmp_path / "run", max_steps=5, eval_every=5, report_to="tensorboard")
    assert events(tmp_path / "run", "train/loss") == [
        (step, as_float32(loss)) for step, loss in enumerate(losses(tmp_path / "run"), 1)
    ]
    evaluated = [line for line in lines(tmp_path / "run") if line.get("kind") == "eval"]
    assert events(tmp_path / "run", "eval/loss") == [(line["step"], as_float32(line["loss"])) for line in evaluated]


class Killed(BaseException):
    """In place of kill -9."""


def test_a_resumed_run_has_no_step_twice_in_tensorboard(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_steps": 60, "eval_every": 20, "report_to": "tensorboard"}
    steps = loop.steps

    def some(*arguments: Any, **named: Any) -> Iterator[loop.StepResult]:
        for result in steps(*arguments, **named):
            yield result
            if result.step == 8:
                raise Killed

    monkeypatch.setattr(loop, "steps", some)
    with pytest.raises(Killed):
        run_here(llama, data, tmp_path / "run", **settings)
    assert [step for step, _ in events(tmp_path / "run", "train/loss")] == list(range(1, 9))
    monkeypatch.setattr(loop, "steps", steps)
    _, said = run_here(llama, data, tmp_path / "run", **settings)
    assert "continued from step 6" in said
    assert events(tmp_path / "run", "train/loss") == [
        (step, as_float32(loss)) for step, loss in enumerate(losses(tmp_path / "run"), 1)
    ]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """A package on sys.path, of the little that we call of it."""
    folder = tmp_path / "packages"
    monkeypatch.syspath_prepend(str(folder))

    def make(name: str, code: str) -> None:
        file = folder / f"{name.replace('.', '/')}"
        file.mkdir(parents=True)
        (file / "__init__.py").write_text(code)

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] in ("wandb", "mlflow")]:
        del sys.modules[name]


WANDB = """
import json, os
def init(**options):
        return Run(options)
class Run:
    def __init__(self, options):
        self.file = os.path.join(options["dir"], "wandb.jsonl")
        self.keep(options)
    def keep(self, what):
        with open(self.file, "a") as file:
            file.write(json.dumps(what) + "\\n")
    def log(self, numbers, step):
        self.keep([step, numbers])
    def finish(self):
        self.keep("finished")
"""


def kept(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_wandb_stays_offline_unless_it_is_told_otherwise_and_keeps_its_run(
    tmp_path: Path, data: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("wandb", WANDB)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with Watched(tmp_path / "run", data, report_to="wandb") as (log, _, watched):
        log(step_line(1))
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    monkeypatch.setenv("WANDB_MODE", "online")
    with Watched(tmp_path / "run", data, report_to="wandb", step=1):
        pass
    with Watched(tmp_path / "run", data, report_to="wandb", step=0):
        pass
    first, logged, finished, second, _, third, _ = kept(tmp_path / "run" / "wandb.jsonl")
    assert (first["mode"], second["mode"]) == ("offline", "online")
    assert first["config"]["lora_rank"] == 4
    assert first["id"] == second["id"] != third["id"], "a run that begins anew is another"
    assert logged == [1, reporters.scalars(step_line(1))]
    assert finished == "finished"
    assert watched.said == ["step 1/100  loss 2.000  lr 2.9e-04  300 tok/s  ETA 2:00"]


MLFLOW = """
import json, os, pathlib, types
class MlflowClient:
    def __init__(self, tracking_uri):
        assert os.environ["MLFLOW_ALLOW_FILE_STORE"] == "true" and os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        self.folder = pathlib.Path(tracking_uri.removeprefix("file://"))
        self.folder.mkdir(exist_ok=True)
        self.file = self.folder / "kept.jsonl"
    def keep(self, what):
        with self.file.open("a") as file:
            file.write(json.dumps(what) + "\\n")
    def get_experiment_by_name(self, name):
        return None
    def create_experiment(self, name):
        return "7"
    def create_run(self, experiment, run_name):
        self.keep(["run", experiment, run_name])
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    def log_batch(self, run, metrics=(), params=()):
        self.keep([run, *[[m.key, m.value, m.step] for m in metrics], *[[p.key, p.value] for p in params]])
    def get_metric_history(self, run, key):
        found = [m for line in map(json.loads, self.file.read_text().splitlines()) if line[0] == run for m in line[1:]]
        return [types.SimpleNamespace(step=m[2]) for m in found if m[0] == key and len(m) == 3]
    def set_terminated(self, run):
        self.keep(["ended", run])
"""
ENTITIES = """
import collections
Metric = collections.namedtuple("Metric", "key value timestamp step")
Param = collections.namedtuple("Param", "key value")
"""


def test_mlflow_writes_files_and_a_resumed_run_sends_no_step_twice(
    tmp_path: Path, data: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("mlflow", MLFLOW)
    stand_in("mlflow.entities", ENTITIES)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Watched(tmp_path / "run", data, report_to="mlflow") as (log, _, _):
        log(step_line(1))
        log(step_line(2))
    with Watched(tmp_path / "run", data, report_to="mlflow", step=1) as (log, _, watched):
        log(step_line(2))
        log(step_line(3))
    found = kept(tmp_path / "run" / "mlruns" / "kept.jsonl")
    assert found[0] == ["run", "7", "run"]
    assert ["lora_rank", "4"] in found[1]
    sent = [line[1][2] for line in found if line[0] == "r1" and line[1][0] == "train/loss"]
    assert sent == [1, 2, 3]
    assert [line[0] for line in found].count("ended") == 2
    assert [line.partition("  ")[0] for line in watched.said] == ["step 2/100"]


def test_a_reporter_that_fails_is_said_once_and_dropped(tmp_path: Path, data: Path, stand_in: Any) -> None:
    stand_in("wandb", WANDB.replace("        self.keep([step, numbers])", "        raise OSError('the server is gone')"))
    with Watched(tmp_path / "run", data, report_to=["wandb", "tensorboard"]) as (log, _, watched):
        log(step_line(1))
        watched.ticks.tick()
        log(step_line(2))
        watched.ticks.tick()
    assert [line for line in watched.said if "wandb" in line] == [
        "wandb: it is reported to no more, and the training goes on: OSError('the server is gone')"
    ]
    assert [step for step, _ in events(tmp_path / "run", "train/loss")] == [1, 2], "the other is still reported to"


def test_a_reporter_that_cannot_begin_or_end_does_not_stop_the_training(tmp_path: Path, data: Path, stand_in: Any) -> None:
    stand_in("wandb", WANDB.replace("return Run(options)", "raise RuntimeError('no key')"))
    with Watched(tmp_path / "run", data, report_to="wandb") as (log, _, watched):
        log(step_line(1))
    assert watched.said[0] == "wandb: it cannot be reported to, and the training goes on: RuntimeError('no key')"
    assert watched.written == [step_line(1)]
    sys.modules["wandb"].init = lambda **options: type("Run", (), {"log": print, "finish": lambda self: 1 / 0})()  # type: ignore[attr-defined]
    with Watched(tmp_path / "run", data, report_to="wandb") as (_, _, watched):
        pass
    assert watched.said == ["wandb: it could not be closed: ZeroDivisionError('division by zero')"]


@pytest.mark.parametrize(
    "hangs",
    ["def init(**options):\n", "def log(self, numbers, step):\n", "def finish(self):\n"],
    ids=["begins", "goes on", "ends"],
)
def test_a_reporter_that_hangs_is_left_behind_by_its_name_and_the_others_get_all(
    tmp_path: Path, data: Path, stand_in: Any, hangs: str
) -> None:
    stand_in("wandb", "import threading\ngate = threading.Event()\n" + WANDB.replace(hangs, f"{hangs}        gate.wait()\n"))
    gate = importlib.import_module("wandb").gate
    with Watched(tmp_path / "run", data, report_to=["wandb", "tensorboard"], patience=0.0) as (log, _, watched):
        log(step_line(1))
        watched.ticks.tick()
    left = [thread for thread in threading.enumerate() if thread.name in ("wandb", "tensorboard")]
    gate.set()
    for thread in left:
        assert thread.daemon
        thread.join()
    assert "wandb: it has not ended within 0 s, and is left behind" in watched.said
    assert [step for step, _ in events(tmp_path / "run", "train/loss")] == [1]


def test_a_reporter_must_be_installed_and_a_folder_of_its_name_is_not_it(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError) as caught:
        recipe_of(tmp_path, data, tmp_path / "run", report_to=["tensorboard", "wandb", "mlflow"])
    assert [line.partition("report_to: ")[2] for line in caught.value.complaints] == [
        "wandb is not installed: pip install wandb",
        "mlflow is not installed: pip install mlflow",
    ]


# — terminals ————————————————————————————————————————————————————————————————————————————————————


@pytest.mark.parametrize(
    ("term", "encoding", "is_wanted", "has_panel"),
    [
        ("xterm", "utf-8", True, True),
        ("xterm", "utf-8", False, False),
        ("dumb", "utf-8", True, False),
        ("xterm", "ascii", True, False),
    ],
)
def test_the_panel_is_for_terminals_that_can_show_it(
    monkeypatch: pytest.MonkeyPatch, term: str, encoding: str, is_wanted: bool, has_panel: bool
) -> None:
    monkeypatch.setenv("TERM", term)
    first, second = pty.openpty()
    with open(first, "rb"), open(second, "w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert (monitor.terminal(is_wanted) is not None) is has_panel


def test_a_file_is_no_terminal_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert monitor.terminal(True) is None


def test_a_run_on_a_real_terminal_shows_the_panel_and_ends_with_its_last_words(llama: Path, data: Path, tmp_path: Path) -> None:
    first, second = pty.openpty()
    arguments = settings_of(tmp_path / "run", llama, data, ["max_steps=20", "eval_every=10"])
    environ = environment(TERM="xterm-256color", COLUMNS="80", LINES="30", PYTHONIOENCODING="utf-8")
    process = subprocess.Popen(command(*arguments), cwd=TRAINER, env=environ, stdout=second, stderr=subprocess.PIPE)
    os.close(second)
    shown = b""
    with closing(os.fdopen(first, "rb", buffering=0)) as stream:
        while True:
            try:
                piece = stream.read(65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
    _, error = process.communicate()
    assert process.returncode == 0, error
    text = screen(shown.decode())
    assert "step 20/20" in text
    assert "100%  ETA 0:00" in text
    assert re.search("[⠁-⣿]{3}", text)
    assert re.search(r"ram +\[", text) or not [line for line in lines(tmp_path / "run") if line.get("kind") == "machine"]
    assert "step 20/20: loss" in text, "what is said stands above"
    assert "all 20 steps are done; adapter of" in text[text.rindex("ETA 0:00") :]


def test_what_is_measured_of_a_machine_is_small(tmp_path: Path) -> None:
    assert len(json.dumps(machine.between(STILL, later(at=101.0)).as_line())) < 400
