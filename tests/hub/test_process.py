"""The Hub in another process: the same behaviour through the control endpoint, and a clean end."""

from __future__ import annotations

import asyncio
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.hub import LFS, Content, Fault, HubProcess, Limits
from tests.hub.__main__ import _size


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return bytes(answer.read())


def status(url: str) -> int:
    try:
        get(url)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return 200


def test_a_hub_in_another_process_obeys() -> None:
    content = Content(2_000_000, seed=3)
    with HubProcess() as hub:
        repo = hub.repo("org/m")
        first = repo.commit({"a.txt": "one", "model.bin": LFS(content)})
        second = repo.commit({"a.txt": b"two"})
        url = f"{hub.url}/org/m/resolve/main/"
        assert get(url + "model.bin") == content.bytes()
        assert get(url + "a.txt") == b"two"
        repo.move("main", first)
        assert get(url + "a.txt") == b"one"
        assert get(f"{hub.url}/org/m/resolve/{second}/a.txt") == b"two"
        assert (hub.requests("cdn"), hub.bytes("cdn", match="model.bin"), hub.peak("cdn")) == (1, 2_000_000, 1)
        hub.reset()
        assert hub.requests() == hub.bytes() == 0
        rule = hub.add_fault(Fault.status(503), on="cdn", times=1)
        assert [status(url + "model.bin") for _ in range(2)] == [503, 200]
        assert (rule.hits, rule.stalled) == (1, 0)
        hub.add_fault(Fault.corrupt(5), on="cdn")
        hub.clear_faults()
        hub.cap(per_connection=1e9, total=1e9)
        assert get(url + "model.bin", Range="bytes=0-9") == content.bytes(0, 10)
        hub.repo("org/m", private=True)
        hub.user("hf_good", "bob", ["org/m"])
        assert status(url + "a.txt") == 401
        assert get(url + "a.txt", Authorization="Bearer hf_good") == b"one"
        repo.rename("org/n")
        repo.delete()
        assert status(url + "a.txt") == 401
        hub.limit(Limits(resolvers=0, enforce=True))
        assert status(url + "a.txt") == 429
        assert hub.log()[-1]["status"] == 429
        with pytest.raises(RuntimeError, match="KeyError"):
            hub.do("commit", id="org/none")
        assert hub.stop() == 0


def test_a_killed_hub_returns_on_its_ports() -> None:
    with HubProcess() as hub:
        ports = [int(url.rpartition(":")[2]) for url in (hub.url, hub.cdn_url)]
        assert hub.stop(signal.SIGKILL) == -signal.SIGKILL
    with HubProcess(port=ports[0], cdn_port=ports[1]) as again:
        assert (again.url, again.cdn_url) == (hub.url, hub.cdn_url)
        assert status(f"{again.url}/api/models") == 200


def test_a_directory_of_repositories_is_served(tmp_path: Path) -> None:
    for name, data in (("org/m/sub/model.safetensors", b"weights"), ("org/m/config.json", b"{}"), ("datasets/o/d/x", b"x")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with HubProcess("--dir", str(tmp_path), "--no-xet") as hub:
        assert get(f"{hub.url}/org/m/resolve/main/sub/model.safetensors") == b"weights"
        assert get(f"{hub.url}/datasets/o/d/resolve/main/x") == b"x"
        assert hub.requests("cdn") == 1
        assert hub.stop(signal.SIGINT) == 0


async def test_the_demo_serves_alone() -> None:
    arguments = ("-m", "tests.hub", "--port", "0", "--cdn-port", "0", "--cap-per-connection", "20MB")
    python = sys.executable
    process = await asyncio.create_subprocess_exec(python, *arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    ready = (await process.stdout.readline()).decode().split()
    assert ready[:3] == ["hub", "ready", "on"]
    assert b"tiny" in await asyncio.to_thread(get, f"{ready[3]}/demo/tiny-model/resolve/v1/config.json")
    process.send_signal(signal.SIGTERM)
    await process.communicate()
    assert process.returncode == 0


def test_sizes_are_read_as_people_write_them() -> None:
    assert [_size(text) for text in ("20MB", "1.5k", "2MiB", "7", "1g")] == [20e6, 1500, 2 << 20, 7, 1e9]
