"""`neartune eval RUN --against`: both on the same rows, in a unit that is fair to both."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neartune import cli, data, model
from neartune.data import DataError
from neartune.records import judge, runs
from neartune.records.judge import Score, weigh
from neartune.records.runs import RunsError
from tests.trainer.bases import FACTS, run_here, write_jsonl

URL = "http://127.0.0.1:9"


def judged(home: Path, name: str, other: str | None = None, rows_of: Path | None = None) -> tuple[judge.Judgement, list[str]]:
    """(judgement, what was said)."""
    said: list[str] = []
    one, two = (runs.read(home / it, it) if it else None for it in (name, other))
    assert one is not None
    return judge.judge(one, two, rows_of, None, URL, said.append), said


@pytest.fixture(scope="module")
def home(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good` learnt, `bad` was spoilt by a learning rate; the same rows held out of both; `all` learnt them too."""
    home = tmp_path_factory.mktemp("home")
    rows, held = write_jsonl(home / "rows.jsonl", FACTS[10:]), write_jsonl(home / "held.jsonl", FACTS[:10])
    every = write_jsonl(home / "every.jsonl", FACTS)
    settings = {"max_steps": 20, "eval_every": 20, "validation_data": str(held)}
    run_here(llama, rows, home / "good", **settings)
    run_here(llama, rows, home / "bad", **settings | {"learning_rate": 0.5, "schedule": "constant"})
    run_here(llama, every, home / "all", **settings)
    return home


def test_a_run_that_learnt_is_better_than_its_base_by_the_figures_of_its_result(home: Path) -> None:
    found, _ = judged(home, "good")
    result = json.loads((home / "good" / "result.json").read_text())
    loss = found.measures["loss"]
    assert (found.verdict, found.unit, loss.rows, found.left_out) == ("better", "learnt token", 10, {})
    assert loss.first == pytest.approx(result["metrics"]["loss"], rel=1e-5)
    assert loss.second == pytest.approx(result["base_metrics"]["loss"], rel=1e-5)
    assert loss.low <= loss.difference <= loss.high < 0


def test_a_spoilt_run_is_worse_and_a_run_cannot_be_told_from_itself(home: Path) -> None:
    shutil.copytree(home / "good", home / "twin", dirs_exist_ok=True)
    assert judged(home, "bad", "good")[0].verdict == "worse"
    found, _ = judged(home, "good", "twin")
    assert (found.verdict, found.measures["loss"].difference) == ("cannot tell", 0.0)


def test_rows_that_stand_in_the_other_s_training_data_are_told(home: Path) -> None:
    found, _ = judged(home, "good", "all")
    assert found.seen == {"good": 0, "all": 10}
    assert "  warning: 10 of these rows stand in the training data of all: this flatters it" in judge.told(found)


def test_a_file_of_one_s_own(home: Path) -> None:
    found, _ = judged(home, "good", None, home / "rows.jsonl")
    assert (found.measures["loss"].rows, found.seen) == (14, {"good": 14})
    with pytest.raises(DataError, match=r"none.jsonl: there is no such file"):
        judged(home, "good", None, home / "none.jsonl")


def test_held_out_rows_that_changed_are_not_judged_by(home: Path, tmp_path: Path) -> None:
    """What is held out of other rows may have been learnt."""
    for name in ("good", "held.jsonl", "rows.jsonl"):
        (shutil.copytree if (home / name).is_dir() else shutil.copy)(home / name, tmp_path / name)
    recipe = tmp_path / "good" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(home), str(tmp_path)))
    assert judged(tmp_path, "good")[0].verdict == "better"
    write_jsonl(tmp_path / "rows.jsonl", FACTS[11:])
    with pytest.raises(DataError, match=r"the rows of good were changed after it.*--data FILE"):
        judged(tmp_path, "good")
    found, said = judged(tmp_path, "good", None, home / "held.jsonl")
    assert (found.seen, found.verdict) == ({"good": None}, "better")
    assert any("whether good has seen these rows in training cannot be told" in line for line in said)


def test_tokenizers_that_cut_finer_gain_nothing_by_it() -> None:
    """Two models to which all of 512 tokens are equally likely, so that a token costs both the same; one cuts twice as fine."""
    coarse = [Score(n * math.log(512), n, (1,) * n, "x" * 4 * n, None) for n in range(3, 13)]
    fine = [Score(2 * n * math.log(512), 2 * n, (2,) * 2 * n, "x" * 4 * n, None) for n in range(3, 13)]
    found = weigh(("coarse", "fine"), coarse, fine, {})
    assert (found.unit, found.verdict) == ("byte of text", "better")
    assert found.measures["loss"].first == pytest.approx(math.log(512) / 4)
    assert found.measures["loss"].second == pytest.approx(math.log(512) / 2)


def test_bytes_not_characters_and_only_rows_that_both_learn() -> None:
    def score(text: str, loss: float, learnt: int) -> Score:
        return Score(loss, 3, (learnt,), text, None)

    first = [
        score("ü", 2.0, 1),
        score("a b ", 4.0, 1),
        "it is longer than a base takes",
        score("x", 1.0, 1),
        score(" ", 1.0, 1),
    ]
    second = [score("ü", 4.0, 2), score("a  b", 8.0, 2), score("y", 1.0, 2), score("z", 1.0, 2), score("", 1.0, 2)]
    found = weigh(("a", "b"), first, second, {})
    assert found.measures["loss"].first == pytest.approx(6.0 / 5), "2 bytes and 3"
    assert found.left_out == {
        "it is longer than a base takes": 1,
        "the two do not learn the same of it": 1,
        "there is no text to learn in it": 1,
    }
    assert found.verdict == "cannot tell"
    assert "  2 rows are too few for a verdict: at least 6" in judge.told(found)
    with pytest.raises(DataError, match="no row is left to compare: why: 1"):
        weigh(("a", "b"), ["why"], ["why not"], {})


