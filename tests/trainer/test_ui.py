"""`neartune ui` over real sockets: who may ask, recipes as texts, jobs that outlive the page, runs as they lie on disk."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from yarl import URL

from neartune import lock, recipe
from neartune.records import runs
from neartune.ui import jobs, server, texts
from neartune.ui.answers import Answers, Serving
from neartune.ui.jobs import ENDED, RUNNING, WAITING, Job, Jobs, JobsError
from tests.trainer import served
from tests.trainer.bases import FACTS, ROOT, TRAINER, environment, write_jsonl
from tests.trainer.made import made_run

STATIC = TRAINER / "neartune" / "ui" / "static"
PRESET = """# What is learnt, from what.
base_model: ./llama
train_data: ./facts.jsonl   # sums

train_batch_size: 4
micro_batch_size: 4
processes: 1
max_steps: 4
"""


@pytest.fixture
def presets(llama: Path, tmp_path: Path) -> Path:
    """A directory of one recipe, whose paths are relative to it."""
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "llama").symlink_to(llama)
    write_jsonl(folder / "facts.jsonl", FACTS)
    (folder / "tiny.yaml").write_text(PRESET)
    return folder


def names_in(folder: Path, glob: str) -> list[str]:
    return sorted(file.name for file in folder.rglob(glob))


async def until(look: Callable[[], Awaitable[bool]]) -> None:
    """What another process does is seen by looking again."""
    while not await look():  # noqa: ASYNC110
        await asyncio.sleep(0.1)


class Page:
    """The server in this process and loop, and a client that has its cookie."""

    def __init__(self, home: Path, presets: Path) -> None:
        self.said: list[str] = []
        self.app = server.application(home, presets, self.said.append)

    async def __aenter__(self) -> Page:
        self._runner, address = await server.listen(self.app, "127.0.0.1", 0)
        self.url, _, self.token = address.partition("/?token=")
        self.session = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))  # of an address, not of a name
        async with self.session.get(address) as response:
            assert response.status == 200
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()
        await self._runner.cleanup()

    async def get(self, path: str, **query: str) -> tuple[int, Any]:
        async with self.session.get(f"{self.url}/api/{path}", params=query) as response:
            return response.status, await response.json()

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        headers = {"Origin": self.url}
        async with self.session.post(f"{self.url}/api/{path}", json=body, headers=headers) as response:
            return response.status, await response.json()

    async def status(self, method: str, path: str, cookies: bool = True, **headers: str) -> int:
        jar = None if cookies else aiohttp.DummyCookieJar()
        session = self.session if cookies else aiohttp.ClientSession(cookie_jar=jar)
        given = {"json": {"preset": "tiny.yaml", "text": PRESET}} if method == "POST" else {}
        try:
            async with session.request(method, URL(f"{self.url}{path}", encoded=True), headers=headers, **given) as response:
                return response.status
        finally:
            if not cookies:
                await session.close()


@pytest_asyncio.fixture
async def page(tmp_path: Path, presets: Path) -> AsyncIterator[Page]:
    (tmp_path / "home").mkdir()
    async with Page(tmp_path / "home", presets) as page:
        yield page


# — who may ask ——————————————————————————————————————————————————————————————————————————————————


async def test_without_the_token_nothing_is_answered(page: Page) -> None:
    paths = ("/", "/static/app.js", "/api/runs", "/api/presets", "/report?name=a", "/?token=", "/?token=falsch")
    assert [await page.status("GET", path, cookies=False) for path in paths] == [403] * len(paths)
    assert await page.status("POST", "/api/check", cookies=False, Origin=page.url) == 403
    assert await page.status("GET", f"/api/runs?token={page.token}", cookies=False) == 403  # it opens the page only
    assert await page.status("GET", "/api/runs") == 200


async def test_the_cookie_is_for_this_server_alone_and_no_script_sees_it(page: Page) -> None:
    async with page.session.get(f"{page.url}/?token={page.token}") as response:
        port = page.url.rpartition(":")[2]
        name, _, flags = response.headers["Set-Cookie"].partition("=")
        assert name == f"neartune-{port}"
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {flag.strip() for flag in flags.split(";")}
        assert "Max-Age" not in flags


async def test_a_page_of_another_name_or_origin_is_refused(page: Page) -> None:
    port = page.url.rpartition(":")[2]
    cookie = {"Cookie": f"neartune-{port}={page.token}"}
    assert await page.status("GET", "/api/runs", cookies=False, **cookie, Host=f"localhost:{port}") == 200
    assert await page.status("GET", "/api/runs", cookies=False, **cookie, Host=f"evil.example:{port}") == 403
    crossed = {"Sec-Fetch-Site": "cross-site"}
    assert await page.status("GET", "/api/runs", **crossed) == 403
    assert await page.status("POST", "/api/check", Origin=page.url) == 200
    assert await page.status("POST", "/api/check", Origin="http://evil.example") == 403
    assert await page.status("POST", "/api/check") == 403


@pytest.mark.parametrize(
    ("header", "is_known"),
    [
        ("127.0.0.1:8092", True),
        ("localhost:9999", True),
        ("[::1]:8092", True),
        ("10.0.0.7", True),
        ("trainer.lan:8092", True),
        ("TRAINER.lan", True),
        ("evil.example:8092", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("", False),
    ],
)
def test_only_addresses_and_the_name_that_was_listened_on_are_known_hosts(header: str, is_known: bool) -> None:
    assert server.is_known_host(header, "trainer.lan") == is_known


@pytest.mark.parametrize(
    ("method", "more", "has_token", "why"),
    [
        ("GET", {}, True, None),
        ("GET", {}, False, "token"),
        ("GET", {"Sec-Fetch-Site": "none"}, True, None),
        ("GET", {"Sec-Fetch-Site": "same-site"}, True, "origin"),
        ("POST", {}, True, "origin"),
        ("POST", {"Sec-Fetch-Site": "same-origin"}, True, None),
        ("POST", {"Origin": "http://127.0.0.1:1"}, True, None),
        ("POST", {"Origin": "http://127.0.0.1:2"}, True, "origin"),
        ("POST", {"Origin": "null", "Sec-Fetch-Site": "same-origin"}, True, "origin"),
        ("DELETE", {}, True, "origin"),
        ("POST", {"Origin": "http://127.0.0.1:1"}, False, "token"),
    ],
)
def test_what_changes_something_comes_from_the_page_itself(
    method: str, more: dict[str, str], has_token: bool, why: str | None
) -> None:
    headers = {"Host": "127.0.0.1:1"} | more
    assert server.refusal(method, "/api/x", headers, "127.0.0.1", has_token=has_token) == why


async def test_every_answer_forbids_scripts_of_others(page: Page) -> None:
    for path in ("/", "/static/app.js", "/api/runs", "/api/nothing"):
        async with page.session.get(f"{page.url}{path}") as response:
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
            assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Referrer-Policy"] == "no-referrer"


async def test_a_request_of_unusual_size_or_kind_is_refused(page: Page) -> None:
    assert (await page.post("check", preset="tiny.yaml", text="#" * server.TEXT))[0] == 200
    assert (await page.post("check", preset="tiny.yaml", text="#" * (server.TEXT + 1)))[0] == 413
    assert (await page.post("check", preset="tiny.yaml", text="#" * server.BODY))[0] == 413
    assert (await page.post("check", preset="tiny.yaml"))[0] == 400
    assert (await page.post("check", preset="tiny.yaml", text="\ud800"))[0] == 400
    headers = {"Origin": page.url, "Content-Type": "text/plain"}  # a form of another page could send it
    async with page.session.post(f"{page.url}/api/check", data="{}", headers=headers) as response:
        assert response.status == 415


# — recipes ——————————————————————————————————————————————————————————————————————————————————————


def test_every_preset_that_is_shipped_can_be_started_as_it_is() -> None:
    found = texts.presets(texts.shipped_presets())
    assert {"config.yaml", "configs/opt.yaml", "configs/image-classification.yaml"} <= set(found)
    for name, file in found.items():
        assert texts.check(file.read_text(), file).complaints == (), name


def test_an_installed_package_has_the_presets_and_the_page() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {"neartune.ui", "neartune.presets"} <= set(tool["packages"])
    assert tool["package-dir"]["neartune.presets"] == "trainer"
    shipped = {file for glob in tool["package-data"]["neartune.presets"] for file in TRAINER.glob(glob)}
    for file in texts.presets(TRAINER).values():
        loaded = recipe.load(file).recipe
        local = [Path(source.name) for source in loaded.train_data if source.is_path]
        assert {file, *(path.resolve() for path in local)} <= shipped
    page = {file for glob in tool["package-data"]["neartune.ui"] for file in (TRAINER / "neartune" / "ui").glob(glob)}
    assert page == set(STATIC.iterdir())


async def test_complaints_are_the_command_lines_at_their_lines(page: Page, presets: Path) -> None:
    text = PRESET.replace("processes: 1", "lora_rnk: 4\nlearning_rate: 7").replace("./facts", "./fact")
    file = presets / "broken.yaml"
    file.write_text(text)
    with pytest.raises(recipe.RecipeError) as raised:
        recipe.load(file)
    file.unlink()
    _, found = await page.post("check", preset="tiny.yaml", text=text)
    told = [f"{file}:{one['line']}: {one['text']}" for one in found["complaints"]]
    assert sorted(told) == sorted(raised.value.complaints)
    assert {one["line"]: one["text"] for one in found["complaints"]}[7].endswith("did you mean lora_rank?")
    _, found = await page.post("check", preset="tiny.yaml", text="train_data: ./facts.jsonl\n")
    assert [(one["line"], one["text"].partition(":")[0]) for one in found["complaints"]] == [(None, "base_model is missing")]
    _, found = await page.post("check", preset="tiny.yaml", text="base_model: [\n")
    assert found["complaints"][0]["line"] == 2
    _, found = await page.post("check", preset="tiny.yaml", text="a: " + "[" * 1200)
    assert len(found["complaints"]) == 1
    _, found = await page.post("check", preset="tiny.yaml", text=f"{PRESET}lora_rank: 4\n")
    assert (found["complaints"], len(found["advice"])) == ([], 1)


@pytest.mark.parametrize(
    "sources",
    [
        "./facts.jsonl   # sums",
        "'./facts.jsonl'",
        "[./facts.jsonl, nobody/facts]",
        "\n  - ./facts.jsonl   # sums\n  - path: ./facts.jsonl\n    weight: 2.5\n  - nobody/facts   # of the Hub",
        "{path: ./facts.jsonl, weight: 2}",
    ],
)
def test_a_recipe_means_the_same_where_it_is_written(presets: Path, tmp_path: Path, sources: str) -> None:
    rest = "output_dir: ./run   # here\naccelerate_config: null\nvalidation_data: null\nbase_model: ./llama\n"
    text = f"# first\ntrain_data: {sources}\n{rest}max_steps: 4\n"
    output = tmp_path / "home 家" / "it's"
    written = texts.grounded(text, presets, output)
    meant = recipe.load(presets / "tiny.yaml", [f"output_dir={output}"], text=text).recipe
    assert recipe.load(tmp_path / "elsewhere" / "x.yaml", text=written).recipe == meant
    assert len(written.splitlines()) == len(text.splitlines())
    assert [line.partition("#")[2] for line in written.splitlines()] == [line.partition("#")[2] for line in text.splitlines()]
    without = text.replace("output_dir: ./run   # here\n", "")
    assert recipe.load(tmp_path / "x.yaml", text=texts.grounded(without, presets, output)).recipe == meant


async def test_a_plan_is_that_of_the_command_line_and_leaves_nothing(page: Page, tmp_path: Path) -> None:
    status, plan = await page.post("plan", preset="tiny.yaml", text=PRESET)
    assert (status, plan["steps"], plan["rows"] + plan["held_out"]) == (200, 4, len(FACTS))
    assert plan["learnt"] == sum(kind["parameters"] for kind in plan["kinds"])
    origins = {setting["name"]: setting["origin"] for setting in plan["settings"]}
    assert (origins["max_steps"], origins["lora_rank"]) == ("recipe.yaml:8", "default")
    assert names_in(tmp_path / "home", "*") == [".ui", "jobs", "lock"]
    status, found = await page.post("plan", preset="tiny.yaml", text=PRESET.replace("4", "many"))
    assert (status, found["error"], found["values"]["complaints"][0]["line"]) == (422, "recipe", 5)


# — names and paths ——————————————————————————————————————————————————————————————————————————————


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/x", ".x", "-x", "a b", "x" * 65, "a\n", "a.yaml", "a.log", "a\0"]
)
async def test_a_name_that_could_lead_elsewhere_starts_nothing(page: Page, tmp_path: Path, name: str) -> None:
    status, found = await page.post("start", preset="tiny.yaml", text=PRESET, name=name, at_once=False)
    assert (status, found["error"]) == (422, "name")
    assert names_in(tmp_path, "*.yaml") == ["tiny.yaml"]


async def test_nothing_outside_the_directory_of_runs_is_shown(page: Page, llama: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for place in (tmp_path / "outside", home / ".hidden", home / "inside"):
        place.mkdir()
        (place / "run.json").write_text("{}")
        (place / "report.html").write_text("<p>secret")
    (home / "link").symlink_to(tmp_path / "outside")
    for name in ("../outside", str(tmp_path / "outside"), "link", ".hidden", "inside/../../outside", "", "in\0side"):
        for path in ("run", "metrics", "log"):
            assert (await page.get(path, name=name))[0] == 404, (path, name)
        assert (await page.get("compare", a=name, b="inside"))[0] == 404
        assert (await page.post("continue", name=name, at_once=True))[0] == 404
        assert await page.status("GET", str(URL("/report").with_query(name=name))) == 404
    assert (await page.get("run", name="inside"))[1]["state"] == "damaged"
    for name in ("../server.py", "..%2fserver.py", "%2e%2e/server.py"):
        assert await page.status("GET", f"/static/{name}") == 404


async def test_what_is_there_is_not_written_over(page: Page, tmp_path: Path) -> None:
    (tmp_path / "home" / "one").mkdir()
    (tmp_path / "home" / "two.yaml").write_text("mine")
    for name in ("one", "two"):
        status, found = await page.post("start", preset="tiny.yaml", text=PRESET, name=name, at_once=False)
        assert (status, found["error"]) == (409, "taken")
    assert (tmp_path / "home" / "two.yaml").read_text() == "mine"
    assert not (tmp_path / "home" / "one.yaml").exists()


# — runs as they lie on disk —————————————————————————————————————————————————————————————————————


@pytest.fixture
def home(llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two finished runs."""
    for name in ("a", "ab"):
        shutil.copytree(served.made_runs(llama, tmp_path_factory) / name, tmp_path / "home" / name)
    return tmp_path / "home"


