"""Answers for files on the Hub's origin: resolve, resolve-cache, raw, and the signed way to the CDN."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from urllib.parse import parse_qs, quote

from tests.hub.content import File, Memory
from tests.hub.ranges import unchanged
from tests.hub.reply import Ask, HubError, Reply, as_json, disposition, file_reply, redirect
from tests.hub.repos import Commit, Repo
from tests.hub.routes import FileRoute
from tests.hub.world import World

XET_INFO = "application/vnd.xet-fileinfo+json"


def answer_file(world: World, ask: Ask, route: FileRoute) -> Reply:
    """HEAD or GET of a file in a repository."""
    repo = world.readable(route.kind, route.repo_id, ask)
    if repo.id != route.repo_id:
        return renamed(ask, route.repo_id, repo.id)
    commit = world.commit(repo, route.revision)
    headers = {"X-Repo-Commit": commit.id}
    file = ask.lie.files.get(route.path) or commit.files.get(route.path)
    if file is None:
        raise HubError(404, "EntryNotFound", "Entry not found", headers)
    headers["Content-Disposition"] = disposition(route.path, _disposition_kind(ask))
    if route.marker == "raw":
        stored = File(Memory(file.pointer)) if file.is_lfs else file
        headers["Content-Type"] = "text/plain; charset=utf-8"
        return file_reply(_unconditional(ask), stored, file.git_oid, headers)
    if file.is_lfs:
        return _lfs(world, ask, repo, commit, route, file, headers)
    if route.marker == "resolve" and _is_redirected(repo, file):
        return _to_resolve_cache(ask, route, commit, file, headers)
    gzip_from = world.gzip_min_bytes if route.marker == "resolve-cache" else None
    if route.marker == "resolve-cache":
        headers["Cache-Control"] = "public, max-age=31536000, immutable"
    return file_reply(ask, file, file.etag, headers, gzip_from=gzip_from)


def renamed(ask: Ask, old: str, new: str) -> Reply:
    """The Hub's answer for a former or wrongly cased name."""
    location = ask.raw_path.replace(quote(old), quote(new), 1)
    return redirect(307, location)


def _unconditional(ask: Ask) -> Ask:
    """The Hub never answers 304 under /raw/."""
    return replace(ask, headers={key: value for key, value in ask.headers.items() if key != "If-None-Match"})


def _is_redirected(repo: Repo, file: File) -> bool:
    return repo.is_namespaced and not repo.private and not repo.gated and file.size > 0


def _disposition_kind(ask: Ask) -> str:
    return "attachment" if "download" in parse_qs(ask.query) else "inline"


def _to_resolve_cache(ask: Ask, route: FileRoute, commit: Commit, file: File, headers: dict[str, str]) -> Reply:
    etag = f'"{file.etag}"'
    if unchanged(ask.headers.get("If-None-Match"), etag):
        return file_reply(ask, file, file.etag, headers)
    cached = f"/api/resolve-cache/{route.kind}/{route.repo_id}/{commit.id}/{quote(route.path)}"
    query = f"{quote(ask.path, safe='')}={'&' + ask.query if ask.query else ''}&etag={quote(etag, safe='')}"
    return redirect(307, f"{cached}?{query}", headers)


def _lfs(world: World, ask: Ask, repo: Repo, commit: Commit, route: FileRoute, file: File, headers: dict[str, str]) -> Reply:
    headers |= {
        "X-Linked-Size": str(file.size),
        "X-Linked-ETag": f'"{file.sha256}"',
        "Accept-Ranges": "bytes",
    }
    if world.uses_xet:
        token = f"{world.url}/api/{repo.kind}/{repo.id}/xet-read-token/{commit.id}"
        reconstruction = f"https://cas-server.xethub.hf.co/v1/reconstructions/{file.xet_hash}"
        headers["X-Xet-Hash"] = file.xet_hash
        headers["Link"] = f'<{token}>; rel="xet-auth", <{reconstruction}>; rel="xet-reconstruction-info"'
    if unchanged(ask.headers.get("If-None-Match"), f'"{file.sha256}"'):
        return file_reply(ask, file, file.sha256, headers)
    if world.uses_xet and XET_INFO in ask.headers.get("Accept", ""):
        return as_json({"hash": file.xet_hash, "size": file.size}, {**headers, "Content-Type": XET_INFO})
    del headers["Content-Disposition"]
    return redirect(302, signed_url(world, repo, file, route.path, _disposition_kind(ask)), headers)


def signed_url(world: World, repo: Repo, file: File, path: str, kind: str = "inline") -> str:
    """A CDN URL that expires; its signature covers every encoded byte before it."""
    name = world.keep(repo, file, path)
    if world.uses_xet:
        at = f"/xet-bridge-us/{repo.internal_id}/{name}"
        query = "X-Xet-Cas-Uid=public&"
    else:
        digest = hashlib.sha256(repo.internal_id.encode()).hexdigest()
        at = f"/repos/{digest[:2]}/{digest[2:4]}/{repo.internal_id}/{name}"
        query = ""
    shown = quote(disposition(path, kind), safe="*")
    query += f"response-content-disposition={shown}&response-content-type=application%2Foctet-stream"
    query += f"&Expires={int(world.clock() + world.url_ttl_s)}&Policy=eyJTdGF0ZW1lbnQiOltdfQ__&Key-Pair-Id=K2L8F4GPSG1IFC"
    return f"{world.cdn_url}{at}?{query}&Signature={world.sign(f'{at}?{query}')}"
