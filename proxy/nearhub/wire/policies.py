"""Policies: who may have which restricted repos by the operator's word, with his token or from what is here. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nearhub.wire.rules import fits_repo
from nearhub.wire.target import Repo


@dataclass(frozen=True, slots=True)
class Policy:
    """`repos`: patterns as rules have them; `who`: groups or names of local tokens.

    `authorization`: what upstream is asked with; None: only what is here is served.
    """

    name: str
    repos: tuple[str, ...]
    who: frozenset[str]
    authorization: str | None = field(default=None, repr=False)


def policy_for(policies: Sequence[Policy], repo: Repo, who: Iterable[str]) -> Policy | None:
    """The first that is about `repo` and lets one of `who` in."""
    names = set(who)
    named = (policy for policy in policies if policy.who & names)
    return next((policy for policy in named if any(fits_repo(repo, pattern) for pattern in policy.repos)), None)
