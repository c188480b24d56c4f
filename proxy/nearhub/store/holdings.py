"""Holdings: all that takes room in the cache and can leave to make some: blobs, bare git mirrors, what sites said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nearhub.store.bares import BareId, BareStore
from nearhub.store.blobs import BlobStore, Held
from nearhub.store.site_bodies import SiteBodies, SiteBody
from nearhub.wire.headers import BlobId


@dataclass(frozen=True, slots=True)
class Import:
    """Room that an import was promised as a whole; what it brings is a blob of its own as soon as it is complete."""

    name: str


Holding = BlobId | BareId | SiteBody | Import


@dataclass(frozen=True, slots=True)
class Holdings:
    """What `Space` counts and evicts. Blocks."""

    blobs: BlobStore
    bares: BareStore
    sites: SiteBodies

    @property
    def root(self) -> Path:
        return self.blobs.root

    def held(self, what: Holding) -> Held:
        match what:
            case BareId():
                return self.bares.held(what)
            case SiteBody():
                return self.sites.held(what)
            case Import():
                return Held(0, 0)
            case _:
                return self.blobs.held(what)

    def is_in_use(self, what: Holding) -> bool:
        """Whether it must stay for now. A blob or a body may always leave: who reads it has it open."""
        return isinstance(what, BareId) and self.bares.is_held(what)

    def scan(self) -> Iterator[tuple[Holding, int, float]]:
        """What, bytes on disk, and when it was last used (wall seconds)."""
        yield from self.blobs.scan()
        yield from self.bares.scan()
        yield from self.sites.scan()

    def remove(self, what: Holding) -> None:
        match what:
            case BareId():
                self.bares.remove(what)
            case SiteBody():
                self.sites.remove(what)
            case Import():
                pass
            case _:
                self.blobs.remove(what)
