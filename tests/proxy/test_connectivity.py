"""Offline by the operator's word, or after lasting silence; what may leave meanwhile."""

from __future__ import annotations

import pytest

from nearhub.connectivity import Connectivity, Mode
from nearhub.errors import Offline
from tests.proxy.clock import Clock


@pytest.mark.parametrize(
    ("mode", "silent_s", "is_offline", "is_closed"),
    [
        (Mode.ON, None, True, True),
        (Mode.OFF, 1e6, False, False),
        (Mode.AUTO, None, False, False),
        (Mode.AUTO, 59.9, False, False),
        (Mode.AUTO, 60.0, True, False),
    ],
)
def test_modes(clock: Clock, mode: Mode, silent_s: float | None, is_offline: bool, is_closed: bool) -> None:
    one = Connectivity(mode, lasting_s=60.0, clock=clock)
    if silent_s is not None:
        one.lost()
        clock.now += silent_s
        one.lost()  # said again: the first time counts
    assert (one.is_offline, one.is_closed, bool(one.why)) == (is_offline, is_closed, is_offline)
    if is_closed:
        with pytest.raises(Offline, match=r"offline.*nearhub prefetch.*nearhub import"):
            one.require()
    else:
        one.require()  # a probe may go out, or nobody would ever hear that upstream is back


def test_the_first_answer_ends_it_and_so_does_the_operator(clock: Clock) -> None:
    one = Connectivity(lasting_s=60.0, clock=clock)
    one.lost()
    clock.now += 100
    assert one.is_offline
    one.switch(Mode.OFF)
    assert not one.is_offline
    one.switch(Mode.AUTO)
    assert one.is_offline
    one.found()
    assert not one.is_offline
    one.lost()
    assert not one.is_offline
