"""Old huggingface_hub that are still common, each in a virtual environment of its own, since they do not go with the new one.

`python -m tests.clients.old_client` prepares them; tests find them ready, or prepare them themselves.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import venv
from pathlib import Path

VERSION = "0.36.0"
OLDEST = "0.23.5"
_BESIDES = ("requests==2.32.5", "tqdm==4.67.1")
_HOMES = Path(__file__).parents[2] / ".venvs"


def prepared(version: str = VERSION) -> Path:
    """The `hf` program of that version, where it has one; installed on first use, by one process at a time, and found later."""
    return _home(version) / "bin" / "hf"


def python(version: str) -> Path:
    """The Python that has that version."""
    return _home(version) / "bin" / "python"


def _home(version: str) -> Path:
    home = _HOMES / f"hf-{version}"
    home.parent.mkdir(exist_ok=True)
    with home.with_suffix(f"{home.suffix}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _install(home, home / "ready.txt", (f"huggingface_hub=={version}", *_BESIDES))
    return home


def _install(home: Path, ready: Path, requirements: tuple[str, ...]) -> None:
    """A half-made environment, or one of other requirements, is made anew."""
    wanted = "\n".join((sys.version, *requirements))
    if ready.exists() and ready.read_text() == wanted:
        return
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *requirements], check=True)
    # It comes along on some machines, and would change which path is tested: this client is the one without Xet.
    subprocess.run([*pip, "uninstall", "--yes", "hf_xet"], check=True)
    ready.write_text(wanted)


if __name__ == "__main__":
    for each in (OLDEST, VERSION):
        print(_home(each))
