"""What a bundle must not do to the cache that imports it: damage, tricks, older news, contradictions, a death in the middle."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nearhub.bundle import format as fmt
from nearhub.bundle import signing
from nearhub.bundle.exporter import Exporter
from nearhub.bundle.importer import Importer
from nearhub.bundle.intake import SMALL
from nearhub.bundle.parts import sums
from nearhub.catalog import Catalog, Delivery, Manifest, Ref, Seen
from nearhub.errors import BundleRefused, NearhubError, StoreFull
from nearhub.metrics import Metrics
from nearhub.store.bares import BareStore
from nearhub.store.blobs import BlobStore
from nearhub.store.eviction import DiskSpace, Space
from nearhub.store.holdings import Holdings
from nearhub.store.index import Index
from nearhub.store.layout import open_cache
from nearhub.store.log import TransparencyLog, proven
from nearhub.store.site_bodies import SiteBodies
from nearhub.wire.headers import BlobId
from nearhub.wire.leaves import opened, opening
from nearhub.wire.manifest import Entry, RepoInfo, Visibility, entry_row
from nearhub.wire.target import Repo, RepoKind, Scope
from nearhub.wire.tlog import proofs_in
from tests.hub import Content
from tests.proxy.clock import Clock

REPO = Repo(RepoKind.MODELS, "org/m")
KEY = signing.new_key()
HUB = "https://huggingface.co"


class Lab:
    """A cache on disk, with no mirror: what is exported from it, and imported into it."""

    def __init__(self, root: Path, keys: tuple[signing.PublicKey, ...] = ()) -> None:
        self.clock = Clock()
        self._cache = open_cache(root)
        self.root = root
        self.index = Index(self._cache.index)
        self.metrics = Metrics()
        self.record = TransparencyLog(self._cache.log, self.index)
        self.record.adopt()
        self.catalog = Catalog(self.index, self.metrics, self.clock, record=self.record)
        self.holdings = Holdings(BlobStore(root), BareStore(self._cache.git), SiteBodies(self._cache.sites))
        self.holdings.blobs.recover()
        self.exporter = Exporter(self.catalog, self.index, self.holdings, self.record, [HUB], self.clock)
        self.importer = Importer(self.catalog, self.index, self.holdings, self.record, keys, HUB, None, self.clock)

    async def put(self, files: dict[str, Content], commit: str = "c" * 40, *, repo: Repo = REPO, ref: str = "main") -> None:
        """A public repo at a commit, all of whose files are here."""
        entries = []
        for path, content in sorted(files.items()):
            blob = BlobId.from_etag(content.sha256)
            entries.append(Entry(path, content.size, None, blob))
            with self.holdings.blobs.incoming(str(blob)) as incoming:
                os.write(incoming.fd, content.bytes())
                self.holdings.blobs.seal(incoming)
                self.holdings.blobs.adopt([(incoming, blob)])
        manifest = Manifest({"id": repo.name}, has_files=True, learnt_at=self.clock(), count=len(entries))
        refs, seen = {ref: Ref(commit, self.clock())}, Seen(Visibility(), self.clock())
        assert await self.catalog.deliver(Delivery(repo, commit, manifest, tuple(entries), refs, seen), [Scope.PUBLIC]) is None

    async def export(self, to: Path, *repos: tuple[Repo, str], **how: Any) -> dict[str, Any]:
        self.clock.now += 10
        return await last(self.exporter.run(repos or [(REPO, "main")], to, **how))

    async def take(self, bundle: Path, **how: bool) -> dict[str, Any]:
        return await last(self.importer.run(bundle, **how))

    async def seen(self) -> dict[str, str]:
        """path → etag of all that is visible of the repo at main; {} when nothing is."""
        ref = await self.catalog.ref(REPO, "main")
        if ref is None or await self.catalog.seen(REPO) is None:
            return {}
        return {e.path: e.blob.hex for e in await self.catalog.listing(REPO, ref.commit, recursive=True) if e.blob}

    def close(self) -> None:
        self.index.close()
        self._cache.close()


async def last(lines: Any) -> dict[str, Any]:
    """The result of a verb."""
    async with aclosing(lines):
        return dict([line async for line in lines][-1]["result"])


@pytest.fixture
async def out(tmp_path: Path) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path / "out")
    yield lab
    lab.close()


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path / "in")
    yield lab
    lab.close()


def blobs_in(root: Path) -> list[Path]:
    return [path for path in (root / "blobs").rglob("*") if path.is_file()]


def reseal(folder: Path, text: bytes, key: signing.SecretKey | None = None) -> None:
    """As somebody would who may write what he likes."""
    signature = signing.sign(key, text, "x") if key else None
    (folder / fmt.MANIFEST).write_bytes(text)
    parts = [fmt.Part(*part) for part in json.loads(text)["parts"]]
    (folder / "SHA256SUMS").write_bytes(sums(text, signature, parts))
    if signature is not None:
        (folder / fmt.SIGNATURE).write_bytes(signature)


def edited(folder: Path, **fields: Any) -> bytes:
    document = json.loads((folder / fmt.MANIFEST).read_bytes()) | fields
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


# — damage —————————————————————————————————————————————————————————————————————————————————————————


@pytest.mark.parametrize("is_signed", [True, False])
async def test_a_flipped_bit_anywhere_is_found_and_nothing_becomes_visible(tmp_path: Path, out: Lab, is_signed: bool) -> None:
    """In every byte of every file of a bundle, whether or not it is signed. Then the whole one is taken."""
    await out.put({"a": Content(40, seed=1), "b": Content(30, seed=2)})
    secret = tmp_path / "key"
    secret.write_text(signing.secret_file(KEY))
    await out.export(tmp_path / "b", key=secret if is_signed else None)
    there = Lab(tmp_path / "in", (KEY.public,) if is_signed else ())
    files = sorted((tmp_path / "b").iterdir())
    assert len(files) == 3 + is_signed
    for file in files:
        whole = file.read_bytes()
        for position in range(len(whole)):
            bit = 1 << (position * 7 + len(whole)) % 8
            file.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            for blob in blobs_in(there.root):  # what is here already is not read again
                blob.unlink()
            with pytest.raises(BundleRefused, match=None if is_signed else "damaged"):
                await there.take(tmp_path / "b")
        file.write_bytes(whole)
        assert await there.seen() == {}
    await there.take(tmp_path / "b")
    assert await there.seen() == await out.seen() != {}
    there.close()


async def test_a_missing_short_long_or_damaged_part_is_named(tmp_path: Path, out: Lab, there: Lab) -> None:
    """Each by its name; a link or a device in its place too. What was right in the others stays, and helps the next try."""
    await out.put({"large": Content(3_000_000, seed=3), "small": Content(10, seed=4)})
    await out.export(tmp_path / "b", max_part=1024**2)
    part = tmp_path / "b" / "part-0002.bin"
    whole = part.read_bytes()

    async def refused(why: str) -> None:
        with pytest.raises(BundleRefused, match=why):
            await there.take(tmp_path / "b")
        assert await there.seen() == {}

    part.unlink()
    await refused("not whole: part-0002.bin is missing")
    part.write_bytes(whole[:-1])
    await refused("part-0002.bin is cut short")
    part.write_bytes(whole + b"x")
    await refused("part-0002.bin is too long")
    part.unlink()
    part.symlink_to(tmp_path / "b" / "part-0001.bin")
    await refused("part-0002.bin is a link")
    part.unlink()
    part.mkdir()
    await refused("part-0002.bin")
    part.rmdir()
    os.mkfifo(part)
    await refused("part-0002.bin is not a regular file")
    part.unlink()
    part.write_bytes(whole[:500] + bytes([whole[500] ^ 4]) + whole[501:])
    await refused("damaged: part-0002.bin is damaged$")
    with pytest.raises(BundleRefused, match=r"damaged: part-0002.bin is damaged$"):
        await there.take(tmp_path / "b", check=True)
    assert there.holdings.blobs.path_of(BlobId.from_etag(Content(10, seed=4).sha256)).exists()
    part.write_bytes(whole)
    assert (await there.take(tmp_path / "b", check=True))["checked_only"]
    assert await there.seen() == {}
    await there.take(tmp_path / "b")
    assert await there.seen() == await out.seen()


async def test_content_that_is_not_what_it_is_called_is_refused_though_all_sums_are_right(
    tmp_path: Path, out: Lab, there: Lab
) -> None:
    """Somebody who writes whatever he likes, sums and all, cannot make other bytes pass for a blob."""
    await out.put({"a": Content(100, seed=1)})
    await out.export(tmp_path / "b")
    evil = Content(100, seed=66)
    items = json.loads((tmp_path / "b" / fmt.MANIFEST).read_bytes())["items"][:1]
    (tmp_path / "b" / "part-0001.bin").write_bytes(evil.bytes())
    reseal(tmp_path / "b", edited(tmp_path / "b", parts=[["part-0001.bin", 100, evil.sha256]], items=items, proofs=[]))
    with pytest.raises(BundleRefused, match="made wrong: not what it is called: blob"):
        await there.take(tmp_path / "b")
    assert await there.seen() == {} and not blobs_in(there.root)


async def test_what_the_exporting_log_proves_is_checked_and_kept(tmp_path: Path, out: Lab, there: Lab) -> None:
    """An auditor inside finds the key, the checkpoint and the proofs of the cache outside, and they hold."""
    await out.put({"a": Content(100, seed=1), "b": Content(50, seed=2)})
    await out.export(tmp_path / "b")
    await there.take(tmp_path / "b")
    (home,) = (there.root / "log" / "foreign").iterdir()
    assert (home / "vkey").read_text() == f"{out.record.key}\n" and (home / "checkpoint").read_text() == out.record.checkpoint
    (kept,) = (home / "proofs").iterdir()
    (proof,) = proofs_in(kept.read_text())
    leaf, _ = opened(proof.extra)
    assert proven(proof, out.record.key).size == out.record.size == 1
    assert {path: named.blob.hex for path, named in leaf.files.items()} == await there.seen()


async def test_proofs_that_do_not_hold_or_say_something_else_stop_a_bundle(tmp_path: Path, out: Lab, there: Lab) -> None:
    """Though all its sums are right: a leaf that is in no tree, and one of which the bundle says something else."""
    await out.put({"a": Content(100, seed=1)})
    await out.export(tmp_path / "b")
    part = tmp_path / "b" / "part-0001.bin"
    content, proof = part.read_bytes()[:100], part.read_bytes()[100:]
    key, _, text = proof.decode().partition("\n")
    (right,) = proofs_in(text)
    other = replace(right, extra=opening(opened(right.extra)[0].encode().replace(b'"size":100', b'"size":101')))
    for what, why in ((f"{key}\n{other}".encode(), "do not hold"), (proof, "as the exporting log has it")):
        part.write_bytes(content + what)
        document = json.loads((tmp_path / "b" / fmt.MANIFEST).read_bytes())
        name = hashlib.sha256(what).hexdigest()
        items = [document["items"][0], ["proof", name, len(what)]]
        parts = [["part-0001.bin", 100 + len(what), hashlib.sha256(content + what).hexdigest()]]
        repos = document["repos"]
        if what == proof:
            repos[0]["revisions"][0]["entries"][0][0] = "z"
        reseal(tmp_path / "b", edited(tmp_path / "b", items=items, parts=parts, proofs=[["log", name]], repos=repos))
        with pytest.raises(BundleRefused, match=why):
            await there.take(tmp_path / "b")
        assert await there.seen() == {}


async def test_a_half_written_bundle_is_none(tmp_path: Path, out: Lab, there: Lab) -> None:
    """The manifest comes last; and an export into what a killed one left behind is whole."""
    await out.put({"a": Content(3_000_000, seed=1)})
    lines = out.exporter.run([(REPO, "main")], tmp_path / "b", max_part=1024**2)
    async with aclosing(lines):
        assert await anext(lines) == {"done": 3_000_000, "of": 3_000_000}
    assert sorted(path.name for path in (tmp_path / "b").iterdir())
    with pytest.raises(BundleRefused, match="no bundle here"):
        await there.take(tmp_path / "b")
    await out.export(tmp_path / "b", max_part=1024**2)
    await there.take(tmp_path / "b")
    assert await there.seen() == await out.seen()
    with pytest.raises(BundleRefused, match="a bundle already"):
        await out.export(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").touch()
    with pytest.raises(BundleRefused, match=r"not empty \(there is 'thesis.txt'\)"):
        await out.export(tmp_path / "c")


async def test_wrong_bytes_on_the_exporting_disk_do_not_cross(tmp_path: Path, out: Lab) -> None:
    await out.put({"a": Content(1000, seed=1)})
    path = out.holdings.blobs.path_of(BlobId.from_etag(Content(1000, seed=1).sha256))
    path.chmod(0o644)
    path.write_bytes(Content(1000, seed=2).bytes())
    with pytest.raises(BundleRefused, match="wrong on this disk"):
        await out.export(tmp_path / "b")
    assert not (tmp_path / "b" / fmt.MANIFEST).exists()


# — whose it is ————————————————————————————————————————————————————————————————————————————————————


async def test_with_trusted_keys_only_what_they_signed_is_let_in(tmp_path: Path, out: Lab) -> None:
    """Not signed, signed by a stranger, signed and then changed: refused before anything of it is looked at."""
    await out.put({"a": Content(100, seed=1)})
    stranger, secret = tmp_path / "stranger", tmp_path / "key"
    stranger.write_text(signing.secret_file(signing.new_key()))
    secret.write_text(signing.secret_file(KEY))
    there = Lab(tmp_path / "in", (KEY.public,))
    await out.export(tmp_path / "none")
    with pytest.raises(BundleRefused, match="not signed"):
        await there.take(tmp_path / "none")
    await out.export(tmp_path / "other", key=stranger)
    with pytest.raises(BundleRefused, match="trusted are"):
        await there.take(tmp_path / "other")
    await out.export(tmp_path / "changed", key=secret)
    signature = (tmp_path / "changed" / fmt.SIGNATURE).read_bytes()
    reseal(tmp_path / "changed", edited(tmp_path / "changed", sequence=99))
    (tmp_path / "changed" / fmt.SIGNATURE).write_bytes(signature)
    with pytest.raises(BundleRefused, match=r"signature by .* is wrong"):
        await there.take(tmp_path / "changed")
    assert await there.seen() == {}
    told = await out.export(tmp_path / "good", key=secret)
    assert (await there.take(tmp_path / "good"))["signed_by"] == KEY.public.name == told["signed_by"]
    there.close()


# — what is older, and what contradicts ————————————————————————————————————————————————————————————


async def test_an_older_bundle_is_refused_unless_it_may_roll_back(tmp_path: Path, out: Lab, there: Lab) -> None:
    """By the line's sequence, for each repo: an older one of another repo is welcome, and so is the same one again."""
    other = Repo(RepoKind.MODELS, "org/other")
    await out.put({"a": Content(10, seed=1)}, "1" * 40)
    await out.put({"x": Content(10, seed=9)}, "9" * 40, repo=other)
    await out.export(tmp_path / "old")
    await out.export(tmp_path / "other", (other, "main"))
    out.clock.now += 100
    await out.put({"a": Content(10, seed=2)}, "2" * 40)
    await out.export(tmp_path / "new")
    there.clock.now += 1000
    for bundle in ("new", "other", "new"):
        await there.take(tmp_path / bundle)
    newest = await there.seen()
    with pytest.raises(BundleRefused, match="from number 3 of this line already, and the bundle is number 1: --allow-rollback"):
        await there.take(tmp_path / "old")
    assert await there.seen() == newest
    await there.take(tmp_path / "old", allow_rollback=True)
    assert await there.seen() != newest


