"""An operator's rules: what may be had from this mirror, and by whom. Rules and facts in, a verdict out. Pure.

A rule matches when all of its conditions hold; one without any matches everything. The first rule that matches decides; where
none does, everything may be had. Facts may be unknown as yet: a verdict that holds whatever they are is given at once, and
never changes when they become known; the other verdict is UNDETERMINED, and names the facts that would settle it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from nearhub.wire.target import Repo, RepoKind

UNKNOWN_LICENCE = "unknown"
"""The licence of a repo that names none."""
OTHER_FORMAT = "other"
FORMATS: Mapping[str, tuple[str, ...]] = {
    name: tuple(suffixes.split())
    for name, suffixes in {
        "safetensors": ".safetensors",
        "pickle": ".bin .pt .pth .ckpt .ptl .pt.tar .pth.tar .ckpt.tar .nemo .pdparams .pdopt "
        ".pkl .pickle .p .joblib .dill .cloudpickle .dat .data",
        "gguf": ".gguf .ggml",
        "onnx": ".onnx .onnx_data .onnx.data .ort",
        "keras": ".h5 .hdf5 .keras",
        "tensorflow": ".pb .tflite",
        "flax": ".msgpack",
        "numpy": ".npy .npz",
        "archive": ".zip .tar .tgz .tbz2 .txz .7z .rar .mar",
    }.items()
}
"""Suffixes of file names, by format; all other files are OTHER_FORMAT: configurations, tokenizers, cards, tables, images.

`pickle`: what picklescan and modelscan search for pickles, and what torch, NeMo and Paddle save. A name is no proof: a .bin may
hold something else.
"""
_BY_SUFFIX = {suffix: name for name, suffixes in FORMATS.items() for suffix in suffixes}
_TENSORFLOW_SHARD = re.compile(r"\.data-[0-9]+-of-[0-9]+\Z")
_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".z", ".zst", ".lz4")


class Action(StrEnum):
    ALLOW = "allow"
    DENY = "deny"


class Outcome(StrEnum):
    ALLOWED = "allowed"
    DENIED = "denied"
    UNDETERMINED = "undetermined"


class Fact(StrEnum):
    """What may be unknown when a rule is asked."""

    LICENCE = "licence"
    PATH = "path"
    SIZE = "size"
    AGE = "age"


@dataclass(frozen=True, slots=True)
class Rule:
    """One table of the operator's file. Empty tuples and None: no such condition.

    `repos` and `licences` are globs. A list holds when one of its items fits, its `not_` twin when something fits none of
    them: one of several licences, the format, but all of the caller's groups. `where` tells the place in the file.
    """

    name: str
    action: Action
    repos: tuple[str, ...] = ()
    not_repos: tuple[str, ...] = ()
    kinds: tuple[RepoKind, ...] = ()
    not_kinds: tuple[RepoKind, ...] = ()
    licences: tuple[str, ...] = ()
    not_licences: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    not_formats: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    not_groups: tuple[str, ...] = ()
    larger_than_bytes: int | None = None
    smaller_than_bytes: int | None = None
    younger_than_s: float | None = None
    older_than_s: float | None = None
    is_dry_run: bool = False
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is asked for, by whom. None: not known yet. `age_s`: of the commit, in seconds; `path` and `size`: of the file."""

    repo: Repo
    groups: frozenset[str] = frozenset()
    licences: tuple[str, ...] | None = None
    path: str | None = None
    size: int | None = None
    age_s: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One condition of a rule. `holds` None: `needs` is not known. `tell` gives a clause: "the format is pickle"."""

    condition: str
    holds: bool | None
    needs: Fact | None
    tell: Callable[[], str] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Judgement:
    """One rule. `matches` None: that depends on what is `missing`."""

    rule: Rule
    findings: tuple[Finding, ...]
    matches: bool | None
    missing: frozenset[Fact]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say.

    `rule`: the one that decides; where UNDETERMINED, the first that may refuse; None where none does. `sentence`: what to
    tell a client that is refused, in one line. `missing`: the facts that the outcome waits for. `would_refuse`: rules on a dry
    run that would have refused; there may be more of them once `dry_run_missing` is known.
    """

    outcome: Outcome
    rule: Rule | None = None
    sentence: str = ""
    missing: frozenset[Fact] = frozenset()
    would_refuse: tuple[Rule, ...] = ()
    dry_run_missing: frozenset[Fact] = frozenset()


_ALLOWED = Verdict(Outcome.ALLOWED)


