"""SingleFlight: one question for many who ask, and whose it is when something goes wrong."""

from __future__ import annotations

import asyncio
import logging

import pytest

from nearhub import trace
from nearhub.errors import UpstreamFailed
from nearhub.single_flight import SingleFlight
from tests.proxy.clock import settle


class Work:
    """Begun as often as it counts; ends when told, with a result or an error."""

    def __init__(self) -> None:
        self.begun = 0
        self.end = asyncio.Event()
        self.error: BaseException | None = None

    async def __call__(self) -> int:
        self.begun += 1
        await self.end.wait()
        if self.error is not None:
            raise self.error
        return self.begun


async def test_many_share_one_and_the_next_begins_anew() -> None:
    """Other keys are other questions; when it is answered, a later question is asked again."""
    flight, work, other = SingleFlight(), Work(), Work()
    askers = [asyncio.ensure_future(flight.share("a", work)) for _ in range(10)]
    apart = asyncio.ensure_future(flight.share("b", other))
    await settle()
    assert (work.begun, other.begun) == (1, 1)
    work.end.set()
    other.end.set()
    assert await asyncio.gather(*askers, apart) == [1] * 11
    await settle()
    assert await flight.share("a", work) == 2


async def test_who_is_cancelled_ends_it_for_nobody() -> None:
    """Not even when all are: the answer is recorded for whoever asks next."""
    flight, work = SingleFlight(), Work()
    askers = [asyncio.ensure_future(flight.share("a", work)) for _ in range(3)]
    await settle()
    for asker in askers:
        asker.cancel()
    await asyncio.gather(*askers, return_exceptions=True)
    late = asyncio.ensure_future(flight.share("a", work))
    await settle()
    work.end.set()
    assert await late == 1


async def test_an_error_is_everybodys(caplog: pytest.LogCaptureFixture) -> None:
    """Ours is for whoever waits, and if nobody does, no noise; one that is not ours is a bug, and logged."""
    flight, work = SingleFlight(), Work()
    work.error = UpstreamFailed("500")
    askers = [asyncio.ensure_future(flight.share("a", work)) for _ in range(3)]
    flight.start("nobody", work)
    await settle()
    work.end.set()
    assert await asyncio.gather(*askers, return_exceptions=True) == [work.error] * 3
    await settle()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    work.error = ZeroDivisionError()
    flight.start("bug", work)
    await settle()
    assert "asking for bug broke" in caplog.text


async def test_closing_ends_what_is_under_way() -> None:
    flight, work = SingleFlight(), Work()
    task = flight.start("a", work)
    await settle()
    await flight.close()
    assert task.cancelled()
    await flight.close()


async def test_who_waits_is_noted_and_who_starts_only_is_not() -> None:
    """Cache-Status tells them apart."""
    flight, work = SingleFlight(), Work()
    work.end.set()
    trace.begin()
    await flight.start("a", work)
    assert not trace.was_forwarded()
    await flight.share("b", work)
    assert trace.was_forwarded()
