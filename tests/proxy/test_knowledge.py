"""Access, Resolver and Affinity on a real index, with an injected clock and a scripted upstream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from nearhub.access import PUBLIC_TTL_S, RENEW_AFTER_S, Access
from nearhub.affinity import GET_S, IN_USE_S, RANGE_S, Affinity, client_key
from nearhub.errors import AccessRefused, EntryNotFound, HubRefusal, RepoNotFound, UpstreamError, UpstreamUnreachable
from nearhub.metrics import Metrics
from nearhub.resolve import REFUSED_TTL_S, Resolver
from nearhub.store.index import Index
from nearhub.upstream.client import Upstream
from nearhub.upstream.dispatch import Dispatcher
from nearhub.wire.headers import BlobId, FileMetadata
from nearhub.wire.target import FileTarget, Repo, RepoKind

REPO = Repo(RepoKind.MODELS, "org/m")
MAIN = FileTarget(REPO, "main", "model.bin")
OLD, NEW = "a" * 40, "b" * 40


class Clock:
    """Wall-clock seconds that move when told."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class ScriptedUpstream(Upstream):
    """Answers metadata questions from a table; counts them. An exception in the table is raised."""

    def __init__(self) -> None:
        self.url, self.trusted = "https://hub.test", True
        self.answers: dict[str, FileMetadata | Exception] = {}
        self.asked: list[FileTarget] = []
        self.was_asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def metadata(self, target: FileTarget) -> FileMetadata:
        self.asked.append(target)
        self.was_asked.set()
        await self.gate.wait()
        answer = self.answers[target.revision]
        if isinstance(answer, Exception):
            raise answer
        return answer


def meta(commit: str, digit: str = "1", size: int = 10) -> FileMetadata:
    return FileMetadata(commit, BlobId.from_etag(digit * 64), size)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    """An empty index."""
    (tmp_path / "index").mkdir()
    index = Index(tmp_path / "index")
    yield index
    index.close()


@pytest.fixture
async def upstream() -> ScriptedUpstream:
    return ScriptedUpstream()


def resolver_on(index: Index, upstream: ScriptedUpstream, clock: Clock, metrics: Metrics | None = None) -> Resolver:
    dispatcher = Dispatcher([upstream], connections=8, client_connections=8)
    return Resolver(index, dispatcher, metrics or Metrics(), ref_ttl_s=60.0, clock=clock)


# — Resolver ————————————————————————————————————————————————————————————————————————————————————


async def test_a_ref_is_asked_once_within_its_ttl(index: Index, upstream: ScriptedUpstream, clock: Clock) -> None:
    """Within 60 s no second question; after it one; a commit is never asked again."""
    resolver = resolver_on(index, upstream, clock)
    upstream.answers = {"main": meta(OLD)}
    for _ in range(3):
        assert (await resolver.resolve(MAIN, "c")).meta == meta(OLD)
    assert len(upstream.asked) == 1
    clock.now += 60.0
    upstream.answers = {"main": meta(NEW, "2")}
    assert (await resolver.resolve(MAIN, "c")).meta == meta(NEW, "2")
    assert (await resolver.resolve(MAIN.at(OLD), "c")).meta == meta(OLD)
    assert len(upstream.asked) == 2


async def test_what_was_learnt_survives_a_restart(index: Index, upstream: ScriptedUpstream, clock: Clock) -> None:
    """A second resolver on the same index asks nothing that the first one knew."""
    upstream.answers = {"main": meta(OLD)}
    await resolver_on(index, upstream, clock).resolve(MAIN, "c")
    again = resolver_on(index, upstream, clock)
    assert (await again.resolve(MAIN, "c")).meta == meta(OLD)
    assert len(upstream.asked) == 1


async def test_many_who_ask_the_same_share_one_question(index: Index, upstream: ScriptedUpstream, clock: Clock) -> None:
    """50 cold clients, one request upstream; one that gives up does not spoil it for the others."""
    resolver = resolver_on(index, upstream, clock)
    upstream.answers = {"main": meta(OLD)}
    upstream.gate.clear()
    tasks = [asyncio.ensure_future(resolver.resolve(MAIN, "c")) for _ in range(50)]
    await upstream.was_asked.wait()
    tasks[0].cancel()
    upstream.gate.set()
    results = await asyncio.gather(*tasks[1:])
    assert {result.meta for result in results} == {meta(OLD)}
    assert len(upstream.asked) == 1


async def test_stale_is_served_when_upstream_fails_and_said_so(index: Index, upstream: ScriptedUpstream, clock: Clock) -> None:
    """P5: past the TTL with upstream dead, the last answer stands, marked stale; what is unknown fails."""
    resolver = resolver_on(index, upstream, clock)
    upstream.answers = {"main": meta(OLD)}
    await resolver.resolve(MAIN, "c")
    clock.now += 3600
    upstream.answers = {"main": UpstreamUnreachable("down"), "dev": UpstreamUnreachable("down")}
    result = await resolver.resolve(MAIN, "c")
    assert result.meta == meta(OLD) and result.is_stale
    with pytest.raises(UpstreamError):
        await resolver.resolve(FileTarget(REPO, "dev", "model.bin"), "c")


