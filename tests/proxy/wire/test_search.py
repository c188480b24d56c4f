"""Listings made here find what the Hub's would among the same repos."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.wire.search import matching

LLAMA = {"id": "meta/Llama-3", "downloads": 9, "lastModified": "2026-01-02T00:00:00.000Z", "gated": "manual"}
LLAMA |= {"tags": ["llama", "license:other"], "pipeline_tag": "text-generation"}
BERT = {"id": "google/bert", "downloads": 30, "lastModified": "2025-01-02T00:00:00.000Z", "gated": False}
BERT |= {"tags": ["Fill-Mask", "license:mit"], "pipeline_tag": "fill-mask", "library_name": "transformers"}
BARE = {"id": "zoo/Bert-mini"}
REPOS: list[dict[str, Any]] = [LLAMA, BARE, BERT]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ([], ["google/bert", "meta/Llama-3", "zoo/Bert-mini"]),
        ([("search", "BERT")], ["google/bert", "zoo/Bert-mini"]),
        ([("search", "bert mini")], ["zoo/Bert-mini"]),
        ([("search", "bert"), ("search", "goo")], ["google/bert"]),
        ([("author", "Google")], ["google/bert"]),
        ([("author", "goo")], []),
        ([("filter", "license:mit")], ["google/bert"]),
        ([("filter", "fill-mask"), ("filter", "transformers")], ["google/bert"]),
        ([("filter", "fill-mask,llama")], []),
        ([("pipeline_tag", "text-generation")], ["meta/Llama-3"]),
        ([("gated", "True")], ["meta/Llama-3"]),
        ([("gated", "false")], ["google/bert", "zoo/Bert-mini"]),
        ([("sort", "downloads")], ["google/bert", "meta/Llama-3", "zoo/Bert-mini"]),
        ([("sort", "downloads"), ("direction", "1")], ["zoo/Bert-mini", "meta/Llama-3", "google/bert"]),
        ([("sort", "lastModified")], ["meta/Llama-3", "google/bert", "zoo/Bert-mini"]),
        ([("sort", "lastModified"), ("limit", "1")], ["meta/Llama-3"]),
        ([("limit", "0")], []),
        ([("limit", "-1"), ("sort", "nonsense"), ("apps", "vllm"), ("full", "True")], None),
        ([("expand[]", "downloads")], None),
    ],
)
def test_what_is_asked_for_is_found(query: list[tuple[str, str]], names: list[str] | None) -> None:
    """Any case, all words, all filters; what only the Hub could judge leaves nothing out."""
    everything = ["google/bert", "meta/Llama-3", "zoo/Bert-mini"]
    assert [one["id"] for one in matching(REPOS, query)] == (everything if names is None else names)


values = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2)
documents = st.dictionaries(st.sampled_from([*LLAMA, "library_name", "likes", "sdk", "createdAt"]), values)
words = st.sampled_from(["search", "author", "filter", "sort", "direction", "limit", "gated", "pipeline_tag"])
texts = st.sampled_from(["downloads", "createdAt", "1", "²", "true", ""]) | st.text(max_size=4)


@given(st.lists(documents, max_size=4), st.lists(st.tuples(words, texts), max_size=5))
def test_whatever_upstream_said_and_whatever_is_asked(repos: list[dict[str, Any]], query: list[tuple[str, str]]) -> None:
    """Documents of any shape and queries of any kind: an answer, of documents that are there, unchanged."""
    assert all(found in repos for found in matching(repos, query))
