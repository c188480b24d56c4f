"""Grants: which caller may have the content of which restricted repo, asked of the Hub with the caller's own token.

A yes lasts 60 s and a no 10 s, each for one (token, repo); what one token opened is closed to every other. Tokens are known by
fingerprints here; the tokens themselves are in memory only, for as long as upstream may have to be asked with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from nearhub import trace
from nearhub.bounded import Bounded
from nearhub.errors import AccessOffline, AccessUnknown, HubRefusal, Offline, UpstreamError
from nearhub.single_flight import SingleFlight
from nearhub.upstream.dispatch import Dispatcher
from nearhub.upstream.keys import Keyring
from nearhub.wire.credentials import fingerprint
from nearhub.wire.target import Repo

log = logging.getLogger(__name__)

ALLOW_TTL_S = 60.0
DENY_TTL_S = 10.0
RENEW_AFTER_S = 30.0
"""A grant in use is asked for again in the background from this age on, so that nobody waits for it."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What the Hub said at wall-clock second `at`. `refusal` None: yes."""

    at: float
    refusal: HubRefusal | None


class Grants:
    """Owner of the decisions. `secret`: the cache's own. Clock: wall seconds."""

    def __init__(self, dispatcher: Dispatcher, keys: Keyring, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        self._dispatcher = dispatcher
        self._keys = keys
        self._secret = secret
        self._clock = clock
        self._grants: Bounded[tuple[str, Repo], Grant] = Bounded(50_000)
        self._tokens: Bounded[str, str] = Bounded(10_000)
        self._asking = SingleFlight(clock)

    def __repr__(self) -> str:
        return "<Grants>"

    def has(self, repo: Repo, authorization: str) -> bool:
        """Whether this token's grant for `repo` is good now, without asking anybody."""
        grant = self._grants.get((fingerprint(self._secret, authorization), repo))
        return grant is not None and grant.refusal is None and 0 <= self._clock() - grant.at < ALLOW_TTL_S

    async def require(self, repo: Repo, authorization: str, client: str) -> None:
        """Return if the Hub lets this token have the content of `repo` (restricted).

        Raises the Hub's own refusal, or AccessUnknown when it cannot be asked and no grant is good.
        """
        key = (fingerprint(self._secret, authorization), repo)
        grant = self._grants.get(key)
        age_s = None if grant is None else self._clock() - grant.at
        if grant is not None and age_s is not None:
            if grant.refusal is not None and 0 <= age_s < DENY_TTL_S:
                raise grant.refusal
            if grant.refusal is None and 0 <= age_s < ALLOW_TTL_S:
                if age_s >= RENEW_AFTER_S:
                    self._asking.start(key, lambda: self._ask(key, authorization, client))
                trace.note(f"{repo}: this token was found to open it {age_s:.0f} s ago")
                return
        trace.note(f"{repo}: upstream is asked whether this token opens it")
        grant = await self._asking.share(key, lambda: self._ask(key, authorization, client))
        if grant.refusal is not None:
            raise grant.refusal

    async def _ask(self, key: tuple[str, Repo], authorization: str, client: str) -> Grant:
        mark, repo = key
        refusal: HubRefusal | None = None
        try:
            await self._dispatcher.permits(repo, authorization, client)
        except HubRefusal as exc:
            refusal = exc
        except Offline as exc:
            raise AccessOffline(f"whether this token may have {repo} cannot be asked: {exc.message}") from exc
        except UpstreamError as exc:
            raise AccessUnknown(f"whether this token may have {repo} cannot be asked now: {exc.message}") from exc
        grant = Grant(self._clock(), refusal)
        self._grants.put(key, grant)
        if refusal is None:
            self._keys.put(repo, authorization)
            self._tokens.put(mark, authorization)
        else:
            self._keys.drop(repo, authorization)
        return grant

    def mark(self, authorization: str) -> str:
        """What stands for this token in a link that is signed for its owner."""
        return fingerprint(self._secret, authorization)

    def recall(self, mark: str) -> str | None:
        """The token that `mark` stands for, if it opened something since this process began."""
        return self._tokens.get(mark)

    async def close(self) -> None:
        """End the questions under way."""
        await self._asking.close()
