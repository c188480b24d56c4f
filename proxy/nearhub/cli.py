"""The ``nearhub`` command: parses, calls, prints. What a command does must not be in here.

Nothing of the server is imported before a command needs it, so that ``--help`` answers at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from nearhub import __version__
from nearhub.config import SETTINGS, Config, ConfigError, load, rendered
from nearhub.units import BadValue, parse_size

_VERBS = {
    "ls": "list what the cache has, by repo and commit",
    "du": "tell what takes the space",
    "purge": "remove a repo, a revision or a blob",
    "verify": "read and hash every blob; wrong ones are removed, and brought anew when asked for",
    "stats": "print the counters of the running mirror",
    "why": "explain how a URL is answered, or how a request was",
    "export": "write repos as a bundle that crosses an air gap",
    "import": "take in a bundle, or a git clone of a Hub's repo",
    "import-hf-cache": "take in what huggingface_hub downloaded",
}
_OF_VERBS = frozenset({"cache.dir", "cache.index_dir", "server.prefix"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2 where the command line or the settings cannot be used."""
    arguments = _parser().parse_args(argv)
    flags = {setting.name: getattr(arguments, setting.name, None) for setting in SETTINGS if setting.flag}
    try:
        config = load(arguments.config, os.environ, flags)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    status: int = arguments.command(config, arguments)
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
        ("token", _token, "add, list or remove the mirror's own tokens"),
        ("keygen", _keygen, "make a key that bundles are signed with"),
    ):
        verb = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
        verb.set_defaults(command=command)
        _add_settings(verb)
        _add_arguments(verb, name)
    for name, summary in _VERBS.items():
        verb = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
        verb.set_defaults(command=_operate, verb=name)
        _add_settings(verb, _OF_VERBS)
        verb.add_argument("--json", action="store_true", help="print JSON")
        _add_arguments(verb, name)
    return parser


