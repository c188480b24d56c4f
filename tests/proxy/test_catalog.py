"""Catalog on a real index: names, refs, manifests, and every path of a commit for ever."""

from __future__ import annotations

import itertools
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nearhub.bounded import Bounded
from nearhub.catalog import Catalog, Ref
from nearhub.metrics import Metrics
from nearhub.store.index import Index
from nearhub.wire.headers import Algo, BlobId
from nearhub.wire.manifest import Entry, RepoInfo, Visibility, below, tree_order, with_directories
from nearhub.wire.target import Repo, RepoKind
from tests.proxy.clock import Clock

OLD, NEW = "a" * 40, "b" * 40
REPO, OTHER = Repo(RepoKind.MODELS, "org/m"), Repo(RepoKind.DATASETS, "org/m")


def file(path: str, digit: str = "1", size: int = 1) -> Entry:
    return Entry(path, size, digit * 40, BlobId(Algo.SHA1, digit * 40))


def lfs(path: str, digit: str = "2", oid: str | None = None) -> Entry:
    return Entry(path, 9, oid, BlobId(Algo.SHA256, digit * 64), None if oid is None else 130)


def info(*entries: Entry, repo: Repo = REPO, commit: str = OLD, complete: bool = True, listed: bool = True) -> RepoInfo:
    return RepoInfo(repo, commit, Visibility(), {"id": repo.name}, entries if listed else None, complete and listed)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def catalog(index: Index, metrics: Metrics, clock: Clock) -> Catalog:
    return Catalog(index, metrics, clock)


def test_a_bounded_table_forgets_what_was_used_longest_ago() -> None:
    table: Bounded[str, int] = Bounded(2)
    table.put("a", 1)
    table.put("b", 2)
    assert table.get("a") == 1
    table.put("c", 3)
    assert (table.get("a"), table.get("b"), table.get("c"), len(table)) == (1, None, 3, 2)
    table.drop("a")
    table.drop("absent")
    assert table.get("a") is None


class TestNames:
    async def test_a_repo_is_found_in_any_case(self, catalog: Catalog, index: Index) -> None:
        """Clients lower names; after a restart too; the other kind's repo of that name is another."""
        canonical = Repo(RepoKind.MODELS, "Org/Model")
        await catalog.note_alias(Repo(RepoKind.MODELS, "ORG/model"), canonical)
        for known in (catalog, Catalog(index, Metrics())):
            for name in ("ORG/model", "org/model", "Org/Model", "oRG/mOdEL"):
                assert await known.canonical(Repo(RepoKind.MODELS, name)) == canonical
            assert await known.canonical(Repo(RepoKind.DATASETS, "org/model")) == Repo(RepoKind.DATASETS, "org/model")

    async def test_a_chain_of_renames_leads_to_the_last_name(self, catalog: Catalog, index: Index) -> None:
        names = [Repo(RepoKind.MODELS, f"org/m{i}") for i in range(4)]
        for asked, repo in itertools.pairwise(names):
            await catalog.note_alias(asked, repo)
        for known in (catalog, Catalog(index, Metrics())):
            for name in names:
                assert await known.canonical(name) == names[-1]

    async def test_names_that_lead_in_a_circle_do_not_hold_anybody(self, catalog: Catalog) -> None:
        """A renamed to B, and B later to A."""
        one, two = Repo(RepoKind.MODELS, "org/a"), Repo(RepoKind.MODELS, "org/b")
        await catalog.note_alias(one, two)
        await catalog.note_alias(two, one)
        assert await catalog.canonical(two) == one
        assert await catalog.canonical(one) == one

    async def test_a_new_repo_under_a_former_name_is_itself(self, catalog: Catalog, index: Index) -> None:
        """The Hub's redirect ends when somebody takes the old name."""
        old, new = Repo(RepoKind.MODELS, "Org/Old"), Repo(RepoKind.MODELS, "org/new")
        await catalog.note_alias(old, new)
        await catalog.note_alias(old, old)
        for known in (catalog, Catalog(index, Metrics())):
            assert await known.canonical(old) == old
            assert await known.canonical(old.folded()) == old
            assert await known.canonical(new) == new


