"""Two network namespaces without a route between them. The mirror's has loopback, a link that leads nowhere, and a counter of
every packet that leaves by anything else: it stays at 0 while real clients beside the mirror have all that is cached."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.clients.programs import ALL, Client, Want
from tests.hub import LFS, Content, Hub
from tests.mirror import READY, environment, run_client
from tests.trainer import bases

WEIGHTS = Content(3_000_000, seed=7)
INSIDE, OUTSIDE = f"nh-in-{os.getpid()}", f"nh-out-{os.getpid()}"
NEARHUB = (sys.executable, "-m", "nearhub")
RULES = """
table inet gap {
  counter leaving {
  }
  chain output {
    type filter hook output priority 0;
    oifname != "lo" counter name "leaving"
  }
}
"""
CLIENT = """
import json, sys
from huggingface_hub import HfApi, snapshot_download
api = HfApi()
print(json.dumps({
    "files": sorted(api.list_repo_files("org/m")), "refs": [one.name for one in api.list_repo_refs("org/m").branches],
    "models": [one.id for one in api.list_models(search="m")], "whoami": api.whoami(token="hf_x")["name"],
    "folder": snapshot_download("org/m"),
}))
"""


def must(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Gap:
    """`inside` runs a command in the mirror's namespace. The link to the other one is up, and has addresses, but no route."""

    def inside(self, *command: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", INSIDE, *command)

    def packets_out(self) -> int:
        listed = json.loads(must(*self.inside("nft", "-j", "list", "counters")))
        (counter,) = [one["counter"] for one in listed["nftables"] if "counter" in one]
        return int(counter["packets"])


@pytest.fixture
def gap() -> Iterator[Gap]:
    """Needs root, iproute2 and nftables."""
    assert shutil.which("ip") and shutil.which("nft"), "install iproute2 and nftables"
    one = Gap()
    try:
        for name in (INSIDE, OUTSIDE):
            must("ip", "netns", "add", name)
        must("ip", "link", "add", "gap-in", "netns", INSIDE, "type", "veth", "peer", "name", "gap-out", "netns", OUTSIDE)
        must(*one.inside("ip", "link", "set", "lo", "up"))
        must(*one.inside("nft", "-f", "-"), text=RULES)
        yield one
    finally:
        for name in (INSIDE, OUTSIDE):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextmanager
def offline(gap: Gap, cache: Path) -> Iterator[str]:
    """The mirror of `cache` in the namespace, with upstreams that are outside: one that needs DNS, one that is an address."""
    # A default route by the link that leads nowhere: without it the kernel would refuse before any rule sees a packet.
    must(*gap.inside("ip", "link", "set", "gap-in", "up"))
    must(*gap.inside("ip", "route", "add", "default", "dev", "gap-in"))
    assert gap.packets_out() == 0
    elsewhere = ("--upstream", "https://huggingface.co", "--upstream", "http://192.0.2.1:8080")
    server = subprocess.Popen(
        [*gap.inside(*NEARHUB), "serve", "--offline", "--port", "0", "--cache-dir", str(cache), *elsewhere],
        env={key: value for key, value in os.environ.items() if not key.startswith("NEARHUB_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith(READY), line
        yield line.removeprefix(READY).strip()
    finally:
        server.terminate()
        server.wait(timeout=60)
        if server.stdout is not None:
            server.stdout.close()


async def test_no_packet_leaves(hub: Hub, tmp_path: Path, gap: Gap) -> None:
    """Filled outside, carried in, started with --offline; hf, git, git-lfs and curl have everything; the counter can count."""
    attributes = b"*.bin filter=lfs diff=lfs merge=lfs -text\n"
    hub.repo("org/m").commit({".gitattributes": attributes, "config.json": b"{}", "sub/model.bin": LFS(WEIGHTS)})
    cache = tmp_path / "cache"
    settings = environment(cache, [hub.url], [hub.cdn_host])
    status, said = await run_client(*NEARHUB, "prefetch", "org/m", "--git", env=settings)
    assert status == 0, said
    hub.log.clear()
    with offline(gap, cache) as url:
        env = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"),
            "GIT_TERMINAL_PROMPT": "0",
        }
        status, said = await run_client(*gap.inside(sys.executable, "-c", CLIENT), env=env)
        assert status == 0, said
        told = json.loads(said.splitlines()[-1])
        assert told["files"] == [".gitattributes", "config.json", "sub/model.bin"] and told["refs"] == ["main"]
        assert (told["models"], told["whoami"]) == (["org/m"], "unknown-offline")
        assert (Path(told["folder"]) / "sub/model.bin").read_bytes() == WEIGHTS.bytes()
        for command in (
            ("git", "lfs", "install", "--skip-repo"),
            ("git", "clone", "-q", f"{url}/org/m", str(tmp_path / "clone")),
            ("curl", "-q", "-sSf", "-o", str(tmp_path / "got"), f"{url}/org/m/resolve/main/sub/model.bin"),
        ):
            status, said = await run_client(*gap.inside(*command), env=env)
            assert status == 0, said
        assert (tmp_path / "clone/sub/model.bin").read_bytes() == (tmp_path / "got").read_bytes() == WEIGHTS.bytes()
        status, said = await run_client(*gap.inside("curl", "-q", "-sS", f"{url}/org/never/resolve/main/x"))
        assert status == 0 and "offline" in said
        assert gap.packets_out() == 0
    # The counter does count: the same mirror, online, tries.
    must(*gap.inside("ip", "neigh", "add", "192.0.2.1", "lladdr", "02:00:00:00:00:01", "dev", "gap-in"))
    await run_client(*gap.inside("curl", "-q", "-m", "1", "http://192.0.2.1:8080/"))
    assert gap.packets_out() > 0
    assert [one.raw_path for one in hub.log] == []


async def test_a_lab_that_never_saw_the_internet(hub: Hub, tmp_path: Path, gap: Gap) -> None:
    """Vetted outside, carried in as a signed bundle: every client program has it, the trainer trains, and nothing leaves."""
    base = bases.make_llama(tmp_path / "base", chat=True)
    hub.repo("org/tiny").commit({path.name: path for path in base.iterdir()})
    hub.repo("org/m").commit({"model.bin": LFS(WEIGHTS)})
    settings = environment(tmp_path / "outside", [hub.url], [hub.cdn_host])
    carried = tmp_path / "carried"
    for command in (
        ("prefetch", "org/m", "org/tiny"),
        ("keygen", str(tmp_path / "vetting.key")),
        ("export", "org/m", "org/tiny", "--to", str(carried), "--sign", str(tmp_path / "vetting.key")),
    ):
        status, said = await run_client(*NEARHUB, *command, env=settings)
        assert status == 0, said
    inside = environment(tmp_path / "inside", ["http://192.0.2.1:8080"])
    inside["NEARHUB_IMPORT_TRUSTED_KEYS"] = str(tmp_path / "vetting.key.pub")
    hub.log.clear()
    status, said = await run_client(*gap.inside(*NEARHUB, "import", str(carried)), env=inside)
    assert status == 0, said
    with offline(gap, tmp_path / "inside") as url:
        for client in ALL:

            def command_inside(one: Client, want: Want, home: Path, client: Client = client) -> list[str]:
                return list(gap.inside(*client.command(one, want, home)))

            got = await replace(client, command=command_inside).get(Want(url, "org/m", "model.bin"), tmp_path / client.name)
            assert (got.status, got.sha256) == (0, WEIGHTS.sha256), (client.name, got.said)
        data = bases.write_jsonl(tmp_path / "facts.jsonl", bases.FACTS)
        asked = [*bases.settings_of(tmp_path / "run", "org/tiny", data), "max_steps=2", "--use_mirror", url]
        status, said = await run_client(*gap.inside(*bases.command(*asked)), env=bases.environment(), cwd=bases.TRAINER)
        assert status == 0 and (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file(), said
        assert gap.packets_out() == 0
    assert [one.raw_path for one in hub.log] == []
