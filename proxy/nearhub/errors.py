"""Every error nearhub raises on purpose. Each class knows how the Hub's clients must hear of it.

    NearhubError
    ├── ClientError                 the request is at fault
    │   ├── BadTarget               400  not a URL the Hub has
    │   ├── NotRoutable             404  a URL this mirror does not serve
    │   ├── ReadOnly                405  a write
    │   ├── HostRejected            421  absolute-form request for another host
    │   ├── Malformed               400  no proper request: its connection is closed
    │   │   └── VersionRefused      505  HTTP/2 and others in the clear
    │   ├── TooLarge                413  a body of more bytes than any client needs
    │   ├── BodyTooSlow             408  a body that does not come
    │   ├── TooManyConnections      503  of this client, or of all
    │   ├── BatchRefused            422/409  an LFS batch that cannot be answered
    │   ├── LinkRefused             403  an LFS link that is not this mirror's, or has expired
    │   ├── RuleRefused             403  what this mirror's operator has ruled out
    │   ├── NotStored               504  only what is stored was wanted (only-if-cached)
    │   ├── BadLock                 400  an hf.lock that cannot be used
    │   ├── BadProof                400  of the log: a proof, a checkpoint, a key or a tile that does not hold
    │   ├── BundleRefused           400  a bundle, a key or a cache that must not be imported as it is
    │   └── ResumeUnsafe            412  (P1b) the client may hold wrong bytes and must start over
    ├── HubRefusal                  the Hub itself said no: its words are passed on
    │   ├── RepoNotFound            404  X-Error-Code: RepoNotFound
    │   ├── RevisionNotFound        404  X-Error-Code: RevisionNotFound
    │   ├── EntryNotFound           404  X-Error-Code: EntryNotFound (with X-Repo-Commit when known)
    │   ├── AccessRefused           401/403  X-Error-Code: GatedRepo, RepoNotFound, or our own
    │   │   └── TokenWanted         401  … and git is asked for one
    │   └── RefusedByHub            400  a question that the Hub does not take
    ├── UpstreamError               an upstream is at fault
    │   ├── UpstreamUnreachable     504  no connection, no DNS, time-out
    │   ├── UnknownOffline          404  … and nothing is known here of what was asked for
    │   │   └── Offline             404  this mirror asks nobody: it is offline
    │   ├── AccessUnknown           503  … and whether this caller may have it is not known
    │   │   └── AccessOffline       403  … and will not be for as long as this mirror is offline
    │   ├── UpstreamBusy            429/503  asked us to wait; carries retry_after_s
    │   ├── UpstreamFailed          502  5xx, cut, stalled, or out of protocol
    │   │   └── GitUnfit            502  … in its git, and it will be so again: too large, malformed
    │   └── UpstreamLied            502  wrong bytes, wrong length, another object
    └── StoreError                  this machine is at fault
        ├── StoreRefused            at start: a cache directory that must not be used
        ├── GitMissing              501  no git program here
        ├── GitFailed               500  git could not answer from what it has here
        ├── AuditBroken             a line of the audit that does not follow from the one before
        └── StoreFailed             507  EIO, a file that is not ours
            └── StoreFull           507  no room for these bytes: they are streamed through instead

Rendering them is web/middleware.py's business; nothing here knows about HTTP libraries.
"""

from __future__ import annotations

from typing import ClassVar


class NearhubError(Exception):
    """Base of all. `status` and `code` go on the wire, `fault` and `expected` into the log."""

    status: ClassVar[int] = 500
    code: ClassVar[str | None] = None
    fault: ClassVar[str] = "mirror"
    expected: ClassVar[bool] = False
    closes: ClassVar[bool] = False
    """Whether the connection is closed after this answer."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    @property
    def http_status(self) -> int:
        return self.status

    @property
    def error_code(self) -> str:
        """Value of X-Error-Code: one that the Hub's clients act on, else the name of the class, which they ignore."""
        return self.code or type(self).__name__

    def headers(self) -> dict[str, str]:
        """Extra response headers that this error needs."""
        return {}


class ClientError(NearhubError):
    status = 400
    fault = "client"
    expected = True


class BadTarget(ClientError):
    """The URL cannot name anything on a Hub: an empty or dot segment, a control byte, bad percent-encoding."""


class NotRoutable(ClientError):
    """A well-formed URL for something this mirror does not serve."""

    status = 404


class ReadOnly(ClientError):
    """A write. A mirror never forwards one with someone's token."""

    status = 405

    def headers(self) -> dict[str, str]:
        return {"Allow": "GET, HEAD, OPTIONS"}


class HostRejected(ClientError):
    """An absolute-form request for another host, or CONNECT: this is no forward proxy."""

    status = 421


class Malformed(ClientError):
    """A request whose shape leaves in doubt where it ends or for whom it is: nothing more is read from its connection."""

    closes = True


class VersionRefused(Malformed):
    """A version of HTTP that is not spoken here."""

    status = 505


class TooLarge(ClientError):
    """A request body beyond what any client sends."""

    status = 413


class BodyTooSlow(ClientError):
    """A request body that keeps the mirror waiting."""

    status = 408
    closes = True


class TooManyConnections(ClientError):
    """One connection more than this client, or all of them, may have."""

    status = 503

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "2"}


