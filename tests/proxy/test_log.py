"""The transparency log: what becomes a leaf, what survives a process that dies anywhere, and what auditors see of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tlog_scales.signing import Vkey
from tlog_scales.tlog import Checkpoint as OtherCheckpoint
from tlog_scales.tlog import InclusionProof

from nearhub import proving
from nearhub.catalog import Catalog
from nearhub.cli import main
from nearhub.errors import BadProof, StoreFailed, StoreFull, StoreRefused
from nearhub.metrics import Metrics
from nearhub.signatures import Signer
from nearhub.store.disk import Disk
from nearhub.store.index import Index
from nearhub.store.log import TransparencyLog, proven
from nearhub.wire.leaves import Leaf, is_blinded, opened
from nearhub.wire.manifest import Entry, read_tree
from nearhub.wire.target import Scope
from nearhub.wire.tlog import ENTRIES, WIDTH, Checkpoint, LogKey, Proof, TileId, edge, pack, proofs_in, subtree
from tests.faults.audit import LogAudit
from tests.hub import LFS, Content, Hub, User
from tests.mirror import Mirror, configure, running
from tests.proxy.test_catalog import NEW, OLD, OTHER, REPO, file, info, lfs
from tests.proxy.test_tlog import PRIVATE, Tiles

HIDDEN = replace(REPO, name="lab/secret", scope=Scope.RESTRICTED)


def opened_log(folder: Path, index: Index, at: str = "log", **more: Any) -> TransparencyLog:
    log = TransparencyLog(folder / at, index, **more)
    log.adopt()
    return log


def record(index: Index, log: TransparencyLog, numbers: Iterable[int]) -> None:
    """A leaf each, of a commit of that number."""
    with index.transaction():
        for number in numbers:
            log.record(REPO, f"{number:040x}", [file("a")], "https://hub")


@pytest.fixture
def log(tmp_path: Path, index: Index) -> TransparencyLog:
    return opened_log(tmp_path, index)


@pytest.fixture
def catalog(index: Index, log: TransparencyLog) -> Catalog:
    return Catalog(index, Metrics(), record=log)


def leaves(entries: list[bytes]) -> list[tuple[str, str, str, list[str]]]:
    told = [Leaf.decode(entry) for entry in entries]
    return [(leaf.repo, leaf.commit, leaf.upstream, sorted(leaf.files)) for leaf in told]


class TestLeaves:
    async def test_what_is_recorded_is_logged_once(self, tmp_path: Path, catalog: Catalog, log: TransparencyLog) -> None:
        """A file that is told again, or with git's name of it, is no new leaf; another commit is; directories are none."""
        look = LogAudit(tmp_path / "log").look
        assert look() == []
        await catalog.note_info(replace(info(file("a"), lfs("b")), source="https://hub"))
        await catalog.note_entries(REPO, OLD, [file("a"), lfs("b", oid="3" * 40), Entry("dir", oid="4" * 40)], "https://hub")
        await log.integrate()
        await catalog.note_entries(REPO, NEW, [file("a")], "https://other")
        await catalog.note_entries(OTHER, OLD, [file("x")], "https://hub")
        await log.integrate()
        assert leaves(look()) == [
            ("org/m", OLD, "https://hub", ["a", "b"]),
            ("org/m", NEW, "https://other", ["a"]),
            ("datasets/org/m", OLD, "https://hub", ["x"]),
        ]

    async def test_a_path_that_no_url_can_name_is_not_listed_and_fits_no_leaf(self) -> None:
        """Nor may an upstream make entries that are longer than a log's can be."""
        [entry] = read_tree([{"type": "file", "path": name, "oid": "1" * 40, "size": 1} for name in ("é" * 2048, "é" * 2049)])
        assert entry.path == "é" * 2048

    async def test_an_alarm_is_no_leaf(self, tmp_path: Path, catalog: Catalog, log: TransparencyLog) -> None:
        await catalog.note_entries(REPO, OLD, [file("a", "1")])
        await catalog.note_entries(REPO, OLD, [file("a", "2")])
        await log.integrate()
        assert len(LogAudit(tmp_path / "log").look()) == 1

    async def test_a_thousand_files_are_a_few_leaves(self, tmp_path: Path, catalog: Catalog, log: TransparencyLog) -> None:
        await catalog.note_entries(REPO, OLD, [file(f"folder/file-{n:04d}.txt") for n in range(1000)])
        await log.integrate()
        told = leaves(LogAudit(tmp_path / "log").look())
        assert len(told) == 3 and sum(len(paths) for *_, paths in told) == 1000

    async def test_a_repo_that_is_not_public_is_named_nowhere(
        self, tmp_path: Path, catalog: Catalog, log: TransparencyLog
    ) -> None:
        """Not in any file of the log, nor are two commits of it alike; who is given its proof can check it."""
        await catalog.note_entries(HIDDEN, OLD, [file("a")], "https://hub")
        await catalog.note_entries(HIDDEN, NEW, [file("a")], "https://hub")
        await log.integrate()
        one, two = LogAudit(tmp_path / "log").look()
        assert is_blinded(one) and is_blinded(two) and one != two
        for path in (tmp_path / "log").rglob("*"):
            assert not path.is_file() or b"secret" not in path.read_bytes()
        [proof] = await log.proofs(HIDDEN, OLD)
        assert proven(proof, log.key).size == 2
        assert opened(proof.extra)[0].repo == "lab/secret"
        assert await log.proofs(replace(HIDDEN, scope=Scope.PUBLIC), OLD) == []


