"""Fixtures only: a stand-in Hub in a process of its own, and a seed that a failing run can be repeated with."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import HubProcess


@pytest.fixture
def hub_process(tmp_path: Path) -> Iterator[HubProcess]:
    """It has its own interpreter, so that its caps hold and its counts go on while a mirror dies."""
    with (tmp_path / "hub.log").open("w") as log, HubProcess(stderr=log) as hub:
        yield hub


@pytest.fixture
def rng() -> random.Random:
    """The seed is printed, and pytest shows it when the test fails."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return random.Random(seed)
