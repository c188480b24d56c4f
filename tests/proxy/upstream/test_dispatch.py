"""Which upstream is asked next, who gets a connection next, and what is remembered of failures."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearhub.errors import (
    AccessRefused,
    EntryNotFound,
    HubRefusal,
    NearhubError,
    UpstreamBusy,
    UpstreamFailed,
    UpstreamLied,
    UpstreamUnreachable,
)
from nearhub.planner import Lane
from nearhub.upstream.client import METADATA_TIMEOUT_S, Document, Upstream
from nearhub.upstream.dispatch import (
    ABSORB_S,
    ABSORBED_FAILURES,
    OPEN_AFTER,
    OPEN_S,
    PROBE_EVERY_S,
    Dispatcher,
    Health,
    Slots,
    Ticket,
    choose,
    rank,
)
from nearhub.wire.headers import Algo, BlobId, FileMetadata
from nearhub.wire.target import FileTarget, Repo, RepoKind
from tests.proxy.clock import Clock, settle

TARGET = FileTarget(Repo(RepoKind.MODELS, "org/m"), "main", "x")
META = FileMetadata("c" * 40, BlobId(Algo.SHA1, "a" * 40), 7)


@pytest.mark.parametrize(
    ("healths", "order"),
    [
        ([], []),
        ([Health()], [0]),
        ([Health(), Health(), Health()], [0, 1, 2]),
        ([Health(failures=1), Health()], [1, 0]),
        ([Health(failures=2), Health(failures=1), Health()], [2, 1, 0]),
        ([Health(failures=OPEN_AFTER), Health(failures=2)], [1, 0]),
        ([Health(closed_until=10.1), Health(failures=9)], [1]),
        ([Health(closed_until=10.0), Health()], [0, 1]),
        ([Health(closed_until=11.0), Health(closed_until=99.0)], []),
    ],
)
def test_upstreams_are_ranked_by_failures_and_then_as_configured(healths: list[Health], order: list[int]) -> None:
    """At second 10; a closed one is not there at all."""
    assert rank(healths, 10.0) == order


class TestChoose:
    @pytest.mark.parametrize(
        ("waiting", "by_client", "by_holder", "chosen"),
        [
            ("", {}, {}, None),
            ("a1 b2", {}, {}, 0),
            ("a1 b2", {"a": 1}, {}, 1),
            ("a1 a2", {}, {"1": 3}, 1),
            ("a1 b2", {"a": 1, "b": 1}, {"1": 2, "2": 1}, 1),
            ("a1 b2", {"a": 1}, {"2": 9}, 1),
            ("a1 a1", {"a": 1}, {"1": 1}, 0),
            ("a1 b1", {"a": 2}, {}, 1),
            ("a1 a2", {"a": 2}, {}, None),
            ("a1 b2", {"a": 2, "b": 2}, {}, None),
        ],
    )
    async def test_the_client_with_fewest_then_the_blob_with_fewest_then_first_come(
        self, waiting: str, by_client: dict[str, int], by_holder: dict[object, int], chosen: int | None
    ) -> None:
        """`a1`: client a for blob 1; nobody may have more than two."""
        tickets = [Ticket(text[0], text[1]) for text in waiting.split()]
        assert choose(tickets, Counter(by_client), Counter(by_holder), 2) == chosen


class Crowd:
    """Tasks that want a place each, keep it until they are let go, and note who has one."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.inside: list[str] = []
        self.order: list[str] = []
        self.exits: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def enter(self, name: str) -> None:
        """`a1`, `a1'`, …: client a for blob 1."""
        self.exits[name] = asyncio.Event()
        self.tasks[name] = asyncio.get_running_loop().create_task(self._stay(name))

    async def _stay(self, name: str) -> None:
        async with self.slots.hold(name[0], name[1]):
            self.inside.append(name)
            self.order.append(name)
            try:
                await self.exits[name].wait()
            finally:
                self.inside.remove(name)

    async def leave(self, name: str) -> None:
        self.exits[name].set()
        await self.tasks[name]
        await settle()


