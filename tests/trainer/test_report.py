"""report.html and the model card: complete, of one file, harmless whatever the rows hold, and true to the run's numbers."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from neartune import cli
from neartune.data import Row
from neartune.evaluate import RowLoss
from neartune.reporting import card, chart, facts, report
from neartune.reporting.report import ReportError, Run
from tests.trainer.bases import FACTS, lines, make_llama, recipe_of, run_here, write_jsonl
from tests.trainer.made import made_run

EVIL = "</script></style><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)> & \" ' ` | \u202egnp"
VOID = {"meta", "img", "br", "link", "input", "hr", "base", "source", "embed"}


class Page(HTMLParser):
    """What a browser would find. `tags`: (name, attributes); `text`: of each element of a class, by class."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        self.sections[self.section] = self.sections.get(self.section, "") + data

    def all(self, tag: str, style: str | None = None) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and (style is None or found.get("class") == style)]


def harmless(html: str) -> Page:
    """The page, after the checks that hold for every page."""
    page = Page(html)
    assert page.open == [], "every element is closed"
    assert len(html.encode()) <= 2_000_000
    assert not {name for name, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert [found for name, found in page.tags if any(key.startswith("on") or key == "style" for key in found)] == []
    for name, found in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
            value = found.get(key)
            assert value is None or value.startswith("#") or (name == "img" and value.startswith("data:image/"))
    style = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert len(style) == 1
    assert not re.search(r"url\(|@import|@font-face|https?:", style[0])
    policy = next(found["content"] for found in page.all("meta") if found.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'")
    assert html.index("Content-Security-Policy") < html.index("<style>")
    assert "prefers-color-scheme: dark" in style[0]
    assert "@media print" in style[0]
    return page


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run over rows of which one is hostile and long, with prompts."""
    folder = tmp_path_factory.mktemp("report")
    rows = [*FACTS, {"prompt": EVIL + "q" * 3000, "completion": "a" * 5000 + EVIL}]
    base = make_llama(folder / "base")
    settings: dict[str, Any] = {"max_steps": 6, "eval_every": 2, "prompts": ["What is <b>1</b> & 1?"], "lora_dropout": 0.0}
    settings |= {"validation_split": 0.2, "max_length": 128}
    _, said = run_here(base, write_jsonl(folder / "rows.jsonl", rows), folder / "run", **settings)
    return folder / "run", said


def test_a_run_ends_with_a_page_that_needs_nothing_else(finished: tuple[Path, list[str]]) -> None:
    run, said = finished
    assert said[-1] == f"report: {run / 'report.html'}"
    page = harmless((run / "report.html").read_text())
    sections = [found["id"] for found in page.all("section")]
    assert sections == [*("curves", "evaluations", "samples", "data", "rows", "saved", "recipe", "origin", "machine", "repeat")]
    result = json.loads((run / "result.json").read_text())
    text = "".join(page.words)
    assert result["stopped_because"] in text
    assert f"{result['metrics']['loss']:.4f}" in page.sections["evaluations"]
    assert f"{result['base_metrics']['loss']:.4f}" in page.sections["evaluations"]
    assert "What is <b>1</b> & 1?" in page.sections["samples"]
    assert [found for found in page.all("tr") if found.get("class") == "best"] == [{"class": "best"}]
    for value in (*json.loads((run / "facts.json").read_text())["base"]["files"].values(), "torch", "transformers"):
        assert value in page.sections["origin"]
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in page.sections["origin"]


def test_the_page_can_be_written_again_from_the_files(finished: tuple[Path, list[str]], tmp_path: Path, capsys: Any) -> None:
    run, _ = finished
    assert cli.main(["report", str(run), "--to", str(tmp_path / "again.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'again.html'}\n"
    assert (tmp_path / "again.html").read_bytes() == (run / "report.html").read_bytes()


def test_what_is_no_run_is_refused_by_name(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: this is no run: there is no metrics.jsonl" in capsys.readouterr().err
    with pytest.raises(ReportError, match=r"there is no metrics\.jsonl"):
        report.read(tmp_path)


def test_a_run_that_is_under_way_has_a_page_too(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Without result.json, the last line half written."""
    run, _ = finished
    for name in ("recipe.yaml", "facts.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')
    page = harmless(report.write(tmp_path).read_text())
    assert "Not finished: 6 steps so far." in "".join(page.words)
    assert "saved" not in page.sections


def test_each_setting_stands_there_with_where_it_came_from(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", FACTS)
    recipe = {"base_model": "lab/tiny", "train_data": [{"path": str(rows), "weight": 1.0}], "lora_rank": 4, "seed": 42}
    recipe |= {"task": "text-generation", "train_batch_size": 4}
    origins = {"base_model": "config.yaml:3", "lora_rank": "command line", "seed": "default", "train_data": "config.yaml:4"}
    origins |= {"task": "default", "train_batch_size": "default"}
    run = Run(tmp_path, {"origins": origins}, {}, recipe, [], [], [], [])
    section = harmless(report.page(run)).sections["recipe"]
    assert "lora_rank4command line" in section
    assert "base_modellab/tinyconfig.yaml:3" in section
    assert section.index("config.yaml:3") < section.index("3 as the default has it") < section.index("seed42default")


# — hostile text —————————————————————————————————————————————————————————————————————————————————


def test_hostile_rows_are_text_and_nothing_else(finished: tuple[Path, list[str]]) -> None:
    run, _ = finished
    facts_of = json.loads((run / "facts.json").read_text())
    hostile = facts_of["hardest"]["rows"][0]
    hostile["pieces"] = [[EVIL, "", EVIL], [EVIL + "\x00\ud800\u200b\u200b\u200b", "learnt", ""]]
    hostile["where"] = hostile["split"] = EVIL
    facts_of["data"]["report"] = [EVIL]
    facts_of["data"]["sources"] = [{"name": EVIL, "commit": EVIL}]
    facts_of["origins"] = {"lora_rank": EVIL}
    facts_of["base"]["name"] = EVIL
    sides = [{"prompt": EVIL, "base": EVIL, "adapter": EVIL}]
    metrics = {"loss": 1.0, "confusion": [[1, 2], [3, 4]], "labels": [EVIL, "b"]}
    full = report.read(run)
    result = {**full.result, "metrics": metrics, "stopped_because": EVIL}
    recipe = {**full.recipe, "base_model": EVIL, "lora_targets": [EVIL]}
    samples = [{"kind": "samples", "step": 6, "samples": sides}]
    html = report.page(Run(run, facts_of, result, recipe, full.steps, full.evals, samples, []))
    page = harmless(html)
    assert {name for name, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "footer", "a", "p", "h1", "h2"),
        *("h3", "h4", "dl", "dt", "dd", "div", "span", "b", "i", "bdi", "small", "mark", "code", "pre", "details", "summary"),
        *("table", "thead", "tbody", "tr", "th", "td", "ul", "ol", "li", "figure", "figcaption", "img"),
        *("svg", "path", "text", "polyline", "circle", "rect", "title"),
    }
    seen = EVIL.replace("\u202e", "U+202E")
    for section in ("samples", "confusion", "data", "rows", "recipe"):
        assert seen in page.sections[section], section
    assert "U+0000U+D800U+200B × 3" in page.sections["rows"], "what is not seen is shown by its number"
    assert "\u202e" not in html


def test_long_rows_are_cut_with_a_count(finished: tuple[Path, list[str]]) -> None:
    pieces = [["c" * 5_000, "", ""], ["l" * 9_000, "learnt", ""], ["d" * 700, "", ""], ["e" * 50, "learnt", ""]]
    shown = report.shortened(pieces)
    said = [int(re.sub(r"\D", "", text)) for text, kind, _ in shown if kind == "cut"]
    kept = sum(len(text) for text, kind, _ in shown if kind != "cut")
    assert sum(said) + kept == 5_000 + 9_000 + 700 + 50
    assert kept <= report.A_ROW
    assert [kind for _, kind, _ in shown] == ["", "cut", "", "learnt", "cut", "", "cut", "", "cut"]
    assert report.shortened([["short", "", ""]]) == [("short", "", "")]


@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_page_of_the_longest_run_is_small(finished: tuple[Path, list[str]], kind: str) -> None:
    """5,000 steps, an evaluation each tenth, samples, eight GPUs, rows of nothing but characters that take room."""
    run, _ = finished
    draw = random.Random(0)
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "micro_batch", "seconds")
    steps = [{"step": step, **{name: draw.random() for name in names}} for step in range(1, 5_001)]
    evals = [{"step": step, "loss": draw.random(), "accuracy": 0.5, "f1": 0.5} for step in range(0, 5_001, 10)]
    sides = [{"prompt": "<" * 9_999, "base": "\u200b<" * 9_999, "adapter": "\u200b\u202e" * 9_999}] * 50
    samples = [{"step": step, "samples": sides} for step in range(10, 5_001, 10)]
    gpus = [{"name": EVIL, "utilisation": 0.0, "memory_used": 0, "temperature": 0, "power": 0.0}] * 8
    machine = [
        {"step": step, "cpu": draw.random(), "process_memory": step * 1e6}
        | {"gpus": [gpu | {"utilisation": draw.random() * 100, "power": draw.random()} for gpu in gpus]}
        for step in range(5_000)
    ]
    known = json.loads((run / "facts.json").read_text())
    pixels = base64.b64encode(bytes(10_000)).decode()
    text: dict[str, Any] = {"pieces": [["\u200b\u202e" * 50_000, "learnt", ""]] * 9}
    image: dict[str, Any] = {"image": f"data:image/jpeg;base64,{pixels}", "true": "<" * 999, "predicted": "x"}
    row = {"where": "<" * 999, "split": "train", "loss": math.nan} | (text if kind == "text" else image)
    known["hardest"] = {"judged": {"train": [20, 20]}, "rows": [row] * 20}
    many = [[1] * 25 for _ in range(25)]
    full = report.read(run)
    result = {**full.result, "metrics": {"loss": 1.0, "confusion": many, "labels": ["<" * 400] * 25}}
    page = harmless(report.page(Run(run, known, result, full.recipe, steps, evals, samples, machine)))
    assert "gpu 7 power" in page.sections["machine"]
    assert len(page.all("img")) == (20 if kind == "images" else 0)


def test_an_image_that_is_no_data_is_left_out(finished: tuple[Path, list[str]]) -> None:
    run, _ = finished
    full = report.read(run)
    row = {"where": "a.png", "split": "train", "loss": 1.0, "image": 'https://evil.example/x.png" onerror="alert(1)'}
    known = {**full.facts, "hardest": {"judged": {"train": [1, 1]}, "rows": [row]}}
    page = harmless(report.page(Run(run, known, full.result, full.recipe, full.steps, full.evals, [], [])))
    assert page.all("img") == []


# — curves ———————————————————————————————————————————————————————————————————————————————————————


def on_axis(svg: str, style: str) -> tuple[float, float]:
    """(data at pixel 0, data a pixel), from two of the axis's own labels."""
    place = "x" if style == "x" else "y"
    found = re.findall(rf'<text class="{style}" [^>]*?{place}="([\d.]+)"[^>]*>([^<]+)</text>', svg)
    if style == "y":
        found = re.findall(r'<text class="y" x="[\d.]+" y="([\d.]+)"[^>]*>([^<]+)</text>', svg)
    (one, low), (two, high) = found[0], found[-1]
    scale = (float(high) - float(low)) / (float(two) - float(one))
    return float(low) - float(one) * scale, scale


def test_points_of_a_curve_are_the_steps_of_the_run(finished: tuple[Path, list[str]]) -> None:
    """Read back through the axes' labels, which a reader goes by."""
    run, _ = finished
    html = (run / "report.html").read_text()
    figure = next(part for part in html.split("<figure>") if "<b>Loss</b>" in part).split("</svg>")[0]
    drawn = re.findall(r'<polyline class="(\w+)" points="([^"]+)"', figure)
    assert [style for style, _ in drawn] == ["train", "eval"]
    x0, a_pixel = on_axis(figure, "x")
    y0, down = on_axis(figure, "y")
    down_zero = y0 + 3.5 * down  # a label's foot stands 3.5 pixels below its line
    for (_, points), kind in zip(drawn, (None, "eval"), strict=True):
        expected = [(line["step"], line["loss"]) for line in lines(run) if line.get("kind") == kind]
        found = [tuple(map(float, point.split(","))) for point in points.split()]
        assert [x0 + x * a_pixel for x, _ in found] == pytest.approx([step for step, _ in expected], abs=0.02)
        assert [down_zero + y * down for _, y in found] == pytest.approx(
            [loss for _, loss in expected], abs=2 * abs(down) * 0.1
        )
    best = json.loads((run / "result.json").read_text())["best_step"]
    assert f"at step {best}</text>" in figure


def test_thinning_keeps_every_peak_and_invents_nothing() -> None:
    draw = random.Random(1)
    points = [(float(step), draw.random()) for step in range(5_000)]
    points[777], points[3_333] = (777.0, 9.0), (3_333.0, -9.0)
    thin = chart.thin(points, 200)
    assert len(thin) <= 402
    assert set(thin) <= set(points)
    assert thin == sorted(thin)
    assert {points[0], points[-1], points[777], points[3_333]} <= set(thin)
    for bucket in range(200):
        part = points[bucket * 25 : bucket * 25 + 25]
        assert {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])} <= set(thin)
    assert chart.thin(points[:400], 200) == points[:400]


