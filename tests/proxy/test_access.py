"""Access on a real index, with an injected clock and a scripted upstream: who may see what, and how often that is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from nearhub import single_flight
from nearhub.access import PUBLIC_TTL_S, RENEW_AFTER_S, Access, Need
from nearhub.catalog import Catalog
from nearhub.errors import (
    AccessRefused,
    HubRefusal,
    RepoNotFound,
    RevisionNotFound,
    UnknownOffline,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamUnreachable,
)
from nearhub.metrics import Metrics
from nearhub.resolve import REFUSED_TTL_S, Resolver
from nearhub.store.index import Index
from nearhub.upstream.dispatch import Dispatcher
from nearhub.wire.target import Repo, RepoKind
from tests.proxy.clock import Clock, settle
from tests.proxy.scripted import NEW, OLD, ScriptedUpstream, dispatcher_of, info

REPO = Repo(RepoKind.MODELS, "org/m")
DOWN = UpstreamUnreachable("down")
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
        return Access(catalog, resolvers[-1], clock)

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
        assert await access.authorise(REPO, "main", "c") == REPO
    assert len(upstream.asked) == 1
    clock.now += RENEW_AFTER_S
    upstream.at("main", answer=RepoNotFound("gone"))
    upstream.gate.clear()
    for _ in range(10):
        assert await access.authorise(REPO, "main", "c") == REPO
    await settle()
    assert len(upstream.asked) == 2
    upstream.gate.set()
    with pytest.raises(RepoNotFound):
        await access._resolver.refresh(REPO, "main", "c")
    with pytest.raises(RepoNotFound):
        await access.authorise(REPO, "main", "c")
    assert len(upstream.asked) == 2


async def test_a_minute_is_the_most_that_is_believed(access: Access, upstream: ScriptedUpstream, clock: Clock) -> None:
    """P5: a repo closed upstream that nobody asked for meanwhile is refused at the first request after 60 s."""
    await access.authorise(REPO, "main", "c")
    upstream.at("main", answer=PRIVATE)
    clock.now += PUBLIC_TTL_S - 0.1
    await access.authorise(REPO, "main", "c")
    clock.now += 0.1
    with pytest.raises(AccessRefused):
        await access.authorise(REPO, "main", "c")


@pytest.mark.parametrize("error", [DOWN, UpstreamFailed("500"), UpstreamBusy("429", retry_after_s=60.0)])
async def test_upstream_failing_serves_what_was_public_and_nothing_else(
    start: Make, upstream: ScriptedUpstream, clock: Clock, error: UpstreamError
) -> None:
    """P5, P6: known to be public stays served while nobody can be asked, after a restart too; unknown is no."""
    await start().authorise(REPO, "main", "c")
    upstream.at("main", answer=error)
    upstream.at("main", repo="org/other", answer=DOWN)
    clock.now += PUBLIC_TTL_S * 1000
    for _ in range(2):
        access = start()
        assert await access.authorise(REPO, "main", "c") == REPO
        assert await access.authorise(REPO, OLD, "c") == REPO
        with pytest.raises(UpstreamError):
            await access.authorise(Repo(RepoKind.MODELS, "org/other"), "main", "c")


async def test_after_a_failure_upstream_is_not_asked_by_every_request(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """While upstream fails, a known public repo costs one attempt in 5 s, not one a request."""
    await access.authorise(REPO, "main", "c")
    upstream.at("main", answer=UpstreamFailed("500"))
    clock.now += PUBLIC_TTL_S
    for _ in range(5):
        await access.authorise(REPO, "main", "c")
    assert len(upstream.asked) == 2


async def test_a_slow_upstream_keeps_nobody_waiting_for_what_was_public(
    access: Access, upstream: ScriptedUpstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await access.authorise(REPO, "main", "c")
    clock.now += PUBLIC_TTL_S
    monkeypatch.setattr(single_flight, "STALE_AFTER_S", 0.0)
    upstream.gate.clear()
    assert await access.authorise(REPO, "main", "c") == REPO
    upstream.gate.set()


@pytest.mark.parametrize("refusal", [GATED, PRIVATE, RepoNotFound("gone"), AccessRefused("disabled", status=403)])
async def test_a_repo_that_closes_is_forgotten_on_disk_too(
    start: Make, upstream: ScriptedUpstream, clock: Clock, refusal: HubRefusal
) -> None:
    """Once upstream refuses, a restart and a dead upstream do not open it again; when it opens again, it is served again."""
    await start().authorise(REPO, "main", "c")
    clock.now += PUBLIC_TTL_S
    upstream.at("main", answer=refusal)
    with pytest.raises(type(refusal)) as caught:
        await start().authorise(REPO, "main", "c")
    assert (caught.value.error_code, caught.value.http_status) == (refusal.error_code, refusal.http_status)
    upstream.at("main", answer=DOWN)
    upstream.at(OLD, answer=DOWN)
    for revision in ("main", OLD):
        with pytest.raises(UnknownOffline):
            await start().authorise(REPO, revision, "c")
    upstream.at("main", answer=info(OLD))
    assert await start().authorise(REPO, "main", "c") == REPO


async def test_a_missing_revision_does_not_prove_that_a_repo_is_public(
    start: Make, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """A Hub may look for the revision before it looks at the gate: such an answer opens nothing."""
    upstream.at("absent", answer=RevisionNotFound("no"))
    with pytest.raises(RevisionNotFound):
        await start().authorise(REPO, "absent", "c")
    upstream.at("main", "absent", answer=DOWN)
    for revision in ("main", "absent"):
        with pytest.raises(UnknownOffline):
            await start().authorise(REPO, revision, "c")


async def test_questions_for_missing_revisions_do_not_keep_a_gate_open(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """P6: who wants a repo that was gated meanwhile must not renew its visibility by asking for nonsense."""
    await access.authorise(REPO, "main", "c")
    upstream.at("main", answer=info(OLD, gated="auto"))
    upstream.at("nonsense", answer=RevisionNotFound("no"))
    clock.now += PUBLIC_TTL_S
    with pytest.raises(AccessRefused):
        await access.authorise(REPO, "nonsense", "c")
    with pytest.raises(AccessRefused):
        await access.authorise(REPO, "main", "c")


async def test_a_repo_without_the_revision_stays_public(access: Access, upstream: ScriptedUpstream, clock: Clock) -> None:
    """A commit of ours that vanished there, even a main that vanished: what is known stays served."""
    await access.authorise(REPO, "main", "c")
    for revision in ("absent", NEW, "main"):
        upstream.at(revision, answer=RevisionNotFound("no"))
    for revision in ("absent", NEW):
        clock.now += PUBLIC_TTL_S
        assert await access.authorise(REPO, revision, "c") == REPO


async def test_a_gated_repo_tells_what_it_holds_and_shows_it_to_nobody(start: Make, upstream: ScriptedUpstream) -> None:
    """P6: its info is 200 for anybody, which is never permission; offline neither."""
    upstream.at("main", answer=info(OLD, gated="manual"))
    for _ in range(2):
        access = start()
        assert await access.authorise(REPO, "main", "c", Need.LISTING) == REPO
        with pytest.raises(AccessRefused) as caught:
            await access.authorise(REPO, "main", "c")
        assert (caught.value.http_status, caught.value.error_code) == (401, "GatedRepo")
        upstream.at("main", answer=DOWN)


async def test_a_gate_that_opens_or_shuts_is_seen_within_a_minute(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    await access.authorise(REPO, "main", "c")
    for gated in ("auto", False, "manual"):
        clock.now += PUBLIC_TTL_S
        upstream.at("main", answer=info(OLD, gated=gated))
        try:
            await access.authorise(REPO, "main", "c")
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
            await access.authorise(REPO, "main", "c", need)
        assert (caught.value.message, caught.value.http_status) == ("Access to this resource is disabled.", 403)


async def test_who_is_refused_hears_why_this_mirror_cannot_help(access: Access, upstream: ScriptedUpstream) -> None:
    """With the Hub's code, so that clients understand it."""
    upstream.at("main", answer=PRIVATE)
    with pytest.raises(AccessRefused, match="public repositories only") as caught:
        await access.authorise(REPO, "main", "c")
    assert caught.value.error_code == "RepoNotFound"


