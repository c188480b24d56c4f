"""The LFS API: batches of downloads from the CDN, and locks that the Hub does not have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.hub.content import File
from tests.hub.files import signed_url
from tests.hub.reply import Ask, HubError, Reply, as_json
from tests.hub.repos import Repo
from tests.hub.world import World

MEDIA_TYPE = "application/vnd.git-lfs+json"
MAX_OBJECTS = 1000
_OID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One object of a batch."""

    oid: str
    size: int


def answer_lfs(world: World, ask: Ask, repo: Repo, service: str) -> Reply:
    """What git-lfs asks of a repository that the asker may read."""
    if service != "info/lfs/objects/batch" or ask.method != "POST":
        raise HubError(404, None, "Not Found")
    wanted = _wanted(ask.body)
    known = {
        file.sha256: (path, file) for commit in repo.commits.values() for path, file in commit.files.items() if file.is_lfs
    }
    objects = [_batched(world, repo, one, known) for one in wanted]
    body = {"transfer": "basic", "hash_algo": "sha256", "objects": objects}
    return as_json(body, {"Content-Type": MEDIA_TYPE})


def refusal(error: HubError) -> Reply:
    """An error as git-lfs reads it."""
    answer = error.reply()
    told = as_json({"error": error.message, "message": error.message}, answer.headers, error.status)
    told.headers["Content-Type"] = MEDIA_TYPE
    return told


def _wanted(body: bytes) -> list[Wanted]:
    """The objects of a batch that asks for downloads."""
    malformed = HubError(422, None, "Invalid LFS batch request")
    try:
        told = json.loads(body)
    except ValueError as error:
        raise malformed from error
    match told:
        case {"operation": "upload"}:
            raise HubError(403, None, "You are not authorized to push to this repo.")
        case {"operation": "download", "objects": list(objects)} if told.get("hash_algo", "sha256") == "sha256":
            wanted = [_one(one) for one in objects]
        case _:
            raise malformed
    if len(wanted) > MAX_OBJECTS:
        raise HubError(413, None, f"More than {MAX_OBJECTS} objects in one batch")
    known = [one for one in wanted if one is not None]
    if len(known) < len(wanted):
        raise malformed
    return known


def _one(told: object) -> Wanted | None:
    match told:
        case {"oid": str(oid), "size": int(size)} if _OID.fullmatch(oid) and size >= 0:
            return Wanted(oid, size)
    return None


def _batched(world: World, repo: Repo, wanted: Wanted, known: Mapping[str, tuple[str, File]]) -> dict[str, Any]:
    told = {"oid": wanted.oid, "size": wanted.size}
    if wanted.oid not in known:
        return {**told, "error": {"code": 404, "message": "Object does not exist"}}
    path, file = known[wanted.oid]
    if wanted.size != file.size:
        return {**told, "error": {"code": 422, "message": f"Object has {file.size} bytes, not {wanted.size}"}}
    download = {"href": signed_url(world, repo, file, path), "header": {}, "expires_in": int(world.url_ttl_s)}
    return {**told, "authenticated": True, "actions": {"download": download}}
