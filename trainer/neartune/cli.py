"""The `neartune` command: parses, calls, prints. Nothing heavy is imported before the recipe is valid.

Exit status: 0 done, 2 recipe, 3 mirror or Hub, 4 data, 5 out of memory for good, 130 Ctrl-C, 143 SIGTERM, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from neartune import __version__, hub, recipe
from neartune.recipe import Loaded, Recipe

_CHILD = "NEARTUNE_STATUS_FILE"
"""Set in one of several processes: the file in which the first to fail writes its exit status, which the launcher hides."""


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
    status: int = parsed.act(parsed)
    return status


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


def _recipe_of(parsed: argparse.Namespace) -> Loaded | None:
    """The recipe that was asked for; None when it cannot be used, which was said."""
    overrides = list(parsed.overrides)
    if parsed.use_mirror and "=" in parsed.use_mirror and "://" not in parsed.use_mirror:
        overrides.append(parsed.use_mirror)  # `--use_mirror max_steps=3`: the setting is no URL
        parsed.use_mirror = ""
    try:
        return recipe.load(parsed.config, overrides)
    except recipe.RecipeError as exc:
        print(exc, file=sys.stderr)
        return None


def _endpoint(parsed: argparse.Namespace, mirror: str | None) -> str:
    """Where to fetch from. Without --use_mirror a recipe that names no mirror goes where huggingface_hub would go."""
    if parsed.use_mirror is None and mirror is None and "HF_ENDPOINT" not in os.environ:
        return "https://huggingface.co"
    return hub.endpoint(parsed.use_mirror, mirror, os.environ)


def _schema(parsed: argparse.Namespace) -> int:
    print(json.dumps(recipe.schema(), indent=2))
    return 0


def _train(parsed: argparse.Namespace) -> int:
    loaded = _recipe_of(parsed)
    if loaded is None:
        return 2
    for line in loaded.advice if _CHILD not in os.environ else ():
        print(f"advice: {line}", flush=True)
    processes = _processes(loaded.recipe)
    if processes > 1 and _CHILD not in os.environ:
        return _launch(processes, parsed.arguments)

    def work() -> None:
        from neartune.run import run

        run(loaded.recipe, _endpoint(parsed, loaded.recipe.mirror), _say)

    status = _reported(work)
    if status and _CHILD in os.environ:
        with suppress(FileExistsError), Path(os.environ[_CHILD]).open("x") as file:
            file.write(str(status))
    return status


def _processes(asked: Recipe) -> int:
    if asked.processes != "auto":
        return int(asked.processes)
    if _CHILD in os.environ:
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _launch(processes: int, arguments: Sequence[str]) -> int:
    """This command again, in so many processes that know of each other."""
    here = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory(prefix="neartune-") as folder:
        status = Path(folder) / "status"
        environ = os.environ | {_CHILD: str(status)}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        child = subprocess.Popen([*command, "-m", "neartune", *arguments], env=environ, start_new_session=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: child.send_signal(number))
        ended = child.wait()
        return int(status.read_text()) if status.exists() else ended


def _reported(work: Callable[[], int | None]) -> int:
    """Exit status of `work`, which keeps to the mirror; its errors are said in one line."""
    hub.keep_to_the_mirror(os.environ)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
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
    except (NotFinite, CheckpointError) as exc:
        return _failed(exc, 1)


def _say(line: str) -> None:
    print(line, flush=True)


def _failed(exc: Exception, status: int) -> int:
    print(f"neartune: {exc}", file=sys.stderr)
    return status


_VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]] = {
    "train": (_add_recipe, _train, "train an adapter as a recipe says"),
    "schema": (lambda parser: None, _schema, "print the recipe's JSON schema, for editors"),
}
"""Name → (adds its arguments, does it and returns the exit status, what it is)."""