def test_bases_with_other_tokenizers_are_compared_by_bytes(home: Path, opt: Path, tmp_path: Path) -> None:
    """The chat model of this home against one without a chat template, whose tokens are single bytes."""
    other = shutil.copytree(opt, tmp_path / "opt")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    run_here(other, home / "rows.jsonl", tmp_path / "opt-run", max_steps=1, validation_data=str(home / "held.jsonl"))
    shutil.copytree(home / "good", tmp_path / "good")
    found, _ = judged(tmp_path, "good", "opt-run")
    assert (found.unit, found.measures["loss"].rows) == ("byte of text", 10)
    texts = [row["completion"] for row in FACTS[:10]]
    side = judge._side(runs.read(tmp_path / "good", "good"))
    rows = data.read(home / "held.jsonl")[0]
    fp32 = model.choose_precision("fp32", is_cuda=False, has_bf16=False)
    scores = list(judge.row_scores(side, rows, Path(side.card.path), fp32, torch.device("cpu"), 0, lambda line: None))
    total = sum(score.loss for score in scores if isinstance(score, Score))
    assert [score.text.strip() for score in scores if isinstance(score, Score)] == texts
    assert found.measures["loss"].first == pytest.approx(total / sum(len(text.encode()) for text in texts))


def test_classes_are_compared_by_loss_and_accuracy(llama: Path, tmp_path: Path) -> None:
    words = {"yes": ["good", "fine", "true"], "no": ["bad", "wrong", "false"]}
    rows = [{"text": f"{word} {n}", "label": label} for label, some in words.items() for word in some for n in range(6)]
    rows_file = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"task": "text-classification", "validation_split": 0.4, "max_steps": 40, "eval_every": 40}
    result, _ = run_here(llama, rows_file, tmp_path / "run", **settings)
    found, _ = judged(tmp_path, "run")
    assert found.unit == "thing told apart"
    accuracy = found.measures["accuracy"]
    assert accuracy.first == result["metrics"]["accuracy"]
    assert found.measures["loss"].first == pytest.approx(result["metrics"]["loss"], rel=1e-5)
    extra = write_jsonl(tmp_path / "extra.jsonl", [*rows[:8], {"text": "maybe", "label": "unknown"}])
    found, _ = judged(tmp_path, "run", None, extra)
    assert found.left_out == {"there is nothing to learn in it, or no such class in training": 1}


def test_runs_of_two_tasks_do_not_compare(home: Path, tmp_path: Path) -> None:
    other = shutil.copytree(home / "good", tmp_path / "other")
    card = json.loads((other / "adapter" / "base.json").read_text())
    (other / "adapter" / "base.json").write_text(json.dumps(card | {"task": "text-classification"}))
    shutil.copytree(home / "good", tmp_path / "good")
    with pytest.raises(RunsError, match="good is for text-generation, other for text-classification: they do not compare"):
        judged(tmp_path, "good", "other")


def test_the_command_prints_the_verdict_with_its_numbers(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "good", "--against", "base", "--in", str(home), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["sides"]) == ("better", ["good", "base"])
    assert found["measures"]["loss"]["rows"] == 10
    assert cli.main(["eval", "bad", "--against", "good", "--in", str(home)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "bad against good, 10 rows judged by both"
    assert "95 % interval" in out[1]
    assert out[-1] == "verdict: worse"
    assert cli.main(["eval", "gone", "--against", "base", "--in", str(home)]) == 2


def test_a_run_whose_losses_are_no_numbers_is_not_judged_and_its_rows_are_named(home: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(home / "good", tmp_path / "broken")
    weights = load_file(broken / "adapter" / "adapter_model.safetensors")
    save_file({name: tensor * math.nan for name, tensor in weights.items()}, broken / "adapter" / "adapter_model.safetensors")
    with pytest.raises(RunsError, match=r"the loss of broken is no finite number on 10 of 10 rows \(held\.jsonl:1, .* …\)"):
        judged(tmp_path, "broken")
    rows = [data.Row({}, f"a.jsonl:{n}") for n in (1, 2, 3)]
    scores = [Score(math.inf, 1, (), "", 1), "it is longer than a base takes", Score(1.0, 1, (), "", 1)]
    with pytest.raises(RunsError, match=r"the loss of a is no finite number on 1 of 3 rows \(a\.jsonl:1\)"):
        judge._refuse_broken("a", rows, scores)


def test_a_row_of_a_mixed_set_is_read_like_the_others(home: Path, tmp_path: Path) -> None:
    """All rows have prompt and completion, which is how the set is learnt; one has messages too."""
    other = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "something else that is longer than the rest"}]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [FACTS[0] | {"messages": other}, *FACTS[1:10]])
    plain = write_jsonl(tmp_path / "plain.jsonl", FACTS[:10])
    found, expected = (judged(home, "good", None, file)[0].measures["loss"] for file in (mixed, plain))
    assert found == expected


def test_two_runs_of_one_name_are_warned_of_apart(home: Path, tmp_path: Path) -> None:
    for name, run in (("one", "good"), ("two", "all")):
        shutil.copytree(home / run, tmp_path / name / "run")
    first, second = (runs.read(tmp_path / name / "run", "run") for name in ("one", "two"))
    found = judge.judge(first, second, None, None, URL, lambda line: None)
    assert found.seen == {"one/run": 0, "two/run": 10}
    assert found.sides == ("one/run", "two/run")
    assert "  warning: 10 of these rows stand in the training data of two/run: this flatters it" in judge.told(found)
