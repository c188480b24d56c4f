"""Rows from files, directories and dataset snapshots, each with where it stands (`train.jsonl:12`), so that a bad one can be
named.

What a row means is a task's business. Here: formats of files, splits, weights, rows that stand in both splits.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from neartune.recipe import Recipe, Source

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
TABLES = frozenset({".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"})
_VALIDATION = re.compile(r"(?:^|[-_/.])(?:validation|valid|val|dev|eval)(?=[-_/.])", re.IGNORECASE)
_TEST = re.compile(r"(?:^|[-_/.])test(?=[-_/.])", re.IGNORECASE)


class DataError(Exception):
    """The data is at fault; the message names the file and line, and what is expected."""


@dataclass(frozen=True)
class Row:
    """`values` by column; an image is under "image" as a Path, or bytes. `where`: file:line, file:row, or the file itself."""

    values: dict[str, Any]
    where: str

    @cached_property
    def digest(self) -> str:
        """Equal rows have equal digests, wherever they stand."""

        def plain(value: Any) -> Any:
            if isinstance(value, Path):
                return hashlib.sha256(value.read_bytes()).hexdigest()
            return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)

        text = json.dumps(self.values, sort_keys=True, ensure_ascii=False, default=plain)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Splits:
    """What is learnt from, and what is judged by. `report`: what was lost, cut or found double, a line each."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    report: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of all rows, in their order."""
        lines = [row.digest for row in self.train] + [""] + [row.digest for row in self.validation]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load(recipe: Recipe, locate: Callable[[Source], Path]) -> Splits:
    """Read all sources. `locate`: where a source's files are, fetched if it is a dataset of the Hub. Raises DataError."""
    report: list[str] = []
    train: list[list[Row]] = []
    held_out: list[Row] = []
    sources = [*recipe.train_data, *(recipe.validation_data or ())]
    paths = [locate(source) for source in sources]
    names = _prefixes([_place(source, path) for source, path in zip(sources, paths, strict=True)]) if len(paths) > 1 else [""]
    rows_of = [partial(read, path, name, recipe.task) for path, name in zip(paths, names, strict=True)]
    of_validation = rows_of[len(recipe.train_data) :]
    called = names_of(recipe.train_data)
    for source, name, path, rows in zip(recipe.train_data, called, paths, rows_of, strict=False):
        learnt, judged = rows()
        if count := unread(path):
            report.append(f"{name}: {count} {'file is' if count == 1 else 'files are'} of a test set, and not read")
        if not learnt:
            raise DataError(f"{source.name}: there are no rows to learn from")
        train.append(learnt)
        held_out += judged
    if recipe.validation_data is not None:
        held_out = []
        for rows in of_validation:
            others, judged = rows()
            held_out += judged or others  # of a data set with splits of its own, the one that is meant for this
        if not held_out:
            raise DataError("validation_data has no rows")
    elif held_out:
        report.append(f"{len(held_out)} rows of the data's own validation files are held out")
    elif recipe.validation_split > 0:
        parts = [_split(rows, recipe.validation_split, recipe.seed) for rows in train]
        train = [learnt for learnt, _ in parts]
        held_out = [row for _, judged in parts for row in judged]
        report.append(f"{len(held_out)} rows ({recipe.validation_split:.0%}) are held out")
    mixed = _mixed(train, [source.weight for source in recipe.train_data], recipe.seed, report)
    seen = {row.digest for row in held_out}
    both = [row for row in mixed if row.digest in seen]
    if both:
        report.append(f"{len(both)} rows stand in both splits, such as {both[0].where}: what is judged was seen in training")
    return Splits(tuple(mixed), tuple(held_out), tuple(report))


