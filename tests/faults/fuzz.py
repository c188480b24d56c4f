"""Fuzzing of everything in wire/ that reads what others wrote: atheris (libFuzzer) chooses the bytes, coverage guides it.

`make fuzz ARGS="--minutes 30"` takes each reader in turn; what it found interesting is kept in .cache/fuzz and gone on from.
What a reader may do with any bytes is one of the functions below: return, or raise the errors of ours that are named there, and
keep what it promises. Everything else is a finding, whose bytes are written to .cache/fuzz.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import atheris
from multidict import CIMultiDict

with atheris.instrument_imports(include=["nearhub.wire", "nearhub.errors"]):
    from nearhub.errors import (
        AccessRefused,
        BadTarget,
        BatchRefused,
        ClientError,
        HubRefusal,
        NearhubError,
        ResumeUnsafe,
        TooLarge,
        UpstreamFailed,
    )
    from nearhub.wire import credentials, git, headers, http_cache, lfs, manifest, ranges, request, rules, sites, target
    from nearhub.wire.fields import Fields, directives, http_date
    from nearhub.wire.reply import plan_file

HOME = Path(__file__).parents[2] / ".cache" / "fuzz"
COMMIT, SHA = "0a" * 20, "0b" * 32
_REPO = target.Repo(target.RepoKind.MODELS, "org/m")
_META = headers.FileMetadata(COMMIT, headers.BlobId(headers.Algo.SHA256, SHA), 1000)
_FILE = target.FileTarget(_REPO, "main", "a/b.bin")
_LOCALS = {credentials.hashed("nh_local"): credentials.Local("alice", frozenset({"lab"}))}


def text_of(data: bytes) -> str:
    """As aiohttp hands raw paths and headers on."""
    return data.decode("utf-8", "surrogateescape")


def fields_of(data: bytes) -> Fields:
    """Header lines."""
    pairs = (line.partition(":") for line in text_of(data).split("\n"))
    return Fields((name, value) for name, _, value in pairs)


def json_of(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def read_target(data: bytes) -> None:
    """A URL's path: a target that can be written again, without dot segments; or a refusal."""
    try:
        found = target.parse(target.split_prefix("/" + text_of(data), "/hub"))
    except (ClientError, HubRefusal):
        return
    if isinstance(found, target.FileTarget):
        assert target.parse_file(target.format_file(found)) == found
        assert target.parse_file(target.format_short(found)) == found
        assert not {"", ".", ".."} & set(found.path.split("/"))
        headers.file_headers(found, _META, attachment=True)["Content-Disposition"].encode("ascii")


def read_ranges(data: bytes) -> None:
    """Range: disjoint spans of what there is; Content-Range: a span."""
    size, text = int.from_bytes(data[:2], "big"), text_of(data[2:])
    try:
        asked = ranges.parse_range(text, size)
    except ranges.Unsatisfiable:
        asked = ()
    spans = sorted(one.span for one in asked)
    assert all(0 <= span.start < span.stop <= size for span in spans) and len(spans) <= ranges.MAX_RANGES
    assert all(left.stop <= right.start for left, right in pairwise(spans))
    found = ranges.parse_content_range(text)
    assert found is None or found[0]
    ranges.etag_matches(text, SHA)
    ranges.if_range_holds(text, SHA)


def read_headers(data: bytes) -> None:
    """What a Hub says of a file; and any request for one: an answer of exactly as many bytes as it announces."""
    told = CIMultiDict((name, value.strip()) for name, value in fields_of(data).pairs)
    try:
        found = headers.read_metadata(told, text_of(data), is_redirect=bool(len(data) % 2))
        assert target.is_commit(found.commit) and found.size >= 0
    except UpstreamFailed:
        pass
    try:
        reply = plan_file("GET", told, _FILE, _META, boundary="b")
    except ResumeUnsafe:
        return
    assert reply.length == sum(len(part.lead) + len(part.asked.span) for part in reply.parts) + len(reply.trailer)


def read_lfs(data: bytes) -> None:
    """A client's batch, and upstream's."""
    try:
        for one in lfs.read_batch(data).objects:
            assert len(one.oid) == 64 and one.size >= 0
    except (BatchRefused, TooLarge, AccessRefused):
        pass
    wanted = lfs.Wanted(SHA, 10)
    try:
        offers = lfs.read_offers(json_of(data), [wanted])
        assert offers.keys() == {SHA} and "\n" not in offers[SHA].message
    except UpstreamFailed:
        pass


