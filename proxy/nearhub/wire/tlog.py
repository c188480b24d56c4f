"""A transparency log in numbers and texts: RFC 6962 trees, and the C2SP formats tlog-tiles, signed-note, tlog-proof. Pure.

A tree of `size` leaves is known by its tiles: files of up to 256 hashes, a level of them for every 8 levels of the tree. Proofs
are computed from them. Whatever reads here raises BadProof with what is wrong. signatures.py makes and checks signatures.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nearhub.errors import BadProof

HEIGHT = 8
WIDTH = 1 << HEIGHT
"""Hashes in a full tile, entries in a full bundle."""
HASH_BYTES = 32
ENTRIES = -1
"""The level of entry bundles, in TileId."""
MAX_ENTRY = 0xFFFF
MAX_SIZE = 1 << 56
"""Leaves; bounds the depth of every proof."""
EMPTY_ROOT = hashlib.sha256(b"").digest()
_ED25519 = b"\x01"
_DECIMAL = re.compile(r"(?:0|[1-9][0-9]{0,17})\Z", re.ASCII)
_TILE = re.compile(r"tile/(entries|0|[1-9][0-9]?)/((?:x[0-9]{3}/)*)([0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?\Z", re.ASCII)
_NAME = re.compile(r"[^\s+\x00-\x1f\x7f]{1,200}\Z")
_SIGNATURE = re.compile(r"— (\S+) (\S+)\Z")
_MAX_NOTE = 100_000
_PROOF_HEAD = "c2sp.org/tlog-proof@v1\n"

Nodes = Callable[[int, int], bytes]
"""(level, index) → hash of the full subtree over leaves [index * 2**level, (index + 1) * 2**level)."""


# — trees —————————————————————————————————————————————————————————————————————————————————————————


def leaf_hash(entry: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def subtree(start: int, stop: int, nodes: Nodes) -> bytes:
    """Hash over the leaves [start, stop), one of the subtrees that a tree splits into."""
    count = stop - start
    if count & (count - 1) == 0:
        return nodes(count.bit_length() - 1, start // count) if count else EMPTY_ROOT
    middle = start + _split(count)
    return node_hash(subtree(start, middle, nodes), subtree(middle, stop, nodes))


def inclusion_proof(index: int, size: int, nodes: Nodes) -> list[bytes]:
    """From the leaf's sibling up, that leaf `index` is in the tree of `size`."""
    if not 0 <= index < size:
        raise BadProof(f"a tree of {size} leaves has no leaf {index}")
    proof, start, stop = [], 0, size
    while stop - start > 1:
        middle = start + _split(stop - start)
        if index < middle:
            proof.append(subtree(middle, stop, nodes))
            stop = middle
        else:
            proof.append(subtree(start, middle, nodes))
            start = middle
    return proof[::-1]


def consistency_proof(old: int, new: int, nodes: Nodes) -> list[bytes]:
    """That the tree of `old` leaves is the beginning of that of `new`. Empty where there is nothing to prove."""
    if not 0 <= old <= new:
        raise BadProof(f"a tree of {new} leaves cannot go on from one of {old}")
    if old in (0, new):
        return []
    proof, start, stop, is_whole = [], 0, new, True
    while old != stop:
        middle = start + _split(stop - start)
        if old <= middle:
            proof.append(subtree(middle, stop, nodes))
            stop = middle
        else:
            proof.append(subtree(start, middle, nodes))
            start, is_whole = middle, False
    if not is_whole:
        proof.append(subtree(start, stop, nodes))
    return proof[::-1]


def root_of_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes]) -> bytes:
    """The root that follows from a leaf's hash and its proof; it is for the caller to compare. Raises BadProof."""
    if not 0 <= index < size <= MAX_SIZE:
        raise BadProof(f"a tree of {size} leaves has no leaf {index}")
    turns, start, stop = [], 0, size
    while stop - start > 1:
        middle = start + _split(stop - start)
        turns.append(index < middle)
        start, stop = (start, middle) if index < middle else (middle, stop)
    if len(turns) != len(proof):
        raise BadProof(f"the proof of leaf {index} of {size} has {len(proof)} hashes; it takes {len(turns)}")
    found = leaf
    for is_left, beside in zip(reversed(turns), proof, strict=True):
        found = node_hash(found, beside) if is_left else node_hash(beside, found)
    return found


