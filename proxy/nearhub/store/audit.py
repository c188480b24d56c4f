"""AuditLog: who got what, when, by which rule: lines of JSON, each chained to the one before it, in files that rotate.

    CACHE/audit/audit-00000001.jsonl …      a line is as wire/audit.py says

Lines are handed over on the loop, chained and written in a thread within 0.2 s, and durable then. What cannot be written is
kept for later, as far as memory allows; what is lost is counted in the chain itself. A crash loses what was not yet written,
and what it left half there is put aside: the chain goes on from the last sound line, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nearhub.errors import AuditBroken, StoreFailed, StoreRefused
from nearhub.metrics import Metrics
from nearhub.store.disk import Disk
from nearhub.wire import audit as words
from nearhub.wire.audit import Link

log = logging.getLogger(__name__)

FLUSH_EVERY_S = 0.2
_MOST_WAITING = 50_000
_NAME = re.compile(r"audit-([0-9]{8})\.jsonl\Z")


class AuditLog:
    """The owner of `root`. open() before all else, close() at the end. Clock: wall seconds."""

    def __init__(
        self,
        root: Path,
        metrics: Metrics,
        *,
        max_file_bytes: int,
        keep_files: int,
        clock: Callable[[], float] = time.time,
        disk: Disk | None = None,
    ) -> None:
        self._root = root
        self._metrics = metrics
        self._max_file_bytes = max_file_bytes
        self._keep_files = keep_files
        self._clock = clock
        self._disk = disk or Disk()
        self._waiting: deque[tuple[float, Mapping[str, object]]] = deque()
        self._lost = self._told_lost = 0  # counted on the loop; and by the thread, how many of them stand in the chain
        self._chain = Link()
        self._number, self._size, self._fd = 0, 0, -1
        self._is_failing = False
        self._flushing: asyncio.Task[None] | None = None
        self._writing = threading.Lock()

    def open(self) -> None:
        """Go on where the last process ended. Blocks. Raises StoreRefused."""
        try:
            self._disk.make_dirs(self._root)
            files = list(files_of(self._root))
            cut = self._go_on(files) if files else self._begin_file(1)
        except (OSError, StoreFailed) as exc:
            raise StoreRefused(f"{self._root}: the audit cannot be written there: {exc}") from exc
        self.add({"event": "opened", "cut_bytes": cut or None})
        self.flush()
        if self._is_failing:
            raise StoreRefused(f"{self._root}: the audit cannot be written there")

    def _go_on(self, files: Sequence[Path]) -> int:
        """In the last file, after its last sound line. What follows is put aside; its bytes are returned."""
        path = files[-1]
        data = path.read_bytes()
        chain, self._size = _sound(data)
        if chain is None and len(files) > 1:
            chain, _ = _sound(files[-2].read_bytes())
        self._chain = chain or Link()
        self._number = _number(path)
        if rest := data[self._size :]:
            aside = path.with_suffix(f".{int(self._clock())}.cut")
            log.warning("audit: the last %d bytes of %s follow from nothing: moved to %s", len(rest), path, aside)
            self._disk.write_file(aside, rest)
        self._fd = self._disk.open_data(path, create=False)
        self._disk.truncate(self._fd, self._size)
        self._disk.sync_file(self._fd)
        return len(rest)

    def start(self) -> None:
        """Write what is added from now on."""
        self._flushing = asyncio.get_running_loop().create_task(self._keep_flushing(), name="audit")

    def add(self, entry: Mapping[str, object]) -> None:
        """Hand over one line's content. Touches no disk."""
        if len(self._waiting) >= _MOST_WAITING:
            self._lost += 1
            self._metrics.audit_lost.inc()
        else:
            self._waiting.append((self._clock(), entry))

    async def close(self) -> None:
        """Write what is left."""
        if self._flushing is not None:
            self._flushing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._flushing
        await asyncio.to_thread(self.flush)
        os.close(self._fd)

    async def _keep_flushing(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            if self._waiting:
                await asyncio.to_thread(self.flush)

    def flush(self) -> None:
        """Write what waits, durably. Blocks."""
        with self._writing:
            self._flush()

    def _flush(self) -> None:
        entries = [self._waiting.popleft() for _ in range(len(self._waiting))]
        lost = self._lost - self._told_lost
        told = [*entries, (self._clock(), {"event": "lost", "lines": lost})] if lost else entries
        chain, lines = self._chain, []
        for at, entry in told:
            data, chain = words.line(chain, at, entry)
            lines.append(data + b"\n")
        written = b"".join(lines)
        try:
            if self._size and self._size + len(written) > self._max_file_bytes:
                self._rotate()
            self._disk.write_at(self._fd, [written], self._size)
            self._disk.sync_data(self._fd)
        except (OSError, StoreFailed) as exc:
            self._waiting.extendleft(reversed(entries))
            if not self._is_failing:
                log.error("audit: %s; lines are kept until it can be written", exc)  # noqa: TRY400
            self._is_failing = True
            with contextlib.suppress(OSError, StoreFailed):
                self._disk.truncate(self._fd, self._size)
            return
        self._is_failing = False
        self._chain, self._size, self._told_lost = chain, self._size + len(written), self._told_lost + lost

    def _rotate(self) -> None:
        """Go on in a new file; the oldest leave."""
        log.info("audit: %d lines so far; the head is %s", self._chain.number, self._chain.head)
        old = self._fd
        self._begin_file(self._number + 1)
        os.close(old)
        for path in list(files_of(self._root))[: -self._keep_files]:
            self._disk.unlink(path)

    def _begin_file(self, number: int) -> int:
        path = self._root / f"audit-{number:08d}.jsonl"
        self._disk.unlink(path)
        self._fd = self._disk.open_data(path, create=True)
        self._number, self._size = number, 0
        self._disk.sync_dir(self._root)
        return 0


def files_of(root: Path) -> Iterator[Path]:
    """The audit's files, the oldest first."""
    yield from sorted(path for path in root.iterdir() if _NAME.match(path.name))


def _number(path: Path) -> int:
    found = _NAME.match(path.name)
    assert found is not None
    return int(found[1])


def _sound(data: bytes) -> tuple[Link | None, int]:
    """The chain at the end of a file's lines that follow from one another, and where that is; None and 0: there are none."""
    chain: Link | None = None
    position = 0
    while (stop := data.find(b"\n", position)) >= 0:
        try:
            chain, _ = words.follow(chain, data[position:stop])
        except AuditBroken:
            break
        position = stop + 1
    return chain, position


@dataclass(slots=True)
class Report:
    """What verify() found. `problems`: a sentence each; none: the chain holds."""

    files: int = 0
    lines: int = 0
    first: int = 0
    last: int = 0
    since: str = ""
    until: str = ""
    head: str = ""
    has_head: bool = True
    problems: list[str] = field(default_factory=list)


def verify(root: Path, head: str = "") -> Report:
    """Follow the chain through all files. `head`: a hash noted earlier, which one of the lines must have. Blocks.

    A line that is being written meanwhile is none yet. Raises StoreFailed where there is no audit.
    """
    report = Report(has_head=not head)
    try:
        paths = list(files_of(root))
    except OSError as exc:
        raise StoreFailed(f"{root}: there is no audit: {os.strerror(exc.errno or 0)}") from exc
    if not paths:
        raise StoreFailed(f"{root}: there is no audit")
    chain: Link | None = None
    for path in paths:
        report.files += 1
        if report.files > 1 and _number(path) != _number(paths[report.files - 2]) + 1:
            report.problems.append(f"{path.name}: the file before it is missing")
        try:
            *lines, _ = path.read_bytes().split(b"\n")
        except FileNotFoundError:  # rotated away meanwhile
            continue
        for number, data in enumerate(lines, 1):
            try:
                chain, at = words.follow(chain, data)
            except AuditBroken as exc:
                report.problems.append(f"{path.name}:{number}: {exc.message}")
                try:
                    chain, at = words.follow(None, data)
                except AuditBroken:
                    continue
            report.lines += 1
            report.first = report.first or chain.number
            report.since = report.since or at
            report.last, report.until, report.head = chain.number, at, chain.head
            report.has_head = report.has_head or chain.head == head.lower()
    if not report.has_head:
        report.problems.append(f"no line has the hash {head}: lines were cut off or rewritten, or it has been rotated away")
    return report


def shown(report: Report) -> str:
    """For a terminal."""
    told = (
        f"{report.lines:,} lines in {report.files} file{'s' if report.files > 1 else ''}, from {report.since} to {report.until}"
    )
    if report.first > 1:
        told += f"\nthe {report.first - 1:,} lines before them have been rotated away"
    verdicts = [f"BROKEN {problem}" for problem in report.problems] or ["the chain holds"]
    return "\n".join([told, f"head {report.head}", *verdicts])
