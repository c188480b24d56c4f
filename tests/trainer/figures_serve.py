"""`python -m tests.trainer.figures_serve`: what it costs to load an adapter and to switch, on SmolLM2-135M in this process. For
a quiet machine; each figure is a median, beside that of one token, which tells how quiet it was."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from neartune import adapter, decode, model, tasks
from neartune.adapter import Card
from neartune.decode import Options
from neartune.hub import Snapshot
from neartune.serving import pool
from neartune.serving.catalog import Served
from tests.demo import models
from tests.trainer.bases import recipe_of, write_jsonl

SETTINGS: tuple[dict[str, Any], ...] = (
    {"lora_rank": 16},
    {"lora_rank": 16},
    {"lora_rank": 8},
    {"lora_rank": 16, "lora_targets": ["q_proj", "v_proj"]},
    {"lora_rank": 16, "dora": True},
)
"""The first three share peft's modules; the first two are of one rank."""


def made(folder: Path) -> list[Served]:
    """Adapters, on all linear modules where nothing else is said, with random numbers in them."""
    base = models.smollm().directory
    task = tasks.find("text-generation")
    card = Card.of(Snapshot(base), model.base_files(base), task.name, ())
    data = write_jsonl(folder / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 8)
    found = []
    for number, settings in enumerate(SETTINGS):
        plain = task.load_model(base, (), dtype=torch.float32)
        adapted = model.adapt(plain, recipe_of(base, data, folder, **settings), (), lambda line: None)
        torch.manual_seed(number)
        with torch.no_grad():
            for _, parameter in model.learning(adapted):
                parameter.copy_(torch.randn_like(parameter) / 100)
        target = folder / f"adapter{number}"
        adapter.save(adapted, card, base, task.load_processor(base), target, None)
        found.append(Served(target.name, card, target))
    return found


def milliseconds(work: Callable[[], Any], times: int = 1) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)


def figures(folder: Path) -> dict[str, float]:
    """In milliseconds."""
    served = made(folder)
    base_path = models.smollm().directory
    precision = model.choose_precision("fp32", is_cuda=False, has_bf16=False)
    found: dict[str, float] = {}
    bases: list[pool.Base] = []

    def open_base() -> None:
        bases.append(pool.open_base(served[0], base_path, torch.device("cpu"), precision, lambda line: None))

    found["base: checked and loaded"] = milliseconds(open_base)
    base = bases[0]
    ready: list[pool.Fitted] = []

    def load(one: Served) -> None:
        ready.append(pool.put(base, pool.read_adapter(one, base.processors)))

    found["adapter: the first of its base"] = milliseconds(lambda: load(served[0]))
    found["adapter: the first of another rank"] = milliseconds(lambda: load(served[2]))
    found["adapter: the first of other targets"] = milliseconds(lambda: load(served[3]))
    found["adapter: the first with DoRA"] = milliseconds(lambda: load(served[4]))
    found["adapter: of a shape and rank that are there"] = milliseconds(lambda: load(served[1]), 9)
    first, ranked, narrow, _, second = ready[:5]
    for what, other in (("same rank", second), ("another rank", ranked), ("other targets", narrow)):
        turns = itertools.cycle((first, other))
        found[f"switch: {what}"] = milliseconds(lambda turns=turns: pool.switch(base, next(turns)), 51)
    bare = itertools.cycle((None, first))
    found["switch: to the base by itself and back"] = milliseconds(lambda: pool.switch(base, next(bare)), 51)
    ids = decode.text_ids(base.processor, "The capital of France is")
    answer = decode.tokens(base.model, ids, Options(40, frozenset()))
    next(answer)
    found["one token"] = milliseconds(lambda: next(answer), 15)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for what, taken in figures(Path(folder)).items():
            print(f"{what}: {taken:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