def test_what_is_no_number_is_left_out_of_a_curve(finished: tuple[Path, list[str]]) -> None:
    run, _ = finished
    full = report.read(run)
    steps = [{**line, "loss": math.nan if line["step"] == 3 else line["loss"], "grad_norm": math.inf} for line in full.steps]
    html = report.page(Run(run, full.facts, full.result, full.recipe, steps, full.evals, [], []))
    harmless(html)
    train = re.findall(r'<polyline class="train" points="([^"]+)"', html)[0]
    assert len(train.split()) == 5
    assert "<b>Gradient norm</b>" not in html
    drawn = "".join(html.split("<svg")[1:])
    assert not re.search(r"\b(nan|inf)\b", drawn)


def test_a_histogram_counts_each_row_once() -> None:
    lengths = [(5, 2), (6, 1), (70, 4), (200, 1)]
    bins = chart.bins(lengths, 10)
    assert sum(count for *_, count in bins) == 8
    assert len({high - low for low, high, _ in bins}) == 1
    assert all(low == before + 1 for (_, before, _), (low, _, _) in pairwise(bins))
    for length, count in lengths:
        assert next(n for low, high, n in bins if low <= length <= high) >= count
    assert report._median(lengths) == 70


# — rows of highest loss —————————————————————————————————————————————————————————————————————————