def _split(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Equal rows go to the same side, so that nothing is judged by what was learnt."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.digest, []).append(row)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    wanted = max(1, round(share * len(rows))) if len(groups) > 1 else 0
    judged: set[str] = set()
    count = 0
    for digest in order:
        if count >= wanted or len(judged) == len(groups) - 1:
            break
        judged.add(digest)
        count += len(groups[digest])
    learnt = [row for row in rows if row.digest not in judged]
    return learnt, [row for row in rows if row.digest in judged]


def _mixed(sources: Sequence[list[Row]], weights: Sequence[float], seed: int, report: list[str]) -> list[Row]:
    """One list, in which each source has its share: the one that is short for its weight decides how often others are taken."""
    if len(set(weights)) == 1:
        if len(sources) > 1:
            sizes = ", ".join(str(len(rows)) for rows in sources)
            report.append(f"the sources' weights are equal: their rows are taken once each ({sizes}), not in equal shares")
        return [row for rows in sources for row in rows]
    most = max(len(rows) / weight for rows, weight in zip(sources, weights, strict=True))
    mixed = []
    for rows, weight in zip(sources, weights, strict=True):
        wanted = round(most * weight)
        whole, rest = divmod(wanted, len(rows))
        chosen = rows * whole + random.Random(seed).sample(rows, rest)
        report.append(f"weight {weight:g}: {len(rows)} rows are taken {len(chosen) / len(rows):.2f} times")
        mixed += chosen
    return mixed


# — files —————————————————————————————————————————————————————————————————————————————————————————


def read(path: Path, prefix: str = "", task: str = "") -> tuple[list[Row], list[Row]]:
    """(rows to learn from, rows of its own validation files) of a file, a directory of files, or a directory of images.
    `prefix`: before the names of files in what rows call their place; `task`: of images, the paths in tables are pictures'.
    Raises DataError."""
    found: Callable[[Path, str], Iterator[Row]] = _pictured if task == "image-classification" else _file
    if path.is_file():
        return list(found(path, prefix + path.name)), []
    learnt: list[Row] = []
    judged: list[Row] = []
    for name, rows in _parts(path, prefix, found):
        if not _TEST.search(name):
            (judged if _VALIDATION.search(name) else learnt).extend(rows)
    return learnt, judged


def unread(path: Path) -> int:
    """Files of a test set, at which nobody looks before the end."""
    return 0 if path.is_file() else sum(_TEST.search(name) is not None for name, _ in _parts(path, "", _file))


def tail(parts: Sequence[str], others: Iterable[Sequence[str]]) -> str:
    """The end of the path `parts`: as little of it as tells it from all of `others`, nothing if there are none."""
    apart = [other for other in others if other != parts]
    wide = next((n for n in range(len(parts)) if all(_end(other, n) != _end(parts, n) for other in apart)), len(parts))
    return "/".join(_end(parts, wide))


def names_of(sources: Sequence[Source]) -> list[str]:
    """For people: ids of datasets; of paths the ends, as little as tells them apart."""
    parts = [Path(source.name).parts if source.is_path else (source.name,) for source in sources]
    return [tail(own, parts) or own[-1] for own in parts]


def _end(parts: Sequence[str], count: int) -> Sequence[str]:
    return parts[max(0, len(parts) - count) :]


def _place(source: Source, path: Path) -> tuple[tuple[str, ...], frozenset[str]]:
    """(parts of the directory, or of the dataset's id, below which the names of its files begin; those names)."""
    if path.is_file():
        return path.absolute().parent.parts, frozenset([path.name])
    names = frozenset(str(file.relative_to(path)) for file in path.rglob("*") if file.suffix.lower() in TABLES | IMAGES)
    return (path.absolute().parts if source.is_path else tuple(source.name.split("/"))), names


def _prefixes(places: Sequence[tuple[tuple[str, ...], frozenset[str]]]) -> list[str]:
    """What stands before the names of each source's files, so that no two files of different sources have one name."""
    ends = [tail(parts, [other for other, theirs in places if names & theirs]) for parts, names in places]
    return [end and f"{end}/" for end in ends]


def _parts(path: Path, prefix: str, found: Callable[[Path, str], Iterator[Row]]) -> Iterator[tuple[str, Iterable[Row]]]:
    """(the name that says of which split they are, rows) of a directory's files. Of an image its directories say it: what its
    file is called says nothing."""
    tables = sorted(file for file in path.rglob("*") if file.suffix.lower() in TABLES and file.is_file())
    tables = [file for file in tables if not file.name.lower().startswith(("readme", "license", "dataset_info"))]
    images = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES)
    if images and not any(file.suffix.lower() != ".txt" for file in tables):
        yield from ((f"{file.relative_to(path).parent}/", [_image(file, path, prefix)]) for file in images)
        return
    if not tables:
        raise DataError(f"{path}: there is nothing to read: no {', '.join(sorted(TABLES))}, no images in class directories")
    names = [str(file.relative_to(path)) for file in tables]
    yield from ((name, found(file, prefix + name)) for name, file in zip(names, tables, strict=True))


