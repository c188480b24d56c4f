"""Rows: formats, where each stands, splits, weights, and rows that stand on both sides."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from neartune import data, recipe
from neartune.data import DataError, Row
from tests.trainer.bases import write_jsonl


def rows_of(path: Path) -> list[tuple[dict[str, Any], str]]:
    return [(row.values, row.where) for row in data.read(path)[0]]


def loaded(*sources: Path | dict[str, Any], **settings: Any) -> data.Splits:
    import json

    named = [str(source) if isinstance(source, Path) else source for source in sources]
    given = {"base_model": "org/m", "train_data": named, **settings}
    made = recipe.load(None, [f"{key}={json.dumps(value)}" for key, value in given.items()]).recipe
    return data.load(made, lambda source: Path(source.name))


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', [({"a": 1}, "a.jsonl:1"), ({"a": 2}, "a.jsonl:3")]),
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1}', [({"a": 1}, "a.jsonl:1")]),
        ("a.json", '[{"a": 1}, {"a": 2}]', [({"a": 1}, "a.json:row 1"), ({"a": 2}, "a.json:row 2")]),
        ("a.json", '{"data": [{"a": 1}]}', [({"a": 1}, "a.json:row 1")]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', [({"a": 1}, "a.json:1"), ({"a": 2}, "a.json:2")]),
        (
            "a.csv",
            'x,y\n1,"two\nlines"\n3,4\n',
            [({"x": "1", "y": "two\nlines"}, "a.csv:3"), ({"x": "3", "y": "4"}, "a.csv:4")],
        ),
        ("a.tsv", "x\ty\n1\t2\n", [({"x": "1", "y": "2"}, "a.tsv:2")]),
        ("a.txt", "one\ntwo\n\n\nthree", [({"text": "one\ntwo"}, "a.txt:1"), ({"text": "three"}, "a.txt:5")]),
    ],
)
def test_formats(tmp_path: Path, name: str, text: str | bytes, expected: Any) -> None:
    assert rows_of(write(tmp_path / name, text)) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', "a.jsonl:2: this is no JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: a row must be an object"),
        ("a.json", "[1]", "a.json: it must hold a list of objects"),
        ("a.json", "[", "a.json: this is no JSON"),
        ("a.csv", "x,y\n1,2\n3\n", "a.csv:3: it has another number of cells"),
        ("a.csv", "x,y\n1,2,3\n", "a.csv:2: it has another number of cells"),
        ("a.csv", 'x\n"a"b\n', "a.csv:2: "),
        ("a.txt", b"\xff\xfe", "a.txt: it is not UTF-8"),
        ("a.parquet", "nothing", "a.parquet: it is no Parquet"),
        ("a.xml", "<a/>", "a.xml: files that end in .xml cannot be read"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        data.read(write(tmp_path / name, text))
    assert str(caught.value).startswith(message)


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def test_parquet_with_images_in_it(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": png(1), "path": "1.png"}, {"bytes": png(2), "path": None}], "label": [0, 1]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [
        ({"image": png(1), "label": 0}, "a.parquet:row 1"),
        ({"image": png(2), "label": 1}, "a.parquet:row 2"),
    ]


def test_a_directory_of_images_by_class(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/2.png", "validation/dog/3.png", "test/cat/4.png"):
        write(tmp_path / name, png(1))
    learnt, judged = data.read(tmp_path)
    assert [(row.values["label"], row.where) for row in learnt] == [("cat", "cat/1.png"), ("dog", "dog/2.png")]
    assert [row.values["label"] for row in judged] == ["dog"]
    write(tmp_path / "loose.png", png(1))
    with pytest.raises(DataError, match="in a directory that is named like its class"):
        data.read(tmp_path)


def test_splits_by_file_name_and_a_test_set_that_nobody_reads(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "my_validation.jsonl", "sub/dev.jsonl", "test.jsonl", "evaluation.jsonl"):
        write_jsonl(write(tmp_path / name, ""), [{"from": name}])
    write(tmp_path / "README.txt", "no row")
    learnt, judged = data.read(tmp_path)
    assert [row.values["from"] for row in learnt] == ["evaluation.jsonl", "train-0.jsonl", "train-1.jsonl"]
    assert [row.values["from"] for row in judged] == ["my_validation.jsonl", "sub/dev.jsonl"]
    splits = loaded(tmp_path)
    assert len(splits.validation) == 2
    unread = f"{tmp_path.name}: 1 file is of a test set, and not read"
    assert splits.report == (unread, "2 rows of the data's own validation files are held out")


def test_a_directory_with_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is nothing to read"):
        data.read(tmp_path)
    with pytest.raises(DataError, match="there are no rows to learn from"):
        loaded(write(tmp_path / "a.jsonl", ""))


def test_validation_data_with_splits_of_its_own_is_only_the_one_for_this(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", [{"n": 0}])
    other = tmp_path / "other"
    write_jsonl(write(other / "train.jsonl", ""), [{"n": 1}])
    write_jsonl(write(other / "validation.jsonl", ""), [{"n": 2}])
    assert [row.values["n"] for row in loaded(train, validation_data=str(other)).validation] == [2]
    assert [row.values["n"] for row in loaded(train, validation_data=str(other / "train.jsonl")).validation] == [1]


def test_equal_rows_go_to_one_side_of_the_split(tmp_path: Path) -> None:
    rows = [{"n": n // 5} for n in range(100)]
    splits = loaded(write_jsonl(tmp_path / "a.jsonl", rows), validation_split=0.2)
    learnt, judged = ({row.values["n"] for row in side} for side in (splits.train, splits.validation))
    assert not learnt & judged
    assert len(splits.validation) == 20
    again = loaded(tmp_path / "a.jsonl", validation_split=0.2)
    assert again.digest == splits.digest
    assert loaded(tmp_path / "a.jsonl", validation_split=0.2, seed=7).digest != splits.digest


def test_all_rows_alike_are_not_split(tmp_path: Path) -> None:
    splits = loaded(write_jsonl(tmp_path / "a.jsonl", [{"n": 1}] * 5))
    assert (len(splits.train), len(splits.validation)) == (5, 0)


def test_rows_on_both_sides_are_reported(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", [{"n": n, "m": 0} for n in range(10)])
    judged = write_jsonl(tmp_path / "b.jsonl", [{"m": 0, "n": 3}, {"n": 11, "m": 0}])
    assert "1 rows stand in both splits, such as a.jsonl:4" in loaded(train, validation_data=str(judged)).report[-1]


def test_weights_decide_each_source_s_share(tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", [{"few": n} for n in range(10)])
    many = write_jsonl(tmp_path / "many.jsonl", [{"many": n} for n in range(30)])
    splits = loaded(
        {"path": str(few), "weight": 1}, {"path": str(many), "weight": 1.0}, validation_split=0, early_stopping_patience=0
    )
    assert len(splits.train) == 40
    splits = loaded(
        {"path": str(few), "weight": 2}, {"path": str(many), "weight": 1}, validation_split=0, early_stopping_patience=0
    )
    counts = [sum(key in row.values for row in splits.train) for key in ("few", "many")]
    assert counts == [60, 30]
    assert splits.report == ("weight 2: 10 rows are taken 6.00 times", "weight 1: 30 rows are taken 1.00 times")


def test_a_digest_is_of_what_a_row_says_not_of_where_it_stands(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1.png", png(1)), write(tmp_path / "2.png", png(1))
    assert Row({"image": first}, "a").digest == Row({"image": second}, "b").digest
    assert Row({"image": first}, "a").digest != Row({"image": write(tmp_path / "3.png", png(2))}, "a").digest


def test_what_is_of_a_test_set_is_counted_and_a_picture_s_own_name_says_nothing(tmp_path: Path) -> None:
    for name in ("train/cat/a_test_1.png", "train/dog/b_val_2.png", "test/cat/c.png", "val/dog/d.png"):
        write(tmp_path / "images" / name, b"")
    learnt, judged = data.read(tmp_path / "images")
    assert [row.where for row in learnt] == ["train/cat/a_test_1.png", "train/dog/b_val_2.png"]
    assert [row.where for row in judged] == ["val/dog/d.png"]
    write(tmp_path / "rows" / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    write(tmp_path / "rows" / "test.jsonl", '{"text": "c"}\n')
    splits = loaded(tmp_path / "rows")
    assert any(line.endswith("1 file is of a test set, and not read") for line in splits.report)


def test_files_of_one_name_in_two_sources_are_told_apart_by_as_little_as_it_takes(tmp_path: Path) -> None:
    rows = [{"n": 1}, {"n": 2}]
    files = [
        write_jsonl(write(tmp_path / place / "rows.jsonl", ""), [{**row, "at": place} for row in rows])
        for place in ("x/data", "y/data", "z")
    ]
    only = write_jsonl(tmp_path / "only.jsonl", [{"n": 3}])
    splits = loaded(*files, only, validation_split=0, early_stopping_patience=0)
    wheres = [row.where for row in splits.train]
    assert wheres[:3] == ["x/data/rows.jsonl:1", "x/data/rows.jsonl:2", "y/data/rows.jsonl:1"]
    assert wheres[4:] == ["z/rows.jsonl:1", "z/rows.jsonl:2", "only.jsonl:1"]
    splits = loaded(files[0], validation_data=str(tmp_path / "z"))
    assert [splits.train[0].where, splits.validation[0].where] == ["data/rows.jsonl:1", "z/rows.jsonl:1"]
    assert [row.where for row in loaded(files[0], validation_data=str(files[0])).train] == ["rows.jsonl:1", "rows.jsonl:2"]
    sources = [recipe.Source(str(file), True) for file in (*files, only, files[0])] + [recipe.Source("lab/rows", False)]
    ends = ["x/data/rows.jsonl", "y/data/rows.jsonl", "z/rows.jsonl", "only.jsonl", "x/data/rows.jsonl", "lab/rows"]
    assert data.names_of(sources) == ends
    write(files[1], "{")
    with pytest.raises(DataError, match=r"^y/data/rows\.jsonl:1: this is no JSON"):
        loaded(*files)


def test_sources_of_equal_weight_are_said_to_keep_their_sizes(tmp_path: Path) -> None:
    few, many = (write_jsonl(tmp_path / f"{n}.jsonl", [{"n": n, "m": m} for m in range(n)]) for n in (2, 5))
    splits = loaded({"path": str(few), "weight": 3}, {"path": str(many), "weight": 3}, validation_split=0)
    assert splits.report == ("the sources' weights are equal: their rows are taken once each (2, 5), not in equal shares",)
    assert loaded(few, validation_split=0).report == ()


@pytest.mark.parametrize("task", ["image-classification", "text-generation"])
def test_pictures_named_in_a_table_begin_at_its_directory(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the run is started from. In a task that reads no pictures `image` is a column like others."""
    write(tmp_path / "set" / "pictures" / "1.png", png(1))
    write(tmp_path / "cwd" / "pictures" / "2.png", png(2))
    monkeypatch.chdir(tmp_path / "cwd")
    table = write_jsonl(tmp_path / "set" / "a.jsonl", [{"image": "pictures/1.png", "label": "x"}])
    (row,) = data.read(table, task=task)[0]
    is_picture = task == "image-classification"
    assert row.values["image"] == (tmp_path / "set" / "pictures" / "1.png" if is_picture else "pictures/1.png")
    write_jsonl(table, [{"image": "pictures/1.png", "label": "x"}, {"image": "pictures/2.png", "label": "y"}])
    if is_picture:
        assert row.digest == Row({"image": png(1), "label": "x"}, "").digest, "what is hashed is the picture, not its name"
        with pytest.raises(DataError, match=rf"^a\.jsonl:2: there is no picture {tmp_path}/set/pictures/2\.png: paths begin"):
            data.read(table, task=task)
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "pictures/1.png"}]}), tmp_path / "set" / "b.parquet")
    (row,) = data.read(tmp_path / "set" / "b.parquet", task="image-classification")[0]
    assert row.values["image"] == tmp_path / "set" / "pictures" / "1.png"