def read_git(data: bytes) -> None:
    """What git prints, says when it fails, and is asked with."""
    with suppress(UpstreamFailed):
        git.read_refs(data, "https://hub")
    assert isinstance(git.explain(text_of(data), "https://hub"), NearhubError)
    assert git.protocol_of(text_of(data)) in ("", "version=0", "version=1", "version=2")


def read_manifest(data: bytes) -> None:
    """What upstream says of a repo: entries that URLs can name, and that survive their row."""
    document = json_of(data)
    entries: tuple[manifest.Entry, ...] = ()
    for read in (_info_entries, manifest.read_tree):
        try:
            entries += read(document)
        except UpstreamFailed:
            continue
    for entry in entries:
        assert manifest.is_path(entry.path)
        assert manifest.entry_from_row(entry.path, json.loads(json.dumps(manifest.entry_row(entry)))) == entry
    manifest.rewritten(document, ["https://hub"], "http://mirror")
    if isinstance(document, dict):
        rules.licences_of(document)


def _info_entries(document: object) -> tuple[manifest.Entry, ...]:
    return manifest.read_info(target.RepoKind.MODELS, document).entries or ()


def read_credentials(data: bytes) -> None:
    """An Authorization header: whose it is; and that no token of the Hub's or ours goes to a site."""
    text = text_of(data)
    try:
        token, caller = credentials.read_token(text), credentials.caller_of("address", text, _LOCALS)
    except BadTarget:
        token, caller = None, None
    if token is not None and caller is not None:
        assert (caller.authorization is None) == token.startswith("nh_") and "\n" not in token
        assert (caller.name is None) == (token != "nh_local")
        assert token not in repr(caller) or len(token) < 16
    if credentials.is_for_others(text, _LOCALS):
        assert token is None or not token.startswith(("hf_", "nh_"))


def read_cache(data: bytes) -> None:
    """Anything that a site and a client may say: a decision, and an answer."""
    said = fields_of(data)
    held = http_cache.Stored(200, said, http_cache.variant_of(said, said), 1e9, 1e9, "body", 10)
    assert http_cache.fits(said, held)
    http_cache.may_store(said, 200, said)
    http_cache.may_serve_stale(held, 2e9)
    http_cache.decide(said, held, 1e9 + 5)
    http_cache.freshened(held, said, 1e9, 1e9)
    told = http_cache.answer(said, held, 1e9 + 5)
    assert told.span is None or told.span.stop <= 10
    directives([text_of(data)])
    http_date(text_of(data), 1e9)
    for _, value in sites.passed_on(said).pairs:
        value.encode()
    sites.relocated(text_of(data), sites.Site("s", "https://site/pub"), "http://mirror/-/sites/s")


def read_site(data: bytes) -> None:
    """A URL below a site: it stays there."""
    raw = f"/-/sites/s/{text_of(data)}"
    try:
        _, tail = sites.split(target.split_prefix(raw, ""), raw)
    except ClientError:
        return
    assert tail.startswith("/") and tail.isascii() and not {".", ".."} & set(tail.partition("?")[0].split("/"))


def read_request(data: bytes) -> None:
    """The shape of a request."""
    method, _, rest = text_of(data).partition(" ")
    path, _, host = rest.partition(" ")
    refused = request.refusal(version=(1, 1), method=method, target=path, host=host, is_chunked=False)
    assert refused is not None or not set(host) & set(" /@\\\r\n\0")


def read_patterns(data: bytes) -> None:
    """An operator's pattern, and a file's name."""
    pattern, _, path = text_of(data[:200]).partition("\n")
    rules.fits_repo(_REPO, pattern)
    rules.format_of(path)


