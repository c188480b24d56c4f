"""What a base in memory may do next, and that nobody who waits for one waits for ever."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from neartune.serving import catalog
from neartune.serving import pool as pools
from neartune.serving.catalog import Served
from neartune.serving.life import Event, Life, Phase, step
from neartune.serving.pool import End, NoRoom, Pool, Stopped
from tests.trainer import served
from tests.trainer.bases import make_llama

LIVES = [Life(phase, users) for phase in Phase for users in range(3)]
PROMISED = (Event.WENT, Event.LOADED, Event.SPARED, Event.DROP, Event.DROPPED)
"""What comes by itself, sooner or later, where it can come; FAILED may come in place of LOADED."""


def after(life: Life, event: Event) -> Life | None:
    try:
        return step(life, event)
    except ValueError:
        return None


# — the table ————————————————————————————————————————————————————————————————————————————————————


@pytest.mark.parametrize("life", LIVES, ids=str)
def test_a_base_in_use_is_never_dropped_and_one_that_leaves_gets_no_new_user(life: Life) -> None:
    assert (after(life, Event.DROP) is not None) == (life.phase in (Phase.HERE, Phase.LEAVING) and not life.users)
    came = after(life, Event.COME)
    assert (came is not None) == life.is_open == (life.phase in (Phase.COMING, Phase.HERE))
    assert came is None or came == Life(life.phase, life.users + 1)
    went = after(life, Event.WENT)
    assert went is None or went == Life(life.phase, life.users - 1)
    assert went is not None or not life.users or life.phase is Phase.GOING  # which nobody uses


@pytest.mark.parametrize("life", LIVES, ids=str)
def test_what_is_waited_for_ends_whatever_comes_first(life: Life) -> None:
    """Who waits to come waits for is_open or GONE; no order of what comes by itself goes on without it, or in circles."""

    def ends(life: Life, seen: frozenset[Life]) -> bool:
        if life.phase is Phase.HERE or life.phase is Phase.GONE:
            return True
        nexts = [one for event in (*PROMISED, Event.FAILED) if (one := after(life, event)) is not None]
        return bool(nexts) and life not in seen and all(ends(one, seen | {life}) for one in nexts)

    if life.phase is not Phase.GOING or not life.users:
        assert ends(life, frozenset())


def test_only_a_load_makes_a_base_be_here_and_gone_is_for_good() -> None:
    pairs = [(life, event, one) for life, event in itertools.product(LIVES, Event) if (one := after(life, event))]
    entered = {(life.phase, event) for life, event, one in pairs if one.phase is Phase.HERE and life.phase is not Phase.HERE}
    assert entered == {(Phase.COMING, Event.LOADED), (Phase.LEAVING, Event.SPARED)}
    assert {one.phase for life, _, one in pairs if life.phase is Phase.GONE} == {Phase.GONE}
    assert {life.phase for life in LIVES if life.is_loaded} == {life.phase for life, event, _ in pairs if event is Event.DROP}


# — its thread ———————————————————————————————————————————————————————————————————————————————————


class Cache:
    """What an answer holds."""


def one_step() -> Iterator[int]:
    yield 1


@pytest.fixture(scope="session")
def runs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.made_runs(llama, tmp_path_factory)


@pytest.fixture
def worker(runs: Path, llama: Path) -> pools.Worker:
    one = catalog.find([runs]).models["a"]
    precision = pools.choose_precision("auto", is_cuda=False, has_bf16=False)
    base = pools.open_base(one, llama, torch.device("cpu"), precision, lambda line: None)
    return pools.Worker(base, threading.Lock())


def test_an_answer_that_nobody_wants_any_more_is_not_kept_until_the_next(worker: pools.Worker) -> None:
    def endless(cache: Cache) -> Iterator[Cache]:
        while True:
            yield cache

    cache = Cache()
    seen = weakref.ref(cache)
    job = worker.submit(endless(cache), lambda item: None, None)
    worker.wait(lambda: worker.steps >= 3)
    worker.cancel(job)
    del job, cache
    worker.wait_idle()
    assert seen() is None
    worker.stop()


def test_every_job_is_told_its_end_though_the_base_is_dropped(worker: pools.Worker) -> None:
    told: dict[str, list[Any]] = {name: [] for name in ("first", "left", "cancelled", "late")}
    hold = threading.Event()
    worker.once(hold.wait, told["first"].append)
    worker.submit(one_step(), told["left"].append, None)
    worker.cancel(worker.submit(one_step(), told["cancelled"].append, None))
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    worker.wait(lambda: worker._is_stopping)
    hold.set()
    stopping.join()
    worker.submit(one_step(), told["late"].append, None)
    ends = {name: [item.error for item in items if isinstance(item, End)] for name, items in told.items()}
    assert {name: [type(error) for error in errors] for name, errors in ends.items()} == {
        "first": [Stopped],
        "left": [Stopped],
        "cancelled": [],
        "late": [Stopped],
    }
    worker.wait_idle()


# — all of them ——————————————————————————————————————————————————————————————————————————————————


@pytest.fixture(scope="module")
def many(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs x, y, z on three bases of one size, and w on a base that is larger than all of them."""
    home = tmp_path_factory.mktemp("many")
    for number, name in enumerate("xyzw"):
        base = make_llama(tmp_path_factory.mktemp("bases") / name, seed=number + 1, layers=12 if name == "w" else 2)
        served.moved(runs / "a", base, home / name)
    return home


