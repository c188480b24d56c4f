"""`python -m tests.trainer.claims`: the source's two claims, LoRA beside full fine-tuning, over three seeds.

Memory −70 %: SmolLM2-135M in fp32 with AdamW, two steps, each side in a process of its own. Counted from the tensors, and
the process's peak above what it held before the model.

Steps −30 to −50 % to equal validation loss: a llama of 0.4 million parameters, pre-trained for some seconds on docstrings,
goes on to those of another package. Each side has the learning rate of GRID that reaches the lowest validation loss with a
seed that is not among the three. Equal loss: what both sides reach at their best, and nine tenths of the way there.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from neartune import batch, loop, model, tasks
from neartune.data import Row
from neartune.evaluate import evaluate
from neartune.loop import Trainer
from neartune.reporting.card import change
from neartune.units import size
from tests.demo import models
from tests.trainer.bases import (
    ROOT,
    environment,
    make_tokenizer,
    paragraphs,
    read_through,
    recipe_of,
    token_rows,
    write_jsonl,
)

SEEDS = (1, 2, 3)
TUNED_WITH = 0
GRID = {"LoRA": (1e-3, 3e-3, 1e-2), "full": (1e-3, 3e-3, 1e-2)}
STEPS, EVERY, ROWS_A_STEP, TOKENS, RANK = 80, 2, 8, 48, 16
FACTS = [{"prompt": f"What is {n} times 7?", "completion": f"{n} times 7 is {7 * n}."} for n in range(32)]


def trainer_of(side: str, base: Path, recipe: Any) -> Trainer:
    """The same trainer and optimizer for both; of the full side every parameter of the base learns."""
    task = tasks.find(recipe.task)
    precision = model.choose_precision("fp32", is_cuda=False, has_bf16=False)
    torch.manual_seed(recipe.seed)
    if side == "LoRA":
        learner = model.build(recipe, task, base, (), precision, lambda line: None)
    else:
        learner = task.load_model(base, (), dtype=torch.float32)
    optimizer = loop.make_optimizer(learner.train(), recipe)
    return Trainer(task, learner, optimizer, task.load_processor(base), precision, torch.device("cpu"), recipe.train_batch_size)


# — memory ———————————————————————————————————————————————————————————————————————————————————————


def held(side: str, seed: int) -> dict[str, int]:
    """Bytes by part, and the peak above what was there before the model; in this process, which should be fresh."""
    base = models.smollm().directory
    with tempfile.TemporaryDirectory() as folder:
        data = write_jsonl(Path(folder) / "rows.jsonl", FACTS)
        recipe = recipe_of(base, data, Path(folder) / "run", lora_rank=RANK, seed=seed, learning_rate=1e-4, max_steps=2)
    before = batch.peak(torch.device("cpu"))
    trainer = trainer_of(side, base, recipe)
    rows = [Row(row, str(number)) for number, row in enumerate(FACTS)]
    examples = trainer.task.prepare(rows, trainer.processor, (), max_length=None, model_limit=512)
    for _ in loop.steps(trainer, recipe, examples.examples, examples.wheres, first=0, total=2, applied=0):
        pass
    parameters = list(trainer.model.parameters())
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    found = {
        "weights": _bytes(parameters),
        "gradients": _bytes([parameter.grad for parameter in parameters if parameter.grad is not None]),
        "optimizer": _bytes(states),
    }
    return found | {"peak": batch.peak(trainer.device) - before}


def _bytes(tensors: Sequence[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory() -> None:
    print(f"memory: SmolLM2-135M, fp32, AdamW, rank {RANK}, 4 rows at once; the claim is −70 %", flush=True)
    models.smollm()
    ratios: dict[str, list[float]] = {}
    for seed in SEEDS:
        told = []
        sides = {side: _in_a_process(side, seed) for side in ("LoRA", "full")}
        for name, parts in (
            ("weights, gradients, optimizer", ("weights", "gradients", "optimizer")),
            ("gradients, optimizer", ("gradients", "optimizer")),
            ("peak of the process above its libraries", ("peak",)),
        ):
            ours, theirs = (sum(sides[side][part] for part in parts) for side in ("LoRA", "full"))
            ratios.setdefault(name, []).append(ours / theirs)
            told.append(f"{name} {size(ours)} for {size(theirs)}, {change(ours, theirs)}")
        print(f"  seed {seed}: " + "; ".join(told), flush=True)
    for name, found in ratios.items():
        print(f"  median, {name}: {change(statistics.median(found), 1.0)}", flush=True)


def _in_a_process(side: str, seed: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.trainer.claims", side, str(seed)]
    done = subprocess.run(command, cwd=ROOT, env=environment(OMP_NUM_THREADS="2"), capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


# — steps ————————————————————————————————————————————————————————————————————————————————————————


def make_base(target: Path) -> Path:
    """A llama that has read docstrings of four packages."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(target, chat=False, begin=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    base = LlamaForCausalLM(config)
    texts = [text for found in paragraphs("asyncio", "logging", "email", "concurrent").values() for text in found]
    rows = token_rows(tokenizer, texts, TOKENS)
    read_through(base, (rows[torch.randint(len(rows), (16,))] for _ in range(250)), 2e-3)
    base.save_pretrained(target)
    return target


