"""Whole runs: files, resuming bit for bit, what is refused, how it ends. Most in this process, on a tiny base."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from neartune import checkpoint, cli, loop
from neartune import run as run_module
from neartune.checkpoint import CheckpointError
from neartune.data import DataError
from neartune.recipe import as_yaml
from neartune.records import runs
from neartune.run import Left, RunError, Start, Stopped, decide, kept
from tests.trainer.bases import (
    FACTS,
    TRAINER,
    lines,
    losses,
    read_to,
    recipe_of,
    run_here,
    settings_of,
    started,
    train,
    write_jsonl,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", FACTS)


def same_adapter(one: Path, two: Path) -> bool:
    first, second = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, two))
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_the_files_of_a_run(llama: Path, data: Path, tmp_path: Path) -> None:
    result, said = run_here(llama, data, tmp_path / "run", max_steps=6, eval_every=2, prompts=["What is 1 and 1?"])
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        *("adapter", "best", "checkpoints", "metrics.jsonl", "recipe.yaml", "result.json", "run.json"),
        *("facts.json", "report.html"),
    }
    assert json.loads((run / "result.json").read_text()) == result
    assert (result["steps"], result["micro_batch"], result["world_size"]) == (6, 4, 1)
    assert result["stopped_because"] == "all 6 steps are done"
    assert result["metrics"]["loss"] < result["base_metrics"]["loss"]
    assert result["metrics"]["perplexity"] > 1
    steps = [line for line in lines(run) if "kind" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0].keys() == {*("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "micro_batch", "seconds")}
    assert [line["step"] for line in lines(run) if line.get("kind") == "eval"] == [0, 2, 4, 6]
    samples = [line["samples"][0] for line in lines(run) if line.get("kind") == "samples"]
    assert len(samples) == 3
    assert samples[0].keys() == {"prompt", "base", "adapter"}
    assert any("what is learnt in ⟦ ⟧" in line for line in said)
    assert cli.recipe.load(run / "recipe.yaml").recipe.max_steps == 6, "the resolved recipe is a recipe"
    assert {"adapter_config.json", "adapter_model.safetensors", "base.json", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in (run / "adapter").iterdir()
    }


def test_a_finished_run_is_refused(llama: Path, data: Path, tmp_path: Path) -> None:
    run_here(llama, data, tmp_path / "run", max_steps=1)
    with pytest.raises(RunError, match="this run is finished: choose another output_dir"):
        run_here(llama, data, tmp_path / "run", max_steps=2)


CHECKPOINTS = (Path("checkpoints/step-000004"), Path("checkpoints/step-000008"))


@pytest.mark.parametrize(
    ("names", "checkpoints", "start"),
    [
        ([], (), Start(None, 0, ("failed.json", "initial.safetensors"))),
        (["failed.json", "run.json", "metrics.jsonl"], (), Start(None, 0, ("failed.json", "initial.safetensors"))),
        (["failed.json", "run.json", "checkpoints"], CHECKPOINTS, Start(CHECKPOINTS[1], 8, ("failed.json",))),
    ],
)
def test_what_is_kept_of_an_earlier_attempt(names: list[str], checkpoints: tuple[Path, ...], start: Start) -> None:
    assert decide(Path("run"), Left(frozenset(names), checkpoints)) == start
    with pytest.raises(RunError, match="run: this run is finished"):
        decide(Path("run"), Left(frozenset([*names, "result.json"]), checkpoints))


def test_lines_are_kept_up_to_the_checkpoint_s_step() -> None:
    text = [b'{"kind": "eval", "step": 0}\n', b'{"step": 1}\n', b'{"kind": "eval", "step": 1}\n', b'{"step": 2}\n', b'{"st']
    assert [kept(b"".join(text), step) for step in (0, 1, 2, 3)] == [
        *(0, sum(map(len, text[:3])), sum(map(len, text[:4])), sum(map(len, text[:4])))
    ]
    assert kept(b'{"step": 1}\n{"step": 2}', 2) == 12, "the last is not whole"


class Killed(BaseException):
    """In place of kill -9: nothing of the run's own may catch it."""


