"""`neartune runs`: what is listed and compared; served names, their versions, and which adapter a name gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neartune import cli
from neartune.records import registry, runs
from neartune.records.registry import Model, Version, gone_back, promote, resolve, rollback, with_version
from neartune.records.runs import RunsError
from tests.trainer.bases import FACTS, TRAINER, environment, run_here, write_jsonl
from tests.trainer.made import made_run

Ran = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Ran:
    def run(*arguments: object) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) of a command in this process."""
        capsys.readouterr()
        status = cli.main([str(word) for word in arguments])
        return (status, *capsys.readouterr())

    return run


# — listed, shown, compared ——————————————————————————————————————————————————————————————————————


def test_runs_are_listed_with_their_state_and_best_metric(tmp_path: Path, ran: Ran) -> None:
    made_run(tmp_path / "done")
    made_run(tmp_path / "deep" / "er" / "half", is_finished=False, max_steps=30)
    made_run(tmp_path / "epochs", is_finished=False, max_steps=None, epochs=2)
    failed = made_run(tmp_path / "failed", is_finished=False)
    (failed / "failed.json").write_text('{"error": "the loss of step 4 is no finite number"}')
    torn = made_run(tmp_path / "torn", is_finished=False)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    damaged = made_run(tmp_path / "damaged")
    (damaged / "result.json").write_text("{,}")
    (tmp_path / "none").mkdir()
    made_run(tmp_path / "done" / "inner")
    made_run(tmp_path / ".hidden" / "run")
    status, out, _ = ran("runs", "list", tmp_path, "--json")
    found = {run["name"]: run for run in json.loads(out)}
    assert status == 0
    assert list(found) == ["damaged", "deep/er/half", "done", "epochs", "failed", "torn"]
    states = {name: (run["state"], run["step"], run["steps"]) for name, run in found.items()}
    assert states == {
        "damaged": ("damaged", 3, None),
        "deep/er/half": ("unfinished", 3, 30),
        "done": ("finished", 3, 3),
        "epochs": ("unfinished", 3, 10),
        "failed": ("failed", 3, 3),
        "torn": ("unfinished", 3, 3),
    }
    assert found["done"]["metrics"] == {"loss": 1.6, "perplexity": 5.0}
    assert found["torn"]["metrics"] == {"loss": 1.6}, "the best so far"
    assert found["done"]["base"] == "lab/llama@cccccccccccc"
    assert found["failed"]["why"] == "the loss of step 4 is no finite number"
    assert "result.json cannot be read" in found["damaged"]["why"]
    assert found["torn"]["bytes"] == sum(file.stat().st_size for file in torn.rglob("*") if file.is_file())
    _, out, _ = ran("runs", "list", tmp_path)
    assert "unfinished, step 3 of 30" in out
    assert "unfinished, step 3 of about 10" in out
    assert "loss 1.6000, perplexity 5.0000" in out


