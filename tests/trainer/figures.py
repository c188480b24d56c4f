"""`python -m tests.trainer.figures`: what the trainer costs, on SmolLM2-135M in this process. Ratios; for a quiet machine."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from neartune import batch, loop, model, tasks
from neartune.data import Row
from neartune.loop import Trainer
from tests.demo import models
from tests.trainer.bases import TRAINER, environment, recipe_of, write_jsonl

PAIRS = 40
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
    for step in range(PAIRS + 2):
        rows = [prepared.examples[row] for row in batch.rows_of_step(step, 2, len(prepared.examples), recipe.seed)]

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
    """(chosen micro-batch, its rate over the best of a full sweep)."""
    trainer, _, prepared = made(folder, train_batch_size=16, micro_batch_size=16)
    longest = sorted(prepared.examples, key=lambda example: -len(example["input_ids"]))[:16]

    def run_micro(size: int) -> int:
        loss, _ = trainer.loss_of(longest[:size])
        torch.autograd.backward(loss)
        trainer.optimizer.step()
        return sum(len(example["input_ids"]) for example in longest[:size])

    device, limit = trainer.device, batch.cpu_limit()
    with batch.untouched(trainer.model, trainer.optimizer):
        chosen = batch.choose(batch.find(run_micro, most=16, device=device, limit=limit))
        rates: dict[int, list[float]] = {}
        for _ in range(3):
            for size in (1, 2, 4, 8, 16):
                began = time.perf_counter()
                rates.setdefault(size, []).append(run_micro(size) / (time.perf_counter() - began))
    best = {size: max(found) for size, found in rates.items()}
    return chosen, best[chosen] / max(best.values())


def refusal() -> float:
    """Seconds until a wrong recipe is told of."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "train.py", "lora_rnk=3"], cwd=TRAINER, env=environment(), capture_output=True)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(f"a wrong recipe is refused after {refusal():.2f} s", flush=True)
        print(f"training state over full fine-tuning's: {state_share(Path(folder)):.3f}", flush=True)
        chosen, share = finder(Path(folder))
        print(f"finder: micro-batch {chosen}, {share:.3f} of the best rate of a sweep", flush=True)
        print(f"our step over a bare one: {overhead(Path(folder)):.3f} (median of {PAIRS} pairs)", flush=True)


if __name__ == "__main__":
    main()
