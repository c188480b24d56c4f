"""On which line a TOML file has each key: tomllib does not tell, and an error message needs it."""

import re
import tomllib
from collections.abc import Mapping
from itertools import accumulate

KeyPath = tuple[str | int, ...]
"""Table names, keys, and indices of array items, from the top of the document."""

_TOKEN = re.compile(
    r"""
      (?:\#[^\n]*|[ \t\r]+)                                                 # nothing: comments and blanks
    | (?P<token>
        \"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5}                         # strings of several lines
      | "(?:\\.|[^"\\])*" | '[^']*'
      | [\[\]{}=,.\n]
      | [^\s\[\]{}=,."'\#]+
      )
    """,
    re.VERBOSE | re.DOTALL,
)


def locate(text: str) -> dict[KeyPath, int]:
    """The line of every key, table and array item in ``text``, which tomllib has accepted.

    tomllib tells no lines. Only the structure is followed here: values are skipped, whatever they are.
    """
    return _Locator(text).lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line of ``path``, or of what holds it."""
    return next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 1)


class _Locator:
    """Walks the tokens of one valid TOML document once and keeps the line of each path it meets."""

    def __init__(self, text: str) -> None:
        matches = list(_TOKEN.finditer(text))
        starts = accumulate((match[0].count("\n") for match in matches), initial=1)
        pairs = zip(matches, starts, strict=False)
        self._tokens = [(match["token"], line) for match, line in pairs if match["token"]]
        self._tokens.append(("\n", text.count("\n") + 1))
        self._at = 0
        self._array_sizes: dict[KeyPath, int] = {}
        self.lines: dict[KeyPath, int] = {}
        self._document()

    def _document(self) -> None:
        table: KeyPath = ()
        while self._at < len(self._tokens):
            if self._took("["):
                table = self._header()
            elif not self._took("\n"):
                self._pair(table)

    def _header(self) -> KeyPath:
        """``[a.b]`` or ``[[a.b]]``, after the first bracket; a name of an array stands for its latest table."""
        line = self._line()
        is_array = self._took("[")
        *parents, last = self._keys()
        path: KeyPath = ()
        for key in parents:
            path = self._latest((*path, key))
            self.lines.setdefault(path, line)
        path = (*path, last)
        if is_array:
            self.lines.setdefault(path, line)
            self._array_sizes[path] = self._array_sizes.get(path, 0) + 1
            path = self._latest(path)
        self.lines[path] = line
        while not self._took("\n"):
            self._at += 1
        return path

    def _latest(self, path: KeyPath) -> KeyPath:
        return (*path, self._array_sizes[path] - 1) if path in self._array_sizes else path

    def _pair(self, path: KeyPath) -> None:
        line = self._line()
        for key in self._keys():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self._took("=")
        self._value(path)

    def _keys(self) -> list[str]:
        keys: list[str] = []
        while not keys or self._took("."):
            token = self._tokens[self._at][0]
            self._at += 1
            keys.append(tomllib.loads(f"key = {token}")["key"] if token[0] in "\"'" else token)
        return keys

    def _value(self, path: KeyPath) -> None:
        if self._took("["):
            index = 0
            while not self._took("]"):
                if not self._took(",") and not self._took("\n"):
                    self.lines[(*path, index)] = self._line()
                    self._value((*path, index))
                    index += 1
        elif self._took("{"):
            while not self._took("}"):
                if not self._took(",") and not self._took("\n"):
                    self._pair(path)
        else:
            while self._tokens[self._at][0] not in {",", "]", "}", "\n"}:
                self._at += 1

    def _line(self) -> int:
        return self._tokens[self._at][1]

    def _took(self, text: str) -> bool:
        """Step over the next token if it is this one."""
        is_next = self._tokens[self._at][0] == text
        self._at += is_next
        return is_next