def test_rows_of_highest_loss_are_those_of_the_finished_model(finished: tuple[Path, list[str]]) -> None:
    """Computed again with transformers and peft alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.parent / "base"), str(run / "adapter")).eval()
    rows = json.loads((run / "facts.json").read_text())["hardest"]["rows"]
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
    assert len(rows) == 20
    assert len({row["where"] for row in rows}) == 20
    for row in rows:
        number = int(row["where"].rpartition(":")[2])
        if number == 25:
            continue  # cut: its tokens are not those of its text
        asked = [{"role": "user", "content": FACTS[number - 1]["prompt"]}]
        before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(before + FACTS[number - 1]["completion"] + "<|im_end|>", return_tensors="pt")["input_ids"]
        learnt = [text for text, kind, _ in row["pieces"] if kind == "learnt"]
        assert learnt == [FACTS[number - 1]["completion"] + "<|im_end|>"]
        start = len(tokenizer(before)["input_ids"])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        expected = -logits.gather(1, ids[0, start:, None]).mean()
        assert row["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_equal_rows_are_shown_once_with_how_many_they_are(llama: Path, tmp_path: Path) -> None:
    rows = [*FACTS[:6], FACTS[0], FACTS[0]]
    run_here(llama, write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "run", max_steps=2, validation_split=0.0)
    found = json.loads((tmp_path / "run" / "facts.json").read_text())["hardest"]["rows"]
    assert sorted((row["where"], row["equal"]) for row in found) == [
        *(("rows.jsonl:1", 3), ("rows.jsonl:2", 1), ("rows.jsonl:3", 1), ("rows.jsonl:4", 1), ("rows.jsonl:5", 1)),
        ("rows.jsonl:6", 1),
    ]
    page = harmless((tmp_path / "run" / "report.html").read_text())
    assert page.sections["rows"].count("equal rows") == 1
    assert "No rows were held out" in page.sections["evaluations"]


def test_few_of_many_rows_are_judged_and_spread_evenly() -> None:
    assert facts.spread(5, 20) == [0, 1, 2, 3, 4]
    assert facts.spread(100, 4) == [0, 25, 50, 75]
    assert len(set(facts.spread(1_234, 500))) == 500


def test_judged_words_stand_with_both_tags() -> None:
    row = Row({"tokens": ["a", "b", "c"], "tags": ["X", "Y", "strange"]}, "x:1")
    pieces = facts.tag_pieces(row, [(0, 0), (1, 0)], ("X", "Y"))
    assert pieces == [("a ", "right", "X"), ("b ", "wrong", "Y, predicted X"), ("c ", "", "")]
    cut = facts.tag_pieces(row, [(0, 0)], ("X", "Y"))
    assert [kind for _, kind, _ in cut] == ["right", "", ""]


def test_a_thumbnail_is_what_the_model_saw() -> None:
    import io

    import torch
    from PIL import Image

    class Processor:
        image_mean, image_std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)

    seen = torch.randint(0, 256, (3, 5, 7), generator=torch.manual_seed(0))
    scale = torch.tensor(Processor.image_mean).view(3, 1, 1), torch.tensor(Processor.image_std).view(3, 1, 1)
    url = facts.thumbnail((seen / 255 - scale[0]) / scale[1], Processor)
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (7, 5)
    assert torch.tensor(list(image.tobytes())).view(5, 7, 3).permute(2, 0, 1).equal(seen)
    large = facts.thumbnail(torch.zeros(1, 500, 700), Processor)
    assert large.startswith("data:image/jpeg;base64,")
    assert len(large) < 15_000


# — what LoRA saved ——————————————————————————————————————————————————————————————————————————————


def test_what_lora_saved_is_counted(finished: tuple[Path, list[str]]) -> None:
    """Against the shapes of the base and of the adapter's file, and AdamW's two moments."""
    from safetensors.torch import load_file

    run, said = finished
    saved = json.loads((run / "result.json").read_text())["saved"]
    base = sum(tensor.numel() for tensor in load_file(run.parent / "base" / "model.safetensors").values())
    learnt = load_file(run / "adapter" / "adapter_model.safetensors")
    count = sum(tensor.numel() for tensor in learnt.values())
    assert (saved["trainable"], saved["parameters"]) == (count, base)
    assert saved["state_bytes"]["weights"] == 4 * (base + count)
    assert saved["state_bytes"]["gradients"] == 4 * count
    assert saved["state_bytes"]["optimizer"] == 8 * count + 4 * len(learnt), "and the number of steps of each tensor"
    assert sum(saved["full_state_bytes"].values()) == 16 * base
    assert saved["adapter_bytes"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert saved["base_bytes"] == (run.parent / "base" / "model.safetensors").stat().st_size
    sentence = card.saved_sentence(saved)
    assert sentence in said
    ours = 4 * base + 16 * count + 4 * len(learnt)
    assert f"{ours / (16 * base) - 1:+.1%}".replace("-", "−") in sentence
    assert "computed" in sentence


def test_where_lora_costs_more_it_says_so() -> None:
    assert (card.change(150, 100), card.change(26, 100)) == ("+50.0%", "−74.0%")


# — the card —————————————————————————————————————————————————————————————————————————————————————


def front_of(text: str) -> dict[str, Any]:
    _, front, _ = text.split("---\n", 2)
    loaded: dict[str, Any] = yaml.safe_load(front)
    return loaded


def test_the_card_tells_what_the_adapter_is(finished: tuple[Path, list[str]]) -> None:
    from huggingface_hub import ModelCard

    run, _ = finished
    text = (run / "adapter" / "README.md").read_text()
    result = json.loads((run / "result.json").read_text())
    assert front_of(text) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["text-generation", "neartune", "lora"],
        "metrics": ["perplexity"],
    }
    assert ModelCard(text, ignore_metadata_errors=False).data.library_name == "peft"
    known = json.loads((run / "run.json").read_text())
    for value in (known["data"]["sha256"], known["base"]["fingerprint"], known["versions"]["torch"], "rows.jsonl"):
        assert value in text
    assert f"| perplexity | {result['base_metrics']['perplexity']:.4f} | {result['metrics']['perplexity']:.4f} |" in text
    assert "| lora_rank | `4` |" in text
    assert "| seed |" not in text, "defaults are not repeated"
    assert str(run.parent) not in text, "no path of this machine"


def test_the_card_of_a_base_from_the_hub_names_its_commit(finished: tuple[Path, list[str]]) -> None:
    from dataclasses import replace

    run, _ = finished
    known = replace(card.read(run / "adapter"), repo="lab/tiny", base="lab/tiny", commit="c" * 40)
    front = front_of(card.card(known))
    assert front["base_model"] == "lab/tiny"
    assert "base_model:adapter:lab/tiny" in front["tags"]
    assert f'from_pretrained("lab/tiny", revision="{"c" * 40}")' in card.card(known)
    merged = card.card(replace(known, is_merged=True))
    assert front_of(merged)["library_name"] == "transformers"
    assert front_of(merged)["base_model_relation"] == "finetune"
    assert "peft" not in merged.split("## Versions")[0]


def test_hostile_names_stay_in_their_cell_of_the_card(finished: tuple[Path, list[str]]) -> None:
    from dataclasses import replace

    run, _ = finished
    evil = "a`b|c\n\n# d <script>"
    known = replace(
        card.read(run / "adapter"),
        **{"repo": evil, "base": evil, "name": evil, "stopped_because": evil, "labels": (evil,)},
        data=({"name": evil, "commit": evil},),
    )
    text = card.card(known)
    assert front_of(text)["base_model"] == evil
    outside = re.sub(r"```python.*?```", "", text.split("---\n", 2)[2], flags=re.DOTALL)
    outside = re.sub(r"`[^`\n]*`", "", outside)
    assert "<script>" not in outside
    assert not re.search(r"^# d", text, re.MULTILINE)


@pytest.mark.parametrize("which", [0, 1])
def test_the_code_on_the_card_loads_the_adapter(finished: tuple[Path, list[str]], which: int) -> None:
    """Both ways, as they stand there, but for the paths."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, _ = finished
    code = re.findall(r"```python\n(.*?)```", (run / "adapter" / "README.md").read_text(), re.DOTALL)
    assert len(code) == 2
    space: dict[str, Any] = {}
    exec(code[which].replace("path/to/adapter", str(run / "adapter")).replace("path/to/", f"{run.parent}/"), space)
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base")
    expected = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert space["model"](ids).logits.equal(expected(ids).logits)


