"""Access on a real index, with an injected clock and a scripted upstream: who may see what, and how often that is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from nearhub import single_flight
from nearhub.access import PUBLIC_TTL_S, RENEW_AFTER_S, Access, Need
from nearhub.catalog import Catalog
from nearhub.documents import Documents
from nearhub.errors import (
    AccessRefused,
    AccessUnknown,
    HubRefusal,
    RepoNotFound,
    RevisionNotFound,
    UnknownOffline,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamUnreachable,
)
from nearhub.grants import Grants
from nearhub.metrics import Metrics
from nearhub.resolve import REFUSED_TTL_S, Resolver
from nearhub.rulebook import Rulebook
from nearhub.store.index import Index
from nearhub.upstream.dispatch import Dispatcher
from nearhub.upstream.keys import Keyring
from nearhub.wire.credentials import Caller
from nearhub.wire.policies import Policy
from nearhub.wire.target import Repo, RepoKind, Scope
from tests.proxy.clock import Clock, settle
from tests.proxy.scripted import NEW, OLD, ScriptedUpstream, dispatcher_of, info

REPO = Repo(RepoKind.MODELS, "org/m")
DOWN = UpstreamUnreachable("down")
CALLER = Caller("c")
GATED, PRIVATE = AccessRefused("gated", status=401, code="GatedRepo"), AccessRefused("private", status=401, code="RepoNotFound")


@pytest.fixture
async def upstream() -> ScriptedUpstream:
    upstream = ScriptedUpstream()
    upstream.at("main", answer=info(OLD))
    return upstream


Make = Callable[[], Access]


@pytest.fixture
async def start(index: Index, upstream: ScriptedUpstream, clock: Clock) -> AsyncIterator[Make]:
    """Access as a process would start it: each with empty tables, on the same index."""
    resolvers: list[Resolver] = []
    dispatchers: list[Dispatcher] = []

    def make() -> Access:
        catalog = Catalog(index, Metrics(), clock)
        dispatchers.append(dispatcher_of([upstream]))
        resolvers.append(Resolver(catalog, dispatchers[-1], ref_ttl_s=60.0, clock=clock))
        grants = Grants(dispatchers[-1], Keyring(), bytes(32), clock)
        documents = Documents(index, dispatchers[-1], clock)
        rules = Rulebook((), "", resolvers[-1], documents, clock)
        return Access(catalog, resolvers[-1], grants, rules, (), clock)

    yield make
    for resolver in resolvers:
        await resolver.close()
    for dispatcher in dispatchers:
        await dispatcher.close()


@pytest.fixture
def access(start: Make) -> Access:
    return start()


async def test_public_is_believed_for_a_minute_and_renewed_in_the_background(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """P7: no question while fresh; from 30 s on one in the background, nobody waits; a closed repo is refused within 60 s."""
    for _ in range(10):
        assert await access.authorise(REPO, "main", CALLER) == REPO
    assert len(upstream.asked) == 1
    clock.now += RENEW_AFTER_S
    upstream.at("main", answer=RepoNotFound("gone"))
    upstream.gate.clear()
    for _ in range(10):
        assert await access.authorise(REPO, "main", CALLER) == REPO
    await settle()
    assert len(upstream.asked) == 2
    upstream.gate.set()
    with pytest.raises(RepoNotFound):
        await access._resolver.refresh(REPO, "main", CALLER)
    with pytest.raises(RepoNotFound):
        await access.authorise(REPO, "main", CALLER)
    assert len(upstream.asked) == 2


async def test_a_minute_is_the_most_that_is_believed(access: Access, upstream: ScriptedUpstream, clock: Clock) -> None:
    """P5: a repo closed upstream that nobody asked for meanwhile is refused at the first request after 60 s."""
    await access.authorise(REPO, "main", CALLER)
    upstream.at("main", answer=PRIVATE)
    clock.now += PUBLIC_TTL_S - 0.1
    await access.authorise(REPO, "main", CALLER)
    clock.now += 0.1
    with pytest.raises(AccessRefused):
        await access.authorise(REPO, "main", CALLER)


@pytest.mark.parametrize("error", [DOWN, UpstreamFailed("500"), UpstreamBusy("429", retry_after_s=60.0)])
async def test_upstream_failing_serves_what_was_public_and_nothing_else(
    start: Make, upstream: ScriptedUpstream, clock: Clock, error: UpstreamError
) -> None:
    """P5, P6: known to be public stays served while nobody can be asked, after a restart too; unknown is no."""
    await start().authorise(REPO, "main", CALLER)
    upstream.at("main", answer=error)
    upstream.at("main", repo="org/other", answer=DOWN)
    clock.now += PUBLIC_TTL_S * 1000
    for _ in range(2):
        access = start()
        assert await access.authorise(REPO, "main", CALLER) == REPO
        assert await access.authorise(REPO, OLD, CALLER) == REPO
        with pytest.raises(UpstreamError):
            await access.authorise(Repo(RepoKind.MODELS, "org/other"), "main", CALLER)


async def test_after_a_failure_upstream_is_not_asked_by_every_request(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """While upstream fails, a known public repo costs one attempt in 5 s, not one a request."""
    await access.authorise(REPO, "main", CALLER)
    upstream.at("main", answer=UpstreamFailed("500"))
    clock.now += PUBLIC_TTL_S
    for _ in range(5):
        await access.authorise(REPO, "main", CALLER)
    assert len(upstream.asked) == 2


async def test_a_slow_upstream_keeps_nobody_waiting_for_what_was_public(
    access: Access, upstream: ScriptedUpstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await access.authorise(REPO, "main", CALLER)
    clock.now += PUBLIC_TTL_S
    monkeypatch.setattr(single_flight, "STALE_AFTER_S", 0.0)
    upstream.gate.clear()
    assert await access.authorise(REPO, "main", CALLER) == REPO
    upstream.gate.set()


@pytest.mark.parametrize("refusal", [GATED, PRIVATE, RepoNotFound("gone"), AccessRefused("disabled", status=403)])
async def test_a_repo_that_closes_is_forgotten_on_disk_too(
    start: Make, upstream: ScriptedUpstream, clock: Clock, refusal: HubRefusal
) -> None:
    """Once upstream refuses, a restart and a dead upstream do not open it again; when it opens again, it is served again."""
    await start().authorise(REPO, "main", CALLER)
    clock.now += PUBLIC_TTL_S
    upstream.at("main", answer=refusal)
    with pytest.raises(type(refusal)) as caught:
        await start().authorise(REPO, "main", CALLER)
    assert (caught.value.error_code, caught.value.http_status) == (refusal.error_code, refusal.http_status)
    upstream.at("main", answer=DOWN)
    upstream.at(OLD, answer=DOWN)
    for revision in ("main", OLD):
        with pytest.raises(UnknownOffline):
            await start().authorise(REPO, revision, CALLER)
    upstream.at("main", answer=info(OLD))
    assert await start().authorise(REPO, "main", CALLER) == REPO


async def test_a_missing_revision_does_not_prove_that_a_repo_is_public(
    start: Make, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """A Hub may look for the revision before it looks at the gate: such an answer opens nothing."""
    upstream.at("absent", answer=RevisionNotFound("no"))
    with pytest.raises(RevisionNotFound):
        await start().authorise(REPO, "absent", CALLER)
    upstream.at("main", "absent", answer=DOWN)
    for revision in ("main", "absent"):
        with pytest.raises(UnknownOffline):
            await start().authorise(REPO, revision, CALLER)


async def test_questions_for_missing_revisions_do_not_keep_a_gate_open(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """P6: who wants a repo that was gated meanwhile must not renew its visibility by asking for nonsense."""
    await access.authorise(REPO, "main", CALLER)
    upstream.at("main", answer=info(OLD, gated="auto"))
    upstream.at("nonsense", answer=RevisionNotFound("no"))
    clock.now += PUBLIC_TTL_S
    with pytest.raises(AccessRefused):
        await access.authorise(REPO, "nonsense", CALLER)
    with pytest.raises(AccessRefused):
        await access.authorise(REPO, "main", CALLER)


async def test_a_repo_without_the_revision_stays_public(access: Access, upstream: ScriptedUpstream, clock: Clock) -> None:
    """A commit of ours that vanished there, even a main that vanished: what is known stays served."""
    await access.authorise(REPO, "main", CALLER)
    for revision in ("absent", NEW, "main"):
        upstream.at(revision, answer=RevisionNotFound("no"))
    for revision in ("absent", NEW):
        clock.now += PUBLIC_TTL_S
        assert await access.authorise(REPO, revision, CALLER) == REPO


async def test_a_gated_repo_tells_what_it_holds_and_shows_it_to_nobody(start: Make, upstream: ScriptedUpstream) -> None:
    """P6: its info is 200 for anybody, which is never permission; offline neither."""
    upstream.at("main", answer=info(OLD, gated="manual"))
    for _ in range(2):
        access = start()
        assert await access.authorise(REPO, "main", CALLER, Need.LISTING) == REPO
        with pytest.raises(AccessRefused) as caught:
            await access.authorise(REPO, "main", CALLER)
        assert (caught.value.http_status, caught.value.error_code) == (401, "GatedRepo")
        upstream.at("main", answer=DOWN)


async def test_a_gate_that_opens_or_shuts_is_seen_within_a_minute(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    await access.authorise(REPO, "main", CALLER)
    for gated in ("auto", False, "manual"):
        clock.now += PUBLIC_TTL_S
        upstream.at("main", answer=info(OLD, gated=gated))
        try:
            await access.authorise(REPO, "main", CALLER)
        except AccessRefused:
            assert gated
        else:
            assert not gated


@pytest.mark.parametrize(
    "answer", [info(OLD, disabled=True), AccessRefused("Access to this resource is disabled.", status=403)]
)
async def test_a_disabled_repo_is_told_in_the_hubs_own_words(access: Access, upstream: ScriptedUpstream, answer: Any) -> None:
    """Clients know it by exactly these words (huggingface_hub: DisabledRepoError)."""
    upstream.at("main", answer=answer)
    for need in Need:
        with pytest.raises(AccessRefused) as caught:
            await access.authorise(REPO, "main", CALLER, need)
        assert (caught.value.message, caught.value.http_status) == ("Access to this resource is disabled.", 403)


async def test_who_is_refused_hears_the_hubs_own_code(access: Access, upstream: ScriptedUpstream) -> None:
    upstream.at("main", answer=PRIVATE)
    with pytest.raises(AccessRefused) as caught:
        await access.authorise(REPO, "main", CALLER)
    assert caught.value.error_code == "RepoNotFound"


ALICE, BOB = Caller("c", "Bearer hf_alice"), Caller("c", "Bearer hf_bob")
RESTRICTED = Repo(REPO.kind, REPO.name, Scope.RESTRICTED)
NOT_YOURS = RepoNotFound("Repository not found")


async def test_a_private_repo_opens_to_the_token_that_upstream_says_yes_to(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """P6: what one token opened stays closed to another and to nobody's; one question for each token in 60 s."""
    upstream.at("main", answer=PRIVATE)
    upstream.opens[RESTRICTED] = {"Bearer hf_alice"}
    for _ in range(5):
        assert await access.authorise(REPO, "main", ALICE) == RESTRICTED
    assert upstream.count("auth-check") == 1
    for caller in (BOB, CALLER):
        with pytest.raises((AccessRefused, RepoNotFound)):
            await access.authorise(REPO, "main", caller)
    clock.now += 61
    assert await access.authorise(REPO, "main", ALICE) == RESTRICTED
    assert upstream.count("auth-check", "hf_alice") == 2


