"""`neartune push` and `pull`: across an air gap every byte is right, or nothing is there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neartune import cli
from neartune.records import carry, runs
from neartune.records.runs import RunsError
from tests.trainer.bases import FACTS, run_here, write_jsonl
from tests.trainer.made import made_run


def read(path: Path) -> runs.Run:
    return runs.read(path, path.name)


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    """With one pushed run, `facts`."""
    (tmp_path / "stick").mkdir()
    carry.push(read(made_run(tmp_path / "from" / "facts", weights=bytes(range(256)) * 9)), tmp_path / "stick")
    return tmp_path / "stick"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_what_is_pulled_is_the_run_that_was_pushed(stick: Path, home: Path, tmp_path: Path) -> None:
    carried = carry.pull(stick, home)
    assert carried.path == home / "facts"
    before = content(tmp_path / "from" / "facts")
    assert content(home / "facts") == before
    assert set(carried.manifest.files) == set(before)
    assert read(home / "facts").state == "finished"
    assert (carried.manifest.base["fingerprint"], carried.manifest.data["sha256"]) == ("f" * 64, "d" * 64)
    assert [path.name for path in home.iterdir()] == ["facts"]


def test_checkpoints_and_what_shows_rows_stay_behind(tmp_path: Path, home: Path) -> None:
    run = made_run(tmp_path / "run")
    for name in ("facts.json", "report.html", "checkpoints/step-000003/state.pt", "best/step-000003/state.pt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    carried = carry.push(read(run), home)
    assert {name.partition("/")[0] for name in carried.manifest.files} == {
        *("adapter", "recipe.yaml", "run.json", "result.json", "metrics.jsonl")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stick that no test changes."""
    whole = tmp_path_factory.mktemp("whole")
    carry.push(read(made_run(tmp_path_factory.mktemp("from") / "run")), whole)
    return whole


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_any_flipped_byte_is_found(whole: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stick, home = shutil.copytree(whole, Path(folder) / "stick"), Path(folder) / "home"
        home.mkdir()
        files = sorted(file for file in stick.rglob("*") if file.is_file())
        file = data.draw(st.sampled_from(files), label="file")
        harmed = bytearray(file.read_bytes())
        place = data.draw(st.integers(0, len(harmed) - 1), label="byte")
        harmed[place] ^= data.draw(st.integers(1, 255), label="bits")
        file.write_bytes(harmed)
        named = carry.MANIFEST if file.name == carry.SEAL else file.name
        with pytest.raises(RunsError, match=rf"{named}: it is damaged"):
            carry.pull(stick, home)
        assert list(home.iterdir()) == [], "nothing is visible, nothing is left"


def swap_for_link(file: Path) -> None:
    shutil.move(file, file.parents[4] / "elsewhere")
    file.symlink_to(file.parents[4] / "elsewhere")


WEIGHTS = Path("files/adapter/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda pushed: os.truncate(pushed / WEIGHTS, 100), r"adapter_model.safetensors: it is damaged: 100 bytes of 2304"),
        (lambda pushed: os.truncate(pushed / "manifest.json", 100), r"manifest.json: it is damaged"),
        (lambda pushed: os.truncate(pushed / "manifest.sha256", 0), r"manifest.json: it is damaged"),
        (lambda pushed: (pushed / WEIGHTS).unlink(), r"adapter_model.safetensors: it is missing"),
        (lambda pushed: (pushed / "manifest.sha256").unlink(), r"manifest.sha256: it cannot be read"),
        (lambda pushed: (pushed / "files" / "more.bin").write_text("x"), r"files/more.bin: the manifest does not name it"),
        (lambda pushed: (pushed / "extra").mkdir(), r"extra: the manifest does not name it"),
        (lambda pushed: swap_for_link(pushed / WEIGHTS), r"adapter_model.safetensors: it is a link or no plain file"),
        (lambda pushed: swap_for_link(pushed / "files" / "adapter"), r"adapter: it is a link or no plain file"),
        (lambda pushed: ((pushed / WEIGHTS).unlink(), os.mkfifo(pushed / WEIGHTS)), r"it is a link or no plain file"),
    ],
    ids=[
        "short",
        "short-manifest",
        "no-seal",
        "missing",
        "seal-missing",
        "extra",
        "extra-folder",
        "link",
        "folder-link",
        "pipe",
    ],
)
def test_what_is_not_as_it_was_pushed_is_refused_by_name(
    stick: Path, home: Path, harm: Callable[[Path], object], message: str
) -> None:
    harm(stick / "facts")
    with pytest.raises(RunsError, match=message):
        carry.pull(stick, home)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/evil",
        "adapter/../../evil",
        "adapter/..",
        "adapter\\..\\evil",
        "evil.sh",
        "adapter/.hidden",
        "adapter/a/b/c/d",
    ],
)
def test_names_that_lead_out_are_refused_though_the_manifest_is_whole(stick: Path, home: Path, name: str) -> None:
    """A manifest written by somebody else, with a seal that is right."""
    import hashlib

    pushed = stick / "facts"
    manifest = json.loads((pushed / carry.MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["run.json"]
    text = json.dumps(manifest)
    (pushed / carry.MANIFEST).write_text(text)
    (pushed / carry.SEAL).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    with pytest.raises(RunsError, match="is no file of an adapter"):
        carry.pull(stick, home)
    assert sorted(path.name for path in home.parent.iterdir()) == ["from", "home", "stick"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "/x"])
def test_a_run_cannot_be_put_elsewhere_by_its_name(stick: Path, home: Path, name: str) -> None:
    run = read(home.parent / "from" / "facts")
    if name:
        with pytest.raises(RunsError, match="cannot be a name here"):
            carry.pull(stick, home, name)
        with pytest.raises(RunsError, match="cannot be a name here"):
            carry.push(run, stick, name)
    assert [path.name for path in stick.iterdir()] == ["facts"]


def test_nothing_is_overwritten(stick: Path, home: Path) -> None:
    run = read(home.parent / "from" / "facts")
    before = content(stick)
    with pytest.raises(RunsError, match="facts is there already: nothing is overwritten"):
        carry.push(run, stick)
    assert content(stick) == before
    carry.pull(stick, home)
    (home / "facts" / "note").write_text("mine")
    with pytest.raises(RunsError, match="facts is there already: nothing is overwritten; --as NAME says another name"):
        carry.pull(stick, home)
    assert (home / "facts" / "note").read_text() == "mine"
    assert carry.pull(stick, home, "again").path == home / "again"


def test_a_full_disk_leaves_nothing(stick: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(carry.os, "fsync", full)
    with pytest.raises(RunsError, match="No space left on device"):
        carry.pull(stick, home)
    with pytest.raises(RunsError, match="No space left on device"):
        carry.push(read(home.parent / "from" / "facts"), home)
    assert list(home.iterdir()) == []


def test_an_unfinished_run_or_a_stick_that_is_not_there_is_told(tmp_path: Path, stick: Path) -> None:
    half = read(made_run(tmp_path / "half", is_finished=False))
    with pytest.raises(RunsError, match="half is not finished"):
        carry.push(half, stick)
    with pytest.raises(RunsError, match="there is no such directory: is the stick mounted"):
        carry.push(read(tmp_path / "from" / "facts"), tmp_path / "mnt")
    assert not (tmp_path / "mnt").exists()


def test_which_of_several_must_be_said(stick: Path, home: Path) -> None:
    carry.push(read(home.parent / "from" / "facts"), stick, "other")
    with pytest.raises(RunsError, match=r"several adapters: facts, other\. Say which"):
        carry.pull(stick, home)
    assert carry.pull(stick / "other", home).path == home / "other"
    with pytest.raises(RunsError, match="there is no pushed adapter"):
        carry.pull(home, home)


def test_the_commands_say_which_base_is_needed_and_whether_it_is_here(
    llama: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run, on a base in a directory; and one on a base of the Hub that is not on this machine."""
    import huggingface_hub.constants

    from neartune.records import registry

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    run_here(llama, write_jsonl(tmp_path / "data.jsonl", FACTS), tmp_path / "run", max_steps=2)
    made_run(tmp_path / "made")
    (tmp_path / "stick").mkdir()
    capsys.readouterr()
    for name in ("run", "made"):
        assert cli.main(["push", name, "--to", str(tmp_path / "stick"), "--in", str(tmp_path)]) == 0
    pushed = capsys.readouterr().out
    assert cli.main(["pull", str(tmp_path / "stick" / "run"), "--to", str(home), "--as", "mine"]) == 0
    out = capsys.readouterr().out
    assert f"base: the directory {llama}" in out
    assert "it is there" in out
    seal = out.split("manifest ")[1].split()[0]
    assert f"manifest {seal}" in pushed, "both sides say it"
    assert registry.digest(registry.resolve("mine", home)) == registry.digest(tmp_path / "run" / "adapter")
    assert cli.main(["pull", str(tmp_path / "stick" / "made"), "--to", str(home)]) == 0
    out = capsys.readouterr().out
    assert f"base: lab/llama at {'c' * 12} (sha256 {'f' * 12}): it is not on this machine" in out
    assert cli.main(["pull", str(tmp_path / "stick" / "made"), "--to", str(home)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
