"""Policies: who may have which restricted repos by the operator's word, with his token or from what is here. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from nearhub.wire.target import Repo


@dataclass(frozen=True, slots=True)
class Policy:
    """`repos`: globs of `owner/name`, `datasets/owner/name`; `who`: groups or names of local tokens.

    `authorization`: what upstream is asked with; None: only what is here is served.
    """

    name: str
    repos: tuple[str, ...]
    who: frozenset[str]
    authorization: str | None = field(default=None, repr=False)


def policy_for(policies: Sequence[Policy], repo: Repo, who: Iterable[str]) -> Policy | None:
    """The first that is about `repo` and lets one of `who` in."""
    names, lowered = set(who), str(repo).lower()
    return next(
        (
            policy
            for policy in policies
            if policy.who & names and any(fnmatchcase(lowered, pattern.lower()) for pattern in policy.repos)
        ),
        None,
    )
