"""Where else a run's numbers go, if `report_to` asks: TensorBoard, Weights & Biases, MLflow. Nothing leaves this machine unless
the environment says where to.

A reporter is (log a line of metrics.jsonl, close). It may fail or hang, in a thread of its own: the training goes on.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from neartune.recipe import Recipe, plain

Reporter = tuple[Callable[[Mapping[str, Any]], None], Callable[[], None]]
Say = Callable[[str], None]


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by the names that reporters show: train/loss, eval/accuracy, machine/gpus/0/power."""
    kind = str(line.get("kind", "train"))
    found: dict[str, float] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                collect(f"{name}/{key}", item)

    for key, value in line.items():
        if key not in ("kind", "step"):
            collect(f"{kind}/{key}", dict(enumerate(value)) if key == "gpus" else value)
    return found


def open_tensorboard(output: Path, recipe: Recipe, step: int) -> Reporter:
    """Event files in OUTPUT/tensorboard. What an earlier process wrote beyond `step` is marked as void."""
    from torch.utils import tensorboard

    make: Any = tensorboard.SummaryWriter
    writer = make(str(output / "tensorboard"), purge_step=step + 1 if step else 0)

    def log(line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["step"])

    return log, writer.close


def open_wandb(output: Path, recipe: Recipe, step: int) -> Reporter:
    """A run in OUTPUT/wandb, offline unless WANDB_MODE says otherwise; `wandb sync` sends it later. One run for all processes
    that a run took: W&B itself refuses steps it has."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_CONSOLE", "off")  # else it copies the panel
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "neartune"),
        name=output.name,
        id=_id(output, "wandb", step) or _keep_id(output, "wandb", uuid.uuid4().hex),
        resume="allow",
        dir=str(output),
        mode=os.environ.get("WANDB_MODE", "offline"),
        config=json.loads(json.dumps(plain(recipe))),
    )

    def log(line: Mapping[str, Any]) -> None:
        if found := scalars(line):
            run.log(found, step=line["step"])

    return log, run.finish


def open_mlflow(output: Path, recipe: Recipe, step: int) -> Reporter:
    """Files in OUTPUT/mlruns, unless MLFLOW_TRACKING_URI names a server. One run for all processes that a run took; steps that
    it has are not sent again: a resumed run repeats them exactly."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # 3.10 and later want to be asked
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or (output / "mlruns").as_uri())
    run = _id(output, "mlflow", step)
    last = -1
    if run is None:
        experiment = client.get_experiment_by_name("neartune")
        number = experiment.experiment_id if experiment else client.create_experiment("neartune")
        run = _keep_id(output, "mlflow", client.create_run(number, run_name=output.name).info.run_id)
        settings = [Param(name, str(value)[:500]) for name, value in plain(recipe).items()]
        client.log_batch(run, params=settings)
    else:
        last = max((metric.step for metric in client.get_metric_history(run, "train/loss")), default=-1)

    def log(line: Mapping[str, Any]) -> None:
        found = scalars(line)
        if found and line["step"] > last:
            now = int(time.time() * 1000)
            client.log_batch(run, metrics=[Metric(name, value, now, line["step"]) for name, value in found.items()])

    return log, lambda: client.set_terminated(run)


OPENERS: dict[str, Callable[[Path, Recipe, int], Reporter]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "mlflow": open_mlflow,
}


@dataclass(frozen=True, slots=True)
class Feed:
    """A reporter in its thread, and the lines that wait for it; None among them closes it."""

    name: str
    lines: SimpleQueue[dict[str, Any] | None]
    thread: threading.Thread

    def put(self, line: dict[str, Any]) -> None:
        if self.thread.is_alive():
            self.lines.put(line)


def begin(name: str, recipe: Recipe, step: int, say: Say, patience: float) -> Feed:
    """It is open on return, unless that takes more than `patience` seconds. What fails is said in one line."""
    lines: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    has_opened = threading.Event()

    def work() -> None:
        trouble = "it cannot be reported to, and the training goes on"
        try:
            log, close = OPENERS[name](recipe.output_dir, recipe, step)
            has_opened.set()
            trouble = "it is reported to no more, and the training goes on"
            while (line := lines.get()) is not None:
                log(line)
            trouble = "it could not be closed"
            close()
        except Exception as exc:  # noqa: BLE001 — of software that is not ours
            say(f"{name}: {trouble}: {exc!r}")
        finally:
            has_opened.set()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    has_opened.wait(patience)
    return Feed(name, lines, thread)


def _id(output: Path, name: str, step: int) -> str | None:
    """What the reporter called this run before; None for one that begins."""
    file = output / "reporters.json"
    return json.loads(file.read_text()).get(name) if step and file.exists() else None


def _keep_id(output: Path, name: str, made: str) -> str:
    file = output / "reporters.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {name: made}))
    return made