def course(side: str, base: Path, data: Path, rate: float, seed: int) -> list[tuple[int, float]]:
    """(step, validation loss), the base's first."""
    recipe = recipe_of(
        base,
        data,
        base.parent / "run",
        **{"lora_rank": RANK, "lora_dropout": 0.0, "schedule": "constant", "seed": seed, "learning_rate": rate},
        **{"train_batch_size": ROWS_A_STEP, "micro_batch_size": ROWS_A_STEP, "max_steps": STEPS},
    )
    trainer = trainer_of(side, base, recipe)
    rows = [Row(json.loads(line), str(number)) for number, line in enumerate(data.read_text().splitlines())]
    random.Random(seed).shuffle(rows)
    judged, learnt = rows[:48], rows[48:]
    prepared = [
        trainer.task.prepare(part, trainer.processor, (), max_length=TOKENS, model_limit=TOKENS) for part in (learnt, judged)
    ]
    taught, held_out = prepared

    def loss() -> float:
        return float(evaluate(trainer, held_out.examples, (), 48)[0]["loss"])

    found = [(0, loss())]
    for result in loop.steps(trainer, recipe, taught.examples, taught.wheres, first=0, total=STEPS, applied=0):
        if result.step % EVERY == 0:
            found.append((result.step, loss()))
    return found


def reached(points: Sequence[tuple[int, float]], target: float) -> int:
    """The first step with that loss or less."""
    return next(step for step, loss in points if loss <= target)


def steps() -> None:
    torch.set_num_threads(1)  # so small a model gains nothing by more
    print("steps: a llama of 0.4 M parameters; the claim is −30 to −50 % to equal validation loss", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        data = write_jsonl(Path(folder) / "rows.jsonl", [{"text": text} for text in paragraphs("unittest")["unittest"]])
        rates = {}
        for side, grid in GRID.items():
            tried = {rate: min(loss for _, loss in course(side, base, data, rate, TUNED_WITH)) for rate in grid}
            rates[side] = min(tried, key=lambda rate: tried[rate])
            told = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in tried.items())
            print(
                f"  {side}: learning rate {rates[side]:g} (lowest validation loss with seed {TUNED_WITH}: {told})", flush=True
            )
        ratios: dict[str, list[float]] = {}
        for seed in SEEDS:
            sides = {side: course(side, base, data, rates[side], seed) for side in GRID}
            best = {side: min(loss for _, loss in points) for side, points in sides.items()}
            begin, equal = sides["full"][0][1], max(best.values())
            told = []
            for name, target in (("all", equal), ("nine tenths", begin - 0.9 * (begin - equal))):
                ours, theirs = (reached(sides[side], target) for side in ("LoRA", "full"))
                ratios.setdefault(name, []).append(ours / theirs)
                told.append(f"{name} of the way, {target:.3f}: {ours} steps for {theirs}, {change(ours, theirs)}")
            lowest = ", ".join(f"{side} {loss:.3f}" for side, loss in best.items())
            print(f"  seed {seed}: from {begin:.3f}; {'; '.join(told)}; at best {lowest}", flush=True)
        for name, found in ratios.items():
            print(f"  median, {name} of the way: {change(statistics.median(found), 1.0)}", flush=True)


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(held(sys.argv[1], int(sys.argv[2]))))
        return
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    steps()
    memory()
    print(f"load average {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
