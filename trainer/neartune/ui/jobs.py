"""Trainings that the page starts: processes of their own that outlive it, one after the other unless asked otherwise.

HOME/.ui/jobs/NAME.json   a job: waiting, running or ended; read again when the page is started again
HOME/NAME.yaml, NAME.log  its recipe, and what it said

A process is known again by its id and the moment it began. One page at a time holds HOME/.ui/lock (a lock of the kernel's).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import psutil

import neartune
from neartune.records import runs

WAITING, RUNNING, ENDED = "waiting", "running", "ended"
ACTIVE = ("waiting", "starting", "running")
"""Of what state_of() tells."""
_FOLDER = ".ui"
_STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit statuses of one that SIGTERM ended."""

Say = Callable[[str], None]


class JobsError(Exception):
    """The directory cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Job:
    """`asked`: seconds since 1970, the order of those that wait; `pid` and `born` name a process; `status`: its exit status,
    None where it is not known."""

    state: str
    recipe: str
    asked: float
    pid: int = 0
    born: float = 0.0
    status: int | None = None


# — decided, purely ——————————————————————————————————————————————————————————————————————————————


def next_of(jobs: Mapping[str, Job]) -> str | None:
    """Who begins now: the first that waits, if none runs."""
    if any(job.state == RUNNING for job in jobs.values()):
        return None
    return min((name for name, job in jobs.items() if job.state == WAITING), key=lambda name: jobs[name].asked, default=None)


def state_of(run: str | None, job: Job | None) -> str:
    """What is shown, of a run's state on disk (None: it is not there) and its job."""
    if job is not None and job.state == WAITING:
        return "waiting"
    if job is not None and job.state == RUNNING and run != runs.FINISHED:  # its process may take a moment to end
        return "running" if run else "starting"
    if run is None and job is not None and (not job.pid or job.status in _STOPPED):
        return "stopped"
    return run or "failed"


# — done —————————————————————————————————————————————————————————————————————————————————————————


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """In which `python -m neartune` is this neartune."""
    here = str(Path(str(neartune.__file__)).parents[1])
    return {**environ, "PYTHONPATH": os.pathsep.join(filter(None, (here, environ.get("PYTHONPATH"))))}


def command(*words: str, mirror: Iterable[str] = ()) -> list[str]:
    return [sys.executable, "-m", "neartune", *words, *mirror]


class Jobs:
    """Of one directory of runs. Every method is for one thread. `mirror`: --use_mirror as it was given."""

    def __init__(self, home: Path, mirror: Sequence[str], say: Say) -> None:
        self.home, self.folder = home, home / _FOLDER
        self._mirror = tuple(mirror)
        self._say = say
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._places = self.folder / "jobs"
        self._places.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise JobsError(f"{home}: another neartune ui has this directory: end it, or use --runs DIR") from None
        self._jobs = dict(self._read())

    def close(self) -> None:
        """What runs goes on, and what waits, waits."""
        self._lock.close()

    @property
    def all(self) -> Mapping[str, Job]:
        return self._jobs

    def ask(self, name: str, recipe: Path, *, at_once: bool) -> Job:
        """Train by `recipe`, now or when its turn comes. Raises OSError."""
        self._keep(name, Job(WAITING, str(recipe), time.time()))
        if at_once:
            self._begin(name)
        self.tend()
        return self._jobs[name]

    def stop(self, name: str) -> None:
        """One that waits will not begin; one that runs writes a checkpoint and ends."""
        job = self._jobs[name]
        if job.state == WAITING:
            self._keep(name, replace(job, state=ENDED))
        elif self._is_alive(name, job):
            os.kill(job.pid, signal.SIGTERM)

    def tend(self) -> None:
        """Note who has ended; begin the next."""
        for name, job in list(self._jobs.items()):
            if job.state == RUNNING and not self._is_alive(name, job):
                child = self._children.pop(name, None)
                self._keep(name, replace(job, state=ENDED, status=child.returncode if child else None))
        if waiting := next_of(self._jobs):
            self._begin(waiting)

    def _begin(self, name: str) -> None:
        job = self._jobs[name]
        words = command("train", "--config", job.recipe, mirror=self._mirror)
        self._keep(name, replace(job, state=ENDED))  # if it cannot be started, it is not tried for ever
        with (self.home / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(os.environ) | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        self._children[name] = child
        self._keep(name, replace(job, state=RUNNING, pid=child.pid, born=psutil.Process(child.pid).create_time()))

    def _is_alive(self, name: str, job: Job) -> bool:
        if name in self._children:
            return self._children[name].poll() is None
        try:
            process = psutil.Process(job.pid)
            return bool(abs(process.create_time() - job.born) < 1 and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False

    def _keep(self, name: str, job: Job) -> None:
        self._jobs[name] = job
        file = self._places / f"{quote(name, safe='')}.json"
        beside = file.with_suffix(".tmp")
        beside.write_text(json.dumps(asdict(job)), encoding="utf-8")
        beside.replace(file)

    def _read(self) -> Iterable[tuple[str, Job]]:
        for file in sorted(self._places.glob("*.json")):
            try:
                known: Any = json.loads(file.read_text(encoding="utf-8"))
                yield unquote(file.stem), Job(**known)
            except (OSError, ValueError, TypeError) as exc:
                self._say(f"warning: {file} is passed over: {exc}")


def write_secret(file: Path, text: str) -> None:
    """That only this user can read."""
    with suppress(FileNotFoundError):
        file.unlink()
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