def test_a_recipe_is_read_back_as_it_was(finished: tuple[Path, list[str]]) -> None:
    """What the card calls other than the default is what the recipe set."""
    run, _ = finished
    recipe = recipe_of(run.parent / "base", run.parent / "rows.jsonl", run)
    named = dict(card._settings(card.read(run / "adapter")))
    assert named.keys() == {
        *("train_batch_size", "micro_batch_size", "max_steps", "learning_rate", "processes", "lora_rank", "eval_every"),
        *("lora_dropout", "validation_split", "max_length"),
    }
    assert named["learning_rate"] == f"`{recipe.learning_rate}`"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n', "metrics.jsonl:2 is no line of metrics"),
        ("metrics.jsonl", '{"kind": "eval", "step": 1}\n', "metrics.jsonl:1 is no line of metrics"),
        ("metrics.jsonl", '["loss"]\n', "metrics.jsonl:1 is no line of metrics"),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl:1 is no line of metrics"),
        ("recipe.yaml", "task: [\n", "recipe.yaml:"),
        ("recipe.yaml", "task: text-generation\n", "recipe.yaml has no base_model, lora_rank, train_batch_size"),
        ("facts.json", '{"base": ', "facts.json cannot be read: "),
        ("result.json", "[]", "result.json is no object"),
        ("result.json", '{"steps": 3}', "result.json has no best_step, stopped_because"),
    ],
)
def test_a_damaged_file_is_told_in_a_line(tmp_path: Path, capsys: Any, name: str, text: str | bytes, message: str) -> None:
    run = made_run(tmp_path / "run", lora_rank=4)
    (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli.main(["report", str(run)]) == 2
    err = capsys.readouterr().err
    assert f"{run}: {message}" in err
    assert "Traceback" not in err
    assert not (run / "report.html").exists()


def test_a_word_keeps_its_tag_and_a_cut_row_begins_with_no_empty_line() -> None:
    found = report._pieces([("\n", "", ""), ("two\n", "learnt", "")])
    assert found == '<div class="text" dir="auto"><mark class="learnt">two\n</mark></div>'
    found = report._pieces([("a ", "right", "X"), ("b ", "", "")])
    tag = '<span class="tag"><bdi>X</bdi></span>'
    assert found == f'<div class="text" dir="auto"><mark class="right">a\u00a0{tag}</mark> b </div>', (
        "nothing breaks between them"
    )


def test_what_is_said_of_a_line_in_a_chart_stands_over_the_curve() -> None:
    drawn = chart.curves([chart.Series("", "train", [(1.0, 0.5), (2.0, 3.0)])], label="norm", line=(1.0, "clipped above 1"))
    assert drawn.index("<polyline") < drawn.index("clipped above 1")


def test_samples_of_the_machine_have_their_units_however_small_they_are(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", lora_rank=4, is_finished=False)
    with (run / "metrics.jsonl").open("a") as stream:
        for step, (cpu, read, power) in enumerate([(10.0, 0.0, 30.0), (20.0, 4096.0, 50.0)], 1):
            line = {"kind": "machine", "step": step, "cpu": cpu, "disk_read": read, "gpus": [{"name": "x", "power": power}]}
            stream.write(json.dumps(line) + "\n")
    machine = harmless(report.page(report.read(run))).sections["machine"]
    for told in ("cpu%last: 20", "disk readbytes a secondlast: 4.1 kB", "gpu 0 powerWlast: 50"):
        assert told in machine


def test_rows_whose_loss_is_no_number_are_the_hardest() -> None:
    rows = [RowLoss(loss, 2, None) for loss in (1.0, math.nan, 8.0, -1.0, math.inf)]
    assert [row.mean for row in sorted(rows, key=lambda row: row.rank)] == [None, None, 4.0, 0.5, -0.5]
    assert "<b>not a number</b>" in report._hard(1, {"where": "a", "split": "train", "loss": None})
