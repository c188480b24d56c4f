"""The answers of the stand-in, header by header, against what the real Hub was seen to say."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.hub import LFS, Content, Hub, Limits, User, git_blob_sha1
from tests.hub.content import Memory
from tests.hub.raw_client import Answer, ask, fetch

GOOD = {"Authorization": "Bearer hf_good"}
STRANGER = {"Authorization": "Bearer hf_stranger"}


def told(answer: Answer) -> tuple[int, str | None, str | None]:
    return answer.status, answer.headers.get("x-error-code"), answer.headers.get("x-error-message")


async def signed(hub: Hub, path: str = "/org/m/resolve/main/model.bin") -> str:
    return (await fetch(hub.url + path, "HEAD")).headers["location"]


async def test_plain_file_of_a_public_repo_takes_the_way_over_resolve_cache(hub: Hub) -> None:
    commit = hub.repo("org/m").commit({"a b/ü#.json": b"{}"})
    path = f"/org/m/resolve/main/{quote('a b/ü#.json')}"
    first = await fetch(hub.url + path)
    location = first.headers["location"]
    assert first.status == 307
    assert location.startswith(f"/api/resolve-cache/models/org/m/{commit}/a%20b/")
    assert first.headers["x-repo-commit"] == commit
    assert int(first.headers["content-length"]) == len(first.body) > 100
    assert "etag" not in first.headers
    oid = git_blob_sha1(Memory(b"{}"))
    assert location.endswith(f"=&etag=%22{oid}%22")
    second = await fetch(hub.url + location)
    assert (second.status, second.body, second.headers["etag"]) == (200, b"{}", f'"{oid}"')
    assert second.headers["x-repo-commit"] == commit
    head = await fetch(hub.url + location, "HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "2")


@pytest.mark.parametrize(("repo_id", "private", "gated"), [("gpt2", False, False), ("o/p", True, False), ("o/g", False, True)])
async def test_other_plain_files_come_directly(hub: Hub, repo_id: str, private: bool, gated: bool) -> None:
    hub.users["hf_good"] = User("bob", {repo_id})
    commit = hub.repo(repo_id, private=private, gated=gated).commit({"a.txt": b"hello"})
    got = await fetch(f"{hub.url}/{repo_id}/resolve/main/a.txt", headers=GOOD)
    assert (got.status, got.body, got.headers["x-repo-commit"]) == (200, b"hello", commit)


async def test_an_empty_file_comes_directly(hub: Hub) -> None:
    hub.repo("org/m").commit({"empty": b""})
    got = await fetch(f"{hub.url}/org/m/resolve/main/empty")
    assert (got.status, got.headers["content-length"]) == (200, "0")
    assert got.headers["etag"] == '"e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"'


async def test_every_spelling_of_a_revision_and_kind_is_routed(hub: Hub) -> None:
    for kind, prefix in (("models", ""), ("datasets", "/datasets"), ("spaces", "/spaces")):
        repo = hub.repo("one", kind)  # type: ignore[arg-type]
        commit = repo.commit({"a/b.txt": b"x"})
        repo.ref("refs/pr/1", commit)
        repo.ref("refs/convert/parquet", commit)
        repo.move("feat/x", commit)
        spellings = ("main", "HEAD", commit, commit[:7], "refs%2Fpr%2F1", "refs/pr/1", "refs/convert/parquet", "feat%2Fx")
        for revision in spellings:
            got = await fetch(f"{hub.url}{prefix}/one/resolve/{revision}/a/b.txt", "HEAD")
            assert (got.status, got.headers["x-repo-commit"]) == (200, commit), (kind, revision)
            tree = await fetch(f"{hub.url}/api/{kind}/one/tree/{revision}/a")
            assert json.loads(tree.body)[0]["path"] == "a/b.txt", (kind, revision)


@pytest.mark.parametrize("xet", [True, False])
async def test_lfs_file_is_a_signed_redirect_to_the_other_origin(xet: bool) -> None:
    content = Content(3_000_000, 5)
    async with Hub(xet=xet) as hub:
        commit = hub.repo("org/m").commit({"model.bin": LFS(content)})
        got = await fetch(f"{hub.url}/org/m/resolve/main/model.bin")
        assert got.status == 302
        assert got.headers["location"].startswith(hub.cdn_url + "/")
        assert got.headers["x-linked-size"] == "3000000"
        assert got.headers["x-linked-etag"] == f'"{content.sha256}"'
        assert got.headers["x-repo-commit"] == commit
        assert ("x-xet-hash" in got.headers) is xet
        if xet:
            assert got.headers["link"].startswith(f"<{hub.url}/api/models/org/m/xet-read-token/{commit}>; rel=")
        body = await fetch(got.headers["location"])
        assert body.body == content.bytes()
        assert body.headers["etag"] not in (f'"{content.sha256}"', f'"{got.headers.get("x-xet-hash")}"')
        assert len(body.headers["etag"]) == 66
        pointer = await fetch(f"{hub.url}/org/m/raw/main/model.bin")
        assert pointer.body.decode().split()[3:] == [f"sha256:{content.sha256}", "size", "3000000"]


async def test_cdn_answers_ranges_and_validators_correctly(hub: Hub) -> None:
    content = Content(3_000_000)
    hub.repo("org/m").commit({"model.bin": LFS(content)})
    url = await signed(hub)
    etag = (await fetch(url, "HEAD")).headers["etag"]
    for header, start, stop in (("0-0", 0, 1), ("1048570-1048580", 1048570, 1048581), ("-7", 2_999_993, 3_000_000)):
        got = await fetch(url, headers={"Range": f"bytes={header}", "If-Range": etag})
        assert (got.status, got.body) == (206, content.bytes(start, stop))
        assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/3000000"
    beyond = await fetch(url, headers={"Range": "bytes=3000000-"})
    assert (beyond.status, beyond.headers["content-range"]) == (416, "bytes */3000000")
    changed = await fetch(url, headers={"Range": "bytes=5-", "If-Range": '"other"'})
    assert (changed.status, len(changed.body)) == (200, 3_000_000)
    assert (await fetch(url, headers={"If-None-Match": etag})).status == 304


async def test_cdn_refuses_requoted_late_unsigned_and_authorized_requests(hub: Hub) -> None:
    now = 1_000_000.0
    hub.world.clock = lambda: now
    hub.repo("org/m").commit({"model.bin": LFS(b"x" * 100)})
    url = await signed(hub)
    assert "UTF-8%27%27model.bin" in url
    assert (await fetch(url)).status == 200
    assert (await fetch(url.replace("%27", "'"))).status == 403
    assert (await fetch(url.partition("&Signature")[0])).status == 403
    refused = await fetch(url, headers=GOOD)
    assert refused.status == 400
    assert [one.header("authorization") for one in hub.log.find("cdn") if one.status == 400] == ["Bearer hf_good"]
    now += hub.world.url_ttl_s
    late = await fetch(url)
    assert (late.status, late.headers["content-type"]) == (403, "application/xml")
    assert (await fetch(await signed(hub))).status == 200


async def test_resolve_answers_304_to_a_known_etag(hub: Hub) -> None:
    hub.repo("org/m").commit({"a.txt": b"a", "b.bin": LFS(b"b")})
    files = hub.repo("org/m").commits[hub.repo("org/m").refs["refs/heads/main"]].files
    for name, file in files.items():
        got = await fetch(f"{hub.url}/org/m/resolve/main/{name}", headers={"If-None-Match": f'"{file.etag}"'})
        assert (got.status, got.headers["x-repo-commit"]) == (304, hub.repo("org/m").refs["refs/heads/main"])
    raw = await fetch(f"{hub.url}/org/m/raw/main/a.txt", headers={"If-None-Match": f'"{files["a.txt"].etag}"'})
    assert (raw.status, raw.body) == (200, b"a")


async def test_text_is_compressed_for_those_who_take_it(hub: Hub) -> None:
    text = "hello world\n" * 500
    hub.repo("org/m").commit({"a.txt": text})
    url = hub.url + (await fetch(f"{hub.url}/org/m/resolve/main/a.txt", "HEAD")).headers["location"]
    packed = await fetch(url, headers={"Accept-Encoding": "gzip, deflate"})
    assert gzip.decompress(packed.body).decode() == text
    assert (packed.headers["content-encoding"], "content-length" in packed.headers) == ("gzip", False)
    for refuses in ("identity", "gzip;q=0", "gzip, identity"):
        plain = await fetch(url, headers={"Accept-Encoding": refuses})
        assert (plain.body.decode(), plain.headers["content-length"]) == (text, "6000")


async def test_errors_are_told_in_headers_as_the_hub_tells_them(hub: Hub) -> None:
    hub.users["hf_good"], hub.users["hf_stranger"] = User("bob", {"org/p", "org/g"}), User("eve")
    commit = hub.repo("org/m").commit({"a": b"a"})
    hub.repo("org/p", private=True).commit({"a": b"a"})
    hub.repo("org/g", gated="manual").commit({"a": b"a"})
    hub.repo("org/d").disabled = True
    nobody: dict[str, str] = {}
    anonymous = (401, None, "Invalid username or password.")
    missing = (404, "RepoNotFound", "Repository not found")
    for name in ("org/none", "org/p"):
        for url in (f"/{name}/resolve/main/a", f"/api/models/{name}", f"/api/models/{name}/tree/main"):
            assert told(await fetch(hub.url + url, headers=nobody)) == anonymous
            assert told(await fetch(hub.url + url, headers=STRANGER)) == missing
    assert (await fetch(f"{hub.url}/org/p/resolve/main/a", headers=GOOD)).body == b"a"
    for headers, status in ((nobody, 401), (STRANGER, 403)):
        for url in ("/org/g/resolve/main/a", "/api/models/org/g/auth-check"):
            assert told(await fetch(hub.url + url, headers=headers))[:2] == (status, "GatedRepo")
        for url in ("/api/models/org/g", "/api/models/org/g/tree/main", "/api/models/org/g/refs"):
            assert (await fetch(hub.url + url, headers=headers)).status == 200
    assert (await fetch(f"{hub.url}/api/models/org/g/auth-check", headers=GOOD)).status == 200
    no_revision = await fetch(f"{hub.url}/org/m/resolve/nope/a")
    assert told(no_revision) == (404, "RevisionNotFound", "Invalid rev id: nope")
    for method in ("HEAD", "GET"):
        no_entry = await fetch(f"{hub.url}/org/m/resolve/main/nope", method)
        assert told(no_entry) == (404, "EntryNotFound", "Entry not found")
        assert no_entry.headers["x-repo-commit"] == commit
    assert told(await fetch(f"{hub.url}/api/models/org/m/tree/main/nope"))[:2] == (404, "EntryNotFound")
    disabled = await fetch(f"{hub.url}/org/d/resolve/main/a")
    assert told(disabled) == (403, None, "Access to this resource is disabled.")
    unknown = await fetch(f"{hub.url}/org/m/resolve/main/a", headers={"Authorization": "Bearer hf_unknown"})
    assert told(unknown) == (401, None, "Invalid credentials in Authorization header")
    hub.repo("org/m").delete()
    assert told(await fetch(f"{hub.url}/org/m/resolve/main/a")) == anonymous


async def test_renamed_and_wrongly_cased_repos_redirect(hub: Hub) -> None:
    repo = hub.repo("org/old")
    repo.commit({"a": b"a", "b": LFS(b"b")})
    repo.rename("org/New")
    for name in ("org/old", "org/new"):
        for path, wanted in (
            (f"/{name}/resolve/main/a?x=1", "/org/New/resolve/main/a?x=1"),
            (f"/api/models/{name}", "/api/models/org/New"),
        ):
            got = await fetch(hub.url + path)
            assert (got.status, got.headers["location"]) == (307, wanted)
            assert "etag" not in got.headers
    assert (await fetch(await signed(hub, "/org/New/resolve/main/b"))).body == b"b"


async def test_info_is_cut_at_1000_files_and_tree_pages_are_linked(hub: Hub) -> None:
    files = {f"d{number % 3}/{number:04}.txt": b"x" for number in range(1200)}
    commit = hub.repo("org/m").commit(files)
    info = json.loads((await fetch(f"{hub.url}/api/models/org/m/revision/main?blobs=true")).body)
    assert (info["sha"], len(info["siblings"])) == (commit, 1000)
    assert info["siblings"][0].keys() == {"rfilename", "size", "blobId"}
    for query, sizes in (("recursive=true", [1000, 203]), ("recursive=true&limit=500", [500, 500, 203])):
        url, seen, paths = f"{hub.url}/api/models/org/m/tree/main?{query}", [], set()
        while url:
            page = await fetch(url)
            entries = json.loads(page.body)
            seen.append(len(entries))
            paths |= {one["path"] for one in entries}
            url = page.headers["link"].partition(">")[0][1:] if "link" in page.headers else ""
            assert not url or url.startswith(f"{hub.url}/api/models/org/m/tree/main?recursive=true")
        assert (seen, paths) == (sizes, {*files, "d0", "d1", "d2"})
    expanded = json.loads((await fetch(f"{hub.url}/api/models/org/m/tree/main?recursive=true&expand=true")).body)
    assert len(expanded) == 50
    assert expanded[1]["lastCommit"]["id"] == commit


async def test_paths_info_takes_form_and_json(hub: Hub) -> None:
    hub.repo("org/m").commit({"a b.txt": b"x", "d/big": LFS(b"big")})
    url = f"{hub.url}/api/models/org/m/paths-info/main"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    one = await fetch(url, "POST", form, b"paths=a+b.txt&paths=d&paths=none&paths=d%2Fbig")
    two = await fetch(url, "POST", {"Content-Type": "application/json"}, b'{"paths":["a b.txt","d","none","d/big"]}')
    assert one.body == two.body
    entries = {entry["path"]: entry for entry in json.loads(one.body)}
    assert {path: entry["type"] for path, entry in entries.items()} == {"a b.txt": "file", "d": "directory", "d/big": "file"}
    assert len(entries["d/big"]["xetHash"]) == 64
    assert entries["d/big"]["lfs"]["size"] == 3


async def test_xet_hashes_of_a_gated_repo_are_hidden_from_strangers(hub: Hub) -> None:
    hub.users["hf_good"] = User("bob", {"org/g"})
    hub.repo("org/g", gated="auto").commit({"big": LFS(b"big")})
    url = f"{hub.url}/api/models/org/g/tree/main"
    assert json.loads((await fetch(url)).body)[0]["xetHash"] == "*" * 64
    assert "*" not in json.loads((await fetch(url, headers=GOOD)).body)[0]["xetHash"]


async def test_small_endpoints(hub: Hub) -> None:
    hub.users["hf_good"] = User("bob", {"org/p"})
    repo = hub.repo("org/m")
    first, second = repo.commit({"a": b"1", "l": LFS(b"lfs")}), repo.commit({"a": b"2"}, title="second")
    repo.tag("v1", first)
    repo.ref("refs/pr/3", first)
    hub.repo("org/p", private=True).commit({"a": b"1"})
    refs = json.loads((await fetch(f"{hub.url}/api/models/org/m/refs?include_prs=1")).body)
    assert refs["branches"] == [{"name": "main", "ref": "refs/heads/main", "targetCommit": second}]
    assert (refs["tags"][0]["name"], refs["converts"], refs["pullRequests"][0]["name"]) == ("v1", [], "3")
    page = await fetch(f"{hub.url}/api/models/org/m/commits/main?limit=1")
    assert [one["id"] for one in json.loads(page.body)] == [second]
    older = await fetch(page.headers["link"].partition(">")[0][1:])
    assert [one["id"] for one in json.loads(older.body)] == [first]
    assert page.headers["x-total-count"] == "2"
    assert json.loads((await fetch(f"{hub.url}/api/whoami-v2", headers=GOOD)).body)["name"] == "bob"
    assert (await fetch(f"{hub.url}/api/whoami-v2")).status == 401
    assert json.loads((await fetch(f"{hub.url}/api/agent-harnesses")).body)["harnesses"] == {}
    for headers, ids in (({}, ["org/m"]), (GOOD, ["org/m", "org/p"])):
        listed = json.loads((await fetch(f"{hub.url}/api/models?search=ORG", headers=headers)).body)
        assert [one["id"] for one in listed] == ids
    token = await fetch(f"{hub.url}/api/models/org/m/xet-read-token/{second}")
    assert json.loads(token.body)["casUrl"] == token.headers["x-xet-cas-url"]
    wanted = {
        "operation": "download",
        "objects": [{"oid": repo.commits[first].files["l"].sha256, "size": 3}, {"oid": "0" * 64, "size": 1}],
    }
    batch = await fetch(f"{hub.url}/org/m.git/info/lfs/objects/batch", "POST", {}, json.dumps(wanted).encode())
    known, unknown = json.loads(batch.body)["objects"]
    assert (await fetch(known["actions"]["download"]["href"])).body == b"lfs"
    assert unknown["error"]["code"] == 404
    assert (await fetch(f"{hub.url}/nothing")).status == 404


async def test_rate_limits_are_announced_and_if_wanted_enforced(hub: Hub) -> None:
    now = 3000.0
    hub.world.clock = lambda: now
    hub.repo("gpt2").commit({"a": b"a"})
    url = f"{hub.url}/gpt2/resolve/main/a"
    assert (await fetch(url)).headers["ratelimit"] == '"resolvers";r=2999;t=300'
    hub.limits = Limits(resolvers=2, enforce=True)
    now += 10
    answers = [await fetch(url) for _ in range(3)]
    assert [one.status for one in answers] == [200, 200, 429]
    assert answers[2].headers["ratelimit"] == '"resolvers";r=0;t=290'
    assert answers[2].headers["ratelimit-policy"] == '"fixed window";"resolvers";q=2;w=300'
    assert answers[2].headers["retry-after"] == "290"
    assert (await fetch(f"{hub.url}/api/models/gpt2")).status == 200
    now += 290
    assert (await fetch(url)).status == 200


async def test_counters_log_and_gauges_are_exact(hub: Hub) -> None:
    content = Content(3_000_000)
    hub.repo("org/m").commit({"model.bin": LFS(content), "sub/other.bin": LFS(b"other")})
    url = await signed(hub)
    hub.counters.reset()
    for span in ("0-9", "100-199", "0-"):
        await fetch(url, headers={"Range": f"bytes={span}"})
    await fetch(await signed(hub, "/org/m/resolve/main/sub/other.bin"))
    await fetch(url, "HEAD")
    assert hub.counters.requests("cdn") == 5
    assert hub.counters.requests("cdn", method="GET", match="model.bin") == 3
    assert hub.counters.bytes("cdn", match="model.bin") == 3_000_110
    assert hub.counters.bytes("cdn", match="org/m/sub/other.bin") == 5
    assert hub.counters.bytes("hub") == 0
    assert [one.sent for one in hub.log.find("cdn", match="model.bin")] == [10, 100, 3_000_000, 0]
    await hub.until(lambda: hub.active("cdn") == 0)
    assert hub.peak("cdn") == 1


async def test_bytes_of_an_aborted_transfer_are_counted_as_sent(hub: Hub, tmp_path: Path) -> None:
    """What the client's side of the connection could not take was not counted."""
    size = 256 << 20
    with (tmp_path / "big").open("wb") as handle:
        handle.truncate(size)
    hub.repo("org/m").commit({"made.bin": LFS(Content(size)), "disk.bin": LFS(tmp_path / "big")})
    for name in ("made.bin", "disk.bin"):
        conversation = await ask(await signed(hub, f"/org/m/resolve/main/{name}"))
        await conversation.reader.readexactly(1 << 20)
        assert hub.active("cdn") == 1
        await conversation.close()
        await hub.until(lambda: hub.active("cdn") == 0)
        record = hub.log.find("cdn", match=name)[0]
        assert record.aborted
        assert 1 << 20 <= record.sent == hub.counters.bytes("cdn", match=name) < 32 << 20