async def test_runs_are_shown_and_compared_as_the_command_line_does(home: Path, presets: Path) -> None:
    async with Page(home, presets) as page:
        _, found = await page.get("runs")
        run, other = (runs.read(home / name, name) for name in ("a", "ab"))
        by_name = {one["name"]: one for one in found["runs"]}
        expected = json.loads(json.dumps(run.brief())) | {"served": [], "job": None}
        assert by_name["a"] == expected and set(by_name) == {"a", "ab"}
        _, shown = await page.get("run", name="a")
        assert (shown["state"], shown["has_report"], shown["can_continue"]) == ("finished", True, False)
        _, compared = await page.get("compare", a="a", b="ab")
        told = json.loads(json.dumps(runs.compare(run, other)))
        assert {key: compared[key] for key in told} == told
        status, refused = await page.post("continue", name="a", at_once=False)
        assert (status, refused["error"]) == (409, "finished")
        assert (await page.post("stop", name="a"))[1]["error"] == "not_running"


async def test_a_run_that_a_shell_began_is_seen_running_and_not_continued(tmp_path: Path, presets: Path) -> None:
    made_run(tmp_path / "home" / "half", losses=(), is_finished=False)
    made_run(tmp_path / "home" / "later", losses=(), is_finished=False)
    async with Page(tmp_path / "home", presets) as page:

        async def states() -> list[tuple[str, bool]]:
            _, found = await page.get("runs")
            _, shown = await page.get("run", name="half")
            return [(run["state"], shown["can_continue"]) for run in found["runs"] if run["name"] == "half"]

        async def names() -> list[str]:
            return [run["name"] for run in (await page.get("runs"))[1]["runs"]]

        os.utime(tmp_path / "home" / "later" / "run.json", (2e9, 2e9))
        assert await states() == [("unfinished", True)]
        with lock.held(tmp_path / "home" / "half", lambda line: None):
            assert await states() == [("running", False)]
            assert (await names())[0] == "half", "what is under way stands first"
            status, refused = await page.post("continue", name="half", at_once=True)
            assert (status, refused["error"]) == (409, "running")
        assert await states() == [("unfinished", True)], "though none of its files has changed"


