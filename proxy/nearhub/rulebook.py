"""Rulebook: asks the operator's rules (wire/rules.py) about what a caller wants, and finds the facts that they wait for.

By name alone first, before anything is asked upstream; then of a file, when it is known what it is. Licence and age are looked
up only where a verdict waits for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime

from nearhub import trace
from nearhub.documents import Documents
from nearhub.errors import NearhubError, RuleRefused
from nearhub.resolve import Resolver
from nearhub.wire.credentials import Caller
from nearhub.wire.rules import Fact, Facts, Outcome, Rule, Verdict, decide, licences_of
from nearhub.wire.target import Repo, format_api

log = logging.getLogger(__name__)

COMMIT_TTL_S = 24 * 3600.0
"""Of the date of a commit, which never changes."""


File = tuple[str | None, int]
"""Path, None where it is not known, and size in bytes."""


class Rulebook:
    """`contact`: whom a refusal tells to ask. Clock: wall seconds."""

    def __init__(
        self,
        rules: Sequence[Rule],
        contact: str,
        resolver: Resolver,
        documents: Documents,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rules = tuple(rules)
        self._contact = contact
        self._resolver = resolver
        self._documents = documents
        self._clock = clock
        self.has_rules = bool(rules)
        self.is_same_for_all = not any(rule.groups or rule.not_groups for rule in rules)

    def refuse_by_name(self, repo: Repo, caller: Caller) -> None:
        """Raises RuleRefused for a repo that this caller may have nothing of, whatever it holds."""
        verdict = self._decide(Facts(repo, caller.groups))
        if verdict.outcome is Outcome.DENIED:
            raise RuleRefused(verdict.sentence)

    async def check(self, repo: Repo, commit: str | None, files: Sequence[File], caller: Caller) -> None:
        """Raises RuleRefused for the first of `files` that this caller may not have; also where that cannot be found out.

        `commit` None: not known, and neither is what follows from it.
        """
        known = Facts(repo, caller.groups)
        verdicts = [self._decide(replace(known, path=path, size=size)) for path, size in files]
        missing = {fact for verdict in verdicts for fact in verdict.missing}
        if commit is not None and Fact.LICENCE in missing:
            manifest = await self._resolver.manifest(repo, commit, caller.address)
            known = replace(known, licences=licences_of(manifest.about))
        if commit is not None and Fact.AGE in missing:
            known = replace(known, age_s=await self._age_s(repo, commit, caller.address))
        for (path, size), verdict in zip(files, verdicts, strict=True):
            settled = self._decide(replace(known, path=path, size=size)) if verdict.missing else verdict
            if settled.outcome is not Outcome.ALLOWED:
                raise RuleRefused(settled.sentence)

    def _decide(self, facts: Facts) -> Verdict:
        verdict = decide(self._rules, facts, self._contact)
        for rule in verdict.would_refuse:
            trace.note(f"rule {rule.name!r}, on a dry run, would refuse this")
            log.info("rule %r, on a dry run, would refuse %s:%s", rule.name, facts.repo, facts.path or "")
        is_final = verdict.outcome is not Outcome.UNDETERMINED
        trace.account().rule = verdict.rule.name if is_final and verdict.rule is not None else None
        if verdict.rule is not None:
            trace.note(f"rule {verdict.rule.name!r}: {verdict.outcome}")
        return verdict

    async def _age_s(self, repo: Repo, commit: str, client: str) -> float | None:
        """By the commit's own date; None where upstream does not tell it."""
        path = f"{format_api(repo, 'commits', commit)}?limit=1"
        try:
            page = await self._documents.get(path, client, about=repo, ttl_s=COMMIT_TTL_S)
            date = datetime.fromisoformat(page.value[0]["date"])
        except (NearhubError, LookupError, TypeError, ValueError) as exc:
            trace.note(f"the date of {repo}@{commit} is not known: {exc}")
            return None
        return self._clock() - date.timestamp()
