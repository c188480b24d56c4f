"""What the audit says of an answer: who got what of which repo, and on which grounds; and who was refused it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from nearhub.errors import BadTarget
from nearhub.store.audit import AuditLog
from nearhub.trace import Account
from nearhub.web.callers import Callers
from nearhub.wire.lfs import LOCAL

_MARK = 16
"""Hex digits of a token's fingerprint that stand for it."""


@dataclass(frozen=True, slots=True)
class Audit:
    """`mark`: the fingerprint of a token of the Hub."""

    log: AuditLog
    callers: Callers
    mark: Callable[[str], str]

    def note(self, request: web.BaseRequest, account: Account, outcome: str, length: str, request_id: str) -> None:
        """Of an answer that ended with `outcome`: a status, or how it was cut. `length`: of its body, in bytes, or "-".

        Answers about no repo are not noted; nor are those that give nothing, unless they refuse: a HEAD, and 304.
        """
        if account.repo is None or outcome == "304" or (request.method == "HEAD" and outcome < "400"):
            return
        self.log.add(
            {
                "event": "answer",
                "who": self._who(request, account),
                "address": request.remote,
                "method": request.method,
                "what": account.what,
                "repo": account.repo,
                "revision": account.revision,
                "commit": account.commit,
                "path": account.path,
                "blob": account.blob,
                "outcome": outcome,
                "bytes": int(length) if length.isdigit() else None,
                "grounds": account.grounds,
                "policy": account.policy,
                "rule": account.rule,
                "id": request_id,
            }
        )

    def _who(self, request: web.BaseRequest, account: Account) -> str | None:
        """A local token's name, or what stands for a token of the Hub; None: nobody in particular."""
        if account.who is not None:
            return account.who.removeprefix(LOCAL) if account.who.startswith(LOCAL) else f"token:{account.who[:_MARK]}"
        if "Authorization" not in request.headers:
            return None
        try:
            caller = self.callers.of(request)
        except BadTarget:
            return None
        if caller.authorization is not None:
            return f"token:{self.mark(caller.authorization)[:_MARK]}"
        return caller.name
