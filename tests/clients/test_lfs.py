"""Real git-lfs against the mirror, at the root and under a prefix: cold, warm, cut, lied to, and with the Hub gone."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from yarl import URL

from nearhub.fill import Patience
from tests.clients.lan import PREFIX
from tests.clients.programs import HF, Want, made
from tests.hub import LFS, Content, Fault, Hub, Repo
from tests.hub.content import File
from tests.mirror import Mirror, configure, run_client, running

MIB = 1024 * 1024
WEIGHTS = Content(3 * MIB, seed=11)
MORE = Content(200_000, seed=12)
OLD = Content(100_000, seed=13)
BATCH = "/info/lfs/objects/batch"
QUICK = Patience(first_backoff_s=0.01, strikes=2, strikes_unproved=1)


@dataclass(frozen=True)
class Clone:
    """A working tree as `git clone` leaves it without LFS: pointer files, committed, and a remote."""

    folder: Path
    remote: str

    async def __call__(self, *arguments: str, **settings: str) -> tuple[int, str]:
        """git's exit status and all that it said; with nobody's settings but these."""
        options = [word for name, value in settings.items() for word in ("-c", f"lfs.{name.replace('_', '.')}={value}")]
        known = {"PATH": os.environ["PATH"], "HOME": str(self.folder.parent), "GIT_CONFIG_NOSYSTEM": "1"}
        known |= {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", "GIT_TRACE": str(self.folder.parent / "trace")}
        words = [f"{name}={value}" for name, value in known.items()]
        return await run_client("env", "-i", *words, "git", *options, *arguments, cwd=self.folder)

    async def must(self, *arguments: str, **settings: str) -> str:
        status, said = await self(*arguments, **settings)
        assert status == 0, said
        return said

    async def pull(self, **settings: str) -> None:
        """Which must succeed, and leave nothing that git-lfs finds wrong."""
        await self.must("lfs", "pull", **settings)
        assert "Git LFS fsck OK" in await self.must("lfs", "fsck")

    def has(self, path: str, content: Content) -> bool:
        return (self.folder / path).read_bytes() == content.bytes()

    def objects(self) -> list[str]:
        """Oids that git-lfs believes it has."""
        return [path.name for path in self.folder.glob(".git/lfs/objects/*/*/*")]

    @property
    def trace(self) -> str:
        return (self.folder.parent / "trace").read_text()


async def clone(folder: Path, remote: str, files: Mapping[str, Content]) -> Clone:
    tree = Clone(made(folder / "tree"), remote)
    await tree.must("init", "-q", "-b", "main")
    (tree.folder / ".gitattributes").write_text("*.bin filter=lfs diff=lfs merge=lfs -text\n")
    for path, content in files.items():
        made((tree.folder / path).parent)
        (tree.folder / path).write_bytes(File(content, is_lfs=True).pointer)
    await tree.must("add", ".")
    await tree.must("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-q", "-m", "pointers")
    await tree.must("remote", "add", "origin", remote)
    await tree.must("lfs", "install", "--local", "--skip-repo")
    return tree


def publish(hub: Hub) -> Repo:
    """An old file that only history has, and two that main has."""
    repo = hub.repo("org/m")
    repo.commit({"model.bin": LFS(OLD)})
    repo.commit({"model.bin": LFS(WEIGHTS), "sub/more.bin": LFS(MORE), "config.json": b"{}"})
    return repo


FILES = {"model.bin": WEIGHTS, "sub/more.bin": MORE}


def served(mirror: Mirror) -> list[str]:
    """How each request for an object ended, in order."""
    return [str(past[3]) for past in mirror.front.history._past.values() if "/-/lfs/" in past[2]]


@asynccontextmanager
async def mirror_of(hub: Hub, folder: Path, prefix: str = "") -> AsyncIterator[Mirror]:
    async with running(configure(folder / "cache", [hub.url], [hub.cdn_host], SERVER_PREFIX=prefix), QUICK) as mirror:
        yield mirror


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["root", "prefix"])
async def test_cold_then_warm_then_with_the_hub_gone(hub: Hub, tmp_path: Path, prefix: str) -> None:
    """The bytes once, and one question; the second clone costs upstream nothing, and needs it no more."""
    publish(hub)
    async with mirror_of(hub, tmp_path, prefix) as mirror:
        first = await clone(tmp_path / "first", f"{mirror.url}/org/m", FILES)
        await first.pull()
        assert all(first.has(path, content) for path, content in FILES.items())
        assert hub.counters.bytes("cdn") == WEIGHTS.size + MORE.size
        assert [one.raw_path for one in hub.log.find("hub", match="/api/")] == ["/api/models/org/m/revision/main?blobs=true"]
        assert hub.counters.requests(match=BATCH) == 0
        hub.counters.reset()
        second = await clone(tmp_path / "second", f"{mirror.url}/org/m.git", FILES)
        await second.pull()
        assert hub.counters.requests() == 0
        await hub.stop()
        third = await clone(tmp_path / "third", f"{mirror.url}/org/m", FILES)
        await third.pull()
        assert all(third.has(path, content) for path, content in FILES.items())
        status, said = await (await clone(tmp_path / "fourth", f"{mirror.url}/org/m", {**FILES, "old.bin": OLD}))("lfs", "pull")
        assert (status != 0, "upstream cannot be asked" in said) == (True, True)
        assert all((tmp_path / "fourth/tree" / path).stat().st_size == content.size for path, content in FILES.items())


@pytest.mark.parametrize("is_hf_first", [True, False], ids=["hf download, then git lfs pull", "git lfs pull, then hf download"])
async def test_it_is_one_store(hub: Hub, tmp_path: Path, is_hf_first: bool) -> None:
    hub.repo("org/d", "datasets").commit({"data.bin": LFS(WEIGHTS)})
    async with mirror_of(hub, tmp_path) as mirror:
        tree = await clone(tmp_path, f"{mirror.url}/datasets/org/d", {"data.bin": WEIGHTS})
        want = Want(mirror.url, "org/d", "data.bin", kind="datasets")
        if not is_hf_first:
            await tree.pull()
        got = await HF.get(want, tmp_path / "hf")
        if is_hf_first:
            assert hub.counters.bytes("cdn") == WEIGHTS.size
            hub.counters.reset()
            await tree.pull()
            assert hub.counters.requests() == 0
        assert hub.counters.bytes("cdn") in (0, WEIGHTS.size)
        assert (got.verdict(WEIGHTS.sha256), tree.has("data.bin", WEIGHTS)) == ("right", True)


async def test_a_file_of_the_past(hub: Hub, tmp_path: Path) -> None:
    """In no manifest that the mirror has: upstream's batch is asked for it, once."""
    publish(hub)
    async with mirror_of(hub, tmp_path) as mirror:
        for name in ("first", "second"):
            tree = await clone(tmp_path / name, f"{mirror.url}/org/m", {"model.bin": OLD})
            await tree.pull()
            assert tree.has("model.bin", OLD)
        assert hub.counters.bytes("cdn") == OLD.size
        # Once to know that the repo has it, once for its URL.
        assert hub.counters.requests(match=BATCH) == 2