async def test_a_revoked_token_is_refused_within_a_minute(access: Access, upstream: ScriptedUpstream, clock: Clock) -> None:
    upstream.at("main", answer=PRIVATE)
    upstream.opens[RESTRICTED] = {"Bearer hf_alice"}
    await access.authorise(REPO, "main", ALICE)
    upstream.opens.clear()
    clock.now += 60
    with pytest.raises(RepoNotFound):
        await access.authorise(REPO, "main", ALICE)


async def test_a_no_is_believed_for_ten_seconds_only(access: Access, upstream: ScriptedUpstream, clock: Clock) -> None:
    upstream.at("main", answer=PRIVATE)
    for wait_s, asked in ((0.0, 1), (9.9, 1), (0.2, 2)):
        clock.now += wait_s
        with pytest.raises(RepoNotFound):
            await access.authorise(REPO, "main", BOB)
        assert upstream.count("auth-check") == asked
    upstream.opens[RESTRICTED] = {"Bearer hf_bob"}
    clock.now += 10.1
    assert await access.authorise(REPO, "main", BOB) == RESTRICTED


async def test_a_pause_that_one_token_is_told_is_its_own(access: Access, upstream: ScriptedUpstream) -> None:
    """B9: who has used up his token's limit is not asked about again, and keeps nobody else waiting."""
    upstream.at("main", answer=PRIVATE)
    upstream.opens[RESTRICTED] = {"Bearer hf_alice"}
    upstream.busy = {"Bearer hf_bob"}
    for _ in range(3):
        with pytest.raises(AccessUnknown):
            await access.authorise(REPO, "main", BOB)
    assert upstream.count("auth-check", "hf_bob") == 1
    assert await access.authorise(REPO, "main", ALICE) == RESTRICTED
    upstream.at("main", repo="org/public", answer=info(OLD, name="org/public"))
    public = Repo(RepoKind.MODELS, "org/public")
    assert await access.authorise(public, "main", BOB) == public