async def test_what_is_known_from_later_stays(tmp_path: Path, out: Lab, there: Lab) -> None:
    """A mirror that heard upstream after the bundle was made keeps its refs; content of the older commit is welcome."""
    await out.put({"a": Content(10, seed=1)}, "1" * 40)
    await out.export(tmp_path / "b")
    there.clock.now += 1000
    await there.put({"a": Content(10, seed=2)}, "2" * 40)
    before = await there.seen()
    await there.take(tmp_path / "b")
    assert await there.seen() == before
    assert await there.catalog.manifest(REPO, "1" * 40) is not None


async def test_nothing_is_learnt_in_the_future(tmp_path: Path, out: Lab, there: Lab) -> None:
    """A bundle of a clock that is ahead does not keep upstream's news out for ever."""
    out.clock.now += 1e6
    await out.put({"a": Content(10, seed=1)})
    await out.export(tmp_path / "b")
    await there.take(tmp_path / "b")
    ref, seen = await there.catalog.ref(REPO, "main"), await there.catalog.seen(REPO)
    assert ref is not None and seen is not None
    assert ref.asked_at <= there.clock() and seen.at <= there.clock()


@pytest.mark.parametrize(
    "here", [{"a": 2}, {"a": 1, "b": 2, "c": 3}, {"a": 1}], ids=["other bytes", "a file less", "a file more"]
)
async def test_what_contradicts_the_record_is_an_alarm_and_refused_whole(
    tmp_path: Path, out: Lab, there: Lab, here: dict[str, int]
) -> None:
    """P11: the commit is here already, with something else in it. Another revision of the bundle is taken."""
    await out.put({"a": Content(10, seed=1), "b": Content(10, seed=2)}, "1" * 40)
    await out.put({"d": Content(10, seed=4)}, "4" * 40, ref="dev")
    await there.put({path: Content(10, seed=seed) for path, seed in here.items()}, "1" * 40)
    before = await there.seen()
    await out.export(tmp_path / "b", (REPO, "main"), (REPO, "dev"))
    told = await there.take(tmp_path / "b")
    assert [row["repo"] for row in told["refused"]] == ["org/m"] and "1" * 40 in told["refused"][0]["why"]
    assert await there.seen() == before
    assert there.metrics.alarms._value.get() == 1
    assert await there.catalog.entry(REPO, "4" * 40, "d") is not None
    await there.take(tmp_path / "b")  # it does not count as imported: there is something to be cleared up