async def test_a_file_on_disk_is_served_whole_and_in_parts(hub: Hub, tmp_path: Path) -> None:
    content = Content(2_500_000)
    (tmp_path / "f").write_bytes(content.bytes())
    hub.repo("org/m").commit({"model.bin": LFS(tmp_path / "f")})
    url = await signed(hub)
    assert (await fetch(url)).body == content.bytes()
    assert (await fetch(url, headers={"Range": "bytes=1000000-1999999"})).body == content.bytes(1_000_000, 2_000_000)
    hub.cap(per_connection=500e6, total=400e6)
    assert (await fetch(url)).body == content.bytes()
    assert hub.counters.bytes("cdn") == 6_000_000


async def test_the_hub_dies_and_returns_on_the_same_ports(hub: Hub) -> None:
    hub.repo("org/m").commit({"model.bin": LFS(Content(64 << 20))})
    url, where = await signed(hub), (hub.url, hub.cdn_url)
    conversation = await ask(url)
    await conversation.reader.readexactly(1000)
    await hub.stop()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await conversation.reader.readexactly(64 << 20)
    await conversation.close()
    for origin in where:
        with pytest.raises(ConnectionRefusedError):
            await fetch(origin)
    await hub.start()
    assert (hub.url, hub.cdn_url) == where
    assert len((await fetch(url, headers={"Range": "bytes=0-99"})).body) == 100