@pytest.fixture
def die_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    steps = loop.steps

    def die(step: int) -> None:
        def some(*arguments: Any, **named: Any) -> Iterator[loop.StepResult]:
            for result in steps(*arguments, **named):
                yield result
                if result.step == step:
                    raise Killed

        monkeypatch.setattr(loop, "steps", some)

    yield die
    monkeypatch.setattr(loop, "steps", steps)


def test_other_prompts_on_resume_are_answered_by_the_base_too(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_after: Any
) -> None:
    settings: dict[str, Any] = {"max_steps": 60, "eval_every": 20, "learning_rate": 1e-2}
    prompts = ["What is 2 and 2?", "What is 1 and 1?"]
    run_here(llama, data, tmp_path / "straight", prompts=prompts, **settings)
    steps = loop.steps
    die_after(55)
    with pytest.raises(Killed):
        run_here(llama, data, tmp_path / "run", prompts=["What is 3 and 3?"], **settings)
    monkeypatch.setattr(loop, "steps", steps)
    run_here(llama, data, tmp_path / "run", prompts=prompts, **settings)
    straight, resumed = (
        [line["samples"] for line in lines(tmp_path / name) if line.get("kind") == "samples"][-1]
        for name in ("straight", "run")
    )
    assert resumed == straight
    assert any(side["base"] != side["adapter"] for side in resumed)


def test_what_pissa_began_with_is_not_that_of_a_run_that_never_got_to_a_checkpoint(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_after: Any
) -> None:
    steps = loop.steps
    die_after(1)
    with pytest.raises(Killed):
        run_here(llama, data, tmp_path / "run", lora_init="pissa", lora_rank=2, max_steps=60)
    monkeypatch.setattr(loop, "steps", steps)
    run_here(llama, data, tmp_path / "run", lora_init="pissa", lora_rank=4, max_steps=2)
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name} == {8}


STRAIGHT: dict[str, Any] = {"max_steps": 40, "lora_dropout": 0.2, "eval_every": 7, "schedule": "cosine"}


@pytest.mark.parametrize("step", [1, 17, 39])
def test_resuming_is_exact_to_the_bit(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_after: Any, step: int
) -> None:
    """Dropout, the schedule, epochs that end in the middle; and lines written after the last checkpoint."""
    straight, _ = run_here(llama, data, tmp_path / "straight", **STRAIGHT)
    steps = loop.steps
    die_after(step)
    with pytest.raises(Killed):
        run_here(llama, data, tmp_path / "run", **STRAIGHT)
    monkeypatch.setattr(loop, "steps", steps)
    died_with = len(lines(tmp_path / "run"))
    resumed, said = run_here(llama, data, tmp_path / "run", **STRAIGHT)
    assert any(line.startswith("continued from step") for line in said) is (step > 2)
    assert died_with > 1
    of_this_process = {"seconds": 0, "peak_bytes": 0}
    assert resumed | of_this_process == straight | of_this_process
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    kinds, expected = (
        [(line["step"], line.get("kind")) for line in lines(tmp_path / name) if line.get("kind") != "machine"]
        for name in ("run", "straight")
    )
    assert kinds == expected
    assert same_adapter(tmp_path / "run", tmp_path / "straight")


