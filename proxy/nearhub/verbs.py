"""The operator's verbs on the command line: asks the mirror that runs on the cache, else works on the directory itself."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from nearhub.bundle.carriage import Carriage
from nearhub.catalog import Catalog
from nearhub.config import Config
from nearhub.errors import NearhubError, StoreRefused
from nearhub.metrics import Metrics
from nearhub.operations import Operations
from nearhub.pins import Pins
from nearhub.progress import Progress
from nearhub.store.bares import BareStore
from nearhub.store.blobs import BlobStore
from nearhub.store.holdings import Holding, Holdings
from nearhub.store.index import Index
from nearhub.store.layout import open_cache
from nearhub.store.log import TransparencyLog
from nearhub.store.site_bodies import SiteBodies
from nearhub.units import rough_size
from nearhub.web.admin import SOCKET, perform, reachable
from nearhub.web.logs import escaped


def run_verb(config: Config, verb: str, arguments: dict[str, Any], *, as_json: bool) -> int:
    """Do it, print the answer, and return the exit status: 1 when it failed or found something bad."""
    try:
        result = asyncio.run(_each(config, arguments) if verb == "prefetch" else _ask(config, verb, arguments))
    except KeyboardInterrupt:
        print(f"nearhub {verb}: interrupted; what is done stays done, and the same command goes on from there", file=sys.stderr)
        return 130
    except NearhubError as exc:
        print(f"nearhub {verb}: {exc.message}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if as_json else "\n".join(map(escaped, _SHOW[verb](result).split("\n"))))
    return 1 if _is_bad(verb, result) else 0


def _is_bad(verb: str, result: Any) -> bool:
    """Whether something was found that must not pass for success."""
    if verb == "prefetch":
        return any("error" in one or one["failed"] for one in result)
    if verb == "import-hf-cache" or (verb == "import" and "refused" not in result):
        return any(row["wrong"] or row["refused"] for row in result["repos"])
    return bool((verb == "verify" and result["bad"]) or (verb == "import" and result["refused"]))


class _Told(NearhubError):
    """What the running mirror said of an error. `whose`: at fault."""

    def __init__(self, message: str, whose: str) -> None:
        super().__init__(message)
        self.whose = whose


async def _each(config: Config, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """One prefetch after the other; one that fails does not keep the others from being done."""
    results: list[dict[str, Any]] = []
    for name in arguments["repos"]:
        repo, _, revision = name.partition("@")
        asked = {"repo": repo, "revision": revision, **{key: arguments[key] for key in arguments if key != "repos"}}
        try:
            results.append(await _ask(config, "prefetch", asked))
        except NearhubError as exc:
            fault = exc.whose if isinstance(exc, _Told) else exc.fault
            results.append({"repo": repo, "revision": revision, "error": exc.message, "fault": fault})
    return results


async def _ask(config: Config, verb: str, arguments: dict[str, Any]) -> Any:
    result = None
    progress = Progress()
    async with _lines(config, verb, arguments) as lines:
        async for line in lines:
            if "error" in line:
                raise _Told(line["error"], line["fault"])
            if "done" in line:
                progress.show(line)
            else:
                result = line["result"]
    progress.end()
    return result


@asynccontextmanager
async def _lines(config: Config, verb: str, arguments: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The answer's lines, from the running mirror or from the directory."""
    cache = config.cache.dir.absolute()
    if (cache / SOCKET).exists():
        with reachable(cache) as path:
            connector = aiohttp.UnixConnector(path=str(path))
            async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
                try:
                    async with session.post(f"http://nearhub/{verb}", json=arguments) as response:
                        yield _decoded(response)
                        return
                except aiohttp.ClientConnectorError:
                    pass  # a socket that a killed mirror left behind
    if verb == "prefetch":  # as a mirror does it, but for nobody else
        from nearhub.web.app import mirror

        async with mirror(config, is_followed=False) as front:
            yield perform(front.operations, verb, arguments)
        return
    if not cache.is_dir() and not verb.startswith("import"):
        raise StoreRefused(f"{cache}: there is no cache here: name it with --cache-dir")
    async with _on_directory(config) as operations:
        yield perform(operations, verb, arguments)


