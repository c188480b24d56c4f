"""The `neartune` command: parses, calls, prints. Nothing heavy is imported before the recipe is valid.

Exit status: 0 done, 2 recipe, 3 mirror or Hub, 4 data, 5 out of memory for good, 130 Ctrl-C, 143 SIGTERM, 1 anything else.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from neartune import __version__, hub, launch, recipe, units
from neartune.launch import LaunchError
from neartune.recipe import Loaded, Recipe
from neartune.records import cli_runs

_CHILD = "NEARTUNE_STATUS_FILE"
"""Set in one of several processes: the file in which the first to fail writes its exit status, which the launcher hides."""
_ROOM = "make room; a training goes on from its last checkpoint by the same command"
_RIGHTS = "you have no right to that: change it, or choose another place"
_FILE = "a file is where a directory is to be: remove it, or choose another place"
_ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.EEXIST: _FILE,
    errno.ENOTDIR: _FILE,
    errno.EADDRINUSE: "choose another --port",
}
"""What to do about an error of the operating system."""


def main(argv: Sequence[str] | None = None, *, verb: str | None = None) -> int:
    """Run one command. `verb`: for a door that has only one, such as train.py."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if verb is not None:
        arguments = [verb, *arguments]
    parser = _parser("neartune" if verb is None else f"{verb}.py", verb)
    parsed, more = parser.parse_known_args(arguments)
    strange = [word for word in more if word.startswith("-") or "overrides" not in parsed]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if more:
        parsed.overrides += more  # argparse does not take settings on both sides of an option
    parsed.arguments = arguments
    try:
        status: int = parsed.act(parsed)
    except recipe.RecipeError as exc:
        print(exc, file=sys.stderr)
        status = 2
    except LaunchError as exc:
        status = _failed(exc, 2)
    except OSError as exc:
        text, status = of_the_machine(exc)
        print(f"neartune: {text}", file=sys.stderr)
    return _noted(status)


def of_the_machine(exc: OSError) -> tuple[str, int]:
    """(in one line what the operating system refused and what to do, the exit status: 2 where a place that was given cannot be
    used, else 1)."""
    advice = _ADVICE.get(exc.errno or 0)
    parts = [exc.filename, exc.strerror, advice] if exc.strerror else [" ".join(str(exc).split())]
    return ": ".join(str(part) for part in parts if part), 2 if exc.filename and advice in (_RIGHTS, _FILE) else 1


