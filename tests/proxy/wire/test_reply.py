"""plan_file: GET and HEAD × Range × If-Range × If-None-Match × what is remembered of the blob (P1b)."""

from __future__ import annotations

import contextlib
import email.parser
import email.policy
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from nearhub.errors import ResumeUnsafe
from nearhub.wire.headers import Algo, BlobId, FileMetadata, file_headers
from nearhub.wire.ranges import Shape
from nearhub.wire.reply import Caution, Reply, plan_file
from nearhub.wire.spans import Span
from nearhub.wire.target import FileTarget, Repo, RepoKind

SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ETAG = f'"{SHA256}"'
TARGET = FileTarget(Repo(RepoKind.MODELS, "org/m"), "main", "model.bin")
DATA = bytes(range(100))
HUB = "unknown/None; hf_hub/1.2.3; python/3.11"
WGET = "Wget/1.21"


def plan(method: str = "GET", *, caution: Caution = Caution.NONE, data: bytes = DATA, **headers: str) -> Reply:
    meta = FileMetadata("c" * 40, BlobId(Algo.SHA256, SHA256), len(data))
    request = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    return plan_file(method, request, TARGET, meta, caution=caution, boundary="BOUND")


def body(reply: Reply, data: bytes = DATA) -> bytes:
    """What goes over the wire."""
    return b"".join(part.lead + data[part.asked.span.start : part.asked.span.stop] for part in reply.parts) + reply.trailer


def outcome(method: str, caution: Caution, headers: dict[str, str]) -> str:
    """One word for a table: status, and which bytes."""
    try:
        reply = plan(method, caution=caution, **headers)
    except ResumeUnsafe as exc:
        assert exc.http_status == 412
        return "412"
    assert len(body(reply)) == (reply.length if reply.parts else 0)
    return f"{reply.status} {'+'.join(f'{p.asked.span.start}:{p.asked.span.stop}' for p in reply.parts)}".strip()


class TestWithoutCaution:
    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ({}, "200 0:100"),
            ({"Range": "bytes=0-0"}, "206 0:1"),
            ({"Range": "bytes=10-19"}, "206 10:20"),
            ({"Range": "bytes=90-"}, "206 90:100"),
            ({"Range": "bytes=0-"}, "206 0:100"),
            ({"Range": "bytes=-10"}, "206 90:100"),
            ({"Range": "bytes=0-999"}, "206 0:100"),
            ({"Range": "bytes=0-1,5-6,-3"}, "206 0:2+5:7+97:100"),
            ({"Range": "bytes=5-6,0-1"}, "206 5:7+0:2"),
            ({"Range": "bytes=0-5,5-6"}, "200 0:100"),
            ({"Range": "bytes=5-3"}, "200 0:100"),
            ({"Range": "lines=5-6"}, "200 0:100"),
            ({"Range": "bytes=100-"}, "416"),
            ({"Range": "bytes=-0"}, "416"),
            ({"Range": "bytes=10-19", "If-Range": ETAG}, "206 10:20"),
            ({"Range": "bytes=10-19", "If-Range": f"W/{ETAG}"}, "200 0:100"),
            ({"Range": "bytes=10-19", "If-Range": '"other"'}, "200 0:100"),
            ({"Range": "bytes=10-19", "If-Range": "Tue, 15 Nov 1994 12:45:26 GMT"}, "200 0:100"),
            ({"Range": "bytes=100-", "If-Range": '"other"'}, "200 0:100"),
            ({"Range": "bytes=100-", "If-Range": ETAG}, "416"),
            ({"If-Range": '"other"'}, "200 0:100"),
            ({"If-None-Match": ETAG}, "304"),
            ({"If-None-Match": f'"x", W/{ETAG}'}, "304"),
            ({"If-None-Match": "*"}, "304"),
            ({"If-None-Match": '"other"'}, "200 0:100"),
            ({"If-None-Match": ETAG, "Range": "bytes=10-19"}, "304"),
            ({"If-None-Match": '"other"', "Range": "bytes=10-19"}, "206 10:20"),
            ({"If-None-Match": ETAG, "Range": "bytes=100-"}, "304"),
        ],
    )
    def test_the_table_of_conditions(self, headers: dict[str, str], expected: str) -> None:
        """GET as listed; HEAD ignores Range and If-Range (RFC 9110 §14.2) and knows only 304 and 200, never with a body."""
        assert outcome("GET", Caution.NONE, headers) == expected
        assert outcome("HEAD", Caution.NONE, headers) == ("304" if expected == "304" else "200")

    def test_every_status_carries_the_files_headers(self) -> None:
        """ETag and commit on 200, 206, 304 and 416 alike; Content-Range where it belongs."""
        meta = FileMetadata("c" * 40, BlobId(Algo.SHA256, SHA256), 100)
        common = file_headers(TARGET, meta, attachment=False)
        for headers, content_range in (
            ({}, None),
            ({"If_None_Match": "*"}, None),
            ({"Range": "bytes=10-19"}, "bytes 10-19/100"),
            ({"Range": "bytes=-1"}, "bytes 99-99/100"),
            ({"Range": "bytes=100-"}, "bytes */100"),
        ):
            assert plan(**headers).headers == common | ({"Content-Range": content_range} if content_range else {})

    def test_a_head_announces_the_whole_length(self) -> None:
        assert plan("HEAD", Range="bytes=0-0").length == 100
        assert "Content-Range" not in plan("HEAD", Range="bytes=0-0").headers

    def test_an_empty_file_is_a_whole_and_has_no_ranges(self) -> None:
        reply = plan(data=b"")
        assert (reply.status, reply.length, [p.asked.span for p in reply.parts]) == (200, 0, [Span(0, 0)])
        reply = plan(data=b"", Range="bytes=0-")
        assert (reply.status, reply.headers["Content-Range"], reply.parts) == (416, "bytes */0", ())

    def test_whole_files_and_open_ranges_are_downloads(self) -> None:
        """P1a: a client could take them for the whole rest; they get no footer allowance."""
        assert plan().is_download and plan(Range="bytes=5-").is_download and plan(Range="bytes=0-1,5-").is_download
        assert not plan(Range="bytes=5-99").is_download and not plan(Range="bytes=-5").is_download
        assert plan().parts[0].asked.shape is Shape.OPEN


