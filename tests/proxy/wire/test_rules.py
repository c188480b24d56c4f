"""decide(): which rule matches first, what is said of facts that nobody knows yet, and what a refused client reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.errors import RuleRefused
from nearhub.wire.rules import (
    FORMATS,
    Action,
    Fact,
    Facts,
    Outcome,
    Rule,
    Verdict,
    decide,
    fits_repo,
    format_of,
    judge,
    licences_of,
)
from nearhub.wire.target import Repo, RepoKind

MODEL = Repo(RepoKind.MODELS, "Org/Model")
WEEK_S = 7 * 86400.0
ALL_KNOWN = Facts(MODEL, frozenset(), ("mit",), "config.json", 10, 30 * 86400.0)


def deny(name: str = "a rule", **conditions: Any) -> Rule:
    return Rule(name, Action.DENY, **conditions)


def allow(name: str = "an exception", **conditions: Any) -> Rule:
    return Rule(name, Action.ALLOW, **conditions)


def is_denied(rule: Rule, **known: Any) -> bool:
    """What one rule does to a request of which everything is known."""
    verdict = decide([rule], replace(ALL_KNOWN, **known))
    assert verdict.outcome is not Outcome.UNDETERMINED
    return verdict.outcome is Outcome.DENIED


class TestConditions:
    @pytest.mark.parametrize(
        ("pattern", "repo", "fits"),
        [
            ("org/*", "models:Org/Model", True),
            ("ORG/mod*", "models:org/model", True),
            ("org/**", "models:org/model", True),
            ("org/mode?", "models:org/model", True),
            ("org/mode?", "models:org/models", False),
            ("org/*", "datasets:org/data", True),
            ("org/*", "models:organic/model", False),
            ("org/*", "models:my-org/model", False),
            ("o*/model", "models:org/model", True),
            ("*/model", "models:a/model", True),
            ("*/*", "models:a/b", True),
            ("*/*", "models:gpt2", False),
            ("gpt2", "models:GPT2", True),
            ("gpt2", "models:a/gpt2", False),
            ("*", "models:gpt2", True),
            ("*", "models:a/b", True),
            ("**", "spaces:a/b", True),
            ("datasets/org/*", "datasets:org/data", True),
            ("datasets/org/*", "models:org/model", False),
            ("models/org/*", "datasets:org/data", False),
            ("Datasets/squad", "datasets:squad", True),
            ("datasets/*", "datasets:a/b", True),
            ("datasets/*", "datasets:squad", True),
            ("datasets/*", "models:a/b", False),
        ],
    )
    def test_patterns_of_repos(self, pattern: str, repo: str, fits: bool) -> None:
        """Owner and name apart, in any case; a kind before them narrows it; a bare star is everything."""
        kind, _, name = repo.partition(":")
        asked = Repo(RepoKind(kind), name)
        assert is_denied(deny(repos=(pattern,)), repo=asked) is fits
        assert is_denied(deny(not_repos=(pattern,)), repo=asked) is not fits

    @pytest.mark.parametrize("pattern", ["*", "other/x"])
    def test_one_pattern_that_fits_is_enough(self, pattern: str) -> None:
        assert is_denied(deny(repos=("none/none", pattern, "org/model")))
        assert not is_denied(deny(not_repos=("none/none", pattern, "org/model")))

    def test_kinds(self) -> None:
        assert is_denied(deny(kinds=(RepoKind.DATASETS, RepoKind.MODELS)))
        assert not is_denied(deny(kinds=(RepoKind.DATASETS, RepoKind.SPACES)))
        assert is_denied(deny(not_kinds=(RepoKind.DATASETS,)))
        assert not is_denied(deny(not_kinds=(RepoKind.MODELS,)))

    @pytest.mark.parametrize(
        ("licences", "in_list", "outside"),
        [
            (("mit",), True, False),
            (("MIT",), True, False),
            (("cc-by-4.0",), True, False),
            (("gpl-3.0",), False, True),
            (("unknown",), False, True),
            ((), False, True),
            (("mit", "gpl-3.0"), True, True),
        ],
    )
    def test_licences(self, licences: tuple[str, ...], in_list: bool, outside: bool) -> None:
        """None at all is the licence "unknown"; of several, one decides: either list is as strict as it can be read."""
        assert is_denied(deny(licences=("mit", "CC-*")), licences=licences) is in_list
        assert is_denied(deny(not_licences=("mit", "CC-*")), licences=licences) is outside

    def test_the_unknown_licence_can_be_named(self) -> None:
        assert is_denied(deny(licences=("unknown",)), licences=())
        assert not is_denied(deny(not_licences=("mit", "unknown")), licences=("unknown",))

    def test_groups(self) -> None:
        """One of the caller's groups is enough to be in the list, and to be spared by its twin."""
        assert not is_denied(deny(groups=("trusted",)))
        assert is_denied(deny(groups=("trusted", "staff")), groups=frozenset({"staff", "everyone"}))
        assert is_denied(deny(not_groups=("trusted",)))
        assert is_denied(deny(not_groups=("trusted",)), groups=frozenset({"staff"}))
        assert not is_denied(deny(not_groups=("trusted", "x")), groups=frozenset({"staff", "trusted"}))

    @pytest.mark.parametrize(("size", "above", "below"), [(99, False, True), (100, False, False), (101, True, False)])
    def test_sizes(self, size: int, above: bool, below: bool) -> None:
        """A limit itself is neither larger nor smaller."""
        assert is_denied(deny(larger_than_bytes=100), size=size) is above
        assert is_denied(deny(smaller_than_bytes=100), size=size) is below

    def test_a_limit_of_nothing_is_a_limit(self) -> None:
        assert is_denied(deny(larger_than_bytes=0), size=1)
        assert not is_denied(deny(larger_than_bytes=0), size=0)

    @pytest.mark.parametrize(
        ("age_s", "is_young", "is_old"),
        [(WEEK_S - 1, True, False), (WEEK_S, False, False), (WEEK_S + 1, False, True), (-60.0, True, False)],
    )
    def test_ages(self, age_s: float, is_young: bool, is_old: bool) -> None:
        """A commit from the future is younger than anything."""
        assert is_denied(deny(younger_than_s=WEEK_S), age_s=age_s) is is_young
        assert is_denied(deny(older_than_s=WEEK_S), age_s=age_s) is is_old

    def test_all_conditions_must_hold(self) -> None:
        rule = deny(repos=("org/*",), formats=("pickle",), larger_than_bytes=5)
        assert is_denied(rule, path="a.bin")
        assert not is_denied(rule, path="a.bin", size=5)
        assert not is_denied(rule, path="a.json")
        assert not is_denied(rule, path="a.bin", repo=Repo(RepoKind.MODELS, "x/y"))

    def test_a_rule_without_conditions_matches_everything(self) -> None:
        assert decide([deny()], Facts(MODEL)).outcome is Outcome.DENIED