async def test_metrics_come_by_offset_and_a_number_that_json_lacks_is_null(home: Path, presets: Path) -> None:
    file = home / "a" / "metrics.jsonl"
    whole = [json.loads(line) for line in file.read_text().splitlines()]
    async with Page(home, presets) as page:
        _, found = await page.get("metrics", name="a")
        assert (found["lines"], found["anew"], found["next"]) == (whole, False, file.stat().st_size)
        with file.open("a") as stream:
            stream.write('{"step": 9, "loss": NaN}\n{"step": 10, "lo')
        _, more = await page.get("metrics", name="a", **{"from": str(found["next"])})
        assert more["lines"] == [{"step": 9, "loss": None}]
        assert (await page.get("metrics", name="a", **{"from": "-1"}))[0] == 400


async def test_an_evaluation_of_very_many_classes_does_not_stop_the_curve(home: Path, presets: Path) -> None:
    file = home / "a" / "metrics.jsonl"
    start = file.stat().st_size
    judged = {"kind": "eval", "step": 9, "loss": 0.5, "labels": ["x"] * 800, "confusion": [[0] * 800] * 800}
    with file.open("a") as stream:
        stream.write(f'{{"step": 9, "loss": 0.25}}\n{json.dumps(judged)}\n{{"step": 10, "loss": 0.125}}\n{{"st')
    assert file.stat().st_size - start > server.PIECE
    asked, lines, sizes = str(start), [], []
    async with Page(home, presets) as page:
        more = True
        while more:
            _, found = await page.get("metrics", name="a", **{"from": asked})
            asked, more = str(found["next"]), found["more"]
            lines += found["lines"]
            sizes.append(len(json.dumps(found)))
    assert lines == [{"step": 9, "loss": 0.25}, {"kind": "eval", "step": 9, "loss": 0.5}, {"step": 10, "loss": 0.125}]
    assert max(sizes) < 300