class TestVisibility:
    async def test_what_was_seen_is_known_after_a_restart(self, catalog: Catalog, index: Index, clock: Clock) -> None:
        assert await catalog.seen(REPO) is None
        await catalog.note_seen(REPO, Visibility(is_gated=True))
        for known in (catalog, Catalog(index, Metrics())):
            seen = await known.seen(REPO)
            assert seen is not None
            assert (seen.visibility, seen.at) == (Visibility(True, False), clock.now)
            assert await known.seen(OTHER) is None

    async def test_a_closed_repo_is_not_seen_any_more_and_keeps_its_files(self, catalog: Catalog, index: Index) -> None:
        await catalog.note_info(info(file("a")))
        await catalog.note_seen(REPO, Visibility())
        await catalog.note_closed(REPO)
        for known in (catalog, Catalog(index, Metrics())):
            assert await known.seen(REPO) is None
            assert await known.entry(REPO, OLD, "a") == file("a")

    async def test_public_repos_are_those_of_the_kind_at_their_last_commit(self, catalog: Catalog) -> None:
        """What was never seen in public, is disabled or closed, or has no known main, is not in the list."""
        for name, repo in (("m", REPO), ("d", OTHER), ("one", Repo(RepoKind.MODELS, "gpt2"))):
            await catalog.note_info(info(file(name), repo=repo))
            await catalog.note_seen(repo, Visibility(is_gated=name == "one"))
            await catalog.move_refs(repo, {"main": OLD})
        for name in ("disabled", "closed", "unseen"):
            repo = Repo(RepoKind.MODELS, f"org/{name}")
            await catalog.note_info(info(repo=repo))
            await catalog.move_refs(repo, {"main": OLD})
            if name != "unseen":
                await catalog.note_seen(repo, Visibility(is_disabled=name == "disabled"))
            if name == "closed":
                await catalog.note_closed(repo)
        await catalog.note_seen(Repo(RepoKind.MODELS, "org/no-ref"), Visibility())
        assert await catalog.public_repos(RepoKind.MODELS) == [{"id": "gpt2", "sha": OLD}, {"id": "org/m", "sha": OLD}]
        assert await catalog.public_repos(RepoKind.DATASETS) == [{"id": "org/m", "sha": OLD}]
        assert await catalog.public_repos(RepoKind.SPACES) == []


class TestRefs:
    async def test_a_ref_is_what_it_was_last(self, catalog: Catalog, index: Index, clock: Clock) -> None:
        await catalog.move_refs(REPO, {"main": OLD, "refs/pr/1": OLD})
        clock.now += 5
        await catalog.move_refs(REPO, {"main": NEW})
        for known in (catalog, Catalog(index, Metrics())):
            assert await known.ref(REPO, "main") == Ref(NEW, clock.now)
            assert await known.ref(REPO, "refs/pr/1") == Ref(OLD, clock.now - 5)
            assert await known.ref(REPO, "dev") is None
            assert await known.refs(REPO) == {"main": NEW, "refs/pr/1": OLD}

    async def test_names_that_begin_alike_are_kept_apart(self, catalog: Catalog) -> None:
        """Repos, revisions and paths with the index's own separators in them."""
        longer = Repo(RepoKind.MODELS, "org/m2")
        await catalog.move_refs(REPO, {"main": OLD, "main:x": NEW, "a@b": NEW, "main ": NEW})
        await catalog.move_refs(longer, {"main": NEW})
        assert await catalog.refs(REPO) == {"main": OLD, "main:x": NEW, "a@b": NEW, "main ": NEW}
        assert await catalog.refs(longer) == {"main": NEW}


