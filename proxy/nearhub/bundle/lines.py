"""Lines: which bundles were exported from this cache, and imported into it. Their owner; rows of the index.

export                        → this cache's name as an origin, and the sequence of its last bundle
imported <origin> <repo>      → the highest sequence of that origin's bundles that brought the repo
imported-bundle <id>          → when, sequence, who signed it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nearhub.bundle.format import Bundle
from nearhub.store.index import Index
from nearhub.wire.target import Repo


class Lines:
    """What is written is durable on return."""

    def __init__(self, index: Index) -> None:
        self._index = index

    async def next_export(self, new_origin: str) -> tuple[str, int]:
        """This cache's origin (`new_origin`, if it had none) and the sequence of a new bundle: one that no other has."""
        return await self._index.run(self._next_export, new_origin)

    def _next_export(self, new_origin: str) -> tuple[str, int]:
        with self._index.transaction():
            row = self._index.get("export") or {"origin": new_origin, "sequence": 0}
            row["sequence"] += 1
            self._index.put("export", row)
        return str(row["origin"]), int(row["sequence"])

    async def newest(self, origin: str, repo: Repo) -> int:
        """The highest sequence of `origin` that brought `repo`; 0: none did."""
        row = await self._index.run(self._index.get, _repo_key(origin, repo))
        return int(row["sequence"]) if row else 0

    async def has(self, bundle_id: str) -> bool:
        return await self._index.run(self._index.get, _bundle_key(bundle_id)) is not None

    async def note(self, bundle_id: str, bundle: Bundle, repos: Sequence[Repo], at: float, signer: str | None) -> None:
        """`bundle` was imported, and brought these repos."""
        row = {"at": at, "sequence": bundle.sequence, "origin": bundle.origin, "signer": signer}
        rows: list[tuple[str, dict[str, Any]]] = [(_bundle_key(bundle_id), row)]
        rows += [(_repo_key(bundle.origin, repo), {"sequence": bundle.sequence, "bundle": bundle_id}) for repo in repos]
        await self._index.run(self._index.put_many, rows)


def _repo_key(origin: str, repo: Repo) -> str:
    return f"imported {origin} {repo}"


def _bundle_key(bundle_id: str) -> str:
    return f"imported-bundle {bundle_id}"
