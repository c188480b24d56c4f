"""git-lfs as this mirror speaks it: batches, both ways, and the signed links that they hand out. Pure; no clock.

https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md. Of what upstream offers only `href` is used, and never
reaches a client; headers that upstream wants sent with it, which may carry somebody's permission, go nowhere.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nearhub.errors import AccessRefused, BatchRefused, LinkRefused, TooLarge, UpstreamFailed
from nearhub.wire.headers import ObjectMetadata
from nearhub.wire.manifest import is_path
from nearhub.wire.target import DEFAULT_REVISION, LfsTarget, format_lfs

MEDIA_TYPE = "application/vnd.git-lfs+json"
LOCAL = "@"
"""What stands before the name of a local token's owner in a link."""
MAX_OBJECTS = 1000
"""Of one batch; git-lfs asks for 100."""
_MAX_SIZE = 2**60
_OID = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
_DIGITS = re.compile(r"[0-9]{1,19}\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One object as a pointer file names it: sha256 and size in bytes."""

    oid: str
    size: int


@dataclass(frozen=True, slots=True)
class Batch:
    """`revision`: the branch that the client is on, where its objects are most likely named."""

    objects: tuple[Wanted, ...]
    revision: str


@dataclass(frozen=True, slots=True)
class Offer:
    """What upstream says of one object. `href` None: it does not give it, and `message` says why."""

    href: str | None
    message: str = ""


def read_batch(body: bytes) -> Batch:
    """A client's question. Raises BatchRefused, TooLarge for too many objects, AccessRefused for uploads."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        raise BatchRefused("the LFS batch is no JSON") from None
    if not isinstance(told, dict):
        raise BatchRefused("the LFS batch is no JSON object")
    if told.get("operation") == "upload":
        raise AccessRefused("this is a read-only mirror: push to the Hub itself (git remote set-url --push)", status=403)
    if told.get("operation") != "download":
        raise BatchRefused("an LFS batch has the operation 'download' or 'upload'")
    if told.get("hash_algo", "sha256") != "sha256":
        raise BatchRefused("LFS objects are named by their sha256 here: set hash_algo to that", status=409)
    objects = told.get("objects")
    if not isinstance(objects, list):
        raise BatchRefused("the LFS batch lists no objects")
    if len(objects) > MAX_OBJECTS:
        raise TooLarge(f"an LFS batch of {len(objects)} objects: {MAX_OBJECTS} are allowed (lfs.transfer.batchSize)")
    return Batch(tuple(_wanted(one) for one in objects), _revision(told.get("ref")))


def _wanted(told: object) -> Wanted:
    match told:
        case {"oid": str(oid), "size": int(size)} if _OID.match(oid) and not isinstance(size, bool) and 0 <= size < _MAX_SIZE:
            return Wanted(oid, size)
    raise BatchRefused("an object of an LFS batch has an oid of 64 hex digits in lower case, and a size in bytes")


def _revision(ref: object) -> str:
    name = ref.get("name") if isinstance(ref, dict) else None
    if not isinstance(name, str):
        return DEFAULT_REVISION
    name = name.removeprefix("refs/heads/").removeprefix("refs/tags/")
    return name if is_path(name) and len(name) <= 255 else DEFAULT_REVISION


def found(wanted: Wanted, href: str, expires_in_s: int) -> dict[str, Any]:
    """An object that the client may have, in a batch's answer."""
    download = {"href": href, "expires_in": expires_in_s}
    return {"oid": wanted.oid, "size": wanted.size, "authenticated": True, "actions": {"download": download}}


def missing(wanted: Wanted, code: int, message: str) -> dict[str, Any]:
    """One that it may not have; git-lfs shows `message`, and goes on with the others."""
    return {"oid": wanted.oid, "size": wanted.size, "error": {"code": code, "message": message}}


def answer(objects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"transfer": "basic", "hash_algo": "sha256", "objects": list(objects)}


# — upstream's batch ——————————————————————————————————————————————————————————————————————————————————


def question(objects: Iterable[Wanted]) -> dict[str, Any]:
    """A batch to ask upstream."""
    listed = [{"oid": one.oid, "size": one.size} for one in objects]
    return {"operation": "download", "transfers": ["basic"], "hash_algo": "sha256", "objects": listed}


def read_offers(document: object, asked: Iterable[Wanted]) -> dict[str, Offer]:
    """What upstream's answer says of each object that it was asked for, by oid. Raises UpstreamFailed."""
    objects = document.get("objects") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(objects, list):
        raise UpstreamFailed("upstream's answer to an LFS batch lists no objects")
    if document.get("transfer", "basic") != "basic":
        raise UpstreamFailed("upstream's LFS batch offers a transfer that it was not asked for")
    told = {one["oid"]: one for one in objects if isinstance(one, dict) and isinstance(one.get("oid"), str)}
    return {one.oid: _offer(told.get(one.oid, {}), one) for one in asked}


def _offer(told: Mapping[str, Any], wanted: Wanted) -> Offer:
    match told:
        case {"error": {"message": str(message)}}:
            return Offer(None, _one_line(message))
        case {"size": int(size)} if size != wanted.size:
            return Offer(None, f"upstream says that it has {size} bytes, not {wanted.size}")
        case {"actions": {"download": {"href": str(href)}}}:
            return Offer(href)
    return Offer(None, "upstream does not offer it")


def _one_line(text: str) -> str:
    return "".join(c if " " <= c <= "~" else " " for c in text)[:300].strip()


# — links —————————————————————————————————————————————————————————————————————————————————————————————


def signed_link(secret: bytes, target: LfsTarget, size: int, until: int, mark: str) -> str:
    """Path and query of an object of `size` bytes; good until wall-clock second `until`.

    `mark`: what stands for the token of whom it was signed for; "" for everybody.
    """
    signature = _signature(secret, target, size, until, mark)
    return f"{format_lfs(target)}?size={size}&until={until}{f'&for={mark}' if mark else ''}&signature={signature}"


def check_link(secret: bytes, target: LfsTarget, query: Mapping[str, str], now: float) -> tuple[int, str]:
    """The size and the mark that were signed. Raises LinkRefused: git-lfs then asks for a new link by itself."""
    size, until, mark = query.get("size", ""), query.get("until", ""), query.get("for", "")
    if not _DIGITS.match(size) or not _DIGITS.match(until):
        raise LinkRefused("an LFS object's link comes from a batch of this mirror, and this one does not")
    expected = _signature(secret, target, int(size), int(until), mark)
    if not hmac.compare_digest(expected.encode(), query.get("signature", "").encode("utf-8", "replace")):
        raise LinkRefused("this LFS link was not signed by this mirror: ask the batch for a new one")
    if int(until) <= now:
        raise LinkRefused("this LFS link has expired: ask the batch for a new one")
    return int(size), mark


def _signature(secret: bytes, target: LfsTarget, size: int, until: int, mark: str) -> str:
    text = f"lfs {target.repo.kind}/{target.repo.name}/{target.oid} {size} {until} {mark}"
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def object_headers(meta: ObjectMetadata) -> dict[str, str]:
    """Headers of every answer about an object. Its link is one client's, so it is kept nowhere on the way."""
    return {
        "ETag": f'"{meta.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
    }
