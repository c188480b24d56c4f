"""A step: what it sums, what it divides by, what happens when memory runs out in the middle of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neartune import loop, model, tasks
from neartune.data import Row
from neartune.loop import NotFinite, OutOfMemory, Trainer, rate_at
from tests.trainer.bases import FACTS, recipe_of, write_jsonl

UNEQUAL = [{"prompt": "Say it", "completion": "ab " * n} for n in (1, 30, 2, 25, 1, 1, 17, 3)]


@pytest.fixture
def make(llama: Path, tmp_path: Path) -> Callable[..., tuple[Trainer, Any, Any]]:
    """(trainer, recipe, examples) with the same adapter each time; its B matrices are not zero."""

    def made(rows: list[dict[str, str]] = UNEQUAL, *, micro: int = 8, **settings: Any) -> tuple[Trainer, Any, Any]:
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        recipe = recipe_of(llama, data, tmp_path, **{"train_batch_size": len(rows), "micro_batch_size": micro} | settings)
        task = tasks.find(recipe.task)
        tokenizer = task.load_processor(llama)
        torch.manual_seed(0)
        precision = model.choose_precision("fp32", is_cuda=False, has_bf16=False)
        adapted = model.build(recipe, task, llama, (), precision, lambda line: None).train()
        for name, parameter in model.learning(adapted):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        prepared = task.prepare(
            [Row(row, f"r:{n}") for n, row in enumerate(rows)], tokenizer, (), max_length=None, model_limit=128
        )
        optimizer = loop.make_optimizer(adapted, recipe)
        return Trainer(task, adapted, optimizer, tokenizer, precision, torch.device("cpu"), micro), recipe, prepared

    return made


def gradients(trainer: Trainer, recipe: Any, prepared: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the first step, before it is applied."""
    taken: dict[str, torch.Tensor] = {}
    apply = trainer.optimizer.step

    def spy(*arguments: Any, **named: Any) -> Any:
        taken.update({name: p.grad.clone() for name, p in model.learning(trainer.model) if p.grad is not None})
        return apply(*arguments, **named)

    trainer.optimizer.step = spy  # type: ignore[method-assign]
    result = next(loop.steps(trainer, recipe, prepared.examples, prepared.wheres, first=0, total=4, applied=0))
    return result.loss, taken


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).norm() / one[name].norm()) for name in one)


@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_any_cut_gives_the_gradients_of_the_whole_batch(make: Callable[..., Any], micro: int) -> None:
    options = {"lora_dropout": 0, "max_grad_norm": 1e9}
    whole_loss, whole = gradients(*make(micro=8, **options))
    loss, cut = gradients(*make(micro=micro, **options))
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert difference(whole, cut) < 2e-6


def test_each_learnt_token_weighs_the_same_however_rows_are_cut(make: Callable[..., Any]) -> None:
    trainer, recipe, prepared = make(micro=1, lora_dropout=0, max_grad_norm=1e9)
    tokens = sum(sum(label != tasks.IGNORED for label in example["labels"][1:]) for example in prepared.examples)
    expected = sum(float(trainer.loss_of([example])[0].detach()) for example in prepared.examples) / tokens
    mean_of_means = sum(
        float(trainer.loss_of([example])[0].detach()) / trainer.task.weight(example) for example in prepared.examples
    ) / len(prepared.examples)
    loss, _ = gradients(trainer, recipe, prepared)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert abs(mean_of_means - expected) > 1e-4, "the rows are too alike for this test to tell"


def run(trainer: Trainer, recipe: Any, prepared: Any, total: int = 4) -> list[loop.StepResult]:
    return list(loop.steps(trainer, recipe, prepared.examples, prepared.wheres, first=0, total=total, applied=0))


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.learning(trainer.model)}


def failing(trainer: Trainer, times: int, error: Exception, *, at: int = 2) -> list[int]:
    """The task's forward fails on call `at` and the calls after it; the sizes it was called with."""
    sizes: list[int] = []
    forward = trainer.task.forward

    def broken(adapted: Any, batch: Any) -> Any:
        sizes.append(len(batch["input_ids"]))
        if at <= len(sizes) < at + times:
            raise error
        return forward(adapted, batch)

    object.__setattr__(trainer.task, "forward", broken)
    return sizes


@pytest.fixture(autouse=True)
def _forward_as_it_was() -> Any:
    from neartune.tasks.generation import TASK

    before = TASK.forward
    yield
    object.__setattr__(TASK, "forward", before)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_micro_batch_and_does_the_same_rows_again(make: Callable[..., Any], error: Exception) -> None:
    undisturbed = make(micro=2, lora_dropout=0.3)
    expected = run(*undisturbed)
    trainer, recipe, prepared = make(micro=4, lora_dropout=0.3)
    sizes = failing(trainer, 1, error)
    got = run(trainer, recipe, prepared)
    assert sizes[:6] == [4, 4, 2, 2, 2, 2]
    assert [result.micro_batch for result in got] == [2, 2, 2, 2]
    assert [result.loss for result in got] == [result.loss for result in expected]
    assert all(torch.equal(value, state(undisturbed[0])[name]) for name, value in state(trainer).items())


