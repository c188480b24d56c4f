"""git's words: how it is told what to do, and what it says. Pure.

Every git that runs here runs with these settings and no others: no system's, no user's, no repo's own hooks, no other protocol
than that of the URL which the operator named, no redirect, no prompt.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nearhub.errors import (
    AccessRefused,
    GitUnfit,
    NearhubError,
    RepoNotFound,
    StoreFull,
    UpstreamBusy,
    UpstreamFailed,
    UpstreamUnreachable,
)
from nearhub.wire.credentials import as_basic
from nearhub.wire.target import Repo, RepoKind

MAX_REFS = 200_000
MAX_REFS_BYTES = 32 * 1024**2
BUSY_S = 10.0
_REF_LINE = re.compile(r"(?:[0-9a-f]{40}|[0-9a-f]{64})\t\S+\Z", re.ASCII)
_SYMREF = re.compile(r"ref: (refs/heads/\S+)\tHEAD\Z", re.ASCII)
_VERSION = re.compile(r"version=[012]\Z", re.ASCII)
_HTTP_STATUS = re.compile(r"The requested URL returned error: ([0-9]{3})")
_UNREACHABLE = re.compile(
    r"Could not resolve|Couldn't resolve|Failed to connect|Couldn't connect|Connection refused|Operation too slow"
    r"|Connection timed out|Connection reset|Network is unreachable|No route to host|Empty reply|timed out",
    re.IGNORECASE,
)
_UNFIT = re.compile(r"fsck error|pack has bad object|pack is corrupted|inflate returned|did not send all necessary objects")
_MEMORY = {
    "core.packedGitWindowSize": "8m",
    "core.packedGitLimit": "32m",
    "core.deltaBaseCacheLimit": "16m",
    "core.bigFileThreshold": "8m",
    "pack.threads": "1",
    "pack.windowMemory": "32m",
    "pack.deltaCacheSize": "16m",
}
"""A history of gigabytes passes through some tens of MiB: git's own defaults map whole packs."""
_ALWAYS = {
    "core.hooksPath": "/dev/null",
    "core.fsync": "all",
    "core.fsyncMethod": "fsync",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "fetch.recurseSubmodules": "false",
    "protocol.allow": "never",
    "credential.helper": "",
    "safe.directory": "*",
    "advice.detachedHead": "false",
}
_HARMLESS = (
    *("badTimezone", "missingSpaceBeforeDate", "missingSpaceBeforeEmail", "missingNameBeforeEmail", "missingEmail", "badEmail"),
    *("zeroPaddedFilemode", "badFilemode", "zeroPaddedDate", "badDateOverflow", "multipleAuthors", "nullSha1"),
)
"""What old tools really wrote; git clones it without a word. What is left as an error attacks those who check it out."""


def fetching(url: str, *, proxy: str | None, ca_bundle: str | None, authorization: str | None = None) -> dict[str, str]:
    """Settings of a git that asks `url`. `authorization` is sent to that URL alone."""
    settings = _ALWAYS | _MEMORY
    settings |= {
        f"protocol.{url.partition('://')[0]}.allow": "always",
        "http.followRedirects": "false",
        "http.lowSpeedLimit": "1000",
        "http.lowSpeedTime": "60",
        "http.proxy": proxy or "",
        "core.fsync": "all,-reference",  # PACK_REFS syncs them: one file, not one for each
        "fetch.unpackLimit": "1",
        "fetch.fsckObjects": "true",
        "fetch.writeCommitGraph": "false",
    }
    settings |= {f"fetch.fsck.{name}": "ignore" for name in _HARMLESS}
    if authorization:
        settings[f"http.{url}.extraHeader"] = f"Authorization: {as_basic(authorization)}"
    if ca_bundle:
        settings["http.sslCAInfo"] = ca_bundle
    return settings


def serving() -> dict[str, str]:
    """Settings of a git that answers a client."""
    own = {"uploadpack.allowFilter": "true", "uploadpack.allowAnySHA1InWant": "true", "uploadpack.keepAlive": "5"}
    return _ALWAYS | _MEMORY | own


