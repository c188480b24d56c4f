"""Fixtures only: the stand-in Hub, and a mirror of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.hub import Hub
from tests.mirror import Mirror, configure, running


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    """A stand-in Hub on free ports."""
    async with Hub() as server:
        yield server


@pytest.fixture
async def mirror(hub: Hub, tmp_path: Path) -> AsyncIterator[Mirror]:
    """A mirror of `hub` with an empty cache."""
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as server:
        yield server