def test_a_file_that_was_cut_back_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b"one\ntwo\nthr")
    assert server.pieces_of(file, 0) == (b"one\ntwo\n", 8, False)
    assert server.pieces_of(file, 4) == (b"two\n", 8, False)
    assert server.pieces_of(file, 0, most=6) == (b"one\n", 4, False)
    assert server.pieces_of(file, 0, most=2) == (b"one\n", 4, False)
    assert server.pieces_of(file, 8, most=2) == (b"", 8, False)
    assert server.pieces_of(file, 5) == (b"one\ntwo\n", 8, True)
    assert server.pieces_of(file, 99) == (b"one\ntwo\n", 8, True)
    assert server.pieces_of(tmp_path / "none", 7) == (b"", 0, True)


async def test_a_report_has_no_right_to_anything(home: Path, presets: Path) -> None:
    async with Page(home, presets) as page:
        async with page.session.get(f"{page.url}/report", params={"name": "a"}) as response:
            assert await response.read() == (home / "a" / "report.html").read_bytes()
            policy = response.headers.getall("Content-Security-Policy")
        assert policy == ["sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"]
        (home / "a" / "report.html").unlink()
        assert await page.status("GET", "/report?name=a") == 404


# — jobs —————————————————————————————————————————————————————————————————————————————————————————