async def test_what_is_refused_in_one_scope_leaves_no_trace_in_the_log_of_another(tmp_path: Path, there: Lab) -> None:
    """A gated repo's revision goes to two scopes: what contradicts the second is in no leaf of the first."""
    log = TransparencyLog(tmp_path / "log", there.index)
    log.adopt()
    catalog = Catalog(there.index, Metrics(), there.clock, record=log)
    old, new = (Entry("a", 3, letter * 40, BlobId.from_etag(letter * 40)) for letter in "ab")
    await there.index.run(there.index.put, "path restricted org/m@" + "1" * 40 + ":a", entry_row(old))
    manifest = Manifest({}, has_files=True)
    told = await catalog.deliver(Delivery(REPO, "1" * 40, manifest, (new,), {}, None), list(Scope))
    assert told is not None and "it was" in told
    assert not await there.index.run(log.has, REPO, "1" * 40)
    await log.close()


async def test_a_repo_that_was_closed_meanwhile_is_closed_there_too(tmp_path: Path, out: Lab, there: Lab) -> None:
    """By the next bundle, a delta without anything new included; what was heard there later is believed more."""
    await out.put({"a": Content(10, seed=1)})
    await out.export(tmp_path / "1")
    there.clock.now += 1000
    await there.take(tmp_path / "1")
    assert await there.catalog.seen(REPO) is not None
    await out.catalog.note_closed(REPO)
    told = await out.export(tmp_path / "2", since=tmp_path / "1")
    assert told["repos"][0] == {"repo": "org/m", "status": "restricted", "revisions": [], "git": False}
    with_news = Lab(tmp_path / "news")
    with_news.clock.now += 1000
    await with_news.take(tmp_path / "1")
    await with_news.catalog.note_seen(REPO, Visibility())
    for lab, is_open in ((there, False), (with_news, True)):
        await lab.take(tmp_path / "2")
        assert (await lab.catalog.seen(REPO) is not None) == is_open
        closed = replace(REPO, scope=Scope.RESTRICTED)
        assert await lab.catalog.entry(closed, "c" * 40, "a") is not None, "nobody can have it by a policy"
    with_news.close()


