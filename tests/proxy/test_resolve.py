"""Resolver on a real index, with an injected clock and a scripted upstream: who is asked for what, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from nearhub import resolve, single_flight, trace
from nearhub.catalog import Catalog
from nearhub.errors import (
    EntryNotFound,
    HubRefusal,
    NearhubError,
    RepoNotFound,
    RevisionNotFound,
    UnknownOffline,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamLied,
    UpstreamUnreachable,
)
from nearhub.metrics import Metrics
from nearhub.resolve import LONG, REFUSED_TTL_S, Current, Resolver
from nearhub.single_flight import FAILED_TTL_S
from nearhub.store.index import Index
from nearhub.upstream.dispatch import Dispatcher
from nearhub.wire.manifest import Entry, tree_order
from nearhub.wire.target import FileTarget, Repo, RepoKind
from tests.proxy.clock import Clock, settle
from tests.proxy.scripted import NEW, OLD, ScriptedUpstream, dispatcher_of, info, item, meta, sibling

REPO = Repo(RepoKind.MODELS, "org/m")
MAIN = FileTarget(REPO, "main", "a.txt")
TTL_S = 60.0
DOWN = UpstreamUnreachable("down")
TREE = f"/api/models/org/m/tree/{OLD}"


@pytest.fixture
async def upstream() -> ScriptedUpstream:
    return ScriptedUpstream()


Make = Callable[..., Resolver]


@pytest.fixture
async def start(index: Index, upstream: ScriptedUpstream, clock: Clock) -> AsyncIterator[Make]:
    """A resolver as a process would start it: each with empty tables, on the same index."""
    made: list[Resolver] = []
    dispatchers: list[Dispatcher] = []

    def make(metrics: Metrics | None = None) -> Resolver:
        dispatchers.append(dispatcher_of([upstream]))
        catalog = Catalog(index, metrics or Metrics(), clock)
        made.append(Resolver(catalog, dispatchers[-1], ref_ttl_s=TTL_S, clock=clock))
        return made[-1]

    yield make
    for resolver in made:
        await resolver.close()
    for dispatcher in dispatchers:
        await dispatcher.close()


@pytest.fixture
def resolver(start: Make) -> Resolver:
    return start()


class TestRefs:
    async def test_a_ref_is_asked_once_within_its_ttl(
        self, resolver: Resolver, upstream: ScriptedUpstream, clock: Clock
    ) -> None:
        """Within 60 s no second question; after it one; a commit that is known is never asked for again."""
        upstream.at("main", answer=info(OLD))
        for _ in range(3):
            assert (await resolver.resolve(MAIN, "c")).meta == meta(OLD)
        assert len(upstream.asked) == 1
        clock.now += 2 * TTL_S
        upstream.at("main", NEW, answer=info(NEW, sibling("a.txt", "2")))
        assert (await resolver.resolve(MAIN, "c")).meta == meta(NEW, "2")
        asked = len(upstream.asked)
        clock.now += 1000 * TTL_S
        assert (await resolver.resolve(MAIN.at(OLD), "c")).meta == meta(OLD)
        assert (await resolver.resolve(MAIN.at(NEW), "c")).meta == meta(NEW, "2")
        assert len(upstream.asked) == asked

    async def test_just_stale_answers_at_once_and_asks_meanwhile(
        self, resolver: Resolver, upstream: ScriptedUpstream, clock: Clock
    ) -> None:
        """Nobody waits for the question; whoever comes after its answer gets the new commit; many ask once."""
        upstream.at("main", answer=info(OLD))
        await resolver.resolve(MAIN, "c")
        clock.now += TTL_S
        upstream.at("main", NEW, answer=info(NEW))
        upstream.gate.clear()
        for _ in range(5):
            result = await resolver.resolve(MAIN, "c")
            assert result.meta == meta(OLD) and not result.is_stale
        upstream.gate.set()
        await resolver.refresh(REPO, "main", "c")  # joins the one under way
        assert (await resolver.resolve(MAIN, "c")).meta == meta(NEW)
        assert upstream.count("revision/main") == 2

    async def test_a_question_in_the_background_does_not_count_as_waited_for(
        self, resolver: Resolver, upstream: ScriptedUpstream, clock: Clock
    ) -> None:
        """Cache-Status says `hit` of an answer that came from here."""
        upstream.at("main", answer=info(OLD))
        trace.begin()
        await resolver.resolve(MAIN, "c")
        assert trace.was_forwarded()
        clock.now += TTL_S
        traced = trace.begin()
        await resolver.resolve(MAIN, "c")
        await settle()
        assert not trace.was_forwarded() and any("refresh" in note for note in traced.notes)

    async def test_what_was_learnt_survives_a_restart(self, start: Make, upstream: ScriptedUpstream) -> None:
        """A second process on the same index asks nothing that the first one knew."""
        upstream.at("main", answer=info(OLD))
        await start().resolve(MAIN, "c")
        again = start()
        assert (await again.resolve(MAIN, "c")).meta == meta(OLD)
        with pytest.raises(EntryNotFound):
            await again.resolve(FileTarget(REPO, "main", "absent"), "c")
        assert len(upstream.asked) == 1

    async def test_many_who_ask_the_same_share_one_question(self, resolver: Resolver, upstream: ScriptedUpstream) -> None:
        """50 cold clients, one request upstream; one that gives up does not spoil it for the others."""
        upstream.at("main", answer=info(OLD))
        upstream.gate.clear()
        tasks = [asyncio.ensure_future(resolver.resolve(MAIN, "c")) for _ in range(50)]
        await upstream.was_asked.wait()
        tasks[0].cancel()
        await settle()
        upstream.gate.set()
        results = await asyncio.gather(*tasks[1:])
        assert {result.meta for result in results} == {meta(OLD)}
        assert len(upstream.asked) == 1

    @pytest.mark.parametrize("error", [DOWN, UpstreamFailed("500"), UpstreamBusy("429", retry_after_s=60.0), UpstreamLied("x")])
    async def test_stale_is_served_when_upstream_fails_and_said_so(
        self, resolver: Resolver, upstream: ScriptedUpstream, clock: Clock, error: UpstreamError
    ) -> None:
        """P5: past the TTL with upstream failing, the last answer stands, marked stale; it is asked again, but not by all."""
        upstream.at("main", answer=info(OLD))
        await resolver.resolve(MAIN, "c")
        clock.now += 3600
        upstream.at("main", answer=error)
        for _ in range(5):
            result = await resolver.resolve(MAIN, "c")
            assert result.meta == meta(OLD) and result.is_stale
        assert len(upstream.asked) == 2
        clock.now += FAILED_TTL_S
        if not isinstance(error, UpstreamBusy):  # which the Dispatcher rests for
            upstream.at("main", answer=info(OLD))
            assert not (await resolver.resolve(MAIN, "c")).is_stale

    async def test_stale_is_served_when_upstream_is_slow(
        self, resolver: Resolver, upstream: ScriptedUpstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The question goes on, and its answer is for whoever asks next."""
        upstream.at("main", answer=info(OLD))
        await resolver.resolve(MAIN, "c")
        clock.now += 3600
        monkeypatch.setattr(single_flight, "STALE_AFTER_S", 0.0)
        upstream.at("main", NEW, answer=info(NEW))
        upstream.gate.clear()
        result = await resolver.resolve(MAIN, "c")
        assert result.meta == meta(OLD) and result.is_stale
        # One has waited for that; the next do not, however long they would have had to.
        monkeypatch.setattr(single_flight, "STALE_AFTER_S", 3600.0)
        assert (await resolver.resolve(MAIN, "c")).is_stale
        upstream.gate.set()
        await resolver.refresh(REPO, "main", "c")
        assert upstream.count("revision/main") == 2
        result = await resolver.resolve(MAIN, "c")
        assert result.meta == meta(NEW) and not result.is_stale

    async def test_what_is_unknown_while_upstream_is_dead_is_404_and_claims_nothing(
        self, resolver: Resolver, upstream: ScriptedUpstream
    ) -> None:
        """Clients repeat a 504 for 23 s, and remember a RepoNotFound."""
        upstream.at("main", OLD, answer=DOWN)
        for target in (MAIN, MAIN.at(OLD)):
            with pytest.raises(UnknownOffline) as caught:
                await resolver.resolve(target, "c")
            assert (caught.value.http_status, caught.value.error_code) == (404, "UnknownOffline")

    async def test_a_clock_set_back_does_not_make_a_ref_fresh_for_years(
        self, resolver: Resolver, upstream: ScriptedUpstream, clock: Clock
    ) -> None:
        """An age below zero counts as stale."""
        upstream.at("main", answer=info(OLD))
        await resolver.resolve(MAIN, "c")
        clock.now -= 400 * 86400
        await resolver.resolve(MAIN, "c")
        assert len(upstream.asked) == 2

    @pytest.mark.parametrize("refusal", [RevisionNotFound("no"), RepoNotFound("no")])
    async def test_a_no_of_the_hub_is_remembered_for_ten_seconds(
        self, resolver: Resolver, upstream: ScriptedUpstream, clock: Clock, refusal: HubRefusal
    ) -> None:
        """What is absent is not asked for by every client; what was published just now is found within 10 s."""
        upstream.at("main", answer=refusal)
        for _ in range(5):
            with pytest.raises(type(refusal)):
                await resolver.resolve(MAIN, "c")
        assert len(upstream.asked) == 1
        clock.now += REFUSED_TTL_S
        upstream.at("main", answer=info(NEW))
        assert (await resolver.resolve(MAIN, "c")).meta == meta(NEW)

    async def test_head_is_main(self, resolver: Resolver, upstream: ScriptedUpstream) -> None:
        """huggingface.js calls the default branch so."""
        upstream.at("main", answer=info(OLD))
        assert await resolver.commit(REPO, "HEAD", "c") == await resolver.commit(REPO, "main", "c") == Current(OLD)
        assert len(upstream.asked) == 1

    async def test_an_answer_for_another_commit_is_refused(self, resolver: Resolver, upstream: ScriptedUpstream) -> None:
        """Asked for a commit, upstream must answer about that commit; nothing of it is recorded."""
        upstream.at(OLD, answer=info(NEW))
        with pytest.raises(UpstreamError, match="answered with commit"):
            await resolver.resolve(MAIN.at(OLD), "c")
        upstream.at(OLD, NEW, answer=DOWN)
        for commit in (OLD, NEW):
            with pytest.raises(UnknownOffline):
                await resolver.resolve(MAIN.at(commit), "c")

    async def test_a_known_ref_is_renewed_by_a_light_question(
        self, resolver: Resolver, upstream: ScriptedUpstream, clock: Clock
    ) -> None:
        """A long manifest is not sent again and again; and a Hub that does not know `expand` is asked in full."""
        upstream.at("main", answer=info(OLD, *(sibling(f"{number}.txt") for number in range(LONG))))
        await resolver.commit(REPO, "main", "c")
        clock.now += 3 * TTL_S
        await resolver.commit(REPO, "main", "c")
        assert [path.partition("?")[2][:10] for path in upstream.asked] == ["blobs=true", "expand=sha"]
        clock.now += 3 * TTL_S
        upstream.at("main", answer={"id": "org/m"})
        upstream.answers["/api/models/org/m/revision/main?blobs=true"] = info(NEW)
        assert await resolver.commit(REPO, "main", "c") == Current(NEW)