class DyingDisk(Disk):
    """Dies before or after its n-th call that changes the disk: what follows is never done."""

    def __init__(self, calls: int, *, is_full: bool = False) -> None:
        self._left = calls
        self._is_full = is_full
        self._loop = asyncio.get_running_loop()
        self.died = asyncio.Event()

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            self._loop.call_soon_threadsafe(self.died.set)
            raise (StoreFull if self._is_full else StoreFailed)("the disk died")

    def write_at(self, *asked: Any) -> None:
        self._count()
        super().write_at(*asked)

    def rename(self, *asked: Any) -> None:
        self._count()
        super().rename(*asked)

    def sync_file(self, *asked: Any) -> None:
        self._count()
        super().sync_file(*asked)

    def unlink(self, *asked: Any) -> None:
        self._count()
        super().unlink(*asked)


class TestDeath:
    async def test_a_death_at_any_call_loses_no_leaf_doubles_none_and_shows_no_second_tree(
        self, tmp_path: Path, index: Index
    ) -> None:
        """A process dies at its n-th call, n = 0, 1, 2, …; the next one goes on, with more leaves, and dies later."""
        recorded, look = 0, LogAudit(tmp_path / "log").look
        opened_log(tmp_path, index)
        trees: dict[int, bytes] = {}
        for calls in itertools.count():
            log = opened_log(tmp_path, index, disk=DyingDisk(calls % 14))
            count = 90 if calls % 3 else 1  # past full tiles, and one by one
            record(index, log, range(recorded, recorded + count))
            recorded += count
            with contextlib.suppress(StoreFailed):
                await log.integrate()
            entries = look()
            root = (tmp_path / "log" / "checkpoint").read_bytes().split(b"\n")[2]
            assert trees.setdefault(len(entries), root) == root
            assert [Leaf.decode(entry).commit for entry in entries] == [f"{n:040x}" for n in range(len(entries))]
            if recorded > 1100:
                break
        log = opened_log(tmp_path, index)
        await log.integrate()
        assert len(look()) == recorded
        log._sweep()
        left = {str(path.relative_to(tmp_path / "log")) for path in (tmp_path / "log").rglob("*.p/*")}
        assert left == {str(tile) for tile in edge(recorded)}

    async def test_a_row_that_a_dead_process_left_behind_its_checkpoint_is_no_second_leaf(
        self, tmp_path: Path, index: Index, catalog: Catalog, log: TransparencyLog
    ) -> None:
        await catalog.note_entries(REPO, OLD, [file("a")])
        rows = index.scan("leaf ")
        await log.integrate()
        index.put_many(rows)
        again = opened_log(tmp_path, index)
        await again.integrate()
        assert again.size == 1 and index.scan("leaf ") == []

    async def test_a_full_disk_is_waited_for(self, tmp_path: Path, index: Index) -> None:
        """The mirror goes on, and the leaves stay in the index."""
        opened_log(tmp_path, index)
        disk = DyingDisk(0, is_full=True)
        log = opened_log(tmp_path, index, disk=disk)
        await Catalog(index, Metrics(), record=log).note_entries(REPO, OLD, [file("a")])
        log.start(Catalog(index, Metrics(), record=log).record_known)
        async with asyncio.timeout(30):
            await disk.died.wait()
        await log.close()
        assert len(index.scan("leaf ")) == 1 and log.size == 0


