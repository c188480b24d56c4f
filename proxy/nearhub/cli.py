"""The ``nearhub`` command: parses, calls, prints. What a command does must not be in here.

Nothing of the server is imported before a command needs it, so that ``--help`` answers at once.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from nearhub import __version__
from nearhub.config import SETTINGS, Config, ConfigError, load, rendered
from nearhub.kinds import FLAG, Kind
from nearhub.units import BadValue, parse_size

_VERBS = {
    "ls": "list what the cache has, by repo and commit",
    "du": "tell what takes the space",
    "purge": "remove a repo, a revision or a blob",
    "verify": "read and hash every blob; wrong ones are removed, and brought anew when asked for",
    "stats": "print the counters of the running mirror",
    "why": "explain how a URL is answered, or how a request was",
    "prefetch": "bring a repo at a revision before anybody asks for it",
    "pin": "keep a repo, a revision or the last commits of a branch, whatever room is needed; or list what is kept",
    "unpin": "let go of what was pinned",
    "offline": "tell whether the running mirror is offline, or switch it until it ends",
    "export": "write repos as a bundle that crosses an air gap",
    "import": "take in a bundle, or a git clone of a Hub's repo",
    "import-hf-cache": "take in what huggingface_hub downloaded",
}
_LOG = {
    "prove": "prove that what a repo has at a revision is in the log; proofs in C2SP's tlog-proof",
    "verify": "check a log, that it only grew, and proofs; needs no cache, only files (or a URL) and the public key",
    "key": "print the log's public key, which auditors need",
}
_OF_VERBS = frozenset({"cache.dir", "cache.index_dir", "server.prefix"})
_OF_PREFETCH = frozenset({"cache.max_size", "upstream.urls", "upstream.blob_hosts", "upstream.ca_bundle", "prefetch.max_rate"})


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
        ("audit", _audit, "follow the chain of who got what ([audit] enabled), and tell where it is broken"),
        ("keygen", _keygen, "make a key that bundles are signed with"),
    ):
        verb = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
        verb.set_defaults(command=command)
        _add_settings(verb)
        _add_arguments(verb, name)
    for name, summary in _VERBS.items():
        verb = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
        verb.set_defaults(command=_operate, verb=name)
        _add_settings(verb, _OF_VERBS | _OF_PREFETCH if name == "prefetch" else _OF_VERBS)
        verb.add_argument("--json", action="store_true", help="print JSON")
        _add_arguments(verb, name)
    summary = "write or check hf.lock: the commit and every file's hash of repos, as an endpoint tells them"
    lock = commands.add_parser("lock", help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
    lock.set_defaults(command=_lock)
    _add_settings(lock, ())
    _add_arguments(lock, "lock")
    log = commands.add_parser("log", help="the transparency log of what upstreams said", allow_abbrev=False)
    kinds = log.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in _LOG.items():
        verb = kinds.add_parser(name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
        verb.set_defaults(command=_prove if name == "prove" else _log, verb=name)
        _add_settings(verb, _OF_VERBS)
        if name != "key":
            verb.add_argument("--json", action="store_true", help="print JSON")
        _add_arguments(verb, f"log {name}")
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
                **_bare(setting.kind),
                metavar=setting.kind.metavar,
                help=f"{setting.doc} (${setting.variable})".replace("%", "%%"),
            )


def _bare(kind: Kind) -> dict[str, Any]:
    """A flag that may stand alone: --offline is --offline true."""
    return {"nargs": "?", "const": "true"} if kind is FLAG else {}


def _add_arguments(verb: argparse.ArgumentParser, name: str) -> None:
    match name:
        case "token":
            verb.add_argument("what", choices=("add", "list", "remove"))
            verb.add_argument("name", nargs="?", default="", metavar="NAME", help="whose token it is")
            verb.add_argument("--group", action="append", default=[], help="a group that its owner is in; repeats")
        case "audit":
            verb.add_argument("what", choices=("verify",))
            verb.add_argument("--head", default="", metavar="HASH", help="a head noted earlier, which the chain must contain")
            verb.add_argument("--json", action="store_true", help="print JSON")
        case "lock":
            verb.add_argument("repos", nargs="*", metavar="REPO[@REV]", help="the default is every one that stands there")
            verb.add_argument("-o", "--file", type=Path, default=Path("hf.lock"), metavar="FILE", help="the default is hf.lock")
            verb.add_argument("--check", action="store_true", help="change nothing; exit status 1 when anything differs")
            verb.add_argument("--endpoint", default="", metavar="URL", help="whom to ask; else $HF_ENDPOINT, else this mirror")
            verb.add_argument("--files", type=Path, metavar="DIR", help="with --check: ask nobody, and hash what is there")
            verb.set_defaults(complain=verb.error)
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
            verb.add_argument("--force", action="store_true", help="what is pinned too; the pins of just that go with it")
        case "prefetch":
            verb.add_argument("repos", nargs="*", metavar="REPO[@REV]", help="such as datasets/org/name, or org/name@v1.0")
            verb.add_argument(
                "--list", type=Path, metavar="FILE", help="repos to bring too, one REPO[@REV] a line; # begins a remark"
            )
            verb.add_argument("--include", action="append", default=[], metavar="GLOB", help="only paths that match; repeats")
            verb.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="no paths that match; repeats")
            verb.add_argument("--git", action="store_true", help="what git clone needs, too")
            verb.set_defaults(complain=verb.error)
        case "pin":
            what = verb.add_mutually_exclusive_group(required=True)
            what.add_argument("repo", nargs="?", default="", metavar="REPO[@REV]", help="a repo, a commit, or a branch or tag")
            what.add_argument("--list", action="store_true", help="show all pins, and what is here of them")
            verb.add_argument("--last", type=int, default=1, metavar="N", help="of a branch (main): its last N commits")
            verb.add_argument("--group", default="", metavar="NAME", help="so that all of the group can be unpinned at once")
            verb.set_defaults(complain=verb.error)
        case "unpin":
            what = verb.add_mutually_exclusive_group(required=True)
            what.add_argument("repo", nargs="?", default="", metavar="REPO[@REV]", help="as it was pinned")
            what.add_argument("--group", default="", metavar="NAME", help="all pins of this group")
        case "offline":
            meaning = "on: nobody outside is asked; off: upstream is asked when needed; auto: unless it is silent for long"
            modes = ("on", "off", "auto", "")
            verb.add_argument("mode", nargs="?", default="", choices=modes, metavar="on|off|auto", help=meaning)
        case "log prove":
            verb.add_argument("repo", metavar="REPO[@REV]", help="such as org/name@main, or datasets/org/name")
            verb.add_argument("path", nargs="?", default="", metavar="PATH", help="only of this file")
        case "log verify":
            verb.add_argument("proofs", nargs="*", type=Path, metavar="PROOF", help="a file that `nearhub log prove` wrote")
            verb.add_argument("--since", type=Path, metavar="FILE", help="an earlier checkpoint of the same log")
            verb.add_argument("--log", default="", metavar="DIR|URL", help="the log: a copy of it, or http://HOST/-/log")
            verb.add_argument("--key", default="", metavar="KEY|FILE", help="its public key; the default is that in DIR/vkey")
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


def _audit(config: Config, arguments: argparse.Namespace) -> int:
    from nearhub.errors import NearhubError
    from nearhub.store.audit import shown, verify

    try:
        report = verify(config.cache.dir / "audit", arguments.head)
    except NearhubError as exc:
        print(f"nearhub audit: {exc.message}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(report), indent=2) if arguments.json else shown(report))
    return 1 if report.problems else 0


def _prefetched(arguments: argparse.Namespace) -> dict[str, object]:
    repos = list(arguments.repos)
    if arguments.list is not None:
        try:
            lines = arguments.list.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            arguments.complain(f"--list {arguments.list} cannot be read: {exc}")
        repos += [text for line in lines if (text := line.partition("#")[0].strip())]
    if not repos:
        arguments.complain("name a REPO[@REV], or a --list FILE that names some")
    shape = {"include": arguments.include, "exclude": arguments.exclude, "with_git": arguments.git}
    return {"repos": repos, **shape}


def _prove(config: Config, arguments: argparse.Namespace) -> int:
    from nearhub.verbs import run_verb

    repo, _, revision = arguments.repo.partition("@")
    asked = {"repo": repo, "revision": revision, "path": arguments.path}
    return run_verb(config, "prove", asked, as_json=arguments.json)


def _log(config: Config, arguments: argparse.Namespace) -> int:
    from nearhub.errors import NearhubError
    from nearhub.proving import verdict

    own = config.cache.dir.absolute() / "log"
    try:
        if arguments.verb == "key":
            print((own / "vkey").read_text(encoding="utf-8"), end="")
            return 0
        told = verdict(arguments.log, own, arguments.key, arguments.since, arguments.proofs)
    except (NearhubError, OSError) as exc:
        print(f"nearhub log {arguments.verb}: {exc}", file=sys.stderr)
        return 1
    print(json.dumps(told, indent=2) if arguments.json else told["text"])
    return 0


def _lock(config: Config, arguments: argparse.Namespace) -> int:
    from nearhub.errors import NearhubError
    from nearhub.locking import run

    if arguments.files and not arguments.check:
        arguments.complain("--files is for --check")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.server.host, config.server.host)
    mirror = f"http://{f'[{host}]' if ':' in host else host}:{config.server.port}{config.server.prefix}"
    url = arguments.endpoint or os.environ.get("HF_ENDPOINT") or mirror
    try:
        lines, is_right = run(
            arguments.file,
            arguments.repos,
            url,
            os.environ.get("HF_TOKEN"),
            is_check=arguments.check,
            files=arguments.files,
        )
    except NearhubError as exc:
        print(f"nearhub lock: {exc.message}", file=sys.stderr)
        return 1
    print(*lines, sep="\n")
    return 0 if is_right else 1


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
    verb: str = arguments.verb
    match arguments.verb:
        case "ls":
            asked = {"repo": arguments.repo}
        case "prefetch":
            asked = _prefetched(arguments)
            if getattr(arguments, "prefetch.max_rate") is not None:
                asked["rate"] = config.prefetch.max_rate_bytes
        case "offline":
            asked = {"mode": arguments.mode}
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
            asked = {"repo": repo, "revision": revision, "blob": arguments.blob}
            asked |= {"dry_run": arguments.dry_run, "force": arguments.force}
        case "pin":
            if arguments.last < 1:
                arguments.complain("--last must be 1 or more")
            repo, _, revision = arguments.repo.partition("@")
            asked = {"repo": repo, "revision": revision, "last": arguments.last, "group": arguments.group}
            if arguments.list:
                verb, asked = "pins", {}
        case "unpin":
            repo, _, revision = arguments.repo.partition("@")
            asked = {"repo": repo, "revision": revision, "group": arguments.group}
    return run_verb(config, verb, asked, as_json=arguments.json)