async def test_an_alias_takes_no_other_repo_s_name_away(tmp_path: Path, out: Lab, there: Lab) -> None:
    victim, blob = Repo(RepoKind.MODELS, "org/victim"), BlobId.from_etag("a" * 40)
    entries = (Entry("a", 3, blob.hex, blob),)
    await there.catalog.note_info(RepoInfo(victim, "1" * 40, Visibility(), {}, entries, is_complete=True))
    await out.put({"a": Content(10, seed=2)}, "2" * 40)
    await out.export(tmp_path / "b")
    document = json.loads((tmp_path / "b" / fmt.MANIFEST).read_bytes())
    document["repos"][0]["aliases"] = ["org/old-name", "org/victim"]
    reseal(tmp_path / "b", edited(tmp_path / "b", repos=document["repos"]))
    await there.take(tmp_path / "b")
    assert await there.catalog.canonical(victim) == victim
    assert await there.catalog.canonical(Repo(RepoKind.MODELS, "Org/Old-Name")) == REPO


# — deltas —————————————————————————————————————————————————————————————————————————————————————————


async def test_a_delta_carries_what_is_new_and_needs_what_came_before(tmp_path: Path, out: Lab, there: Lab) -> None:
    """Full, nothing new, a new commit with one new file, then what was missing all the time; in order, from manifests alone."""
    kept, gone = Content(200_000, seed=1), Content(5000, seed=7)
    await out.put({"kept": kept, "gone": gone}, "1" * 40)
    path = out.holdings.blobs.path_of(BlobId.from_etag(gone.sha256))
    path.unlink()
    assert (await out.export(tmp_path / "1"))["missing"] == 1
    told = await out.export(tmp_path / "2", since=tmp_path / "1")
    assert told["bytes"] < 2000 and told["items"] == 0 and told["missing"] == 1
    await out.put({"kept": kept, "new": Content(300, seed=2)}, "2" * 40)
    told = await out.export(tmp_path / "3", since=tmp_path / "2" / fmt.MANIFEST)
    assert told["items"] == 2 and told["bytes"] < 5000, "the new file, and proofs"
    await out.put({"kept": kept, "gone": gone}, "1" * 40, ref="old")
    told = await out.export(tmp_path / "4", (REPO, "main"), (REPO, "old"), since=tmp_path / "3")
    assert told["items"] == 1 and told["missing"] == 0
    with pytest.raises(BundleRefused, match=r"since number 1 of its line .* import that one first"):
        await there.take(tmp_path / "2")
    for number in "1234":
        await there.take(tmp_path / number)
    assert await there.seen() == await out.seen()
    for content in (kept, gone, Content(300, seed=2)):
        assert there.holdings.blobs.path_of(BlobId.from_etag(content.sha256)).read_bytes() == content.bytes()
    ref = await there.catalog.ref(REPO, "old")
    assert ref is not None and ref.commit == "1" * 40
    with pytest.raises(BundleRefused, match="another cache"):
        await there.export(tmp_path / "5", since=tmp_path / "4")


