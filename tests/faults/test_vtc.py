"""varnishtest's scripts (vtc/): raw requests to the mirror, and raw origins behind it, byte for byte as they should not be.

Each gets the ports of the mirror and of the origin that it is to be: the mirror's site `broken`, and the CDN of its Hub.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from nearhub.config import load
from nearhub.fill import Patience
from tests.hub import LFS, Hub
from tests.mirror import environment, run_client, running

SCRIPTS = sorted((Path(__file__).parent / "vtc").glob("*.vtc"))
IMPATIENT = Patience(first_backoff_s=0.001, strikes=1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
async def test_script(script: Path, hub: Hub, tmp_path: Path) -> None:
    """It holds; and whatever was refused on the way, the mirror's disk has nothing but what is right."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        origin = reserved.getsockname()[1]
    ten = LFS(b"0123456789") if script.stem.startswith("cdn_") else b"0123456789"
    hub.repo("org/m").commit({"ten": ten, "empty": b""})
    hub.world.cdn_url = f"http://127.0.0.1:{origin}"
    file = tmp_path / "nearhub.toml"
    file.write_text(f'[[sites]]\nname = "broken"\nurl = "http://127.0.0.1:{origin}"\n')
    settings = load(file, environment(tmp_path / "cache", [hub.url], [f"127.0.0.1:{origin}"]), {})
    async with running(settings, IMPATIENT) as mirror:
        port = mirror.url.rpartition(":")[2]
        macros = [f"-Dmirror={port}", f"-Dorigin={origin}"]
        status, said = await run_client("varnishtest", "-b", "4M", *macros, str(script), cwd=tmp_path)
        assert status == 0, said[-3000:]
        await mirror.settled()
    for path in (tmp_path / "cache" / "blobs").rglob("*"):
        assert path.is_dir() or path.read_bytes() in (b"0123456789", b"")