class BatchRefused(ClientError):
    """An LFS batch that is none, or asks for another kind of hash."""

    def __init__(self, message: str, *, status: int = 422) -> None:
        super().__init__(message)
        self._status = status

    @property
    def http_status(self) -> int:
        return self._status


class LinkRefused(ClientError):
    """A link to an LFS object that this mirror did not sign, or that has had its time."""

    status = 403


class RuleRefused(ClientError):
    """A rule of the operator's says no; the message is one line that names it, and whom to ask.

    Not a HubRefusal: the Hub knows nothing of it, and none of the Hub's codes would tell the client what is the matter.
    """

    status = 403


class NotStored(ClientError):
    """The client wants an answer from the cache or none (RFC 9111 §5.2.1.7), and there is none."""

    status = 504


class BadLock(ClientError):
    """An hf.lock that cannot be read, or does not have what it is asked for."""


class BadProof(ClientError):
    """What a log or a proof says does not hold, or is none; the message says what is wrong."""


class BundleRefused(ClientError):
    """What was to be imported or exported cannot be, as it is; the message says what is wrong with it."""


class ResumeUnsafe(ClientError):
    """A Range that would continue bytes which failed verification (P1b)."""

    status = 412


class HubRefusal(NearhubError):
    """The Hub answered, and the answer is no."""

    status = 404
    fault = "client"
    expected = True


class RepoNotFound(HubRefusal):
    code = "RepoNotFound"


class RevisionNotFound(HubRefusal):
    code = "RevisionNotFound"


class EntryNotFound(HubRefusal):
    """No such file at that commit. With `commit`, clients remember the absence and stop asking."""

    code = "EntryNotFound"

    def __init__(self, message: str, commit: str | None = None) -> None:
        super().__init__(message)
        self.commit = commit

    def headers(self) -> dict[str, str]:
        return {"X-Repo-Commit": self.commit} if self.commit else {}


class AccessRefused(HubRefusal):
    """Not for this caller: gated, private (which looks like absent), or disabled."""

    status = 401

    def __init__(self, message: str, *, status: int = 401, code: str | None = None) -> None:
        super().__init__(message)
        self._status = status
        self._code = code

    @property
    def http_status(self) -> int:
        return self._status

    @property
    def error_code(self) -> str:
        return self._code or type(self).__name__


class TokenWanted(AccessRefused):
    """As the Hub tells git and git-lfs: come again with a user and a token."""

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": 'Basic realm="a token of the Hub, as the password", charset="UTF-8"'}


GONE = (RepoNotFound, RevisionNotFound, AccessRefused)
"""What the Hub says of something that it does not show, or not any more. Behind the door, what is here stands in for it."""


class RefusedByHub(HubRefusal):
    """The Hub calls the question a bad one."""

    status = 400


class UpstreamError(NearhubError):
    status = 502
    fault = "upstream"


class UpstreamUnreachable(UpstreamError):
    """No answer at all: DNS, connect, TLS, or a time-out. `is_silence`: it cost a whole time-out to find out."""

    status = 504

    def __init__(self, message: str, *, is_silence: bool = False) -> None:
        super().__init__(message)
        self.is_silence = is_silence


class UnknownOffline(UpstreamUnreachable):
    """Upstream does not answer, and the mirror never heard of this. Not 504: clients repeat their question for 23 s on that.

    Its code claims nothing about the repo, so that clients fall back on what they have themselves.
    """

    status = 404
    expected = True


class Offline(UnknownOffline):
    """Upstream is not even asked: this mirror is offline, by its operator's word or after lasting silence."""

    code = "UnknownOffline"


class AccessUnknown(UpstreamError):
    """The Hub alone knows whether this token opens a repo, and cannot be asked. Not 404: it may well be there."""

    status = 503
    expected = True

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "10"}


class AccessOffline(AccessUnknown):
    """Not 503: there is nothing to wait for, and clients would."""

    status = 403

    def headers(self) -> dict[str, str]:
        return {}


class UpstreamBusy(UpstreamError):
    """429, or 503 with Retry-After. `retry_after_s` is a duration in seconds from now."""

    expected = True

    def __init__(self, message: str, *, retry_after_s: float, status: int = 429) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self._status = status

    @property
    def http_status(self) -> int:
        return self._status

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, round(self.retry_after_s)))}


class UpstreamFailed(UpstreamError):
    """It answered, but not usefully: 5xx, a cut or stalled body, an answer out of protocol."""


class GitUnfit(UpstreamFailed):
    """What its git has is malformed, or more than this mirror takes: asking again brings the same."""


class UpstreamLied(UpstreamError):
    """What it sent is not what it announced: wrong bytes, wrong length, another object's validator."""


class StoreError(NearhubError):
    status = 507
    fault = "mirror"


class StoreRefused(StoreError):
    """The cache directory must not be used as it is; the message says why and what to do."""


class AuditBroken(StoreError):
    """The audit was changed by somebody else, or is incomplete."""


class GitMissing(StoreError):
    """There is no git program on this machine, so nothing can be cloned from it."""

    status = 501


class GitFailed(StoreError):
    """git could not answer from the objects it has here."""

    status = 500


class StoreFailed(StoreError):
    """The disk said no (EIO) while serving."""


class StoreFull(StoreFailed):
    """No room for these bytes."""