def _add_settings(verb: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Flags for all settings that have one, or for those of `names`."""
    verb.add_argument("--config", type=Path, metavar="FILE", help="TOML file; deploy/nearhub.toml shows every key")
    for setting in SETTINGS:
        if setting.flag and (names is None or setting.name in names):
            verb.add_argument(
                setting.flag,
                dest=setting.name,
                action="append" if setting.kind.gather else "store",
                metavar=setting.kind.metavar,
                help=f"{setting.doc} (${setting.variable})".replace("%", "%%"),
            )


def _add_arguments(verb: argparse.ArgumentParser, name: str) -> None:
    match name:
        case "token":
            verb.add_argument("what", choices=("add", "list", "remove"))
            verb.add_argument("name", nargs="?", default="", metavar="NAME", help="whose token it is")
            verb.add_argument("--group", action="append", default=[], help="a group that its owner is in; repeats")
        case "check-config":
            asked = verb.add_argument_group("explain", "tell what the rules make of one file, instead of the settings")
            asked.add_argument("--explain", nargs="+", metavar=("REPO", "FILE"), help="such as org/name model.safetensors")
            asked.add_argument("--group", action="append", default=[], help="a group that the caller is in; repeats")
            asked.add_argument("--licence", action="append", default=[], help='of the repo, or "unknown"; repeats')
            asked.add_argument("--age", metavar="DURATION", help="of the commit, such as 3d")
            asked.add_argument("--size", metavar="SIZE", help="of the file, such as 5GB")
            asked.add_argument("--json", action="store_true", help="print JSON")
            verb.set_defaults(complain=verb.error)
        case "ls":
            verb.add_argument("repo", nargs="?", default="", metavar="REPO", help="only this one, such as datasets/org/name")
        case "purge":
            what = verb.add_mutually_exclusive_group(required=True)
            what.add_argument("repo", nargs="?", default="", metavar="REPO[@REV]", help="a repo, or one revision of it")
            what.add_argument("--blob", default="", metavar="HASH", help="one blob, by its sha256 or git sha1")
            verb.add_argument("--dry-run", action="store_true", help="only say what would go")
        case "keygen":
            verb.add_argument("key", type=Path, metavar="FILE", help="the secret key; the public one goes to FILE.pub")
        case "export":
            verb.add_argument("repos", nargs="+", metavar="REPO[@REV]", help="such as org/name, or datasets/org/name@v1")
            verb.add_argument("--to", type=Path, required=True, metavar="DIR", help="an empty or new directory")
            verb.add_argument(
                "--since", type=Path, metavar="BUNDLE", help="only what is new since this bundle (or its manifest)"
            )
            verb.add_argument("--max-part", default="4GiB", metavar="SIZE", help="a part is smaller than this (4GiB: fits FAT)")
            verb.add_argument("--git", action="store_true", help="what git clone needs, too")
            verb.add_argument("--sign", type=Path, metavar="KEY", help="a secret key, of keygen or of minisign -G -W")
            verb.set_defaults(complain=verb.error)
        case "import":
            verb.add_argument("path", type=Path, metavar="PATH", help="a bundle's directory, or a git clone")
            verb.add_argument("--check", action="store_true", help="only check signature and hashes of a bundle")
            verb.add_argument("--allow-rollback", action="store_true", help="a bundle older than what was imported, too")
            verb.add_argument("--repo", default="", metavar="REPO", help="what the clone is of, where its remote does not say")
            verb.add_argument("--public", action="store_true", help="everybody may have what the clone holds")
        case "import-hf-cache":
            verb.add_argument("path", type=Path, metavar="DIR", help="such as ~/.cache/huggingface/hub")
            verb.add_argument("--public", action="store_true", help="everybody may have what it holds")
        case "why":
            verb.add_argument("what", metavar="URL|ID", help="a URL (or its path), or the X-Request-Id of an answer")


def _serve(config: Config, arguments: argparse.Namespace) -> int:
    from nearhub.web.app import run

    return run(config)


def _check_config(config: Config, arguments: argparse.Namespace) -> int:
    if arguments.explain:
        return _explain(config, arguments)
    if given := [flag for flag in ("group", "licence", "age", "size", "json") if getattr(arguments, flag)]:
        arguments.complain(f"--{given[0]} is for --explain REPO FILE")
    print(rendered(config), end="")
    return 0


def _explain(config: Config, arguments: argparse.Namespace) -> int:
    from nearhub.explain import explained, read_facts, shown

    repo, *files = arguments.explain
    if len(files) > 1:
        arguments.complain(f"--explain takes a repo and at most one file: what is {files[1]}?")
    try:
        facts = read_facts(
            repo,
            files[0] if files else None,
            groups=arguments.group,
            licences=arguments.licence,
            age=arguments.age,
            size=arguments.size,
        )
    except BadValue as bad:
        print(*bad.args, sep="\n", file=sys.stderr)
        return 2
    told = explained(config.rules, facts, config.access.contact)
    print(json.dumps(told, indent=2) if arguments.json else shown(told))
    return 0


def _token(config: Config, arguments: argparse.Namespace) -> int:
    from nearhub.errors import NearhubError
    from nearhub.store.tokens import TokenFile

    tokens = TokenFile(config.access.tokens)
    try:
        if arguments.what == "add":
            print(tokens.add(arguments.name, frozenset(arguments.group)))
            print("This is the only time that it is shown.", file=sys.stderr)
        elif arguments.what == "remove":
            tokens.remove(arguments.name)
        else:
            rows = sorted((local.name, ", ".join(sorted(local.groups))) for local in tokens.read().values())
            print("\n".join(f"{name}  {groups}".rstrip() for name, groups in rows))
    except NearhubError as exc:
        print(f"nearhub token: {exc.message}", file=sys.stderr)
        return 1
    return 0


def _keygen(config: Config, arguments: argparse.Namespace) -> int:
    from nearhub.bundle.signing import new_key, public_file, secret_file

    secret, public = arguments.key, arguments.key.with_name(f"{arguments.key.name}.pub")
    key = new_key()
    try:
        with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secret_file(key))
        with open(public, "x", encoding="ascii") as file:
            file.write(public_file(key.public))
    except OSError as exc:
        print(f"nearhub keygen: {exc.filename or secret}: {exc.strerror}", file=sys.stderr)
        return 1
    print(f"{key.public}")
    print(f"{secret} signs bundles: keep it. {public} is for [import] trusted_keys.", file=sys.stderr)
    return 0


def _exported(arguments: argparse.Namespace) -> dict[str, object]:
    try:
        max_part = parse_size(arguments.max_part)
    except BadValue as bad:
        arguments.complain(f"--max-part: {bad}")
    since = str(arguments.since.absolute()) if arguments.since else ""
    sign = str(arguments.sign.absolute()) if arguments.sign else ""
    where = {"to": str(arguments.to.absolute()), "since": since, "sign": sign}
    return {"repos": arguments.repos, "max_part": max_part, "git": arguments.git, **where}


def _operate(config: Config, arguments: argparse.Namespace) -> int:
    from nearhub.verbs import run_verb

    asked: dict[str, object] = {}
    match arguments.verb:
        case "ls":
            asked = {"repo": arguments.repo}
        case "why":
            asked = {"what": arguments.what}
        case "export":
            asked = _exported(arguments)
        case "import":
            asked = {"path": str(arguments.path.absolute()), "allow_rollback": arguments.allow_rollback}
            asked |= {"check": arguments.check, "repo": arguments.repo, "public": arguments.public}
        case "import-hf-cache":
            asked = {"path": str(arguments.path.absolute()), "public": arguments.public}
        case "purge":
            repo, _, revision = arguments.repo.partition("@")
            asked = {"repo": repo, "revision": revision, "blob": arguments.blob, "dry_run": arguments.dry_run}
    return run_verb(config, arguments.verb, asked, as_json=arguments.json)
