"""The Hub in a child process, for benches and kill tests; the calls are synchronous and mean what they mean on Hub."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.hub.content import LFS, Given
from tests.hub.control import CONTROL_PATH, pack_file
from tests.hub.faults import Fault
from tests.hub.ledger import Match, is_match
from tests.hub.repos import Gate, Kind
from tests.hub.world import Limits

_ROOT = Path(__file__).parents[2]
_READY = re.compile(r"hub ready on (\S+) cdn (\S+)")


class HubProcess:
    """`with HubProcess() as hub:` runs `python -m tests.hub` on free ports until the block ends."""

    def __init__(self, *arguments: str, port: int = 0, cdn_port: int = 0, stderr: IO[str] | None = None) -> None:
        command = [sys.executable, "-m", "tests.hub", "--empty", "--port", str(port), "--cdn-port", str(cdn_port)]
        self._scratch = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": self._scratch.name}
        self.process = subprocess.Popen(
            [*command, *arguments], cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        assert self.process.stdout is not None
        ready = _READY.match(self.process.stdout.readline())
        if ready is None:
            self.stop()
            raise RuntimeError(f"the Hub did not start (exit status {self.process.returncode})")
        self.url, self.cdn_url = ready.groups()
        self.cdn_host = self.cdn_url.removeprefix("http://")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """End the process; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._scratch.cleanup()
        return self.process.wait()

    def do(self, command: str, **told: Any) -> Any:
        """Send one command to the control endpoint; see control.py for the list."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        try:
            connection.request("POST", CONTROL_PATH, json.dumps({"do": command, **told}))
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    def repo(self, repo_id: str, kind: Kind = "models", *, private: bool = False, gated: Gate = False) -> RemoteRepo:
        """Make a repository, or change an existing one's visibility."""
        self.do("repo", id=repo_id, kind=kind, private=private, gated=gated)
        return RemoteRepo(self, repo_id, kind)

    def git(self, repo_id: str, folder: Path, kind: Kind = "models") -> RemoteRepo:
        """As Hub.git; the folder must exist where the child process runs."""
        self.do("git", id=repo_id, kind=kind, folder=str(folder.resolve()))
        return RemoteRepo(self, repo_id, kind)

    def user(self, token: str, name: str, access: Iterable[str] = ()) -> None:
        self.do("user", token=token, name=name, access=list(access))

    def limit(self, limits: Limits) -> None:
        known = {name: value for name, value in vars(limits).items() if name != "used"}
        self.do("limits", **known)

    def cap(self, *, per_connection: float | None = None, total: float | None = None) -> None:
        self.do("cap", per_connection=per_connection, total=total)

    def add_fault(
        self,
        fault: Fault,
        *,
        on: str | None = None,
        match: str | re.Pattern[str] | None = None,
        method: str | None = None,
        times: int | None = None,
        after: int = 0,
    ) -> RemoteRule:
        """As Faults.add."""
        matched = {"regex": match.pattern} if isinstance(match, re.Pattern) else {"match": match}
        told = {"on": on, "method": method, "times": times, "after": after, **matched}
        return RemoteRule(self, self.do("fault", fault=fault.to_json(), **told))

    def clear_faults(self) -> None:
        self.do("clear_faults")

    def requests(self, origin: str | None = None, *, method: str | None = None, match: Match = None) -> int:
        """As Counters.requests."""
        return self._sum("requests", origin, method, match)

    def bytes(self, origin: str | None = None, *, method: str | None = None, match: Match = None) -> int:
        """As Counters.bytes."""
        return self._sum("bytes", origin, method, match)

    def received(self, origin: str | None = None, *, method: str | None = None, match: Match = None) -> int:
        """As Counters.received."""
        return self._sum("received", origin, method, match)

    def reset(self) -> None:
        """Start the counters again from zero."""
        self.do("reset")

    def active(self, origin: str) -> int:
        return int(self.do("counters")["active"].get(origin, 0))

    def peak(self, origin: str) -> int:
        return int(self.do("counters")["peak"].get(origin, 0))

    def log(self) -> list[dict[str, Any]]:
        """The recorded requests, as dictionaries with the fields of Exchange."""
        return list(self.do("log"))

    def _sum(self, column: str, origin: str | None, method: str | None, match: Match) -> int:
        return sum(
            row[column]
            for row in self.do("counters")["rows"]
            if (origin is None or row["origin"] == origin)
            and (method is None or row["method"] == method)
            and is_match(match, row["subject"])
        )


class RemoteRepo:
    """A repository of a HubProcess."""

    def __init__(self, hub: HubProcess, repo_id: str, kind: Kind) -> None:
        self.id, self.kind, self._hub = repo_id, kind, hub

    def commit(
        self,
        files: Mapping[str, Given | LFS] | None = None,
        revision: str = "main",
        *,
        delete: Iterable[str] = (),
        replace: bool = False,
        title: str = "Upload files",
    ) -> str:
        """As Repo.commit; paths must exist where the child process runs."""
        packed = {path: pack_file(given) for path, given in (files or {}).items()}
        told = {"files": packed, "revision": revision, "delete": list(delete), "replace": replace, "title": title}
        return str(self._do("commit", **told))

    def move(self, branch: str, commit: str) -> None:
        self._do("ref", ref=f"refs/heads/{branch}", commit=commit)

    def tag(self, name: str, commit: str) -> None:
        self._do("ref", ref=f"refs/tags/{name}", commit=commit)

    def ref(self, name: str, commit: str) -> None:
        self._do("ref", ref=name, commit=commit)

    def drop_ref(self, name: str) -> None:
        self._do("drop_ref", ref=name)

    def rename(self, new_id: str) -> None:
        self._do("rename", to=new_id)
        self.id = new_id

    def delete(self) -> None:
        self._do("delete")

    def _do(self, command: str, **told: Any) -> Any:
        return self._hub.do(command, id=self.id, kind=self.kind, **told)


class RemoteRule:
    """A scripted fault of a HubProcess."""

    def __init__(self, hub: HubProcess, rule_id: int) -> None:
        self._hub, self._id = hub, rule_id

    @property
    def hits(self) -> int:
        return int(self._hub.do("rule", rule=self._id)["hits"])

    @property
    def stalled(self) -> int:
        return int(self._hub.do("rule", rule=self._id)["stalled"])

    def release(self) -> None:
        self._hub.do("release", rule=self._id)

    def remove(self) -> None:
        self._hub.do("remove", rule=self._id)
