"""Repositories made to do harm, and those that are merely too much: the mirror refuses them in words and keeps nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from tests.clients.test_git import NO_ONE, git, refused
from tests.hub import Content, Hub
from tests.mirror import Mirror, configure, running


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    async with Hub() as hub:
        yield hub


@pytest.fixture
async def mirror(hub: Hub, tmp_path: Path) -> AsyncIterator[Mirror]:
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host], GIT_MAX_REPO_SIZE="4MB")) as mirror:
        yield mirror


def imported(folder: Path, stream: str) -> Path:
    """A bare repository of what a fast-import stream says, without any of the checks that adding files has."""
    run = {"check": True, "env": {**os.environ, **NO_ONE}}
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", folder], **run)  # type: ignore[call-overload]
    subprocess.run(["git", "-C", folder, "fast-import", "--quiet"], input=stream.encode(), **run)  # type: ignore[call-overload]
    return folder


def commit(*files: tuple[str, str, str]) -> str:
    """A commit of (mode, path, content)."""
    lines = "".join(f"M {mode} inline {path}\ndata {len(content)}\n{content}\n" for mode, path, content in files)
    return f"commit refs/heads/main\ncommitter a <a@example.org> 1 +0000\ndata 0\n{lines}"


def serve(hub: Hub, name: str, folder: Path) -> None:
    hub.git(name, folder).commit({"README.md": b"what the API tells"})


def kept(cache: Path) -> list[Path]:
    """Bare mirrors that would be served."""
    return list((cache / "git").glob("*/*.git/nearhub.json"))


async def test_a_submodule_url_that_is_an_option_is_refused(hub: Hub, mirror: Mirror, tmp_path: Path) -> None:
    """CVE-2018-17456: who clones it with an old git runs a command. Others are served all the while."""
    modules = '[submodule "x"]\n\tpath = x\n\turl = -u./payload\n'
    serve(hub, "org/evil", imported(tmp_path / "evil.git", commit(("100644", ".gitmodules", modules))))
    said = await refused("clone", f"{mirror.url}/org/evil", tmp_path / "clone")
    assert "remote: git could not fetch from" in said and "502" in said
    assert kept(tmp_path / "cache") == []
    hub.repo("org/good").commit({"x": b"x"})
    await git("clone", f"{mirror.url}/org/good", tmp_path / "good")


async def test_links_and_submodules_stay_what_they_are(hub: Hub, mirror: Mirror, tmp_path: Path) -> None:
    """A bare mirror checks nothing out: links to anywhere, and submodules of anywhere, are names in objects only."""
    modules = '[submodule "x"]\n\tpath = x\n\turl = http://127.0.0.1:9/nothing\n'
    stream = commit(("120000", "link", "/etc/passwd"), ("120000", "up", "../../.."), ("100644", ".gitmodules", modules))
    serve(hub, "org/links", imported(tmp_path / "links.git", stream + f"M 160000 {'1' * 40} x\n"))
    await git("clone", "--bare", f"{mirror.url}/org/links", tmp_path / "clone")
    assert (await git("show", "HEAD:link", cwd=tmp_path / "clone")) == "/etc/passwd"
    (bare,) = (path.parent for path in kept(tmp_path / "cache"))
    assert not [path for path in bare.rglob("*") if path.is_symlink()]


async def test_a_repo_that_is_too_large_is_refused_and_takes_no_room(hub: Hub, mirror: Mirror, tmp_path: Path) -> None:
    hub.repo("org/large").commit({f"{part}": Content(3_000_000, part) for part in range(3)})
    said = await refused("clone", f"{mirror.url}/org/large", tmp_path / "clone")
    assert "remote: the git of models/org/large has more than 4000000 bytes: [git] max_repo_size allows no more" in said
    assert kept(tmp_path / "cache") == []
    fetched = hub.counters.bytes(match="git-upload-pack")
    await refused("clone", f"{mirror.url}/org/large", tmp_path / "again")
    assert hub.counters.bytes(match="git-upload-pack") - fetched < 1_000_000, "it is not fetched again until it changes"
    assert not list((tmp_path / "cache").glob("git/*/*/objects/pack/*"))
    hub.repo("org/good").commit({"x": b"x"})
    await git("clone", f"{mirror.url}/org/good", tmp_path / "good")


async def test_what_failed_half_way_leaves_no_branch_behind_that_is_there_again(hub: Hub, tmp_path: Path) -> None:
    """git drops a branch that is gone before it has the rest. Then upstream has the very refs of before."""
    repo = hub.repo("org/m")
    before = repo.commit({"x": b"x"})
    side = repo.commit({"y": b"y"}, revision="side")
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], GIT_MAX_REPO_SIZE="4MB", UPSTREAM_REF_TTL="0s")
    async with running(config) as mirror:
        await git("clone", f"{mirror.url}/org/m", tmp_path / "first")
        repo.drop_ref("refs/heads/side")
        repo.commit({f"{part}": Content(3_000_000, part) for part in range(3)})
        await git("clone", f"{mirror.url}/org/m", tmp_path / "stale")
        repo.move("main", before)
        repo.ref("refs/heads/side", side)
        assert f"{side}\trefs/heads/side" in await git("ls-remote", f"{mirror.url}/org/m")


async def test_refs_that_unpack_without_end_take_no_memory(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte on the wire is half a gigabyte."""
    monkeypatch.setattr("nearhub.git.mirrors.LOOK_MEMORY", 256 * 1024**2)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    line = b"003d%s refs/heads/main\n" % (b"1" * 40)
    flood = packer.compress(b"001e# service=git-upload-pack\n0000" + line) + packer.flush(zlib.Z_FULL_FLUSH)
    flood += (packer.compress(line * 2**18) + packer.flush(zlib.Z_FULL_FLUSH)) * 32

    async def upstream(request: web.BaseRequest) -> web.Response:
        media = "application/x-git-upload-pack-advertisement"
        return web.Response(body=flood, headers={"Content-Encoding": "gzip", "Content-Type": media})

    async with listening(upstream) as url:
        config = configure(tmp_path / "cache", [hub.url], GIT_MIRRORS=f"tools={url}/tools.git")
        async with running(config) as mirror:
            said = await refused("clone", f"{mirror.url}/tools.git", tmp_path / "clone")
            assert "takes more memory than this mirror allows" in said


