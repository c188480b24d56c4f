"""A cache directory: who may own it, and every reason to refuse it, each with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearhub.errors import StoreRefused
from nearhub.store.layout import VERSION, CacheDir, filesystem_of, open_cache


def refusal(root: Path, **options: object) -> str:
    with pytest.raises(StoreRefused) as caught:
        open_cache(root, **{"mounts": "", **options})  # type: ignore[arg-type]
    return caught.value.message


def opened(root: Path, **options: object) -> CacheDir:
    return open_cache(root, **{"mounts": "", **options})  # type: ignore[arg-type]


class TestOpening:
    def test_a_new_directory_gets_its_parts_and_is_ours_alone(self, tmp_path: Path) -> None:
        root = tmp_path / "a" / "cache"
        cache = opened(root)
        assert (root / "VERSION").read_text() == f"{VERSION}\n"
        for part in (cache.blobs / "sha256", cache.blobs / "sha1", cache.partial, cache.quarantine, cache.index):
            assert part.is_dir() and part.stat().st_mode & 0o077 == 0
        assert root.stat().st_mode & 0o777 == 0o700
        cache.close()

    def test_it_can_be_opened_again_after_it_was_given_up(self, tmp_path: Path) -> None:
        """Also one that was begun and never finished, and an empty volume with lost+found."""
        opened(tmp_path).close()
        opened(tmp_path).close()
        (tmp_path / "VERSION").rename(tmp_path / "VERSION.tmp")
        (tmp_path / "secret").unlink()
        for part in ("blobs", "partial", "quarantine", "git", "index"):
            for path in sorted((tmp_path / part).rglob("*"), reverse=True):
                path.rmdir()
            (tmp_path / part).rmdir()
        (tmp_path / "lost+found").mkdir()
        opened(tmp_path).close()

    def test_the_index_may_be_elsewhere(self, tmp_path: Path) -> None:
        cache = opened(tmp_path / "cache", index_dir=tmp_path / "fast" / "index")
        assert cache.index == tmp_path / "fast" / "index" and cache.index.is_dir()
        assert not (tmp_path / "cache" / "index").exists()
        cache.close()

    def test_a_refusal_gives_the_directory_up(self, tmp_path: Path) -> None:
        """The next try must not hear that another nearhub uses it."""
        (tmp_path / "VERSION").write_text("junk")
        for _ in range(2):
            assert "VERSION" in refusal(tmp_path)
        (tmp_path / "VERSION").write_text(f"{VERSION}")
        opened(tmp_path).close()


class TestRefusals:
    @pytest.mark.parametrize("mode", [0o702, 0o777, 0o1777, 0o706])
    def test_one_that_anybody_may_write_to(self, tmp_path: Path, mode: int) -> None:
        """Whatever allow_group says."""
        tmp_path.chmod(mode)
        for allow_group in (False, True):
            assert "chmod o-w" in refusal(tmp_path, allow_group=allow_group)

    def test_one_that_its_group_may_write_to_unless_that_is_allowed(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o770)
        assert "allow_group = true" in refusal(tmp_path)
        opened(tmp_path, allow_group=True).close()

    def test_a_link_is_judged_by_what_it_points_at(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir(mode=0o700)
        (tmp_path / "link").symlink_to("real")
        opened(tmp_path / "link").close()
        (tmp_path / "real").chmod(0o777)
        assert "chmod o-w" in refusal(tmp_path / "link")

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            assert "cannot be created" in refusal(path)

    @pytest.mark.parametrize("text", [f"{VERSION + 1}", f"{VERSION + 1}\n", "999999999"])
    def test_one_of_a_newer_version(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "VERSION").write_text(text)
        message = refusal(tmp_path)
        assert "upgrade" in message and text.strip() in message

    @pytest.mark.parametrize(
        "content",
        [b"", b"\n", b"one", b"1.0", b"-1", b"+1", b"1 2", b"\xff\xfe", "٣".encode(), b"\0" * 9, b"9" * 10, b"1" * 9999],
    )
    def test_one_whose_version_is_junk(self, tmp_path: Path, content: bytes) -> None:
        """Torn, binary, or a number nobody can convert."""
        (tmp_path / "VERSION").write_bytes(content)
        message = refusal(tmp_path)
        assert "not a version number" in message and len(message) < 300 + len(str(tmp_path))

    def test_one_whose_version_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "VERSION").mkdir()
        assert "cannot be read" in refusal(tmp_path)

    @pytest.mark.parametrize("name", ["photos", ".ssh", "blobs", "lock2"])
    def test_one_that_holds_what_is_not_ours(self, tmp_path: Path, name: str) -> None:
        """Nothing is created or removed in it, but the lock."""
        (tmp_path / name).mkdir()
        message = refusal(tmp_path)
        assert name in message and "choose an empty directory" in message
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "lock"])

    def test_a_second_owner(self, tmp_path: Path) -> None:
        """As long as the first one lives."""
        first = opened(tmp_path)
        assert "another nearhub" in refusal(tmp_path)
        first.close()
        opened(tmp_path).close()

    def test_a_planted_lock(self, tmp_path: Path) -> None:
        (tmp_path / "cache").mkdir(mode=0o700)
        (tmp_path / "cache" / "lock").symlink_to(tmp_path / "victim")
        assert "lock" in refusal(tmp_path / "cache")
        assert not (tmp_path / "victim").exists()


def mounts(*points: tuple[Path | str, str]) -> str:
    return "".join(f"{i} 1 0:{i} / {point} rw,relatime shared:1 - {kind} source rw\n" for i, (point, kind) in enumerate(points))


class TestNetworkFileSystems:
    @pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "fuse.sshfs"])
    def test_the_index_cannot_be_on_one(self, tmp_path: Path, kind: str) -> None:
        """SQLite's locks do not work there; blobs may be, when the index is moved."""
        root = tmp_path / "cache"
        text = mounts(("/", "ext4"), (tmp_path, kind))
        message = refusal(root, mounts=text)
        assert kind in message and "index_dir" in message
        local = tmp_path / "local"
        opened(root, index_dir=local / "index", mounts=text + mounts((local, "ext4"))).close()

    @pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs", "virtiofs"])
    def test_it_can_be_on_a_local_one(self, tmp_path: Path, kind: str) -> None:
        opened(tmp_path / "cache", mounts=mounts(("/", "nfs4"), (tmp_path, kind))).close()

    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("/", "ext4"),
            ("/var", "ext4"),
            ("/data", "nfs4"),
            ("/data/cache", "nfs4"),
            ("/database", "ext4"),
            ("/data/fast/x", "xfs"),
            ("/data/fas", "nfs4"),
            ("/a b/c", "cifs"),
            ("/twice/x", "tmpfs"),
        ],
    )
    def test_the_mount_that_counts_is_the_longest_and_the_last(self, path: str, kind: str) -> None:
        text = mounts(
            ("/", "ext4"),
            ("/data", "nfs4"),
            ("/data/fast", "xfs"),
            ("/a\\040b", "cifs"),
            ("/twice", "nfs"),
            ("/twice", "tmpfs"),
        )
        assert filesystem_of(Path(path), text) == kind

    @pytest.mark.parametrize("text", ["", "\n", "junk", "1 2 3 4 /data - ", " - ext4", "1 2 3 4 5"])
    def test_what_cannot_be_read_is_unknown(self, text: str) -> None:
        assert filesystem_of(Path("/data"), text) == ""