@asynccontextmanager
async def cutting(url: str, after: int) -> AsyncIterator[str]:
    """The mirror behind something that cuts the first connection that has carried so many bytes."""
    target = URL(url)
    is_cut = False

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None) -> None:
        nonlocal is_cut
        count = 0
        while piece := await reader.read(16 * 1024):
            count += len(piece)
            if limit is not None and count > limit and not is_cut:
                is_cut = True
                break
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection(target.host, target.port)
        await asyncio.gather(carry(reader, back, None), carry(onward, writer, after), return_exceptions=True)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    async with server:
        yield str(target.with_port(server.sockets[0].getsockname()[1]))
    assert is_cut


async def test_a_cut_is_resumed_where_it_was(hub: Hub, tmp_path: Path) -> None:
    """By git-lfs itself, with a new batch and an exact 206."""
    publish(hub)
    async with mirror_of(hub, tmp_path) as mirror, cutting(mirror.url, 1_500_000) as url:
        tree = await clone(tmp_path, f"{url}/org/m", {"model.bin": WEIGHTS})
        await tree.pull()
        assert tree.has("model.bin", WEIGHTS)
        assert re.search(r"Attempting to resume download of .* from byte [1-9]", tree.trace)
        assert "failed to resume" not in tree.trace
        assert served(mirror)[-1] == "206"
    assert hub.counters.bytes("cdn") == WEIGHTS.size