class TestOpening:
    async def test_an_older_log_put_back_is_refused(self, tmp_path: Path, index: Index) -> None:
        """It would give numbers that were given already: two trees of one size."""
        log = opened_log(tmp_path, index)
        before = (tmp_path / "log" / "checkpoint").read_bytes()
        await Catalog(index, Metrics(), record=log).note_entries(REPO, OLD, [file("a")])
        await log.integrate()
        (tmp_path / "log" / "checkpoint").write_bytes(before)
        with pytest.raises(StoreRefused, match="has 0 leaves, and 1 were logged: an older log was put back"):
            opened_log(tmp_path, index)

    async def test_a_log_moved_away_begins_anew_under_another_key_with_what_waits(self, tmp_path: Path, index: Index) -> None:
        log = opened_log(tmp_path, index)
        catalog = Catalog(index, Metrics(), record=log)
        await catalog.note_entries(REPO, OLD, [file("a")])
        await log.integrate()
        await catalog.note_entries(REPO, NEW, [file("b")])
        (tmp_path / "log").rename(tmp_path / "aside")
        again = opened_log(tmp_path, index)
        await again.integrate()
        assert again.key != log.key and again.size == 1
        assert leaves(LogAudit(tmp_path / "log").look()) == [("org/m", NEW, "", ["b"])]

    async def test_what_was_known_before_the_log_began_is_caught_up_with(self, tmp_path: Path, index: Index) -> None:
        """Once: an index of an earlier version, with two commits; without a word of who said so. So for a log moved away."""
        old = Catalog(index, Metrics())
        await old.note_info(info(file("a"), lfs("b")))
        await old.note_info(info(file("a"), repo=HIDDEN))
        for folder in ("log", "log-2"):
            log = opened_log(tmp_path, index, at=folder)
            catalog = Catalog(index, Metrics(), record=log)
            await catalog.note_entries(OTHER, NEW, [file(folder)], "https://hub")
            for _ in range(2):
                await catalog.record_known()
                await log.integrate()
            entries = LogAudit(tmp_path / folder).look()
            assert leaves([entry for entry in entries if not is_blinded(entry)]) == [
                ("datasets/org/m", NEW, "https://hub", [folder]),
                ("org/m", OLD, "", ["a", "b"]),
            ]
            assert len(entries) == 3 and len(await log.proofs(HIDDEN, OLD)) == 1

    async def test_a_new_index_goes_on_where_the_log_is(self, tmp_path: Path, index: Index) -> None:
        log = opened_log(tmp_path, index)
        await Catalog(index, Metrics(), record=log).note_entries(REPO, OLD, [file("a")])
        await log.integrate()
        look = LogAudit(tmp_path / "log").look
        look()
        fresh = Index(tmp_path / "other")
        try:
            again = opened_log(tmp_path, fresh)
            await Catalog(fresh, Metrics(), record=again).note_entries(REPO, OLD, [file("a")])
            await again.integrate()
        finally:
            fresh.close()
        assert len(look()) == 2

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("key", None, "is gone, and the log goes on under no other"),
            ("key", b"nonsense", "no Ed25519 key in PEM: put it back"),
            ("vkey", b"nonsense", "no public key of a log"),
            ("vkey", str(LogKey("nearhub/x", b"x" * 32)).encode(), "is not the public half of"),
            ("checkpoint", b"nonsense", "no signed note"),
            ("checkpoint", None, "is gone: put it back from a backup"),
            ("tile/0/000.p/1", b"x" * 32, "its tiles are not those of its checkpoint"),
            ("tile/0/000.p/1", None, "No such file"),
            ("tile/entries/000.p/1", b"\0\1", "cut short"),
        ],
    )
    async def test_damage_is_refused_in_words(
        self, tmp_path: Path, index: Index, name: str, content: bytes | None, message: str
    ) -> None:
        log = opened_log(tmp_path, index)
        await Catalog(index, Metrics(), record=log).note_entries(REPO, OLD, [file("a")])
        await log.integrate()
        path = tmp_path / "log" / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(StoreRefused, match=message) as caught:
            opened_log(tmp_path, index)
        assert "to begin a new log" in caught.value.message

    def test_a_log_keeps_its_name_and_its_key_to_itself(self, tmp_path: Path, index: Index) -> None:
        log = opened_log(tmp_path, index, origin="mirror.example/-/log")
        assert log.key.name == "mirror.example/-/log"
        assert (tmp_path / "log" / "key").stat().st_mode & 0o777 == 0o600
        assert opened_log(tmp_path, index).key == log.key
        with pytest.raises(StoreRefused, match=r"is called mirror\.example/-/log, for ever"):
            opened_log(tmp_path, index, origin="other")


