"""The control endpoint /-/control: the Python API of the Hub as JSON commands, for a Hub in another process.

One POST is one command: {"do": "commit", ...}. Requests here are neither logged, counted, capped nor spoilt.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.hub.content import LFS, Content, Given
from tests.hub.faults import Fault, Rule
from tests.hub.repos import Repo
from tests.hub.world import Limits, User

if TYPE_CHECKING:
    from tests.hub.server import Hub

CONTROL_PATH = "/-/control"


def pack_file(given: Given | LFS) -> dict[str, Any]:
    """A file of a commit as JSON. Path stands for a file that the other process reads too."""
    if isinstance(given, LFS):
        return {**pack_file(given.given), "lfs": True}
    if isinstance(given, str):
        return {"text": given}
    if isinstance(given, bytes):
        return {"base64": base64.b64encode(given).decode()}
    if isinstance(given, Path):
        return {"file": str(given.resolve())}
    if isinstance(given, Content):
        return {"size": given.size, "seed": given.seed}
    raise TypeError(f"cannot be sent to another process: {given!r}")


def unpack_file(told: Mapping[str, Any]) -> Given | LFS:
    given: Given
    match told:
        case {"text": str(text)}:
            given = text
        case {"base64": str(packed)}:
            given = base64.b64decode(packed)
        case {"file": str(path)}:
            given = Path(path)
        case {"size": int(size), "seed": int(seed)}:
            given = Content(size, seed)
        case _:
            raise ValueError(f"not a file: {told!r}")
    return LFS(given) if told.get("lfs") else given


class Control:
    """Carries out commands on a Hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._commands: dict[str, Callable[[dict[str, Any]], Any]] = {
            "repo": self._repo,
            "commit": self._commit,
            "ref": self._ref,
            "drop_ref": lambda told: self._known(told).drop_ref(told["ref"]),
            "git": self._git,
            "rename": lambda told: self._known(told).rename(told["to"]),
            "delete": lambda told: self._known(told).delete(),
            "user": self._user,
            "limits": self._limits,
            "cap": lambda told: hub.cap(per_connection=told.get("per_connection"), total=told.get("total")),
            "settings": self._settings,
            "fault": self._fault,
            "rule": lambda told: _rule_json(self._rule(told)),
            "release": lambda told: self._rule(told).release(),
            "remove": lambda told: self._rule(told).remove(),
            "clear_faults": lambda told: hub.faults.clear(),
            "counters": lambda told: self._counters(),
            "reset": lambda told: hub.counters.reset(),
            "log": lambda told: [one.to_json() for one in hub.log],
            "clear_log": lambda told: hub.log.clear(),
            "where": lambda told: {"url": hub.url, "cdn_url": hub.cdn_url},
        }

    async def answer(self, request: web.BaseRequest) -> web.Response:
        """One command; an error in it comes back as 400 with the reason."""
        if request.method != "POST":
            return web.json_response({"commands": sorted(self._commands)})
        try:
            told = json.loads(await request.read())
            command = self._commands[told.pop("do")]
            return web.json_response({"ok": command(told)})
        except (KeyError, ValueError, TypeError) as error:
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=400)

    def _known(self, told: dict[str, Any]) -> Repo:
        return self._hub.world.repos[told.get("kind", "models"), told["id"]]

    def _repo(self, told: dict[str, Any]) -> None:
        repo = self._hub.repo(told["id"], told.get("kind", "models"))
        for name in ("private", "gated", "disabled"):
            if name in told:
                setattr(repo, name, told[name])

    def _commit(self, told: dict[str, Any]) -> str:
        files = {path: unpack_file(packed) for path, packed in told.get("files", {}).items()}
        return self._known(told).commit(
            files,
            told.get("revision", "main"),
            delete=told.get("delete", ()),
            replace=told.get("replace", False),
            title=told.get("title", "Upload files"),
        )

    def _ref(self, told: dict[str, Any]) -> None:
        self._known(told).ref(told["ref"], told["commit"])

    def _git(self, told: dict[str, Any]) -> None:
        self._hub.git(told["id"], Path(told["folder"]), told.get("kind", "models"))

    def _user(self, told: dict[str, Any]) -> None:
        self._hub.users[told["token"]] = User(told["name"], set(told.get("access", ())))

    def _limits(self, told: dict[str, Any]) -> None:
        self._hub.limits = Limits(**told)

    def _settings(self, told: dict[str, Any]) -> None:
        for name in ("uses_xet", "url_ttl_s", "gzip_min_bytes"):
            if name in told:
                setattr(self._hub.world, name, told[name])

    def _fault(self, told: dict[str, Any]) -> int:
        match = re.compile(told["regex"]) if told.get("regex") else told.get("match")
        rule = self._hub.faults.add(
            Fault.from_json(told["fault"]),
            on=told.get("on"),
            match=match,
            method=told.get("method"),
            times=told.get("times"),
            after=told.get("after", 0),
        )
        return rule.id

    def _rule(self, told: dict[str, Any]) -> Rule:
        return self._hub.faults.known[told["rule"]]

    def _counters(self) -> dict[str, Any]:
        origins = ("hub", "cdn")
        return {**self._hub.counters.to_json(), "connections": {one: self._hub.connections(one) for one in origins}}


def _rule_json(rule: Rule) -> dict[str, int]:
    return {"hits": rule.hits, "stalled": rule.stalled}
