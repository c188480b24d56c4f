"""The page over HTTP.

    GET  /, /static/NAME, /report?name=                       the page; a run's report
    GET  /api/presets, /api/runs, /api/run?name=, /api/metrics?name=&from=, /api/log?name=&from=, /api/compare?a=&b=
    POST /api/check, /api/plan, /api/start, /api/stop, /api/continue
    GET  /api/models     POST /api/chat, /api/unload          passed on to `neartune serve`

Whoever has the token of the printed address may use it, and nobody else: see `refusal`. No torch is imported here.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import os
import re
import secrets
import signal
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from neartune import __version__, lock, recipe
from neartune.hosts import is_known_host
from neartune.records import registry, runs
from neartune.records.runs import RunsError
from neartune.ui import jobs, texts
from neartune.ui.answers import Answers, NotServing
from neartune.ui.jobs import Job, Jobs, JobsError
from neartune.watch import monitor

LANGUAGES = ("en", "zh")
TEXT = 64 * 1024
"""Bytes of a recipe at most."""
BODY = 2**19
"""Bytes of a request at most."""
PIECE = 2**20
"""Bytes of metrics.jsonl, or of a log, in one answer at most."""
TEND = 0.5
"""Seconds between two looks at the jobs."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".json": "application/json"}
_TYPES |= {".svg": "image/svg+xml"}
_STATIC = Path(__file__).parent / "static"

Say = Callable[[str], None]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refused(Exception):
    """`code`: a word of the page, error.CODE; `values` are put into it."""

    def __init__(self, status: int, code: str, **values: Any) -> None:
        super().__init__(code)
        self.status, self.code, self.values = status, code, values


@dataclass(frozen=True, slots=True)
class Ui:
    """`host`: where it listens, as it was given; `mirror`: --use_mirror as it was given, for the processes that it starts."""

    home: Path
    presets: Path
    host: str
    token: str
    mirror: tuple[str, ...]
    jobs: Jobs
    answers: Answers
    static: Mapping[str, tuple[str, bytes]]
    planning: asyncio.Lock
    briefs: dict[Path, tuple[Any, dict[str, Any]]]
    """Of each run: what its files were when it was read last, and what is shown of it."""


_UI = web.AppKey("ui", Ui)
_SESSION = web.AppKey("session", aiohttp.ClientSession)


def application(home: Path, presets: Path, say: Say, *, host: str = "127.0.0.1", mirror: Sequence[str] = ()) -> web.Application:
    """Raises JobsError, RunsError."""
    if not home.is_dir():
        raise RunsError(f"{home}: there is no such directory")
    home = home.resolve()
    app = web.Application(middlewares=[_errors(say), _guard], client_max_size=BODY)
    static = {file.name: (_TYPES[file.suffix], file.read_bytes()) for file in sorted(_STATIC.iterdir())}
    kept = Jobs(home, mirror, say)
    app[_UI] = Ui(
        home=home,
        presets=presets.resolve(),
        host=host,
        token=secrets.token_urlsafe(32),
        mirror=tuple(mirror),
        jobs=kept,
        answers=Answers(home, kept.folder, mirror),
        static=static,
        planning=asyncio.Lock(),
        briefs={},
    )
    app.router.add_get("/", _page)
    app.router.add_get("/static/{name}", _static)
    app.router.add_get("/report", _report)
    for name, get in (
        ("presets", _presets),
        ("runs", _runs),
        ("run", _run),
        ("metrics", _metrics),
        ("log", _log),
        ("compare", _compare),
        ("models", _models),
    ):
        app.router.add_get(f"/api/{name}", get)
    for name, post in (
        ("check", _check),
        ("plan", _plan),
        ("start", _start),
        ("stop", _stop),
        ("continue", _continue),
        ("chat", _chat),
        ("unload", _unload),
    ):
        app.router.add_post(f"/api/{name}", post)
    app.cleanup_ctx.append(_asking)
    app.cleanup_ctx.append(_tending(say))
    return app