def test_lines_before_the_checkpoint_are_not_written_again(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_after: Any
) -> None:
    steps = loop.steps
    die_after(9)
    with pytest.raises(Killed):
        run_here(llama, data, tmp_path / "run", **STRAIGHT)
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = metrics.read_bytes()
    with metrics.open("ab") as file:
        file.write(b'{"step": 10, "lo')  # torn
    monkeypatch.setattr(loop, "steps", steps)
    run_here(llama, data, tmp_path / "run", **STRAIGHT)
    kept = b"".join(line for line in before.splitlines(keepends=True) if json.loads(line)["step"] <= 8)
    assert metrics.read_bytes().startswith(kept)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"learning_rate": 2e-2}, "learning_rate: was 0.01, is 0.02"),
        ({"lora_rank": 8}, "lora_rank: was 4, is 8"),
        ({"micro_batch_size": 2}, "micro_batch_size: was 4, is 2"),
        ({"seed": 1}, "seed: was 42, is 1"),
        ({"data": [*FACTS[:-1], {"prompt": "x", "completion": "y"}]}, "data.sha256: was"),
        ({"base": True}, "base.fingerprint: was"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_recipe_base_or_data_is_refused_naming_the_difference(
    llama: Path, data: Path, tmp_path: Path, die_after: Any, changed: dict[str, Any], difference: str
) -> None:
    import shutil

    base = shutil.copytree(llama, tmp_path / "base")
    die_after(3)
    with pytest.raises(Killed):
        run_here(base, data, tmp_path / "run", max_steps=20)
    if "data" in changed:
        write_jsonl(data, changed.pop("data"))
    if changed.pop("base", False):
        (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    with pytest.raises(RunError) as caught:
        run_here(base, data, tmp_path / "run", **{"max_steps": 20} | changed)
    assert "was begun otherwise" in str(caught.value)
    assert difference in str(caught.value)


def test_these_may_change(llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_after: Any) -> None:
    steps = loop.steps
    die_after(3)
    with pytest.raises(Killed):
        run_here(llama, data, tmp_path / "run", max_steps=20)
    monkeypatch.setattr(loop, "steps", steps)
    result, _ = run_here(
        llama, data, tmp_path / "run", max_steps=5, eval_every=1, early_stopping_patience=9, mirror="http://other"
    )
    assert result["steps"] == 5


def test_early_stopping_keeps_the_best(llama: Path, data: Path, tmp_path: Path) -> None:
    result, _ = run_here(
        llama,
        data,
        tmp_path / "run",
        max_steps=60,
        learning_rate=0.9,
        schedule="constant",
        eval_every=1,
        early_stopping_patience=3,
    )
    assert result["stopped_because"] == "no progress in 3 evaluations"
    assert result["steps"] == result["best_step"] + 3 < 60
    evaluations = {line["step"]: line["loss"] for line in lines(tmp_path / "run") if line.get("kind") == "eval"}
    del evaluations[0]
    assert result["metrics"]["loss"] == min(evaluations.values()) == evaluations[result["best_step"]]
    best = checkpoint.saved(tmp_path / "run" / "best")
    assert [path.name for path in best] == [f"step-{result['best_step']:06d}"]


def test_min_delta_is_what_counts_as_progress(llama: Path, data: Path, tmp_path: Path) -> None:
    result, _ = run_here(
        llama, data, tmp_path / "run", max_steps=30, eval_every=1, early_stopping_patience=2, early_stopping_min_delta=100.0
    )
    assert (result["best_step"], result["steps"]) == (1, 3)


def test_the_measured_micro_batch_is_in_the_checkpoint_and_not_measured_again(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_after: Any
) -> None:
    steps = loop.steps
    die_after(2)
    with pytest.raises(Killed):
        run_here(llama, data, tmp_path / "run", max_steps=4, micro_batch_size="auto")
    monkeypatch.setattr(loop, "steps", steps)
    monkeypatch.setattr("neartune.batch.find", None)
    result, said = run_here(llama, data, tmp_path / "run", max_steps=4, micro_batch_size="auto")
    assert result["micro_batch"] in (1, 2, 4)
    assert not any(line.startswith("micro-batch") for line in said)


def test_measuring_changes_nothing(llama: Path, data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train_batch_size": 4, "lora_dropout": 0.2}
    measured, _ = run_here(llama, data, tmp_path / "measured", micro_batch_size="auto", **options)
    run_here(llama, data, tmp_path / "given", micro_batch_size=measured["micro_batch"], **options)
    assert losses(tmp_path / "measured") == losses(tmp_path / "given")


def test_no_room_for_one_row(llama: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(loop.OutOfMemory, match=r"one row of \d+ tokens does not fit in 1 MB"):
        run_here(llama, data, tmp_path / "run", micro_batch_size="auto", memory_limit="1MB")


def test_a_run_without_room_for_one_row_is_listed_as_failed(llama: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(loop.OutOfMemory):
        run_here(llama, data, tmp_path / "run", micro_batch_size="auto", memory_limit="1MB")
    failed = runs.read(tmp_path / "run", "run")
    assert failed.state == "failed"
    assert failed.why.endswith("does not fit in 1 MB")


def test_a_run_that_goes_on_and_fails_before_its_next_step_says_why_and_one_that_is_refused_does_not(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_after: Any
) -> None:
    steps = loop.steps
    die_after(3)
    with pytest.raises(Killed):
        run_here(llama, data, tmp_path / "run", max_steps=20)
    monkeypatch.setattr(loop, "steps", steps)
    with pytest.raises(RunError, match="was begun otherwise"):
        run_here(llama, data, tmp_path / "run", max_steps=20, seed=1)
    assert runs.read(tmp_path / "run", "run").state == "unfinished"
    rows = data.read_text()
    data.write_text("{,}\n")
    with pytest.raises(DataError):
        run_here(llama, data, tmp_path / "run", max_steps=20)
    failed = runs.read(tmp_path / "run", "run")
    assert (failed.state, failed.step) == ("failed", 3)
    assert "data.jsonl:1: this is no JSON" in failed.why
    data.write_text(rows)
    run_here(llama, data, tmp_path / "run", max_steps=4)
    assert not (tmp_path / "run" / "failed.json").exists()


def test_a_run_that_never_began_leaves_nothing(llama: Path, data: Path, tmp_path: Path) -> None:
    data.write_text("{,}\n")
    with pytest.raises(DataError):
        run_here(llama, data, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_what_is_no_finite_number_is_null_and_every_reader_lives_with_it(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 skips step 2, and the evaluation after it is none."""
    steps, judge, evaluations = loop.steps, run_module.evaluate, []

    def skipping(*arguments: Any, **named: Any) -> Iterator[loop.StepResult]:
        for result in steps(*arguments, **named):
            yield replace(result, grad_norm=None, was_skipped=True) if result.step == 2 else result

    def lost(*arguments: Any) -> Any:
        metrics, micro = judge(*arguments)
        evaluations.append(metrics)
        return (metrics | {"loss": math.nan, "perplexity": math.inf} if len(evaluations) == 3 else metrics), micro

    monkeypatch.setattr(loop, "steps", skipping)
    monkeypatch.setattr(run_module, "evaluate", lost)
    result, _ = run_here(llama, data, tmp_path / "run", max_steps=3, eval_every=1)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    strict = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) for line in text.splitlines()]
    first, second, third = [line for line in strict if "kind" not in line]
    assert (second["grad_norm"], second["skipped"]) == (None, True)
    assert first["grad_norm"] > 0 and third["grad_norm"] > 0
    assert not {"skipped"} & (first.keys() | third.keys())
    assert [line["loss"] for line in strict if line.get("kind") == "eval"][2] is None
    run = runs.read(tmp_path / "run", "run")
    assert (run.state, run.why) == ("finished", "")
    assert runs._best(run.lines)["loss"] == result["metrics"]["loss"]
    assert "Gradient norm" in (tmp_path / "run" / "report.html").read_text()


def test_the_mirror_s_password_is_in_no_file_of_a_run(llama: Path, data: Path, tmp_path: Path) -> None:
    url = "http://reader:geheim@mirror:8090/hub"
    _, said = run_here(llama, data, tmp_path / "run", max_steps=1, mirror=url)
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file() and b"geheim" in file.read_bytes()]
    assert not [line for line in said if "geheim" in line]
    assert 'mirror: "http://mirror:8090/hub"\n' in (tmp_path / "run" / "recipe.yaml").read_text()
    made = recipe_of(llama, data, tmp_path / "run", mirror=url)
    assert made.mirror == url, "what is asked of it is asked as that user"
    assert "geheim" not in as_yaml(made)


def test_a_full_disk_leaves_the_checkpoints_that_were_there(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = checkpoint.shutil.disk_usage
    asked: list[Path] = []

    def full(path: Path) -> Any:
        asked.append(path)
        return usage(path)._replace(free=0 if len(asked) > 3 else 10**12)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", full)
    with pytest.raises(CheckpointError, match="are needed for a checkpoint and 0 MB are free"):
        run_here(llama, data, tmp_path / "run", max_steps=8, eval_every=100)
    assert [path.name for path in checkpoint.saved(tmp_path / "run" / "checkpoints")] == ["step-000002", "step-000003"]


def test_a_checkpoint_that_is_not_whole_is_none(tmp_path: Path) -> None:
    (tmp_path / "step-000001").mkdir()
    (tmp_path / ".step-000002.tmp").mkdir()
    assert checkpoint.saved(tmp_path) == []


def test_a_stop_between_steps(llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = loop.steps

    def interrupted(*arguments: Any, **named: Any) -> Iterator[loop.StepResult]:
        for result in steps(*arguments, **named):
            if result.step == 13:
                os.kill(os.getpid(), signal.SIGINT)
            yield result

    monkeypatch.setattr(loop, "steps", interrupted)
    with pytest.raises(Stopped) as caught:
        run_here(llama, data, tmp_path / "run", **STRAIGHT)
    assert caught.value.status == 130
    assert [path.name for path in checkpoint.saved(tmp_path / "run" / "checkpoints")][-1] == "step-000013"


def test_killed_by_the_system_and_stopped_by_sigterm_then_the_same_command(llama: Path, data: Path, tmp_path: Path) -> None:
    """In processes: kill -9, then SIGTERM (exit status 143), then to the end; losses as in one go."""
    more = ["lora_dropout=0.2", "max_steps=60", "eval_every=20"]
    straight = train(*settings_of(tmp_path / "straight", llama, data, more))
    assert straight.returncode == 0, straight.stderr
    arguments = settings_of(tmp_path / "run", llama, data, more)
    for number, status, last in ((signal.SIGKILL, -9, "step 20/60"), (signal.SIGTERM, 143, "step 40/60")):
        process = started(*arguments)
        before = read_to(process, last)
        process.send_signal(number)
        after, _ = process.communicate()
        assert process.returncode == status, before + after
    done = train(*arguments)
    assert done.returncode == 0, done.stderr
    assert "continued from step" in done.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert same_adapter(tmp_path / "run", tmp_path / "straight")


def test_two_processes_learn_as_one(llama: Path, data: Path, tmp_path: Path) -> None:
    more = ["lora_dropout=0", "max_steps=20", "eval_every=10", "precision=fp32", "micro_batch_size=2"]
    done = train(*settings_of(tmp_path / "two", llama, data, more), "processes=2")
    assert done.returncode == 0, done.stderr
    one, _ = run_here(
        llama, data, tmp_path / "one", lora_dropout=0, max_steps=20, eval_every=10, precision="fp32", micro_batch_size=2
    )
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert len(losses(tmp_path / "two")) == 20
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-4)
    assert done.stdout.count("all 20 steps are done") == 1


def test_several_processes_keep_the_exit_status(llama: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n{,}\n")
    done = train(*settings_of(tmp_path / "run", llama, bad), "processes=2")
    assert done.returncode == 4
    assert "bad.jsonl:2: this is no JSON" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["lora_targets=q_prj"], 2, "did you mean q_proj"),
        (["precision=fp16"], 2, "precision: fp16 needs CUDA"),
        (["load_in_4bit=true"], 2, "load_in_4bit needs CUDA"),
        (["task=text-classification"], 4, "the columns are completion, prompt"),
        (["micro_batch_size=auto", "memory_limit=1MB"], 5, "does not fit"),
        (["new_tokens=['<|im_end|>']"], 2, "new_tokens: the base has <|im_end|> already"),
    ],
)
def test_exit_statuses(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert cli.main([*settings_of(tmp_path / "run", llama, data), *arguments], verb="train") == status
    assert message in capsys.readouterr().err


def test_tags_of_words(llama: Path, tmp_path: Path) -> None:
    data = TRAINER / "configs" / "names.jsonl"
    result, said = run_here(llama, data, tmp_path / "run", task="token-classification", max_steps=30, lora_rank=16)
    assert "train: format: tokens → tags, 3 tags: 5" in said
    assert result["metrics"]["labels"] == ["LOC", "O", "PER"]
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] / 2


def test_use_mirror_before_a_setting_is_no_url(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = settings_of(tmp_path / "run", llama, data)
    assert cli.main([*arguments[:2], "--use_mirror", *arguments[2:], "max_steps=1"], verb="train") == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 1
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--use_miror"], verb="train")
    assert "unrecognized arguments: --use_miror" in capsys.readouterr().err