IF_RANGE = {"If-Range": ETAG}
CAUTIONS = [
    # headers beside Range: bytes=…, Range, MISMATCHED, TAINTED
    ({"User-Agent": HUB}, "40-", "200 0:100", "200 0:100"),
    ({"User-Agent": WGET}, "40-", "412", "412"),
    ({}, "40-", "412", "412"),
    ({"User-Agent": HUB} | IF_RANGE, "40-", "200 0:100", "200 0:100"),
    ({"User-Agent": WGET} | IF_RANGE, "40-", "200 0:100", "200 0:100"),
    ({"If-Range": '"other"'}, "40-", "200 0:100", "200 0:100"),
    ({"User-Agent": HUB}, "0-1,40-", "200 0:100", "200 0:100"),
    ({"User-Agent": WGET}, "0-1,40-", "412", "412"),
    ({"User-Agent": HUB}, "40-59", "206 40:60", "412"),
    ({"User-Agent": WGET}, "40-59", "206 40:60", "412"),
    ({"User-Agent": WGET}, "0-59", "206 0:60", "412"),
    ({"User-Agent": WGET} | IF_RANGE, "40-59", "206 40:60", "412"),
    ({"User-Agent": WGET}, "40-59,70-79", "206 40:60+70:80", "412"),
    ({"User-Agent": WGET}, "-10", "206 90:100", "412"),
    ({"User-Agent": WGET}, "40-99", "206 40:100", "412"),
    ({"User-Agent": WGET}, "100-", "416", "416"),
    ({"User-Agent": WGET}, "5-3", "200 0:100", "200 0:100"),
    ({"User-Agent": WGET, "If-None-Match": ETAG}, "40-", "304", "304"),
]


