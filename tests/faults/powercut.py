"""PowerCutDisk: an ext4 file system on a disk whose power can be cut. Everything not flushed by then is gone.

    disk.img ← nbdkit (write-back cache in its own memory and an unlinked file) ← nbdfuse ← loop device ← ext4

The kernel's flushes travel down the whole chain, and only what was flushed reaches disk.img: kill -9 of nbdkit is the cut.
Needs root, /dev/fuse, loop devices, and the programs in TOOLS. Nothing here knows what is stored on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

TOOLS = {
    "nbdkit": "nbdkit",
    "nbdfuse": "nbdfuse (or libnbd-bin)",
    "fusermount3": "fuse3",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
}
"""Programs that are needed, and the Debian packages they are in."""
_PREFIX = "powercut-"
_SYSTEM_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_DEADLINE_S = 30.0
_SIZE = 2 * 1024**3


class PowerCutError(RuntimeError):
    """The simulator itself does not work here; nothing is said about what it tests."""


def missing() -> list[str]:
    """What this machine lacks, in words; empty when a PowerCutDisk can be made."""
    found = [f"{name} (Debian package {package})" for name, package in TOOLS.items() if _which(name) is None]
    if os.geteuid() != 0:
        found.append("root rights (mount, losetup)")
    found += [f"the device {device}" for device in ("/dev/fuse", "/dev/loop-control") if not Path(device).exists()]
    return found


class PowerCutDisk:
    """`with PowerCutDisk() as disk:` mounts at `disk.mount`; cut() and restore() alternate; nothing is left on leaving."""

    def __init__(self, size: int = _SIZE) -> None:
        self._size = size
        self._children: list[subprocess.Popen[bytes]] = []
        self._nbdkit: subprocess.Popen[bytes] | None = None
        self._loop: str | None = None
        self._owner_fd = -1
        self._guard: subprocess.Popen[bytes] | None = None
        self._root = Path()

    def __enter__(self) -> Self:
        lacks = missing()
        if lacks:
            raise PowerCutError(f"a power cut cannot be simulated here; missing: {', '.join(lacks)}")
        sweep()
        self._root = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            self._owner_fd = os.open(self._root / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._owner_fd, fcntl.LOCK_EX)
            for part in ("mount", "fuse", "cache"):
                (self._root / part).mkdir()
            # However this process ends, the pipe closes and the power is cut: a disk that stood still for ever would hold up
            # every sync of the machine.
            guard = f"read _; kill -9 $(cat '{self._pids}')"
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", guard], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
            )
            with self._image.open("wb") as image:
                image.truncate(self._size)
            # Formatted before it is a disk: what mkfs writes is there for good. nodiscard: a hole costs nothing.
            # A lazy inode table would be written by the kernel in the background of every test.
            _call("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", str(self._image))
            self.restore()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PowerCutDisk {self._root} {'on' if self._nbdkit else 'off'}>"

    @property
    def mount(self) -> Path:
        """Where the file system is, while there is power."""
        return self._root / "mount"

    @property
    def nbdkit_pid(self) -> int:
        assert self._nbdkit is not None, "the power is off"
        return self._nbdkit.pid

    @property
    def _image(self) -> Path:
        return self._root / "disk.img"

    @property
    def _pids(self) -> Path:
        return self._root / "pids"

    @property
    def _device(self) -> Path:
        return self._root / "fuse" / "nbd"

    def cut(self, crash: Callable[[], object] | None = None) -> None:
        """The power is gone now; then what hung on the disk is taken away. `crash` ends the processes that die with it:
        one that lived on would see errors, and keep the dead file system from going."""
        assert self._nbdkit is not None, "the power is off already"
        self._nbdkit.kill()
        self._nbdkit.wait()
        if crash is not None:
            crash()
        self._take_down()

    def restore(self) -> None:
        """The power is back: the file system is mounted again, its journal replayed."""
        assert self._nbdkit is None, "the power is on already"
        address = self._root / "socket"
        address.unlink(missing_ok=True)
        self._nbdkit = self._start(
            "nbdkit", "-f", "-U", str(address), "--filter=cache", "file", str(self._image), "cache=writeback"
        )
        _wait(lambda: _listens(address), "nbdkit does not listen", self._nbdkit)
        fuse = self._start("nbdfuse", str(self._device), "--unix", str(address))
        _wait(lambda: _is_mount(self._root / "fuse") and self._device.exists(), "nbdfuse does not mount", fuse)
        self._loop = _call("losetup", "--find", "--show", str(self._device)).strip()
        try:
            self._mount()
        except PowerCutError:
            # 1: errors were corrected. The journal is replayed here instead of by the mount.
            _call("e2fsck", "-p", self._loop, allowed=(0, 1))
            self._mount()

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """Meanwhile the disk answers nothing; then it goes on as if nothing had been. Only what needs the disk waits."""
        assert self._nbdkit is not None, "the power is off"
        self._nbdkit.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._nbdkit.send_signal(signal.SIGCONT)

    def _mount(self) -> None:
        assert self._loop is not None
        _call("mount", "-t", "ext4", "-o", "noatime,nodiscard", self._loop, str(self.mount))

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        """A child in a session of its own: a Ctrl-C of the tests is not a power cut."""
        environment = {**os.environ, "TMPDIR": str(self._root / "cache")}
        log = self._root / f"{command[0]}.log"
        with log.open("ab") as output:
            child = subprocess.Popen(
                [_program(command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        self._children.append(child)
        with self._pids.open("a") as pids:
            pids.write(f"{child.pid}\n")
        return child

    def _take_down(self) -> None:
        # First the power: with it, taking the rest away could wait for a disk that stands still.
        if self._nbdkit is not None:
            self._nbdkit.kill()
            self._nbdkit.wait()
        _unmount(self.mount)
        _detach_loops(self._root)
        self._loop = None
        _unmount_fuse(self._root / "fuse")
        for child in self._children:
            _end(child)
        self._children.clear()
        self._pids.unlink(missing_ok=True)
        self._nbdkit = None

    def forget(self) -> None:
        """As if this process had been killed: everything stays, and is nobody's. For the test of sweep()."""
        os.close(self._owner_fd)
        self._owner_fd = -1

    def close(self) -> None:
        """Take everything away, in whatever state it is."""
        self._take_down()
        _remove(self._root)
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()
            self._guard = None
        if self._owner_fd >= 0:
            os.close(self._owner_fd)
            self._owner_fd = -1


