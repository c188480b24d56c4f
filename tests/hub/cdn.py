"""Answers of the second origin: signed, expiring URLs of objects, and nothing else."""

from __future__ import annotations

import re

from tests.hub.reply import Ask, Reply, file_reply, whole
from tests.hub.world import World

_OBJECT = re.compile(r"/(?:xet-bridge-us|repos/../..)/([0-9a-f]{24})/([0-9a-f]{64})")
_EXPIRES = re.compile(r"[?&]Expires=(\d+)&")


def answer_cdn(world: World, ask: Ask) -> Reply:
    """GET or HEAD of an object by its signed URL."""
    if "Authorization" in ask.headers:
        return _refusal(400, "InvalidArgument", "Only one auth mechanism allowed")
    signed, _, signature = ask.raw_path.partition("&Signature=")
    if not signature or signature != world.sign(signed):
        return _refusal(403, "SignatureDoesNotMatch", "The request signature does not match the URL")
    expires = _EXPIRES.search(signed)
    if expires is None or int(expires.group(1)) <= world.clock():
        return _refusal(403, "AccessDenied", "Request has expired")
    match = _OBJECT.fullmatch(ask.path)
    kept = world.objects.get((match.group(1), match.group(2))) if match else None
    if kept is None:
        return _refusal(404, "NoSuchKey", "The specified key does not exist.")
    file, _ = kept
    headers = {"Content-Type": "application/octet-stream", "Cache-Control": "public, max-age=31536000"}
    return file_reply(ask, file, file.cdn_etag, headers)


def label(world: World, raw_path: str) -> str:
    """ "org/m/path" for the path of an object, for matching; '' for anything else."""
    match = _OBJECT.fullmatch(raw_path.partition("?")[0])
    kept = world.objects.get((match.group(1), match.group(2))) if match else None
    owner = world.owner(match.group(1)) if match else None
    return f"{owner.id}/{kept[1]}" if kept and owner else ""


def _refusal(status: int, code: str, message: str) -> Reply:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return whole(status, body.encode(), {"Content-Type": "application/xml", "Server": "AmazonS3"})
