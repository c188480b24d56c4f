"""What comes from the mirror: a base model or a dataset, pinned to a commit, fetched once; after that no request to anywhere.

Of the weights exactly one format is fetched: safetensors, else PyTorch's own. Code of a repo is never fetched.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neartune import pins
from neartune.pins import LockError, Mark, Pin
from neartune.recipe import DEFAULT_MIRROR, without_user

Say = Callable[[str], None]

_SUPPORT = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Top-level files beside the weights: configuration, tokenizer, chat template, image processor."""
_NOT_SUPPORT = ("*.index.json", "README*", "LICENSE*", "requirements*.txt", "adapter_*")
_WEIGHTS = (
    ("safetensors", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("PyTorch", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
_DATA = ("*.jsonl", "*.json", "*.csv", "*.tsv", "*.parquet", "*.txt", "*.png", "*.jpg", "*.jpeg", "*.webp", "*.bmp")


class HubError(Exception):
    """The mirror, or what is asked of it, is at fault; the message says which and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(without_user(message))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repo at one commit, on this machine. `repo` None: it was a directory from the beginning."""

    path: Path
    repo: str | None = None
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """Of a repo at one commit: name → bytes of the files that a run needs."""

    repo: str
    kind: str
    commit: str
    files: Mapping[str, int]


def endpoint(asked: str | None, recipe: str | None, environ: Mapping[str, str]) -> str:
    """Of the mirror: the flag's URL, else the recipe's, else HF_ENDPOINT, else a nearhub on this machine."""
    for candidate in (asked, recipe, environ.get("HF_ENDPOINT")):
        if candidate and candidate.strip():
            return candidate.strip().rstrip("/")
    return DEFAULT_MIRROR


def choose_model_files(sizes: Mapping[str, int]) -> list[str]:
    """Of a repo's files (name → bytes), those that are fetched. Raises HubError when it has no weights that can be read."""
    support = [name for name in sizes if "/" not in name and _matches(name, _SUPPORT) and not _matches(name, _NOT_SUPPORT)]
    for _, single, index, shards in _WEIGHTS:
        if single in sizes:
            return sorted([*support, single])
        parts = [name for name in sizes if fnmatch.fnmatchcase(name, shards)]
        if index in sizes and parts:
            return sorted([*support, index, *parts])
    others = sorted({Path(name).suffix for name in sizes if sizes[name] > 10_000_000})
    found = f"; what it has of size ends in {', '.join(others)}" if others else ""
    raise HubError(f"it has no weights in safetensors or PyTorch's format{found}")


def choose_data_files(sizes: Mapping[str, int]) -> list[str]:
    """Of a dataset's files, those that hold rows or images. Raises HubError when there are none."""
    found = sorted(
        name
        for name in sizes
        if _matches(name.rpartition("/")[2].lower(), _DATA) and not _matches(name.rpartition("/")[2], ("README*", "LICENSE*"))
    )
    if not found:
        raise HubError("it has no jsonl, json, csv, parquet, text or image files")
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def keep_to_the_mirror(environ: MutableMapping[str, str]) -> None:
    """Xet leads past the mirror, and telemetry is nobody's business. To be called before huggingface_hub is imported."""
    environ.setdefault("HF_HUB_DISABLE_XET", "1")
    environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def look(name: str, revision: str, url: str, *, kind: str = "model", pin: Pin | None = None) -> Listing:
    """What of `name` at `revision` a run needs, as the Hub endpoint at `url` lists it. Raises HubError, also where it is not
    what `pin` says."""
    import huggingface_hub

    with _explained(kind, name, revision, url):
        asked = revision if pin is None else pin.asked(revision)
        info: Any = huggingface_hub.HfApi(endpoint=url).repo_info(name, revision=asked, repo_type=kind, files_metadata=True)
        if pin is not None:
            pin.refuse_commit(str(info.sha))
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        files = choose_model_files(sizes) if kind == "model" else choose_data_files(sizes)
        if pin is not None:
            for file in (file for file in info.siblings if file.rfilename in files):
                pin.refuse(file.rfilename, _mark(file), without_user(url))
        return Listing(name, kind, str(info.sha), {file: sizes[file] for file in files})


def _mark(file: Any) -> Mark:
    """Of huggingface_hub's RepoSibling."""
    return Mark("lfs", file.lfs.sha256, file.lfs.size) if file.lfs else Mark("git", file.blob_id or "", file.size or 0)


def fetch(
    name: str,
    revision: str,
    url: str,
    say: Say,
    *,
    kind: str = "model",
    listing: Listing | None = None,
    weights: bool = True,
    pin: Pin | None = None,
) -> Snapshot:
    """`name` at `revision` from the Hub endpoint at `url`, with progress bars. Says what will be fetched. `listing`: of look(),
    if it was asked already; without `weights` only what stands beside them. `pin`: what it must be. Raises HubError."""
    import huggingface_hub

    listing = listing or look(name, revision, url, kind=kind, pin=pin)
    files = [file for file in listing.files if weights or not is_weights(file)]
    total = sum(listing.files[file] for file in files)
    say(f"{kind} {name} at {listing.commit[:12]}: {len(files)} files, {total / 1e6:,.1f} MB, from {without_user(url)}")
    with _explained(kind, name, revision, url):
        path = huggingface_hub.snapshot_download(
            name, repo_type=kind, revision=listing.commit, allow_patterns=[_literal(file) for file in files], endpoint=url
        )
    return as_locked(Snapshot(Path(path), name, listing.commit), pin, say)


def pin_of(lock: Path | None, name: str, kind: str = "model") -> Pin | None:
    """What an hf.lock says of a repo; None: there is no lock. Raises HubError where it does not name the repo."""
    try:
        return pins.pin_of(lock, name, kind)
    except LockError as exc:
        raise HubError(str(exc)) from None


def as_locked(found: Snapshot, pin: Pin | None, say: Say) -> Snapshot:
    """`found`, if its commit and every file of it on this machine are what `pin` says. Raises HubError."""
    if pin is not None:
        try:
            pin.refuse_commit(str(found.commit))
            count = pin.refuse_files(found.path)
        except LockError as exc:
            raise HubError(str(exc)) from None
        say(f"{found.repo}: {count} files are as {pin.where} has them")
    return found


@contextmanager
def _explained(kind: str, name: str, revision: str, url: str) -> Iterator[None]:
    """What goes wrong inside is told as HubError, which says whether the mirror, the repo or the token is at fault."""
    import httpx2  # what huggingface_hub speaks HTTP with: a refused connection is its error
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HubError, LockError) as exc:
        raise HubError(f"{kind} {name!r} cannot be used: {exc}") from None
    except HfHubHTTPError as exc:
        raise HubError(_refused(kind, name, revision, url, exc)) from exc
    except (httpx2.HTTPError, OSError, ValueError) as exc:
        raise HubError(_unreachable(kind, name, url, exc)) from exc


def fetched(name: str, commit: str, *, kind: str = "model") -> Snapshot | None:
    """`name` at `commit` if all that a run needs of it is on this machine; nobody is asked."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(huggingface_hub.snapshot_download(name, repo_type=kind, revision=commit, local_files_only=True))
        if kind == "model":
            _refuse_parts(path)
    except (LocalEntryNotFoundError, HubError):
        return None
    return Snapshot(path, name, commit)


def _refuse_parts(path: Path) -> None:
    """Raises HubError when weights that the directory's index names are not there: a download that was broken off."""
    files = choose_model_files({file.name: 0 for file in path.iterdir() if file.exists()})
    for index in (name for name in files if name.endswith(".index.json")):
        named = set(json.loads((path / index).read_text(encoding="utf-8"))["weight_map"].values())
        if lost := named - set(files):
            raise HubError(f"{path}: {', '.join(sorted(lost))} is not here")


def is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _literal(name: str) -> str:
    """A pattern that matches exactly this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _refused(kind: str, name: str, revision: str, url: str, exc: Any) -> str:
    from huggingface_hub import errors

    said = str(exc.response.headers.get("x-error-message", "")) if getattr(exc, "response", None) is not None else ""
    status = exc.response.status_code if getattr(exc, "response", None) is not None else 0
    match exc:
        case errors.GatedRepoError():
            return f"{url} is up, and {kind} {name!r} is gated: accept its terms on the Hub, and set HF_TOKEN ({said})"
        case errors.RevisionNotFoundError():
            return f"{url} is up and has {name!r}, but no revision {revision!r} of it"
        case errors.RepositoryNotFoundError():
            return f"{url} is up, and has no {kind} {name!r} (or it is private: set HF_TOKEN). Check the spelling"
    if status == 404 and said:
        return f"{url} is up, and does not have {kind} {name!r}: {said}"
    return f"{url} answers, but not usefully, to {kind} {name!r}: {said or exc}"


def _unreachable(kind: str, name: str, url: str, exc: Exception) -> str:
    return (
        f"{url} cannot be reached, so {kind} {name!r} cannot be fetched: {exc}. Is the mirror up (make serve)? "
        "--use_mirror URL, mirror: in the recipe, or HF_ENDPOINT says where it is"
    )


def go_offline() -> None:
    """From here on no library asks a Hub for anything."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