class TestSlots:
    async def test_no_more_than_the_limit_are_inside_and_the_rest_follow(self) -> None:
        crowd = Crowd(Slots(2, 99))
        for name in ("a1", "b1", "c1"):
            crowd.enter(name)
        await settle()
        assert crowd.inside == ["a1", "b1"]
        assert repr(crowd.slots) == "<Slots 2/2, 1 waiting>"
        await crowd.leave("a1")
        assert crowd.inside == ["b1", "c1"]
        await crowd.leave("b1")
        await crowd.leave("c1")
        assert repr(crowd.slots) == "<Slots 0/2, 0 waiting>"

    async def test_a_client_with_many_requests_does_not_keep_the_others_waiting(self) -> None:
        """First a fills everything and queues ten more; whoever comes later goes before them."""
        crowd = Crowd(Slots(2, 99))
        for name in ["a1" + "'" * i for i in range(12)]:
            crowd.enter(name)
        crowd.enter("b2")
        await settle()
        await crowd.leave("a1")
        assert crowd.inside == ["a1'", "b2"]
        await crowd.leave("b2")
        for name in list(crowd.tasks):
            crowd.exits[name].set()
        await asyncio.gather(*crowd.tasks.values())

    async def test_a_client_never_has_more_than_its_limit_even_when_places_are_free(self) -> None:
        crowd = Crowd(Slots(8, 2))
        for name in ("a1", "a2", "a3", "b1"):
            crowd.enter(name)
        await settle()
        assert crowd.inside == ["a1", "a2", "b1"]
        await crowd.leave("a1")
        assert crowd.inside == ["a2", "b1", "a3"]
        for name in ("a2", "a3", "b1"):
            await crowd.leave(name)

    async def test_one_cancelled_while_waiting_takes_no_place(self) -> None:
        crowd = Crowd(Slots(1, 9))
        for name in ("a1", "b1", "c1"):
            crowd.enter(name)
        await settle()
        crowd.tasks["b1"].cancel()
        await settle()
        assert repr(crowd.slots) == "<Slots 1/1, 1 waiting>"
        await crowd.leave("a1")
        assert crowd.inside == ["c1"]
        await crowd.leave("c1")
        assert repr(crowd.slots) == "<Slots 0/1, 0 waiting>"

    async def test_one_cancelled_in_the_moment_it_is_admitted_gives_its_place_on(self) -> None:
        """The place is granted and the cancellation sent before its task runs again."""
        crowd = Crowd(Slots(1, 9))
        for name in ("a1", "b1", "c1"):
            crowd.enter(name)
        await settle()
        crowd.exits["a1"].set()
        crowd.tasks["a1"].add_done_callback(lambda _: crowd.tasks["b1"].cancel())
        await settle()
        assert crowd.inside == ["c1"] and crowd.tasks["b1"].cancelled()
        await crowd.leave("c1")
        assert repr(crowd.slots) == "<Slots 0/1, 0 waiting>"

    async def test_one_cancelled_just_before_a_place_comes_free_is_passed_over(self) -> None:
        """The cancellation is sent, and before its task runs again somebody leaves: neither task is harmed."""
        crowd = Crowd(Slots(1, 9))
        for name in ("a1", "b1", "c1"):
            crowd.enter(name)
        await settle()
        crowd.exits["a1"].set()
        crowd.tasks["b1"].cancel()
        await settle()
        assert crowd.tasks["a1"].done() and crowd.tasks["a1"].exception() is None
        assert crowd.tasks["b1"].cancelled()
        assert crowd.inside == ["c1"]
        await crowd.leave("c1")
        assert repr(crowd.slots) == "<Slots 0/1, 0 waiting>"

    async def test_an_error_inside_gives_the_place_back(self) -> None:
        slots = Slots(1, 9)
        with pytest.raises(ZeroDivisionError):
            async with slots.hold("a", 1):
                raise ZeroDivisionError
        assert repr(slots) == "<Slots 0/1, 0 waiting>"

    @settings(max_examples=60, deadline=None)
    @given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 4))
    def test_limits_hold_and_nothing_leaks_whatever_is_cancelled_when(
        self, rng: random.Random, limit: int, client_limit: int
    ) -> None:
        """Random arrivals, departures and cancellations, several per turn of the loop; free places are never kept from
        somebody who may have one."""

        async def scenario() -> None:
            crowd = Crowd(Slots(limit, client_limit))
            numbers = itertools.count()
            for _ in range(rng.randint(1, 40)):
                for _ in range(rng.randint(1, 3)):
                    action = rng.random()
                    live = [name for name, task in crowd.tasks.items() if not task.done()]
                    if action < 0.5 or not live:
                        crowd.enter(f"{rng.choice('abc')}{rng.choice('12')}#{next(numbers)}")
                    elif action < 0.75:
                        crowd.exits[rng.choice(live)].set()
                    else:
                        crowd.tasks[rng.choice(live)].cancel()
                for _ in range(rng.choice([0, 1, 10])):
                    await asyncio.sleep(0)
                    by_client = Counter(name[0] for name in crowd.inside)
                    assert len(crowd.inside) <= limit and max(by_client.values(), default=0) <= client_limit
            await settle()
            by_client = Counter(name[0] for name in crowd.inside)
            outside = [name for name, task in crowd.tasks.items() if not task.done() and name not in crowd.inside]
            if len(crowd.inside) < limit:
                assert all(by_client[name[0]] >= client_limit for name in outside), "a place is free and somebody waits"
            for event in crowd.exits.values():
                event.set()
            results = await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
            assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
            assert repr(crowd.slots) == f"<Slots 0/{limit}, 0 waiting>"
            assert not crowd.slots._by_client and not crowd.slots._by_holder

        asyncio.run(scenario())


