"""What the machine does: processor, memory, disk and network through psutil, NVIDIA's GPUs through NVML where its driver is.

Bytes, seconds, percent of the whole, degrees Celsius, watts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Gpu:
    """None: this GPU does not tell."""

    name: str
    utilisation: float | None
    memory_used: int | None
    memory_total: int | None
    temperature: int | None
    power: float | None
    power_limit: float | None


@dataclass(frozen=True, slots=True)
class Counters:
    """Readings at one moment; most only grow. `at`, `busy`, `idle` and `process_busy` are seconds."""

    at: float
    busy: float
    idle: float
    process_busy: float
    cores: int
    process_memory: int
    memory_used: int
    memory_total: int
    disk_free: int
    disk_read: int
    disk_written: int
    received: int
    sent: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The machine between two readings. `process_cpu`: percent of the machine, like `cpu`. Rates are bytes a second."""

    cpu: float
    process_cpu: float
    cores: int
    process_memory: int
    memory_used: int
    memory_total: int
    disk_free: int
    disk_read: float
    disk_write: float
    net_in: float
    net_out: float
    gpus: tuple[Gpu, ...] = ()

    def as_line(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {"kind": "machine", **asdict(self)}


def read_counters(folder: Path, clock: Callable[[], float] = time.monotonic) -> Counters:
    """`folder`: whose disk is asked for free space. Loopback is no network."""
    cpu, memory, process = psutil.cpu_times(), psutil.virtual_memory(), psutil.Process()
    idle = cpu.idle + getattr(cpu, "iowait", 0.0)
    guest = getattr(cpu, "guest", 0.0) + getattr(cpu, "guest_nice", 0.0)  # counted in user already
    own = process.cpu_times()
    disk = None  # as psutil has it in a container that hides its disks
    with suppress(NotImplementedError):  # no /proc/diskstats
        disk = psutil.disk_io_counters()
    cards = [card for name, card in psutil.net_io_counters(pernic=True).items() if not name.startswith("lo")]
    return Counters(
        at=clock(),
        busy=sum(cpu) - idle - guest,
        idle=idle,
        process_busy=own.user + own.system,
        cores=psutil.cpu_count() or 1,
        process_memory=process.memory_info().rss,
        memory_used=memory.total - memory.available,
        memory_total=memory.total,
        disk_free=psutil.disk_usage(str(folder)).free,
        disk_read=disk.read_bytes if disk else 0,
        disk_written=disk.write_bytes if disk else 0,
        received=sum(card.bytes_recv for card in cards),
        sent=sum(card.bytes_sent for card in cards),
    )


def between(before: Counters, now: Counters, gpus: tuple[Gpu, ...] = ()) -> Sample:
    """Rates and shares between two readings. A counter that fell (a disk or a card that went) counts as still."""
    seconds = max(1e-9, now.at - before.at)
    busy, idle = max(0.0, now.busy - before.busy), max(0.0, now.idle - before.idle)

    def rate(name: str) -> float:
        return max(0.0, float(getattr(now, name) - getattr(before, name))) / seconds

    return Sample(
        cpu=100.0 * busy / max(1e-9, busy + idle),
        process_cpu=min(100.0, 100.0 * rate("process_busy") / now.cores),
        cores=now.cores,
        process_memory=now.process_memory,
        memory_used=now.memory_used,
        memory_total=now.memory_total,
        disk_free=now.disk_free,
        disk_read=rate("disk_read"),
        disk_write=rate("disk_written"),
        net_in=rate("received"),
        net_out=rate("sent"),
        gpus=gpus,
    )


def open_gpus(say: Say) -> Callable[[], tuple[Gpu, ...]]:
    """How to read all GPUs of this machine; none without NVIDIA's driver. A driver that fails otherwise, or later, is said
    once, and its GPUs are gone."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return lambda: ()
    except Exception as exc:  # noqa: BLE001 — a broken driver, or one that pynvml does not know
        say(f"monitor: the GPUs cannot be read: {exc!r}")
        return lambda: ()

    def read() -> tuple[Gpu, ...]:
        try:
            return tuple(_read_gpu(pynvml, handle) for handle in handles)
        except Exception as exc:  # noqa: BLE001 — the same
            handles.clear()
            say(f"monitor: the GPUs cannot be read any more: {exc}")
            return ()

    return read


def _read_gpu(pynvml: Any, handle: Any) -> Gpu:
    def ask(function: Callable[..., Any], *more: Any) -> Any:
        try:
            return function(handle, *more)
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission, pynvml.NVMLError_FunctionNotFound):
            return None

    name = ask(pynvml.nvmlDeviceGetName)
    utilisation, memory = ask(pynvml.nvmlDeviceGetUtilizationRates), ask(pynvml.nvmlDeviceGetMemoryInfo)
    power, limit = ask(pynvml.nvmlDeviceGetPowerUsage), ask(pynvml.nvmlDeviceGetEnforcedPowerLimit)
    return Gpu(
        name=str(name or "GPU"),
        utilisation=None if utilisation is None else float(utilisation.gpu),
        memory_used=None if memory is None else int(memory.used),
        memory_total=None if memory is None else int(memory.total),
        temperature=ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        power=None if power is None else power / 1000,
        power_limit=None if limit is None else limit / 1000,
    )
