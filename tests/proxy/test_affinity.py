"""P1c: Affinity on a real index, with an injected clock."""

from __future__ import annotations

from nearhub.affinity import GET_S, IN_USE_S, RANGE_S, Affinity, client_key
from nearhub.store.index import Index
from nearhub.wire.target import FileTarget, Repo, RepoKind
from tests.proxy.clock import Clock

MAIN = FileTarget(Repo(RepoKind.MODELS, "org/m"), "main", "model.bin")
OLD, NEW = "a" * 40, "b" * 40


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
