"""The log's arithmetic and formats, compared with another implementation's (tlog-scales), or with their own inverse."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from tlog_scales import tlog as other
from tlog_scales.reader import TilesReader
from tlog_scales.signing import PlainEd25519Signer, Vkey
from tlog_scales.tiles import tile_path

from nearhub.errors import BadProof
from nearhub.signatures import Signer, checked, new_private_key, read_private_key
from nearhub.wire.headers import BlobId
from nearhub.wire.leaves import Leaf, Named, blinded, leaves_of, opened, opening
from nearhub.wire.tlog import (
    EMPTY_ROOT,
    ENTRIES,
    MAX_SIZE,
    WIDTH,
    Checkpoint,
    LogKey,
    Note,
    Proof,
    Signature,
    TileId,
    check_consistency,
    consistency_proof,
    cut,
    edge,
    grown,
    held,
    inclusion_proof,
    leaf_hash,
    nodes_of,
    pack,
    proofs_in,
    root_of_inclusion,
    subtree,
    tile_at,
    unpack,
)

SIZES = [0, 1, 2, 3, 7, 8, 255, 256, 257, 511, 512, 513, 1000, 65_535, 65_536, 65_537, 66_000]
LEAVES = [leaf_hash(b"%d" % n) for n in range(66_000)]


class Tiles(dict[TileId, bytes]):
    """The tiles of a tree that grew by `steps`; also what tlog-scales reads them from."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        for old, new in itertools.pairwise([0, *steps]):
            self.update(grown(old, LEAVES[old:new], self.__getitem__))
        self.paths = {str(tile): data for tile, data in self.items()}

    def get_path(self, *path: str) -> bytes | None:
        return self.paths.get("/".join(path))

    def reader(self, size: int) -> TilesReader:
        class Backend:
            get = staticmethod(self.get_path)

        reader = TilesReader(Backend())
        reader.set_size(size)
        return reader

    def nodes(self, size: int) -> Callable[[int, int], bytes]:
        return nodes_of(size, self.__getitem__)


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    """A tree of every size in SIZES."""
    return Tiles(*SIZES[1:])


@pytest.mark.parametrize("size", SIZES)
def test_roots_and_proofs_are_what_another_implementation_makes_and_takes(tiles: Tiles, size: int) -> None:
    """Roots, inclusion of leaves at the edges of subtrees and tiles, consistency with every earlier size."""
    reader, nodes = tiles.reader(size), tiles.nodes(size)
    root = subtree(0, size, nodes)
    assert root == reader.calculate_root_hash()
    for index in sorted({0, 1, size // 2, size // 3, 255, 256, size - 2, size - 1}):
        if 0 <= index < size:
            proof = inclusion_proof(index, size, nodes)
            assert proof == reader.get_inclusion_proof(index, size).node_hashes
            other.InclusionProof(index, size, proof).check(LEAVES[index], root)
            assert root_of_inclusion(index, size, LEAVES[index], proof) == root
    for old in (old for old in SIZES if old <= size):
        before = subtree(0, old, tiles.nodes(old))
        steps = consistency_proof(old, size, nodes)
        if old:
            assert steps == reader.get_consistency_proof(old, size).node_hashes
        other.ConsistencyProof(old, size, steps).check(before, root)
        check_consistency(old, size, before, root, steps)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_proof_with_anything_changed_does_not_hold(data: st.DataObject) -> None:
    """One bit of a hash, a hash less or more, another index, another size, another leaf."""
    size = data.draw(st.integers(1, 600))
    index = data.draw(st.integers(0, size - 1))
    tree = Tiles(size)
    root = subtree(0, size, tree.nodes(size))
    proof = inclusion_proof(index, size, tree.nodes(size))
    at = data.draw(st.integers(0, size))
    for changed in (_changed(data, proof), proof[:-1], [*proof, root]):
        assert changed == proof or not _holds(_includes, index, size, changed, root)
    assert not _holds(lambda: root_of_inclusion(index, size, LEAVES[index + 1], proof) == root)
    if at not in (index, size):
        assert not _holds(lambda: root_of_inclusion(at, size, LEAVES[index], proof) == root)
    old = data.draw(st.integers(0, size))
    before, steps = subtree(0, old, tree.nodes(size)), consistency_proof(old, size, tree.nodes(size))
    wrong_root = hashlib.sha256(before).digest()
    for first, second, given_steps in (
        (wrong_root, root, steps),
        (before, wrong_root, steps),
        (before, root, _changed(data, steps)),
        (before, root, [*steps, root]),
        (before, root, steps[:-1]),
    ):
        is_same = (first, second, given_steps) == (before, root, steps) or (old == 0 and first == before and not given_steps)
        assert is_same or not _holds(lambda *asked: check_consistency(old, size, *asked) is None, first, second, given_steps)


def _includes(index: int, size: int, proof: list[bytes], root: bytes) -> bool:
    return root_of_inclusion(index, size, LEAVES[index], proof) == root


def _changed(data: st.DataObject, hashes: list[bytes]) -> list[bytes]:
    """One bit flipped."""
    if not hashes:
        return hashes
    which, bit = data.draw(st.integers(0, len(hashes) - 1)), data.draw(st.integers(0, 255))
    flipped = (int.from_bytes(hashes[which], "big") ^ (1 << bit)).to_bytes(32, "big")
    return [*hashes[:which], flipped, *hashes[which + 1 :]]


def _holds(call: Callable[..., bool], *arguments: object) -> bool:
    try:
        return call(*arguments)
    except BadProof:
        return False


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=5))
def test_a_tree_is_the_same_whatever_the_steps_it_grew_in(steps: list[int]) -> None:
    """And a full tile, once made, is never made anew; every earlier width can be cut from a later one."""
    sizes = list(itertools.accumulate(steps))
    stepwise, at_once = Tiles(*sizes), Tiles(sizes[-1])
    assert all(stepwise[tile] == data for tile, data in at_once.items())
    for tile, data in stepwise.items():
        widest = tile_at(tile.level, tile.index, sizes[-1])
        assert widest is not None and cut(tile, at_once[widest]) == data
    for size in sizes:
        assert all(tile in stepwise for tile in edge(size) if tile.level != ENTRIES)
    made: list[TileId] = []
    for old, new in itertools.pairwise([0, *sizes]):
        made += [tile for tile, _ in grown(old, LEAVES[old:new], stepwise.__getitem__) if tile.width == WIDTH]
    assert len(made) == len(set(made))