# — a death in the middle, and no room ——————————————————————————————————————————————————————————————

_DYING = """
import asyncio, sys
from pathlib import Path
from tests.proxy.bundle.test_import import Lab
async def main():
    lab = Lab(Path(sys.argv[1]))
    async for line in lab.importer.run(Path(sys.argv[2])):
        print(line, flush=True)
        if "done" in line and not sys.stdin.readline():
            break
asyncio.run(main())
"""


@pytest.mark.parametrize("brought", [1, 3])
async def test_kill_9_in_the_middle_and_the_next_import_goes_on(tmp_path: Path, out: Lab, brought: int) -> None:
    """What was brought is there, and not read again; nothing was visible before the end."""
    await out.put({f"f{n}": Content(SMALL + 1 + n, seed=n) for n in range(4)})
    await out.export(tmp_path / "b")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _DYING, str(tmp_path / "in"), str(tmp_path / "b")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdin is not None
    for number in range(brought):
        assert b"done" in await process.stdout.readline()
        process.stdin.write(b"\n" if number + 1 < brought else b"")
    process.send_signal(signal.SIGKILL)
    await process.wait()
    there = Lab(tmp_path / "in")
    assert len(blobs_in(there.root)) == brought and await there.seen() == {}
    assert not (tmp_path / "in" / "incoming").exists()
    lines = [line async for line in there.importer.run(tmp_path / "b")]
    assert len(lines) == 4 - brought + 2, "a line a blob, one for the proofs, and the result"
    assert await there.seen() == await out.seen()
    there.close()


