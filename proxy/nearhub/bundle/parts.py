"""Parts on disk: the bytes of a bundle's items, cut into files of a bounded size; written durably, read as one stream.

Everything here blocks. A name is made of a number, here; a link, a device or anything else than a regular file is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from nearhub.bundle.format import MANIFEST, MAX_PARTS, PART, SIGNATURE, Part
from nearhub.errors import BundleRefused, StoreFailed
from nearhub.store.disk import Disk

SUMS = "SHA256SUMS"
PIECE = 4 * 1024**2
_OURS = re.compile(r"(part-[0-9]{4}\.bin|bundle\.json|bundle\.json\.minisig|SHA256SUMS)(\.tmp)?\Z", re.ASCII)


def sums(manifest: bytes, signature: bytes | None, parts: Sequence[Part]) -> bytes:
    """What SHA256SUMS holds: for `sha256sum -c`, and so that an unsigned manifest has something that vouches for it."""
    told = [(MANIFEST, hashlib.sha256(manifest).hexdigest())]
    told += [(SIGNATURE, hashlib.sha256(signature).hexdigest())] if signature is not None else []
    told += [(part.name, part.sha256) for part in parts]
    return "".join(f"{digest}  {name}\n" for name, digest in told).encode()


class PartsWriter:
    """Writes items one after the other. What it leaves without finish() is no bundle: there is no manifest."""

    def __init__(self, folder: Path, max_part: int) -> None:
        self.parts: list[Part] = []
        self._folder = folder
        self._max = max_part
        self._disk = Disk()
        self._fd = -1
        self._size = 0
        self._digest = hashlib.sha256()
        self._is_over = False

    def open(self) -> None:
        """Raises BundleRefused where there is something else, or a bundle."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            there = sorted(path.name for path in self._folder.iterdir())
        except OSError as exc:
            raise BundleRefused(f"{self._folder}: no bundle can be written here: {exc.strerror}") from exc
        if MANIFEST in there:
            raise BundleRefused(f"{self._folder}: there is a bundle already: choose another directory")
        strangers = [name for name in there if not _OURS.match(name)]
        if strangers:
            raise BundleRefused(f"{self._folder}: not empty (there is {strangers[0]!r}): choose an empty directory")
        for name in there:  # of an export that was killed
            self._disk.unlink(self._folder / name)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        if self._is_over:
            raise BundleRefused("the export was ended")
        while view:
            if self._fd < 0:
                self._begin()
            piece = view[: self._max - self._size]
            self._disk.write_at(self._fd, [piece], self._size)
            self._digest.update(piece)
            self._size += len(piece)
            view = view[len(piece) :]
            if self._size == self._max:
                self._end()

    def finish(self) -> None:
        """All parts are durable, under their names."""
        if self._fd >= 0:
            self._end()

    def seal(self, manifest: bytes, signature: bytes | None) -> None:
        """The manifest comes last: from then on it is a bundle."""
        self._place(SUMS, sums(manifest, signature, self.parts))
        if signature is not None:
            self._place(SIGNATURE, signature)
        self._place(MANIFEST, manifest)

    def _place(self, name: str, data: bytes) -> None:
        self._fd = self._new(name)
        self._disk.write_at(self._fd, [data], 0)
        self._name(name)

    def _begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise BundleRefused(f"more than {MAX_PARTS} parts: choose a larger --max-part")
        self._fd = self._new(PART.format(len(self.parts) + 1))
        self._size, self._digest = 0, hashlib.sha256()

    def _end(self) -> None:
        name = PART.format(len(self.parts) + 1)
        self._name(name)
        self.parts.append(Part(name, self._size, self._digest.hexdigest()))

    def _new(self, name: str) -> int:
        try:
            return os.open(
                self._folder / f"{name}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
            )
        except OSError as exc:
            raise BundleRefused(f"{self._folder / name}: cannot be written: {exc.strerror}") from exc

    def _name(self, name: str) -> None:
        """tmp → fsync → rename → fsync of the directory."""
        self._disk.sync_file(self._fd)
        self.close()
        self._disk.rename(self._folder / f"{name}.tmp", self._folder / name)
        with _unless_unknown():
            self._disk.sync_dir(self._folder)

    def end(self) -> None:
        """No more is to be written: whoever writes in a thread stops."""
        self._is_over = True

    def close(self) -> None:
        """No thread may be writing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextlib.contextmanager
def _unless_unknown() -> Iterator[None]:
    """Some file systems of portable media cannot sync a directory."""
    try:
        yield
    except StoreFailed as exc:
        if not isinstance(exc.__cause__, OSError) or exc.__cause__.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def read_file(path: Path, most: int) -> bytes:
    """A small file of a bundle. FileNotFoundError where it is not; raises BundleRefused for what is no file, or too large."""
    fd = _open(path)
    with os.fdopen(fd, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise BundleRefused(f"{path} has more than {most} bytes")
    return data


def _open(path: Path) -> int:
    try:
        return Disk().open_read(path)
    except StoreFailed as exc:
        raise BundleRefused(exc.message) from None
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise BundleRefused(f"{path} cannot be read: {exc.strerror}") from exc


class PartsReader:
    """The bytes of all parts as one stream, read at any position. Descriptors are kept one at a time."""

    def __init__(self, folder: Path, parts: Sequence[Part]) -> None:
        self._folder = folder
        self._parts = parts
        self._starts = [0]
        for part in parts:
            self._starts.append(self._starts[-1] + part.size)
        self._number = -1
        self._fd = -1

    def problems(self, needed: Sequence[int]) -> list[str]:
        """Of these parts, what is wrong that can be seen without reading them."""
        found = []
        for number in needed:
            part = self._parts[number]
            try:
                fd = _open(self._folder / part.name)
            except FileNotFoundError:
                found.append(f"{part.name} is missing")
                continue
            except BundleRefused as exc:
                found.append(exc.message)
                continue
            size = os.fstat(fd).st_size
            os.close(fd)
            if size != part.size:
                how = "cut short" if size < part.size else "too long"
                found.append(f"{part.name} is {how}: {size} bytes of {part.size}")
        return found

    def touched(self, start: int, size: int) -> list[int]:
        """Numbers of the parts that hold some of these bytes."""
        if not size:
            return []
        return list(range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, start + size)))

    def read(self, position: int, most: int) -> bytes:
        """Some bytes from `position` on, at most `most` and at least one. Raises BundleRefused, which names the part."""
        number = self._number
        if number < 0 or not self._starts[number] <= position < self._starts[number + 1]:
            number = bisect_right(self._starts, position) - 1
            self.close()
            try:
                self._fd = _open(self._folder / self._parts[number].name)
            except FileNotFoundError:
                raise BundleRefused(f"{self._parts[number].name} is missing") from None
            self._number = number
        here = position - self._starts[number]
        try:
            data = os.pread(self._fd, min(most, self._parts[number].size - here), here)
        except OSError as exc:
            raise BundleRefused(f"{self._parts[number].name} cannot be read: {exc.strerror}") from exc
        if not data:
            raise BundleRefused(f"{self._parts[number].name} is cut short")
        return data

    def read_all(self, position: int, size: int) -> bytes:
        """Raises BundleRefused, which names the part."""
        data = b""
        while len(data) < size:
            data += self.read(position + len(data), size - len(data))
        return data

    def damaged(self, numbers: Sequence[int]) -> list[str]:
        """Names of those of these parts whose bytes are not what the manifest says. Reads them."""
        found = []
        for number in numbers:
            part = self._parts[number]
            digest, position = hashlib.sha256(), self._starts[number]
            try:
                while position < self._starts[number + 1]:
                    data = self.read(position, min(PIECE, self._starts[number + 1] - position))
                    digest.update(data)
                    position += len(data)
            except BundleRefused as exc:
                found.append(exc.message)
                continue
            if digest.hexdigest() != part.sha256:
                found.append(f"{part.name} is damaged")
        return found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._number = -1
