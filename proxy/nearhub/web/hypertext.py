"""HTML: the page of a repo, and errors as a browser shows them. Pure; whatever a repo or upstream says is escaped here.

No page needs a script or loads anything: styles, script and icon are in it, and its policy lets nothing else run.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from nearhub.units import rough_size
from nearhub.wire.manifest import Entry
from nearhub.wire.target import (
    DEFAULT_REVISION,
    FileTarget,
    PageTarget,
    RepoKind,
    format_file,
    format_page,
    format_short,
    is_commit,
)

_STYLE = """
:root{color-scheme:light dark;--text:#1c2024;--soft:#5f6670;--line:#dfe2e6;--back:#fff;--panel:#f5f6f8;--link:#0b5cad;
--warn:#7a4a00;--warn-back:#fff4dc}
@media (prefers-color-scheme:dark){:root{--text:#e6e8eb;--soft:#9aa3ad;--line:#32383f;--back:#14171a;--panel:#1d2126;
--link:#7cb7ff;--warn:#f2cd86;--warn-back:#33280f}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:64rem;margin:0 auto;padding:1.5rem 1rem 3rem}
a{color:var(--link);text-decoration:none}
a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
h1{font-size:1.6rem;line-height:1.25;margin:.1rem 0 1rem}
h2{font-size:1.1rem;margin:2rem 0 .5rem}
code{font:.875em/1.5 ui-monospace,monospace}
.kind{margin:0;color:var(--soft)}
.facts{display:flex;flex-wrap:wrap;gap:.75rem 2.5rem;margin:0}
.facts dt{color:var(--soft);font-size:.875rem}
.facts dd{margin:0}
.note{margin:1rem 0 0;padding:.6rem .8rem;border-radius:6px;background:var(--warn-back);color:var(--warn)}
.jump{margin:1rem 0 0}
.crumbs ol{display:flex;flex-wrap:wrap;gap:0 .35rem;list-style:none;margin:0 0 .5rem;padding:0}
.crumbs li+li::before{content:"/";color:var(--soft);margin-right:.35rem}
table{width:100%;border-collapse:collapse;border:1px solid var(--line)}
th,td{padding:.4rem .75rem;text-align:left;vertical-align:top;font-weight:400}
tr+tr>*,tbody tr>*{border-top:1px solid var(--line)}
thead th{background:var(--panel);color:var(--soft);font-size:.875rem}
tbody tr:hover{background:var(--panel)}
.size{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums;color:var(--soft)}
.directory th{font-weight:600}
.hidden{padding:0 .2em;border:1px solid var(--warn);border-radius:3px;color:var(--warn);font-size:.75em}
.empty{color:var(--soft)}
.pages{display:flex;justify-content:space-between;margin:.75rem 0}
.command{margin:.75rem 0}
.command>p{margin:0 0 .2rem;color:var(--soft);font-size:.875rem}
.box{display:flex;align-items:flex-start;background:var(--panel);border:1px solid var(--line);border-radius:6px}
pre{flex:1;min-width:0;margin:0;padding:.6rem .75rem;white-space:pre-wrap}
pre code{user-select:all;-webkit-user-select:all}
button{margin:.35rem;padding:.2rem .7rem;font:inherit;font-size:.875rem;color:inherit;background:var(--back);
border:1px solid var(--line);border-radius:6px;cursor:pointer}
"""
_SCRIPT = """
for (const box of document.querySelectorAll(".box")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.onclick = () => {
    getSelection().selectAllChildren(box.querySelector("code"));
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  };
  box.append(button);
}
"""
# execCommand, since navigator.clipboard is not there over plain http.
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Cpath d='M1 3h5l2 2h7v9H1z' fill='%23e0a526'/%3E%3C/svg%3E"
)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": (
        f"default-src 'none'; style-src {_hash(_STYLE)}; script-src {_hash(_SCRIPT)}; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}
"""Of every page."""

_KINDS = {RepoKind.MODELS: "Model", RepoKind.DATASETS: "Dataset", RepoKind.SPACES: "Space"}
_INVISIBLE = re.compile("[\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Characters that show nothing, or turn the text around them: a name could pretend to be another."""
_TROUBLES = {
    "RepoNotFound": "No such public repository",
    "RevisionNotFound": "No such revision",
    "EntryNotFound": "No such file or directory",
    "UnknownOffline": "Not here, and the Hub does not answer",
}


@dataclass(frozen=True, slots=True)
class View:
    """One directory of a repo, or as much of it as a page shows. `base`: what this client has as HF_ENDPOINT.

    `files`: all of the repo's; None where not all are known. `next_query`: of the next page.
    """

    base: str
    target: PageTarget
    commit: str
    about: Mapping[str, Any]
    entries: Sequence[Entry]
    files: Sequence[Entry] | None
    next_query: str | None = None
    is_first: bool = True
    is_gated: bool = False
    is_stale: bool = False


def repo_page(view: View) -> str:
    """The page of a repo, or of a directory of it."""
    repo = view.target.repo
    top = _href(view, PageTarget(repo, view.target.revision))
    where = "/".join(part for part in (repo.name, view.target.path) if part)
    return _document(
        f"{where} at {view.target.revision}",
        f'<header><p class="kind">{_KINDS[repo.kind]}</p>\n'
        f'<h1><a href="{top}">{_text(repo.name)}</a></h1>\n{_facts(view)}{_notes(view)}{_jump(view)}</header>\n'
        f'<section aria-labelledby="files"><h2 id="files">Files</h2>\n{_crumbs(view)}{_table(view)}{_pages(view)}</section>\n'
        f"{_downloads(view)}",
    )


def trouble_page(status: int, message: str, code: str, request_id: str) -> str:
    """An error."""
    title = _TROUBLES.get(code) or HTTPStatus(status).phrase
    return _document(
        title,
        f'<p class="kind">{status}</p>\n<h1>{_text(title)}</h1>\n<p>{_text(message)}</p>\n'
        f'<p class="kind"><code>{_text(code)}</code>, request <code>{_text(request_id)}</code></p>\n',
    )


def commands(view: View) -> list[tuple[str, str]]:
    """(what it does, command for a POSIX shell)."""
    repo, revision, path = view.target.repo, view.target.revision, view.target.path
    if not revision.isprintable():
        revision = view.commit
    hf = ["hf", "download", repo.name]
    if repo.kind is not RepoKind.MODELS:
        hf += ["--repo-type", repo.kind.removesuffix("s")]
    if revision != DEFAULT_REVISION:
        hf += ["--revision", revision]
    if path:
        hf += ["--include", f"{_pattern(path)}/*"]
    what = "these files" if path else "all files"
    found = [(f"With hf, the Hub’s own client: {what}", f"HF_ENDPOINT={shlex.quote(view.base)} {shlex.join(hf)}")]
    if not is_commit(revision) and not revision.startswith("refs/"):
        branch = [] if revision == DEFAULT_REVISION else ["-b", revision]
        url = view.base + format_page(PageTarget(repo, DEFAULT_REVISION))
        found.append(("With git and git-lfs", shlex.join(["git", "clone", *branch, url])))
    if (largest := _largest(view)) is not None:
        url = view.base + format_short(FileTarget(repo, view.target.revision, largest.path))
        what = f"With aria2: the largest file ({rough_size(largest.size)})"
        found.append((what, shlex.join(["aria2c", "-x16", "-s16", url])))
    return found


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{_plain(title)} · nearhub</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="{_ICON}">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _facts(view: View) -> str:
    revision, commit = view.target.revision, view.commit
    pinned = _href(view, PageTarget(view.target.repo, commit, view.target.path))
    facts = [] if revision == commit else [("Revision", _text(revision))]
    facts.append(("Commit", f'<a href="{pinned}"><code>{_text(commit)}</code></a>'))
    if view.files is not None:
        number = len(view.files)
        size = sum(file.size for file in view.files)
        facts.append(("Size", f"{rough_size(size)} in {number:,} file{'' if number == 1 else 's'}"))
    if licence := _licence(view.about):
        facts.append(("Licence", _text(licence)))
    facts.append(("Access", "gated" if view.is_gated else "public"))
    told = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>\n" for name, value in facts)
    return f'<dl class="facts">\n{told}</dl>\n'


def _licence(about: Mapping[str, Any]) -> str | None:
    """As the card says, else as the tags say."""
    card, tags = about.get("cardData"), about.get("tags")
    said = card.get("license") if isinstance(card, dict) else None
    if isinstance(said, str) and said:
        return said
    tags = tags if isinstance(tags, list) else []
    return next((tag[8:] for tag in tags if isinstance(tag, str) and tag.startswith("license:")), None)


def _notes(view: View) -> str:
    notes = []
    if view.is_gated:
        notes.append("This repository is gated. Its files are listed, and not served: this mirror serves public ones only.")
    if view.is_stale:
        notes.append("The Hub does not answer. This is what it said last.")
    return "".join(f'<p class="note">{note}</p>\n' for note in notes)


def _crumbs(view: View) -> str:
    """From the repo to this directory; nothing at the top."""
    target = view.target
    if not target.path:
        return ""
    names = target.path.split("/")
    steps = [(target.repo.name.rpartition("/")[2], ""), *((name, "/".join(names[: i + 1])) for i, name in enumerate(names))]
    items = [
        f'<li><a href="{_href(view, PageTarget(target.repo, target.revision, path))}">{_text(name)}</a></li>'
        for name, path in steps[:-1]
    ]
    items.append(f'<li aria-current="page">{_text(steps[-1][0])}</li>')
    return f'<nav class="crumbs" aria-label="Directory"><ol>\n{"".join(items)}</ol></nav>\n'


def _table(view: View) -> str:
    if not view.entries:
        return '<p class="empty">There are no files here.</p>\n'
    rows = "".join(_rows(view))
    head = '<thead><tr><th scope="col">Name</th><th scope="col" class="size">Size</th></tr></thead>'
    return f'<table aria-labelledby="files">\n{head}\n<tbody>\n{rows}</tbody>\n</table>\n'


def _rows(view: View) -> Iterator[str]:
    """Directories, then files, as on the Hub."""
    repo, revision = view.target.repo, view.target.revision
    sizes = _directory_sizes(view)
    for entry in sorted(view.entries, key=lambda entry: not entry.is_directory):
        name = _text(entry.path.rpartition("/")[2])
        if entry.is_directory:
            href = _href(view, PageTarget(repo, revision, entry.path))
            yield _row("directory", f'<a href="{href}">{name}/</a>', sizes.get(entry.path))
        else:
            href = _href(view, FileTarget(repo, revision, entry.path))
            yield _row("file", name if view.is_gated else f'<a href="{href}">{name}</a>', entry.size)


def _row(word: str, name: str, size: int | None) -> str:
    told = "" if size is None else f'<data value="{size}" title="{size:,} bytes">{rough_size(size)}</data>'
    return f'<tr class="{word}"><th scope="row">{name}</th><td class="size">{told}</td></tr>\n'


def _directory_sizes(view: View) -> dict[str, int]:
    """Of what is in each directory that this page lists."""
    prefix = f"{view.target.path}/" if view.target.path else ""
    sizes: dict[str, int] = {}
    for file in view.files or ():
        child, slash, _ = file.path.removeprefix(prefix).partition("/")
        if slash and file.path.startswith(prefix):
            sizes[prefix + child] = sizes.get(prefix + child, 0) + file.size
    return sizes


def _pages(view: View) -> str:
    """Pages are of one commit, so that no list is spliced of two."""
    here = _href(view, PageTarget(view.target.repo, view.commit, view.target.path))
    links = [] if view.is_first else [f'<a href="{here}">First page</a>']
    if view.next_query is not None:
        links.append(f'<a rel="next" href="{here}?{escape(view.next_query)}">Next page</a>')
    return f'<nav class="pages" aria-label="Pages">{"".join(links)}</nav>\n' if links else ""


def _jump(view: View) -> str:
    """Over a long list."""
    return "" if view.is_gated else '<p class="jump"><a href="#download">Commands to download</a></p>\n'


def _downloads(view: View) -> str:
    if view.is_gated:
        return ""
    shown = "".join(
        f'<div class="command"><p>{_text(what)}</p>\n<div class="box"><pre><code>{_plain(command)}</code></pre></div></div>\n'
        for what, command in commands(view)
    )
    return f'<section aria-labelledby="download"><h2 id="download">Download from this mirror</h2>\n{shown}</section>\n'


def _largest(view: View) -> Entry | None:
    """Of the files in and below this directory."""
    prefix = f"{view.target.path}/" if view.target.path else ""
    files = [file for file in view.files or view.entries if not file.is_directory and file.path.startswith(prefix)]
    return max(files, key=lambda file: file.size, default=None)


def _pattern(path: str) -> str:
    """For fnmatch: `path` and nothing else, where a terminal can show it."""
    escaped = re.sub(r"([*?[])", r"[\1]", path)
    return "".join(character if character.isprintable() else "?" for character in escaped)


def _href(view: View, target: PageTarget | FileTarget) -> str:
    path = format_page(target) if isinstance(target, PageTarget) else format_file(target)
    return escape(path_below(view.base, path))


def path_below(base: str, path: str) -> str:
    """`path` of this mirror as a path of the origin that the client is on."""
    return urlsplit(base).path + path


def _text(text: str) -> str:
    """Isolated from the text around it, and with what it hides made visible."""
    shown = _INVISIBLE.sub(lambda match: f'<span class="hidden">U+{ord(match[0]):04X}</span>', escape(text))
    return f"<bdi>{shown}</bdi>"


def _plain(text: str) -> str:
    """Where no markup can be."""
    return escape(_INVISIBLE.sub("\ufffd", text))