async def test_a_pinned_request_costs_no_question_while_the_repo_is_believed(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """And when it is not, it asks for the default branch, whose news are worth more."""
    await access.authorise(REPO, "main", "c")
    clock.now += RENEW_AFTER_S - 1
    assert await access.authorise(REPO, OLD, "c") == REPO
    assert len(upstream.asked) == 1
    clock.now += PUBLIC_TTL_S
    await access.authorise(REPO, OLD, "c")
    assert len(upstream.asked) == 2 and "/revision/main?" in upstream.asked[-1]


async def test_other_names_of_a_repo_are_one_repo(start: Make, upstream: ScriptedUpstream, clock: Clock) -> None:
    """Another case and a former name: the canonical one is returned, and no name costs a second question."""
    canonical = Repo(RepoKind.MODELS, "Org/New")
    for name in ("Org/Old", "org/old"):
        upstream.at("main", repo=name, answer=info(OLD, name="Org/New"))
    access = start()
    for name in ("Org/Old", "org/old", "ORG/OLD", "org/new", "Org/New"):
        assert await access.authorise(Repo(RepoKind.MODELS, name), "main", "c") == canonical
    assert len(upstream.asked) == 1
    upstream.answers = {}
    assert await start().authorise(Repo(RepoKind.MODELS, "ORG/OLD"), "main", "c") == canonical


async def test_a_clock_set_back_makes_nothing_public_for_years(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    await access.authorise(REPO, "main", "c")
    clock.now -= 400 * 86400
    upstream.at("main", answer=PRIVATE)
    with pytest.raises(AccessRefused):
        await access.authorise(REPO, "main", "c")


async def test_what_is_private_is_not_asked_for_by_every_request(
    access: Access, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """A no is repeated for ten seconds."""
    upstream.at("main", answer=PRIVATE)
    for _ in range(5):
        with pytest.raises(AccessRefused):
            await access.authorise(REPO, "main", "c")
    assert len(upstream.asked) == 1
    clock.now += REFUSED_TTL_S
    upstream.at("main", answer=info(OLD))
    assert await access.authorise(REPO, "main", "c") == REPO