class TestForEver:
    async def test_a_commit_is_for_ever(self, start: Make, upstream: ScriptedUpstream, clock: Clock) -> None:
        """P11: a later different answer for the same commit and path raises an alarm and changes nothing."""
        metrics = Metrics()
        resolver = start(metrics)
        upstream.at("main", answer=info(OLD))
        await resolver.resolve(MAIN, "c")
        upstream.at("v1", answer=info(OLD, sibling("a.txt", "2")))
        assert (await resolver.resolve(FileTarget(REPO, "v1", "a.txt"), "c")).meta == meta(OLD)
        assert metrics.alarms._value.get() == 1

    async def test_a_tree_that_differs_from_the_manifest_is_an_alarm(self, start: Make, upstream: ScriptedUpstream) -> None:
        metrics = Metrics()
        resolver = start(metrics)
        upstream.at("main", answer=info(OLD))
        upstream.answers[TREE] = [item("a.txt", "2"), item("late")]
        found = await resolver.tree(
            REPO, (await resolver.commit(REPO, "main", "c")).commit, "", "c", recursive=True, after="", limit=9
        )
        assert found is not None and [(entry.path, entry.oid) for entry in found] == [("a.txt", "1" * 40)]
        assert metrics.alarms._value.get() == 2

    async def test_a_commit_that_vanished_upstream_stays_here(
        self, resolver: Resolver, upstream: ScriptedUpstream, clock: Clock
    ) -> None:
        """After a force-push the Hub does not know it any more: files, tree and paths are answered."""
        upstream.at("main", answer=info(OLD, sibling("d/a.txt"), sibling("b")))
        await resolver.commit(REPO, "main", "c")
        upstream.at("main", answer=info(NEW))
        upstream.at(OLD, answer=RevisionNotFound("gone"))
        upstream.answers[TREE] = RevisionNotFound("gone")
        clock.now += 1000 * TTL_S
        assert (await resolver.resolve(FileTarget(REPO, OLD, "d/a.txt"), "c")).meta == meta(OLD)
        tree = await resolver.tree(REPO, OLD, "", "c", recursive=False, after="", limit=10)
        assert tree is not None and [entry.path for entry in tree] == ["b", "d"]
        assert [entry.path for entry in await resolver.paths(REPO, OLD, ["d", "b", "x"], "c")] == ["d", "b"]