async def test_an_upstream_that_cuts_is_not_noticed(hub: Hub, tmp_path: Path) -> None:
    """P1: a clone sees no cut where upstream made one, in a file by its URL and in one by upstream's batch."""
    publish(hub)
    hub.faults.add(Fault.truncate(after=60_000), on="cdn", times=2)
    async with mirror_of(hub, tmp_path) as mirror:
        tree = await clone(tmp_path, f"{mirror.url}/org/m", {"model.bin": WEIGHTS, "old.bin": OLD})
        await tree.pull()
        assert tree.has("model.bin", WEIGHTS) and tree.has("old.bin", OLD)
        assert served(mirror) == ["200", "200"]


@pytest.mark.parametrize("content", [WEIGHTS, OLD], ids=["by its file", "by upstream's batch"])
async def test_wrong_bytes_are_never_had(hub: Hub, tmp_path: Path, content: Content) -> None:
    """While upstream is wrong nobody has the file; when it is right again, the next pull has it."""
    publish(hub)
    hub.faults.add(Fault.corrupt(at=content.size - 10), on="cdn")
    async with mirror_of(hub, tmp_path) as mirror:
        tree = await clone(tmp_path, f"{mirror.url}/org/m", {"model.bin": content})
        status, said = await tree("lfs", "pull", transfer_maxretries="2")
        assert (status != 0, tree.objects()) == (True, []), said
        assert (tree.folder / "model.bin").read_bytes() == File(content, is_lfs=True).pointer
        hub.faults.clear()
        now = mirror.fills.store.clock
        mirror.fills.store.clock = lambda: now() + 3600
        await tree.pull()
        assert tree.has("model.bin", content)


async def test_a_client_that_was_cut_for_wrong_bytes_goes_on_to_right_ones(hub: Hub, tmp_path: Path) -> None:
    """It has streamed a wrong prefix when the mirror finds out, and keeps it; nothing has to be deleted by hand."""
    publish(hub)
    hub.cap(total=1.2 * MIB)
    wrong = hub.faults.add(Fault.corrupt(at=1000), on="cdn", times=1)
    async with mirror_of(hub, tmp_path) as mirror:
        tree = await clone(tmp_path, f"{mirror.url}/org/m", {"model.bin": WEIGHTS})
        pulling = asyncio.ensure_future(tree.pull(transfer_maxretries="2"))
        await hub.until(lambda: hub.counters.bytes("cdn") >= WEIGHTS.size)
        hub.cap()
        await pulling
        assert (wrong.hits, tree.has("model.bin", WEIGHTS)) == (1, True)
        outcomes = served(mirror)
        assert outcomes[0].startswith("cut") and outcomes[-1] == "200", outcomes


async def test_what_a_mirror_does_not_take(hub: Hub, tmp_path: Path) -> None:
    """Locks there are none, and a push says in words where to go."""
    publish(hub)
    async with mirror_of(hub, tmp_path) as mirror:
        tree = await clone(tmp_path, f"{mirror.url}/org/m", {})
        assert await tree.must("lfs", "locks") == ""
        (tree.folder / "own.bin").write_bytes(b"mine")
        await tree.must("add", "own.bin")
        status, said = await tree("lfs", "push", "--object-id", "origin", *_oids(await tree.must("lfs", "ls-files", "-l")))
        assert (status != 0, "read-only mirror" in said) == (True, True), said


def _oids(said: str) -> list[str]:
    return re.findall(r"^[0-9a-f]{64}", said, re.MULTILINE)
