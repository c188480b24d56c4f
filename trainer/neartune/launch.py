"""Who starts the processes of a run: this command by itself, `accelerate launch`, or a launcher that has started it already.

Pure: it decides from the recipe's settings and the environment, and starts nothing. Nothing heavy is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neartune import yaml12

KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
"""distributed_type of an accelerate config that can be used here."""
GRACE = 600
"""Seconds that torch.distributed.run lets processes finish the step under way and write a checkpoint (its own default: 30)."""
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


class LaunchError(Exception):
    """The processes that were asked for cannot be had so; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Accelerate:
    """What an accelerate config says that matters here. `processes`: on all machines together, None: it does not say."""

    file: Path
    processes: int | None
    machines: int
    is_sharded: bool


@dataclass(frozen=True, slots=True)
class World:
    """One of `size` processes that a launcher started, as torch.distributed's environment says it. `here`: on this machine, all
    if it does not say."""

    rank: int
    size: int
    here: int


@dataclass(frozen=True, slots=True)
class Start:
    """`command`: what starts the processes, this command's own words to follow; empty: the work is done in this process.
    `here`: processes on this machine."""

    command: tuple[str, ...] = ()
    here: int = 1
    note: str = ""


def read_accelerate(file: Path) -> Accelerate:
    """Of a file that `accelerate config` writes. Raises LaunchError."""
    try:
        items = yaml12.parse_map(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LaunchError(f"{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise LaunchError(f"{file}: cannot be read: {exc}") from None
    except yaml12.YamlError as exc:
        raise LaunchError(f"{file}:{exc.line}: {exc.message}") from None

    def value(key: str, default: Any) -> Any:
        return items[key].value if key in items and items[key].value is not None else default

    def refuse(key: str, text: str) -> LaunchError:
        return LaunchError(f"{file}:{items[key].line}: {key}: {text}")

    kind = value("distributed_type", "NO")
    if kind not in KINDS:
        raise refuse("distributed_type", f"{kind} is not what this trainer can do; it must be one of {', '.join(KINDS)}")
    counts = {key: value(key, default) for key, default in (("num_processes", None), ("num_machines", 1))}
    for key, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise refuse(key, f"it is {count!r}; it must be a whole number from 1")
    options = value("fsdp_config", {})
    if not isinstance(options, dict):
        raise refuse("fsdp_config", "it must be a map")
    if kind == "FSDP" and options.get("fsdp_offload_params"):
        raise refuse("fsdp_config", "fsdp_offload_params is not built: leave it out")
    return Accelerate(file, counts["num_processes"], counts["num_machines"] or 1, kind == "FSDP")


def world_of(environ: Mapping[str, str]) -> World | None:
    """None: no launcher of torch.distributed started this process."""
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    size = int(environ["WORLD_SIZE"])
    return World(int(environ["RANK"]), size, int(environ.get("LOCAL_WORLD_SIZE", size)))


def is_sharded(environ: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` was told to shard with FSDP."""
    return environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def processes(asked: int | str, config: Accelerate | None, environ: Mapping[str, str], count_gpus: Callable[[], int]) -> int:
    """Of a run with these settings, on all machines together."""
    if isinstance(asked, int):
        return asked
    if config is not None and config.processes is not None:
        return config.processes
    world = world_of(environ)
    return world.size if world is not None else max(1, count_gpus())


def decide(
    asked: int | str,
    config: Accelerate | None,
    environ: Mapping[str, str],
    count_gpus: Callable[[], int],
    *,
    is_child: bool,
) -> Start:
    """`asked`: the recipe's `processes`; `is_child`: this command started the launcher that started this process. Raises
    LaunchError."""
    wanted = processes(asked, config, environ, count_gpus)
    world = world_of(environ)
    if world is not None or is_child:
        size = 1 if world is None else world.size
        if size != wanted and (is_child or asked != "auto" or (config is not None and config.processes is not None)):
            raise LaunchError(_another_size(wanted, size, config, is_child=is_child))
        return Start(note="" if is_child else f"one of {_counted(size)} that a launcher started: none are started here")
    for name in _MPI:
        if int(environ.get(name, "1")) > 1:
            raise LaunchError(
                f"MPI started {environ[name]} processes ({name}) that do not know of each other: RANK and WORLD_SIZE are "
                "not set. Let it start torchrun, once on each machine"
            )
    if config is not None and (wanted > 1 or config.is_sharded):
        command = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config.file), "-m", "neartune")
        here = max(1, wanted // config.machines)
        return Start(command, here, f"{_counted(wanted)}, by accelerate launch and {config.file}")
    if wanted > 1:
        run = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={wanted}", "-m", "neartune")
        return Start(run, wanted)
    return Start()


def _another_size(wanted: int, size: int, config: Accelerate | None, *, is_child: bool) -> str:
    if is_child and config is not None:
        return (
            f"{config.file}: {_counted(wanted)} were to be started, and accelerate launch started {size}: for use_cpu: true it "
            f"starts one, whatever num_processes says. On a CPU leave accelerate_config out and say processes: {wanted}"
        )
    source = "accelerate_config asks" if config is not None and config.processes == wanted else "processes asks"
    return f"{source} for {_counted(wanted)}, and the launcher started {size}: say the same in both, or processes: auto"


def _counted(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} processes"


def sharding_complaints(settings: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """(key, why it cannot be) of recipe settings under FSDP."""
    found = []
    if settings["micro_batch_size"] == "auto":
        text = "auto is not measured when the base is sharded, since a process short of memory leaves the others waiting"
        found.append(("micro_batch_size", f"{text}: say a number"))
    if settings["compile"]:
        found.append(("compile", "it is not built for a sharded base (FSDP): leave it out"))
    if settings["load_in_4bit"]:
        found.append(("load_in_4bit", "it is not built for a sharded base (FSDP): leave it out"))
    return found
