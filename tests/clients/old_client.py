"""The oldest huggingface_hub that is still common, in a virtual environment of its own, since it does not go with the new one.

`python -m tests.clients.old_client` prepares it; tests find it ready, or prepare it themselves.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import venv
from pathlib import Path

VERSION = "0.36.0"
REQUIREMENTS = (f"huggingface_hub=={VERSION}", "requests==2.32.5", "tqdm==4.67.1")
_HOME = Path(__file__).parents[2] / ".venvs" / f"hf-{VERSION}"


def prepared() -> Path:
    """The `hf` program of that version; installed on first use, by one process at a time, and found there later."""
    _HOME.parent.mkdir(exist_ok=True)
    with _HOME.with_suffix(f"{_HOME.suffix}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _install(_HOME, _HOME / "ready.txt")
    return _HOME / "bin" / "hf"


def _install(home: Path, ready: Path) -> None:
    """A half-made environment, or one of other requirements, is made anew."""
    wanted = "\n".join((sys.version, *REQUIREMENTS))
    if ready.exists() and ready.read_text() == wanted:
        return
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *REQUIREMENTS], check=True)
    # It comes along on some machines, and would change which path is tested: this client is the one without Xet.
    subprocess.run([*pip, "uninstall", "--yes", "hf_xet"], check=True)
    ready.write_text(wanted)


if __name__ == "__main__":
    print(prepared())
