"""`python -m tests.trainer.figures [refusal monitor state finder overhead]`: what the trainer costs, on SmolLM2-135M in this
process. Ratios; for a quiet machine."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional

from neartune import batch, loop, model, prepare, run, tasks
from neartune.data import Row
from neartune.loop import Trainer
from neartune.watch import monitor
from tests.demo import models
from tests.trainer.bases import TRAINER, environment, recipe_of, write_jsonl

PAIRS = 40
ROUNDS = 8
ROWS = [{"prompt": f"What is {n} times 7?", "completion": f"{n} times 7 is {7 * n}."} for n in range(64)]


def made(folder: Path, **settings: Any) -> tuple[Trainer, Any, Any]:
    base = models.smollm().directory
    recipe = recipe_of(base, write_jsonl(folder / "rows.jsonl", ROWS), folder, lora_rank=8, **settings)
    task = tasks.find(recipe.task)
    tokenizer = task.load_processor(base)
    precision = model.choose_precision("fp32", is_cuda=False, has_bf16=False)
    adapted = model.build(recipe, task, base, (), precision, lambda line: None).train()
    rows = [Row(row, str(number)) for number, row in enumerate(ROWS)]
    prepared = task.prepare(rows, tokenizer, (), max_length=None, model_limit=512)
    optimizer = loop.make_optimizer(adapted, recipe)
    return (
        Trainer(task, adapted, optimizer, tokenizer, precision, torch.device("cpu"), recipe.train_batch_size),
        recipe,
        prepared,
    )


def overhead(folder: Path) -> float:
    """Our step over a bare one on the same rows; the median of paired ratios."""
    trainer, recipe, prepared = made(folder, train_batch_size=2, micro_batch_size=2, max_steps=10 * PAIRS)
    ours = loop.steps(trainer, recipe, prepared.examples, prepared.wheres, first=0, total=10 * PAIRS, applied=0)
    learning = [parameter for _, parameter in model.learning(trainer.model)]
    ratios = []
    order = loop.order_of(recipe, prepared.examples)
    for step in range(PAIRS + 2):
        rows = [prepared.examples[row] for row in batch.rows_of_step(step, 2, len(prepared.examples), order)]

        def bare(rows: list[Any] = rows) -> None:
            inputs = trainer.task.collate(rows, trainer.processor)
            targets = inputs.pop("labels")[:, 1:]
            logits = trainer.model(**inputs).logits[:, :-1]
            loss = functional.cross_entropy(logits.transpose(1, 2), targets)
            trainer.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            trainer.optimizer.step()

        sides = [lambda: next(ours), bare]
        seconds = [0.0, 0.0]
        for which in (0, 1) if step % 2 else (1, 0):
            began = time.perf_counter()
            sides[which]()
            seconds[which] = time.perf_counter() - began
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[2:])


def state_share(folder: Path) -> float:
    """Weights, gradients and optimizer of LoRA, counted from the tensors, over those of full fine-tuning with AdamW in fp32."""
    trainer, recipe, prepared = made(folder, train_batch_size=2, micro_batch_size=2)
    next(loop.steps(trainer, recipe, prepared.examples, prepared.wheres, first=0, total=1, applied=0))
    weights = [parameter for parameter in trainer.model.parameters()]
    held = [*weights, *(parameter.grad for parameter in weights if parameter.grad is not None)]
    held += [value for state in trainer.optimizer.state.values() for value in state.values()]
    lora = sum(tensor.numel() * tensor.element_size() for tensor in held)
    full = 4 * 4 * sum(parameter.numel() for parameter in weights if not parameter.requires_grad)
    return lora / full


def finder(folder: Path) -> tuple[int, float]:
    """(the micro-batch that a run would choose, its rate over the best of a full sweep). Sizes take turns, upwards and
    downwards, so that what else the machine does meets all of them; a size's rate is the median of its turns."""
    trainer, recipe, prepared = made(folder, train_batch_size=16, micro_batch_size="auto")
    chosen = prepare.micro_batch(recipe, trainer, prepared, print)
    longest = sorted(prepared.examples, key=tasks.length, reverse=True)[:16]
    rates: dict[int, list[float]] = {size: [] for size in sorted({1, 2, 4, 8, 16, chosen})}
    with batch.untouched(trainer.model, trainer.optimizer):
        for turn in range(1 + ROUNDS):  # the first warms caches up
            for size in sorted(rates, reverse=turn % 2 == 0):
                began = time.perf_counter()
                loss, _ = trainer.loss_of(longest[:size])
                torch.autograd.backward(loss)
                trainer.optimizer.step()
                rates[size].append(sum(map(tasks.length, longest[:size])) / (time.perf_counter() - began))
    middle = {size: statistics.median(found[1:]) for size, found in rates.items()}
    swept = [f"{size}: {middle[size]:.0f} ({min(found[1:]):.0f} to {max(found[1:]):.0f})" for size, found in rates.items()]
    print("a sweep's tokens/s, median (range):", ", ".join(swept), flush=True)
    return chosen, middle[chosen] / max(middle.values())


def monitor_cost(folder: Path, seconds: float = 30.0) -> tuple[float, float]:
    """What watching takes while SmolLM2 trains for at least so long, over the time that passed: processor time of the
    monitor's thread, with a panel of 100 columns that is drawn into nothing; and time of the training thread beyond writing."""
    trainer, recipe, prepared = made(folder, train_batch_size=2, micro_batch_size=2)
    steps = loop.steps(trainer, recipe, prepared.examples, prepared.wheres, first=0, total=10**6, applied=0)
    writing = handing = 0.0

    with (folder / "lines.jsonl").open("w") as file, Path(os.devnull).open("w") as nowhere:

        def write(line: dict[str, Any]) -> None:
            nonlocal writing
            began = time.thread_time()
            file.write(json.dumps(line) + "\n")
            file.flush()
            writing += (time.thread_time() - began) * ("kind" not in line)

        console = Console(file=nowhere, force_terminal=True, width=100, height=40)
        with monitor.watch(recipe, write, print, title="", step=0, total=10**6, eval_every=0, console=console) as (log, _):
            thread = next(thread for thread in threading.enumerate() if thread.name == monitor.THREAD)
            began = time.perf_counter()
            while time.perf_counter() - began < seconds:
                line = run._line(next(steps))
                handed = time.thread_time()
                log(line)
                handing += time.thread_time() - handed
            taken = time.perf_counter() - began
            spent = time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
    return spent / taken, (handing - writing) / taken


def refusal() -> float:
    """Seconds until a wrong recipe is told of."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "train.py", "lora_rnk=3"], cwd=TRAINER, env=environment(), capture_output=True)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main(asked: Sequence[str]) -> None:
    """`asked`: names of parts; none: all."""

    def told(name: str, tell: Callable[[Path], str]) -> None:
        if not asked or name in asked:
            with tempfile.TemporaryDirectory() as folder:
                print(f"{tell(Path(folder))} (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)", flush=True)

    told("refusal", lambda folder: f"a wrong recipe is refused after {refusal():.2f} s")
    watching = "panel and sampling: {:.2%} of the time in a thread, {:.4%} in the steps"
    told("monitor", lambda folder: watching.format(*monitor_cost(folder)))
    told("state", lambda folder: f"training state over full fine-tuning's: {state_share(folder):.3f}")
    told("finder", lambda folder: "finder: micro-batch {}, {:.3f} of the best rate of a sweep".format(*finder(folder)))
    told("overhead", lambda folder: f"our step over a bare one: {overhead(folder):.3f} (median of {PAIRS} pairs)")


if __name__ == "__main__":
    main(sys.argv[1:])
