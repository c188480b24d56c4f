"""`make demo`: two real models from a stand-in Hub through the mirror, with `hf download` and transformers; no Internet.

Each client starts with an empty HF_HOME, so everything it gets comes through the mirror. Every file's sha256 is checked each
time, and the Hub counts what it was asked. Exit status 1 if anything is not as promised.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.demo.models import Model, minilm, sha256, smollm
from tests.hub import HubProcess
from tests.mirror import MirrorProcess

QUESTION = "In one sentence, why is it good to have a library nearby?"
RENEWED_AFTER_S = 30.0
"""Whether a repo is still public is asked again after so long, while it is used."""


def main() -> int:
    models = [smollm(), minilm()]
    print("Two real models, a stand-in Hub, a mirror; no Internet.")
    print("Each client is a new process with an empty HF_HOME, and knows nothing but the mirror.\n")
    for model in models:
        print(f"  {model.repo:<42}{len(model.files):>3} files {model.size / 1e6:>6.0f} MB  {model.note}")
    with tempfile.TemporaryDirectory(prefix="nearhub-demo-") as scratch, HubProcess() as hub:
        for model in models:
            hub.repo(model.repo).commit(model.for_hub())
        with MirrorProcess(Path(scratch) / "cache", [hub.url], [hub.cdn_host]) as mirror:
            show = Show(mirror.url, models, Path(scratch), hub)
            print(f"\n  {'client':<32}{'files right':>12}{'seconds':>9}   asked of the Hub")
            show.download("1  hf download, nothing cached", is_cold=True)
            show.download("2  hf download")
            show.generate("3  from_pretrained")
            hub.stop()
            show.hub = None
            show.download("4  hf download")
            show.generate("5  from_pretrained")
    print(f"\n  Clients 3 and 5 asked the model: {QUESTION}")
    print(textwrap.fill(show.answer, 96, initial_indent="  > ", subsequent_indent="  > "), end="\n\n")
    if show.problems:
        print("NOT as promised:", *show.problems, sep="\n  ")
        return 1
    print("As promised: each byte crossed once, the next clients cost the Hub nothing, and nobody missed it when it was gone.")
    return 0


@dataclass
class Show:
    """One client after the other, each in a process of its own; a line for each, and what was not as promised."""

    endpoint: str
    models: list[Model]
    scratch: Path
    hub: HubProcess | None
    """None: stopped."""
    answer: str = ""
    problems: list[str] = field(default_factory=list)
    _clients: int = 0
    _seen: int = 0
    _began: float = field(default_factory=time.monotonic)

    def download(self, name: str, *, is_cold: bool = False) -> None:
        """Both repos, whole."""
        started = time.monotonic()
        target = self._new_home() / "models"
        hf = str(Path(sys.executable).with_name("hf"))
        for model in self.models:
            self._run(name, [hf, "download", model.repo, "--local-dir", str(target / model.repo)])
        seconds = time.monotonic() - started
        wanted = [(target / model.repo / path, hash_) for model in self.models for path, hash_ in model.hashes.items()]
        right = sum(path.is_file() and sha256(path) == hash_ for path, hash_ in wanted)
        if right != len(wanted):
            self.problems.append(f"{name}: {len(wanted) - right} of {len(wanted)} files are missing or wrong")
        self._line(name, f"{right}/{len(wanted)}", seconds, is_cold=is_cold)

    def generate(self, name: str) -> None:
        """A model is loaded and asked; it has to answer the same each time."""
        started = time.monotonic()
        self._new_home()
        answer = self._run(name, [sys.executable, "-m", "tests.demo.generate", self.models[0].repo, QUESTION]).strip()
        if not answer or answer != (self.answer or answer):
            self.problems.append(f"{name}: answered {answer!r}, before that {self.answer!r}")
        self.answer = self.answer or answer
        self._line(name, "", time.monotonic() - started)

    def _new_home(self) -> Path:
        self._clients += 1
        self._home = self.scratch / f"client-{self._clients}"
        return self._home

    def _run(self, name: str, command: list[str]) -> str:
        """Run a client with nothing but the mirror's address; its output."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        env |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self._home / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        result = subprocess.run(command, env=env | {"NO_PROXY": "127.0.0.1", "NO_COLOR": "1"}, capture_output=True, text=True)
        if result.returncode != 0:
            self.problems.append(f"{name}: exit status {result.returncode}: {' '.join(result.stderr.split())[-200:]}")
        return result.stdout

    def _line(self, name: str, right: str, seconds: float, *, is_cold: bool = False) -> None:
        asked = "(it is stopped)" if self.hub is None else self._asked(name, self.hub, is_cold)
        print(f"  {name:<32}{right:>12}{seconds:>9.1f}   {asked}", flush=True)
        shutil.rmtree(self._home, ignore_errors=True)

    def _asked(self, name: str, hub: HubProcess, is_cold: bool) -> str:
        """What the Hub has seen since the last line: all bytes once and two questions a repo, and after that nothing."""
        new = hub.log()[self._seen :]
        self._seen += len(new)
        files = [row for row in new if not row["raw_path"].startswith("/api/") or "/resolve-cache/" in row["raw_path"]]
        content = sum(row["sent"] for row in files if row["status"] in (200, 206))
        size = sum(model.size for model in self.models)
        questions, per_repo = len(new) - len(files), 2 if is_cold else int(time.monotonic() - self._began > RENEWED_AFTER_S)
        if questions > per_repo * len(self.models) or content != (size if is_cold else 0):
            self.problems.append(f"{name}: {questions} questions about repos, {content:,} of {size:,} bytes of files")
        if not new:
            return "nothing"
        return f"{questions} questions about repos, {len(files)} requests for files: {content / size:.3f} × their bytes"


if __name__ == "__main__":
    sys.exit(main())