def test_who_begins_next_is_decided_by_when_it_was_asked_for() -> None:
    waits, later, runs_now = Job(WAITING, "", 1.0), Job(WAITING, "", 2.0), Job(RUNNING, "", 0.0, pid=1)
    assert jobs.next_of({"b": later, "a": waits, "c": Job(ENDED, "", 0.0)}) == "a"
    assert jobs.next_of({"a": waits, "c": runs_now}) is None
    assert jobs.next_of({}) is None


@pytest.mark.parametrize(
    ("run", "job", "state"),
    [
        (None, Job(WAITING, "", 0.0), "waiting"),
        ("unfinished", Job(WAITING, "", 0.0), "waiting"),
        (None, Job(RUNNING, "", 0.0, 7), "starting"),
        ("unfinished", Job(RUNNING, "", 0.0, 7), "running"),
        ("finished", Job(RUNNING, "", 0.0, 7), "finished"),
        (None, Job(ENDED, "", 0.0), "stopped"),
        (None, Job(ENDED, "", 0.0, 7, status=143), "stopped"),
        (None, Job(ENDED, "", 0.0, 7, status=4), "failed"),
        ("unfinished", Job(ENDED, "", 0.0, 7, status=143), "unfinished"),
        ("finished", None, "finished"),
    ],
)
def test_what_is_shown_is_of_the_disk_and_of_the_process(run: str | None, job: Job | None, state: str) -> None:
    assert jobs.state_of(run, job) == state


