"""The manifest of a bundle: parse and dump are inverses, and what nobody exported is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.bundle.format import (
    Bundle,
    Document,
    GitPart,
    Item,
    ItemKind,
    Part,
    Ref,
    RepoRecord,
    Revision,
    Status,
    dump,
    parse,
    spans,
)
from nearhub.errors import BundleRefused
from nearhub.wire.headers import BlobId
from nearhub.wire.manifest import Entry, tree_order
from nearhub.wire.target import Repo, RepoKind

COMMIT, OTHER = "c" * 40, "d" * 40
SMALL, LARGE = BlobId.from_etag("a" * 40), BlobId.from_etag("b" * 64)
REPO = Repo(RepoKind.DATASETS, "org/d")
ENTRIES = (Entry("a", 3, SMALL.hex, SMALL), Entry("dir", oid="e" * 40), Entry("dir/b", 9, "f" * 40, LARGE, 120))
REVISION = Revision(COMMIT, {"id": "org/d", "gated": False}, True, True, False, 5.5, ENTRIES)
RECORD = RepoRecord(
    REPO,
    Status.PUBLIC,
    False,
    7.25,
    ("Org/D",),
    {"main": Ref(COMMIT, 6)},
    (REVISION,),
    (Document("/api/datasets/org/d/refs", 5, {"branches": []}, None),),
    GitPart({"refs/heads/main": COMMIT}, "refs/heads/main", "9" * 64, 4.0, "8" * 64),
)
BUNDLE = Bundle(
    "0" * 32,
    3,
    100.0,
    ("https://huggingface.co",),
    None,
    (RECORD,),
    (),
    frozenset(),
    (Item(ItemKind.BLOB, SMALL.hex, 3), Item(ItemKind.BLOB, LARGE.hex, 9), Item(ItemKind.GIT, "8" * 64, 5)),
    (Part("part-0001.bin", 10, "1" * 64), Part("part-0002.bin", 7, "2" * 64)),
)


def test_what_is_dumped_is_parsed() -> None:
    with_proof = replace(
        BUNDLE,
        items=(*BUNDLE.items, Item(ItemKind.PROOF, "6" * 64, 4)),
        parts=(*BUNDLE.parts, Part("part-0003.bin", 4, "3" * 64)),
        proofs=(("checkpoint", "6" * 64),),
    )
    for bundle in (BUNDLE, with_proof):
        assert parse(dump(bundle)) == bundle
    assert [start for _, start in spans(BUNDLE)] == [0, 3, 12]


@given(
    st.lists(st.text(min_size=1, max_size=12), max_size=6),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    st.floats(0, 1e10),
)
def test_whatever_upstream_said_comes_back_as_it_was(paths: list[str], said: Any, at: float) -> None:
    """Any file name that a URL can have, any JSON, any time. What cannot be is refused, and breaks nothing."""
    entries = tuple(
        sorted({tree_order(e): e for e in (Entry(path, 3, SMALL.hex, SMALL) for path in paths)}.values(), key=tree_order)
    )
    revision = replace(REVISION, about={"x": said}, learnt_at=at, entries=(*entries,))
    record = replace(RECORD, revisions=(revision,), documents=(Document("/api/datasets/org/d/x?y=1", at, said, "z"),))
    bundle = replace(
        BUNDLE, repos=(record,), missing=frozenset(), items=BUNDLE.items[2:], parts=(Part("part-0001.bin", 5, "1" * 64),)
    )
    bundle = replace(bundle, missing=frozenset([SMALL]) if entries else frozenset())
    try:
        text = dump(bundle)
        assert parse(text) == bundle
    except BundleRefused as exc:
        assert "damaged or made up" in exc.message or "directory" in exc.message


def changed(*path: str | int, to: Any) -> bytes:
    document = json.loads(dump(BUNDLE))
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


REV = ("repos", 0, "revisions", 0)
ROW = {"etag": SMALL.hex, "size": 3}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no manifest"),
        (changed("nearhub_bundle", to=2), "upgrade"),
        (changed("nearhub_bundle", to=True), "no manifest"),
        (dump(BUNDLE) + b" ", "as nearhub writes it"),
        (dump(BUNDLE).replace(b'"sequence":3', b'"sequence":3,"sequence":3'), "as nearhub writes it"),
        (changed("more", to=1), "as nearhub writes it"),
        (changed("sequence", to=-1), "no count"),
        (changed("sequence", to="3"), "wrong type"),
        (changed("created", to=1e400), "no time|as nearhub"),
        (changed("origin", to="../../etc"), "no origin"),
        (changed("parts", 0, 0, to="../part-0001.bin"), "is called"),
        (changed("parts", 0, 0, to="part-0002.bin"), "is called"),
        (changed("parts", 0, 1, to=11), "its parts 18"),
        (changed("parts", 1, 1, to=2**70), "no count"),
        (changed("items", 0, 2, to=2**70), "no count"),
        (changed("items", 0, 1, to="../x"), "neither a sha256"),
        (changed("items", 0, 0, to="link"), "not a valid ItemKind"),
        (changed("items", 1, to=["blob", SMALL.hex, 9]), "is there twice"),
        (changed("items", 1, 1, to="7" * 64), "no file of it names|neither"),
        (changed("repos", 0, "repo", to="datasets/org/../d"), "made up"),
        (changed("repos", 0, "repo", to="a@b"), "made up"),
        (changed("repos", 0, "status", to="open"), "not a valid Status"),
        (changed("repos", 0, "refs", to={"a b": [COMMIT, 1]}), "no revision"),
        (changed("repos", 0, "refs", to={"main": ["main", 1]}), "no commit"),
        (changed("repos", 0, "git", "refs", to={"HEAD\nx": COMMIT}), "no ref"),
        (changed("repos", 0, "git", "item", to="7" * 64), "not among its items"),
        (changed(*REV, "commit", to="main"), "no commit"),
        (changed(*REV, "has_files", to=1), "wrong type"),
        (changed(*REV, "entries", to=[["../a", ROW]]), "no path"),
        (changed(*REV, "entries", to=[["/a", ROW]]), "no path"),
        (changed(*REV, "entries", to=[["a\\b", ROW]]), "no path"),
        (changed(*REV, "entries", to=[["a" * 5000, ROW]]), "no path"),
        (changed(*REV, "entries", to=[["b", ROW], ["a", ROW]]), "not in order"),
        (changed(*REV, "entries", to=[["a", ROW], ["a", ROW]]), "there twice"),
        (changed(*REV, "entries", to=[["a", ROW], ["a/b", ROW]]), "a file and a directory"),
        (changed(*REV, "entries", to=[["a", ROW | {"size": 4}]]), "two sizes"),
        (changed(*REV, "entries", to=[["a", ROW | {"link": "/etc"}]]), "as nearhub writes it"),
        (changed(*REV, "entries", 2, 1, "etag", to="7" * 64), "no file of it names|neither brings"),
        (changed("carried", to=[["org/m", COMMIT]]), "first of its line"),
        (changed("proofs", to=["x"]), "made up"),
        (changed("proofs", to=[["x", "8" * 64]]), "its proofs are not"),
    ],
)
def test_what_nobody_exported_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(BundleRefused, match=why):
        parse(text)