async def listen(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, str]:
    """(what to clean up, the address to open, with its token). Raises OSError."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError:
        await runner.cleanup()
        raise
    bound = runner.addresses[0]
    shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
    return runner, f"http://{shown}:{bound[1]}/?token={app[_UI].token}"


async def serve(home: Path, presets: Path, host: str, port: int, mirror: Sequence[str], say: Say) -> None:
    """Until SIGTERM or Ctrl-C. Raises JobsError, OSError, RunsError."""
    app = application(home, presets, say, host=host, mirror=mirror)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner, address = await listen(app, host, port)
    say(f"runs in {app[_UI].home}; open {address}")
    if not _is_loopback(host):
        say(f"advice: who reads along on the way to {host} learns the token: ssh -L {port}:127.0.0.1:{port} is safer")
    await stop.wait()
    if going_on := [name for name, job in app[_UI].jobs.all.items() if job.state == jobs.RUNNING]:
        say(f"these go on: {', '.join(going_on)}")
    await runner.cleanup()


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


# — who may ask, decided purely ——————————————————————————————————————————————————————————————————


def refusal(method: str, path: str, headers: Mapping[str, str], host: str, *, has_token: bool) -> str | None:
    """Why a request is not answered; None: it is. `has_token`: by its cookie, or for the page itself by its address."""
    if not is_known_host(headers.get("Host", ""), host):
        return "host"
    site = headers.get("Sec-Fetch-Site")
    if path != "/" and site not in (None, "same-origin", "none"):
        return "origin"
    if method not in ("GET", "HEAD"):
        origin = headers.get("Origin")
        if site != "same-origin" and origin is None:
            return "origin"
        if origin is not None and origin != f"http://{headers['Host']}":
            return "origin"
    return None if has_token else "token"


def _cookie(request: web.Request) -> str:
    """Cookies are of a host, whatever the port: each server has a name of its own."""
    bound = request.transport.get_extra_info("sockname") if request.transport else None
    return f"neartune-{bound[1] if bound else 0}"


def _has_token(request: web.Request) -> bool:
    given = [request.cookies.get(_cookie(request), "")]
    if request.path == "/":
        given.append(request.query.get("token", ""))
    return any(hmac.compare_digest(one.encode(), request.app[_UI].token.encode()) for one in given)


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    if why := refusal(request.method, request.path, request.headers, request.app[_UI].host, has_token=_has_token(request)):
        raise Refused(403, why)
    return await handler(request)


def _errors(say: Say) -> Any:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except ConnectionError:
            raise
        except Exception as exc:  # noqa: BLE001 - each has an answer
            refused = _refused(exc)
            if refused.status >= 500 and refused is not exc:
                say(f"{request.method} {request.path}: {exc!r}")
            response = _refusing(request, refused)
        if not response.prepared:
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
        return response

    return middleware


def _refused(exc: Exception) -> Refused:
    match exc:
        case Refused():
            return exc
        case web.HTTPRequestEntityTooLarge():
            return Refused(413, "large", limit=BODY)
        case web.HTTPException():
            return Refused(exc.status, "http")
        case RunsError():
            return Refused(422, "unreadable", text=str(exc))
        case NotServing():
            return Refused(502, "serve", text=str(exc))
        case aiohttp.ClientError():
            return Refused(502, "serve", text=repr(exc))
    return Refused(500, "internal", text=f"{type(exc).__name__}: {exc}")


def _refusing(request: web.Request, refused: Refused) -> web.Response:
    if request.path == "/":
        known = [json.loads(request.app[_UI].static[f"words.{language}.json"][1]) for language in LANGUAGES]
        text = "\n".join(words.get(f"error.{refused.code}", refused.code) for words in known)
        return web.Response(text=f"{text}\n", status=refused.status)
    return _json({"error": refused.code, "values": refused.values}, refused.status)


def _json(value: Any, status: int = 200) -> web.Response:
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str)
    return web.Response(text=text, status=status, content_type="application/json")


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


async def _body(request: web.Request, **kinds: type) -> Any:
    """A JSON object that has these fields. Raises Refused."""
    if request.content_type != "application/json":
        raise Refused(415, "http")
    try:
        found = json.loads(await request.read())
    except (ValueError, RecursionError):
        raise Refused(400, "http") from None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise Refused(400, "http")
    return found


# — around everything ————————————————————————————————————————————————————————————————————————————


async def _asking(app: web.Application) -> AsyncIterator[None]:
    """No time limit: an answer takes as long as it takes."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        app[_SESSION] = session
        yield
    await app[_UI].answers.close()