class TestCarried:
    async def test_proofs_cross_an_air_gap(self, tmp_path: Path, index: Index, catalog: Catalog, log: TransparencyLog) -> None:
        """Kept where they arrive, by their log's key; a later bundle's checkpoint takes the place of an earlier."""
        await catalog.note_entries(REPO, OLD, [file("a")], "https://hub")
        early = await log.carried([(REPO, OLD)])
        await catalog.note_entries(OTHER, NEW, [file("b")], "https://hub")
        late = await log.carried([(REPO, OLD), (OTHER, NEW), (OTHER, OLD)])
        far = Index(tmp_path / "far-index")
        try:
            there = TransparencyLog(tmp_path / "far", far)
            assert [opened(proof.extra)[0].repo for proof in there.keep_foreign(late, log.key)] == ["org/m", "datasets/org/m"]
            there.keep_foreign(early)
            [home] = (tmp_path / "far" / "foreign").iterdir()
            assert LogKey.from_text((home / "vkey").read_text()) == log.key
            assert (home / "checkpoint").read_text() == log.checkpoint
            kept = [Proof.from_text(path.read_text()) for path in sorted((home / "proofs").iterdir())]
            assert {opened(proof.extra)[0].repo for proof in kept} == {"org/m", "datasets/org/m"}
            (tmp_path / "twin").mkdir()
            (tmp_path / "twin" / "key").write_bytes((tmp_path / "log" / "key").read_bytes())
            twin = opened_log(tmp_path / "twin", far, at="")
            await Catalog(far, Metrics(), record=twin).note_entries(REPO, OLD, [file("x"), file("y")])
            await Catalog(far, Metrics(), record=twin).note_entries(OTHER, OLD, [file("z")])
            assert twin.key == log.key
            with pytest.raises(BadProof, match="shows two trees of 2 leaves: it was rewritten"):
                there.keep_foreign(await twin.carried([(REPO, OLD)]))
            for wrong, message in (
                (late.replace(b"index 1", b"index 0"), "leaf 0"),
                (b"\xff", "no text"),
                (late[:-30], "signed note|base64|wrong signature"),
            ):
                with pytest.raises(BadProof, match=message):
                    there.keep_foreign(wrong)
            with pytest.raises(BadProof, match="not the trusted one"):
                there.keep_foreign(late, there.key)
        finally:
            far.close()


