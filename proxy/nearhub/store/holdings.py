"""Holdings: all that takes room in the cache and can leave to make some, whatever it is: blobs, and bare git mirrors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nearhub.store.bares import BareId, BareStore
from nearhub.store.blobs import BlobStore, Held
from nearhub.wire.headers import BlobId


@dataclass(frozen=True, slots=True)
class Import:
    """Room that an import was promised as a whole; what it brings is a blob of its own as soon as it is complete."""

    name: str


Holding = BlobId | BareId | Import


@dataclass(frozen=True, slots=True)
class Holdings:
    """What `Space` counts and evicts. Blocks."""

    blobs: BlobStore
    bares: BareStore

    @property
    def root(self) -> Path:
        return self.blobs.root

    def held(self, what: Holding) -> Held:
        if isinstance(what, Import):
            return Held(0, 0)
        return self.bares.held(what) if isinstance(what, BareId) else self.blobs.held(what)

    def is_in_use(self, what: Holding) -> bool:
        """Whether it must stay for now. A blob may always leave: who reads it has it open."""
        return isinstance(what, BareId) and self.bares.is_held(what)

    def scan(self) -> Iterator[tuple[Holding, int, float]]:
        """What, bytes on disk, and when it was last used (wall seconds)."""
        yield from self.blobs.scan()
        yield from self.bares.scan()

    def remove(self, what: Holding) -> None:
        if isinstance(what, BareId):
            self.bares.remove(what)
        elif not isinstance(what, Import):
            self.blobs.remove(what)