def pool_of(home: Path, bases: Callable[[int, int], float]) -> tuple[Pool, dict[str, Served]]:
    """(pool, models). `bases`: (bytes of x with its adapter, bytes of w) → limit."""
    models = dict(catalog.find([home]).models)
    small, large = (pools.weight_bytes(Path(models[name].card.path), torch.float32) for name in "xw")
    limit = int(bases(small + pools._adapter_bytes(models["x"]), large))
    return Pool(limit, torch.device("cpu"), lambda asked: Path(asked.card.path), lambda line: None), models


async def use(pool: Pool, model: Served) -> None:
    async with pool.seat(model):
        pass


def life_of(pool: Pool, name: str) -> Life | None:
    return next((held.life for held in pool.held.values() if held.name.endswith(name)), None)


async def is_going(pool: Pool, name: str) -> None:
    await pool._until(lambda: life_of(pool, name) == Life(Phase.GOING, 0))


async def test_a_base_that_falls_idle_while_another_is_dropped_makes_room_too(many: Path) -> None:
    """x is dropped while z falls idle, z while y does: nothing happens any more that would wake who waits."""
    pool, models = pool_of(many, lambda small, large: large + small / 2)
    hold = {name: threading.Event() for name in "xz"}
    begun = {name: asyncio.Event() for name in "xz"}
    loop = asyncio.get_running_loop()

    async def ask(name: str) -> None:
        def stuck() -> Iterator[int]:
            loop.call_soon_threadsafe(begun[name].set)
            hold[name].wait()
            yield 1

        async with pool.seat(models[f"base:{name}"]) as seat:
            async for _ in seat.run(stuck()):
                pass

    for name in "xyz":
        await use(pool, models[f"base:{name}"])
    asked = {name: asyncio.create_task(ask(name)) for name in "xz"}
    await asyncio.gather(*(event.wait() for event in begun.values()))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(pool.seat(models["base:y"]))
        asked["x"].cancel()
        await asyncio.wait([asked["x"]])
        waiting = asyncio.create_task(use(pool, models["base:w"]))
        await is_going(pool, "x")
        asked["z"].cancel()
        await asyncio.wait([asked["z"]])
        hold["x"].set()
        await is_going(pool, "z")
    hold["z"].set()
    await waiting
    assert [held.name for held in pool.held.values()] == ["base:w"]
    await pool.close()


async def test_a_base_that_was_asked_to_go_and_need_not_takes_answers_again(many: Path) -> None:
    """Room is made for z by y, which falls idle, though x was asked."""
    pool, models = pool_of(many, lambda small, large: 2.5 * small)
    for name in "xy":
        await use(pool, models[name])
    async with pool.seat(models["x"]):
        async with pool.seat(models["y"]):
            waiting = asyncio.create_task(use(pool, models["z"]))
            await pool._until(lambda: life_of(pool, "x") == Life(Phase.LEAVING, 1))
        await waiting
        assert (life_of(pool, "x"), life_of(pool, "y")) == (Life(Phase.HERE, 1), None)
        await use(pool, models["x"])
    await pool.close()


async def test_an_adapter_that_nobody_waits_for_any_more_ends_with_its_base(many: Path) -> None:
    pool, models = pool_of(many, lambda small, large: 2 * large)
    await use(pool, models["base:x"])
    (held,) = pool.held.values()
    worker = await held.ready
    hold = threading.Event()
    worker.once(hold.wait, lambda item: None)
    asked = asyncio.create_task(use(pool, models["x"]))
    await asyncio.to_thread(worker.wait, lambda: worker._open == 2)
    (fit,) = held.adapters.values()
    asked.cancel()
    await asyncio.wait([asked])
    closing = asyncio.create_task(pool.close())
    await asyncio.to_thread(worker.wait, lambda: worker._is_stopping)
    hold.set()
    await closing
    with pytest.raises(Stopped):
        await fit.ready
    assert not held.adapters


async def test_the_memory_of_a_base_is_free_before_the_next_is_loaded(many: Path) -> None:
    pool, models = pool_of(many, lambda small, large: 1.5 * small)
    async with pool.seat(models["x"]) as seat:
        model = weakref.ref(seat.base.model)
    del seat
    before: list[bool] = []

    real = pool._open

    def look(asked: Served, path: Path) -> Any:
        before.append(model() is None)
        return real(asked, path)

    pool._open = look  # type: ignore[method-assign]
    await use(pool, models["y"])
    assert before == [True]
    await pool.close()


@pytest.mark.parametrize("seed", range(3))
async def test_whoever_asks_gets_an_answer_whatever_comes_and_goes(many: Path, seed: int) -> None:
    pool, models = pool_of(many, lambda small, large: 2.5 * small)
    rng = random.Random(seed)

    async def ask(name: str, count: int) -> int:
        async with pool.seat(models[name]) as seat:
            return sum([one async for one in seat.run(iter([1] * count))])

    wanted = [rng.randrange(1, 5) for _ in range(24)]
    asked = [asyncio.create_task(ask(rng.choice("xyz"), count)) for count in wanted]
    for one in rng.sample(asked, 8):
        await asyncio.to_thread(lambda: None)
        one.cancel()
    found = await asyncio.gather(*asked, return_exceptions=True)
    kinds = (asyncio.CancelledError, NoRoom)
    assert all(one == count or isinstance(one, kinds) for one, count in zip(found, wanted, strict=True)), found
    assert sum(isinstance(one, int) for one in found) >= 8
    assert {held.life.users for held in pool.held.values()} == {0}
    await pool.close()
    assert not pool.held
