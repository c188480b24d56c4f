"""Checkpoints: everything that a run needs to go on exactly where it was, written whole or not at all.

    checkpoints/step-000120/adapter.safetensors   what learns
                            state.pt              optimizer, scaler (tensors and plain values only)
                            position.json         step, counters, best, micro-batch

Rows and random numbers are functions of seed and step: nothing of them is kept. Written under a temporary name, synced,
renamed. Read with weights_only: a checkpoint runs no code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from neartune.loop import Trainer
from neartune.model import learning


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message says what to do."""


@dataclass(slots=True)
class Position:
    """Where a run is. `step`: steps done; `applied`: updates, without those that fp16 skipped; `checks`: without progress."""

    step: int = 0
    applied: int = 0
    micro: int = 0
    eval_micro: int = 0
    best: float | None = None
    best_step: int = 0
    best_metrics: dict[str, Any] = field(default_factory=dict)
    checks: int = 0
    base_metrics: dict[str, Any] = field(default_factory=dict)
    base_answers: dict[str, str] = field(default_factory=dict)
    """By prompt."""


def save(folder: Path, trainer: Trainer, position: Position, *, keep: int = 2) -> Path:
    """A checkpoint of now, durable on return; older ones than the last `keep` go (0: none). Raises CheckpointError."""
    target = folder / f"step-{position.step:06d}"
    temporary = folder / f".{target.name}.tmp"
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in learning(trainer.model)}
    state = {
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict() if trainer.scaler else None,
    }
    needed = 4 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + 2**20
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(
                f"{folder}: {needed / 1e6:.0f} MB are needed for a checkpoint and {free / 1e6:.0f} MB are free"
            )
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(tensors, temporary / "adapter.safetensors")
        torch.save(state, temporary / "state.pt")
        (temporary / "position.json").write_text(json.dumps(asdict(position)))
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(folder)
    except OSError as exc:
        raise CheckpointError(f"{folder}: a checkpoint could not be written: {exc.strerror or exc}") from exc
    if keep:
        for old in saved(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def drop_all_but(folder: Path, step: int) -> None:
    for path in saved(folder):
        if path.name != f"step-{step:06d}":
            shutil.rmtree(path, ignore_errors=True)


def saved(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / "position.json").is_file()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Of the checkpoint at `path`."""
    return int(path.name.removeprefix("step-"))


def load(path: Path, trainer: Trainer) -> Position:
    """Put everything back. Raises CheckpointError when it does not fit the model."""
    try:
        position = Position(**json.loads((path / "position.json").read_text()))
        state: Mapping[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        load_parameters(path, trainer.model)
        trainer.optimizer.load_state_dict(dict(state["optimizer"]))
        if trainer.scaler is not None and state["scaler"] is not None:
            trainer.scaler.load_state_dict(state["scaler"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as exc:
        raise CheckpointError(f"{path}: this checkpoint cannot be used: {exc}") from exc
    trainer.micro = position.micro
    return position


def load_parameters(path: Path, model: Any) -> None:
    """Only what learns."""
    tensors = load_file(path / "adapter.safetensors")
    expected = dict(learning(model))
    if tensors.keys() != expected.keys():
        strange = sorted(tensors.keys() ^ expected.keys())
        raise CheckpointError(f"{path}: its parameters are not this model's: {strange[0]} and {len(strange) - 1} more differ")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