class TestFormats:
    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("model-00001-of-00002.safetensors", "safetensors"),
            ("a/b/MODEL.SafeTensors", "safetensors"),
            ("pytorch_model.bin", "pickle"),
            ("weights/last.PT", "pickle"),
            ("x.pth", "pickle"),
            ("v1-5.ckpt", "pickle"),
            ("checkpoint.pth.tar", "pickle"),
            ("data.pkl", "pickle"),
            ("data.pkl.gz", "pickle"),
            ("data.pkl.xz.lz4", "pickle"),
            ("data.pickle", "pickle"),
            ("clf.joblib", "pickle"),
            ("clf.dill", "pickle"),
            (".bin", "pickle"),
            ("model_state.pdparams", "pickle"),
            ("q4_k_m.gguf", "gguf"),
            ("model.onnx", "onnx"),
            ("model.onnx_data", "onnx"),
            ("model.onnx.data", "onnx"),
            ("tf_model.h5", "keras"),
            ("saved_model.pb", "tensorflow"),
            ("variables.data-00000-of-00001", "tensorflow"),
            ("flax_model.msgpack", "flax"),
            ("codes.npz", "numpy"),
            ("images.tar.gz", "archive"),
            ("images.zip", "archive"),
            ("config.json", "other"),
            ("model.safetensors.index.json", "other"),
            ("pytorch_model.bin.index.json", "other"),
            ("tokenizer.model", "other"),
            ("spiece.model", "other"),
            ("vocab.txt", "other"),
            ("merges.txt", "other"),
            ("tokenizer_config.json", "other"),
            ("chat_template.jinja", "other"),
            ("README.md", "other"),
            (".gitattributes", "other"),
            ("data/train-00000.parquet", "other"),
            ("train.jsonl.zst", "other"),
            ("safetensors", "other"),
            ("a.bin/config.json", "other"),
            ("a.bin/x", "other"),
            ("v1.5/a.pt", "pickle"),
            (".gz" * 1000, "other"),
            (".gz", "other"),
            ("", "other"),
        ],
    )
    def test_formats_are_told_by_the_name(self, path: str, name: str) -> None:
        """By its last directory's file alone, in any case; compression changes nothing."""
        assert format_of(path) == name
        assert is_denied(deny(formats=(name,)), path=path)
        assert not is_denied(deny(not_formats=(name,)), path=path)

    def test_no_suffix_has_two_formats(self) -> None:
        suffixes = [suffix for own in FORMATS.values() for suffix in own]
        assert len(suffixes) == len(set(suffixes)) and all(s == s.lower() and s.startswith(".") for s in suffixes)

    def test_safetensors_only_leaves_what_a_model_needs_beside_its_weights(self) -> None:
        rule = deny(not_formats=("safetensors", "other"))
        for path in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "README.md", "modeling.py"):
            assert not is_denied(rule, path=path)
        for path in ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack", "a.zip"):
            assert is_denied(rule, path=path)

    def test_pickles_can_be_opened_for_one_group(self) -> None:
        rule = deny(formats=("pickle",), not_groups=("trusted",))
        assert is_denied(rule, path="a.pt") and not is_denied(rule, path="a.pt", groups=frozenset({"trusted"}))
        rules = [allow(formats=("pickle",), groups=("trusted",)), deny(formats=("pickle",))]
        trusted = replace(ALL_KNOWN, path="a.pt", groups=frozenset({"trusted"}))
        assert decide(rules, trusted).outcome is Outcome.ALLOWED
        assert decide(rules, replace(trusted, groups=frozenset())).outcome is Outcome.DENIED

    def test_a_suffix_stands_for_a_format_of_one_s_own(self) -> None:
        assert is_denied(deny(formats=(".Engine",)), path="a/model.ENGINE")
        assert not is_denied(deny(formats=(".engine",)), path="engine")


