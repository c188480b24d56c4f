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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from neartune import __version__, hub, recipe
from neartune.recipe import Recipe

_CHILD = "NEARTUNE_STATUS_FILE"
"""Set in one of several processes: the file in which the first to fail writes its exit status, which the launcher hides."""


def main(argv: Sequence[str] | None = None, *, verb: str | None = None) -> int:
    """Run one command. `verb`: for a door that has only one, such as train.py."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(verb)
    parsed, more = parser.parse_known_args(arguments)
    if strange := [word for word in more if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if parsed.verb == "schema":
        print(json.dumps(recipe.schema(), indent=2))
        return 0
    overrides = [*parsed.overrides, *more]
    use_mirror = parsed.use_mirror
    if use_mirror and "=" in use_mirror and "://" not in use_mirror:
        overrides.append(use_mirror)  # `--use_mirror max_steps=3`: the setting is no URL
        use_mirror = ""
    try:
        loaded = recipe.load(parsed.config, overrides)
    except recipe.RecipeError as exc:
        print(exc, file=sys.stderr)
        return 2
    for line in loaded.advice if _CHILD not in os.environ else ():
        print(f"advice: {line}", flush=True)
    processes = _processes(loaded.recipe)
    if processes > 1 and _CHILD not in os.environ:
        return _launch(processes, ["train", *arguments] if verb else arguments)
    status = _train(loaded.recipe, use_mirror)
    if status and _CHILD in os.environ:
        with suppress(FileExistsError), Path(os.environ[_CHILD]).open("x") as file:
            file.write(str(status))
    return status


def _parser(verb: str | None) -> argparse.ArgumentParser:
    program = "neartune" if verb is None else f"{verb}.py"
    parser = argparse.ArgumentParser(
        prog=program, description="LoRA fine-tuning on models that come from a Hub mirror.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"neartune {__version__}")
    if verb is not None:
        parser.set_defaults(verb=verb)
        _add_train(parser)
        return parser
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="verb")
    _add_train(commands.add_parser("train", help="train an adapter as a recipe says", allow_abbrev=False))
    commands.add_parser("schema", help="print the recipe's JSON schema, for editors", allow_abbrev=False)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="the recipe, in YAML")
    parser.add_argument(
        "--use_mirror",
        "--use-mirror",
        nargs="?",
        const="",
        metavar="URL",
        help="fetch from this Hub endpoint; without URL: mirror: of the recipe, HF_ENDPOINT, or http://127.0.0.1:8090",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the recipe's")


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


def _train(asked: Recipe, use_mirror: str | None) -> int:
    hub.keep_to_the_mirror(os.environ)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Without --use_mirror a recipe that names no mirror goes where huggingface_hub would go.
    url = hub.endpoint(use_mirror, asked.mirror, os.environ)
    if use_mirror is None and asked.mirror is None and "HF_ENDPOINT" not in os.environ:
        url = "https://huggingface.co"
    from neartune.checkpoint import CheckpointError
    from neartune.data import DataError
    from neartune.loop import NotFinite, OutOfMemory
    from neartune.model import ModelError
    from neartune.run import RunError, Stopped, run

    try:
        run(asked, url, _say)
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
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _failed(exc: Exception, status: int) -> int:
    print(f"neartune: {exc}", file=sys.stderr)
    return status