def check_consistency(old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Raises BadProof unless `proof` shows that the tree of `new` leaves begins with that of `old`."""
    if not 0 <= old <= new <= MAX_SIZE:
        raise BadProof(f"a tree of {new} leaves cannot go on from one of {old}")
    if old in (0, new):
        if proof or old_root != (new_root if old else EMPTY_ROOT):
            raise BadProof(f"two trees of {old} leaves differ" if old else "the empty tree has another root")
        return
    turns, start, stop = [], 0, new
    while old != stop:
        middle = start + _split(stop - start)
        turns.append(old <= middle)
        start, stop = (start, middle) if old <= middle else (middle, stop)
    rest = list(proof)
    if len(rest) != len(turns) + (start > 0):
        raise BadProof(f"the proof from {old} to {new} leaves has {len(rest)} hashes; it takes {len(turns) + (start > 0)}")
    before = after = rest.pop(0) if start else old_root
    for is_left, beside in zip(reversed(turns), rest, strict=True):
        if is_left:
            after = node_hash(after, beside)
        else:
            before, after = node_hash(beside, before), node_hash(beside, after)
    if before != old_root or after != new_root:
        raise BadProof(f"the tree of {new} leaves does not begin with that of {old}: the log was rewritten")


def _split(count: int) -> int:
    """The largest power of two below `count`, which is 2 or more."""
    return 1 << (count - 1).bit_length() - 1


# — tiles —————————————————————————————————————————————————————————————————————————————————————————


@dataclass(frozen=True, slots=True, order=True)
class TileId:
    """A tile of hashes, or with level ENTRIES a bundle. `width` 256: full."""

    level: int
    index: int
    width: int = WIDTH

    def __str__(self) -> str:
        """Its path below the log: `tile/0/x001/234.p/5`."""
        digits = f"{self.index:03d}"
        digits = "0" * (-len(digits) % 3) + digits
        *before, last = [digits[i : i + 3] for i in range(0, len(digits), 3)]
        level = "entries" if self.level == ENTRIES else self.level
        partial = "" if self.width == WIDTH else f".p/{self.width}"
        return f"tile/{level}/{''.join(f'x{part}/' for part in before)}{last}{partial}"

    @classmethod
    def from_path(cls, path: str) -> TileId:
        """The inverse of str(); raises BadProof for what is no tile's path."""
        match = _TILE.match(path[:200])
        if match is None:
            raise BadProof(f"{path[:100]!r} is no tile of a log")
        level = ENTRIES if match[1] == "entries" else int(match[1])
        tile = cls(level, int(match[2].replace("x", "").replace("/", "") + match[3]), int(match[4] or WIDTH))
        if str(tile) != path or level > 63:
            raise BadProof(f"{path[:100]!r} is no tile of a log")
        return tile

    @property
    def full(self) -> TileId:
        return TileId(self.level, self.index)


def held(level: int, size: int) -> int:
    """How many hashes (or entries) a tree of `size` has at a level of tiles."""
    return size >> HEIGHT * max(level, 0)


def tile_at(level: int, index: int, size: int) -> TileId | None:
    """The tile as a tree of `size` has it; None: it has none there."""
    width = min(WIDTH, held(level, size) - index * WIDTH)
    return TileId(level, index, width) if width > 0 else None


def edge(size: int) -> list[TileId]:
    """The partial tiles of a tree, its entry bundle first."""
    levels = itertools.takewhile(lambda level: held(level, size), itertools.count(ENTRIES))
    tiles = [tile_at(level, held(level, size) // WIDTH, size) for level in levels]
    return [tile for tile in tiles if tile is not None]


def grown(old: int, leaves: Sequence[bytes], partial: Callable[[TileId], bytes]) -> list[tuple[TileId, bytes]]:
    """Tiles of hashes that are new or wider when `leaves` (their hashes) follow on a tree of `old`.

    `partial` gives the partial tiles of the old tree.
    """
    made = []
    level, rising = 0, list(leaves)
    while rising:
        before = held(level, old)
        first = tile_at(level, before // WIDTH, old)
        hashes = (_hashes(partial(first), first.width) if first is not None else []) + rising
        rising = []
        for number, start in enumerate(range(0, len(hashes), WIDTH), before // WIDTH):
            row = hashes[start : start + WIDTH]
            made.append((TileId(level, number, len(row)), b"".join(row)))
            if len(row) == WIDTH:
                rising.append(_fold(row))
        level += 1
    return made


def nodes_of(size: int, read: Callable[[TileId], bytes]) -> Nodes:
    """Nodes of the tree of `size`, from its tiles; each is read once. Raises BadProof for a tile of another length."""
    known: dict[TileId, list[bytes]] = {}

    def nodes(level: int, index: int) -> bytes:
        tier, height = divmod(level, HEIGHT)
        start = index << height
        tile = tile_at(tier, start // WIDTH, size)
        if tile is None:
            raise BadProof(f"a tree of {size} leaves has no node {level}/{index}")
        if tile not in known:
            known[tile] = _hashes(read(tile), tile.width)
        row = known[tile][start % WIDTH : start % WIDTH + (1 << height)]
        if len(row) != 1 << height:
            raise BadProof(f"a tree of {size} leaves has no node {level}/{index}")
        return _fold(row)

    return nodes


def tile_root(data: bytes) -> bytes:
    """Hash over a full tile: one of the hashes of the level above."""
    return _fold(_hashes(data, WIDTH))


def cut(tile: TileId, data: bytes) -> bytes:
    """`tile` out of a wider one's `data`."""
    return pack(unpack(data)[: tile.width]) if tile.level == ENTRIES else data[: tile.width * HASH_BYTES]


def _hashes(data: bytes, width: int) -> list[bytes]:
    if len(data) != width * HASH_BYTES:
        raise BadProof(f"a tile of {width} hashes has {len(data)} bytes")
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]


def _fold(row: Sequence[bytes]) -> bytes:
    """Hash over a full subtree of these nodes: a power of two of them."""
    while len(row) > 1:
        row = [node_hash(row[i], row[i + 1]) for i in range(0, len(row), 2)]
    return row[0]


def pack(entries: Iterable[bytes]) -> bytes:
    """An entry bundle: each entry after its length, two bytes."""
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def unpack(data: bytes) -> list[bytes]:
    """The inverse of pack()."""
    entries, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 2], "big")
        entry = data[at + 2 : at + 2 + length]
        if len(data) < at + 2 or len(entry) != length:
            raise BadProof("an entry bundle is cut short")
        entries.append(entry)
        at += 2 + length
    return entries


# — signed notes ——————————————————————————————————————————————————————————————————————————————————


@dataclass(frozen=True, slots=True)
class LogKey:
    """Who signs: a name, which is the log's origin, and an Ed25519 public key of 32 bytes."""

    name: str
    public: bytes

    @property
    def id(self) -> bytes:
        """4 bytes, which tell keys apart and prove nothing."""
        return hashlib.sha256(self.name.encode() + b"\n" + _ED25519 + self.public).digest()[:4]

    def __str__(self) -> str:
        """As people hand it on: `name+hash+base64`."""
        return f"{self.name}+{self.id.hex()}+{_encoded(_ED25519 + self.public)}"

    @classmethod
    def from_text(cls, text: str) -> LogKey:
        """The inverse of str()."""
        name, _, rest = text.strip().partition("+")
        mark, _, encoded = rest.partition("+")
        data = _decoded(encoded, "the key")
        if not is_name(name) or len(data) != 33 or data[:1] != _ED25519:
            raise BadProof(f"{text.strip()[:60]!r} is no public key of a log: it is to be NAME+HASH+BASE64, of Ed25519")
        key = cls(name, data[1:])
        if key.id.hex() != mark:
            raise BadProof(f"the key of {name} is damaged: its hash is {key.id.hex()}, and it says {mark[:20]!r}")
        return key


def is_name(name: str) -> bool:
    """Whether a key, and so a log, may be called that."""
    return _NAME.match(name) is not None


@dataclass(frozen=True, slots=True)
class Signature:
    name: str
    key_id: bytes
    data: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """A text, which ends in a newline, and who signed it."""

    text: str
    signatures: tuple[Signature, ...]

    def __str__(self) -> str:
        lines = [f"— {one.name} {_encoded(one.key_id + one.data)}\n" for one in self.signatures]
        return f"{self.text}\n{''.join(lines)}"

    @classmethod
    def from_text(cls, note: str) -> Note:
        """The inverse of str()."""
        text, blank, signed = note.rpartition("\n\n")
        if not blank or not signed.endswith("\n") or len(note) > _MAX_NOTE or re.search(r"[\x00-\x09\x0b-\x1f]", note):
            raise BadProof("this is no signed note: a text, an empty line, and signatures")
        signatures = []
        for line in signed.removesuffix("\n").split("\n"):
            match = _SIGNATURE.match(line)
            data = b"" if match is None else _decoded(match[2], "a signature")
            if match is None or not is_name(match[1]) or len(data) < 5:
                raise BadProof(f"{line[:60]!r} is no signature of a note")
            signatures.append(Signature(match[1], data[:4], data[4:]))
        return cls(text + "\n", tuple(signatures))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log says it is: its name, how many leaves it has, and the hash over them."""

    origin: str
    size: int
    root: bytes

    def __str__(self) -> str:
        return f"{self.origin}\n{self.size}\n{_encoded(self.root)}\n"

    @classmethod
    def from_text(cls, text: str) -> Checkpoint:
        """The inverse of str(); lines that follow are extensions, and passed over."""
        origin, size, root, *_ = [*text.split("\n"), "", "", ""]
        data = _decoded(root, "the root hash")
        if not origin or not _DECIMAL.match(size) or int(size) > MAX_SIZE or len(data) != HASH_BYTES:
            raise BadProof("this is no checkpoint: a name, a number of leaves, and a root hash")
        return cls(origin, int(size), data)


@dataclass(frozen=True, slots=True)
class Proof:
    """That leaf `index` is in the tree of a checkpoint, a signed note's text. `extra`: what the leaf's content is."""

    index: int
    hashes: tuple[bytes, ...]
    checkpoint: str
    extra: bytes = b""

    def __str__(self) -> str:
        extra = f"extra {_encoded(self.extra)}\n" if self.extra else ""
        lines = "".join(f"{_encoded(one)}\n" for one in self.hashes)
        return f"{_PROOF_HEAD}{extra}index {self.index}\n{lines}\n{self.checkpoint}"

    @classmethod
    def from_text(cls, text: str) -> Proof:
        """The inverse of str()."""
        if not text.startswith(_PROOF_HEAD):
            raise BadProof("this is no proof: its first line is to be c2sp.org/tlog-proof@v1")
        head, blank, checkpoint = text.removeprefix(_PROOF_HEAD).partition("\n\n")
        lines = head.split("\n")
        extra = _decoded(lines.pop(0).removeprefix("extra "), "extra") if lines[0].startswith("extra ") else b""
        index = lines.pop(0).removeprefix("index ") if lines and lines[0].startswith("index ") else ""
        if not blank or not _DECIMAL.match(index):
            raise BadProof("the proof is damaged: it names no leaf, or has no checkpoint")
        hashes = tuple(_decoded(line, "a hash of the proof") for line in lines)
        if any(len(one) != HASH_BYTES for one in hashes) or len(hashes) > 64:
            raise BadProof("the proof is damaged: a hash of it is none")
        return cls(int(index), hashes, checkpoint, extra)


def proofs_in(text: str) -> list[Proof]:
    """A file of one proof or more, one after the other."""
    parts = text.split(_PROOF_HEAD)
    if parts[0] or len(parts) == 1:
        raise BadProof("this is no proof: its first line is to be c2sp.org/tlog-proof@v1")
    return [Proof.from_text(_PROOF_HEAD + part) for part in parts[1:]]


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decoded(text: str, what: str) -> bytes:
    """Strict, so that a text is the only one of its bytes."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if _encoded(data) != text:
        raise BadProof(f"{what} is not in base64")
    return data