async def test_with_upstream_gone_a_grant_is_good_until_it_expires_and_the_rest_looks_like_what_nobody_knows(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """A3 and A10: the same answer for a private repo that is here and one that never was."""
    upstream.at("main", answer=PRIVATE)
    upstream.opens[RESTRICTED] = {"Bearer hf_alice"}
    await access.authorise(REPO, "main", ALICE)
    upstream.at("main", answer=DOWN)
    upstream.opens[RESTRICTED] = DOWN
    clock.now += 29
    assert await access.authorise(REPO, "main", ALICE) == RESTRICTED
    clock.now += 60
    never = Repo(RepoKind.MODELS, "org/never")
    upstream.at("main", repo="org/never", answer=DOWN)
    upstream.opens[Repo(never.kind, never.name, Scope.RESTRICTED)] = DOWN
    for repo in (REPO, never):
        for caller in (ALICE, BOB, CALLER):
            with pytest.raises(UnknownOffline):
                await access.authorise(repo, "main", caller)


async def test_a_gated_repo_tells_what_it_holds_and_gives_it_to_who_was_let_in(
    access: Access, upstream: ScriptedUpstream
) -> None:
    upstream.at("main", answer=info(OLD, gated="auto"))
    upstream.opens[RESTRICTED] = {"Bearer hf_alice"}
    assert await access.authorise(REPO, "main", CALLER, Need.LISTING) == REPO
    assert await access.authorise(REPO, "main", ALICE) == RESTRICTED
    with pytest.raises(AccessRefused) as caught:
        await access.authorise(REPO, "main", CALLER)
    assert caught.value.error_code == "GatedRepo"


async def test_a_public_repo_is_asked_about_with_nobodys_token_whatever_the_caller_brings(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    for number in range(20):
        assert await access.authorise(REPO, "main", Caller("c", f"Bearer hf_{number}")) == REPO
    assert len(upstream.asked) == 1 and upstream.count("auth-check") == 0


async def test_the_operators_policy_opens_what_it_names_to_whom_it_names(
    start: Make, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """With the operator's token where it has one, and from what is here when upstream cannot be asked; nobody else gets in."""
    upstream.at("main", answer=PRIVATE)
    upstream.opens[RESTRICTED] = {"Bearer hf_service"}
    access = start()
    access._policies = (Policy("lab", ("org/*",), frozenset({"nlp"}), "Bearer hf_service"),)
    member = Caller("c", None, "carol", frozenset({"nlp", "everyone"}))
    assert await access.authorise(REPO, "main", member) == RESTRICTED
    for other in (CALLER, BOB, Caller("c", None, "dave", frozenset({"everyone"}))):
        with pytest.raises((AccessRefused, RepoNotFound)):
            await access.authorise(REPO, "main", other)
    upstream.at("main", answer=DOWN)
    upstream.opens[RESTRICTED] = DOWN
    clock.now += 3600
    assert await access.authorise(REPO, "main", member) == RESTRICTED
    upstream.at("main", answer=PRIVATE)
    upstream.opens[RESTRICTED] = set()
    clock.now += 3600
    with pytest.raises(RepoNotFound):
        await access.authorise(REPO, "main", member)


async def test_a_pinned_request_costs_no_question_while_the_repo_is_believed(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """And when it is not, it asks for the default branch, whose news are worth more."""
    await access.authorise(REPO, "main", CALLER)
    clock.now += RENEW_AFTER_S - 1
    assert await access.authorise(REPO, OLD, CALLER) == REPO
    assert len(upstream.asked) == 1
    clock.now += PUBLIC_TTL_S
    await access.authorise(REPO, OLD, CALLER)
    assert len(upstream.asked) == 2 and "/revision/main?" in upstream.asked[-1]


async def test_other_names_of_a_repo_are_one_repo(start: Make, upstream: ScriptedUpstream, clock: Clock) -> None:
    """Another case and a former name: the canonical one is returned, and no name costs a second question."""
    canonical = Repo(RepoKind.MODELS, "Org/New")
    for name in ("Org/Old", "org/old"):
        upstream.at("main", repo=name, answer=info(OLD, name="Org/New"))
    access = start()
    for name in ("Org/Old", "org/old", "ORG/OLD", "org/new", "Org/New"):
        assert await access.authorise(Repo(RepoKind.MODELS, name), "main", CALLER) == canonical
    assert len(upstream.asked) == 1
    upstream.answers = {}
    assert await start().authorise(Repo(RepoKind.MODELS, "ORG/OLD"), "main", CALLER) == canonical


async def test_a_clock_set_back_makes_nothing_public_for_years(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    await access.authorise(REPO, "main", CALLER)
    clock.now -= 400 * 86400
    upstream.at("main", answer=PRIVATE)
    with pytest.raises(AccessRefused):
        await access.authorise(REPO, "main", CALLER)


async def test_what_is_private_is_not_asked_for_by_every_request(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """A no is repeated for ten seconds."""
    upstream.at("main", answer=PRIVATE)
    for _ in range(5):
        with pytest.raises(AccessRefused):
            await access.authorise(REPO, "main", CALLER)
    assert len(upstream.asked) == 1
    clock.now += REFUSED_TTL_S
    upstream.at("main", answer=info(OLD))
    assert await access.authorise(REPO, "main", CALLER) == REPO