def test_the_specification_s_own_example_of_tiles() -> None:
    """70,000 leaves: 273 full tiles at level 0 and one of 112; one full at level 1 and one of 17; one of 1 at level 2."""
    assert [(held(level, 70_000) // 256, held(level, 70_000) % 256) for level in (0, 1, 2, 3)] == [
        (273, 112),
        (1, 17),
        (0, 1),
        (0, 0),
    ]
    assert [str(tile) for tile in edge(70_000)] == [
        "tile/entries/273.p/112",
        "tile/0/273.p/112",
        "tile/1/001.p/17",
        "tile/2/000.p/1",
    ]
    assert str(TileId(0, 1234067)) == "tile/0/x001/x234/067"
    assert edge(256) == [TileId(1, 0, 1)] and edge(0) == []


@given(st.integers(-1, 63), st.integers(0, MAX_SIZE), st.integers(1, 256))
def test_a_tile_s_path_is_another_implementation_s_and_leads_back(level: int, index: int, width: int) -> None:
    tile = TileId(level, index, width)
    assert str(tile) == "/".join(tile_path(level, index, width % 256))
    assert TileId.from_path(str(tile)) == tile


@pytest.mark.parametrize(
    "path",
    ["tile/0/1", "tile/00/001", "tile/64/001", "tile/0/001.p/0", "tile/0/001.p/256", "tile/0/x000/001", "tile/0/001.p/05",
     "tile/entries/../key", "tile/0/001/", "tile/-1/001", "key", "", "tile/0/٠٠١"],
)  # fmt: skip
def test_what_is_no_tile_has_no_path(path: str) -> None:
    with pytest.raises(BadProof):
        TileId.from_path(path)


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(0, 20))
def test_bundles(entries: list[bytes], width: int) -> None:
    assert unpack(pack(entries)) == entries
    if 0 < width < len(entries):
        assert cut(TileId(ENTRIES, 0, width), pack(entries)) == pack(entries[:width])
    if entries:
        with pytest.raises(BadProof, match="cut short"):
            unpack(pack(entries)[:-1] if entries[-1] else pack(entries) + b"\0")


PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NAME = "mirror.example/-/log"


@given(st.integers(0, MAX_SIZE), st.binary(min_size=32, max_size=32))
def test_a_checkpoint_is_signed_as_another_implementation_signs_it(size: int, root: bytes) -> None:
    """The same bytes, since Ed25519 is deterministic; each side takes the other's, and the key's text."""
    note = str(Signer(NAME, PRIVATE).sign(str(Checkpoint(NAME, size, root))))
    theirs = PlainEd25519Signer(NAME, PRIVATE)
    assert note == other.Checkpoint.make_signed(NAME, size, root, [theirs]).serialize()
    key = LogKey.from_text(theirs.vkey.serialize())
    assert str(key) == theirs.vkey.serialize()
    assert checked(note, key) == Checkpoint(NAME, size, root)
    other.Checkpoint.from_text(note).verify(Vkey.from_string(str(key)))
    assert str(Note.from_text(note)) == note


@settings(max_examples=50)
@given(st.data())
def test_a_changed_checkpoint_is_refused(data: st.DataObject) -> None:
    """Any byte of it."""
    note = str(Signer(NAME, PRIVATE).sign(str(Checkpoint(NAME, 70, EMPTY_ROOT)))).encode()
    at, value = data.draw(st.integers(0, len(note) - 1)), data.draw(st.integers(0, 255))
    changed = note[:at] + bytes([value]) + note[at + 1 :]
    key = Signer(NAME, PRIVATE).key
    if changed != note:
        with pytest.raises(BadProof):
            checked(changed.decode(errors="replace"), key)