async def test_a_clock_set_back_does_not_make_a_ref_fresh_for_years(
    index: Index, upstream: ScriptedUpstream, clock: Clock
) -> None:
    """An age below zero counts as stale."""
    resolver = resolver_on(index, upstream, clock)
    upstream.answers = {"main": meta(OLD)}
    await resolver.resolve(MAIN, "c")
    clock.now -= 400 * 86400
    await resolver.resolve(MAIN, "c")
    assert len(upstream.asked) == 2


async def test_a_no_of_the_hub_is_remembered_for_ten_seconds(index: Index, upstream: ScriptedUpstream, clock: Clock) -> None:
    """A file that is absent is not asked for by every client; a file published just now is found within 10 s."""
    resolver = resolver_on(index, upstream, clock)
    upstream.answers = {"main": EntryNotFound("no", OLD)}
    for _ in range(5):
        with pytest.raises(EntryNotFound):
            await resolver.resolve(MAIN, "c")
    assert len(upstream.asked) == 1
    clock.now += REFUSED_TTL_S
    upstream.answers = {"main": meta(NEW)}
    assert (await resolver.resolve(MAIN, "c")).meta == meta(NEW)


async def test_a_commit_is_for_ever(index: Index, upstream: ScriptedUpstream, clock: Clock) -> None:
    """P11: a later different answer for the same commit and path raises an alarm and changes nothing."""
    metrics = Metrics()
    resolver = resolver_on(index, upstream, clock, metrics)
    upstream.answers = {"main": meta(OLD, "1")}
    await resolver.resolve(MAIN, "c")
    clock.now += 60
    upstream.answers = {"main": meta(OLD, "2")}
    assert (await resolver.resolve(MAIN, "c")).meta == meta(OLD, "1")
    assert metrics.alarms._value.get() == 1


async def test_an_answer_for_another_commit_is_refused(index: Index, upstream: ScriptedUpstream, clock: Clock) -> None:
    """Asked for a commit, upstream must answer about that commit."""
    resolver = resolver_on(index, upstream, clock)
    upstream.answers = {OLD: meta(NEW)}
    with pytest.raises(UpstreamError, match="answered with commit"):
        await resolver.resolve(MAIN.at(OLD), "c")


# — Access ————————————————————————————————————————————————————————————————————————————————————


class Asker:
    """What Access asks with: an answer or an exception, counted."""

    def __init__(self, answer: FileMetadata | Exception) -> None:
        self.answer = answer
        self.count = 0

    async def __call__(self, target: FileTarget, client: str) -> FileMetadata:
        self.count += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def test_public_is_believed_for_a_minute_and_renewed_in_the_background(index: Index, clock: Clock) -> None:
    """No question while fresh; from 30 s on one in the background, nobody waits; a closed repo is refused within 60 s."""
    ask = Asker(meta(OLD))
    access = Access(index, ask, clock)
    for _ in range(10):
        await access.authorise(MAIN, "c")
    assert ask.count == 1
    clock.now += RENEW_AFTER_S
    ask.answer = RepoNotFound("gone")
    await access.authorise(MAIN, "c")
    await asyncio.wait(list(access._renewals.values()))
    assert ask.count == 2
    with pytest.raises(RepoNotFound):
        await access.authorise(MAIN, "c")


async def test_upstream_down_serves_what_was_public_and_nothing_else(index: Index, clock: Clock) -> None:
    """P5, P6: known to be public stays served while nobody can be asked; unknown is no."""
    ask = Asker(meta(OLD))
    access = Access(index, ask, clock)
    await access.authorise(MAIN, "c")
    ask.answer = UpstreamUnreachable("down")
    clock.now += PUBLIC_TTL_S * 1000
    await access.authorise(MAIN, "c")
    other = FileTarget(Repo(RepoKind.MODELS, "org/other"), "main", "model.bin")
    with pytest.raises(UpstreamUnreachable):
        await access.authorise(other, "c")
    await access.close()


async def test_after_a_failure_upstream_is_not_asked_by_every_request(index: Index, clock: Clock) -> None:
    """While upstream is dead, a known public repo costs one attempt in 10 s, not one a request."""
    ask = Asker(meta(OLD))
    access = Access(index, ask, clock)
    await access.authorise(MAIN, "c")
    ask.answer = UpstreamUnreachable("down")
    clock.now += PUBLIC_TTL_S
    for _ in range(5):
        await access.authorise(MAIN, "c")
    assert ask.count == 2


