"""`make demo`: a real model through the mirror with `hf download`: cold, again, and with the Hub stopped.

The sha256 of each file is checked each time, and the Hub's own counters are printed. Exit status 1 if it is not as promised.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.demo.minilm import model_dir, model_files
from tests.hub import LFS, HubProcess
from tests.mirror import MirrorProcess

REPO = "sentence-transformers/all-MiniLM-L6-v2"
LFS_FROM = 10 * 1024 * 1024


def main() -> int:
    files = model_files(model_dir())
    total = sum(path.stat().st_size for path in files.values())
    print(f"{REPO}: {len(files)} files, {total:,} bytes, of which model.safetensors is real weights")
    with tempfile.TemporaryDirectory(prefix="nearhub-demo-") as scratch, HubProcess() as hub:
        hub.repo(REPO).commit({name: LFS(path) if path.stat().st_size >= LFS_FROM else path for name, path in files.items()})
        with MirrorProcess(Path(scratch) / "cache", [hub.url], [hub.cdn_host]) as mirror:
            print(f"stand-in Hub on {hub.url}, its CDN on {hub.cdn_url}; mirror on {mirror.url}\n")
            print(f"{'run':<28}{'files right':>12}{'seconds':>9}{'Hub requests':>14}{'body bytes':>14}")
            ok = _run("cold", mirror, files, Path(scratch) / "cold", hub, most_bytes=total)
            ok &= _run("again, another client", mirror, files, Path(scratch) / "warm", hub, most_bytes=0)
            hub.stop()
            ok &= _run("again, the Hub stopped", mirror, files, Path(scratch) / "dead", None, most_bytes=0)
    print("\neach byte crossed once, then nothing" if ok else "\nNOT as promised")
    return 0 if ok else 1


def _run(
    name: str, mirror: MirrorProcess, files: dict[str, Path], home: Path, hub: HubProcess | None, *, most_bytes: int
) -> bool:
    """One `hf download` a file, with an empty client cache. True: all right, and no more bytes from upstream than allowed."""
    before = (hub.requests(), _content_bytes(hub)) if hub is not None else (0, 0)
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        right = sum(pool.map(lambda item: _download(mirror.url, item[0], item[1], home), files.items()))
    seconds = time.monotonic() - started
    after = (hub.requests(), _content_bytes(hub)) if hub is not None else (0, 0)
    requests, body_bytes = after[0] - before[0], after[1] - before[1]
    print(f"{name:<28}{f'{right}/{len(files)}':>12}{seconds:>9.1f}{requests:>14,}{body_bytes:>14,}", flush=True)
    return right == len(files) and body_bytes <= most_bytes


def _content_bytes(hub: HubProcess) -> int:
    """Bytes of file content: what the CDN and resolve-cache sent, without the notes in redirects and errors."""
    return sum(row["sent"] for row in hub.log() if row["status"] in (200, 206) and row["method"] == "GET")


def _download(endpoint: str, name: str, original: Path, home: Path) -> bool:
    home.mkdir(exist_ok=True)
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [str(Path(sys.executable).with_name("hf")), "download", REPO, name, "--local-dir", str(home / "model")]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        print(f"  {name}: {result.stderr.strip()[-300:]}")
        return False
    return _sha256(home / "model" / name) == _sha256(original)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
