"""What the rules make of one file, told rule by rule: `nearhub check-config --explain`. Needs no mirror, and asks nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nearhub.errors import NearhubError
from nearhub.kinds import RULE_KEYS
from nearhub.units import BadValue, format_duration, format_size, parse_duration, parse_size
from nearhub.wire.rules import Fact, Facts, Judgement, Outcome, Rule, decide, format_of, judge
from nearhub.wire.target import Repo, parse_repo_name

_HOW_TO_TELL = {
    Fact.LICENCE: "the licence (--licence)",
    Fact.PATH: "the file (--explain REPO FILE)",
    Fact.SIZE: "the file's size (--size)",
    Fact.AGE: "the commit's age (--age)",
}
_SIGNS = {True: "+", False: "-", None: "?"}
_MATCHES = {True: "yes", False: "no", None: "unknown"}
_SPOKEN = {"yes": "matches", "no": "no match", "unknown": "cannot say", "not reached": "not reached"}


def read_facts(
    repo: str, path: str | None, *, groups: Sequence[str], licences: Sequence[str], age: str | None, size: str | None
) -> Facts:
    """Raises BadValue with all that is wrong, each beginning with the flag."""
    problems: list[str] = []

    def read(flag: str, text: str | None, parse: Callable[[str], Any]) -> Any:
        try:
            return None if text is None else parse(text)
        except BadValue as bad:
            problems.extend(f"{flag}: {complaint}" for complaint in bad.args)

    facts = Facts(
        read("--explain", repo, _repo),
        frozenset(groups),
        tuple(licence.lower() for licence in licences) or None,
        path,
        read("--size", size, parse_size),
        read("--age", age, parse_duration),
    )
    if problems:
        raise BadValue(*problems)
    return facts


def _repo(text: str) -> Repo:
    asked = Repo.from_text(text.removeprefix("models/"))
    try:
        return parse_repo_name(asked.kind, asked.name)
    except NearhubError as exc:
        raise BadValue(exc.message) from exc


def explained(rules: Sequence[Rule], facts: Facts, contact: str) -> dict[str, Any]:
    """As JSON has it."""
    verdict = decide(rules, facts, contact)
    told = []
    is_settled = False
    for rule in rules:
        judged = judge(rule, facts)
        told.append(
            {
                "name": rule.name,
                "action": rule.action,
                "dry_run": rule.is_dry_run,
                "where": rule.where,
                "match": "not reached" if is_settled else _MATCHES[judged.matches],
                "conditions": list(_conditions(judged)),
            }
        )
        is_settled = is_settled or bool(judged.matches and not rule.is_dry_run)
    return {
        "repo": str(facts.repo),
        "file": facts.path,
        "facts": {
            "kind": facts.repo.kind,
            "format": None if facts.path is None else format_of(facts.path),
            "size": facts.size,
            "licences": None if facts.licences is None else list(facts.licences),
            "age_s": facts.age_s,
            "groups": sorted(facts.groups),
        },
        "rules": told,
        "outcome": verdict.outcome,
        "rule": verdict.rule.name if verdict.rule else None,
        "message": verdict.sentence,
        "missing": [fact for fact in Fact if fact in verdict.missing],
        "would_refuse": [rule.name for rule in verdict.would_refuse],
        "dry_run_missing": [fact for fact in Fact if fact in verdict.dry_run_missing],
    }


def _conditions(judged: Judgement) -> Iterator[dict[str, Any]]:
    for finding in judged.findings:
        name, kind = RULE_KEYS[finding.condition]
        value = kind.plain(getattr(judged.rule, name))
        yield {"condition": finding.condition, "value": value, "holds": finding.holds, "told": finding.tell()}


def shown(told: dict[str, Any]) -> str:
    """As a terminal has it."""
    lines = [" ".join(filter(None, (told["repo"], told["file"]))), *_shown_facts(told["facts"]), ""]
    for number, rule in enumerate(told["rules"], 1):
        kind = f"{rule['action']}, dry run" if rule["dry_run"] else rule["action"]
        lines.append(f"{number}. {rule['name']} ({kind}; {rule['where']}): {_SPOKEN[rule['match']]}")
        if rule["match"] != "not reached":
            lines += [_shown_condition(condition) for condition in rule["conditions"]] or ["     without conditions"]
    if told["rules"]:
        lines.append("")
    match told["outcome"]:
        case Outcome.ALLOWED:
            lines.append(f'ALLOWED by "{told["rule"]}"' if told["rule"] else "ALLOWED: no rule refuses it")
        case Outcome.DENIED:
            lines.append(f"REFUSED: {told['message']}")
        case Outcome.UNDETERMINED:
            lines += [f"UNDETERMINED: {told['message']}", f"It depends on {_flags(told['missing'])}."]
    lines += (f'DRY RUN: "{name}" would refuse it' for name in told["would_refuse"])
    if told["dry_run_missing"]:
        lines.append(f"DRY RUN: what would refuse it depends on {_flags(told['dry_run_missing'])}")
    return "\n".join(lines)


def _shown_facts(facts: dict[str, Any]) -> Iterator[str]:
    size, age_s = facts["size"], facts["age_s"]
    known = {
        "kind": facts["kind"],
        "format": facts["format"],
        "size": None if size is None else format_size(size),
        "licence": facts["licences"] and ", ".join(facts["licences"]),
        "commit's age": None if age_s is None else format_duration(age_s),
        "caller's groups": ", ".join(facts["groups"]) or "none",
    }
    yield "  " + "; ".join(f"{name}: {value}" for name, value in known.items() if value is not None)
    if unknown := [name for name, value in known.items() if value is None]:
        yield f"  not known: {', '.join(unknown)}"


def _shown_condition(condition: dict[str, Any]) -> str:
    value = condition["value"]
    asked = ", ".join(value) if isinstance(value, list) else value
    return f"     {_SIGNS[condition['holds']]} {condition['condition']} {asked}: {condition['told']}"


def _flags(facts: Sequence[Fact]) -> str:
    return " and ".join(_HOW_TO_TELL[fact] for fact in facts)