def _parser(program: str, verb: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="LoRA fine-tuning on models that come from a Hub mirror.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"neartune {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="verb")
    for name, (add, act, text) in _VERBS.items():
        # A door with one verb is called without it.
        program_of_verb = program if verb == name else f"{program} {name}"
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, prog=program_of_verb)
        add(command)
        command.set_defaults(act=act)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="the recipe, in YAML")
    _add_mirror(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the recipe's")


def _add_mirror(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--use_mirror",
        "--use-mirror",
        nargs="?",
        const="",
        metavar="URL",
        help="fetch from this Hub endpoint; without URL: mirror: of the recipe, HF_ENDPOINT, or http://127.0.0.1:8090",
    )


def _recipe_of(parsed: argparse.Namespace) -> Loaded:
    """The recipe that was asked for. Raises RecipeError."""
    overrides = list(parsed.overrides)
    if parsed.use_mirror and "=" in parsed.use_mirror and "://" not in parsed.use_mirror:
        overrides.append(parsed.use_mirror)  # `--use_mirror max_steps=3`: the setting is no URL
        parsed.use_mirror = ""
    return recipe.load(parsed.config, overrides)


def _endpoint(parsed: argparse.Namespace, mirror: str | None) -> str:
    """Where to fetch from. Without --use_mirror a recipe that names no mirror goes where huggingface_hub would go."""
    if parsed.use_mirror is None and mirror is None and "HF_ENDPOINT" not in os.environ:
        return "https://huggingface.co"
    return hub.endpoint(parsed.use_mirror, mirror, os.environ)


def _schema(parsed: argparse.Namespace) -> int:
    print(json.dumps(recipe.schema(), indent=2))
    return 0


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def _plan(parsed: argparse.Namespace) -> int:
    loaded = _recipe_of(parsed)
    processes = _processes(loaded.recipe)

    def work() -> None:
        from rich.console import Console

        from neartune import plan

        notes = Console(stderr=True, highlight=False)
        found = plan.plan(loaded, processes, _endpoint(parsed, loaded.recipe.mirror), notes.print)
        if parsed.json:
            print(json.dumps(plan.as_json(found), indent=2, default=str))
        else:
            plan.show(found, Console(highlight=False, soft_wrap=False))

    return _reported(work)


def _train(parsed: argparse.Namespace) -> int:
    loaded = _recipe_of(parsed)
    start = _start(loaded.recipe)
    world = launch.world_of(os.environ)
    if _CHILD not in os.environ and (world is None or world.rank == 0):
        for line in [*(f"advice: {line}" for line in loaded.advice), *([start.note] if start.note else [])]:
            print(line, flush=True)
    if start.command:
        return _launch(start, parsed.arguments)

    def work() -> None:
        from neartune.run import run

        run(loaded.recipe, _endpoint(parsed, loaded.recipe.mirror), _say, origins=loaded.origins)

    return _reported(work)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, finished or not")
    parser.add_argument("--to", type=Path, metavar="FILE", help="where to write it; default: report.html in RUN")


def _report(parsed: argparse.Namespace) -> int:
    from neartune.reporting import report

    try:
        print(report.write(parsed.run, parsed.to))
    except report.ReportError as exc:
        return _failed(exc, 2)
    return 0


def _noted(status: int) -> int:
    """For the launcher, if this is one of several processes."""
    if status and _CHILD in os.environ:
        with suppress(FileExistsError), Path(os.environ[_CHILD]).open("x") as file:
            file.write(str(status))
    return status


def _runs(parsed: argparse.Namespace) -> int:
    if parsed.what != "reproduce":
        return cli_runs.act(parsed)
    from neartune.records import reproduce
    from neartune.records.runs import RunsError

    world = launch.world_of(os.environ)
    is_child = _CHILD in os.environ or (world is not None and world.rank > 0)
    try:
        run = cli_runs.the_run(parsed.run, parsed.home)
        target = reproduce.target_of(run, parsed.to, may_be_there=is_child)
        loaded = reproduce.pinned(run, target, parsed.overrides)
        start = _start(loaded.recipe)
    except (RunsError, recipe.RecipeError) as exc:
        return _failed(exc, 2)
    if start.command:
        return _launch(start, parsed.arguments)

    def work() -> int:
        try:
            reproduce.reproduce(run, loaded, _endpoint(parsed, loaded.recipe.mirror), _say)
        except reproduce.Different as exc:
            return _failed(exc, 1)
        return 0

    return _reported(work)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a finished run: below --in, or a path")
    parser.add_argument("--against", required=True, metavar="base|RUN", help="its base, or another run")
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows to judge by; else those that RUN held out")
    parser.add_argument("--base", type=Path, metavar="DIR", help="where the base of RUN is, if not where it was")
    parser.add_argument("--in", dest="home", type=Path, default=Path(), metavar="DIR", help="where runs are; default: here")
    parser.add_argument("--json", action="store_true", help="for programs")
    _add_mirror(parser)


def _eval(parsed: argparse.Namespace) -> int:
    from neartune.records.runs import RunsError

    try:
        run = cli_runs.the_run(parsed.run, parsed.home)
        other = None if parsed.against == "base" else cli_runs.the_run(parsed.against, parsed.home)
    except RunsError as exc:
        return _failed(exc, 2)

    def work() -> int:
        from neartune.records import judge

        def note(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        try:
            judged = judge.judge(run, other, parsed.data, parsed.base, _endpoint(parsed, None), note)
        except RunsError as exc:
            return _failed(exc, 2)
        print(json.dumps(judge.as_json(judged), indent=2) if parsed.json else "\n".join(judge.told(judged)))
        return 0

    return _reported(work)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="RUN_OR_ADAPTER", help="a finished run, or an adapter's directory")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where the merged model is to be")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: the base's own")
    parser.add_argument("--base", type=Path, metavar="DIR", help="where the base is, if not where it was")
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows to compare by; else those that the run held out")
    parser.add_argument(
        "--max-shard", type=units.parse_size, default="4GB", metavar="SIZE", help="bytes a file at most, such as 4GB"
    )
    _add_mirror(parser)


