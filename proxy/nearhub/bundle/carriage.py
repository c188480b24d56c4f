"""Carriage: the verbs that carry content across an air gap, from the arguments of the command line to rows of progress."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from nearhub.bundle import signing
from nearhub.bundle.copies import CopyImporter
from nearhub.bundle.exporter import Exporter
from nearhub.bundle.importer import Importer
from nearhub.bundle.intake import Room
from nearhub.catalog import Catalog
from nearhub.errors import BadTarget
from nearhub.resolve import Resolver
from nearhub.store.holdings import Holdings
from nearhub.store.index import Index
from nearhub.store.log import TransparencyLog
from nearhub.wire.target import Repo, RepoKind, parse_repo_name

VERBS = ("export", "import", "import-hf-cache")


class Carriage:
    """`trusted_keys`: keys, or files of them. `room` and `resolver`: of a running mirror; None where none runs."""

    def __init__(
        self,
        catalog: Catalog,
        index: Index,
        holdings: Holdings,
        record: TransparencyLog,
        *,
        upstreams: Sequence[str],
        trusted_keys: Sequence[str],
        room: Room | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        self._catalog = catalog
        self._index = index
        self._holdings = holdings
        self._record = record
        self._upstreams = tuple(upstreams)
        self._trusted_keys = tuple(trusted_keys)
        self._room = room
        self._resolver = resolver

    async def perform(self, verb: str, asked: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Yields {"done", "of"} in bytes, and last {"result": …}. Raises NearhubError."""
        match verb:
            case "export":
                lines = self._export(**asked)
            case "import":
                lines = self._import(**asked)
            case "import-hf-cache":
                lines = self._copies().hf_cache(Path(asked["path"]), is_public=asked["public"])
            case _:
                raise BadTarget(f"there is no verb {verb!r}")
        async with aclosing(lines):
            async for line in lines:
                yield line

    def _export(
        self, repos: Sequence[str], to: str, since: str, max_part: int, git: bool, sign: str
    ) -> AsyncGenerator[dict[str, Any]]:
        exporter = Exporter(self._catalog, self._index, self._holdings, self._record, self._upstreams)
        return exporter.run(
            [_split(one) for one in repos],
            Path(to),
            since=Path(since) if since else None,
            max_part=max_part,
            with_git=git,
            key=Path(sign) if sign else None,
        )

    def _import(self, path: str, allow_rollback: bool, check: bool, repo: str, public: bool) -> AsyncGenerator[dict[str, Any]]:
        place = Path(path)
        if (place / ".git").exists() or (place / "objects").is_dir():
            return self._copies().clone(place, _split(repo)[0] if repo else None, is_public=public)
        keys = [signing.public_from(key) for key in self._trusted_keys]
        importer = Importer(self._catalog, self._index, self._holdings, self._record, keys, self._upstreams[0], self._room)
        return importer.run(place, allow_rollback=allow_rollback, check=check)

    def _copies(self) -> CopyImporter:
        return CopyImporter(self._catalog, self._holdings, self._room, self._resolver)


def _split(text: str) -> tuple[Repo, str]:
    """`REPO[@REV]`; "" where no revision is named. Raises RepoNotFound."""
    name, _, revision = text.partition("@")
    repo = Repo.from_text(name.strip("/").removeprefix("models/"))
    return parse_repo_name(RepoKind(repo.kind), repo.name), revision