def _tending(say: Say) -> Callable[[web.Application], AsyncIterator[None]]:
    async def tend(kept: Jobs) -> None:
        while True:
            try:
                kept.tend()
            except OSError as exc:
                say(f"warning: {exc}")
            await asyncio.sleep(TEND)

    async def tending(app: web.Application) -> AsyncIterator[None]:
        kept = app[_UI].jobs
        task = asyncio.create_task(tend(kept))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        kept.close()

    return tending


async def _page(request: web.Request) -> web.Response:
    """With the cookie, in the same answer: after a redirect it would not be sent by a browser that came from another site."""
    ui = request.app[_UI]
    kind, content = ui.static["index.html"]
    response = web.Response(body=content, content_type=kind, charset="utf-8")
    response.set_cookie(_cookie(request), ui.token, httponly=True, samesite="Strict", path="/")
    return response


async def _static(request: web.Request) -> web.Response:
    found = request.app[_UI].static.get(request.match_info["name"])
    if found is None:
        raise Refused(404, "http")
    return web.Response(body=found[1], content_type=found[0], charset="utf-8")


# — recipes ——————————————————————————————————————————————————————————————————————————————————————


async def _presets(request: web.Request) -> web.Response:
    ui = request.app[_UI]
    found = [
        {"name": name, "text": file.read_text(encoding="utf-8"), "directory": str(file.parent)}
        for name, file in texts.presets(ui.presets).items()
    ]
    return _json({"presets": found, "home": str(ui.home), "version": __version__})


def _preset(ui: Ui, name: str) -> Path:
    """Raises Refused."""
    if file := texts.presets(ui.presets).get(name):
        return file
    raise Refused(404, "no_preset", name=name)


def _text(found: Mapping[str, Any]) -> str:
    text: str = found["text"]
    try:
        if len(text.encode()) > TEXT:
            raise Refused(413, "large", limit=TEXT)
    except UnicodeEncodeError:
        raise Refused(400, "http") from None
    return text


def _checked(ui: Ui, found: Mapping[str, Any]) -> texts.Checked:
    try:
        return texts.check(_text(found), _preset(ui, found["preset"]))
    except RecursionError:
        return texts.Checked((texts.Complaint(None, "it is nested too deeply"),), ())


async def _check(request: web.Request) -> web.Response:
    found = await _body(request, preset=str, text=str)
    return _json(asdict(await asyncio.to_thread(_checked, request.app[_UI], found)))


def _grounded(ui: Ui, found: Mapping[str, Any], output: Path) -> str:
    """The text to train by. Raises Refused with the complaints."""
    if complaints := _checked(ui, found).complaints:
        raise Refused(422, "recipe", complaints=[asdict(complaint) for complaint in complaints])
    text = texts.grounded(found["text"], _preset(ui, found["preset"]).parent, output)
    try:
        recipe.load(output.with_suffix(".yaml"), text=text)
    except recipe.RecipeError as exc:
        raise Refused(422, "unreadable", text=str(exc)) from None
    return text