def _merge(parsed: argparse.Namespace) -> int:
    def work() -> int:
        from neartune import merge
        from neartune.weights import MergeError

        try:
            merge.merge(
                parsed.adapter,
                parsed.to,
                _endpoint(parsed, None),
                _say,
                dtype=parsed.dtype,
                base=parsed.base,
                rows=parsed.data,
                max_shard=parsed.max_shard,
            )
        except MergeError as exc:
            return _failed(exc, 1)
        return 0

    return _reported(work)


def _add_homes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path()], metavar="DIR", help="where runs are; default: here")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU, if there is one")
    _add_mirror(parser)


def _size_or_auto(text: str) -> int | None:
    return None if text == "auto" else units.parse_size(text)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_homes(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=8091, help="default: 8091; 0: a free one")
    parser.add_argument("--memory", type=_size_or_auto, default="auto", metavar="SIZE", help="for weights, such as 8GB")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="who asks must know what is in it")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name of this machine that clients may ask by"
    )


def _serve(parsed: argparse.Namespace) -> int:
    token = None
    if parsed.token_file is not None:
        try:
            token = parsed.token_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as exc:
            return _failed(exc, 2)
        if not token:
            print(f"neartune: {parsed.token_file}: there is no token in it", file=sys.stderr)
            return 2
    if token is None and parsed.host not in ("127.0.0.1", "::1", "localhost"):
        _say(f"advice: everybody who reaches {parsed.host} can ask: --token-file FILE")

    def work() -> None:
        import asyncio

        from neartune import prepare
        from neartune.serving import serve

        prepare.quieten_transformers()
        url = _endpoint(parsed, None)
        names = (parsed.host, *parsed.allow_host)
        app = serve.application(parsed.runs, url, _say, memory=parsed.memory, device=parsed.device, token=token, names=names)
        asyncio.run(serve.serve(app, parsed.host, parsed.port, _say))

    return _reported(work)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="NAME_OR_DIR", help="a run, an adapter, or a served name")
    parser.add_argument("--base", action="store_true", help="begin with its base by itself")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, always the likeliest token")
    _add_homes(parser)


def _chat(parsed: argparse.Namespace) -> int:
    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def work() -> int:
        from neartune import prepare
        from neartune.decode import PromptError
        from neartune.records.runs import RunsError
        from neartune.serving import chat
        from neartune.serving.catalog import Unknown

        prepare.quieten_transformers()
        try:
            begun = chat.begin(
                parsed.adapter,
                parsed.runs,
                _endpoint(parsed, None),
                note,
                device=parsed.device,
                temperature=parsed.temperature,
                by_itself=parsed.base,
            )
            chat.talk(begun)
        except (Unknown, RunsError, PromptError) as exc:
            return _failed(exc, 2)
        return 0

    return _reported(work)


def _add_ui(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, default=Path(), metavar="DIR", help="where runs are, old and new; default: here")
    parser.add_argument("--presets", type=Path, metavar="DIR", help="recipes to start from; default: those of neartune")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=8092, help="default: 8092; 0: a free one")
    _add_mirror(parser)


def _ui(parsed: argparse.Namespace) -> int:
    from neartune.ui import server, texts

    mirror = [] if parsed.use_mirror is None else ["--use_mirror", *filter(None, [parsed.use_mirror])]
    presets = parsed.presets or texts.shipped_presets()
    try:
        server.run(parsed.runs, presets, parsed.host, parsed.port, mirror, _say)
    except (server.JobsError, server.RunsError) as exc:
        return _failed(exc, 2)
    return 0