def test_comparing_names_what_differs_and_puts_losses_side_by_side(tmp_path: Path, ran: Ran) -> None:
    made_run(tmp_path / "a", losses=[3.0, 2.0, 1.0])
    b = made_run(tmp_path / "b", losses=[3.0, 2.5, 2.0, 1.75], seed=7)
    identity = json.loads((b / "run.json").read_text())
    identity["versions"]["torch"] = "2.6.0"
    (b / "run.json").write_text(json.dumps(identity))
    _, out, _ = ran("runs", "compare", "a", "b", "--in", tmp_path, "--json")
    found = json.loads(out)
    assert found["differences"] == {"recipe.seed": [42, 7], "versions.torch": ["2.13.0+cpu", "2.6.0"]}
    assert found["metrics"]["loss"] == [1.1, 1.85]
    assert found["losses"] == [[1, 3.0, 3.0], [2, 2.0, 2.5], [3, 1.0, 2.0], [4, None, 1.75]]
    _, out, _ = ran("runs", "compare", "a", "b", "--in", tmp_path)
    table = [line.split()[:3] for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert table == [["1", "3.0000", "3.0000"], ["2", "2.0000", "2.5000"], ["3", "1.0000", "2.0000"], ["4", "-", "1.7500"]]
    strips = [line.rpartition(" ")[2] for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert (strips[0].index("*"), strips[2].index("a"), strips[3].index("b")) == (39, 0, round(0.75 / 2 * 39))


def test_long_curves_are_means_of_steps_at_the_same_place(tmp_path: Path) -> None:
    lines = runs.curve([{step: float(step) for step in range(1, 161)}, {step: 5.0 for step in range(1, 31)}], ["one", "two"])
    assert len(lines) == 17
    assert lines[1].split()[:3] == ["1-10", "5.5000", "5.0000"]
    assert lines[-1].split()[:3] == ["151-160", "155.5000", "-"]


def test_a_run_is_shown_with_what_it_was_promoted_to(tmp_path: Path, ran: Ran) -> None:
    promote(made_run(tmp_path / "a", seed=5), "demo", tmp_path)
    status, out, _ = ran("runs", "show", "a", "--in", tmp_path)
    assert status == 0
    assert 'served: ["demo@1*"]' in out
    assert "  seed: 5\n" in out
    assert '"torch": "2.13.0+cpu"' in out
    assert "demo@1*" in ran("runs", "list", tmp_path)[1]


def test_an_unknown_run_is_told_with_the_nearest_name(tmp_path: Path, ran: Ran) -> None:
    made_run(tmp_path / "facts-r16")
    assert ran("runs", "show", "facts-r61", "--in", tmp_path) == (
        2,
        "",
        "neartune: there is no run 'facts-r61'; did you mean facts-r16?\n",
    )
    assert "there is no such directory" in ran("runs", "list", tmp_path / "nowhere")[2]


def test_runs_need_no_torch(tmp_path: Path) -> None:
    made_run(tmp_path / "a")
    made_run(tmp_path / "b")
    program = (
        "import sys\nfrom neartune import cli\nfrom neartune.records import registry\n"
        "for line in ('list', 'show a', 'compare a b', 'promote a --as m', 'promote b --as m', 'rollback m'):\n"
        "    assert cli.main(['runs', *line.split()]) == 0, line\n"
        "assert registry.resolve('m', __import__('pathlib').Path()).parts[0] == 'a'\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'huggingface_hub', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(PYTHONPATH=str(TRAINER)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# — served names —————————————————————————————————————————————————————————————————————————————————


def version_of(number: int, digest: str) -> Version:
    return Version(number, f"run-{digest}", digest, "2026-01-01T00:00:00+00:00", "ann@lab", {}, "lab/llama@c")


def test_versions_count_up_and_the_last_promoted_is_current(tmp_path: Path, ran: Ran) -> None:
    for name in ("a", "b"):
        made_run(tmp_path / name, weights=name.encode())
    assert "demo@1 is current: a" in ran("runs", "promote", "a", "--as", "demo", "--in", tmp_path)[1]
    assert "demo@2 is current: b, loss 1.6" in ran("runs", "promote", "b", "--as", "demo", "--in", tmp_path)[1]
    assert resolve("demo", tmp_path) == tmp_path / "b" / "adapter"
    assert resolve("demo@1", tmp_path) == tmp_path / "a" / "adapter"
    known = registry.load(tmp_path)["demo"].versions[0]
    assert (known.run, known.metrics, known.base) == ("a", {"loss": 1.6, "perplexity": 5.0}, "lab/llama@cccccccccccc")
    assert "@" in known.who
    assert "demo@1 is current: a, promoted by" in ran("runs", "rollback", "demo", "--in", tmp_path)[1]
    assert resolve("demo", tmp_path) == tmp_path / "a" / "adapter"
    assert resolve("demo@2", tmp_path) == tmp_path / "b" / "adapter"


def test_going_back_goes_to_what_was_served_before_not_to_the_number_before() -> None:
    """3 was bad and taken back; when 4 is bad too, 3 is not what comes back."""
    known: dict[str, Model] = {}
    for digest in "abc":
        known = with_version(known, "m", version_of(0, digest))
    known = gone_back(known, "m", None)
    known = with_version(known, "m", version_of(0, "d"))
    assert known["m"].current == 4
    assert gone_back(known, "m", None)["m"].current == 2
    assert gone_back(known, "m", 3)["m"].served == (1, 2, 4, 3)
    assert gone_back(known, "m", 1)["m"].served == (1,)
    with pytest.raises(RunsError, match="m@1 is the first that was served"):
        gone_back(gone_back(known, "m", 1), "m", None)
    with pytest.raises(RunsError, match="m has no version 9: there are 1, 2, 3, 4"):
        gone_back(known, "m", 9)
    with pytest.raises(RunsError, match="m@4 is current already"):
        gone_back(known, "m", 4)
    with pytest.raises(RunsError, match="no served name 'x': there are m"):
        gone_back(known, "x", None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.just("promote"), st.just("back"), st.integers(1, 6)), max_size=20))
def test_the_current_version_is_always_one_that_was_promoted(moves: list[str | int]) -> None:
    known = with_version({}, "m", version_of(0, "first"))
    for number, move in enumerate(moves):
        before = known["m"]
        try:
            known = (
                with_version(known, "m", version_of(0, str(number)))
                if move == "promote"
                else gone_back(known, "m", None if move == "back" else int(move))
            )
        except RunsError:
            assert known["m"] is before
        assert known["m"].version(known["m"].current) is not None
        assert [version.number for version in known["m"].versions] == list(range(1, len(known["m"].versions) + 1))
        assert known["m"].versions[: len(before.versions)] == before.versions, "a version never changes"
        if isinstance(move, int) and move <= len(before.versions):
            assert known["m"].current == move


def test_promoting_the_same_again_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        promote(made_run(tmp_path / name, weights=name.encode()), "demo", tmp_path)
    with pytest.raises(RunsError, match=r"b is demo@2 already: it is current"):
        promote(tmp_path / "b", "demo", tmp_path)
    with pytest.raises(RunsError, match=r"a is demo@1 already: neartune runs rollback demo --to 1"):
        promote(tmp_path / "a", "demo", tmp_path)


@pytest.mark.parametrize("name", ["", "a/b", "a@1", "../x", ".x", "a b", "x" * 97])
def test_what_cannot_be_a_served_name(tmp_path: Path, name: str) -> None:
    made_run(tmp_path / "a")
    with pytest.raises(RunsError, match="cannot be a served name"):
        promote(tmp_path / "a", name, tmp_path)


def test_an_unfinished_run_is_not_promoted_nor_resolved(tmp_path: Path) -> None:
    made_run(tmp_path / "a", is_finished=False)
    with pytest.raises(RunsError, match="a is not finished"):
        promote(tmp_path / "a", "demo", tmp_path)
    with pytest.raises(RunsError, match="a is not finished"):
        resolve("a", tmp_path)
    assert not (tmp_path / registry.FILE).exists()


def change(adapter: Path) -> None:
    """One byte, with the size and times that it had."""
    file = adapter / "adapter_model.safetensors"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "harm",
    [change, lambda path: (path / "more").write_text("x"), lambda path: (path / "adapter_config.json").unlink()],
    ids=["byte", "more", "less"],
)
def test_a_promoted_adapter_that_changed_on_disk_is_refused_by_name(tmp_path: Path, harm: Callable[[Path], Any]) -> None:
    for name in ("a", "b"):
        promote(made_run(tmp_path / name, weights=name.encode()), "demo", tmp_path)
    assert resolve("demo@1", tmp_path)
    harm(tmp_path / "a" / "adapter")
    for refused in (lambda: resolve("demo@1", tmp_path), lambda: rollback("demo", tmp_path)):
        with pytest.raises(RunsError, match=r"demo@1: the adapter in .*a/adapter was changed after it was promoted"):
            refused()
    assert resolve("demo", tmp_path) == tmp_path / "b" / "adapter", "the pointer did not move"


