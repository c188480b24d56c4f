"""hf.lock as the trainer enforces it: written by `nearhub lock`, from a mirror, with one thing changed at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nearhub.cli import main as nearhub
from neartune import cli, pins
from neartune.hub import HubError, Snapshot
from neartune.prepare import locate_base, locate_source
from neartune.recipe import RecipeError, Source, as_yaml, load
from neartune.ui.texts import grounded
from tests.hub import HubProcess
from tests.mirror import MirrorProcess
from tests.trainer.bases import FACTS


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def repos(hub: HubProcess, llama: Path) -> None:
    hub.repo("lab/locked").commit({**{path.name: path for path in llama.iterdir()}, "README.md": "x"})
    hub.repo("lab/rows", "datasets").commit({"train.jsonl": "".join(json.dumps(row) + "\n" for row in FACTS)})


@pytest.fixture
def recipe(repos: None, mirror: MirrorProcess, tmp_path: Path) -> Path:
    """A recipe with an hf.lock of its base and its rows beside it."""
    file = tmp_path / "config.yaml"
    file.write_text(f"base_model: lab/locked\ntrain_data: lab/rows\nmirror: {mirror.url}\n")
    lock = ["lock", "lab/locked", "datasets/lab/rows", "--endpoint", mirror.url, "-o", str(tmp_path / "hf.lock")]
    assert nearhub(lock) == 0
    return file


def change(recipe: Path, edit: Callable[[Any], None]) -> None:
    path = recipe.parent / "hf.lock"
    told = json.loads(path.read_text())
    edit(told["repos"])
    path.write_text(json.dumps(told))


def located(recipe: Path, mirror: MirrorProcess, *overrides: str) -> tuple[Snapshot, list[str]]:
    """The base and the rows as a run would have them; what was said."""
    said: list[str] = []
    settings = load(recipe, overrides).recipe
    base = locate_base(settings, None, mirror.url, said.append)
    locate_source(Source("lab/rows", False), {}, mirror.url, said.append, settings.lock)
    return base, said


def test_what_is_locked_is_used_and_every_file_hashed(recipe: Path, mirror: MirrorProcess, hub: HubProcess) -> None:
    base, said = located(recipe, mirror)
    lock = recipe.parent / "hf.lock"
    assert base.commit == json.loads(lock.read_text())["repos"]["lab/locked"]["commit"]
    count = sum(1 for path in base.path.rglob("*") if path.is_file())
    assert f"lab/locked: {count} files are as {lock} has them" in said
    assert f"lab/rows: 1 files are as {lock} has them" in said


def test_a_branch_that_moved_is_used_at_the_locked_commit(recipe: Path, mirror: MirrorProcess, hub: HubProcess) -> None:
    """Named as it was locked, it stands for the commit; another name of another commit is refused, with both commits."""
    first, _ = located(recipe, mirror)
    hub.repo("lab/locked").commit({"README.md": "news"}, revision="dev")
    change(recipe, lambda repos: repos["lab/locked"].update(revision="v1"))  # no such branch: only its commit is asked for
    assert located(recipe, mirror, "revision=v1")[0] == first
    with pytest.raises(HubError, match=f"would be used at commit [0-9a-f]{{40}}, and .*hf.lock has {first.commit}"):
        located(recipe, mirror, "revision=dev")
    with pytest.raises(HubError, match=f"would be used at commit {'c' * 40}, and .*hf.lock has {first.commit}"):
        settings = load(recipe).recipe
        began = {"base": {"repo": "lab/locked", "commit": "c" * 40}}
        (first.path.parent / ("c" * 40)).symlink_to(first.path)
        locate_base(settings, began, mirror.url, lambda line: None)


def of(repo: str, name: str, **row: Any) -> Callable[[Any], None]:
    return lambda repos: repos[repo]["files"][name].update(row)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (of("lab/locked", "model.safetensors", git="0" * 40), "model.safetensors of lab/locked: .*hf.lock has git 0{40} of"),
        (
            of("lab/locked", "config.json", size=7),
            r"config.json of lab/locked: .*hf.lock has git \w+ of 7 bytes, http",
        ),
        (of("datasets/lab/rows", "train.jsonl", git="0" * 40), "train.jsonl of datasets/lab/rows: .* has git 0{40}"),
        (lambda repos: repos["lab/locked"]["files"].pop("config.json"), "config.json of lab/locked: .* has no such file"),
        (lambda repos: repos["lab/locked"].update(commit="d" * 40), "no revision 'main'|has no|404|not"),
        (
            lambda repos: repos.pop("datasets/lab/rows"),
            "does not name datasets/lab/rows: nearhub lock datasets/lab/rows adds",
        ),
    ],
)
def test_anything_else_is_refused(recipe: Path, mirror: MirrorProcess, edit: Callable[[Any], None], message: str) -> None:
    change(recipe, edit)
    with pytest.raises(HubError, match=message):
        located(recipe, mirror)


def test_a_file_that_was_changed_on_this_machine_is_refused(recipe: Path, mirror: MirrorProcess) -> None:
    """What the mirror says is right, and the file that a run would load is not."""
    base, _ = located(recipe, mirror)
    path = (base.path / "config.json").resolve()
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(HubError, match=r"config.json of lab/locked: .*hf.lock has git \w{40} of .*, .*snapshots.* has git"):
        located(recipe, mirror)


def test_a_run_and_a_plan_end_with_status_3(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(recipe, of("lab/locked", "model.safetensors", git="0" * 40))
    for verb in ("plan", "train"):
        assert cli.main(["--config", str(recipe), "max_steps=1", "processes=1"], verb=verb) == 3
        assert "hf.lock has git 0000" in capsys.readouterr().err


def test_which_lock_is_meant(recipe: Path, tmp_path: Path) -> None:
    """That beside the recipe, or the one it names, or none; a wrong one is a complaint about the recipe."""
    beside = tmp_path / "hf.lock"
    assert load(recipe).recipe.lock == beside
    assert load(recipe, ["lock=null"]).recipe.lock is None
    assert "lock: null" in as_yaml(load(recipe).recipe)
    (tmp_path / "other.lock").write_text("{}")
    with pytest.raises(RecipeError, match=r"lock: .*other\.lock is no hf\.lock"):
        load(recipe, [f"lock={tmp_path / 'other.lock'}"])
    text = grounded(recipe.read_text(), tmp_path, tmp_path / "out")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "config.yaml").write_text(text)
    assert load(moved / "config.yaml").recipe.lock == beside
    beside.unlink()
    assert load(recipe).recipe.lock is None


def lock_of(files: str) -> str:
    return f'{{"version": 1, "repos": {{"a/b": {{"revision": "main", "commit": "{"a" * 40}", "files": {files}}}}}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"version": 9, "repos": {}}', "of version 9, and this neartune knows 1: upgrade"),
        ('{"version": 1, "repos": {"a/b": {}}}', "is damaged: lock anew"),
        ('{"version": 1, "repos": {"a/b": {"revision": "m", "commit": "x", "files": {}}}}', "is damaged"),
        (lock_of('{"x": {"lfs": "1", "size": 1}}'), "is damaged"),
        (lock_of(f'{{"x": {{"git": "{"a" * 40}"}}}}'), "is damaged"),
    ],
)  # fmt: skip
def test_what_is_no_lock(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hf.lock").write_text(text)
    with pytest.raises(pins.LockError, match=message):
        pins.read(tmp_path / "hf.lock")