def _processes(asked: Recipe) -> int:
    """Raises LaunchError."""
    wanted = launch.processes(asked.processes, _accelerate(asked), os.environ, _count_gpus)
    if asked.train_batch_size % wanted:
        raise LaunchError(f"train_batch_size {asked.train_batch_size} cannot be shared by {wanted} processes equally")
    return wanted


def _start(asked: Recipe) -> launch.Start:
    """Raises LaunchError."""
    if launch.is_sharded(os.environ):
        for key, text in launch.sharding_complaints({name: getattr(asked, name) for name in recipe.FIELDS}):
            raise LaunchError(f"{key}: {text}")
    start = launch.decide(asked.processes, _accelerate(asked), os.environ, _count_gpus, is_child=_CHILD in os.environ)
    _processes(asked)
    return start


def _accelerate(asked: Recipe) -> launch.Accelerate | None:
    return launch.read_accelerate(asked.accelerate_config) if asked.accelerate_config else None


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _launch(start: launch.Start, arguments: Sequence[str]) -> int:
    """This command again, in processes that know of each other."""
    here = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory(prefix="neartune-") as folder:
        status = Path(folder) / "status"
        environ = os.environ | {_CHILD: str(status)}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // start.here)))
        environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(launch.GRACE))
        child = subprocess.Popen([*start.command, *arguments], env=environ, start_new_session=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: child.send_signal(number))
        ended = child.wait()
        return int(status.read_text()) if status.exists() else ended


def _reported(work: Callable[[], int | None]) -> int:
    """Exit status of `work`, which keeps to the mirror; its errors are said in one line."""
    hub.keep_to_the_mirror(os.environ)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    from safetensors import SafetensorError

    from neartune.checkpoint import CheckpointError
    from neartune.data import DataError
    from neartune.loop import NotFinite, OutOfMemory
    from neartune.model import ModelError
    from neartune.run import RunError, Stopped

    try:
        return work() or 0
    except Stopped as exc:
        return exc.status
    except KeyboardInterrupt:
        return 130
    except hub.HubError as exc:
        return _failed(exc, 3)
    except DataError as exc:
        return _failed(exc, 4)
    except OutOfMemory as exc:
        return _failed(exc, 5)
    except (ModelError, RunError) as exc:
        return _failed(exc, 2)
    except (NotFinite, CheckpointError, SafetensorError) as exc:
        return _failed(exc, 1)


def _say(line: str) -> None:
    print(line, flush=True)


def _failed(exc: Exception, status: int) -> int:
    print(f"neartune: {exc}", file=sys.stderr)
    return status


_VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]] = {
    "train": (_add_recipe, _train, "train an adapter as a recipe says"),
    "plan": (_add_plan, _plan, "say what a run would do: settings, rows, memory, steps, time; nothing is written"),
    "merge": (_add_merge, _merge, "merge an adapter into its base, and compare"),
    "runs": (
        lambda parser: cli_runs.add_runs(parser, _add_mirror),
        _runs,
        "list, show and compare runs; promote, roll back and reproduce them",
    ),
    "eval": (_add_eval, _eval, "judge a run against its base or another run: better, worse, or cannot tell"),
    "push": (cli_runs.add_push, cli_runs.act, "put a run's adapter into a folder, to be carried to another machine"),
    "pull": (cli_runs.add_pull, cli_runs.act, "take an adapter from such a folder, when every byte of it is right"),
    "report": (_add_report, _report, "write a run's report.html again, from its files"),
    "serve": (_add_serve, _serve, "answer over HTTP as OpenAI's API does, with bases and adapters by name"),
    "chat": (_add_chat, _chat, "talk to an adapter on the terminal, or through a pipe"),
    "ui": (_add_ui, _ui, "a web page for all of this: start, watch, stop, compare, chat"),
    "schema": (lambda parser: None, _schema, "print the recipe's JSON schema, for editors"),
}
"""Name → (adds its arguments, does it and returns the exit status, what it is)."""
