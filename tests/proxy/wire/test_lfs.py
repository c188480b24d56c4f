"""Batches as they are read and answered, and what makes a link good."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qsl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearhub.errors import AccessRefused, BatchRefused, ClientError, LinkRefused, TooLarge, UpstreamFailed
from nearhub.wire.lfs import (
    MAX_OBJECTS,
    Batch,
    Offer,
    Wanted,
    answer,
    check_link,
    found,
    missing,
    question,
    read_batch,
    read_offers,
    signed_link,
)
from nearhub.wire.target import LfsTarget, Repo, RepoKind, parse, split_prefix

OID, OTHER = "a1" * 32, "b2" * 32
SECRET = b"s" * 32
TARGET = LfsTarget(Repo(RepoKind.DATASETS, "org/d"), OID)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["download", "sha256", OID]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ALMOST = st.fixed_dictionaries(
    {"operation": st.sampled_from(["download", "upload", "x"]) | JSON, "objects": JSON | st.lists(JSON, max_size=3)},
    optional={
        "ref": JSON | st.fixed_dictionaries({"name": st.text() | JSON}),
        "hash_algo": JSON | st.just("sha256"),
        "transfers": JSON,
    },
)
WANTED = st.builds(Wanted, st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(0, 2**60 - 1))


def batch(*objects: Any, **more: Any) -> bytes:
    return json.dumps({"operation": "download", "objects": list(objects), **more}).encode()


class TestBatches:
    def test_what_git_lfs_sends(self) -> None:
        """Measured with 3.3.0."""
        body = batch(
            {"oid": OID, "size": 7},
            transfers=["lfs-standalone-file", "basic", "ssh"],
            ref={"name": "refs/heads/feature/x"},
            hash_algo="sha256",
        )
        assert read_batch(body) == Batch((Wanted(OID, 7),), "feature/x")

    @pytest.mark.parametrize(
        ("ref", "revision"),
        [
            (None, "main"),
            ({"name": "refs/heads/main"}, "main"),
            ({"name": "refs/tags/v1"}, "v1"),
            ({"name": "refs/pr/1"}, "refs/pr/1"),
            ({"name": "refs/heads/../../x"}, "main"),
            ({"name": "refs/heads/a\x00b"}, "main"),
            ({"name": "\ud800"}, "main"),
            ({"name": "r" * 256}, "main"),
            ({"name": 1}, "main"),
            ("refs/heads/x", "main"),
        ],
    )
    def test_the_branch_is_a_hint(self, ref: object, revision: str) -> None:
        """One that no revision can be called by is no reason to refuse anything."""
        assert read_batch(batch({"oid": OID, "size": 0}, ref=ref)).revision == revision

    @pytest.mark.parametrize(
        ("body", "error", "status"),
        [
            (b"", BatchRefused, 422),
            (b"[]", BatchRefused, 422),
            (b"[" * 100_000, BatchRefused, 422),
            (b"\xff", BatchRefused, 422),
            (b'{"operation": "download"}', BatchRefused, 422),
            (b'{"operation": "verify", "objects": []}', BatchRefused, 422),
            (batch(1), BatchRefused, 422),
            (batch({"oid": OID}), BatchRefused, 422),
            (batch({"oid": OID, "size": -1}), BatchRefused, 422),
            (batch({"oid": OID, "size": True}), BatchRefused, 422),
            (batch({"oid": OID, "size": 1.0}), BatchRefused, 422),
            (batch({"oid": OID, "size": 2**60}), BatchRefused, 422),
            (batch({"oid": OID.upper(), "size": 1}), BatchRefused, 422),
            (batch({"oid": OID + "\n", "size": 1}), BatchRefused, 422),
            (batch({"oid": OID[1:], "size": 1}), BatchRefused, 422),
            (batch({"oid": OID, "size": 1}, {"oid": "x", "size": 1}), BatchRefused, 422),
            (batch({"oid": OID, "size": 1}, hash_algo="sha512"), BatchRefused, 409),
            (batch(*[{"oid": OID, "size": 1}] * (MAX_OBJECTS + 1)), TooLarge, 413),
            (batch({"oid": OID, "size": 1}).replace(b"download", b"upload"), AccessRefused, 403),
        ],
    )
    def test_what_is_refused(self, body: bytes, error: type[ClientError], status: int) -> None:
        with pytest.raises(error) as refused:
            read_batch(body)
        assert refused.value.http_status == status

    def test_as_many_as_are_allowed(self) -> None:
        assert len(read_batch(batch(*[{"oid": OID, "size": 1}] * MAX_OBJECTS)).objects) == MAX_OBJECTS

    @settings(deadline=None)
    @given(st.binary() | (JSON | ALMOST).map(lambda told: json.dumps(told).encode()))
    def test_nothing_that_is_sent_breaks_it(self, body: bytes) -> None:
        """It is read, or it is the client's fault; and what is read can be asked for."""
        try:
            read = read_batch(body)
        except (BatchRefused, TooLarge, AccessRefused):
            return
        assert read.revision.encode()
        assert all(len(one.oid) == 64 and 0 <= one.size < 2**60 for one in read.objects)

    @settings(deadline=None)
    @given(st.lists(WANTED, max_size=5))
    def test_our_own_questions_are_batches(self, objects: list[Wanted]) -> None:
        assert read_batch(json.dumps(question(objects)).encode()).objects == tuple(objects)