def many(count: int) -> list[dict[str, Any]]:
    return [item(f"d/f{i:05}") for i in range(count)]


class TestFiles:
    async def test_what_a_complete_manifest_does_not_have_is_absent(
        self, resolver: Resolver, upstream: ScriptedUpstream
    ) -> None:
        """With the commit, so that clients remember it; without another question."""
        upstream.at("main", answer=info(OLD))
        for _ in range(3):
            with pytest.raises(EntryNotFound) as caught:
                await resolver.resolve(FileTarget(REPO, "main", "absent"), "c")
            assert caught.value.commit == OLD
        assert len(upstream.asked) == 1

    async def test_a_list_that_may_be_cut_is_completed_from_the_tree(
        self, resolver: Resolver, upstream: ScriptedUpstream
    ) -> None:
        """At 1,000 files or more; once, for all who ask; and then absent means absent."""
        upstream.at("main", answer=info(OLD, *(sibling(f"d/f{i:05}") for i in range(1000))))
        upstream.answers[TREE] = (many(1000), "page2")
        upstream.answers[f"{TREE}?page2"] = [*many(1500)[1000:], {"type": "directory", "path": "d", "oid": "e" * 40}]
        await resolver.commit(REPO, "main", "c")
        files = await asyncio.gather(*[resolver.files(REPO, OLD, "c") for _ in range(5)])
        assert [[entry.path for entry in found] for found in files] == [[f"d/f{i:05}" for i in range(1500)]] * 5
        assert upstream.count("/tree/") == 2
        with pytest.raises(EntryNotFound):
            await resolver.entry(REPO, OLD, "d/f99999", "c")
        assert len(upstream.asked) == 3

    async def test_a_path_beyond_a_cut_list_is_asked_by_itself(self, resolver: Resolver, upstream: ScriptedUpstream) -> None:
        """One HEAD, once; and its no is remembered, with the commit."""
        upstream.at("main", answer=info(OLD, *(sibling(f"f{i}") for i in range(1000))))
        await resolver.commit(REPO, "main", "c")
        upstream.answers[f"HEAD org/m@{OLD}:late"] = meta(OLD, "7")
        upstream.answers[f"HEAD org/m@{OLD}:absent"] = EntryNotFound("no")
        for _ in range(3):
            assert (await resolver.entry(REPO, OLD, "late", "c")).oid == "7" * 40
            with pytest.raises(EntryNotFound) as caught:
                await resolver.entry(REPO, OLD, "absent", "c")
            assert caught.value.commit == OLD
        assert upstream.count("HEAD") == 2

    async def test_such_a_path_with_a_dead_upstream_is_unknown(self, resolver: Resolver, upstream: ScriptedUpstream) -> None:
        """Neither absent nor a 504 that clients repeat."""
        upstream.at("main", answer=info(OLD, *(sibling(f"f{i}") for i in range(1000))))
        await resolver.commit(REPO, "main", "c")
        upstream.answers[f"HEAD org/m@{OLD}:late"] = upstream.answers[TREE] = DOWN
        with pytest.raises(UnknownOffline):
            await resolver.entry(REPO, OLD, "late", "c")
        with pytest.raises(UnknownOffline):
            await resolver.tree(REPO, OLD, "", "c", recursive=True, after="", limit=10)

    async def test_a_head_about_another_commit_is_refused(self, resolver: Resolver, upstream: ScriptedUpstream) -> None:
        upstream.at("main", answer=info(OLD, *(sibling(f"f{i}") for i in range(1000))))
        await resolver.commit(REPO, "main", "c")
        upstream.answers[f"HEAD org/m@{OLD}:late"] = meta(NEW, "7")
        with pytest.raises(UpstreamLied):
            await resolver.entry(REPO, OLD, "late", "c")

    async def test_a_list_without_sizes_says_nothing_of_what_is_absent(
        self, resolver: Resolver, upstream: ScriptedUpstream
    ) -> None:
        """A Hub that does not know `blobs=true`: files are asked for one by one."""
        upstream.at("main", OLD, answer=info(OLD, {"rfilename": "a.txt"}))
        upstream.answers[f"HEAD org/m@{OLD}:a.txt"] = meta(OLD)
        upstream.answers[f"HEAD org/m@{OLD}:late"] = meta(OLD, "7")
        assert (await resolver.resolve(MAIN, "c")).meta == meta(OLD)
        assert (await resolver.resolve(FileTarget(REPO, "main", "late"), "c")).meta == meta(OLD, "7")

    async def test_a_repo_that_got_another_name_just_now_is_not_empty(
        self, resolver: Resolver, upstream: ScriptedUpstream
    ) -> None:
        """Asked for a new commit under the name that was right a second ago, the answer is about the new name."""
        upstream.at("main", answer=info(OLD))
        await resolver.commit(REPO, "main", "c")
        upstream.at(NEW, answer=info(NEW, sibling("a.txt", "2"), name="org/renamed"))
        upstream.answers[f"/api/models/org/renamed/tree/{NEW}"] = [item("a.txt", "2")]
        assert (await resolver.resolve(MAIN.at(NEW), "c")).meta == meta(NEW, "2")
        assert [entry.path for entry in await resolver.files(REPO, NEW, "c")] == ["a.txt"]
        tree = await resolver.tree(REPO, NEW, "", "c", recursive=True, after="", limit=10)
        assert tree is not None and [entry.path for entry in tree] == ["a.txt"]
        assert [entry.path for entry in await resolver.paths(REPO, NEW, ["a.txt"], "c")] == ["a.txt"]