def test_out_of_memory_for_good(make: Callable[..., Any]) -> None:
    trainer, recipe, prepared = make(micro=4)
    sizes = failing(trainer, 99, torch.OutOfMemoryError("x"), at=1)
    with pytest.raises(OutOfMemory, match="not even one row"):
        run(trainer, recipe, prepared)
    assert sizes == [4, 2, 1]


def test_other_errors_are_not_taken_for_it(make: Callable[..., Any]) -> None:
    trainer, recipe, prepared = make(micro=4)
    failing(trainer, 1, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run(trainer, recipe, prepared)


def test_a_loss_that_is_no_number_stops_with_its_rows(make: Callable[..., Any]) -> None:
    trainer, recipe, prepared = make(FACTS[:8], train_batch_size=2, micro=2)
    with torch.no_grad():
        model.learning(trainer.model)[0][1].fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"the loss of step 1 is no finite number; its rows: r:\d, r:\d\."):
        run(trainer, recipe, prepared)


def test_the_same_steps_whatever_was_drawn_before(make: Callable[..., Any]) -> None:
    first = run(*make(lora_dropout=0.3))
    trainer = make(lora_dropout=0.3)
    torch.rand(100)
    assert [result.loss for result in run(*trainer)] == [result.loss for result in first]
    assert [result.loss for result in run(*make(lora_dropout=0.0))] != [result.loss for result in first]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant", "warmup": 0}, [1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "warmup": 0}, [1.0, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup": 2}, [0.5, 1.0, 1.0, 0.5]),
        ({"schedule": "linear", "warmup": 0.5}, [0.5, 1.0, 1.0, 0.5]),
        ({"schedule": "cosine", "warmup": 0}, [1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rates(llama: Path, tmp_path: Path, settings: dict[str, Any], expected: list[float]) -> None:
    recipe = recipe_of(llama, write_jsonl(tmp_path / "r.jsonl", FACTS), tmp_path, learning_rate=1.0, **settings)
    assert [rate_at(step, 4, recipe) for step in range(4)] == pytest.approx(expected, abs=1e-6)


def test_lora_plus_lets_b_learn_faster(make: Callable[..., Any]) -> None:
    trainer, recipe, prepared = make(loraplus_ratio=16)
    run(trainer, recipe, prepared, total=1)
    slow, fast = trainer.optimizer.param_groups
    assert fast["lr"] == pytest.approx(16 * slow["lr"])
    names = {id(parameter): name for name, parameter in model.learning(trainer.model)}
    assert all("lora_B" in names[id(parameter)] for parameter in fast["params"])
    assert len(fast["params"]) == len(slow["params"]) > 0


class Scaler:
    """Stands in for CUDA's GradScaler: the first step overflows. Not run on a GPU."""

    def __init__(self) -> None:
        self.scales = [4.0, 2.0, 2.0, 2.0]
        self.steps = 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.scales[0]

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= self.scales[0]

    def get_scale(self) -> float:
        return self.scales[0]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        if self.steps > 1:
            optimizer.step()

    def update(self) -> None:
        self.scales.pop(0)


def test_a_step_that_fp16_skips_moves_no_schedule(make: Callable[..., Any]) -> None:
    trainer, recipe, prepared = make(schedule="linear", warmup=0, learning_rate=0.1)
    trainer.scaler = Scaler()  # type: ignore[assignment]
    got = run(trainer, recipe, prepared, total=3)
    assert [result.was_skipped for result in got] == [True, False, False]
    assert [result.learning_rate for result in got] == pytest.approx([0.1, 0.1, 0.1 * 2 / 3])


def test_a_step_that_fp16_skips_has_no_norm(make: Callable[..., Any]) -> None:
    class Overflowing(Scaler):
        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            super().unscale_(optimizer)
            if not self.steps:
                optimizer.param_groups[0]["params"][0].grad[0, 0] = float("inf")

    trainer, recipe, prepared = make()
    trainer.scaler = Overflowing()  # type: ignore[assignment]
    first, second = run(trainer, recipe, prepared, total=2)
    assert (first.grad_norm, first.was_skipped) == (None, True)
    assert second.grad_norm is not None and second.grad_norm > 0


def test_an_adapter_that_is_not_in_the_way_is_an_error(make: Callable[..., Any]) -> None:
    trainer, recipe, prepared = make()
    run(trainer, recipe, prepared, total=1)
    model.refuse_dead(trainer.model)
    trainer.model.disable_adapter_layers()
    trainer.optimizer.zero_grad(set_to_none=True)
    with pytest.raises(model.ModelError, match="got no gradient in the first step"):
        model.refuse_dead(trainer.model)
