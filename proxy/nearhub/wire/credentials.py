"""Who asks: an address, and what a client sends as Authorization. Pure. Tokens never stand in a repr."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nearhub.errors import BadTarget

EVERYONE = "everyone"
"""A group that all callers are in."""
OWN = "nh_"
"""What the tokens of every mirror begin with, so that none of them is ever taken for the Hub's."""
_TOLD = re.compile(r"(?<![A-Za-z0-9])(hf|nh)_")
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}\Z")


@dataclass(frozen=True, slots=True)
class Caller:
    """`authorization`: to be sent to the Hub for this caller, and nowhere else. `name` and `groups`: by a local token."""

    address: str
    authorization: str | None = field(default=None, repr=False)
    name: str | None = None
    groups: frozenset[str] = frozenset({EVERYONE})

    @property
    def is_anonymous(self) -> bool:
        return self.authorization is None and self.name is None


def read_token(authorization: str) -> str | None:
    """The token of `Bearer TOKEN`, or of git's `Basic base64(anything:TOKEN)`; None where there is none. Raises BadTarget."""
    scheme, _, rest = authorization.strip().partition(" ")
    rest = rest.strip()
    if not scheme:
        return None
    if scheme.lower() == "bearer":
        token = rest
    elif scheme.lower() == "basic":
        try:
            user, _, password = base64.b64decode(rest, validate=True).decode().partition(":")
        except ValueError:  # no base64, no ASCII, no UTF-8
            raise BadTarget("the Authorization header is no Basic of user:token") from None
        token = password or user
    else:
        raise BadTarget("the Authorization header is neither Bearer nor Basic")
    if not token:
        return None
    if not _TOKEN.match(token):
        raise BadTarget("the token in the Authorization header has characters that no token has")
    return token


def as_basic(authorization: str) -> str:
    """`Bearer TOKEN` as git's servers take it."""
    token = authorization.removeprefix("Bearer ")
    return f"Basic {base64.b64encode(f'token:{token}'.encode()).decode()}"


def fingerprint(secret: bytes, authorization: str) -> str:
    """What stands for a token where it must not stand itself. Means nothing without the mirror's own secret."""
    return hmac.new(secret, b"token " + authorization.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True)
class Local:
    """Whom a local token names."""

    name: str
    groups: frozenset[str]


def hashed(token: str) -> str:
    """How a local token is kept: it is 256 random bits, so one round is enough."""
    return hashlib.sha256(token.encode()).hexdigest()


def caller_of(address: str, authorization: str, locals_: Mapping[str, Local]) -> Caller:
    """`locals_`: local tokens by their hash. These go nowhere, and neither do those that were removed or are another mirror's:
    they name nobody. Any other is the Hub's. Raises BadTarget.
    """
    token = read_token(authorization)
    if token is None:
        return Caller(address)
    if (known := locals_.get(hashed(token))) is not None:
        return Caller(address, None, known.name, known.groups | {EVERYONE})
    if token.startswith(OWN):
        return Caller(address)
    return Caller(address, f"Bearer {token}")


def is_for_others(authorization: str, locals_: Mapping[str, Local]) -> bool:
    """Whether it may go to a site that is no Hub: it holds no token of the Hub's (`hf_…`) nor of this mirror's (`nh_…`).

    As user or as password: clients of other hosts have it as either.
    """
    try:
        token = read_token(authorization)
        scheme, _, rest = authorization.strip().partition(" ")
        told = base64.b64decode(rest.strip()).decode() if scheme.lower() == "basic" else authorization
    except BadTarget:
        token, told = None, authorization
    return not (_TOLD.search(told) or (token is not None and hashed(token) in locals_))