class TestTrees:
    async def test_a_tree_is_the_second_question_and_the_last(self, resolver: Resolver, upstream: ScriptedUpstream) -> None:
        """P7: whatever is listed of it then, in whatever pages."""
        upstream.at("main", answer=info(OLD, sibling("d/a.txt"), sibling("b")))
        directory = {"type": "directory", "path": "d", "oid": "e" * 40, "size": 0}
        upstream.answers[TREE] = [item("b"), directory, item("d/a.txt")]
        await resolver.commit(REPO, "main", "c")
        for recursive, directory_at, expected in (
            (True, "", ["b", "d", "d/a.txt"]),
            (False, "", ["b", "d"]),
            (False, "d", ["d/a.txt"]),
            (True, "b", ["b"]),
        ):
            found = await resolver.tree(REPO, OLD, directory_at, "c", recursive=recursive, after="", limit=10)
            assert found is not None and [entry.path for entry in found] == expected
        assert await resolver.paths(REPO, OLD, ["d", "x", "b"], "c") == [
            Entry("d", oid="e" * 40),
            await resolver.entry(REPO, OLD, "b", "c"),
        ]
        with pytest.raises(EntryNotFound):
            await resolver.tree(REPO, OLD, "absent", "c", recursive=True, after="", limit=10)
        assert len(upstream.asked) == 2

    async def test_directories_are_made_from_files_when_upstream_cannot_be_asked(
        self, resolver: Resolver, upstream: ScriptedUpstream
    ) -> None:
        """The same pages, names and oids as with it; what is absent is absent; and later the real tree is asked for."""
        upstream.at("main", answer=info(OLD, sibling("d/a.txt"), sibling("b"), sibling("d.x")))
        upstream.answers[TREE] = DOWN
        await resolver.commit(REPO, "main", "c")
        found = await resolver.tree(REPO, OLD, "", "c", recursive=True, after="", limit=10)
        assert found is not None and [entry.path for entry in found] == ["b", "d.x", "d", "d/a.txt"]
        pages = [await resolver.tree(REPO, OLD, "", "c", recursive=True, after=tree_order(entry), limit=1) for entry in found]
        assert [page[0] if page else None for page in pages] == [*found[1:], None]
        with pytest.raises(EntryNotFound):
            await resolver.tree(REPO, OLD, "absent", "c", recursive=True, after="", limit=10)
        assert await resolver.paths(REPO, OLD, ["d", "absent"], "c") == [found[2]]

    async def test_a_huge_tree_is_not_brought_whole(
        self, resolver: Resolver, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After MAX_TREE_PAGES it is left; paths are asked for by themselves, and remembered."""
        monkeypatch.setattr(resolve, "MAX_TREE_PAGES", 2)
        upstream.at("main", answer=info(OLD, *(sibling(f"d/f{i:05}") for i in range(1000))))
        upstream.answers[TREE] = (many(1000), "page2")
        upstream.answers[f"{TREE}?page2"] = (many(2000)[1000:], "page3")
        await resolver.commit(REPO, "main", "c")
        for _ in range(3):
            assert await resolver.tree(REPO, OLD, "", "c", recursive=True, after="", limit=10) is None
        assert upstream.count("/tree/") == 2
        assert len(await resolver.files(REPO, OLD, "c")) == 2000
        upstream.answers[f"/api/models/org/m/paths-info/{OLD}"] = [item("late", "7")]
        for _ in range(2):
            found = await resolver.paths(REPO, OLD, ["d/f00001", "late"], "c")
            assert [entry.path for entry in found] == ["d/f00001", "late"]
        assert upstream.forms[-1] == {"paths": ["late"], "expand": False} and upstream.count("paths-info") == 1

    async def test_a_tree_that_goes_round_in_circles_ends(
        self, resolver: Resolver, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upstream.at("main", answer=info(OLD, *(sibling(f"f{i}") for i in range(1000))))
        upstream.answers[TREE] = (many(5), "x")
        upstream.answers[f"{TREE}?x"] = (many(5), "x")
        await resolver.commit(REPO, "main", "c")
        with pytest.raises(UpstreamFailed):
            await resolver.tree(REPO, OLD, "", "c", recursive=True, after="", limit=10)
        upstream.answers[f"{TREE}?x"] = (many(5), "y")
        upstream.answers[f"{TREE}?y"] = (many(5), "x")
        assert await resolver.tree(REPO, OLD, "", "c", recursive=True, after="", limit=10) is None

    @pytest.mark.parametrize("value", [{}, None, "x", [{"path": "a.txt", "type": "file", "size": -1, "oid": "1" * 40}]])
    async def test_a_tree_that_is_none_is_not_taken(self, resolver: Resolver, upstream: ScriptedUpstream, value: Any) -> None:
        """What is known stands."""
        upstream.at("main", answer=info(OLD))
        upstream.answers[TREE] = value
        await resolver.commit(REPO, "main", "c")
        found = await resolver.tree(REPO, OLD, "", "c", recursive=True, after="", limit=10)
        assert found is not None and [entry.path for entry in found] == ["a.txt"]

    @pytest.mark.parametrize("value", [[], None, "x", {"sha": OLD}, {"id": "org/m"}, info("main"), info(OLD, name="../x")])
    async def test_a_document_that_is_none_is_upstreams_fault(
        self, resolver: Resolver, upstream: ScriptedUpstream, value: Any
    ) -> None:
        upstream.at("main", answer=value)
        with pytest.raises(NearhubError) as caught:
            await resolver.resolve(MAIN, "c")
        assert isinstance(caught.value, UpstreamFailed)
