"""The state that the handlers answer from: repositories, users, CDN objects, settings; and who may see what."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tests.hub.bare import Shelf
from tests.hub.content import File
from tests.hub.reply import Ask, HubError
from tests.hub.repos import Commit, Kind, Repo


@dataclass
class User:
    """Who a token belongs to, and which private and gated repositories it may read."""

    name: str
    access: set[str] = field(default_factory=set)


Bucket = Literal["api", "resolvers", "pages"]
_CALLS: tuple[tuple[str, Bucket], ...] = (("/api/resolve-cache/", "resolvers"), ("/api/", "api"))


@dataclass
class Limits:
    """Requests per window and client; announced on every answer, enforced only if asked."""

    api: int = 500
    resolvers: int = 3000
    pages: int = 100
    window_s: int = 300
    enforce: bool = False
    used: dict[tuple[str, str, int], int] = field(default_factory=dict, repr=False)

    def quota(self, bucket: Bucket) -> int:
        return {"api": self.api, "resolvers": self.resolvers, "pages": self.pages}[bucket]

    def spend(self, bucket: Bucket, client: str, now: float) -> tuple[int, int, bool]:
        """Count a request: what remains, seconds to the next window, and whether it is one too many."""
        window, into = divmod(int(now), self.window_s)
        key = (bucket, client, window)
        self.used[key] = self.used.get(key, 0) + 1
        remains = self.quota(bucket) - self.used[key]
        return max(0, remains), self.window_s - into, self.enforce and remains < 0


def bucket_of(path: str) -> Bucket:
    """Which rate limit a path counts against."""
    for prefix, bucket in _CALLS:
        if path.startswith(prefix):
            return bucket
    return "resolvers" if "/resolve/" in path else "pages"


@dataclass(eq=False)
class World:
    """Everything the stand-in knows; it survives stop() and start()."""

    seed: int = 0
    url: str = ""
    cdn_url: str = ""
    uses_xet: bool = True
    url_ttl_s: float = 3600
    gzip_min_bytes: int = 1000
    clock: Callable[[], float] = time.time
    users: dict[str, User] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    repos: dict[tuple[Kind, str], Repo] = field(default_factory=dict)
    aliases: dict[tuple[Kind, str], str] = field(default_factory=dict)
    objects: dict[tuple[str, str], tuple[File, str]] = field(default_factory=dict)
    shelf: Shelf = field(default_factory=Shelf)

    def add(self, repo: Repo) -> None:
        """Publish a repository."""
        self.repos[repo.kind, repo.id] = repo
        repo.on_rename, repo.on_delete = self._renamed, self._deleted

    def find(self, kind: Kind, repo_id: str) -> Repo | None:
        """The repository of this id, whatever its casing, or of this former id."""
        exact = self.repos.get((kind, repo_id))
        if exact:
            return exact
        renamed = self.aliases.get((kind, repo_id))
        if renamed:
            return self.find(kind, renamed)
        lowered = repo_id.lower()
        return next((one for (at, name), one in self.repos.items() if at == kind and name.lower() == lowered), None)

    def user(self, ask: Ask) -> User | None:
        """Who asks; an unknown token is an error even for public repositories."""
        if ask.token is None:
            return None
        user = self.users.get(ask.token)
        if user is None:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return user

    def visible(self, kind: Kind, repo_id: str, ask: Ask) -> Repo:
        """The repository, if the asker may know that it exists."""
        user, repo = self.user(ask), self.find(kind, repo_id)
        if repo is None or (repo.private and not may_read(user, repo)):
            if user is None:
                raise HubError(401, None, "Invalid username or password.")
            raise HubError(404, "RepoNotFound", "Repository not found")
        if repo.disabled:
            raise HubError(403, None, "Access to this resource is disabled.")
        return repo

    def readable(self, kind: Kind, repo_id: str, ask: Ask) -> Repo:
        """The repository, if the asker may have its content."""
        repo = self.visible(kind, repo_id, ask)
        user = self.user(ask)
        if not repo.gated or may_read(user, repo):
            return repo
        noun = kind.removesuffix("s")
        if user is None:
            told = f"Access to {noun} {repo.id} is restricted. You must have access to it and be authenticated to "
            raise HubError(401, "GatedRepo", told + "access it. Please log in.")
        told = f"Access to {noun} {repo.id} is restricted and you are not in the authorized list. "
        raise HubError(403, "GatedRepo", told + f"Visit {self.url}/{repo.id} to ask for access.")

    def commit(self, repo: Repo, revision: str) -> Commit:
        found = repo.at(revision)
        if found is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision.encode('ascii', 'replace').decode()}")
        return found

    def sign(self, path_and_query: str) -> str:
        """The CDN's signature over the encoded path and query."""
        key = b"cdn key %d" % self.seed
        return hmac.new(key, path_and_query.encode(), hashlib.sha256).hexdigest()

    def keep(self, repo: Repo, file: File, path: str) -> str:
        """Put a file where the CDN finds it; its name there."""
        name = file.xet_hash if self.uses_xet else file.sha256
        self.objects.setdefault((repo.internal_id, name), (file, path))
        return name

    def owner(self, internal_id: str) -> Repo | None:
        return next((repo for repo in self.repos.values() if repo.internal_id == internal_id), None)

    def _renamed(self, repo: Repo, old: str) -> None:
        del self.repos[repo.kind, old]
        self.repos[repo.kind, repo.id] = repo
        self.aliases[repo.kind, old] = repo.id

    def _deleted(self, repo: Repo) -> None:
        self.repos.pop((repo.kind, repo.id), None)


def may_read(user: User | None, repo: Repo) -> bool:
    """Whether a private or gated repository is open to this user."""
    return user is not None and repo.id in user.access
