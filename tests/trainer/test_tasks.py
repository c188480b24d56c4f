"""Classification of texts, words and images: columns, labels, what is cut, scores."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from neartune.data import DataError, Row
from neartune.tasks import IGNORED, classification, images, tagging
from neartune.tasks.scores import scores, sorted_labels
from tests.trainer.bases import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=False)


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(value, f"a.csv:{number}") for number, value in enumerate(values, 2)]


def test_scores_by_hand() -> None:
    got = scores([(0, 0), (0, 1), (1, 1), (1, 1)], ("a", "b", "c"))
    assert got["accuracy"] == 0.75
    assert got["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert got["confusion"] == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]


def test_labels_are_in_a_fixed_order() -> None:
    assert sorted_labels([10, 9, "2"]) == ("2", "9", "10")
    assert sorted_labels(["b", "a", "10"]) == ("10", "a", "b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "x", "sentiment": 1}, r"a.csv:2: the columns are sentiment, text; needed are"),
        ({"text": "x", "label": ""}, "a.csv:2: it has no label"),
        ({"text": "x", "label": 1}, "all rows have the same label"),
    ],
)
def test_texts_that_cannot_be_told_apart(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        classification.find_labels(rows(values))


def test_texts(tokenizer: Any) -> None:
    given = rows({"text": "good", "label": "yes"}, {"text": "bad " * 50, "label": "no"}, {"text": "?", "label": "maybe"})
    got = classification.prepare(given, tokenizer, ("no", "yes"), max_length=16, model_limit=64)
    assert [example["label"] for example in got.examples] == [1, 0]
    assert len(got.examples[1]["input_ids"]) == 16
    assert got.counts["rows of a class that training does not have"] == 1
    assert got.counts["rows cut to 16 tokens"] == 1
    with pytest.raises(DataError, match=r"a\.csv:2: text must be text"):
        classification.prepare(rows({"text": 3, "label": "yes"}), tokenizer, ("no", "yes"), max_length=16, model_limit=64)


def test_a_text_s_class_does_not_depend_on_its_neighbours(llama: Path, tmp_path: Path) -> None:
    """A decoder's class is read off its last token, which padding must not be taken for."""
    base = tmp_path / "llama"
    shutil.copytree(llama, base)
    tokenizer = classification.load_processor(base)
    tokenizer.pad_token = "a"  # not the end token, and not what config.json says
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    model = classification.load_model(base, ("no", "yes")).eval()
    examples = [{"input_ids": ids, "label": 1} for ids in ([5, 6], [7, 8, 9, 10, 11])]
    with torch.no_grad():
        both, count, _ = classification.forward(model, classification.TASK.collate(examples, tokenizer))
        alone = [classification.forward(model, classification.TASK.collate([one], tokenizer))[0] for one in examples]
    assert count == 2
    assert float(both) == pytest.approx(float(sum(alone)), rel=1e-5)


def test_a_word_s_tag_is_learnt_at_its_first_token(tokenizer: Any) -> None:
    given = rows({"tokens": ["extraordinarily", "ok"], "tags": ["B", "O"]})
    assert tagging.find_labels(given) == ("B", "O")
    example = tagging.prepare(given, tokenizer, ("B", "O"), max_length=None, model_limit=64).examples[0]
    assert len(example["labels"]) > 2
    assert [label for label in example["labels"] if label != IGNORED] == [0, 1]
    assert example["labels"][0] == 0
    with pytest.raises(DataError, match=r"a\.csv:2: tokens and tags must be lists of one length"):
        tagging.find_labels(rows({"tokens": ["a"], "tags": []}))


class Processor:
    """Only what opened() asks."""

    def __init__(self, channels: int) -> None:
        self.image_mean = [0.5] * channels


def test_images_are_upright_and_in_the_base_s_channels(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=exif)
    row = Row({"image": tmp_path / "a.jpg", "label": "x"}, "x/a.jpg")
    assert images.opened(row, Processor(3)).size == (2, 4)
    assert images.opened(row, Processor(1)).mode == "L"
    file = io.BytesIO()
    picture.save(file, "PNG")
    assert images.opened(Row({"image": file.getvalue()}, "a.parquet:row 1"), Processor(3)).size == (4, 2)
    with pytest.raises(DataError, match=r"x/b\.png: it is no image"):
        images.opened(Row({"image": b"nothing"}, "x/b.png"), Processor(3))
