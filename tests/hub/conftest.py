"""Fixtures for the tests of the stand-in Hub itself."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.hub import Hub


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    async with Hub() as running:
        yield running