class TestCaution:
    @pytest.mark.parametrize(("headers", "spec", "mismatched", "tainted"), CAUTIONS)
    def test_what_is_served_after_wrong_bytes_were_seen(
        self, headers: dict[str, str], spec: str, mismatched: str, tainted: str
    ) -> None:
        """P1b: nobody continues a prefix that may be wrong. An open range makes huggingface_hub and whoever sent If-Range
        start over (200), and stops the others (412: wget -c would keep its prefix on a 200); closed ranges are served, but
        not to an address that read wrong bytes."""
        request = headers | {"Range": f"bytes={spec}"}
        assert outcome("GET", Caution.MISMATCHED, request) == mismatched
        assert outcome("GET", Caution.TAINTED, request) == tainted

    def test_an_open_range_from_the_start_continues_nothing(self) -> None:
        assert outcome("GET", Caution.MISMATCHED, {"Range": "bytes=0-", "User-Agent": WGET}) == "206 0:100"

    @pytest.mark.parametrize("caution", Caution)
    def test_whole_files_and_heads_are_never_refused(self, caution: Caution) -> None:
        """Starting over must always work."""
        for agent in (HUB, WGET):
            assert outcome("GET", caution, {"User-Agent": agent}) == "200 0:100"
            assert outcome("HEAD", caution, {"User-Agent": agent, "Range": "bytes=40-"}) == "200"

    def test_no_cautious_answer_gives_the_end_of_a_file_to_one_that_resumes(self) -> None:
        """Whatever the headers: a 206 never answers an open range with N > 0."""
        agents, conditions = (HUB, WGET, ""), ({}, IF_RANGE, {"If-Range": '"other"'}, {"If-Range": f"W/{ETAG}"})
        for caution, agent, condition, n in itertools.product(
            (Caution.MISMATCHED, Caution.TAINTED), agents, conditions, (1, 50, 99)
        ):
            headers = {"User-Agent": agent, "Range": f"bytes={n}-"} | condition
            assert outcome("GET", caution, headers) in ("200 0:100", "412")


class TestMultipart:
    @given(st.data())
    def test_the_standard_library_reads_back_every_part(self, data: st.DataObject) -> None:
        """2 to 8 disjoint ranges in any order: the email parser finds each slice with its Content-Range, and the length
        announced is the length sent."""
        content = data.draw(st.binary(min_size=20, max_size=60).filter(lambda b: b"--BOUND" not in b))
        bounds = sorted(data.draw(st.sets(st.integers(0, len(content)), min_size=4, max_size=16)))
        spans = [Span(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=False)]
        spans = data.draw(st.permutations(spans))
        reply = plan(data=content, Range="bytes=" + ",".join(f"{s.start}-{s.stop - 1}" for s in spans))
        sent = body(reply, content)
        assert (reply.status, reply.length) == (206, len(sent))
        assert "Content-Range" not in reply.headers

        head = f"Content-Type: {reply.headers['Content-Type']}\r\n\r\n".encode()
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + armoured(sent, reply, content))
        parts = list(message.iter_parts())
        assert not message.defects and len(parts) == len(spans)
        for part, span in zip(parts, spans, strict=True):
            assert part["Content-Range"] == f"bytes {span.start}-{span.stop - 1}/{len(content)}"
            assert part["Content-Type"] == "application/octet-stream"
            assert bytes.fromhex(part.get_payload()) == content[span.start : span.stop]


def armoured(sent: bytes, reply: Reply, content: bytes) -> bytes:
    """`sent` with the bytes of each part in hex, since a mail parser may change line ends in binary; all else as it is."""
    out, at = b"", 0
    for part in reply.parts:
        assert sent[at : at + len(part.lead)] == part.lead
        at += len(part.lead)
        count = len(part.asked.span)
        out += part.lead + sent[at : at + count].hex().encode()
        assert sent[at : at + count] == content[part.asked.span.start : part.asked.span.stop]
        at += count
    assert sent[at:] == reply.trailer
    return out + reply.trailer


@given(st.dictionaries(st.sampled_from(["Range", "If-Range", "If-None-Match", "User-Agent", "Accept"]), st.text(max_size=40)))
def test_any_headers_get_an_answer_of_the_length_that_it_says(headers: dict[str, str]) -> None:
    """Or are told to start over; never an error."""
    meta = FileMetadata("0a" * 20, BlobId(Algo.SHA256, "0b" * 32), 1000)
    target = FileTarget(Repo(RepoKind.MODELS, "org/m"), "main", "a.bin")
    for caution in Caution:
        with contextlib.suppress(ResumeUnsafe):
            reply = plan_file("GET", headers, target, meta, caution=caution)
            assert reply.length == sum(len(part.lead) + len(part.asked.span) for part in reply.parts) + len(reply.trailer)