class TestLicencesOf:
    @pytest.mark.parametrize(
        ("about", "licences"),
        [
            ({"cardData": {"license": "MIT"}, "tags": ["license:other"]}, ("mit",)),
            ({"cardData": {"license": ["mit", "cc-by-4.0", "mit"]}}, ("mit", "cc-by-4.0")),
            ({"cardData": {"license": " "}, "tags": ["x", "license:apache-2.0", "license:mit"]}, ("apache-2.0", "mit")),
            ({"cardData": {"license": ["", "mit"]}}, ("mit",)),
            ({"cardData": None, "tags": ["license:openrail"]}, ("openrail",)),
            ({"cardData": {"license": [None, 5]}, "tags": [None, "licensed"]}, ("unknown",)),
            ({"cardData": ["license"], "tags": "license:mit"}, ("unknown",)),
            ({}, ("unknown",)),
        ],
    )
    def test_what_a_repo_says_of_its_licence(self, about: dict[str, Any], licences: tuple[str, ...]) -> None:
        """The card, else the tags; whatever else is there is no licence."""
        assert licences_of(about) == licences


class TestUnknownFacts:
    """The door asks before it knows everything."""

    def test_nothing_matches(self) -> None:
        """Without rules, and where no rule matches, everything may be had."""
        assert decide([], Facts(MODEL)) == Verdict(Outcome.ALLOWED)
        assert decide([deny(repos=("other/*",))], Facts(MODEL)) == Verdict(Outcome.ALLOWED)

    @pytest.mark.parametrize(
        ("condition", "fact"),
        [
            ({"licences": ("mit",)}, Fact.LICENCE),
            ({"not_licences": ("mit",)}, Fact.LICENCE),
            ({"formats": ("pickle",)}, Fact.PATH),
            ({"not_formats": ("pickle",)}, Fact.PATH),
            ({"larger_than_bytes": 1}, Fact.SIZE),
            ({"smaller_than_bytes": 1}, Fact.SIZE),
            ({"younger_than_s": 1.0}, Fact.AGE),
            ({"older_than_s": 1.0}, Fact.AGE),
        ],
    )
    def test_a_condition_waits_for_its_fact(self, condition: dict[str, Any], fact: Fact) -> None:
        verdict = decide([deny("x", **condition)], Facts(MODEL))
        assert (verdict.outcome, verdict.missing) == (Outcome.UNDETERMINED, {fact})
        assert verdict.rule is not None and verdict.rule.name == "x"

    def test_an_allowing_rule_that_would_change_nothing_waits_for_nothing(self) -> None:
        assert decide([allow(younger_than_s=1.0)], Facts(MODEL)).outcome is Outcome.ALLOWED

    def test_a_refusal_that_is_certain_is_told_at_once(self) -> None:
        """Whatever the licence is, one of the two refuses: no call upstream is needed to know."""
        verdict = decide([deny("licences", licences=("mit",)), deny("orgs", not_repos=("us/*",))], Facts(MODEL))
        assert (verdict.outcome, verdict.missing) == (Outcome.DENIED, frozenset())
        assert verdict.rule is not None and verdict.rule.name == "orgs"

    def test_another_outcome_in_between_keeps_it_open(self) -> None:
        rules = [allow("ours", licences=("mit",)), deny("orgs", not_repos=("us/*",))]
        verdict = decide(rules, Facts(MODEL))
        assert (verdict.outcome, verdict.missing) == (Outcome.UNDETERMINED, {Fact.LICENCE})
        assert verdict.rule is not None and verdict.rule.name == "orgs"

    def test_the_first_that_may_refuse_is_named(self) -> None:
        rules = [allow(formats=("other",)), deny("early", licences=("mit",)), allow(larger_than_bytes=1), deny("late")]
        verdict = decide(rules, Facts(MODEL))
        assert verdict.rule is not None and verdict.rule.name == "early" and '"early"' in verdict.sentence

    def test_facts_that_cannot_change_the_outcome_are_not_asked_for(self) -> None:
        """The age is behind a rule that ends in the same way; the size, behind the rule that decides."""
        rules = [deny(licences=("mit",)), allow(younger_than_s=1.0), allow(repos=("org/*",)), deny(larger_than_bytes=1)]
        assert decide(rules, Facts(MODEL)).missing == {Fact.LICENCE}

    def test_what_is_known_rules_out_what_is_not(self) -> None:
        """A rule of which one known condition fails needs no more."""
        assert decide([deny(kinds=(RepoKind.SPACES,), licences=("mit",))], Facts(MODEL)).outcome is Outcome.ALLOWED

    def test_a_listing_is_refused_only_if_no_file_could_be_had(self) -> None:
        safetensors_only = deny(not_formats=("safetensors", "other"))
        assert decide([safetensors_only], replace(ALL_KNOWN, path=None)).outcome is Outcome.UNDETERMINED
        assert decide([safetensors_only, deny()], replace(ALL_KNOWN, path=None)).outcome is Outcome.DENIED


