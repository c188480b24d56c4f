"""load_dataset of csv, jsonl and parquet, plain and streaming.

Two addresses are the library's own and no mirror can change them: a counter of downloads at Amazon, switched off here, and a
name that it makes of the endpoint's, `datasets-server.<host>`, which does not exist; it goes on without an answer.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.clients.lan import PREFIX, Lan, lan
from tests.hub import LFS, Hub

ROWS = {"train": 300, "test": 20}
WAYS = ("plain", "streaming")
FORMATS = ("csv", "jsonl", "parquet")
SCRIPT = """
import atexit
atexit.register(os._exit, 0)  # the last to run: threads of pyarrow now and then abort a process that ends otherwise
from datasets import load_dataset
for form in ("csv", "jsonl", "parquet"):
    name = f"org/{way}-{form}"
    if way == "plain":
        loaded = load_dataset(name)
        out[form] = {split: loaded[split].to_list() for split in loaded}
    else:
        loaded = load_dataset(name, streaming=True)
        out[form] = {split: list(loaded[split]) for split in loaded}
        out[form]["skipped"] = next(iter(loaded["train"].skip(250)))
"""


def rows(way: str, form: str, split: str) -> list[dict[str, Any]]:
    return [{"id": number, "text": f"{way} {form} {split} {number}"} for number in range(ROWS[split])]


def encoded(form: str, table: list[dict[str, Any]]) -> bytes:
    match form:
        case "csv":
            return ("id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in table)).encode()
        case "jsonl":
            return "".join(json.dumps(row) + "\n" for row in table).encode()
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), buffer, row_group_size=50)
    return buffer.getvalue()


def publish(hub: Hub) -> None:
    """A repo for each way and format; parquet is in LFS, as everywhere, and named in the card."""
    for way in WAYS:
        for form in FORMATS:
            made = {f"data/{split}-00000-of-00001.{form}": encoded(form, rows(way, form, split)) for split in ROWS}
            files: dict[str, bytes | LFS] = {path: LFS(data) if form == "parquet" else data for path, data in made.items()}
            card = b"---\nlicense: mit\n---\n# Rows\n"
            hub.repo(f"org/{way}-{form}", "datasets").commit({"README.md": card, **files})


async def load(net: Lan) -> None:
    """Both ways at once, each with an empty home; every row is right."""
    outs = await asyncio.gather(*(net.python(f"way = {way!r}\n{SCRIPT}", HF_UPDATE_DOWNLOAD_COUNTS="0") for way in WAYS))
    for way, out in zip(WAYS, outs, strict=True):
        wanted: dict[str, dict[str, Any]] = {form: {split: rows(way, form, split) for split in ROWS} for form in FORMATS}
        if way == "streaming":
            for form, splits in wanted.items():
                splits["skipped"] = rows(way, form, "train")[250]
        assert out == wanted


def only_the_known(net: Lan) -> bool:
    """Nobody but the mirror was asked, save for the name that the library makes up."""
    asked = {re.sub(r"(?<=127\.0\.0\.1):\d+", "", line.partition("?")[0]) for line in net.heard}
    off = [line for line in net.off_the_mirror() if line not in net.heard]
    return asked <= {f"GET http://datasets-server.127.0.0.1{net.base}/info"} and off == []


@pytest.mark.parametrize("base", ["", PREFIX], ids=["root", "prefix"])
async def test_in_every_state_of_the_hub(hub: Hub, tmp_path: Path, base: str) -> None:
    """Cold: two questions a dataset. Warm: none. With a dead and with a refusing Hub: as if it were not."""
    publish(hub)
    async with lan(tmp_path, base, hub=hub) as net:
        await load(net)
        for way in WAYS:
            for form in FORMATS:
                assert len(net.metadata_calls(f"org/{way}-{form}")) <= 2, net.metadata_calls()
        assert only_the_known(net)
        hub.log.clear()
        await load(net)
        assert [one.raw_path for one in hub.log] == []
        await net.hub_dies()
        await load(net)
        await net.hub_refuses()
        await load(net)
        assert net.refusals() > 0
        assert only_the_known(net)
