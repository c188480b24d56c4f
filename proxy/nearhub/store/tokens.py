"""The mirror's own tokens: a text file that an operator keeps with `nearhub token`, in which no token stands.

A line a token: name, sha256 of the token, groups. The file is looked at whenever somebody brings a token, so that one that is
removed opens nothing any more.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from nearhub.errors import BadTarget, StoreFailed
from nearhub.store.disk import Disk
from nearhub.wire.credentials import OWN, Local, hashed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
_HEAD = "# Tokens of this mirror: name, sha256 of the token, groups. Kept by `nearhub token add|remove`.\n"


class TokenFile:
    """`path` None: there are no such tokens."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._locals: dict[str, Local] = {}

    def read(self) -> Mapping[str, Local]:
        """Whom each token names, by its hash. Raises StoreFailed for a file that cannot be read, or holds nonsense."""
        if self._path is None:
            return {}
        try:
            info = self._path.stat()
            stamp = (info.st_mtime_ns, info.st_size, info.st_ino)
            if stamp != self._stamp:
                self._locals, self._stamp = parsed(self._path.read_text(encoding="utf-8"), str(self._path)), stamp
        except FileNotFoundError:
            self._locals, self._stamp = {}, None
        except (OSError, UnicodeDecodeError) as exc:
            raise StoreFailed(f"{self._path}: the tokens cannot be read: {exc}") from exc
        return self._locals

    def add(self, name: str, groups: frozenset[str]) -> str:
        """Make a token, which is returned and kept nowhere. Raises BadTarget for a name or a group that is none or taken."""
        if self._path is None:
            raise BadTarget("no file for tokens is set: [access] tokens names one")
        for word in (name, *groups):
            if not _NAME.match(word):
                raise BadTarget(f"{word!r} is no name: letters, digits, and . _ @ - inside, 64 at most")
        known = dict(self.read())
        if any(local.name == name for local in known.values()):
            raise BadTarget(f"there is a token called {name} already: remove it first")
        token = f"{OWN}{secrets.token_urlsafe(32)}"
        self._write(known | {hashed(token): Local(name, groups)})
        return token

    def remove(self, name: str) -> None:
        """Raises BadTarget where there is none of that name."""
        known = dict(self.read())
        left = {mark: local for mark, local in known.items() if local.name != name}
        if left == known:
            raise BadTarget(f"there is no token called {name}")
        self._write(left)

    def _write(self, known: Mapping[str, Local]) -> None:
        assert self._path is not None
        lines = [f"{local.name} {mark} {','.join(sorted(local.groups))}".rstrip() for mark, local in known.items()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        Disk().write_file(self._path, (_HEAD + "".join(f"{line}\n" for line in sorted(lines))).encode())


def parsed(text: str, where: str) -> dict[str, Local]:
    """Raises StoreFailed, naming the line."""
    known: dict[str, Local] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, mark, groups, *rest = [*line.split(), "", ""][: max(3, len(line.split()))]
        words = [word for word in groups.split(",") if word]
        if rest or not _NAME.match(name) or not _HASH.match(mark) or not all(_NAME.match(word) for word in words):
            raise StoreFailed(f"{where}:{number}: is no token: a line is NAME SHA256 [GROUP,…]")
        known[mark] = Local(name, frozenset(words))
    return known
