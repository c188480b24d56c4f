"""An upstream that answers from a table, and counts what it is asked: for tests of who asks it, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from nearhub.errors import RepoNotFound, UpstreamBusy
from nearhub.upstream.client import Document, Upstream
from nearhub.upstream.dispatch import Dispatcher
from nearhub.wire.headers import BlobId, FileMetadata
from nearhub.wire.target import FileTarget, Repo
from tests.proxy.clock import Clock

OLD, NEW = "a" * 40, "b" * 40


def sibling(path: str, digit: str = "1", size: int = 10) -> dict[str, Any]:
    """A plain file of an info document."""
    return {"rfilename": path, "size": size, "blobId": digit * 40}


def item(path: str, digit: str = "1", size: int = 10) -> dict[str, Any]:
    """A plain file of a tree."""
    return {"type": "file", "path": path, "size": size, "oid": digit * 40}


def info(commit: str, *siblings: dict[str, Any], name: str = "org/m", **more: Any) -> dict[str, Any]:
    """What a Hub says of a repo."""
    return {
        "id": name,
        "sha": commit,
        "private": False,
        "gated": False,
        "siblings": list(siblings) or [sibling("a.txt")],
        **more,
    }


def meta(commit: str, digit: str = "1", size: int = 10) -> FileMetadata:
    return FileMetadata(commit, BlobId.from_etag(digit * 40), size)


class ScriptedUpstream(Upstream):
    """`answers`: by path without its query, a document, (document, query of the next page), metadata, or an error to raise."""

    def __init__(self) -> None:
        self.url, self.trusted = "https://hub.test", True
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []
        self.opens: dict[Repo, set[str] | Exception] = {}
        """Which Authorization opens which repo, or what is raised instead of an answer."""
        self.busy: set[str] = set()
        """Which Authorization has asked too much."""
        self.forms: list[Any] = []
        self.was_asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    def at(self, *revisions: str, repo: str = "org/m", answer: Any) -> None:
        """Answer so for these revisions of the repo."""
        for revision in revisions:
            self.answers[f"/api/models/{repo}/revision/{revision}"] = answer

    async def document(self, path: str, form: Any = None, *, about: object = None) -> Document:
        self.forms.append(form)
        path_only, _, query = path.partition("?")
        answer = await self._answer(path, f"{path_only}?{query}" if f"{path_only}?{query}" in self.answers else path_only)
        value, next_query = answer if isinstance(answer, tuple) else (answer, None)
        if query.startswith("expand=sha"):
            value = {key: told for key, told in value.items() if key != "siblings"}
        return Document(value, next_query, len(repr(value)))

    async def metadata(self, target: FileTarget) -> FileMetadata:
        answer = await self._answer(f"HEAD {target}", f"HEAD {target}")
        assert isinstance(answer, FileMetadata)
        return answer

    async def permits(self, repo: Repo, authorization: str) -> None:
        self.asked.append(f"auth-check {repo} {authorization}")
        if authorization in self.busy:
            raise UpstreamBusy("too many questions", retry_after_s=300.0)
        opens = self.opens.get(repo, set())
        if isinstance(opens, Exception):
            raise opens
        if authorization not in opens:
            raise RepoNotFound("Repository not found")

    async def probe(self) -> None:
        return None

    async def _answer(self, asked: str, key: str) -> Any:
        self.asked.append(asked)
        self.was_asked.set()
        await self.gate.wait()
        answer = self.answers.get(key, RepoNotFound("nobody told me"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def count(self, *words: str) -> int:
        """Questions whose path has all of these words."""
        return sum(all(word in path for word in words) for path in self.asked)


def dispatcher_of(upstreams: Iterable[Upstream]) -> Dispatcher:
    """With a clock that stands still: troubles are not borne, and nobody is left alone for long."""
    clock = Clock()
    return Dispatcher(list(upstreams), connections=8, client_connections=8, absorb_s=0.0, clock=clock, sleep=clock.sleep)