async def test_without_room_nothing_is_begun(tmp_path: Path, out: Lab, there: Lab) -> None:
    """All of it is asked for at once; and what fits counts afterwards, once."""
    await out.put({"a": Content(50_000, seed=1), "b": Content(50_000, seed=2)})
    await out.export(tmp_path / "b")
    for limit, fits in ((90_000, False), (130_000, True)):
        space = Space(there.holdings, Metrics(), limit=limit, disk_space=lambda store: DiskSpace(10**12, 10**12))
        space.start()
        importer = Importer(there.catalog, there.index, there.holdings, there.record, (), HUB, space, there.clock)
        if fits:
            await last(importer.run(tmp_path / "b"))
            assert 100_000 <= space.on_disk == space.spoken_for <= 110_000
        else:
            with pytest.raises(StoreFull, match="raise --max-size"):
                await last(importer.run(tmp_path / "b"))
            assert space.spoken_for == 0
        await space.close()
    assert await there.seen() == await out.seen()


async def test_what_is_not_here_cannot_be_exported(tmp_path: Path, out: Lab) -> None:
    await out.put({"a": Content(10, seed=1)})
    for what, revision in ((REPO, "nothing"), (Repo(RepoKind.MODELS, "org/none"), ""), (REPO, "e" * 40)):
        with pytest.raises(BundleRefused, match="nearhub ls shows what it has"):
            await out.export(tmp_path / "b", (what, revision))
    with pytest.raises(BundleRefused, match="no git mirror of org/m"):
        await out.export(tmp_path / "b", with_git=True)
    with pytest.raises(NearhubError, match="max-part"):
        await out.export(tmp_path / "c", max_part=1000)
    shutil.rmtree(tmp_path / "b")
