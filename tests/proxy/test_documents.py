"""Documents on a real index, with an injected clock and a scripted upstream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from nearhub import documents, single_flight
from nearhub.documents import Documents, Page
from nearhub.errors import (
    HubRefusal,
    RefusedByHub,
    RepoNotFound,
    RevisionNotFound,
    UnknownOffline,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamUnreachable,
)
from nearhub.store.index import Index
from tests.proxy.clock import Clock, settle
from tests.proxy.scripted import ScriptedUpstream, dispatcher_of

PATH = "/api/models?search=x"
KEY = "/api/models"
TTL_S = 60.0
DOWN = UpstreamUnreachable("down")


@pytest.fixture
async def upstream() -> ScriptedUpstream:
    upstream = ScriptedUpstream()
    upstream.answers[KEY] = [1]
    return upstream


@pytest.fixture
async def kept(index: Index, upstream: ScriptedUpstream, clock: Clock) -> AsyncIterator[Documents]:
    dispatcher = dispatcher_of([upstream])
    kept = Documents(index, dispatcher, clock)
    yield kept
    await kept.close()
    await dispatcher.close()


async def test_it_is_asked_once_within_its_ttl_and_after_a_restart(
    kept: Documents, index: Index, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """With its query, and with the query of the next page."""
    upstream.answers[KEY] = ([1], "cursor=abc")
    again = Documents(index, dispatcher_of([upstream]), clock)
    for one in (kept, kept, again):
        assert await one.get(PATH, "c", ttl_s=TTL_S) == Page([1], "cursor=abc")
        clock.now += 10
    assert upstream.asked == [PATH]
    assert await kept.get(f"{PATH}&limit=1", "c", ttl_s=TTL_S) == Page([1], "cursor=abc")
    assert len(upstream.asked) == 2


async def test_just_stale_answers_at_once_and_asks_meanwhile(kept: Documents, upstream: ScriptedUpstream, clock: Clock) -> None:
    """Nobody waits; many ask once; whoever comes after the answer gets the new one."""
    await kept.get(PATH, "c", ttl_s=TTL_S)
    clock.now += TTL_S
    upstream.answers[KEY] = [2]
    upstream.gate.clear()
    for _ in range(5):
        assert await kept.get(PATH, "c", ttl_s=TTL_S) == Page([1], None)
    upstream.gate.set()
    await kept._asking.start(documents._PREFIX + PATH, settle)
    assert await kept.get(PATH, "c", ttl_s=TTL_S) == Page([2], None)
    assert len(upstream.asked) == 2


async def test_stale_is_asked_for_again(kept: Documents, upstream: ScriptedUpstream, clock: Clock) -> None:
    """Beyond twice its TTL, and when the clock was set back."""
    await kept.get(PATH, "c", ttl_s=TTL_S)
    for move_s in (2 * TTL_S, -10 * TTL_S):
        clock.now += move_s
        upstream.answers[KEY] = [move_s]
        assert await kept.get(PATH, "c", ttl_s=TTL_S) == Page([move_s], None)


@pytest.mark.parametrize("error", [DOWN, UpstreamFailed("500"), UpstreamBusy("429", retry_after_s=60.0)])
async def test_stale_is_served_when_upstream_fails_and_said_so(
    kept: Documents, upstream: ScriptedUpstream, clock: Clock, error: UpstreamError
) -> None:
    """P5: however old."""
    await kept.get(PATH, "c", ttl_s=TTL_S)
    clock.now += 1e9
    upstream.answers[KEY] = error
    assert await kept.get(PATH, "c", ttl_s=TTL_S) == Page([1], None, is_stale=True)
    with pytest.raises(type(error) if error is not DOWN else UnknownOffline):
        await kept.get("/api/models?search=other", "c", ttl_s=TTL_S)


async def test_stale_is_served_when_upstream_is_slow(
    kept: Documents, upstream: ScriptedUpstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the answer that comes too late is kept for the next."""
    await kept.get(PATH, "c", ttl_s=TTL_S)
    clock.now += 3 * TTL_S
    upstream.answers[KEY] = [2]
    upstream.gate.clear()
    monkeypatch.setattr(single_flight, "STALE_AFTER_S", 0.0)
    assert await kept.get(PATH, "c", ttl_s=TTL_S) == Page([1], None, is_stale=True)
    upstream.gate.set()
    await kept._asking.start(documents._PREFIX + PATH, settle)
    assert await kept.get(PATH, "c", ttl_s=TTL_S) == Page([2], None)
    assert len(upstream.asked) == 2