def decide(rules: Sequence[Rule], facts: Facts, contact: str = "") -> Verdict:
    """`contact`: whom a refusal tells the client to ask."""
    if not rules:
        return _ALLOWED
    decisive: Judgement | None = None
    waiting: list[Judgement] = []
    missing: frozenset[Fact] = frozenset()
    dry_run_missing: frozenset[Fact] = frozenset()
    would_refuse: list[Rule] = []
    for rule in rules:
        judged = judge(rule, facts)
        if judged.matches is False:
            continue
        if rule.is_dry_run:
            if judged.matches and not missing:
                would_refuse.append(rule)
            else:
                dry_run_missing |= missing | judged.missing
        elif judged.matches:
            decisive = judged
            break
        else:
            waiting.append(judged)
            missing |= judged.missing
    final = decisive.rule.action if decisive else Action.ALLOW
    while waiting and waiting[-1].rule.action is final:  # it makes no difference whether this one matches
        waiting.pop()
    dry_run = (tuple(would_refuse), dry_run_missing)
    if waiting:
        refusing = next(j for j in (*waiting, decisive) if j is not None and j.rule.action is Action.DENY)
        missing = frozenset[Fact]().union(*(j.missing for j in waiting))
        return Verdict(Outcome.UNDETERMINED, refusing.rule, _may_refuse(refusing.rule, missing, contact), missing, *dry_run)
    if final is Action.ALLOW:
        return Verdict(Outcome.ALLOWED, decisive.rule if decisive else None, "", frozenset(), *dry_run)
    assert decisive is not None
    return Verdict(Outcome.DENIED, decisive.rule, _refuses(decisive, contact), frozenset(), *dry_run)


def judge(rule: Rule, facts: Facts) -> Judgement:
    """Whether `rule` matches, and why."""
    findings = tuple(_findings(rule, facts))
    if any(finding.holds is False for finding in findings):
        return Judgement(rule, findings, False, frozenset())
    missing = frozenset(finding.needs for finding in findings if finding.needs and finding.holds is None)
    return Judgement(rule, findings, None if missing else True, missing)


def _findings(rule: Rule, facts: Facts) -> Iterator[Finding]:
    repo, path = (facts.repo,), None if facts.path is None else (facts.path,)
    licences = None if facts.licences is None else facts.licences or (UNKNOWN_LICENCE,)
    groups = facts.groups
    if rule.repos or rule.not_repos:
        yield from _listed("repos", "repo", repo, rule.repos, rule.not_repos, fits_repo)
    if rule.kinds or rule.not_kinds:
        yield from _listed("kinds", "kind", (facts.repo.kind,), rule.kinds, rule.not_kinds, str.__eq__)
    if rule.groups:
        yield Finding("groups", not groups.isdisjoint(rule.groups), None, lambda: _in_groups(groups, rule.groups))
    if rule.not_groups:
        yield Finding("not_groups", groups.isdisjoint(rule.not_groups), None, lambda: _in_groups(groups, rule.not_groups))
    if rule.licences or rule.not_licences:
        yield from _listed("licences", "licence", licences, rule.licences, rule.not_licences, _fits_licence, Fact.LICENCE)
    if rule.formats or rule.not_formats:
        yield from _listed("formats", "format", path, rule.formats, rule.not_formats, _fits_format, Fact.PATH)
    yield from _measured("larger_than", facts.size, rule.larger_than_bytes, 1, _size, Fact.SIZE)
    yield from _measured("smaller_than", facts.size, rule.smaller_than_bytes, -1, _size, Fact.SIZE)
    yield from _measured("younger_than", facts.age_s, rule.younger_than_s, -1, _duration, Fact.AGE)
    yield from _measured("older_than", facts.age_s, rule.older_than_s, 1, _duration, Fact.AGE)


def _listed(
    key: str,
    noun: str,
    values: tuple[Any, ...] | None,
    wanted: tuple[str, ...],
    unwanted: tuple[str, ...],
    fits: Callable[[Any, str], bool],
    needs: Fact | None = None,
) -> Iterator[Finding]:
    """What a list and its twin say of `values`, of which one is enough."""
    for name, patterns, is_twin in ((key, wanted, False), (f"not_{key}", unwanted, True)):
        if patterns and values is None:
            yield Finding(name, None, needs, lambda: f"the {noun} is not known")
        elif patterns and values is not None:
            held = tuple(value for value in values if any(fits(value, pattern) for pattern in patterns) is not is_twin)
            yield Finding(name, bool(held), needs, _telling(noun, held or values))


def _telling(noun: str, values: tuple[Any, ...]) -> Callable[[], str]:
    return lambda: f"the {noun} is {_one_line(', '.join(format_of(v) if noun == 'format' else str(v) for v in values))}"


def _in_groups(groups: frozenset[str], named: tuple[str, ...]) -> str:
    return f"the caller is in {', '.join(group for group in named if group in groups) or 'none of them'}"


def _measured(
    key: str, value: float | None, limit: float | None, sign: int, shown: Callable[[float], str], needs: Fact
) -> Iterator[Finding]:
    """`sign` 1: the value must be above the limit, -1: below."""
    if limit is None:
        return
    noun = _NOUNS[needs]
    if value is None:
        yield Finding(key, None, needs, lambda: f"{noun} is not known")
    else:
        place = "more than" if value > limit else "less than" if value < limit else "exactly"
        yield Finding(key, sign * value > sign * limit, needs, lambda: f"{noun} is {shown(value)}, {place} {shown(limit)}")