class TestDryRun:
    def test_it_is_told_and_does_not_refuse(self) -> None:
        rule = deny("try", is_dry_run=True, formats=("pickle",))
        verdict = decide([rule], replace(ALL_KNOWN, path="a.bin"))
        assert (verdict.outcome, verdict.sentence, verdict.would_refuse) == (Outcome.ALLOWED, "", (rule,))
        assert decide([rule], ALL_KNOWN).would_refuse == ()

    def test_it_hides_no_rule_behind_it(self) -> None:
        verdict = decide([deny("try", is_dry_run=True), deny("real")], Facts(MODEL))
        assert verdict.outcome is Outcome.DENIED and verdict.rule is not None and verdict.rule.name == "real"
        assert [rule.name for rule in verdict.would_refuse] == ["try"]

    def test_it_is_not_told_behind_the_rule_that_decides(self) -> None:
        rules = [allow(repos=("org/*",)), deny(is_dry_run=True)]
        assert decide(rules, Facts(MODEL)).would_refuse == ()

    def test_what_it_waits_for_does_not_hold_up_the_outcome(self) -> None:
        """The door may find out what a dry run would have done, or not."""
        verdict = decide([deny(is_dry_run=True, younger_than_s=1.0)], Facts(MODEL))
        assert (verdict.outcome, verdict.missing, verdict.dry_run_missing) == (Outcome.ALLOWED, frozenset(), {Fact.AGE})

    def test_it_is_not_told_while_a_rule_before_it_may_match(self) -> None:
        rules = [allow(licences=("mit",)), deny("try", is_dry_run=True)]
        assert decide(rules, Facts(MODEL)).would_refuse == ()
        assert decide(rules, Facts(MODEL)).dry_run_missing == {Fact.LICENCE}
        assert [rule.name for rule in decide(rules, Facts(MODEL, licences=("gpl",))).would_refuse] == ["try"]