Answer = FileMetadata | NearhubError


class FakeUpstream:
    """Answers every question with what it was told, or with each of a list in turn, and counts how often it was asked."""

    def __init__(self, answer: Answer | list[Answer], *, trusted: bool = True) -> None:
        self.answer = answer
        self.trusted = trusted
        self.asked = 0
        self.probed = 0
        self.gate: asyncio.Event | None = None

    async def metadata(self, target: FileTarget) -> FileMetadata:
        self.asked += 1
        return await self._told()

    async def document(self, path: str, form: object = None, *, about: object = None) -> Document:
        await self.metadata(TARGET)
        return Document(path, None, 1)

    async def probe(self) -> None:
        self.probed += 1
        if self.gate is not None:
            await self.gate.wait()
        await self._told()

    async def _told(self) -> FileMetadata:
        await asyncio.sleep(0)
        answer = self.answer
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, NearhubError):
            raise answer
        return answer


@pytest.fixture
async def made() -> AsyncIterator[list[Dispatcher]]:
    """Dispatchers of a test, closed with it: some of them probe."""
    dispatchers: list[Dispatcher] = []
    yield dispatchers
    for one in dispatchers:
        await one.close()
    await settle()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("probe")]


@pytest.fixture
def dispatcher(made: list[Dispatcher]) -> Callable[..., Dispatcher]:
    def make(upstreams: Sequence[FakeUpstream], clock: Clock | None = None, *, connections: int = 32) -> Dispatcher:
        clock = clock or Clock()
        made.append(
            Dispatcher(
                cast(list[Upstream], upstreams),
                connections=connections,
                client_connections=8,
                clock=clock,
                sleep=clock.sleep,
            )
        )
        return made[-1]

    return make


Make = Callable[..., Dispatcher]
DEAD = UpstreamUnreachable("no answer")