@pytest.mark.parametrize("refusal", [RepoNotFound("no"), RevisionNotFound("no"), RefusedByHub("no")])
async def test_a_no_of_the_hub_is_passed_on_and_not_kept(
    kept: Documents, upstream: ScriptedUpstream, clock: Clock, refusal: HubRefusal
) -> None:
    """Also where something stale is known: the Hub is the authority while it speaks."""
    upstream.answers[KEY] = refusal
    with pytest.raises(type(refusal)):
        await kept.get(PATH, "c", ttl_s=TTL_S)
    upstream.answers[KEY] = [1]
    assert await kept.get(PATH, "c", ttl_s=TTL_S) == Page([1], None)
    upstream.answers[KEY] = refusal
    clock.now += 3 * TTL_S
    with pytest.raises(type(refusal)):
        await kept.get(PATH, "c", ttl_s=TTL_S)


async def test_what_is_unknown_while_upstream_is_dead_is_404_and_claims_nothing(
    kept: Documents, upstream: ScriptedUpstream
) -> None:
    upstream.answers[KEY] = DOWN
    with pytest.raises(UnknownOffline) as caught:
        await kept.get(PATH, "c", ttl_s=TTL_S)
    assert (caught.value.http_status, caught.value.error_code) == (404, "UnknownOffline")


async def test_many_who_ask_the_same_share_one_question(kept: Documents, upstream: ScriptedUpstream) -> None:
    upstream.gate.clear()
    askers = [asyncio.ensure_future(kept.get(PATH, "c", ttl_s=TTL_S)) for _ in range(20)]
    await upstream.was_asked.wait()
    askers[0].cancel()
    upstream.gate.set()
    assert await asyncio.gather(*askers[1:]) == [Page([1], None)] * 19
    assert len(upstream.asked) == 1


async def test_a_form_is_part_of_the_question(kept: Documents, upstream: ScriptedUpstream) -> None:
    """Whatever the order of its fields; another form, or none, is another question."""
    for form in ({"paths": ["a"], "expand": True}, {"expand": True, "paths": ["a"]}, {"paths": ["b"], "expand": True}, None):
        await kept.get(PATH, "c", ttl_s=TTL_S, form=form)
    assert upstream.forms == [{"paths": ["a"], "expand": True}, {"paths": ["b"], "expand": True}, None]


async def test_a_large_document_is_passed_on_and_not_kept(
    kept: Documents, index: Index, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_KEPT_BYTES", 10)
    upstream.answers[KEY] = ["x" * 100]
    for _ in range(2):
        assert await kept.get(PATH, "c", ttl_s=TTL_S) == Page(["x" * 100], None)
    assert len(upstream.asked) == 2 and list(index.keys("doc ")) == []


async def test_no_more_are_kept_than_allowed(
    kept: Documents, index: Index, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those asked for last stay; nothing else of the index goes."""
    monkeypatch.setattr(documents, "MAX_KEPT", 10)
    index.put("doa", {})
    index.put("dod", {})
    paths = [f"/api/models?n={i:03}" for i in range(3 * documents._PRUNE_EVERY)]
    for path in [*paths, *paths[-10:]]:
        await kept.get(path, "c", ttl_s=TTL_S)
    assert len(list(index.keys("doc "))) == 10 and upstream.asked == paths, "the last ten were not asked for again"
    assert index.get("doa") == index.get("dod") == {}


async def test_what_a_client_wrote_into_a_query_is_kept_nowhere(
    kept: Documents, index: Index, upstream: ScriptedUpstream
) -> None:
    """A7: it may be a secret. Other queries are other documents all the same."""
    for path in ("/api/models?token=hf_canary", "/api/models?token=hf_other", "/api/models", "/api/models?token=hf_canary"):
        upstream.answers[path] = [path]
        assert (await kept.get(path, "c", ttl_s=TTL_S)).value == [path]
    assert len(upstream.asked) == 3
    assert [key for key in index.keys("doc ") if "hf_" in key] == []


@pytest.mark.parametrize("value", [None, 0, "", [], {}, "text", {"value": None, "at": -1}, [[["deep"]]]])
async def test_any_json_is_kept_as_it_is(kept: Documents, upstream: ScriptedUpstream, value: object) -> None:
    upstream.answers[KEY] = (value, None)
    for _ in range(2):
        assert await kept.get(PATH, "c", ttl_s=TTL_S) == Page(value, None)
    assert len(upstream.asked) == 1