TRAINER_LIKE = "import signal; signal.alarm(60); signal.pause()"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that goes on until a signal, where a training would begin."""
    monkeypatch.setattr(jobs, "command", lambda *words, mirror=(): [sys.executable, "-c", TRAINER_LIKE, *words, *mirror])
    yield


def ended(kept: Jobs, name: str) -> None:
    """Its process has been stopped, and is waited for."""
    kept.stop(name)
    while kept.all[name].state != ENDED:
        kept.tend()


def test_one_trains_at_a_time_unless_asked_otherwise(stand_in: None, tmp_path: Path) -> None:
    kept = Jobs(tmp_path, [], print)
    states = [kept.ask(name, tmp_path / name, at_once=name == "d").state for name in "abcd"]
    assert states == [RUNNING, WAITING, WAITING, RUNNING]
    kept.stop("b")
    ended(kept, "a")
    assert {name: job.state for name, job in kept.all.items()} == {"a": ENDED, "b": ENDED, "c": WAITING, "d": RUNNING}
    ended(kept, "d")
    assert (kept.all["c"].state, kept.all["d"].status, kept.all["b"].pid) == (RUNNING, -signal.SIGTERM, 0)
    ended(kept, "c")
    kept.close()


def test_the_next_page_finds_what_runs_and_what_waits(stand_in: None, tmp_path: Path) -> None:
    kept = Jobs(tmp_path, ["--use_mirror"], print)
    (tmp_path / "a").mkdir()
    kept.ask("a/b", tmp_path / "a.yaml", at_once=False)
    kept.ask("c", tmp_path / "c.yaml", at_once=False)
    with pytest.raises(JobsError, match="another neartune ui"):
        Jobs(tmp_path, [], print)
    kept.close()
    again = Jobs(tmp_path, [], print)
    assert again.all == kept.all
    again.tend()
    assert {name: job.state for name, job in again.all.items()} == {"a/b": RUNNING, "c": WAITING}
    again.stop("c")
    ended(again, "a/b")
    assert again.all["a/b"].status is None  # it is not a child of this page
    kept.stop("c")
    ended(kept, "a/b")
    again.close()


def test_another_process_that_has_the_number_now_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / ".ui" / "jobs").mkdir(parents=True)
    stranger = {"state": RUNNING, "recipe": "", "asked": 0.0, "pid": os.getpid(), "born": 12.0, "status": None}
    (tmp_path / ".ui" / "jobs" / "a.json").write_text(json.dumps(stranger))
    (tmp_path / ".ui" / "jobs" / "b.json").write_text("{")
    said: list[str] = []
    kept = Jobs(tmp_path, [], said.append)
    kept.stop("a")  # else this process had ended here
    kept.tend()
    assert (kept.all["a"].state, list(kept.all), len(said)) == (ENDED, ["a"], 1)
    kept.close()


def test_a_training_outlives_the_page_and_is_stopped_and_continued_by_the_next(presets: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    text = PRESET.replace("max_steps: 4", "max_steps: 20000\nvalidation_split: 0")

    async def has_lines(page: Page) -> bool:
        return bool((await page.get("metrics", name="long"))[1]["lines"])

    async def has_ended(page: Page) -> bool:
        return bool((await page.get("run", name="long"))[1]["job"]["state"] == ENDED)

    async def has_gone_on(page: Page) -> bool:
        return "continued from step" in (await page.get("log", name="long"))[1]["text"]

    async def first(page: Page) -> None:
        status, found = await page.post("start", preset="tiny.yaml", text=text, name="long", at_once=False)
        assert (status, found["state"]) == (201, "starting")
        status, found = await page.post("start", preset="tiny.yaml", text=text, name="next", at_once=False)
        assert (status, found["state"]) == (201, "waiting")
        assert (await page.post("stop", name="next"))[0] == 200
        await until(lambda: has_lines(page))
        assert (await page.get("run", name="long"))[1]["state"] == "running"
        assert (await page.post("continue", name="long", at_once=True))[1]["error"] == "running"

    async def second(page: Page) -> None:
        assert "stopped after step" not in (await page.get("log", name="long"))[1]["text"]
        assert (await page.get("run", name="long"))[1]["state"] == "running"
        assert (await page.get("run", name="next"))[1]["state"] == "stopped"
        await stopped(page)
        assert (await page.get("run", name="long"))[1]["can_continue"]
        assert (await page.post("continue", name="long", at_once=False))[0] == 200
        await until(lambda: has_gone_on(page))
        await stopped(page)

    async def stopped(page: Page) -> None:
        assert (await page.post("stop", name="long"))[0] == 200
        await until(lambda: has_ended(page))
        assert (await page.get("run", name="long"))[1]["state"] == "unfinished"
        assert names_in(home / "long" / "checkpoints", "step-*")

    for work in (first, second):
        asyncio.run(with_process(home, presets, work))


async def with_process(home: Path, presets: Path, work: Any) -> None:
    """`work` with the page of a process of its own, which a terminal's Ctrl-C ends."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "neartune", "ui", "--port", "0", "--runs", str(home), "--presets", str(presets)),
        env=environment(PYTHONPATH=str(TRAINER)),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        address = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", line)
        assert address, line
        page = Page.__new__(Page)
        page.url = address[0].partition("/?token=")[0]
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as page.session:
            async with page.session.get(address[0]) as response:
                assert response.status == 200
            await work(page)
    finally:
        os.killpg(process.pid, signal.SIGINT)  # everything that the page has started in its own session
        rest = (await process.communicate())[0].decode()
    assert (process.returncode, "these go on: long" in rest) == (0, work.__name__ == "first")