class TestManifests:
    async def test_what_is_not_in_a_complete_manifest_does_not_exist(self, catalog: Catalog, index: Index) -> None:
        """Known after a restart too; the second look-up is the table's."""
        await catalog.note_info(info(file("a"), lfs("b", oid="3" * 40)))
        for known in (catalog, Catalog(index, Metrics())):
            manifest = await known.manifest(REPO, OLD)
            assert manifest is not None
            assert (manifest.has_files, manifest.has_tree, manifest.about) == (True, False, {"id": "org/m"})
            assert await known.entry(REPO, OLD, "b") == lfs("b", oid="3" * 40)
            assert await known.entry(REPO, OLD, "absent") is None
            assert await known.entry(REPO, OLD, "absent") is None
            assert await known.manifest(REPO, NEW) is None

    async def test_nothing_is_remembered_as_absent_while_a_manifest_is_not_complete(self, catalog: Catalog) -> None:
        await catalog.note_info(info(file("a"), complete=False))
        assert await catalog.entry(REPO, OLD, "late") is None
        manifest = await catalog.manifest(REPO, OLD)
        assert manifest is not None
        await catalog.note_entries(REPO, OLD, [file("late")])
        await catalog.note_tree(REPO, OLD, manifest)
        assert await catalog.entry(REPO, OLD, "late") == file("late")

    async def test_an_answer_that_tells_less_takes_nothing_away(self, catalog: Catalog) -> None:
        """Complete stays complete, and so does the tree."""
        await catalog.note_info(info(file("a"), complete=False))
        manifest = await catalog.note_info(info(file("a"), file("b")))
        assert manifest.has_files
        await catalog.note_tree(REPO, OLD, manifest)
        for less in (info(listed=False), info(file("a"), complete=False), info(file("a"), file("b"))):
            manifest = await catalog.note_info(less)
            assert manifest.has_files and manifest.has_tree

    async def test_huge_stays_huge(self, catalog: Catalog, index: Index) -> None:
        manifest = await catalog.note_info(info(file("a"), complete=False))
        await catalog.note_huge(REPO, OLD, manifest)
        again = await Catalog(index, Metrics()).note_info(info(file("a"), complete=False))
        assert again.is_huge and not again.has_files


class TestForEver:
    @pytest.mark.parametrize(
        "later",
        [
            file("a", "9"),
            file("a", size=2),
            Entry("a", 1, "1" * 40, BlobId(Algo.SHA256, "1" * 64)),
        ],
    )
    async def test_a_later_different_answer_is_an_alarm_and_never_an_update(
        self, catalog: Catalog, index: Index, metrics: Metrics, caplog: pytest.LogCaptureFixture, later: Entry
    ) -> None:
        """P11: from a tree or from a manifest; the first answer is returned, kept, and given after a restart."""
        await catalog.note_info(info(file("a"), complete=False))
        caplog.set_level(logging.ERROR)
        assert await catalog.note_entries(REPO, OLD, [later, file("b")]) == [file("a"), file("b")]
        assert metrics.alarms._value.get() == 1 and "ALARM" in caplog.text
        await catalog.note_info(info(later, file("b")))
        assert metrics.alarms._value.get() == 2
        await catalog.note_info(info(later, file("b")))
        assert metrics.alarms._value.get() == 3
        for known in (catalog, Catalog(index, Metrics())):
            assert await known.entry(REPO, OLD, "a") == file("a")
        await catalog.note_entries(REPO, NEW, [later])
        assert metrics.alarms._value.get() == 3, "another commit is another matter"

    async def test_a_complete_commit_gets_no_new_files(self, catalog: Catalog, metrics: Metrics) -> None:
        """A file that was not there when all of them were told is a lie too."""
        await catalog.note_info(info(file("a")))
        await catalog.note_info(info(file("a"), file("late")))
        assert metrics.alarms._value.get() == 1
        assert await catalog.entry(REPO, OLD, "late") is None
        assert await catalog.listing(REPO, OLD, recursive=True) == [file("a")]

    async def test_learning_gits_name_is_no_alarm_and_losing_it_no_loss(self, catalog: Catalog, metrics: Metrics) -> None:
        """HEAD tells an LFS file's sha256 alone; the manifest tells git's oid too; a third answer may not change that."""
        await catalog.note_entries(REPO, OLD, [lfs("m")])
        assert await catalog.note_entries(REPO, OLD, [lfs("m", oid="3" * 40)]) == [lfs("m", oid="3" * 40)]
        assert await catalog.note_entries(REPO, OLD, [lfs("m")]) == [lfs("m", oid="3" * 40)]
        assert metrics.alarms._value.get() == 0
        assert await catalog.note_entries(REPO, OLD, [lfs("m", oid="4" * 40)]) == [lfs("m", oid="3" * 40)]
        assert metrics.alarms._value.get() == 1

    async def test_what_was_looked_up_before_git_named_it_is_told_in_full_afterwards(self, catalog: Catalog) -> None:
        await catalog.note_entries(REPO, OLD, [lfs("m")])
        assert await catalog.entry(REPO, OLD, "m") == lfs("m")
        await catalog.note_entries(REPO, OLD, [lfs("m", oid="3" * 40)])
        assert await catalog.entry(REPO, OLD, "m") == lfs("m", oid="3" * 40)


