"""Classification of texts, words and images: columns, labels, what is cut, scores."""

from __future__ import annotations

import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    ViTImageProcessorPil,
)

from neartune.data import DataError, Row
from neartune.loop import Trainer
from neartune.tasks import IGNORED, classification, images, tagging
from neartune.tasks.scores import scores, sorted_labels
from tests.trainer.bases import SMALL, losses, make_tokenizer, make_vit, run_here


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


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of letters, each a token."""
    base = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(base)
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(words), initializer_range=1.0, **SMALL)).save_pretrained(base)
    return base


@pytest.mark.parametrize("columns", [("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis")])
def test_a_pair_has_segments_and_the_longer_text_is_cut(bert: Path, columns: tuple[str, str]) -> None:
    tokenizer = classification.load_processor(bert)
    pairs = [("a b c d e f g h i j", "j i"), ("a", "b"), ("b c", "d e f")]
    given = rows(*({columns[0]: one, columns[1]: other, "label": "yes"} for one, other in pairs))
    got = classification.prepare(given, tokenizer, ("no", "yes"), max_length=9, model_limit=64)
    assert tokenizer.decode(got.examples[0]["input_ids"]) == "[CLS] a b c d [SEP] j i [SEP]"
    assert got.examples[0]["token_type_ids"] == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert got.examples[1]["token_type_ids"] == [0, 0, 0, 1, 1]
    assert got.counts["rows cut to 9 tokens"] == 1
    assert tokenizer.backend_tokenizer.truncation is None, "it is saved with the adapter as it was"
    batch = classification.TASK.collate(got.examples, tokenizer)
    assert batch["token_type_ids"][1].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    model = classification.load_model(bert, ("no", "yes")).eval()
    with torch.no_grad():
        ours = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        texts = tokenizer([one for one, _ in pairs], [other for _, other in pairs], padding=True, return_tensors="pt")
        theirs = model(**{name: tensor[1:] for name, tensor in texts.items()}).logits
        blind = model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).logits[1:]
    assert torch.allclose(ours[1:], theirs, atol=1e-4)
    assert not torch.allclose(blind, theirs, atol=1e-2)


def test_a_text_alone_has_no_segments_and_a_model_that_takes_none_gets_none(bert: Path, tmp_path: Path) -> None:
    given = rows({"text": "a b c d e f", "label": "yes"})
    got = classification.prepare(given, classification.load_processor(bert), ("yes",), max_length=5, model_limit=64)
    assert got.examples == [{"input_ids": [2, 5, 6, 7, 3], "label": 0}], "the mark of the end stays"
    for file in bert.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    DistilBertConfig(vocab_size=15).save_pretrained(tmp_path)
    pair = rows({"sentence1": "a", "sentence2": "b", "label": "yes"})
    tokenizer = classification.load_processor(tmp_path)
    tokenizer.save_pretrained(tmp_path / "adapter")
    for known in (tokenizer, classification.load_processor(tmp_path / "adapter")):
        got = classification.prepare(pair, known, ("yes",), max_length=16, model_limit=64)
        assert got.examples == [{"input_ids": [2, 5, 3, 6, 3], "label": 0}]
    BertConfig(vocab_size=15, type_vocab_size=1).save_pretrained(tmp_path)
    assert "token_type_ids" not in classification.load_processor(tmp_path).model_input_names


def test_pictures_are_kept_as_files_and_become_the_processor_s_pixels_with_their_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two pictures the pixels of one fit into what is kept; whether threads have begun or not, the pixels are the same."""
    processor = ViTImageProcessorPil(size={"height": 6, "width": 6}, image_mean=[0.5], image_std=[0.25])
    given = []
    for number in range(3):
        Image.frombytes("L", (4, 4), bytes(range(number, 16 + number))).save(tmp_path / f"{number}.png")
        given.append(Row({"image": tmp_path / f"{number}.png", "label": str(number)}, f"{number}.png"))
    expected = torch.stack(
        [processor(Image.open(row.values["image"]), return_tensors="pt")["pixel_values"][0] for row in given]
    )
    monkeypatch.setattr(images, "KEPT", 6 * 6 * 4)
    got = images.prepare(given, processor, ("0", "1", "2"), max_length=None, model_limit=1)
    pictures = [example["picture"] for example in got.examples]
    assert [picture.kept is not None for picture in pictures] == [True, False, False]
    assert got.counts == {"format: images (1×6×6), 3 classes": 3}
    for begun in ([], got.examples[:2], got.examples):
        images.TASK.ahead(begun, processor)
        assert [picture.begun is not None for picture in pictures[1:]] == [len(begun) > 1, len(begun) > 2]
        batch = images.TASK.collate(got.examples, processor)
        assert torch.equal(batch["pixel_values"], expected)
        assert batch["labels"].tolist() == [0, 1, 2]
        assert all(picture.begun is None for picture in pictures)
    for device, is_begun in (("cpu", False), ("cuda", True)):
        nothing: Any = None
        Trainer(images.TASK, nothing, nothing, processor, nothing, torch.device(device), 1).ahead(got.examples)
        assert (pictures[2].begun is not None) is is_begun, "threads take no core from a CPU that computes"
    images.TASK.collate(got.examples, processor)
    (tmp_path / "2.png").write_bytes(b"gone")
    images.TASK.ahead(got.examples, processor)
    with pytest.raises(DataError, match=r"2\.png: it is no image"):
        images.TASK.collate(got.examples, processor)


def test_a_run_on_pictures_that_are_not_kept_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vit: Path
) -> None:
    for number in range(24):
        (tmp_path / "rows" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 5 * number + 100 * (number % 2)).save(tmp_path / "rows" / "ab"[number % 2] / f"{number}.png")
    settings = {"task": "image-classification", "eval_every": 2, "validation_split": 0.25, "micro_batch_size": 2}
    results = []
    in_threads = 0
    plain = images.pixels

    def noted(row: Row, processor: Any) -> torch.Tensor:
        nonlocal in_threads
        in_threads += threading.current_thread().name.startswith("pictures")
        return plain(row, processor)

    monkeypatch.setattr(images, "pixels", noted)
    for kept in (2**20, 0):
        monkeypatch.setattr(images, "KEPT", kept)
        if not kept:
            monkeypatch.setattr(Trainer, "ahead", lambda self, examples: self.task.ahead(examples, self.processor))
        result, _ = run_here(vit, tmp_path / "rows", tmp_path / f"run-{kept}", **settings)
        facts = json.loads((tmp_path / f"run-{kept}" / "facts.json").read_text())
        results.append((result["metrics"], losses(tmp_path / f"run-{kept}"), facts["hardest"], facts["data"]))
    assert results[0] == results[1]
    judged = 3 * 6 + 18 + 6
    assert in_threads == 4 * 4 + judged, "every picture of a step and of what is judged is made ready before its turn"
    assert len(results[0][2]["rows"]) == 20
    assert all(row["image"].startswith("data:image/png;base64,") for row in results[0][2]["rows"])


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vit(tmp_path_factory.mktemp("vit"), 8, channels=1)