async def _decoded(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    buffer = b""
    async for piece in response.content.iter_any():
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            yield json.loads(line)


@asynccontextmanager
async def _on_directory(config: Config) -> AsyncIterator[Operations]:
    """Own the cache while the verb works on it."""
    cache = open_cache(config.cache.dir, index_dir=config.cache.index_dir, allow_group=config.cache.allow_group)
    try:
        holdings = Holdings(BlobStore(cache.root), BareStore(cache.git), SiteBodies(cache.sites))
        holdings.blobs.recover()
        holdings.bares.recover()
        holdings.sites.recover()
        index = Index(cache.index)

        async def remove(what: Holding) -> bool:
            holdings.remove(what)
            return True

        try:
            record = TransparencyLog(cache.log, index, origin=config.log.origin)
            record.adopt()
            catalog = Catalog(index, Metrics(), record=record)
            pins = Pins(index, catalog, holdings.blobs)
            await pins.load()
            upstreams = [upstream.url for upstream in config.upstream.urls]
            carriage = Carriage(catalog, index, holdings, record, upstreams=upstreams, trusted_keys=config.imports.trusted_keys)
            yield Operations(
                catalog,
                holdings,
                remove,
                pins,
                record,
                ref_ttl_s=config.upstream.ref_ttl_s,
                prefix=config.server.prefix,
                carriage=carriage,
            )
        finally:
            index.close()
    finally:
        cache.close()


def _ls(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "nothing yet: ask the mirror for a model"
    table = [("REPO", "REVISION", "COMMIT", "FILES", "CACHED", "LAST USED", "PINNED")]
    for row in rows:
        cached = f"{rough_size(row['cached_bytes'])} of {rough_size(row['bytes'])}"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["used_at"])) if row["used_at"] else "-"
        revisions = ",".join(row["revisions"]) or "-"
        pinned = "yes" if row["pins"] else "-"
        table.append((row["repo"], revisions, row["commit"][:8], f"{row['cached_files']}/{row['files']}", cached, used, pinned))
    return _table(table)


def _du(result: dict[str, Any]) -> str:
    table = [("REPO", "ALONE", "SHARED", "GIT", "PINNED")]
    shown = ("own", "shared", "git", "pinned")
    table += [(row["repo"], *(rough_size(row[name]) for name in shown)) for row in result["repos"]]
    sizes = {name: rough_size(count) for name, count in result["bytes"].items()}
    lines = [
        f"{result['blobs']} complete blobs: {sizes['complete']}; partial: {sizes['partial']}; "
        f"in quarantine: {sizes['quarantine']}; git: {sizes['git']}; sites: {sizes['sites']}; index: {sizes['index']}; "
        f"pinned: {sizes['pinned']}",
        f"of these in no manifest: {sizes['unlisted']}",
    ]
    return "\n".join(([_table(table)] if result["repos"] else []) + lines)


def _stats(result: dict[str, Any]) -> str:
    if not result["running"]:
        return "no mirror runs on this cache: nearhub du tells what is in it"
    lines = [f"up for {result['seconds']:.0f} s"]
    lines += [f"offline: {result['offline']}"] * bool(result["offline"])
    lines += [f"{row['url']}: {row['state']}" for row in result["upstreams"]]
    lines += result["fills"]
    lines += [
        f"{row['follow']}: due in {row['due_in_s']:.0f} s; {row.get('error') or 'in order'}" for row in result["followed"]
    ]
    lines += [f"{name} {value:g}" for name, value in sorted(result["counters"].items())]
    return "\n".join(lines)


def _purge(result: dict[str, Any]) -> str:
    verb = "would be removed" if result["dry_run"] else "removed"
    text = f"{result['removed']} blobs and git mirrors {verb}, {rough_size(result['bytes'])}"
    if result["shared"]:
        text += f"; {result['shared']} stay, since other commits or repos have them"
    if result["busy"]:
        text += f"; {result['busy']} stay, since they are being downloaded"
    return text


def _verify(result: dict[str, Any]) -> str:
    summary = f"{result['blobs']} blobs, {rough_size(result['bytes'])}: "
    if not result["bad"]:
        return summary + "all right"
    return "\n".join([*(f"WRONG: {name}: removed" for name in result["bad"]), f"{summary}{len(result['bad'])} wrong"])


def _why(result: dict[str, Any]) -> str:
    head = result.get("url") or f"{result['method']} {result['path']}: {result['outcome']}, cache={result['cache']}"
    return "\n".join([head, *(f"  {line}" for line in result["why"])])


