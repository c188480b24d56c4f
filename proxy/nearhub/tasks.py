"""What asyncio lacks: an await that a cancellation does not end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def uncancelled(awaitable: Awaitable[T], on_cancel: Callable[[], None] = lambda: None) -> T:
    """Await to the end whatever happens; a cancellation that came meanwhile is raised afterwards.

    `on_cancel`: so that the end comes soon.
    """
    task = asyncio.ensure_future(awaitable)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as exc:
            cancelled = exc
            on_cancel()
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # heard, and of no interest any more
        raise cancelled
    return task.result()
