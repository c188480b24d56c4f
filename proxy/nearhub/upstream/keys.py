"""Keyring: with whose token the Hub is asked about a restricted repo. In memory only, and never shown."""

from __future__ import annotations

from nearhub.bounded import Bounded
from nearhub.wire.target import Repo

MAX_REPOS = 1000


class Keyring:
    """Repo → the Authorization of somebody who was found to have access. Content is the same whoever asks for it.

    Whether a caller may have it is decided for each by itself (grants.py), before anything is asked with anybody's token.
    """

    def __init__(self) -> None:
        self._keys: Bounded[Repo, str] = Bounded(MAX_REPOS)

    def __repr__(self) -> str:
        return "<Keyring>"

    def put(self, repo: Repo, authorization: str) -> None:
        self._keys.put(repo, authorization)

    def drop(self, repo: Repo, authorization: str) -> None:
        """That token opens it no more."""
        if self._keys.get(repo) == authorization:
            self._keys.drop(repo)

    def headers(self, repo: Repo | None) -> dict[str, str]:
        """What a question about `repo` is sent with, to the Hub's own origin: nothing at all for what is public."""
        key = self._keys.get(repo) if repo is not None and repo.is_restricted else None
        return {} if key is None else {"Authorization": key}