def test_the_page_needs_no_torch() -> None:
    code = "import sys, neartune.ui.server as s; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(PYTHONPATH=str(TRAINER))).returncode == 0


# — models ———————————————————————————————————————————————————————————————————————————————————————


async def test_a_server_that_says_a_very_long_line_first_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"print('x' * 200_000); print('listening on http://127.0.0.1:1', flush=True); {TRAINER_LIKE}"
    monkeypatch.setattr(jobs, "command", lambda *words, mirror=(): [sys.executable, "-c", code])
    models = Answers(tmp_path, tmp_path, [])
    try:
        assert (await models.serving()).url == "http://127.0.0.1:1"
    finally:
        await models.close()


async def test_an_answer_that_breaks_off_says_so_at_its_end(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    event = b'data: {"choices": [{"delta": {"content": "4"}}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def ends_too_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(head + f"{len(event):x}\r\n".encode() + event + b"\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(ends_too_early, "127.0.0.1", 0) as models:
        port = models.sockets[0].getsockname()[1]

        async def serving(self: Answers) -> Serving:
            return Serving(f"http://127.0.0.1:{port}", "")

        monkeypatch.setattr(Answers, "serving", serving)
        asked = {"model": "a", "messages": [], "stream": True}
        async with page.session.post(f"{page.url}/api/chat", json=asked, headers={"Origin": page.url}) as response:
            assert (response.status, response.content_type) == (200, "text/event-stream")
            told = await response.read()
    assert told == event + b'data: {"error": "cut", "values": {}}\n\n'
    assert page.said == []


# — words ————————————————————————————————————————————————————————————————————————————————————————


def test_every_word_is_there_in_both_languages() -> None:
    english, chinese = (json.loads((STATIC / f"words.{one}.json").read_text(encoding="utf-8")) for one in server.LANGUAGES)
    assert list(english) == list(chinese)
    names = {"language.en", "language.zh"}  # each language by its own name
    assert {key for key in english if english[key] == chinese[key]} == names
    assert all(re.search(r"[\u4e00-\u9fff]", text) for key, text in chinese.items() if key != "language.en")
    assert not any(re.search(r"[\u4e00-\u9fff]", text) for key, text in english.items() if key != "language.zh")
    for key in english:
        assert sorted(re.findall(r"\{\w+\}", english[key])) == sorted(re.findall(r"\{\w+\}", chinese[key])), key


def test_every_word_that_is_asked_for_is_there_and_none_is_idle() -> None:
    words = set(json.loads((STATIC / "words.en.json").read_text(encoding="utf-8")))
    script = (STATIC / "app.js").read_text(encoding="utf-8")
    code = (TRAINER / "neartune" / "ui" / "server.py").read_text(encoding="utf-8")
    asked = set(re.findall(r'"((?:nav|new|plan|runs|run|compare|chat|error)\.[a-z_]+)"', script))
    asked |= {f"error.{code}" for code in re.findall(r'Refused\(\w+(?:\.status)?, "([a-z_]+)"', code)}
    asked |= {f"error.{code}" for code in ("host", "origin", "token", "cut")}
    asked |= {f"runs.{column}" for column in ("run", "state", "progress", "base", "best", "changed")}
    states = ("waiting", "starting", "running", "stopped", runs.FINISHED, runs.UNFINISHED, runs.FAILED, runs.DAMAGED)
    asked |= {f"state.{state}" for state in states} | {f"language.{language}" for language in server.LANGUAGES}
    assert asked == words


def test_no_text_stands_outside_the_word_files_and_none_is_put_in_as_html() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert re.sub(r"<[^>]+>", " ", page).split() == ["neartune", "neartune"]  # title and mark
    script = (STATIC / "app.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|DOMParser|new Function", script)
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg)", script + page + (STATIC / "style.css").read_text(encoding="utf-8")
    )
    assert not re.search(r"<script(?! type=\"module\" src=)|style=|\son\w+=", page)