def test_what_is_wrong_with_a_checkpoint_is_said() -> None:
    signer, stranger = Signer(NAME, PRIVATE), Signer("other", read_private_key(new_private_key()))
    checkpoint = str(Checkpoint(NAME, 7, EMPTY_ROOT))
    with pytest.raises(BadProof, match="is not signed by mirror"):
        checked(str(stranger.sign(checkpoint)), signer.key)
    forged = Signature(NAME, signer.key.id, stranger.sign(checkpoint).signatures[0].data)
    with pytest.raises(BadProof, match="wrong signature"):
        checked(str(Note(checkpoint, (forged,))), signer.key)
    with pytest.raises(BadProof, match="of the log 'elsewhere'"):
        checked(str(signer.sign(str(Checkpoint("elsewhere", 7, EMPTY_ROOT)))), signer.key)
    with pytest.raises(BadProof, match="no checkpoint"):
        checked(str(signer.sign(f"{NAME}\n07\nAAAA\n")), signer.key)
    with_witness = Note(checkpoint, (*stranger.sign(checkpoint).signatures, *signer.sign(checkpoint).signatures))
    assert checked(str(with_witness), signer.key).size == 7
    with pytest.raises(BadProof, match="is damaged: its hash"):
        LogKey.from_text(str(signer.key).replace(f"+{signer.key.id.hex()}+", "+00000000+"))
    with pytest.raises(BadProof, match="no Ed25519 key"):
        read_private_key(b"nonsense")


@given(st.integers(0, MAX_SIZE), st.lists(st.binary(min_size=32, max_size=32), max_size=64), st.binary(max_size=200))
def test_a_proof_s_text_leads_back(index: int, hashes: list[bytes], extra: bytes) -> None:
    note = str(Signer(NAME, PRIVATE).sign(str(Checkpoint(NAME, 7, EMPTY_ROOT))))
    proof = Proof(index, tuple(hashes), note, extra)
    assert Proof.from_text(str(proof)) == proof
    assert proofs_in(f"{proof}{replace(proof, index=5)}") == [proof, replace(proof, index=5)]
    for broken in ("", "x" + str(proof), str(proof).replace("index", "indices"), str(proof).replace("\n\n", "\n")):
        with pytest.raises(BadProof):
            for one in proofs_in(broken):
                checked(one.checkpoint, Signer(NAME, PRIVATE).key)


OID = st.one_of(st.sampled_from("01ab").map(lambda d: d * 40), st.sampled_from("abc").map(lambda d: d * 64))
NAMED = st.builds(lambda oid, size: Named(BlobId.from_etag(oid), size), OID, st.integers(0))
FILES = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=2000), NAMED, max_size=40)


@settings(max_examples=40)
@given(FILES, st.integers(0, 2**40))
def test_leaves_lead_back_and_hold_every_file_once(files: dict[str, Named], time: int) -> None:
    leaves = list(leaves_of(time, "datasets/org/m", "a" * 40, "https://hub", files.items()))
    assert [Leaf.decode(leaf.encode()) for leaf in leaves] == leaves
    assert [item for leaf in leaves for item in leaf.files.items()] == list(files.items())
    assert all(len(leaf.encode()) <= 32_768 for leaf in leaves)
    for leaf in leaves:
        entry, salt = leaf.encode(), b"s" * 32
        assert opened(opening(entry)) == (leaf, entry)
        assert opened(opening(entry, salt)) == (leaf, blinded(entry, salt))
        assert b"org" not in blinded(entry, salt)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (b"{}", "no leaf of nearhub's"),
        (b'{"version":2}', "this nearhub knows 1: upgrade"),
        (b'{"commit":"x","files":{},"repo":"a","time":1,"upstream":"u","version":1}', "no leaf"),
        (b'{ "commit":"%s","files":{},"repo":"a","time":1,"upstream":"u","version":1}' % (b"a" * 40), "no leaf"),
    ],
)
def test_what_is_no_leaf(entry: bytes, message: str) -> None:
    with pytest.raises(BadProof, match=message):
        Leaf.decode(entry)
    with pytest.raises(BadProof):
        opened(entry)


def test_the_test_tiles_are_those_of_tlog_scales_s_own_reader(tmp_path: Path) -> None:
    """Read from files, as an auditor has them."""
    from tlog_scales.backend import LocalBackend

    tree = Tiles(300, 777)
    for tile, data in tree.items():
        (tmp_path / str(tile)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / str(tile)).write_bytes(data)
    reader = TilesReader(LocalBackend(tmp_path))
    reader.set_size(777)
    assert reader.calculate_root_hash() == subtree(0, 777, tree.nodes(777))