def test_an_adapter_that_is_gone_is_told(tmp_path: Path) -> None:
    promote(made_run(tmp_path / "a"), "demo", tmp_path)
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    with pytest.raises(RunsError, match="demo@1: its adapter is gone"):
        resolve("demo", tmp_path)


def test_a_run_outside_may_be_promoted(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    promote(made_run(tmp_path / "far" / "run"), "demo", home)
    assert resolve("demo", home) == tmp_path / "far" / "run" / "adapter"


def test_only_names_below_are_resolved_and_a_served_name_goes_first(tmp_path: Path) -> None:
    home = tmp_path / "home"
    made_run(home / "in" / "side")
    made_run(home / "demo", weights=b"a run that is called like a served name")
    promote(home / "in" / "side", "demo", home)
    made_run(tmp_path / "out")
    (home / "link").symlink_to(tmp_path / "out")
    assert resolve("in/side", home) == home / "in" / "side" / "adapter"
    assert resolve("demo", home) == home / "in" / "side" / "adapter"
    for name in ("../out", str(tmp_path / "out"), "in/../../out", "link", "", ".", "nothing", "demo@0", "in/side@1"):
        with pytest.raises(RunsError, match="there is no served name and no run"):
            resolve(name, home)
    with pytest.raises(RunsError, match="demo has no version 2: there are 1"):
        resolve("demo@2", home)


def test_a_registry_that_was_not_written_whole_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        made_run(tmp_path / name, weights=name.encode())
    promote(tmp_path / "a", "demo", tmp_path)
    before = (tmp_path / registry.FILE).read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registry.os, "fsync", full)
    with pytest.raises(RunsError, match="it cannot be written: No space left on device"):
        promote(tmp_path / "b", "demo", tmp_path)
    monkeypatch.undo()
    assert (tmp_path / registry.FILE).read_bytes() == before
    assert promote(tmp_path / "b", "demo", tmp_path).number == 2