class TestOffers:
    def test_an_answer_of_ours_is_read_as_it_was_meant(self) -> None:
        asked = [Wanted(OID, 1), Wanted(OTHER, 2)]
        document = answer([found(asked[0], "https://here/x", 60), missing(asked[1], 404, "no\nsuch thing")])
        assert read_offers(document, asked) == {OID: Offer("https://here/x"), OTHER: Offer(None, "no such thing")}

    @pytest.mark.parametrize(
        "told", [{}, {"oid": OID, "size": 1}, {"oid": OTHER}, {"oid": OID, "actions": {"download": {"href": 1}}}]
    )
    def test_what_is_not_offered_is_not_there(self, told: dict[str, Any]) -> None:
        assert read_offers({"objects": [told]}, [Wanted(OID, 1)])[OID].href is None

    def test_another_size_is_no_offer(self) -> None:
        told = found(Wanted(OID, 2), "https://here/x", 60)
        assert read_offers({"objects": [told]}, [Wanted(OID, 1)])[OID].href is None

    @pytest.mark.parametrize("document", [[], None, {}, {"objects": {}}, {"objects": [], "transfer": "xet"}])
    def test_what_is_no_answer(self, document: object) -> None:
        with pytest.raises(UpstreamFailed):
            read_offers(document, [Wanted(OID, 1)])

    @settings(deadline=None)
    @given(JSON | st.fixed_dictionaries({"objects": st.lists(JSON | st.fixed_dictionaries({"oid": st.just(OID)}), max_size=3)}))
    def test_nothing_that_upstream_says_breaks_it(self, document: object) -> None:
        try:
            offers = read_offers(document, [Wanted(OID, 1)])
        except UpstreamFailed:
            return
        assert list(offers) == [OID]


def query_of(link: str) -> dict[str, str]:
    return dict(parse_qsl(link.partition("?")[2]))


MARK = "f" * 64
"""What stands for somebody's token."""


class TestLinks:
    def test_a_link_leads_to_its_object_until_its_time(self) -> None:
        link = signed_link(SECRET, TARGET, 7, 1000, MARK)
        assert parse(split_prefix(link, "")) == TARGET
        assert check_link(SECRET, TARGET, query_of(link), 999.9) == (7, MARK)
        with pytest.raises(LinkRefused, match="expired"):
            check_link(SECRET, TARGET, query_of(link), 1000.0)

    @pytest.mark.parametrize(
        "changed",
        [
            {"size": "8"},
            {"until": "2000"},
            {"for": ""},
            {"for": "@bob"},
            {"signature": ""},
            {"signature": "\udcff"},
            {"size": "x"},
            {"until": "-1"},
            {"size": ""},
            {"size": "7" * 20},
            {"size": "\u0667"},
            {"signature": "0" * 64},
        ],
    )
    def test_nothing_in_it_can_be_changed(self, changed: dict[str, str]) -> None:
        with pytest.raises(LinkRefused):
            check_link(SECRET, TARGET, query_of(signed_link(SECRET, TARGET, 7, 1000, MARK)) | changed, 1.0)

    @pytest.mark.parametrize(
        "other",
        [
            LfsTarget(TARGET.repo, OTHER),
            LfsTarget(Repo(RepoKind.MODELS, "org/d"), OID),
            LfsTarget(Repo(RepoKind.DATASETS, "org/e"), OID),
        ],
    )
    def test_it_is_good_for_one_object_of_one_repo(self, other: LfsTarget) -> None:
        query = query_of(signed_link(SECRET, TARGET, 7, 1000, MARK))
        with pytest.raises(LinkRefused):
            check_link(SECRET, other, query, 1.0)
        with pytest.raises(LinkRefused):
            check_link(b"t" * 32, TARGET, query, 1.0)
