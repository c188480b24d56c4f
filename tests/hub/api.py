"""Answers in JSON: repository info, tree, paths-info, refs, commits, tokens, listings."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from tests.hub.content import File
from tests.hub.files import renamed
from tests.hub.reply import Ask, HubError, Reply, as_json, whole
from tests.hub.repos import Commit, Directory, Repo
from tests.hub.routes import ListRoute, NamedRoute, RepoRoute
from tests.hub.world import User, World, may_read

SIBLINGS_LIMIT = 1000
PAGE_ENTRIES, PAGE_EXPANDED = 1000, 50
HIDDEN_XET_HASH = "*" * 64


def answer_repo(world: World, ask: Ask, route: RepoRoute) -> Reply:
    """Everything under /api/{kind}/{id}. A gated repository tells its metadata to anybody."""
    repo = world.visible(route.kind, route.repo_id, ask)
    if repo.id != route.repo_id:
        return renamed(ask, route.repo_id, repo.id)
    match route.verb:
        case "info" | "revision":
            return _info(world, ask, repo, route.revision or "main")
        case "tree":
            return _tree(world, ask, repo, route)
        case "paths-info":
            return _paths_info(world, ask, repo, route)
        case "refs":
            return as_json(_refs(repo, "include_prs" in parse_qs(ask.query)))
        case "commits":
            return _commits(world, ask, repo, route)
        case "auth-check":
            world.readable(route.kind, route.repo_id, ask)
            return whole(200, b"")
        case "xet-read-token":
            return _xet_token(world, ask, repo, route)
    raise HubError(404, None, "Not Found")


def answer_list(world: World, ask: Ask, route: ListRoute) -> Reply:
    """/api/models and its siblings: public repositories, and what the asker may read."""
    query, user = parse_qs(ask.query), world.user(ask)
    search, author = query.get("search", [""])[0].lower(), query.get("author", [""])[0]
    found = [
        _described(repo, repo.head, "full" in query, with_blobs=False)
        for repo in world.repos.values()
        if repo.kind == route.kind
        and (not repo.private or may_read(user, repo))
        and search in repo.id.lower()
        and (not author or repo.id.startswith(f"{author}/"))
    ]
    return _page(world, ask, found, _number(query, "limit", 1000))


def answer_named(world: World, ask: Ask, route: NamedRoute) -> Reply:
    """Endpoints without a repository."""
    match route.name:
        case "whoami-v2":
            user = world.user(ask)
            if user is None:
                raise HubError(401, None, "Invalid username or password.")
            return as_json(_whoami(user))
        case "agent-harnesses":
            return as_json({"standardEnvVars": [], "harnesses": {}})
    if route.name.startswith("telemetry/"):
        return whole(200, b"")
    raise HubError(404, None, "Not Found")


def _info(world: World, ask: Ask, repo: Repo, revision: str) -> Reply:
    query = parse_qs(ask.query)
    commit = repo.at(revision) if revision == "main" and not repo.refs else world.commit(repo, revision)
    return as_json(_described(repo, commit, True, with_blobs="true" in query.get("blobs", []), swapped=ask.lie.files))


def _described(
    repo: Repo,
    commit: Commit | None,
    with_siblings: bool,
    *,
    with_blobs: bool,
    swapped: Mapping[str, File] | None = None,
) -> dict[str, Any]:
    """The info object; its list of files is cut at SIBLINGS_LIMIT without a word, as on the Hub."""
    described: dict[str, Any] = {
        "_id": repo.internal_id,
        "id": repo.id,
        "author": repo.id.partition("/")[0] if repo.is_namespaced else None,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": repo.disabled,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": "2025-01-01T00:00:00.000Z",
        "cardData": dict(repo.card),
    }
    if repo.kind == "models":
        described["modelId"] = repo.id
    if commit is None:
        return described
    described |= {"sha": commit.id, "lastModified": commit.iso_date}
    if with_siblings:
        files = {**commit.files, **{path: file for path, file in (swapped or {}).items() if path in commit.files}}
        listed = sorted(files.items())[:SIBLINGS_LIMIT]
        described["siblings"] = [_sibling(path, file, with_blobs) for path, file in listed]
        described["usedStorage"] = sum(file.size for file in files.values())
    return described


def _sibling(path: str, file: File, with_blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if with_blobs:
        sibling |= {"size": file.size, "blobId": file.git_oid}
        if file.is_lfs:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return sibling


def _tree(world: World, ask: Ask, repo: Repo, route: RepoRoute) -> Reply:
    query, commit = parse_qs(ask.query), world.commit(repo, route.revision)
    told = {"X-Repo-Commit": commit.id}
    expands = query.get("expand", ["false"])[0].lower() in ("true", "1")
    if route.path in commit.directories:
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        paths = _below(commit, route.path, recursive)
    elif route.path in commit.files:
        paths = [route.path]
    else:
        raise HubError(404, "EntryNotFound", f'{route.path} does not exist on "{route.revision}"', told)
    limit = min(_number(query, "limit", PAGE_ENTRIES), PAGE_EXPANDED if expands else PAGE_ENTRIES)
    return _page(world, ask, paths, limit, lambda path: _entry(world, ask, repo, commit, path, expands), headers=told)


def _below(commit: Commit, path: str, recursive: bool) -> list[str]:
    found: list[str] = []
    for name, child in commit.directories[path].children.items():
        full = f"{path}/{name}" if path else name
        found.append(full)
        if recursive and isinstance(child, Directory):
            found += _below(commit, full, True)
    return found


def _entry(world: World, ask: Ask, repo: Repo, commit: Commit, path: str, expands: bool) -> dict[str, Any]:
    """One entry of tree and paths-info."""
    directory = commit.directories.get(path)
    entry: dict[str, Any]
    if directory is not None:
        entry = {"type": "directory", "oid": directory.oid, "size": 0, "path": path}
    else:
        file = ask.lie.files.get(path) or commit.files[path]
        entry = {"type": "file", "oid": file.git_oid, "size": file.size, "path": path}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
            if world.uses_xet:
                is_open = not repo.gated or may_read(world.user(ask), repo)
                entry["xetHash"] = file.xet_hash if is_open else HIDDEN_XET_HASH
    if expands:
        last = repo.last_change(commit, path)
        entry["lastCommit"] = {"id": last.id, "title": last.title, "date": last.iso_date}
        if directory is None:
            entry["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return entry


def _paths_info(world: World, ask: Ask, repo: Repo, route: RepoRoute) -> Reply:
    if ask.method != "POST":
        raise HubError(404, None, "Not Found")
    commit = world.commit(repo, route.revision)
    paths, expands = _asked_paths(ask)
    known = [path.strip("/") for path in paths if path.strip("/") in {*commit.files, *commit.directories} - {""}]
    return as_json([_entry(world, ask, repo, commit, path, expands) for path in known])


def _asked_paths(ask: Ask) -> tuple[list[str], bool]:
    if "json" in ask.headers.get("Content-Type", ""):
        told = json.loads(ask.body)
        paths = told.get("paths", [])
        return ([paths] if isinstance(paths, str) else paths), bool(told.get("expand"))
    form = parse_qs(ask.body.decode())
    return form.get("paths", []), form.get("expand", ["false"])[0].lower() == "true"


def _refs(repo: Repo, include_prs: bool) -> dict[str, Any]:
    def under(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit}
            for ref, commit in sorted(repo.refs.items())
            if ref.startswith(prefix)
        ]

    told = {
        "branches": under("refs/heads/"),
        "converts": under("refs/convert/"),
        "tags": under("refs/tags/"),
    }
    if include_prs:
        told["pullRequests"] = under("refs/pr/")
    return told


def _commits(world: World, ask: Ask, repo: Repo, route: RepoRoute) -> Reply:
    query = parse_qs(ask.query)
    history = repo.history(world.commit(repo, route.revision or "main"))
    limit, page = _number(query, "limit", 50), _number(query, "p", 0, least=0)
    shown = history[page * limit : (page + 1) * limit]
    headers = {"X-Total-Count": str(len(history))}
    if len(history) > (page + 1) * limit:
        more = urlencode({**{key: values[0] for key, values in query.items()}, "p": page + 1})
        headers["Link"] = f'<{world.url}{ask.path}?{more}>; rel="next"'
    return as_json([_commit_json(one) for one in shown], headers)


def _commit_json(commit: Commit) -> dict[str, Any]:
    authors = [{"user": commit.author}]
    return {"id": commit.id, "title": commit.title, "message": "", "authors": authors, "date": commit.iso_date}


def _xet_token(world: World, ask: Ask, repo: Repo, route: RepoRoute) -> Reply:
    """A token for a CAS that nobody runs here: clients that insist on Xet fail at the next step."""
    if not world.uses_xet:
        raise HubError(404, None, "Not Found")
    world.readable(route.kind, route.repo_id, ask)
    world.commit(repo, route.revision)
    token, expires, cas = f"xet_{repo.internal_id}", int(world.clock()) + 900, f"{world.url}/cas"
    return as_json(
        {"accessToken": token, "exp": expires, "casUrl": cas},
        {"X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires), "X-Xet-Cas-Url": cas},
    )


def _whoami(user: User) -> dict[str, Any]:
    token = {"displayName": "token", "role": "read"}
    return {
        "type": "user",
        "id": user.name.encode().hex().ljust(24, "0")[:24],
        "name": user.name,
        "fullname": user.name.title(),
        "email": None,
        "isPro": False,
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": token},
    }


def _page(
    world: World,
    ask: Ask,
    items: Sequence[Any],
    limit: int,
    shape: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """One page of a list, with the absolute Link to the next one."""
    query = parse_qs(ask.query)
    start = _cursor_start(query.get("cursor", [""])[0])
    shown = items[start : start + limit]
    told = dict(headers or {})
    if start + limit < len(items):
        after = base64.urlsafe_b64encode(b"from:%d" % (start + limit)).decode()
        kept = [(key, value) for key, values in query.items() if key != "cursor" for value in values]
        more = urlencode([*kept, ("cursor", after)], quote_via=quote)
        told["Link"] = f'<{world.url}{ask.path}?{more}>; rel="next"'
    return as_json([shape(one) for one in shown] if shape else list(shown), told)


def _cursor_start(cursor: str) -> int:
    if not cursor:
        return 0
    try:
        return max(0, int(base64.urlsafe_b64decode(cursor).decode().removeprefix("from:")))
    except ValueError as error:
        raise HubError(400, None, "Invalid cursor") from error


def _number(query: Mapping[str, Sequence[str]], name: str, default: int, *, least: int = 1) -> int:
    given = query.get(name, [""])[0]
    return max(least, int(given)) if given.isdigit() else default