class TestDispatcher:
    async def test_the_first_answer_ends_the_search(self, dispatcher: Make) -> None:
        one, two = FakeUpstream(META), FakeUpstream(META)
        assert await dispatcher([one, two]).metadata(TARGET, "a") == META
        assert (one.asked, two.asked) == (1, 0)

    async def test_a_failure_leads_to_the_next_upstream_and_is_remembered(self, dispatcher: Make) -> None:
        one, two = FakeUpstream(UpstreamFailed("502")), FakeUpstream(META)
        where = dispatcher([one, two])
        assert await where.metadata(TARGET, "a") == META
        assert await where.metadata(TARGET, "a") == META
        assert (one.asked, two.asked) == (1, 2)

    async def test_only_trusted_upstreams_say_what_a_file_is(self, dispatcher: Make) -> None:
        """The others carry bytes, which are verified."""
        one, mirror = FakeUpstream(DEAD), FakeUpstream(META, trusted=False)
        where = dispatcher([one, mirror])
        with pytest.raises(UpstreamUnreachable, match="no answer"):
            await where.metadata(TARGET, "a")
        assert mirror.asked == 0
        assert [cast(object, upstream) for upstream in where.candidates()] == [one, mirror]
        assert [cast(object, upstream) for upstream in where.candidates(trusted_only=True)] == [one]

    @pytest.mark.parametrize("refusal", [EntryNotFound("gone", "c" * 40), AccessRefused("gated", status=403)])
    async def test_a_refusal_by_the_hub_is_an_answer(self, dispatcher: Make, refusal: HubRefusal) -> None:
        """It ends the search, and counts as health."""
        one, two = FakeUpstream(refusal), FakeUpstream(META)
        where = dispatcher([one, two])
        for _ in range(2 * OPEN_AFTER):
            with pytest.raises(type(refusal)) as caught:
                await where.metadata(TARGET, "a")
            assert caught.value is refusal
        assert (one.asked, two.asked) == (2 * OPEN_AFTER, 0)

    async def test_after_three_unreachable_answers_it_is_left_alone(self, dispatcher: Make) -> None:
        """Stale answers must not wait for it: questions fail at once, and nobody's question finds out whether it is back."""
        clock, one = Clock(), FakeUpstream(DEAD)
        where = dispatcher([one], clock)
        for _ in range(10):
            with pytest.raises(UpstreamUnreachable):
                await where.metadata(TARGET, "a")
        assert one.asked == OPEN_AFTER == 3
        for _ in range(100):
            await clock.advance(1.0)
            with pytest.raises(UpstreamUnreachable, match="no upstream answers"):
                await where.metadata(TARGET, "a")
        assert one.asked == OPEN_AFTER and one.probed == 100 // PROBE_EVERY_S

    async def test_silence_once_is_enough(self, dispatcher: Make) -> None:
        """A whole time-out was spent on it already."""
        clock, one = Clock(), FakeUpstream(UpstreamUnreachable("silence", is_silence=True))
        where = dispatcher([one], clock)
        for _ in range(3):
            with pytest.raises(UpstreamUnreachable):
                await where.metadata(TARGET, "a")
        assert one.asked == 1

    @pytest.mark.parametrize(
        "answer", [META, UpstreamFailed("500"), UpstreamBusy("slow down", retry_after_s=9.0), UpstreamLied("x")]
    )
    async def test_a_probe_that_hears_anything_lets_questions_through_again(self, dispatcher: Make, answer: Answer) -> None:
        """Within PROBE_EVERY_S of its return; then no probe is sent any more."""
        clock, one = Clock(), FakeUpstream(UpstreamUnreachable("silence", is_silence=True))
        where = dispatcher([one], clock)
        with pytest.raises(UpstreamUnreachable):
            await where.metadata(TARGET, "a")
        await clock.advance(10 * PROBE_EVERY_S)
        assert one.probed == 10
        one.answer = [answer, META]
        await clock.advance(PROBE_EVERY_S)
        assert await where.metadata(TARGET, "a") == META
        await clock.advance(10 * PROBE_EVERY_S)
        assert (one.asked, one.probed) == (2, 11)

    async def test_a_probe_that_waits_long_keeps_questions_from_waiting_too(self, dispatcher: Make) -> None:
        """An upstream that swallows packets: each probe takes a whole time-out, in which nobody else is sent there."""
        clock, one = Clock(), FakeUpstream(UpstreamUnreachable("silence", is_silence=True))
        where = dispatcher([one], clock)
        with pytest.raises(UpstreamUnreachable):
            await where.metadata(TARGET, "a")
        for _ in range(5):
            one.gate = asyncio.Event()
            await clock.advance(PROBE_EVERY_S)
            await clock.advance(METADATA_TIMEOUT_S)
            with pytest.raises(UpstreamUnreachable, match="no upstream answers"):
                await where.metadata(TARGET, "a")
            one.gate.set()
            await settle()
        assert (one.asked, one.probed) == (1, 5)

    async def test_content_is_not_probed_for(self, dispatcher: Make) -> None:
        """A CDN that is down rests five seconds, and the next fill tries it."""
        clock, one = Clock(), FakeUpstream(META)
        where = dispatcher([one], clock)
        for _ in range(OPEN_AFTER):
            where.failed(where.upstreams[0], DEAD)
        assert where.candidates() == [] and len(where.candidates(trusted_only=True)) == 1
        await clock.advance(OPEN_S)
        assert len(where.candidates()) == 1 and one.probed == 0

    async def test_one_that_answers_badly_is_not_left_alone(self, dispatcher: Make) -> None:
        """Only silence costs waiting time. What was sent wrong is not asked for again by itself; a 5xx is."""
        for error, tries in ((UpstreamFailed("502"), 1 + ABSORBED_FAILURES), (UpstreamLied("bytes"), 1)):
            clock, one = Clock(), FakeUpstream(error)
            where = dispatcher([one], clock)
            for _ in range(10):
                question = asyncio.ensure_future(where.metadata(TARGET, "a"))
                await clock.advance(ABSORB_S)
                with pytest.raises(type(error)):
                    await question
            assert one.asked == 10 * tries

    @pytest.mark.parametrize("failures", [1, 2])
    async def test_a_short_trouble_is_borne(self, dispatcher: Make, failures: int) -> None:
        """One or two 5xx or cut answers and then a good one: the client hears of nothing (hub-protocol: no retry on info)."""
        clock, one = Clock(), FakeUpstream([*[UpstreamFailed("500")] * failures, META])
        where = dispatcher([one], clock)
        question = asyncio.ensure_future(where.document("/api/models/org/m", "a"))
        await settle()
        assert not question.done() and clock.sleepers == 1
        await clock.advance(1.0)
        assert (await question).value == "/api/models/org/m"
        assert one.asked == 1 + failures

    @pytest.mark.parametrize("status", [429, 503])
    async def test_a_short_pause_is_kept_and_the_question_asked_again(self, dispatcher: Make, status: int) -> None:
        """429, or 503 with Retry-After, of no more than a client's patience; not a moment before it is over."""
        clock, one = Clock(), FakeUpstream([UpstreamBusy("slow down", retry_after_s=2.0, status=status), META])
        where = dispatcher([one], clock)
        questions = [asyncio.ensure_future(where.metadata(TARGET, "first"))]
        await settle()
        questions += [asyncio.ensure_future(where.metadata(TARGET, f"{i}")) for i in range(3)]
        await clock.advance(1.9)
        assert not any(question.done() for question in questions) and one.asked == 1
        await clock.advance(0.2)
        assert await asyncio.gather(*questions) == [META] * 4

    async def test_pauses_are_borne_for_five_seconds_in_all(self, dispatcher: Make) -> None:
        """An upstream that says `one second` again and again is passed on in the end, as what it is."""
        clock, one = Clock(), FakeUpstream(UpstreamBusy("slow down", retry_after_s=1.0))
        where = dispatcher([one], clock)
        question = asyncio.ensure_future(where.metadata(TARGET, "a"))
        await clock.advance(ABSORB_S - 0.1)
        assert not question.done()
        await clock.advance(0.2)
        with pytest.raises(UpstreamBusy):
            await question
        assert one.asked == ABSORB_S + 1

    async def test_retry_after_zero_is_no_leave_to_ask_without_end(self, dispatcher: Make) -> None:
        clock, one = Clock(), FakeUpstream(UpstreamBusy("slow down", retry_after_s=0.0))
        where = dispatcher([one], clock)
        question = asyncio.ensure_future(where.metadata(TARGET, "a"))
        await clock.advance(ABSORB_S + 1)
        with pytest.raises(UpstreamBusy):
            await question
        assert one.asked <= 25

    async def test_who_bears_a_trouble_keeps_no_place(self, dispatcher: Make) -> None:
        """Others' questions go through meanwhile."""
        clock, one = Clock(), FakeUpstream(UpstreamFailed("500"))
        where = dispatcher([one], clock, connections=4)
        assert where.slots(Lane.METADATA).limit == 1
        questions = [asyncio.ensure_future(where.metadata(TARGET, f"{i}")) for i in range(5)]
        await settle()
        await settle()
        assert one.asked == 5 and clock.sleepers == 5
        for question in questions:
            question.cancel()
        await asyncio.gather(*questions, return_exceptions=True)
        assert repr(where.slots(Lane.METADATA)) == "<Slots 0/1, 0 waiting>"

    @pytest.mark.parametrize("answer", [META, EntryNotFound("gone"), AccessRefused("gated", status=403)])
    async def test_an_answer_in_between_forgets_the_failures(self, dispatcher: Make, answer: Answer) -> None:
        """A refusal is an answer too."""
        one = FakeUpstream(DEAD)
        where = dispatcher([one])
        for one.answer in (DEAD, DEAD, answer, DEAD, DEAD, answer):
            await asyncio.gather(where.metadata(TARGET, "a"), return_exceptions=True)
        assert one.asked == 6

    async def test_one_that_asks_us_to_wait_is_not_asked_before_that(self, dispatcher: Make) -> None:
        """429 and 503 with Retry-After; clients hear the same words, and how long is left."""
        clock, one = Clock(), FakeUpstream(UpstreamBusy("slow down", retry_after_s=60.0, status=503))
        where = dispatcher([one], clock)
        for elapsed_s, wait_s in ((0, 60), (0, 60), (20, 40), (34.9, 5)):
            clock.now += elapsed_s
            with pytest.raises(UpstreamBusy) as caught:
                await where.metadata(TARGET, "a")
            assert caught.value.http_status == 503
            assert caught.value.headers() == {"Retry-After": str(wait_s)}
        assert one.asked == 1
        one.answer = META
        clock.now += 0.2
        question = asyncio.ensure_future(where.metadata(TARGET, "a"))  # so short a rest is borne
        await clock.advance(4.8)
        assert not question.done() and one.asked == 1
        await clock.advance(0.2)
        assert await question == META

    async def test_a_shorter_wait_does_not_cut_a_longer_one_short(self, dispatcher: Make) -> None:
        clock, one = Clock(), FakeUpstream(META)
        where = dispatcher([one], clock)
        for wait_s in (60.0, 1.0):
            where.failed(where.upstreams[0], UpstreamBusy("slow down", retry_after_s=wait_s))
        clock.now += 59.0
        assert where.candidates() == []
        clock.now += 1.0
        assert len(where.candidates()) == 1

    async def test_an_answer_to_an_earlier_request_does_not_lift_a_pause_nor_hide_its_reason(self, dispatcher: Make) -> None:
        clock, one = Clock(), FakeUpstream(META)
        where = dispatcher([one], clock)
        where.failed(where.upstreams[0], UpstreamBusy("slow down", retry_after_s=2.0))
        where.succeeded(where.upstreams[0])
        assert where.candidates() == []
        assert isinstance(where.why_none(), UpstreamBusy)
        clock.now += 2.0
        where.succeeded(where.upstreams[0])
        assert len(where.candidates()) == 1
        assert not isinstance(where.why_none(), UpstreamBusy)

    async def test_waiting_for_one_does_not_close_the_others(self, dispatcher: Make) -> None:
        busy, free = FakeUpstream(UpstreamBusy("slow down", retry_after_s=60.0)), FakeUpstream(META)
        where = dispatcher([busy, free])
        for _ in range(3):
            assert await where.metadata(TARGET, "a") == META
        assert (busy.asked, free.asked) == (1, 3)

    @pytest.mark.parametrize("connections", [1, 3, 8, 32, 100])
    async def test_short_transfers_have_places_of_their_own(self, dispatcher: Make, connections: int) -> None:
        """Express and metadata never wait behind bulk; all lanes together keep to the configured connections."""
        where = dispatcher([], connections=connections)
        limits = [where.slots(lane).limit for lane in Lane if lane is not Lane.PREFETCH]
        assert 1 <= where.slots(Lane.PREFETCH).limit <= max(1, where.slots(Lane.BULK).limit // 4)  # a part of that lane
        assert all(limit >= 1 for limit in limits)
        assert sum(limits) <= max(3, connections)

    async def test_metadata_waits_for_its_lane(self, dispatcher: Make) -> None:
        """A HEAD storm has a bounded number of requests under way."""
        gate, under_way, most = asyncio.Event(), 0, 0

        class Slow(FakeUpstream):
            async def metadata(self, target: FileTarget) -> FileMetadata:
                nonlocal under_way, most
                under_way += 1
                most = max(most, under_way)
                await gate.wait()
                under_way -= 1
                return META

        where = dispatcher([Slow(META)], connections=8)
        calls = [asyncio.ensure_future(where.metadata(TARGET, f"client {i}")) for i in range(20)]
        await settle()
        gate.set()
        await asyncio.gather(*calls)
        assert most == where.slots(Lane.METADATA).limit
