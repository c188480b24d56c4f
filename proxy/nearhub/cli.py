"""The ``nearhub`` command: parses, calls, prints. What a command does must not be in here.

Nothing of the server is imported before a command needs it, so that ``--help`` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nearhub import __version__
from nearhub.config import SETTINGS, Config, ConfigError, load, rendered


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2 where the command line or the settings cannot be used."""
    arguments = _parser().parse_args(argv)
    flags = {setting.name: getattr(arguments, setting.name) for setting in SETTINGS if setting.flag}
    try:
        config = load(arguments.config, os.environ, flags)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    status: int = arguments.command(config)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nearhub", description="The Hugging Face Hub, nearby: a verifying, caching mirror.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"nearhub {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command, summary in (
        ("serve", _serve, "run the mirror"),
        ("check-config", _check_config, "print the settings in force and where each came from"),
    ):
        verb = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
        verb.set_defaults(command=command)
        _add_settings(verb)
    return parser


def _add_settings(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--config", type=Path, metavar="FILE", help="TOML file; deploy/nearhub.toml shows every key")
    for setting in SETTINGS:
        if setting.flag:
            verb.add_argument(
                setting.flag,
                dest=setting.name,
                action="append" if setting.kind.gather else "store",
                metavar=setting.kind.metavar,
                help=f"{setting.doc} (${setting.variable})".replace("%", "%%"),
            )


def _serve(config: Config) -> int:
    from nearhub.web.app import run

    return run(config)


def _check_config(config: Config) -> int:
    print(rendered(config), end="")
    return 0