def test_writers_in_several_processes_lose_no_version(tmp_path: Path) -> None:
    for number in range(12):
        made_run(tmp_path / f"r{number}", weights=bytes([number]))
    program = (
        "import sys\nfrom pathlib import Path\nfrom neartune.records import registry\n"
        "for number in sys.argv[1:]:\n    registry.promote(Path(f'r{number}'), 'demo', Path())\n"
    )
    parts = [range(0, 4), range(4, 8), range(8, 12)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, part)], cwd=tmp_path, env=environment(PYTHONPATH=str(TRAINER))
        )
        for part in parts
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    model = registry.load(tmp_path)["demo"]
    assert [version.number for version in model.versions] == list(range(1, 13))
    assert {version.run for version in model.versions} == {f"r{number}" for number in range(12)}


def test_a_registry_of_another_make_is_told_and_not_overwritten(tmp_path: Path) -> None:
    made_run(tmp_path / "a")
    (tmp_path / registry.FILE).write_text('{"models": 3}')
    with pytest.raises(RunsError, match=r"registry.json: it was not written by this version of neartune"):
        promote(tmp_path / "a", "demo", tmp_path)
    assert (tmp_path / registry.FILE).read_text() == '{"models": 3}'


# — done again ———————————————————————————————————————————————————————————————————————————————————