def environment(
    settings: Mapping[str, str], *, path: str, directory: str | None, protocol: str, memory: int | None = None
) -> dict[str, str]:
    """All the environment that a git has. Settings are in there and not among the arguments: a proxy's may hold a password.

    `memory`: bytes that git and its children may ask for at once.
    """
    said = {"PATH": path, "HOME": "/nonexistent", "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "/bin/false"}
    said |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_COUNT": str(len(settings))}
    if directory is not None:
        said["GIT_DIR"] = directory
    if protocol:
        said["GIT_PROTOCOL"] = protocol
    if memory is not None:
        said["GIT_ALLOC_LIMIT"] = str(memory)
    for number, (key, value) in enumerate(settings.items()):
        said |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return said


def protocol_of(header: str) -> str:
    """The version that a `Git-Protocol` header asks for, if it is one we know; else "", which is version 0."""
    versions = [part for part in header.split(":") if _VERSION.match(part)]
    return versions[-1] if versions else ""


def lead_of(protocol: str) -> bytes:
    """What stands before an advertisement: a pkt-line that names the service, but in version 2."""
    return b"" if protocol == "version=2" else b"001e# service=git-upload-pack\n0000"


@dataclass(frozen=True, slots=True)
class Refs:
    """What upstream has: the branch that HEAD is, None where it does not say, and a digest of all refs."""

    head: str | None
    digest: str
    count: int


def read_refs(output: bytes, url: str) -> Refs:
    """The output of `git ls-remote --symref`. Raises UpstreamFailed for more than MAX_REFS, or nonsense."""
    lines = output.decode(errors="surrogateescape").split("\n")
    if lines[-1] == "":
        lines.pop()
    symrefs = [found[1] for line in lines if (found := _SYMREF.match(line))]
    refs = [line for line in lines if not line.startswith("ref: ")]
    if len(refs) > MAX_REFS:
        raise UpstreamFailed(f"{url} has more than {MAX_REFS} refs, which this mirror takes from no repo")
    if any(not _REF_LINE.match(line) for line in refs):
        raise UpstreamFailed(f"{url} lists refs that are none")
    text = "\n".join([*symrefs[:1], *refs])
    return Refs(symrefs[0] if symrefs else None, hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest(), len(refs))


def explain(stderr: str, url: str) -> NearhubError:
    """What it means that a git which asked `url` failed."""
    told = [line.removeprefix("fatal: ").removeprefix("error: ").strip() for line in stderr.splitlines() if line.strip()]
    last = next((line for line in reversed(told) if not line.startswith("the remote end hung up")), "it says nothing")
    if (status := _HTTP_STATUS.search(stderr)) is not None:
        return _explain_status(int(status[1]), url)
    if re.search("No space left on device|Disk quota exceeded", stderr):
        return StoreFull(f"no room here for what git fetches from {url}: {last[:300]}")
    if "could not read Username" in stderr or "Authentication failed" in stderr:
        return AccessRefused(f"{url} wants a token that was not sent", status=403)
    if re.search(
        r"repository '.*' not found|not valid: is this a git repository|does not appear to be a git repository", stderr
    ):
        return RepoNotFound(f"{url} is no git repository that everybody may see")
    if re.search("Out of memory|attempting to allocate", stderr):
        return GitUnfit(f"what git has at {url} takes more memory than this mirror allows: {last[:300]}")
    if _UNREACHABLE.search(stderr):
        return UpstreamUnreachable(f"{url} does not answer: {last[:300]}")
    error = GitUnfit if _UNFIT.search(stderr) else UpstreamFailed
    return error(f"git could not fetch from {url}: {last[:300]}")


def _explain_status(status: int, url: str) -> NearhubError:
    if status in (401, 403):
        return AccessRefused(f"{url} is not for this caller ({status})", status=403)
    if status in (404, 410):
        return RepoNotFound(f"{url} is not there ({status})")
    if status == 429:
        return UpstreamBusy(f"{url} asks us to wait (429)", retry_after_s=BUSY_S)
    return UpstreamFailed(f"{url} answered {status}")


def url_of(endpoint: str, repo: Repo) -> str:
    """Where git finds `repo` on a Hub."""
    kind = "" if repo.kind is RepoKind.MODELS else f"/{repo.kind}"
    return f"{endpoint}{kind}/{repo.name}"


LOOK = ("ls-remote", "--symref", "--quiet", "--")
"""… URL: what upstream has."""
FETCH = ("fetch", "--quiet", "--prune", "--force", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--")
ALL_REFS = ("+refs/*:refs/*",)
"""Of a Hub's repo: branches, tags, pull requests, conversions."""
BRANCHES_AND_TAGS = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
"""Of other hosts, which keep every pull request there ever was beside them."""
INIT = ("init", "--quiet", "--bare", "--template=", "--initial-branch=main", "--")
PACK_REFS = ("pack-refs", "--all")
"""After every fetch: hundred thousand refs are one file."""
TIDY = ("repack", "--quiet", "-d", "--geometric=2", "--write-midx")


def upload_pack(directory: str, *, is_advertisement: bool) -> Sequence[str]:
    """Arguments of the git that answers one request."""
    advertise = ("--http-backend-info-refs",) if is_advertisement else ()
    return ("upload-pack", "--strict", "--stateless-rpc", *advertise, directory)