async def test_refs_without_number_are_refused(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearhub.wire.git.MAX_REFS", 100)
    repo = hub.repo("org/many")
    only = repo.commit({"x": b"x"})
    for number in range(200):
        repo.tag(f"t{number}", only)
    async with running(configure(tmp_path / "cache", [hub.url], [hub.cdn_host])) as mirror:
        said = await refused("clone", f"{mirror.url}/org/many", tmp_path / "clone")
        assert "has more than 100 refs" in said


async def test_a_redirect_leads_git_nowhere(tmp_path: Path, hub: Hub) -> None:
    """An upstream that sends git on to another host of its choice: it is not followed."""
    asked = []

    async def elsewhere(request: web.BaseRequest) -> web.Response:
        asked.append(request.path)
        return web.Response(status=404)

    async def onward(request: web.BaseRequest) -> web.Response:
        return web.Response(status=302, headers={"Location": f"{victim}{request.path_qs}"})

    async with listening(elsewhere) as victim, listening(onward) as upstream:
        config = configure(tmp_path / "cache", [hub.url], GIT_MIRRORS=f"tools={upstream}/tools.git")
        async with running(config) as mirror:
            assert "answered 302" in await refused("clone", f"{mirror.url}/tools.git", tmp_path / "clone")
    assert asked == []


async def test_what_git_never_sends_is_refused(hub: Hub, mirror: Mirror) -> None:
    """Other services and methods, nonsense for a version, a body that is not packed as it says, a flood of a body."""
    hub.repo("org/m").commit({"x": b"x"})
    media = {"Content-Type": "application/x-git-upload-pack-request"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:

        async def status(method: str, path: str, **more: object) -> tuple[int, str]:
            async with session.request(method, mirror.url + path, **more) as response:  # type: ignore[arg-type]
                return response.status, await response.text()

        assert (await status("GET", "/org/m/info/refs"))[0] == 400
        assert (await status("GET", "/org/m/info/refs?service=git-upload-archive"))[0] == 400
        assert (await status("GET", "/org/m/info/refs?service=git-upload-pack;id"))[0] == 400
        assert (await status("GET", "/org/m/git-upload-pack"))[0] == 404
        assert (await status("POST", "/org/m/git-upload-pack", data=b"0000"))[0] == 400
        assert (await status("POST", "/org/m/git-receive-pack", data=b"0000"))[0] == 403
        packed = media | {"Content-Encoding": "gzip"}
        assert (await status("POST", "/org/m/git-upload-pack", data=b"no gzip", headers=packed))[0] == 400
        said = await status("POST", "/org/m/git-upload-pack", data=b"zzzz nonsense", headers=media)
        assert said[0] == 200 or "git failed on this request" in said[1]
        odd = {"Git-Protocol": "version=2:version=$(id);x\tversion=9"}
        assert (await status("GET", "/org/m/info/refs?service=git-upload-pack", headers=odd))[0] == 200


async def test_a_request_that_unpacks_without_end_is_cut_short(
    hub: Hub, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 kB on the wire are 8 MiB and more unpacked."""
    monkeypatch.setattr("nearhub.web.git.MAX_REQUEST", 8 * 1024**2)
    tip = hub.repo("org/m").commit({"x": b"x"})
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    want, have = f"0032want {tip}\n".encode(), b"0032have " + b"0" * 40 + b"\n"
    bomb = packer.compress(want + b"0000" + have * (9 * 1024**2 // len(have))) + packer.flush()
    headers = {"Content-Type": "application/x-git-upload-pack-request", "Content-Encoding": "gzip"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{mirror.url}/org/m/git-upload-pack", data=bomb, headers=headers) as response,
    ):
        assert response.status == 413, await response.text()


async def test_who_does_not_finish_a_question_keeps_nobody_else_waiting(hub: Hub, tmp_path: Path) -> None:
    """Of two sessions one address may have one."""
    tip = hub.repo("org/m").commit({"x": b"x"})
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], GIT_SESSIONS="2")
    async with running(config) as mirror, AsyncExitStack() as open_ones:
        for _ in range(3):
            await open_ones.enter_async_context(_unfinished(mirror, tip, "127.0.0.2"))
        async with asyncio.timeout(60):
            await git("clone", f"{mirror.url}/org/m", tmp_path / "clone")


async def test_a_question_that_does_not_end_is_given_up(hub: Hub, tmp_path: Path) -> None:
    """Also where git has begun to answer it: its place is free again."""
    tip = hub.repo("org/m").commit({"x": b"x"})
    config = configure(tmp_path / "cache", [hub.url], [hub.cdn_host], SERVER_REQUEST_TIMEOUT="250ms")
    async with running(config) as mirror:
        await git("clone", f"{mirror.url}/org/m", tmp_path / "clone")
        async with (
            asyncio.timeout(60),
            _unfinished(mirror, tip) as silent,
            _unfinished(mirror, tip, more=f"0032have {tip}\n") as slow,
        ):
            assert b" 408 " in await silent.readuntil(b"bytes in 0.25 s")
            answer = await slow.readuntil(b"\r\n0\r\n\r\n")
            assert b" 200 " in answer.splitlines()[0] and b"ACK" in answer
        async with asyncio.timeout(60), aiohttp.ClientSession() as session:
            said = ""
            while "\nnearhub_git_sessions 0.0\n" not in said:
                async with session.get(f"{mirror.url}/-/metrics") as response:
                    said = await response.text()


@asynccontextmanager
async def _unfinished(
    mirror: Mirror, tip: str, address: str = "127.0.0.1", *, more: str = ""
) -> AsyncIterator[asyncio.StreamReader]:
    """A request that announces more than it says."""
    url = URL(mirror.url)
    reader, writer = await asyncio.open_connection(url.host, url.port, local_addr=(address, 0))
    head = "POST /org/m/git-upload-pack HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9999\r\n"
    writer.write(f"{head}Content-Type: application/x-git-upload-pack-request\r\n\r\n".encode())
    writer.write(f"0045want {tip} multi_ack_detailed\n0000{more}".encode())
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()


@asynccontextmanager
async def listening(handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """An HTTP server of one handler, on a free port; its URL."""
    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
