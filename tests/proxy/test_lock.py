"""hf.lock: its text, what an endpoint says otherwise, and what files on disk are otherwise; as a user types it."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st

from nearhub.cli import main
from nearhub.errors import BadLock
from nearhub.wire.leaves import Named
from nearhub.wire.lock import Locked, differences, format_lock, parse_lock
from tests.hub import LFS, Content, Hub
from tests.mirror import Mirror, configure, running
from tests.proxy.test_tlog import FILES, NAMED

REPOS = st.sampled_from(["org/m", "gpt2", "datasets/org/d", "spaces/a/b", "org/m-2"])
COMMITS = st.sampled_from("0af").map(lambda digit: digit * 40)
SMALL = st.dictionaries(st.sampled_from("abc"), NAMED, max_size=3)
LOCKS = st.dictionaries(REPOS, st.builds(Locked, st.text(max_size=20), COMMITS, FILES), max_size=3)


@settings(max_examples=40)
@given(LOCKS)
def test_a_lock_leads_back_is_plain_json_and_has_a_line_a_file(locks: dict[str, Locked]) -> None:
    text = format_lock(locks)
    assert parse_lock(text, "x") == locks
    assert parse_lock(json.dumps(json.loads(text)), "x") == locks
    assert format_lock(dict(reversed(locks.items()))) == text
    files = [path for locked in locks.values() for path in locked.files]
    assert sum('"size": ' in line for line in text.split("\n")) >= len(files)


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), NAMED, max_size=4), st.dictionaries(st.text(max_size=3), NAMED, max_size=4)
)
def test_differences_are_none_exactly_where_both_say_the_same(one: dict[str, Named], two: dict[str, Named]) -> None:
    assert (differences(one, two, "it") == []) == (one == two)


def lock_of(files: str, repo: str = "a/b") -> str:
    return f'{{"version": 1, "repos": {{"{repo}": {{"revision": "main", "commit": "{"a" * 40}", {files}}}}}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "hf.lock: is no JSON"),
        ("[]", "is no hf.lock: nearhub lock REPO writes one"),
        ('{"version": 2, "repos": {}}', "is of version 2, and this nearhub knows 1: upgrade"),
        ('{"version": 1, "repos": {"a/b": {}}}', "hf.lock: a/b: a repo is to have revision, commit and files"),
        (lock_of('"files": {}', "a/../b"), "hf.lock: a/../b: "),
        (lock_of('"files": {"x": {"size": 1}}'), "a/b: x: a file is to have lfs or git"),
        (lock_of('"files": {"x": {"lfs": "00", "size": 1}}'), "neither a sha256"),
        (lock_of('"files": {}, "files": {}'), "'files' stands there twice"),
        ('{"version": 1, "repos": {"a/b": {"revision": "main", "commit": "main", "files": {}}}}', "names no commit"),
    ],
)
def test_what_is_no_lock_is_said_so(text: str, message: str) -> None:
    with pytest.raises(BadLock) as caught:
        parse_lock(text, "hf.lock")
    assert message in caught.value.message


class Desk:
    """The command line, in a directory of its own, with a mirror as its endpoint."""

    def __init__(self, folder: Path, mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
        self.file, self.url, self._capsys = folder / "hf.lock", mirror.url, capsys

    async def lock(self, *arguments: str, status: int = 0) -> str:
        self._capsys.readouterr()
        got = await asyncio.to_thread(main, ["lock", "-o", str(self.file), *arguments, "--endpoint", self.url])
        output = "".join(self._capsys.readouterr())
        assert got == status, output
        return output

    def change(self, old: str, new: str) -> None:
        text = self.file.read_text()
        assert old in text
        self.file.write_text(text.replace(old, new, 1))


@pytest.fixture
async def desk(hub: Hub, mirror: Mirror, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    hub.repo("org/m").commit({"config.json": b"{}", "sub/model.bin": LFS(Content(1000, seed=1))})
    hub.repo("org/d", "datasets").commit({f"rows-{n:04d}.txt": b"%d" % n for n in range(1200)})
    return Desk(tmp_path, mirror, capsys)


async def test_what_is_locked_is_checked_against_the_endpoint(hub: Hub, desk: Desk) -> None:
    """All pages of a long repo; a branch that moved is no difference until it is locked anew; each other one is named."""
    output = await desk.lock("org/m", "datasets/org/d@main")
    assert "datasets/org/d@" in output and ": 1200 files" in output
    told = json.loads(desk.file.read_text())["repos"]["org/m"]
    assert told["files"]["sub/model.bin"] == {"lfs": Content(1000, seed=1).sha256, "size": 1000}
    assert "2 repos are as locked" in await desk.lock("--check")
    text = desk.file.read_text()
    await desk.lock()
    assert desk.file.read_text() == text

    moved = hub.repo("org/m").commit({"config.json": b"{ }"})
    assert "2 repos are as locked" in await desk.lock("--check")
    desk.change(Content(1000, seed=1).sha256, "0" * 64)
    desk.change('"rows-0007.txt": ', '"rows-x.txt": ')
    output = await desk.lock("--check", status=1)
    there = f"{desk.url} has sha256-{Content(1000, seed=1).sha256} of 1,000 bytes"
    assert f"sub/model.bin: locked as sha256-{'0' * 64} of 1,000 bytes; {there}" in output
    assert "rows-x.txt: locked as sha1-" in output and "has no such file" in output
    assert "rows-0007.txt: locked as absent" in output
    assert len(output.strip().split("\n")) == 3
    assert "1 repos are as locked" not in await desk.lock("--check", "org/m", status=1)
    desk.change(told["commit"], "f" * 40)
    assert "does not show org/m@" in await desk.lock("--check", "org/m", status=1)
    desk.url = hub.url  # the mirror believes a branch for a minute
    assert str(moved) in await desk.lock("org/m")
    assert "has no org/other: nearhub lock org/other adds it" in await desk.lock("--check", "org/other", status=1)
    assert "does not show org/none" in await desk.lock("org/none", status=1)


async def test_files_that_are_here_are_hashed(desk: Desk, tmp_path: Path) -> None:
    """In a Hugging Face cache, in a folder a repo, in a folder of the one repo; nobody is asked."""
    await desk.lock("org/m")
    cache, folder = tmp_path / "hf", tmp_path / "models" / "org" / "m"
    for more in ({"cache_dir": str(cache)}, {"local_dir": str(folder)}):
        await asyncio.to_thread(snapshot_download, "org/m", endpoint=desk.url, **more)  # type: ignore[arg-type]
    shutil.copytree(folder, tmp_path / "alone")
    desk.url = "http://127.0.0.1:9"
    for root in (cache, tmp_path / "models", tmp_path / "alone"):
        assert "what is there is as locked" in await desk.lock("--check", "--files", str(root))
    (model,) = (path for path in (cache / "models--org--m" / "snapshots").rglob("model.bin"))
    for path in (model.resolve(), folder / "sub" / "model.bin"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    for root in (cache, tmp_path / "models"):
        output = await desk.lock("--check", "--files", str(root), status=1)
        assert f"sub/model.bin: locked as sha256-{Content(1000, seed=1).sha256}" in output
    (tmp_path / "alone" / "modeling_evil.py").write_text("x")
    output = await desk.lock("--check", "--files", str(tmp_path / "alone"), status=1)
    assert "modeling_evil.py: locked as absent" in output
    (tmp_path / "alone" / "modeling_evil.py").unlink()
    (tmp_path / "alone" / "config.json").unlink()
    assert "as locked" in await desk.lock("--check", "--files", str(tmp_path / "alone"))
    desk.change('"commit": "', '"commit": "' + "f" * 40 + '", "x": "')
    assert "revision, commit and files, and nothing else" in await desk.lock("--check", "--files", str(cache), status=1)
    shutil.rmtree(cache / "models--org--m" / "snapshots")
    desk.file.unlink()
    assert "cannot be read" in await desk.lock("--check", "--files", str(cache), status=1)
    assert "cannot be asked about org/m" in await desk.lock("org/m", status=1)
    assert "locks nothing yet" in await desk.lock(status=1)


async def test_the_endpoint_is_hf_endpoint_else_this_mirror(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repo("org/m").commit({"a": b"1"})
    lock = ["lock", "org/m", "-o", str(tmp_path / "hf.lock")]
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], SERVER_PREFIX="/hf")) as mirror:
        _, _, port = mirror.url.removeprefix("http://").removesuffix("/hf").partition(":")
        monkeypatch.delenv("HF_ENDPOINT", raising=False)
        for name, value in (("HOST", "0.0.0.0"), ("PORT", port), ("PREFIX", "/hf")):
            monkeypatch.setenv(f"NEARHUB_SERVER_{name}", value)
        assert await asyncio.to_thread(main, lock) == 0
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        assert await asyncio.to_thread(main, lock) == 1
        assert "127.0.0.1:9 cannot be asked" in capsys.readouterr().err