class TestSentences:
    def test_a_refusal_names_the_rule_the_reason_and_the_contact(self) -> None:
        rule = deny("no pickles", kinds=(RepoKind.MODELS,), formats=("pickle",), not_groups=("trusted",))
        assert decide([rule], replace(ALL_KNOWN, path="a.bin"), "ml@lab.example").sentence == (
            'The rule "no pickles" of this mirror refuses this: the format is pickle. Contact: ml@lab.example'
        )

    @pytest.mark.parametrize(
        ("rule", "reason"),
        [
            (deny(), "refuses this."),
            (deny(groups=("everyone",)), "refuses this."),
            (deny(kinds=(RepoKind.MODELS,)), "refuses this: the kind is models."),
            (deny(not_repos=("us/*",)), "refuses this: the repo is Org/Model."),
            (deny(licences=("mit", "gpl-3.0")), "refuses this: the licence is gpl-3.0."),
            (deny(not_licences=("gpl-3.0",)), "refuses this: the licence is x\u00a0y?z."),
            (deny(larger_than_bytes=50 * 10**9), "refuses this: the file's size is 51.2 GB, more than 50 GB."),
            (deny(younger_than_s=WEEK_S), "refuses this: the commit's age is 1.5 h, less than 7 d."),
        ],
    )
    def test_reasons(self, rule: Rule, reason: str) -> None:
        facts = Facts(MODEL, frozenset({"everyone"}), ("x\u00a0y\nz", "gpl-3.0"), "a", 51_200_000_000, 5400.0)
        expected = f'The rule "a rule" of this mirror {reason}'.replace("\u00a0", "?")
        assert decide([rule], facts).sentence == expected

    def test_what_may_refuse_names_what_is_not_known(self) -> None:
        rule = deny("careful", licences=("mit",), younger_than_s=1.0)
        assert decide([rule], Facts(MODEL), "x").sentence == (
            "The rule \"careful\" of this mirror may refuse this: the repo's licence and the commit's age are not known here. "
            "Contact: x"
        )

    def test_it_is_one_line_that_a_header_holds(self) -> None:
        """Whatever a repo calls its licences, the name of the rule and the contact are there."""
        rule = deny("n" * 60, repos=("*",), licences=("*",), larger_than_bytes=1, younger_than_s=1e10)
        facts = Facts(Repo(RepoKind.MODELS, f"{'o' * 96}/{'m' * 96}"), frozenset(), ("l" * 5000 + "\r\n\x00",), "a", 2, 1.0)
        sentence = decide([rule], facts, "c" * 120).sentence
        assert len(sentence) <= 500 and sentence.isprintable() and rule.name in sentence and sentence.endswith("c" * 120)

    def test_every_condition_tells_something(self) -> None:
        """With and without the facts, for each condition there is."""
        values: dict[str, Any] = {"larger_than_bytes": 1, "smaller_than_bytes": 9, "younger_than_s": 1.0, "older_than_s": 1.0}
        names = {f.name for f in fields(Rule)} - {"name", "action", "is_dry_run", "where"}
        for name in names:
            rule = deny(**{name: values.get(name, ("models",))})
            for facts in (ALL_KNOWN, Facts(MODEL)):
                (finding,) = judge(rule, facts).findings
                assert finding.condition == name.removesuffix("_bytes").removesuffix("_s") and finding.tell()

    def test_a_client_is_told_as_much_by_a_code_that_misleads_none(self) -> None:
        """403, and none of the codes that huggingface_hub knows: each of those claims something that is not so."""
        refused = RuleRefused("a sentence")
        assert (refused.http_status, refused.error_code, refused.message) == (403, "RuleRefused", "a sentence")
        assert refused.fault == "client" and refused.expected


