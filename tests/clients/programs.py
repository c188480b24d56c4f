"""The client programs that people use, each as a way to get one file: what was asked, how it ended, what it left.

A program is judged by its own rules: `is_claimed` says that it told its user "done", and then the bytes must be right.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.clients import old_client
from tests.mirror import run_client

MIB = 1024 * 1024
OTHER_ADDRESS = "127.0.0.2"
"""A second client address: the mirror, on 127.0.0.1, sees it as another machine."""


def made(folder: Path) -> Path:
    """The folder, which exists now."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class Want:
    """One file as a client asks for it."""

    endpoint: str
    repo: str
    path: str
    revision: str = "main"
    kind: str = "models"

    @property
    def url(self) -> str:
        prefix = "" if self.kind == "models" else f"{self.kind}/"
        return f"{self.endpoint}/{prefix}{self.repo}/resolve/{self.revision}/{self.path}"


@dataclass(frozen=True, slots=True)
class Got:
    """How a program ended."""

    status: int
    said: str
    file: Path
    is_claimed: bool

    @property
    def sha256(self) -> str:
        """Of the file as the program left it; '' when there is none."""
        if not self.file.is_file():
            return ""
        with self.file.open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.is_file() else 0

    def verdict(self, *right: str) -> str:
        """'right' or 'failed', both of them good; 'WRONG' when it claims bytes that are not one of the `right` sha256."""
        if not self.is_claimed:
            return "failed"
        return "right" if self.sha256 in right else f"WRONG ({self.size} bytes): {self.said[-300:]}"


@dataclass(frozen=True, slots=True)
class Client:
    """A program with its options. `get` into a directory where an earlier one failed continues it, as the program does."""

    name: str
    command: Callable[[Client, Want, Path], list[str]]
    silence_s: int = 30
    """For how long it waits for a byte."""
    tries: int = 5
    """How often it, or the user at the keyboard, tries again."""
    is_rerun: bool = False
    """The user runs the same command again when it fails."""
    is_hub: bool = False
    """It is huggingface_hub, and keeps files in its own cache."""
    uses_xet: bool = False
    resumes: bool = False
    """A later run continues what an earlier one left."""
    file_size: int = 40 * MIB
    """Of the large file that it is tried with."""
    address: str | None = None

    def __str__(self) -> str:
        return self.name

    def impatient(self, silence_s: int, tries: int = 1) -> Client:
        """The same, giving up early."""
        return replace(self, silence_s=silence_s, tries=tries)

    async def get(self, want: Want, home: Path) -> Got:
        """Run it, to the end of its own and its user's tries."""
        command = self.command(self, want, made(home))
        env = self._environment(want, home)
        status, said = await run_client(*command, env=env, cwd=home)
        for _ in range(self.tries - 1 if self.is_rerun else 0):
            if status == 0:
                break
            status, said = await run_client(*command, env=env, cwd=home)
        file = self._place(want, home)
        is_claimed = status == 0 or (self.is_hub and file.exists())
        return Got(status, said, file, is_claimed)

    def _environment(self, want: Want, home: Path) -> dict[str, str]:
        if not self.is_hub:
            return {"no_proxy": "*", "HOME": str(home)}
        return {
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": want.endpoint,
            "HF_HUB_DISABLE_XET": "" if self.uses_xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": str(self.silence_s),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
        }

    def _place(self, want: Want, home: Path) -> Path:
        """Where it leaves the file; what is there need not be complete."""
        if not self.is_hub:
            return home / "file"
        repo = f"{want.kind}--{want.repo.replace('/', '--')}"
        found = list((home / "hf" / "hub" / repo / "snapshots").glob(f"*/{want.path}"))
        return found[0] if found else home / "nothing"


def _hf(client: Client, want: Want, home: Path) -> list[str]:
    return [str(Path(sys.executable).with_name("hf")), "download", "--quiet", *_hf_arguments(want)]


def _old_hf(client: Client, want: Want, home: Path) -> list[str]:
    return [str(old_client.prepared()), "download", "--quiet", *_hf_arguments(want)]


def _hf_arguments(want: Want) -> list[str]:
    return [want.repo, want.path, "--revision", want.revision, "--repo-type", want.kind.removesuffix("s")]


def _curl(client: Client, want: Want, home: Path) -> list[str]:
    patience = ["--speed-limit", "1", "--speed-time", str(client.silence_s)]
    resume = ["-C", "-"] if client.resumes else []
    address = ["--interface", client.address] if client.address else []
    return ["curl", "-q", "-fsS", "--path-as-is", *patience, *resume, *address, "-o", "file", want.url]


def _wget(client: Client, want: Want, home: Path) -> list[str]:
    options = [f"--tries={client.tries}", "--waitretry=0", f"--timeout={client.silence_s}"]
    address = [f"--bind-address={client.address}"] if client.address else []
    return ["wget", "--no-config", "-nv", "-c", *options, *address, "-O", "file", want.url]


def _aria2c(connections: int) -> Callable[[Client, Want, Path], list[str]]:
    def command(client: Client, want: Want, home: Path) -> list[str]:
        many = [f"-x{connections}", f"-s{connections}", "-k1M", "--file-allocation=none"]
        patience = [f"--timeout={client.silence_s}", f"--max-tries={client.tries}", "--retry-wait=0"]
        address = [f"--interface={client.address}"] if client.address else []
        quiet = ["--no-conf", "--console-log-level=error", "--summary-interval=0", "--show-console-readout=false"]
        return ["aria2c", *quiet, *many, *patience, *address, "--continue=true", "-d", str(home), "-o", "file", want.url]

    return command


HF = Client("hf-2.4.0", _hf, is_hub=True)
HF_XET = Client("hf-2.4.0-xet", _hf, is_hub=True, uses_xet=True)
HF_OLD = Client(f"hf-{old_client.VERSION}", _old_hf, is_hub=True, uses_xet=True)
CURL = Client("curl", _curl)
CURL_RESUMING = Client("curl-C-", _curl, is_rerun=True, resumes=True)
WGET = Client("wget-c", _wget, resumes=True)
ARIA_4 = Client("aria2c-x4", _aria2c(4), is_rerun=True, resumes=True)
ARIA_16 = Client("aria2c-x16", _aria2c(16), is_rerun=True, resumes=True, file_size=100 * MIB)

ALL = (HF, HF_XET, HF_OLD, CURL, CURL_RESUMING, WGET, ARIA_4, ARIA_16)
MATRIX = tuple(client for client in ALL if client is not HF_XET)
"""For faults: with Xet hidden, the two huggingface_hub 2.4.0 are one."""
RESUMING = tuple(client for client in ALL if client.resumes)
ELSEWHERE = replace(CURL, name="curl elsewhere", address=OTHER_ADDRESS)