def _image(file: Path, root: Path, prefix: str) -> Row:
    if file.parent == root:
        raise DataError(f"{file.name}: an image must be in a directory that is named like its class")
    return Row({"image": file, "label": file.parent.name}, f"{prefix}{file.relative_to(root)}")


def _pictured(file: Path, name: str) -> Iterator[Row]:
    """Rows of a table whose pictures are in files: paths begin at the table's own directory."""
    for row in _file(file, name):
        image = row.values.get("image")
        if isinstance(image, str) and image:
            path = file.parent / image
            if not path.is_file():
                raise DataError(f"{row.where}: there is no picture {path}: paths begin at the directory of {file.name}")
            row = replace(row, values=row.values | {"image": path})
        yield row


def _file(file: Path, name: str) -> Iterator[Row]:
    try:
        match file.suffix.lower():
            case ".jsonl":
                yield from _jsonl(file, name)
            case ".json":
                yield from _json(file, name)
            case ".csv" | ".tsv":
                yield from _csv(file, name, "\t" if file.suffix.lower() == ".tsv" else ",")
            case ".parquet":
                yield from _parquet(file, name)
            case ".txt":
                yield from _text(file, name)
            case suffix:
                raise DataError(
                    f"{name}: files that end in {suffix or 'nothing'} cannot be read; {', '.join(sorted(TABLES))} can"
                )
    except UnicodeDecodeError as exc:
        raise DataError(f"{name}: it is not UTF-8 (byte {exc.start})") from None
    except OSError as exc:
        raise DataError(f"{name}: it cannot be read: {exc.strerror or exc}") from None


def _jsonl(file: Path, name: str) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Row(_object(line, f"{name}:{number}"), f"{name}:{number}")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise DataError(f"{where}: this is no JSON: {exc}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be an object, {{…}}")
    return value


def _json(file: Path, name: str) -> Iterator[Row]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except ValueError as exc:
        if text.lstrip().startswith("{"):
            yield from _jsonl(file, name)  # many `.json` files hold an object a line
            return
        raise DataError(f"{name}: this is no JSON: {exc}") from None
    rows = next((value[key] for key in ("data", "rows", "train") if key in value), None) if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{name}: it must hold a list of objects")
    for number, row in enumerate(rows, 1):
        yield Row(row, f"{name}:row {number}")


def _csv(file: Path, name: str, delimiter: str) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                where = f"{name}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: it has another number of cells than the header")
                yield Row(dict(row), where)
        except csv.Error as exc:
            raise DataError(f"{name}:{reader.reader.line_num}: {exc}") from None


def _parquet(file: Path, name: str) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(1024):
            for values in batch.to_pylist():
                number += 1
                image = values.get("image")
                if isinstance(image, dict) and (found := image.get("bytes") or image.get("path")):
                    values["image"] = found
                yield Row(values, f"{name}:row {number}")
    except pyarrow.ArrowException as exc:
        raise DataError(f"{name}: it is no Parquet that can be read: {exc}") from None


def _text(file: Path, name: str) -> Iterator[Row]:
    """A paragraph a row: lines up to an empty one."""
    paragraph: list[str] = []
    begun = 1
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                begun = begun if paragraph else number
                paragraph.append(line.rstrip("\n"))
            elif paragraph:
                yield Row({"text": "\n".join(paragraph)}, f"{name}:{begun}")
                paragraph = []
    if paragraph:
        yield Row({"text": "\n".join(paragraph)}, f"{name}:{begun}")
