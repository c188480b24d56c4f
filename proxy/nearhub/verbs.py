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
from nearhub.store.bares import BareStore
from nearhub.store.blobs import BlobStore
from nearhub.store.holdings import Holding, Holdings
from nearhub.store.index import Index
from nearhub.store.layout import open_cache
from nearhub.units import rough_size
from nearhub.web.admin import SOCKET, perform, reachable


def run_verb(config: Config, verb: str, arguments: dict[str, Any], *, as_json: bool) -> int:
    """Do it, print the answer, and return the exit status: 1 when it failed or found something bad."""
    try:
        result = asyncio.run(_ask(config, verb, arguments))
    except NearhubError as exc:
        print(f"nearhub {verb}: {exc.message}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if as_json else _SHOW[verb](result))
    return 1 if _is_bad(verb, result) else 0


def _is_bad(verb: str, result: Any) -> bool:
    """Whether something was found that must not pass for success."""
    if verb == "import-hf-cache" or (verb == "import" and "refused" not in result):
        return any(row["wrong"] or row["refused"] for row in result["repos"])
    return bool((verb == "verify" and result["bad"]) or (verb == "import" and result["refused"]))


async def _ask(config: Config, verb: str, arguments: dict[str, Any]) -> Any:
    result = None
    progress = _Progress()
    async with _lines(config, verb, arguments) as lines:
        async for line in lines:
            if "error" in line:
                raise NearhubError(line["error"])
            if "done" in line:
                progress.show(line["done"], line["of"])
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
        holdings = Holdings(BlobStore(cache.root), BareStore(cache.git))
        holdings.blobs.recover()
        holdings.bares.recover()
        index = Index(cache.index)

        async def remove(what: Holding) -> bool:
            holdings.remove(what)
            return True

        try:
            catalog = Catalog(index, Metrics())
            upstreams = [upstream.url for upstream in config.upstream.urls]
            carriage = Carriage(catalog, index, holdings, upstreams=upstreams, trusted_keys=config.imports.trusted_keys)
            yield Operations(
                catalog,
                holdings,
                remove,
                ref_ttl_s=config.upstream.ref_ttl_s,
                prefix=config.server.prefix,
                carriage=carriage,
            )
        finally:
            index.close()
    finally:
        cache.close()


class _Progress:
    """A bar on standard error, where that is a terminal."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._was_shown = False

    def show(self, done: int, of: int) -> None:
        if self._is_terminal and of:
            filled = 30 * done // of
            print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {100 * done // of:3d} %", end="", file=sys.stderr, flush=True)
            self._was_shown = True

    def end(self) -> None:
        if self._was_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _ls(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "nothing yet: ask the mirror for a model"
    table = [("REPO", "REVISION", "COMMIT", "FILES", "CACHED", "LAST USED")]
    for row in rows:
        cached = f"{rough_size(row['cached_bytes'])} of {rough_size(row['bytes'])}"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["used_at"])) if row["used_at"] else "-"
        revisions = ",".join(row["revisions"]) or "-"
        table.append((row["repo"], revisions, row["commit"][:8], f"{row['cached_files']}/{row['files']}", cached, used))
    return _table(table)


def _du(result: dict[str, Any]) -> str:
    table = [("REPO", "ALONE", "SHARED", "GIT")]
    table += [(row["repo"], *(rough_size(row[name]) for name in ("own", "shared", "git"))) for row in result["repos"]]
    sizes = {name: rough_size(count) for name, count in result["bytes"].items()}
    lines = [
        f"{result['blobs']} complete blobs: {sizes['complete']}; partial: {sizes['partial']}; "
        f"in quarantine: {sizes['quarantine']}; git: {sizes['git']}; index: {sizes['index']}",
        f"of these in no manifest: {sizes['unlisted']}",
    ]
    return "\n".join(([_table(table)] if result["repos"] else []) + lines)


def _stats(result: dict[str, Any]) -> str:
    if not result["running"]:
        return "no mirror runs on this cache: nearhub du tells what is in it"
    lines = [f"up for {result['seconds']:.0f} s"]
    lines += [f"{row['url']}: {row['state']}" for row in result["upstreams"]]
    lines += result["fills"]
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


_SHOW: dict[str, Callable[[Any], str]] = {
    "ls": _ls,
    "du": _du,
    "stats": _stats,
    "purge": _purge,
    "verify": _verify,
    "why": _why,
    "export": _export,
    "import": _import,
    "import-hf-cache": _copies,
}