def _prefetch(results: list[dict[str, Any]]) -> str:
    lines = []
    for one in results:
        name = f"{one['repo']}@{one['revision']}" if one["revision"] else one["repo"]
        if "error" in one:
            lines.append(f"{name}: {one['error']} ({one['fault']}'s fault)")
            continue
        came = f"{rough_size(one['brought_bytes'])} came in {one['seconds']:.1f} s"
        lines.append(f"{name} ({one['commit'][:8]}): {one['done_files']} of {one['files']} files are here, {came}")
        lines += [f"  {file['file']}: {file['error']} ({file['fault']}'s fault)" for file in one["failed"]]
    return "\n".join(lines)


def _pins(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "nothing is pinned"
    table = [("PIN", "LAST", "GROUP", "COMMITS", "CACHED", "STAYS OPEN")]
    for row in rows:
        name = f"{row['repo']}@{row['revision']}" if row["revision"] else row["repo"]
        commits = ",".join(commit[:8] for commit in row["commits"]) or "-"
        cached = f"{rough_size(row['cached_bytes'])} of {rough_size(row['bytes'])}"
        table.append((name, str(row["last"]), row["group"] or "-", commits, cached, "yes" if row["was_public"] else "no"))
    return _table(table)


def _unpin(rows: list[dict[str, Any]]) -> str:
    return f"{len(rows)} pins lifted: what they kept may be evicted now"


def _offline(result: dict[str, Any]) -> str:
    is_so = f"offline: {result['why']}" if result["offline"] else "online"
    return f"{is_so} (mode {result['mode']})"


def _export(result: dict[str, Any]) -> str:
    lines = [f"{row['repo']}  {row['status']}, {len(row['revisions'])} new revisions" for row in result["repos"]]
    if result["missing"]:
        lines.append(f"{result['missing']} blobs are not in this cache, and not in the bundle")
    signed = f"signed by {result['signed_by']}" if result["signed_by"] else "not signed"
    size = f"{result['items']} items, {rough_size(result['bytes'])} in {result['parts']} parts"
    return "\n".join([*lines, f"{result['bundle']}: number {result['sequence']}, {size}, {signed}", f"id {result['id']}"])


def _import(result: dict[str, Any]) -> str:
    if "id" not in result:
        return _copies(result)
    if result["checked_only"]:
        return f"all right: {result['items']} items, {rough_size(result['bytes'])}; nothing was imported"
    lines = [
        f"{row['repo']}  {row['status']}  {' '.join(row['refs']) or '-'}  {len(row['revisions'])} revisions"
        for row in result["repos"]
    ]
    lines += [f"REFUSED: {row['repo']}: {row['why']}" for row in result["refused"]]
    if result["missing"]:
        lines.append(f"{result['missing']} blobs were not in the exporting cache, and are not in the bundle")
    signed = f"signed by {result['signed_by']}" if result["signed_by"] else "signature not checked: no [import] trusted_keys"
    return "\n".join([*lines, f"number {result['sequence']}: {result['items']} items, {rough_size(result['bytes'])}, {signed}"])


def _copies(result: dict[str, Any]) -> str:
    lines = []
    for row in result["repos"]:
        checked = "checked upstream" if row["checked_upstream"] else "not checked upstream"
        lines.append(f"{row['repo']}  {row['status']}  {len(row['commits'])} revisions, {checked}")
        lines += [f"  left: {one}" for one in row["left"]]
        lines += [f"  REFUSED: {one}" for one in row["refused"]]
        if row["wrong"]:
            lines.append(f"  WRONG: {row['wrong']} blobs are not what they are called, and were not taken")
    if any(row["status"] == "restricted" for row in result["repos"]):
        lines.append("restricted: nobody has them but by a policy; --public says that everybody may")
    return "\n".join([*lines, f"{rough_size(result['bytes'])} taken"])


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _prove(result: dict[str, Any]) -> str:
    return "".join(row["proof"] for row in result["proofs"]).rstrip("\n")


_SHOW: dict[str, Callable[[Any], str]] = {
    "prove": _prove,
    "ls": _ls,
    "du": _du,
    "stats": _stats,
    "purge": _purge,
    "verify": _verify,
    "why": _why,
    "offline": _offline,
    "pin": _pins,
    "unpin": _unpin,
    "prefetch": _prefetch,
    "pins": _pins,
    "export": _export,
    "import": _import,
    "import-hf-cache": _copies,
}