def sweep() -> None:
    """Take away the disks of runs that were killed: directories of ours whose owner is gone."""
    for root in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            fd = os.open(root / "owner", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sweep_one(root)
        os.close(fd)


def _sweep_one(root: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for pid in (root / "pids").read_text().split():
            # The number may be another process's by now: only one that was started for this directory is ended.
            with contextlib.suppress(OSError):
                if str(root).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)
    _unmount(root / "mount")
    _detach_loops(root)
    _unmount_fuse(root / "fuse")
    _remove(root)


def _remove(root: Path) -> None:
    """The directory, unless something is still mounted below: then it would be that which is removed."""
    if root != Path() and not any(_is_mount(root / part) for part in ("mount", "fuse")):
        shutil.rmtree(root, ignore_errors=True)


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=_SYSTEM_PATH)


def _program(name: str) -> str:
    path = _which(name)
    if path is None:
        raise PowerCutError(f"no {name} here")
    return path


def _call(*command: str, allowed: tuple[int, ...] = (0,)) -> str:
    """Run a command to its end; its output. PowerCutError with what it said when its exit status is not allowed."""
    ended = subprocess.run(
        [_program(command[0]), *command[1:]], capture_output=True, text=True, timeout=_DEADLINE_S, check=False
    )
    if ended.returncode not in allowed:
        raise PowerCutError(f"{' '.join(command)}: exit status {ended.returncode}: {(ended.stderr or ended.stdout).strip()}")
    return ended.stdout


def _mounts_on(path: Path) -> int:
    points = (line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return sum(point == str(path) for point in points)


def _is_mount(path: Path) -> bool:
    """Without touching the path itself, which may be a dead mount."""
    return _mounts_on(path) > 0


def _unmount(path: Path) -> None:
    """Lazily where it must be: a dead device, or a process that has files open there, does not keep us."""
    for _ in range(_mounts_on(path)):
        try:
            _call("umount", str(path))
        except PowerCutError:
            _call("umount", "-l", str(path), allowed=(0, 32))


def _detach_loops(root: Path) -> None:
    """Those on a file below `root`; while it is mounted, for later they have lost its name. A busy one goes once it is free."""
    for line in _call("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE").splitlines():
        loop, _, backing = line.partition(" ")
        if backing.strip().startswith(f"{root}/"):
            _call("losetup", "--detach", loop, allowed=(0, 1))


def _unmount_fuse(path: Path) -> None:
    if _is_mount(path):
        try:
            _call("fusermount3", "-u", str(path))
        except PowerCutError:
            _call("umount", "-l", str(path), allowed=(0, 32))


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _listens(address: Path) -> bool:
    """The file is there before anybody can connect to it."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(address)) == 0


def _wait(condition: Callable[[], bool], otherwise: str, child: subprocess.Popen[bytes]) -> None:
    for _ in _polls():
        if condition():
            return
        if child.poll() is not None:
            raise PowerCutError(f"{otherwise}: it ended with status {child.returncode}")
    raise PowerCutError(f"{otherwise} within {_DEADLINE_S:g} s")


def _polls() -> Iterator[None]:
    until = time.monotonic() + _DEADLINE_S
    while time.monotonic() < until:
        yield
        time.sleep(0.01)
