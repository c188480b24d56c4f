"""What the terminal shows of a run: rows of styled text, drawn from numbers alone. Only the sixteen colours that a terminal's
own theme defines are used, so that it reads on light and on dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from neartune.units import clock, meter, size
from neartune.watch.machine import Gpu, Sample

Row = list[tuple[str, str]]
"""Pieces: (text, style of rich)."""

LABEL = 7
"""Columns before what a row shows."""
HIGHEST = 8
"""Lines of the loss curve where there is room."""
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


@dataclass(frozen=True, slots=True)
class View:
    """What is known at one moment. `line`: of the last step, as in metrics.jsonl; `rate`: tokens a second of the last steps;
    `evaluations`: lines, the last one last; `eta`: seconds."""

    title: str
    step: int
    total: int
    losses: Sequence[float] = ()
    line: Mapping[str, Any] | None = None
    rate: float = 0.0
    evaluations: Sequence[Mapping[str, Any]] = ()
    eta: float | None = None
    sample: Sample | None = None


def rows(view: View, width: int, height: int) -> list[Row]:
    """The panel in `width` columns; the curve is as high as fits in `height` lines, or not there."""
    above = [_title(view, width), _progress(view, width)]
    below = [[(line, "")] for line in flow(numbers(view), width)]
    below += [_evaluation(line, width) for line in view.evaluations[-2:]]
    if view.sample is not None:
        below += _machine(view.sample, width)
    room = min(HIGHEST, height - len(above) - len(below) - 1)
    drawn = _curve(view.losses, width, room) if view.losses and room >= 3 else []
    return above + drawn + below


def numbers(view: View) -> list[str]:
    """Of the last step."""
    if view.line is None:
        return []
    line = view.line
    norm = line["grad_norm"]
    return [
        f"loss {line['loss']:.3f}",
        f"lr {line['learning_rate']:.1e}",
        "grad –" if norm is None else f"grad {norm:.3g}",
        f"{view.rate:.0f} tok/s",
        f"{line['seconds']:.2f} s/step",
    ]


def plain(view: View) -> str:
    """The same in one line, where there is no terminal."""
    loss, rate, _, speed, _ = numbers(view)
    eta = "" if view.eta is None else f"  ETA {clock(view.eta)}"
    return f"step {view.step}/{view.total}  {loss}  {rate}  {speed}{eta}"


def flow(parts: Sequence[str], width: int) -> list[str]:
    """As many parts in a line as fit."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines


def curve(values: Sequence[float], width: int, height: int) -> list[str]:
    """`height` lines of `width` cells of 2 × 4 dots: the least value in the lowest row of dots, the greatest in the highest;
    neighbours are joined. More values than dots are averaged, fewer are joined by straight lines."""
    across, down = 2 * width, 4 * height
    columns = _fitted(values, across)
    low, high = min(columns), max(columns)
    scale = (down - 1) / (high - low) if high > low else 0.0
    cells = [[0] * width for _ in range(height)]
    before: int | None = None
    for x, value in enumerate(columns):
        y = round((high - value) * scale) if scale else down // 2
        beside = y if before is None else before + (y > before) - (y < before)
        for dot in range(min(y, beside), max(y, beside) + 1):
            cells[dot // 4][x // 2] |= _DOTS[x % 2][dot % 4]
        before = y
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def _fitted(values: Sequence[float], count: int) -> list[float]:
    """`count` values in place of however many."""
    known = len(values)
    if known >= count:
        bounds = [number * known // count for number in range(count + 1)]
        return [sum(values[low:high]) / (high - low) for low, high in pairwise(bounds)]
    found = []
    for number in range(count):
        whole, rest = divmod(number * (known - 1), count - 1)
        after = values[min(whole + 1, known - 1)]
        found.append(values[whole] + (after - values[whole]) * rest / (count - 1))
    return found


# — rows —————————————————————————————————————————————————————————————————————————————————————————


def _apart(left: str, right: str, width: int) -> tuple[str, str]:
    """Left cut so that both fit with a space between."""
    room = width - len(right) - 1
    shown = left if len(left) <= room else left[: max(0, room - 1)] + "…"
    return shown.ljust(room + 1), right


def _title(view: View, width: int) -> Row:
    left, right = _apart(view.title, f"step {view.step}/{view.total}", width)
    return [(left, "bold"), (right, "bold")]


def _progress(view: View, width: int) -> Row:
    share = view.step / max(1, view.total)
    right = f" {share:4.0%}  ETA {'–' if view.eta is None else clock(view.eta)}"
    return [(meter(share, width - len(right)), "cyan"), (right, "")]


def _curve(losses: Sequence[float], width: int, height: int) -> list[Row]:
    labels = [f"{max(losses):.4g}", *[""] * (height - 2), f"{min(losses):.4g}"]
    lines = curve(losses, width - LABEL, height)
    return [[(f"{label:>{LABEL - 1}} ", "dim"), (line, "cyan")] for label, line in zip(labels, lines, strict=True)]


def _evaluation(line: Mapping[str, Any], width: int) -> Row:
    found = [f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float)]
    return [(_cut(f"{'eval':<{LABEL}}step {line['step']}  " + "  ".join(found), width), "")]


def _machine(sample: Sample, width: int) -> list[Row]:
    """Meters like htop's, GPUs like nvidia-smi's."""
    cells = max(8, width // 6)
    found = [_gpu(number, gpu, cells, width) for number, gpu in enumerate(sample.gpus)]
    memory = sample.memory_used / max(1, sample.memory_total)
    cores = f"{sample.cpu:3.0f} % of {sample.cores} cores, this run {sample.process_cpu:.0f} %"
    used = f"{size(sample.memory_used)} of {size(sample.memory_total)}, this run {size(sample.process_memory)}"
    disk = f"{size(sample.disk_free)} free, read {size(sample.disk_read)}/s, write {size(sample.disk_write)}/s"
    net = f"in {size(sample.net_in)}/s, out {size(sample.net_out)}/s"
    found.append(_metered("cpu", sample.cpu / 100, cores, cells, width))
    found.append(_metered("ram", memory, used, cells, width))
    found += [[(_cut(f"{name:<{LABEL}}{text}", width), "")] for name, text in (("disk", disk), ("net", net))]
    return found


def _gpu(number: int, gpu: Gpu, cells: int, width: int) -> Row:
    """What it does not tell is not shown. From 100 columns on with its name and its power limit."""
    is_wide = width >= 100
    parts = [] if gpu.utilisation is None else [f"{gpu.utilisation:3.0f} %"]
    if gpu.memory_used is not None and gpu.memory_total is not None:
        parts.append(f"{size(gpu.memory_used)} of {size(gpu.memory_total)}")
    if gpu.temperature is not None:
        parts.append(f"{gpu.temperature} °C")
    if gpu.power is not None:
        limit = f" of {gpu.power_limit:.0f}" if is_wide and gpu.power_limit is not None else ""
        parts.append(f"{gpu.power:.0f}{limit} W")
    if is_wide:
        parts.append(gpu.name)
    return _metered(f"gpu {number}", (gpu.utilisation or 0.0) / 100, "  ".join(parts), cells, width)


def _metered(name: str, share: float, text: str, cells: int, width: int) -> Row:
    style = "green" if share < 0.6 else "yellow" if share < 0.9 else "red"
    room = width - LABEL - cells - 3
    return [(f"{name:<{LABEL}}[", ""), (meter(share, cells), style), ("] ", ""), (_cut(text, room), "")]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