NASTY = [
    "a.txt",
    "a/b",
    "a/b.txt",
    "a0",
    "a-b",
    "a b/c",
    "a b.c",
    "A/x",
    "b/a/a",
    "b/a.a",
    "b/a0/z",
    "é/ü",
    "é.x",
    "中/文",
    "z",
]
NAMES = st.sampled_from(["a", "a.b", "a0", "a-", "a ", "é", "\uffff", "\U0001f600", "a:b", "@", "!"])
PATHS = st.lists(st.lists(NAMES, min_size=1, max_size=4).map("/".join), min_size=1, max_size=12)


def whole(paths: list[str], *, with_dirs: bool = True) -> list[Entry]:
    """A repo of files at `paths`, without those that would be directories too."""
    directories = {path[:i] for path in paths for i, c in enumerate(path) if c == "/"}
    files = [file(path) for path in sorted(set(paths) - directories)]
    return with_directories(files) if with_dirs else files


class TestListing:
    async def test_nothing_is_below_an_unknown_commit(self, catalog: Catalog) -> None:
        assert await catalog.listing(REPO, OLD, recursive=True) == []

    async def test_in_gits_order_at_every_level(self, catalog: Catalog) -> None:
        """As `below` has it, which is compared with git itself elsewhere."""
        entries = whole(NASTY)
        await catalog.note_entries(REPO, OLD, reversed(entries))
        await catalog.note_entries(REPO, NEW, [file("other")])
        for directory in ("", *(entry.path for entry in entries if entry.is_directory)):
            for recursive in (True, False):
                found = await catalog.listing(REPO, OLD, directory, recursive=recursive)
                assert found == below(entries, directory, recursive=recursive)

    async def test_directories_are_seen_in_files_alone(self, catalog: Catalog) -> None:
        """From a manifest that has no tree: their oid is not known, and they are there once."""
        await catalog.note_entries(REPO, OLD, [file("d/a"), file("d/b"), file("d.x"), file("d0")])
        assert await catalog.listing(REPO, OLD, recursive=False) == [file("d.x"), Entry("d"), file("d0")]

    async def test_more_entries_than_are_read_at_a_time(self, catalog: Catalog) -> None:
        entries = whole([f"d{i % 7}/f{i:04}" for i in range(1000)] + [f"g{i:04}" for i in range(600)])
        await catalog.note_entries(REPO, OLD, entries)
        assert await catalog.listing(REPO, OLD, recursive=True) == entries
        assert await catalog.listing(REPO, OLD, recursive=True, limit=777) == entries[:777]
        flat = below(entries, "", recursive=False)
        assert await catalog.listing(REPO, OLD, recursive=False) == flat
        assert await catalog.listing(REPO, OLD, recursive=False, limit=300) == flat[:300]

    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(PATHS, st.booleans(), st.integers(1, 4), st.data())
    async def test_pages_are_one_listing(
        self, index: Index, paths: list[str], recursive: bool, limit: int, data: st.DataObject
    ) -> None:
        """Whatever the names: pages of any size, each from after the last entry of the one before, are the whole listing."""
        index.delete_many(list(index.keys("path ")))
        catalog = Catalog(index, Metrics())
        has_tree = data.draw(st.booleans())
        entries = whole(paths)
        await catalog.note_entries(REPO, OLD, entries if has_tree else whole(paths, with_dirs=False))
        directory = data.draw(st.sampled_from(["", *(entry.path for entry in entries if entry.is_directory)]))
        expected = [tree_order(entry) for entry in below(entries, directory, recursive=recursive)]
        if not has_tree and recursive:
            expected = [name for name in expected if not name.endswith("/")]
        listed = await catalog.listing(REPO, OLD, directory, recursive=recursive)
        assert [tree_order(entry) for entry in listed] == expected
        pages: list[Entry] = []
        while page := await catalog.listing(
            REPO, OLD, directory, recursive=recursive, after=tree_order(pages[-1]) if pages else "", limit=limit
        ):
            assert len(page) <= limit and len(pages) <= len(listed)
            pages += page
        assert pages == listed
