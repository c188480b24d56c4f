"""The public suite http-cache-tests (npm, by the HTTP working group's chair) against the mirror's mount of a site.

`python -m tests.faults.cache_tests` fetches it; with `--record` it runs all of it and writes cache_tests.json: the tests that
must pass, and what becomes of the others. They must pass that did, but those of kind "check": these ask how a cache does
something, and have no right answer.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nearhub.config import load
from tests.mirror import environment, running

VERSION = "0.4.5"
RECORD = Path(__file__).with_suffix(".json")
_RUNNER = Path(__file__).with_suffix(".mjs")
_HOME = Path(__file__).parents[2] / ".cache" / "http-cache-tests"


def prepared() -> Path:
    """The package's directory; fetched on first use, by one process at a time, and found later."""
    _HOME.parent.mkdir(exist_ok=True)
    with _HOME.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        package = _HOME / "node_modules" / "http-cache-tests"
        about = package / "package.json"
        if not about.exists() or json.loads(about.read_text())["version"] != VERSION:
            shutil.rmtree(_HOME, ignore_errors=True)
            _HOME.mkdir()
            npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", f"http-cache-tests@{VERSION}"]
            subprocess.run(npm, cwd=_HOME, check=True)
    return package


async def results(folder: Path, only: Sequence[str] | None = None) -> dict[str, Any]:
    """By id, of these tests or of all: its kind, and what it found wrong, None where nothing. The mirror works in `folder`."""
    command = ("node", str(_RUNNER), str(prepared()))
    pipe = asyncio.subprocess.PIPE
    runner = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**24)
    assert runner.stdin is not None and runner.stdout is not None
    try:
        origin = f"http://127.0.0.1:{int(await runner.stdout.readline())}"
        file = folder / "nearhub.toml"
        file.write_text(f'[[sites]]\nname = "suite"\nurl = "{origin}"\n')
        async with running(load(file, environment(folder / "cache", ["http://127.0.0.1:1"]), {})) as mirror:
            order = {"base": f"{mirror.url}/-/sites/suite", "ids": only}
            runner.stdin.write(json.dumps(order).encode() + b"\n")
            found: dict[str, Any] = json.loads(await runner.stdout.readline())
        await runner.wait()
        return found
    finally:
        if runner.returncode is None:
            runner.kill()
            await runner.wait()


async def _record() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = await results(Path(folder))
    required = [test for test, (kind, wrong) in found.items() if wrong is None and kind != "check"]
    wrong = {test: f"{kind}: {wrong}" for test, (kind, wrong) in found.items() if wrong is not None}
    RECORD.write_text(json.dumps({"required": required, "not passed": wrong}, indent=1) + "\n")
    print(f"{len(found) - len(wrong)} of {len(found)} pass; {len(required)} are required")


if __name__ == "__main__":
    prepared()
    if "--record" in sys.argv:
        asyncio.run(_record())