async def test_a_running_mirror_brings_its_leaves_into_the_log_by_itself(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Soon after they were heard, and those that the last process left when it starts."""
    cache = tmp_path / "cache"
    async with running(configure(cache, [hub.url], [hub.cdn_host])) as mirror:
        desk = Desk(mirror, capsys)
        for size, name in enumerate(("org/a", "org/b"), 1):
            hub.repo(name).commit({"a": name.encode()})
            assert (await desk.get(f"/{name}/resolve/main/a"))[0] == 200
            await desk.size(size)
    index = Index(cache / "index")
    try:
        record(index, opened_log(cache, index), range(3))
    finally:
        index.close()
    async with running(configure(cache, [hub.url], [hub.cdn_host])) as mirror:
        await Desk(mirror, capsys).size(5)


async def test_a_private_repo_that_somebody_used_is_in_the_log_without_its_name(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither name, commit nor hash are on an open route; the operator proves it all the same, and the proof shows it."""
    commit = hub.repo("lab/hidden", private=True).commit({"plan.txt": b"secret"})
    hub.users["hf_alice"] = User("alice", {"lab/hidden"})
    cache = tmp_path / "cache"
    async with running(configure(cache, [hub.url], [hub.cdn_host])) as mirror:
        desk = Desk(mirror, capsys)
        assert (await desk.get("/lab/hidden/resolve/main/plan.txt", token="hf_alice"))[:2] == (200, b"secret")
        await desk.size(1)
        shown = b"".join(
            [(await desk.get(f"/-/log/{path}"))[1] for path in ("tile/entries/000.p/1", "tile/0/000.p/1", "checkpoint")]
        )
        for word in ("hidden", "lab", "plan", str(commit), hashlib.sha1(b"blob 6\0secret").hexdigest(), "hf_alice"):
            assert word.encode() not in shown
        proof = await desk.run("log", "prove", "--cache-dir", str(cache), "lab/hidden", "plan.txt")
        (tmp_path / "proof").write_text(proof)
        verified = await desk.run("log", "verify", "--cache-dir", str(cache), str(tmp_path / "proof"))
        assert f"lab/hidden@{commit}: 1 files: leaf 0" in verified


class Desk:
    """A mirror of a stand-in Hub with two public repos, and the command line."""

    def __init__(self, mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
        self.mirror, self._capsys = mirror, capsys

    async def run(self, *arguments: str, status: int = 0) -> str:
        """`nearhub …`; what it printed."""
        self._capsys.readouterr()
        got = await asyncio.to_thread(main, arguments)
        output = "".join(self._capsys.readouterr())
        assert got == status, output
        return output

    async def size(self, size: int) -> None:
        """Until the log shows that many leaves."""
        async with asyncio.timeout(30):
            while (await self.get("/-/log/checkpoint"))[1].split(b"\n")[1] != b"%d" % size:
                pass

    async def get(self, path: str, method: str = "GET", token: str = "") -> tuple[int, bytes, Any]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.request(method, self.mirror.url + path) as response,
        ):
            return response.status, await response.read(), response.headers


@pytest.mark.parametrize("prefix", ["", "/hf"])
async def test_a_mirror_shows_its_log_and_proves_what_it_was_told(
    tmp_path: Path, hub: Hub, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for a file, it has a leaf for its repo's commit; the proof is checked by this and by another implementation."""
    commit = hub.repo("org/m").commit({"config.json": b"{}", "model.bin": LFS(Content(1000, seed=1))})
    cache = tmp_path / "cache"
    async with running(configure(cache, [hub.url], [hub.cdn_host], SERVER_PREFIX=prefix)) as mirror:
        desk = Desk(mirror, capsys)
        empty = (await desk.get("/-/log/checkpoint"))[1]
        (tmp_path / "empty").write_bytes(empty)
        assert empty.split(b"\n")[1] == b"0"
        assert (await desk.get("/org/m/resolve/main/config.json"))[0] == 200
        here = ("--cache-dir", str(cache))
        proofs = await desk.run("log", "prove", *here, "org/m", "model.bin")
        told = json.loads(await desk.run("log", "prove", *here, "org/m@main", "--json"))
        assert told["proofs"][0]["leaf"]["files"] == {
            "config.json": {"git": hashlib.sha1(b"blob 2\0{}").hexdigest(), "size": 2},
            "model.bin": {"lfs": Content(1000, seed=1).sha256, "size": 1000},
        }
        assert (told["proofs"][0]["leaf"]["upstream"], told["proofs"][0]["leaf"]["commit"]) == (hub.url, str(commit))

        # What the log shows to everybody, and how it may be cached.
        status, _, headers = await desk.get("/-/log/checkpoint")
        assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        assert "no-cache" in headers["Cache-Control"]
        for path in ("tile/0/000.p/1", "tile/entries/000.p/1"):
            status, _, headers = await desk.get(f"/-/log/{path}")
            assert (status, headers["Content-Type"]) == (200, "application/octet-stream")
            assert "immutable" in headers["Cache-Control"]
            assert (await desk.get(f"/-/log/{path}", "HEAD"))[:2] == (200, b"")
        for path in ("tile/0/000", "tile/0/000.p/2", "tile/1/000.p/1", "key", "..%2fkey", "foreign/x", "tile/0/x"):
            status, _, headers = await desk.get(f"/-/log/{path}")
            assert status == 404 and "the log has no" in headers["X-Error-Message"]

        assert (await desk.get("/-/log/checkpoint", "POST"))[0] == 405

        # The proof, by tlog-scales.
        key = (await desk.get("/-/log/vkey"))[1].decode().strip()
        [proof] = proofs_in(proofs)
        other = OtherCheckpoint.from_text(proof.checkpoint)
        other.verify(Vkey.from_string(key))
        leaf = hashlib.sha256(b"\0" + opened(proof.extra)[1]).digest()
        InclusionProof(proof.index, other.size, list(proof.hashes)).check(leaf, other.root_hash)

        # And by the verb: on the cache, over HTTP, and with nothing but files.
        (tmp_path / "proof").write_text(proofs)
        assert (await desk.run("log", "key", *here)).strip() == key
        assert "all right" in await desk.run("log", "verify", *here)
        url = f"{mirror.url}/-/log"
        since = ("--since", str(tmp_path / "empty"))
        output = await desk.run("log", "verify", "--log", url, "--key", key, *since, str(tmp_path / "proof"))
        assert f"org/m@{commit}: 2 files: leaf 0" in output and "goes on from the 0 leaves" in output
        nowhere = ("--cache-dir", str(tmp_path / "none"))
        assert "all right" in await desk.run("log", "verify", *nowhere, "--key", key, str(tmp_path / "proof"))
        assert "whose log is it?" in await desk.run("log", "verify", *nowhere, str(tmp_path / "proof"), status=1)
        assert "nothing about org/never@main" in await desk.run("log", "prove", *here, "org/never", status=1)
        assert "nothing about absent of org/m@main" in await desk.run("log", "prove", *here, "org/m", "absent", status=1)
    assert json.loads(await desk.run("log", "prove", *here, "org/m", "--json"))["proofs"] == told["proofs"]


class TestAudit:
    @pytest.fixture
    async def shown(self, tmp_path: Path, index: Index, log: TransparencyLog) -> Path:
        record(index, log, range(300))
        await log.integrate()
        return tmp_path / "log"

    async def test_a_log_cut_back_or_rewritten_is_found(self, tmp_path: Path, shown: Path, log: TransparencyLog) -> None:
        """By the checkpoint that an auditor kept, and by a proof that he was given."""
        early, [proof] = log.checkpoint, await log.proofs(REPO, f"{299:040x}")
        fresh = Index(tmp_path / "forged-index")
        try:
            (tmp_path / "forged").mkdir()
            for name in ("key", "vkey"):
                (tmp_path / "forged" / name).write_bytes((shown / name).read_bytes())
            forged = TransparencyLog(tmp_path / "forged", fresh)
            forged.append([b"x"] * 10)
            for since, proofs in ((early, ""), ("", str(proof))):
                with pytest.raises(BadProof, match=r"and the log at .* has 10: it was cut back"):
                    proving.verify(proving.shown_at(str(tmp_path / "forged")), log.key, since=since, proofs=proofs)
            forged.append([b"x"] * 300)
            for since, proofs in ((early, ""), ("", str(proof))):
                with pytest.raises(BadProof, match="does not begin with that of 300: the log was rewritten"):
                    proving.verify(proving.shown_at(str(tmp_path / "forged")), log.key, since=since, proofs=proofs)
        finally:
            fresh.close()
        assert proving.verify(proving.shown_at(str(shown)), log.key, since=early)["since"] == 300

    @pytest.mark.parametrize(
        "tile", ["tile/entries/000", "tile/entries/001.p/44", "tile/0/000", "tile/0/001.p/44", "tile/1/000.p/1"]
    )
    async def test_one_bit_anywhere_in_the_log_is_found(self, shown: Path, log: TransparencyLog, tile: str) -> None:
        assert proving.verify(proving.shown_at(str(shown)), log.key)["size"] == 300
        path = shown / tile
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(BadProof):
            proving.verify(proving.shown_at(str(shown)), log.key)

    def test_a_tile_that_no_root_is_made_of_is_checked_too(self) -> None:
        """Of 66,000 leaves, the full tile at level 1: only the one above it says what it makes."""
        tree, size, signer = Tiles(66_000), 66_000, Signer("log", PRIVATE)
        note = str(signer.sign(str(Checkpoint("log", size, subtree(0, size, tree.nodes(size))))))
        for number in range(258):
            numbers = range(number * WIDTH, min(size, (number + 1) * WIDTH))
            tree[TileId(ENTRIES, number, len(numbers))] = pack(b"%d" % n for n in numbers)
        shown = proving.Shown("memory", note, tree.__getitem__)
        assert proving.verify(shown, signer.key)["size"] == size
        tree[TileId(1, 0)] = tree[TileId(1, 0)][:-1] + b"x"
        with pytest.raises(BadProof, match="tile/1/000 of the log at memory is not what the tiles below it make"):
            proving.verify(shown, signer.key)

    async def test_a_log_that_grew_while_it_is_read(self, shown: Path, index: Index, log: TransparencyLog) -> None:
        """Its partial tiles are gone by then, and cut from what they grew to; every earlier width is served."""
        look = proving.shown_at(str(shown))
        widths = {width: log.read(TileId(0, 1, width)) for width in (1, 43, 44)}
        for numbers in (range(300, 311), range(311, 700)):
            record(index, log, numbers)
            await log.integrate()
            assert proving.verify(look, log.key)["size"] == 300
            assert {width: log.read(TileId(0, 1, width)) for width in widths} == widths
        assert log.read(TileId(0, 2, 189)) is None and log.read(TileId(0, 2, 188)) is not None
