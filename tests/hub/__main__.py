"""`python -m tests.hub`: the stand-in Hub on its own, with a small demo or the repositories of a directory."""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
from pathlib import Path

from tests.hub.content import LFS, Content
from tests.hub.repos import KINDS, Kind
from tests.hub.server import Hub

_SUFFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_LFS_FROM_BYTES = 10 << 20
_LFS_SUFFIXES = frozenset({".safetensors", ".bin", ".gguf", ".parquet", ".pt", ".onnx", ".zip"})


def main(arguments: list[str] | None = None) -> None:
    """Parse, serve until SIGTERM or SIGINT."""
    asyncio.run(_serve(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
    parser.add_argument("--port", type=int, default=8091, help="the Hub's port (0: any)")
    parser.add_argument("--cdn-port", type=int, default=8092, help="the CDN's port (0: any)")
    parser.add_argument("--dir", type=Path, help="serve [datasets/|spaces/]ORG/NAME/... below this directory")
    parser.add_argument("--empty", action="store_true", help="start without the demo repository")
    parser.add_argument("--no-xet", action="store_true", help="plain LFS, as before Xet")
    parser.add_argument("--cap-per-connection", type=_size, metavar="SIZE", help="bytes per second, such as 20MB")
    parser.add_argument("--cap-total", type=_size, metavar="SIZE", help="bytes per second in all")
    return parser


def _size(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match.group(2) not in _SUFFIXES:
        raise argparse.ArgumentTypeError(f"not a size: {text!r}")
    return float(match.group(1)) * _SUFFIXES[match.group(2)]


async def _serve(options: argparse.Namespace) -> None:
    hub = Hub(xet=not options.no_xet, control=True)
    hub.cap(per_connection=options.cap_per_connection, total=options.cap_total)
    if options.dir is not None:
        load(hub, options.dir)
    elif not options.empty:
        demo(hub)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, ended.set)
    await hub.start(options.port, options.cdn_port)
    try:
        print(f"hub ready on {hub.url} cdn {hub.cdn_url}", flush=True)
        for repo in hub.world.repos.values():
            print(f"  {repo.kind} {repo.id}: {len(repo.head.files) if repo.head else 0} files", flush=True)
        print(f"  try: HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 hf download ORG/NAME", flush=True)
        await ended.wait()
    finally:
        await hub.stop()


def demo(hub: Hub) -> None:
    """A model and a dataset, a few megabytes of each kind of file."""
    model = hub.repo("demo/tiny-model")
    first = model.commit(
        {
            "README.md": "---\nlicense: apache-2.0\n---\n# A tiny model\n",
            "config.json": '{"model_type": "tiny"}\n',
            "model.safetensors": LFS(Content(32 << 20, seed=1)),
        },
        title="First upload",
    )
    model.tag("v1", first)
    rows = "".join(f'{{"text": "row {number}"}}\n' for number in range(100))
    hub.repo("demo/tiny-data", "datasets").commit({"README.md": "# Rows\n", "data/train.jsonl": rows})


def load(hub: Hub, root: Path) -> None:
    """One commit on main for every repository found below a directory."""
    for kind in KINDS:
        base = root if kind == "models" else root / kind
        for folder in sorted(base.glob("*/*")):
            if folder.is_dir() and not (kind == "models" and folder.parent.name in KINDS):
                _load_repo(hub, folder, f"{folder.parent.name}/{folder.name}", kind)


def _load_repo(hub: Hub, folder: Path, repo_id: str, kind: Kind) -> None:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    shown = {name: path for name, path in files.items() if not name.startswith(".git/")}
    hub.repo(repo_id, kind).commit({name: LFS(path) if _is_large(path) else path for name, path in shown.items()})


def _is_large(path: Path) -> bool:
    return path.suffix in _LFS_SUFFIXES or path.stat().st_size >= _LFS_FROM_BYTES


if __name__ == "__main__":
    main()