_OBJECT = {"oid": SHA, "size": 10}
_SIBLING = {"rfilename": "a", "size": 1, "blobId": COMMIT}
_POINTER = {"oid": SHA, "pointerSize": 3}
READERS: dict[str, tuple[Callable[[bytes], None], tuple[bytes, ...]]] = {
    "target": (
        read_target,
        (
            b"org/m/resolve/refs%2Fpr%2F1/a/b.bin",
            b"datasets/o/d/resolve/main/x?download=true",
            b"api/models/o/m/tree/main/a",
            b"api/resolve-cache/models/o/m/" + COMMIT.encode() + b"/f",
            b"o/m.git/info/lfs/objects/batch",
            b"hub/o/m/tree/main/%2e%2e",
        ),
    ),
    "ranges": (read_ranges, (b"\x03\xe8bytes=0-1,5-,-3", b"\x00\x0abytes 0-4/10", b'\x00\x0aW/"x"')),
    "headers": (
        read_headers,
        (
            f'X-Repo-Commit: {COMMIT}\nETag: "{SHA}"\nX-Linked-Size: 10\nContent-Length: 10'.encode(),
            f'Range: bytes=0-1,5-9\nIf-Range: "{SHA}"\nIf-None-Match: W/"x", "y"\nUser-Agent: hf_hub/1.0'.encode(),
        ),
    ),
    "lfs": (
        read_lfs,
        (
            json.dumps({"operation": "download", "objects": [_OBJECT], "ref": {"name": "refs/heads/x"}}).encode(),
            json.dumps({"objects": [{**_OBJECT, "actions": {"download": {"href": "https://x"}}}]}).encode(),
        ),
    ),
    "git": (
        read_git,
        (
            f"ref: refs/heads/main\tHEAD\n{COMMIT}\tHEAD\n{COMMIT}\trefs/heads/main\n".encode(),
            b"fatal: unable to access 'https://hub/': The requested URL returned error: 429",
            b"version=2:version=1",
        ),
    ),
    "manifest": (
        read_manifest,
        (
            json.dumps(
                {
                    "id": "org/m",
                    "sha": COMMIT,
                    "siblings": [_SIBLING],
                    "tags": ["license:mit"],
                }
            ).encode(),
            json.dumps([{"type": "file", "path": "a", "size": 9, "oid": COMMIT, "lfs": _POINTER}]).encode(),
        ),
    ),
    "credentials": (read_credentials, (b"Bearer hf_x", b"Basic dXNlcjpoZl94", b"Bearer nh_local", b"Digest hf_x")),
    "cache": (
        read_cache,
        (
            b'Cache-Control: max-age=5, s-maxage="9", stale-if-error=3\nVary: A, b\nETag: "x"\nDate: x',
            b'Expires: Thursday, 18-Aug-50 02:01:18 GMT\nRange: bytes=0-1\nIf-Range: "x"\nIf-None-Match: *\nAge: 5',
        ),
    ),
    "site": (read_site, (b"a/%2e%2e/b?x=..", b"a//b/", b"%5c..%5c")),
    "request": (read_request, (b"GET / mirror:8090", b"OPTIONS * [::1]:80", b"CONNECT a:1 a:1")),
    "patterns": (read_patterns, (b"datasets/org/*\nmodel-00001-of-00002.safetensors", b"[!a]*?\nsaved_model.pb.gz")),
}


def read_any(data: bytes) -> None:
    """The first byte says by whom."""
    if data:
        list(READERS.values())[data[0] % len(READERS)][0](data[1:])


def _fuzz(name: str, options: list[str]) -> None:
    """Never returns."""
    read = read_any if name == "any" else READERS[name][0]
    atheris.Setup([sys.argv[0], *options], read)
    atheris.Fuzz()


def _seeds(name: str) -> Path:
    corpus = HOME / name
    corpus.mkdir(parents=True, exist_ok=True)
    for place, (each, (_, seeds)) in enumerate(READERS.items()):
        for number, seed in enumerate(seeds):
            if name == "any":
                (corpus / f"seed-{each}-{number}").write_bytes(bytes([place]) + seed)
            elif name == each:
                (corpus / f"seed-{number}").write_bytes(seed)
    return corpus


def fuzz(name: str, bound: str, corpus: Path) -> subprocess.CompletedProcess[str]:
    """One reader, in a process of its own, until `bound`, an option of libFuzzer's. The exit status tells of a finding."""
    options = [bound, "-seed=1", "-max_len=4096", "-timeout=10", "-print_final_stats=1", f"-artifact_prefix={corpus}-"]
    command = [sys.executable, "-m", "tests.faults.fuzz", "--reader", name, *options, str(corpus)]
    environment = os.environ | {"PYTHONHASHSEED": "0"}  # the same tries each time
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=HOME.parents[1],
        env=environment,
        check=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10, help="for all readers together")
    parser.add_argument("--only", nargs="*", default=list(READERS), choices=list(READERS))
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    arguments, options = parser.parse_known_args()
    if arguments.reader:
        _fuzz(arguments.reader, options)
    status = 0
    for name in arguments.only:
        done = fuzz(name, f"-max_total_time={round(60 * arguments.minutes / len(arguments.only))}", _seeds(name))
        tries = next((line.split()[-1] for line in done.stdout.splitlines() if "number_of_executed_units" in line), "?")
        print(f"{name}: {tries} tries, {'nothing found' if not done.returncode else 'FOUND:'}", flush=True)
        if done.returncode:
            print(done.stdout[-3000:])
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