async def _plan(request: web.Request) -> web.Response:
    """By `neartune plan --json`, one at a time; it ends when who asked has gone."""
    ui = request.app[_UI]
    found = await _body(request, preset=str, text=str)
    async with ui.planning:
        with tempfile.TemporaryDirectory(dir=ui.jobs.folder, prefix="plan-") as folder:
            file = Path(folder) / "recipe.yaml"
            file.write_text(await asyncio.to_thread(_grounded, ui, found, Path(folder) / "run"), encoding="utf-8")
            words = jobs.command("plan", "--json", "--config", str(file), mirror=ui.mirror)
            process = await asyncio.create_subprocess_exec(
                *words, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=jobs.environment(os.environ)
            )
            try:
                told, complained = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
    if process.returncode:
        last = complained.decode(errors="replace").strip().splitlines()[-8:]
        raise Refused(422, "plan", text="\n".join(last))
    return _json(json.loads(told.replace(f"{folder}/".encode(), b"")))


# — runs —————————————————————————————————————————————————————————————————————————————————————————


def _place(ui: Ui, name: str) -> Path:
    """Of a run or job below the directory of runs, which need not be there. Raises Refused."""
    parts = name.split("/")
    if any(not part or part.startswith(".") or "\0" in part for part in parts):
        raise Refused(404, "no_run", name=name)
    path = ui.home.joinpath(*parts)
    if ui.home not in path.resolve().parents:
        raise Refused(404, "no_run", name=name)
    return path


def _known(ui: Ui, name: str) -> Path:
    """Of one that is there, or was asked for. Raises Refused."""
    path = _place(ui, name)
    if not runs.is_run(path) and name not in ui.jobs.all:
        raise Refused(404, "no_run", name=name)
    return path


def _brief(ui: Ui, path: Path) -> dict[str, Any]:
    """As `runs list --json` has it; read again only when its files changed."""
    files = [path / name for name in ("run.json", "recipe.yaml", "metrics.jsonl", "result.json", "failed.json", "report.html")]
    now = [lock.is_running(path), *((stat.st_mtime_ns, stat.st_size) if (stat := _stat(file)) else None for file in files)]
    known = ui.briefs.get(path)
    if known is None or known[0] != now:
        run = runs.read(path, runs.name_of(path, ui.home))
        known = ui.briefs[path] = (now, run.brief())
    return known[1]


def _stat(file: Path) -> os.stat_result | None:
    with suppress(OSError):
        return file.stat()
    return None


def _with_job(found: dict[str, Any], job: Job | None) -> dict[str, Any]:
    state = jobs.state_of(found.get("state"), job)
    return {**found, "state": state, "job": None if job is None else asdict(job)}


def _nothing_yet(name: str, path: Path) -> dict[str, Any]:
    return {"name": name, "path": str(path), "step": 0, "steps": None, "metrics": {}, "why": "", "base": None, "task": None}


def _listed(ui: Ui, known: Mapping[str, Job]) -> list[dict[str, Any]]:
    """All runs and jobs: those under way first, then those that changed last."""
    served = registry.promoted(registry.load(ui.home), ui.home)
    found = {}
    for path in runs.find(ui.home):
        brief = _brief(ui, path) | {"served": served.get(path.absolute(), [])}
        found[brief["name"]] = _with_job(brief, known.get(brief["name"]))
    for name, job in known.items():
        path = ui.home / name
        if name not in found:
            found[name] = _with_job(_nothing_yet(name, path), job)
    by_change = sorted(found.values(), key=lambda one: str(one.get("changed", "")), reverse=True)
    return sorted(by_change, key=lambda one: one["state"] not in jobs.ACTIVE)


async def _runs(request: web.Request) -> web.Response:
    ui = request.app[_UI]
    return _json({"runs": await asyncio.to_thread(_listed, ui, dict(ui.jobs.all))})


async def _run(request: web.Request) -> web.Response:
    ui = request.app[_UI]
    name = request.query.get("name", "")
    path = _known(ui, name)
    return _json(await asyncio.to_thread(_shown, ui, name, path, ui.jobs.all.get(name)))