# — against a second reading of the rules ————————————————————————————————————————————————————————

LICENCES = [("mit",), ("gpl-3.0",), ("unknown",), ("mit", "gpl-3.0")]
PATHS = {"a.bin": "pickle", "a.safetensors": "safetensors", "a.json": "other"}
SIZES = [0, 5, 6, 10, 11]
AGES = [0.0, 5.0, 6.0, 10.0, 11.0]
REPOS = [Repo(RepoKind.MODELS, "a/x"), Repo(RepoKind.MODELS, "b/x"), Repo(RepoKind.DATASETS, "a/x")]
PATTERNS = {"a/*": {REPOS[0], REPOS[2]}, "*/X": set(REPOS), "datasets/a/*": {REPOS[2]}, "b/x": {REPOS[1]}}
GROUPS = ["g", "h"]


def subsets(of: Sequence[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(of), min_size=1, max_size=2, unique=True).map(tuple)


@st.composite
def conditions(draw: st.DrawFn) -> dict[str, Any]:
    """At most three, and never a list beside its twin, nor limits that nothing is between: those the settings refuse."""
    possible: dict[str, st.SearchStrategy[Any]] = {
        "repos": subsets(list(PATTERNS)),
        "kinds": subsets([RepoKind.MODELS, RepoKind.DATASETS, RepoKind.SPACES]),
        "licences": subsets(["mit", "gpl-*", "unknown"]),
        "formats": subsets(["pickle", "safetensors", "other", ".json"]),
        "groups": subsets(GROUPS),
        "larger_than_bytes": st.sampled_from([5, 10]),
        "smaller_than_bytes": st.sampled_from([6, 11]),
        "younger_than_s": st.sampled_from([6.0, 11.0]),
        "older_than_s": st.sampled_from([5.0, 10.0]),
    }
    chosen = draw(st.lists(st.sampled_from(list(possible)), max_size=3, unique=True))
    lists = ("repos", "kinds", "licences", "formats", "groups")
    made = {(f"not_{key}" if key in lists and draw(st.booleans()) else key): draw(possible[key]) for key in chosen}
    for low, high in (("larger_than_bytes", "smaller_than_bytes"), ("older_than_s", "younger_than_s")):
        if low in made and high in made:
            made |= {low: 5, high: 11}
    return made


@st.composite
def rules(draw: st.DrawFn, max_size: int = 5) -> list[Rule]:
    made = []
    for index in range(draw(st.integers(0, max_size))):
        action = draw(st.sampled_from([Action.DENY, Action.ALLOW]))
        is_dry_run = action is Action.DENY and draw(st.integers(0, 3)) == 0
        made.append(Rule(str(index), action, **draw(conditions()), is_dry_run=is_dry_run))
    return made


complete_facts = st.builds(
    Facts,
    st.sampled_from(REPOS),
    st.frozensets(st.sampled_from(GROUPS)),
    st.sampled_from(LICENCES),
    st.sampled_from(list(PATHS)),
    st.sampled_from(SIZES),
    st.sampled_from(AGES),
)
FIELD_OF = {Fact.LICENCE: "licences", Fact.PATH: "path", Fact.SIZE: "size", Fact.AGE: "age_s"}
hidden = st.frozensets(st.sampled_from(list(Fact)))


def without(facts: Facts, unknown: frozenset[Fact]) -> Facts:
    return replace(facts, **{FIELD_OF[fact]: None for fact in unknown})


def completions(facts: Facts) -> Iterator[Facts]:
    """Every way in which the facts may turn out."""
    known = [
        LICENCES if facts.licences is None else [facts.licences],
        list(PATHS) if facts.path is None else [facts.path],
        SIZES if facts.size is None else [facts.size],
        AGES if facts.age_s is None else [facts.age_s],
    ]
    for licences, path, size, age_s in itertools.product(*known):
        yield Facts(facts.repo, facts.groups, licences, path, size, age_s)  # type: ignore[arg-type]


def matches(rule: Rule, facts: Facts) -> bool:
    """A second reading of what a rule says, word by word."""
    assert facts.licences is not None and facts.path is not None and facts.size is not None and facts.age_s is not None

    def has(licence: str, patterns: tuple[str, ...]) -> bool:
        return licence in patterns or (licence == "gpl-3.0" and "gpl-*" in patterns)

    def is_of(formats: tuple[str, ...]) -> bool:
        path = facts.path or ""
        return PATHS[path] in formats or (path == "a.json" and ".json" in formats)

    checks = [
        not rule.repos or any(facts.repo in PATTERNS[pattern] for pattern in rule.repos),
        not rule.not_repos or all(facts.repo not in PATTERNS[pattern] for pattern in rule.not_repos),
        not rule.kinds or facts.repo.kind in rule.kinds,
        facts.repo.kind not in rule.not_kinds,
        not rule.licences or any(has(licence, rule.licences) for licence in facts.licences),
        not rule.not_licences or any(not has(licence, rule.not_licences) for licence in facts.licences),
        not rule.formats or is_of(rule.formats),
        not rule.not_formats or not is_of(rule.not_formats),
        not rule.groups or bool(facts.groups & set(rule.groups)),
        not facts.groups & set(rule.not_groups),
        rule.larger_than_bytes is None or facts.size > rule.larger_than_bytes,
        rule.smaller_than_bytes is None or facts.size < rule.smaller_than_bytes,
        rule.younger_than_s is None or facts.age_s < rule.younger_than_s,
        rule.older_than_s is None or facts.age_s > rule.older_than_s,
    ]
    return all(checks)


def reference(ruled: Sequence[Rule], facts: Facts) -> tuple[Outcome, Rule | None, list[Rule]]:
    """Outcome, the rule that decides, and the dry runs on the way to it."""
    dry: list[Rule] = []
    for rule in ruled:
        if not matches(rule, facts):
            continue
        if not rule.is_dry_run:
            return (Outcome.ALLOWED if rule.action is Action.ALLOW else Outcome.DENIED), rule, dry
        dry.append(rule)
    return Outcome.ALLOWED, None, dry


class TestProperties:
    @given(rules(), complete_facts)
    def test_the_first_match_wins(self, ruled: list[Rule], facts: Facts) -> None:
        """With all facts known, outcome, rule and dry runs are those of reading the rules one by one."""
        verdict = decide(ruled, facts)
        assert (verdict.outcome, verdict.rule, list(verdict.would_refuse)) == reference(ruled, facts)
        assert not verdict.missing and not verdict.dry_run_missing
        assert bool(verdict.sentence) is (verdict.outcome is Outcome.DENIED)

    @given(rules(), complete_facts, hidden)
    def test_a_verdict_that_is_given_holds_however_the_facts_turn_out(
        self, ruled: list[Rule], facts: Facts, unknown: frozenset[Fact]
    ) -> None:
        partial = without(facts, unknown)
        verdict = decide(ruled, partial)
        for complete in completions(partial):
            outcome, _, dry = reference(ruled, complete)
            assert verdict.outcome in (outcome, Outcome.UNDETERMINED)
            assert set(verdict.would_refuse) <= set(dry)

    @given(rules(), complete_facts, hidden, hidden)
    def test_more_knowledge_never_changes_a_verdict(
        self, ruled: list[Rule], facts: Facts, unknown: frozenset[Fact], learnt: frozenset[Fact]
    ) -> None:
        """Nor does it forget a dry run."""
        before, after = decide(ruled, without(facts, unknown)), decide(ruled, without(facts, unknown - learnt))
        assert before.outcome in (after.outcome, Outcome.UNDETERMINED)
        assert before.would_refuse == after.would_refuse[: len(before.would_refuse)]

    @given(rules(), complete_facts, hidden)
    def test_the_missing_facts_settle_it_in_one_go(self, ruled: list[Rule], facts: Facts, unknown: frozenset[Fact]) -> None:
        """An open verdict names facts, only unknown ones, and all that are needed; so for dry runs."""
        verdict = decide(ruled, without(facts, unknown))
        assert verdict.missing <= unknown and verdict.dry_run_missing <= unknown
        assert bool(verdict.missing) is (verdict.outcome is Outcome.UNDETERMINED)
        settled = decide(ruled, without(facts, unknown - verdict.missing))
        assert settled.outcome is reference(ruled, facts)[0]
        dry = decide(ruled, without(facts, unknown - verdict.missing - verdict.dry_run_missing))
        assert list(dry.would_refuse) == reference(ruled, facts)[2]

    @given(rules(max_size=1), complete_facts, hidden)
    def test_a_rule_alone_is_open_only_where_the_facts_can_turn_it(
        self, ruled: list[Rule], facts: Facts, unknown: frozenset[Fact]
    ) -> None:
        partial = without(facts, unknown)
        outcomes = {reference(ruled, complete)[0] for complete in completions(partial)}
        assert (decide(ruled, partial).outcome is Outcome.UNDETERMINED) is (len(outcomes) > 1)

    @given(rules(), complete_facts, hidden)
    def test_dry_runs_change_no_outcome(self, ruled: list[Rule], facts: Facts, unknown: frozenset[Fact]) -> None:
        partial = without(facts, unknown)
        real, all_of_them = decide([rule for rule in ruled if not rule.is_dry_run], partial), decide(ruled, partial)
        assert (real.outcome, real.rule, real.sentence) == (all_of_them.outcome, all_of_them.rule, all_of_them.sentence)


@given(st.from_regex(r"[A-Za-z0-9_-]{1,8}/[A-Za-z0-9_-]{1,8}", fullmatch=True), st.text(max_size=20))
def test_a_pattern_without_wildcards_is_about_one_repo(name: str, pattern: str) -> None:
    """In any case of its letters; and no text at all is more than a pattern that fits or does not."""
    repo = Repo(RepoKind.MODELS, name)
    assert fits_repo(repo, name.swapcase()) and fits_repo(repo, f"models/{name}") and not fits_repo(repo, f"datasets/{name}")
    assert not fits_repo(repo, f"{name}x") and fits_repo(repo, "*") and fits_repo(repo, f"{name.partition('/')[0]}/*")
    assert fits_repo(repo, pattern) in (True, False)