# — what fits ————————————————————————————————————————————————————————————————————————————————————


def fits_repo(repo: Repo, pattern: str) -> bool:
    """Whether a pattern such as `owner/*` or `datasets/owner/name` is about `repo`; owner and name each by itself."""
    kind, owner, name = split_repo_pattern(pattern)
    if kind is not None and kind is not repo.kind:
        return False
    if name == "**":
        return True
    own, slash, last = repo.name.lower().rpartition("/")
    return bool(slash) == (owner is not None) and fnmatchcase(own, owner or "") and fnmatchcase(last, name)


@lru_cache(4096)
def split_repo_pattern(pattern: str) -> tuple[RepoKind | None, str | None, str]:
    """Kind, owner and name of `[KIND/][OWNER/]NAME`, in lower case; None: any kind, no owner. Everything has the name `**`."""
    kind, slash, rest = pattern.lower().partition("/")
    if not slash or kind not in tuple(RepoKind):
        kind, rest = "", pattern.lower()
    owner, slash, name = rest.rpartition("/")
    if not slash and name == "*":
        name = "**"
    return RepoKind(kind) if kind else None, owner if slash else None, "*" if slash and name == "**" else name


def _fits_licence(licence: str, pattern: str) -> bool:
    return fnmatchcase(licence.lower(), pattern.lower())


def _fits_format(path: str, wanted: str) -> bool:
    """`wanted`: a format, or a suffix of file names such as .zip."""
    return path.lower().endswith(wanted.lower()) if wanted.startswith(".") else format_of(path) == wanted


@lru_cache(4096)
def format_of(path: str) -> str:
    """The format that a file's name tells; one that is compressed has the format of what is in it."""
    name = path.lower()
    if _TENSORFLOW_SHARD.search(name):
        return "tensorflow"
    while name.endswith(_COMPRESSED):
        name = name.rpartition(".")[0]
    parts = name.rsplit(".", 2)[1:]
    suffixes = (".".join(("", *parts[at:])) for at in range(len(parts)))
    return next((_BY_SUFFIX[suffix] for suffix in suffixes if suffix in _BY_SUFFIX), OTHER_FORMAT)


def licences_of(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The licences that the Hub's document about a repo tells: the card's, else the tags'; UNKNOWN_LICENCE if there is none."""
    card, tags = about.get("cardData"), about.get("tags")
    said = card.get("license") if isinstance(card, dict) else None
    named = said if isinstance(said, list) else [said]
    if not any(isinstance(licence, str) and licence.strip() for licence in named):
        tags = tags if isinstance(tags, list) else []
        named = [tag.removeprefix("license:") for tag in tags if isinstance(tag, str) and tag.startswith("license:")]
    licences = (licence.strip().lower() for licence in named if isinstance(licence, str))
    return tuple(dict.fromkeys(licence for licence in licences if licence)) or (UNKNOWN_LICENCE,)


# — what is told —————————————————————————————————————————————————————————————————————————————————


_NOUNS = {
    Fact.LICENCE: "the repo's licence",
    Fact.PATH: "the file's name",
    Fact.SIZE: "the file's size",
    Fact.AGE: "the commit's age",
}


def _refuses(judged: Judgement, contact: str) -> str:
    """Whose rule it is, and why: who the caller is goes without saying, and so does the kind where there is more to say."""
    reasons = [finding for finding in judged.findings if finding.condition not in ("groups", "not_groups")]
    reasons = [finding for finding in reasons if finding.condition not in ("kinds", "not_kinds")] or reasons
    told = " and ".join(finding.tell() for finding in reasons)
    return f'The rule "{judged.rule.name}" of this mirror refuses this{": " if told else ""}{_cut(told, 250)}.{_ask(contact)}'


def _may_refuse(rule: Rule, missing: frozenset[Fact], contact: str) -> str:
    unknown = " and ".join(_NOUNS[fact] for fact in Fact if fact in missing)
    verb = "is" if len(missing) == 1 else "are"
    return f'The rule "{rule.name}" of this mirror may refuse this: {unknown} {verb} not known here.{_ask(contact)}'


def _ask(contact: str) -> str:
    return f" Contact: {contact}" if contact else ""


def _one_line(text: str) -> str:
    """Words of others, as far as a sentence can hold them."""
    return _cut("".join(c if c.isprintable() else "?" for c in text), 100)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _size(size: float) -> str:
    return _in_units(size, (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1)))


def _duration(duration_s: float) -> str:
    return _in_units(duration_s, (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)))


def _in_units(amount: float, units: Sequence[tuple[str, float]]) -> str:
    unit, worth = next((pair for pair in units if abs(amount) >= pair[1]), units[-1])
    return f"{amount / worth:.4g} {unit}"