def _shown(ui: Ui, name: str, path: Path, job: Job | None) -> dict[str, Any]:
    if not runs.is_run(path):
        return _with_job(_nothing_yet(name, path), job) | {"can_continue": _recipe_of(path) is not None}
    run = runs.read(path, name)
    steps = [line for line in run.lines if "kind" not in line]
    seconds = [line["seconds"] for line in steps[-20:]]
    more = {
        "recipe": dict(run.recipe),
        "seconds": run.result.get("seconds"),
        "eta": monitor.eta(run.step, run.total, seconds, 0, ()) if run.total else None,
        "has_report": (path / "report.html").is_file(),
        "can_continue": run.state not in (runs.FINISHED, runs.RUNNING) and _recipe_of(path) is not None,
    }
    return _with_job(run.brief(), job) | more


def _recipe_of(path: Path) -> Path | None:
    """By which a run goes on: as it was written, else as it was resolved."""
    candidates = (path.with_name(f"{path.name}.yaml"), path / "recipe.yaml")
    return next((file for file in candidates if file.is_file()), None)


def pieces_of(file: Path, offset: int, most: int = PIECE) -> tuple[bytes, int, bool]:
    """(whole lines of `file` from byte `offset` on, those in `most` bytes or one that is longer; where the next begin; whether
    they begin anew because the file does not go on from there: it was cut back)."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            is_anew = offset > size
            if 0 < offset <= size:
                stream.seek(offset - 1)
                is_anew = stream.read(1) != b"\n"
            offset = 0 if is_anew else offset
            stream.seek(offset)
            found = stream.read(most)
            if b"\n" not in found:
                found += stream.readline()
    except FileNotFoundError:
        return b"", 0, offset > 0
    found = found[: found.rfind(b"\n") + 1]
    return found, offset + len(found), is_anew


def _offset(request: web.Request) -> int:
    text = request.query.get("from", "0")
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise Refused(400, "http")
    return int(text)


async def _metrics(request: web.Request) -> web.Response:
    file = _known(request.app[_UI], request.query.get("name", "")) / "metrics.jsonl"
    found, after, is_anew = await asyncio.to_thread(pieces_of, file, _offset(request))
    lines = []
    for line in found.splitlines():
        with suppress(ValueError):
            lines.append({key: value for key, value in json.loads(line).items() if key not in ("labels", "confusion")})
    stat = _stat(file)
    return _json(
        {"lines": lines, "next": after, "anew": is_anew, "more": bool(found) and stat is not None and stat.st_size > after}
    )


async def _log(request: web.Request) -> web.Response:
    path = _known(request.app[_UI], request.query.get("name", ""))
    file = path.with_name(f"{path.name}.log")
    offset = _offset(request)
    stat = _stat(file)
    is_skipped = stat is not None and stat.st_size - offset > PIECE
    if is_skipped and stat is not None:
        offset = await asyncio.to_thread(_line_start, file, stat.st_size - PIECE // 2)
    found, after, is_anew = await asyncio.to_thread(pieces_of, file, offset)
    text = found.decode(errors="replace")
    return _json({"text": text, "next": after, "anew": is_anew or is_skipped})


def _line_start(file: Path, offset: int) -> int:
    """The first at or after `offset`."""
    with file.open("rb") as stream:
        stream.seek(offset)
        return offset + len(stream.readline())


async def _start(request: web.Request) -> web.Response:
    ui = request.app[_UI]
    found = await _body(request, preset=str, text=str, name=str, at_once=bool)
    name = found["name"]
    if not _NAME.match(name) or name.endswith((".yaml", ".log")):
        raise Refused(422, "name", name=name)
    path = _place(ui, name)
    text = await asyncio.to_thread(_grounded, ui, found, path)
    file = path.with_name(f"{name}.yaml")
    before = ui.jobs.all.get(name)
    may_replace = before is not None and before.state == jobs.ENDED  # it came to nothing
    if path.exists():
        raise Refused(409, "taken", name=name)
    try:
        with file.open("w" if may_replace else "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise Refused(409, "taken", name=name) from None
    job = ui.jobs.ask(name, file, at_once=found["at_once"])
    return _json({"name": name, "state": jobs.state_of(None, job)}, 201)


async def _stop(request: web.Request) -> web.Response:
    ui = request.app[_UI]
    name = (await _body(request, name=str))["name"]
    _known(ui, name)
    if name not in ui.jobs.all or ui.jobs.all[name].state == jobs.ENDED:
        raise Refused(409, "not_running", name=name)
    ui.jobs.stop(name)
    return _json({"name": name})


async def _continue(request: web.Request) -> web.Response:
    ui = request.app[_UI]
    found = await _body(request, name=str, at_once=bool)
    name = found["name"]
    path = _known(ui, name)
    if lock.is_running(path) or (name in ui.jobs.all and ui.jobs.all[name].state != jobs.ENDED):
        raise Refused(409, "running", name=name)
    if (path / "result.json").exists():
        raise Refused(409, "finished", name=name)
    file = _recipe_of(path)
    if file is None:
        raise Refused(409, "no_recipe", name=name)
    job = ui.jobs.ask(name, file, at_once=found["at_once"])
    return _json({"name": name, "state": jobs.state_of(None, job)})


async def _compare(request: web.Request) -> web.Response:
    ui = request.app[_UI]
    names = [request.query.get(key, "") for key in ("a", "b")]
    paths = [_known(ui, name) for name in names]

    def compared() -> Any:
        one, two = (runs.read(path, name) for path, name in zip(paths, names, strict=True))
        evaluations = [[[line["step"], line["loss"]] for line in run.lines if line.get("kind") == "eval"] for run in (one, two)]
        return runs.compare(one, two) | {"states": [one.state, two.state], "evaluations": evaluations}

    return _json(await asyncio.to_thread(compared))


async def _report(request: web.Request) -> web.Response:
    path = _known(request.app[_UI], request.query.get("name", ""))
    try:
        page = await asyncio.to_thread((path / "report.html").read_bytes)
    except FileNotFoundError:
        raise Refused(404, "no_report") from None
    return web.Response(
        body=page, content_type="text/html", charset="utf-8", headers={"Content-Security-Policy": _REPORT_POLICY}
    )


# — models ———————————————————————————————————————————————————————————————————————————————————————


async def _models(request: web.Request) -> web.Response:
    """Those that talk; the server is started for it."""
    serving = await request.app[_UI].answers.serving()
    headers = {"Authorization": f"Bearer {serving.token}"}
    async with request.app[_SESSION].get(f"{serving.url}/v1/models", headers=headers) as answer:
        found = (await answer.json())["data"]
    return _json({"models": [model for model in found if model["task"] == "text-generation"]})


async def _chat(request: web.Request) -> web.StreamResponse:
    """The answer of /v1/chat/completions, as it comes; where it breaks off, an event that says so."""
    asked = await _body(request, model=str, messages=list)
    serving = await request.app[_UI].answers.serving()
    headers = {"Authorization": f"Bearer {serving.token}"}
    async with request.app[_SESSION].post(f"{serving.url}/v1/chat/completions", json=asked, headers=headers) as answer:
        if answer.status != 200:
            told = await answer.json()
            raise Refused(answer.status, "answer", text=told["error"]["message"])
        response = web.StreamResponse(headers={**_HEADERS, "Content-Type": answer.headers["Content-Type"]})
        await response.prepare(request)
        try:
            async for part in answer.content.iter_any():
                await response.write(part)
        except aiohttp.ClientError:
            await response.write(f"data: {json.dumps({'error': 'cut', 'values': {}})}\n\n".encode())
        await response.write_eof()
        return response


async def _unload(request: web.Request) -> web.Response:
    await _body(request)
    await request.app[_UI].answers.close()
    return _json({})


def run(home: Path, presets: Path, host: str, port: int, mirror: Sequence[str], say: Say) -> None:
    """`neartune ui`. Raises JobsError, OSError, RunsError."""
    asyncio.run(serve(home, presets, host, port, mirror, say))


__all__ = ["JobsError", "RunsError", "application", "is_known_host", "listen", "pieces_of", "refusal", "run", "serve"]