@pytest.mark.parametrize(
    "refusal", [AccessRefused("gated", status=401, code="GatedRepo"), RepoNotFound("gone"), AccessRefused("private")]
)
async def test_a_repo_that_closes_is_forgotten_on_disk_too(index: Index, clock: Clock, refusal: HubRefusal) -> None:
    """Once upstream refuses, a restart and a dead upstream do not open it again."""
    ask = Asker(meta(OLD))
    await Access(index, ask, clock).authorise(MAIN, "c")
    clock.now += PUBLIC_TTL_S
    ask.answer = refusal
    access = Access(index, ask, clock)
    with pytest.raises(type(refusal)) as caught:
        await access.authorise(MAIN, "c")
    assert caught.value.error_code == refusal.error_code
    ask.answer = UpstreamUnreachable("down")
    with pytest.raises(UpstreamUnreachable):
        await Access(index, ask, clock).authorise(MAIN, "c")


async def test_a_missing_file_does_not_prove_that_a_repo_is_public(index: Index, clock: Clock) -> None:
    """A Hub may look for the file before it looks at the gate: such an answer opens nothing."""
    ask = Asker(EntryNotFound("no", OLD))
    access = Access(index, ask, clock)
    with pytest.raises(EntryNotFound):
        await access.authorise(MAIN, "c")
    ask.answer = UpstreamUnreachable("down")
    with pytest.raises(UpstreamUnreachable):
        await access.authorise(MAIN, "c")


# — Affinity ——————————————————————————————————————————————————————————————————————————————————


async def test_a_get_belongs_to_the_head_before_it(index: Index, clock: Clock) -> None:
    """P1c: within 60 s of a HEAD its commit answers; a plain range for 24 h; other clients and pinned URLs are not touched."""
    affinity = Affinity(index, clock)
    affinity.note("10.0.0.1", MAIN, OLD)
    assert affinity.commit_for("10.0.0.1", MAIN, is_head=False, is_plain_range=False) == OLD
    assert affinity.commit_for("10.0.0.2", MAIN, is_head=False, is_plain_range=True) is None
    assert affinity.commit_for("10.0.0.1", MAIN.at(NEW), is_head=False, is_plain_range=True) is None
    assert affinity.commit_for("10.0.0.1", MAIN, is_head=True, is_plain_range=False) is None
    clock.now += GET_S
    assert affinity.commit_for("10.0.0.1", MAIN, is_head=False, is_plain_range=False) is None
    assert affinity.commit_for("10.0.0.1", MAIN, is_head=False, is_plain_range=True) == OLD
    clock.now += RANGE_S
    assert affinity.commit_for("10.0.0.1", MAIN, is_head=False, is_plain_range=True) is None
    await affinity.close()


async def test_affinity_survives_a_restart(index: Index, clock: Clock) -> None:
    """A download that is resumed after the mirror was restarted gets the commit it began with."""
    before = Affinity(index, clock)
    before.note("10.0.0.1", MAIN, OLD)
    await before.close()
    after = Affinity(index, clock)
    await index.run(after.load)
    assert after.commit_for("10.0.0.1", MAIN, is_head=False, is_plain_range=True) == OLD
    clock.now += RANGE_S
    later = Affinity(index, clock)
    await index.run(later.load)
    assert later.commit_for("10.0.0.1", MAIN, is_head=False, is_plain_range=True) is None
    assert list(index.keys("seen ")) == []


async def test_a_head_does_not_move_the_commit_under_ranges_in_use(index: Index, clock: Clock) -> None:
    """While a client asks for plain ranges its HEADs and GETs are answered from the same commit, for a bounded time."""
    affinity = Affinity(index, clock)
    affinity.note("10.0.0.1", MAIN, OLD)
    clock.now += 2 * GET_S
    assert affinity.commit_for("10.0.0.1", MAIN, is_head=True, is_plain_range=False) is None
    with affinity.ranging("10.0.0.1", MAIN), affinity.ranging("10.0.0.1", MAIN):
        assert affinity.commit_for("10.0.0.1", MAIN, is_head=False, is_plain_range=True) == OLD
        clock.now += 2 * IN_USE_S  # one long range
        assert affinity.commit_for("10.0.0.1", MAIN, is_head=True, is_plain_range=False) == OLD
    clock.now += IN_USE_S - 1
    assert affinity.commit_for("10.0.0.1", MAIN, is_head=True, is_plain_range=False) == OLD
    clock.now += 1
    assert affinity.commit_for("10.0.0.1", MAIN, is_head=True, is_plain_range=False) is None
    await affinity.close()


def test_programs_at_one_address_are_different_clients() -> None:
    """One address, two User-Agents: two clients; and a client key is one word, whatever the User-Agent says."""
    assert client_key("10.0.0.1", "aria2/1.36.0") != client_key("10.0.0.1", "curl/7.88.1")
    assert " " not in client_key("10.0.0.1", "a b\nc ü")