@pytest.fixture(scope="module")
def origin(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run, `one`, whose micro-batch was measured, and its rows, `data.jsonl`."""
    origin = tmp_path_factory.mktemp("origin")
    rows = write_jsonl(origin / "data.jsonl", FACTS)
    settings = {"max_steps": 8, "lora_dropout": 0.2, "micro_batch_size": "auto", "memory_limit": "8GB", "eval_every": 4}
    run_here(llama, rows, origin / "one", **settings)
    return origin


@pytest.fixture
def data(origin: Path) -> Iterator[Path]:
    yield origin / "data.jsonl"
    write_jsonl(origin / "data.jsonl", FACTS)


@pytest.fixture
def home(origin: Path, tmp_path: Path) -> Path:
    shutil.copytree(origin / "one", tmp_path / "one")
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_a_run_done_again_is_the_same_to_the_bit(home: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recorded micro-batch: nothing is measured again."""
    monkeypatch.setattr("neartune.batch.find", None)
    status, out, err = ran("runs", "reproduce", "one", "--in", home)
    assert (status, err) == (0, "")
    assert "the same up to step 8 of 8" in out
    assert "the same to the bit: 8 steps, the metrics, the adapter" in out
    assert (home / "one-reproduced" / "adapter" / "adapter_model.safetensors").read_bytes() == (
        home / "one" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    status, _, err = ran("runs", "reproduce", "one", "--in", home)
    assert status == 2
    assert "one-reproduced is there already: remove it, or say --to DIR" in err


def test_one_changed_row_is_another_run_and_nothing_is_begun(home: Path, data: Path, ran: Ran) -> None:
    write_jsonl(data, [{"prompt": "What is 1 and 1?", "completion": "3."}, *FACTS[1:]])
    status, _, err = ran("runs", "reproduce", "one", "--in", home)
    assert status == 1
    assert "this would be another run than one: data.sha256 was" in err
    assert not (home / "one-reproduced").exists()


def test_another_seed_in_the_recipe_is_named(home: Path, ran: Ran) -> None:
    edit(home / "one" / "recipe.yaml", "seed: 42", "seed: 43")
    status, _, err = ran("runs", "reproduce", "one", "--in", home)
    assert status == 1
    assert "another run than one: seed was 42, is 43 (recipe.yaml was changed after the run)" in err


def test_data_that_moved_are_asked_for_and_then_compared_by_content(home: Path, data: Path, ran: Ran) -> None:
    moved = data.rename(data.with_name("moved.jsonl"))
    status, _, err = ran("runs", "reproduce", "one", "--in", home)
    assert status == 2
    assert "it has moved? train_data=PATH on the command line says where it is now" in err
    status, out, err = ran("runs", "reproduce", "one", f"train_data={moved}", "--in", home)
    assert (status, err) == (0, "")
    assert "elsewhere, and the same: train_data.name was" in out or "elsewhere, and the same: train_data was" in out


def test_the_first_step_that_differs_is_named_with_what_else_differs(home: Path, ran: Ran) -> None:
    metrics = home / "one" / "metrics.jsonl"
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    fifth = next(line for line in steps if line.get("step") == 5 and "kind" not in line)
    was = fifth["loss"]
    fifth["loss"] = was + 1e-9
    write_jsonl(metrics, steps)
    edit(home / "one" / "run.json", '"peft": "', '"peft": "0.1.')
    status, out, err = ran("runs", "reproduce", "one", "--in", home)
    assert status == 1
    assert f"step 5: loss was {was + 1e-9!r}, is {was!r}" in err
    assert "Not as it was: versions.peft was" in err
    assert "not as it was: versions.peft" in out
    assert "the same up to step 4 of 8" in out
    again = [json.loads(line) for line in (home / "one-reproduced" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in again) == 5, "it ends there"


def test_cuts_that_memory_made_smaller_are_made_again(llama: Path, data: Path, tmp_path: Path, ran: Ran) -> None:
    """Steps 1 to 3 in one cut of 4 rows, then two of 2: as recorded when memory ran out."""
    from neartune import loop

    inner = loop._try_gradients

    def short(trainer: Any, mine: Any, weights: int) -> tuple[float, bool]:
        done.append(trainer.micro)
        return (0.0, True) if len(done) == 4 else inner(trainer, mine, weights)

    done: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_try_gradients", short)
        run_here(llama, data, tmp_path / "one", max_steps=6)
    assert done == [4, 4, 4, 4, 2, 2, 2]
    assert ran("runs", "reproduce", "one", "--in", tmp_path)[0] == 0


def test_only_a_finished_run_is_done_again_and_only_places_may_be_said(tmp_path: Path, ran: Ran) -> None:
    made_run(tmp_path / "half", is_finished=False)
    made_run(tmp_path / "done")
    assert "half is unfinished: only a finished run can be done again" in ran("runs", "reproduce", "half", "--in", tmp_path)[2]
    status, _, err = ran("runs", "reproduce", "done", "seed=3", "--in", tmp_path)
    assert (status, "seed=3: a run is done again as it was" in err) == (2, True)


def test_a_run_that_fails_says_so_until_it_goes_on(llama: Path, data: Path, tmp_path: Path) -> None:
    from neartune import loop

    steps = loop.steps

    def failing(*arguments: Any, **named: Any) -> Any:
        for result in steps(*arguments, **named):
            if result.step == 3:
                raise loop.NotFinite(3, ["data.jsonl:1"])
            yield result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "steps", failing)
        with pytest.raises(loop.NotFinite):
            run_here(llama, data, tmp_path / "run", max_steps=4)
    failed = runs.read(tmp_path / "run", "run")
    assert (failed.state, failed.step) == ("failed", 2)
    assert failed.why.startswith("the loss of step 3 is no finite number")
    run_here(llama, data, tmp_path / "run", max_steps=4)
    assert runs.read(tmp_path / "run", "run").state == "finished"
    assert not (tmp_path / "run" / "failed.json").exists()


def test_a_damaged_evaluation_keeps_no_other_run_from_being_listed(tmp_path: Path) -> None:
    for name in ("good", "damaged"):
        made_run(tmp_path / name, is_finished=False)
    (tmp_path / "damaged" / "metrics.jsonl").write_text('{"kind": "eval", "step": 1}\n')
    found = {path.name: runs.read(path, path.name).brief() for path in runs.find(tmp_path)}
    assert (found["good"]["why"], found["damaged"]["why"]) == ("", "metrics.jsonl:1 is no line of metrics")
