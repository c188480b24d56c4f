"""report.html: a run on one page, from its files alone. No scripts, nothing is fetched: it opens from a file share, in years.

What rows, prompts and settings hold is hostile: text is escaped, characters that cannot be seen or that turn the text around
are shown by their numbers, what is long is cut with a count. The page's policy allows no style but its own, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from neartune import __version__
from neartune.reporting import chart, files
from neartune.reporting.card import change
from neartune.reporting.chart import Point, Series
from neartune.units import duration, size

CONTEXT, LEARNT, A_ROW = 420, 800, 1_600
"""Characters shown of what stands around the learnt text, of a learnt piece, and of a row in all."""
AN_ANSWER, A_VALUE = 600, 300
MOST_CLASSES, MOST_PAIRS, MOST_EVALUATIONS, MOST_SAMPLES, MOST_MACHINE = 25, 20, 200, 20, 40
_ODD = re.compile("([\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff])\\1*")
_DATA_URL = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")
_MEASURES = {"loss": "Validation loss", "perplexity": "Perplexity", "accuracy": "Accuracy", "f1": "Macro F1"}
_UNKNOWN = "unknown"
_UNITS = (
    *((name, "bytes a second") for name in ("disk_read", "disk_write", "net_")),
    *((name, "bytes") for name in ("memory", "disk_free")),
    *((name, "%") for name in ("cpu", "utilisation")),
    ("temperature", "°C"),
    ("power", "W"),
)
"""Of samples of the machine, by a part of their names."""
_SETTINGS = ("base_model", "task", "lora_rank", "train_batch_size")
_RESULTS = ("best_step", "steps", "stopped_because")
"""Without which there is no page."""


class ReportError(Exception):
    """There is no run to report on; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run's files. Of one that is under way or was stopped, `result` is empty."""

    folder: Path
    facts: Mapping[str, Any]
    result: Mapping[str, Any]
    recipe: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    machine: Sequence[Mapping[str, Any]]

    @property
    def best_step(self) -> int | None:
        if self.result:
            return int(self.result["best_step"])
        judged = [line for line in self.evals if line["step"]]
        return int(min(judged, key=lambda line: _finite(line.get("loss")) or math.inf)["step"]) if judged else None


def write(folder: Path, to: Path | None = None) -> Path:
    """The page of the run in `folder`, written to `to`, else to report.html there. Raises ReportError."""
    text = page(read(folder))
    target = to or folder / "report.html"
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(target)
    return target


def read(folder: Path) -> Run:
    """Raises ReportError."""
    for name in ("metrics.jsonl", "recipe.yaml"):
        if not (folder / name).is_file():
            raise ReportError(f"{folder}: this is no run: there is no {name}")
    try:
        lines = [*files.read_lines(folder / "metrics.jsonl")]
        recipe = files.read_recipe(folder / "recipe.yaml")
        facts, result = (
            files.read_json(file) if file.is_file() else {} for file in (folder / "facts.json", folder / "result.json")
        )
    except files.Damaged as exc:
        raise ReportError(f"{folder}: {exc}") from None
    for name, found, needed in (("recipe.yaml", recipe, _SETTINGS), ("result.json", result, _RESULTS if result else ())):
        if lacking := [key for key in needed if key not in found]:
            raise ReportError(f"{folder}: {name} has no {', '.join(lacking)}")

    def kind(name: str | None) -> list[Any]:
        return [line for line in lines if line.get("kind") == name]

    return Run(
        folder=folder,
        facts=facts,
        result=result,
        recipe=recipe,
        steps=kind(None),
        evals=kind("eval"),
        samples=kind("samples"),
        machine=[
            line | {"step": _step_before(lines, index)} for index, line in enumerate(lines) if line.get("kind") == "machine"
        ],
    )


def _step_before(lines: Sequence[Any], index: int) -> int:
    """The step that a sample of the machine belongs to: its own word, else the last step written before it."""
    own = lines[index].get("step")
    if own is not None:
        return int(own)
    return next((int(line["step"]) for line in reversed(lines[:index]) if "step" in line), 0)


# — the page —————————————————————————————————————————————————————————————————————————————————————


def page(run: Run) -> str:
    style = (Path(__file__).with_name("report.css")).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    parts = [
        ("curves", "Curves", _curves(run)),
        ("evaluations", "Evaluations", _evaluations(run)),
        ("samples", "Samples", _samples(run)),
        ("confusion", "Confusion matrix", _confusion(run)),
        ("data", "Data", _data(run)),
        ("rows", "Rows of highest loss", _hardest(run)),
        ("saved", "What LoRA saved", _saved(run)),
        ("recipe", "Recipe", _recipe(run)),
        ("origin", "Provenance", _origin(run)),
        ("machine", "Machine", _machine(run)),
        ("repeat", "How to repeat it", _repeat(run)),
    ]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in parts)
    sections = "\n".join(f'<section id="{anchor}"><h2>{title}</h2>\n{body}</section>' for anchor, title, body in parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{_text(_title(run))}: neartune report</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<header>\n{_summary(run)}\n<nav>{links}</nav>\n</header>\n<main>\n{sections}\n</main>\n"
        f"<footer>Made by neartune {__version__} from the files of this run. One file, without scripts; it fetches nothing."
        f"</footer>\n</body>\n</html>\n"
    )


def _title(run: Run) -> str:
    base = run.facts.get("base", {}).get("name") or str(run.recipe["base_model"])
    return f"{base.rpartition('/')[2]}, {run.folder.absolute().name}"


def _summary(run: Run) -> str:
    result, facts = run.result, run.facts
    base = facts.get("base", {}).get("name") or str(run.recipe["base_model"])
    kind = f"LoRA rank {run.recipe['lora_rank']}, {run.recipe['task']}"
    data = facts.get("data", {})
    learnt = f"{data['train']:,} rows to learn from, {data['validation']:,} for validation. " if data else ""
    seconds = sum(_finite(line.get("seconds")) or 0.0 for line in run.steps)
    last = run.steps[-1]["step"] if run.steps else 0
    if result:
        when = _when(facts.get("ended"))
        said = f"Finished {when}: {result['stopped_because']}" if when else str(result["stopped_because"]).capitalize()
        said += f". The adapter is that of step {result['best_step']:,} of {result['steps']:,}."
    else:
        said = f"Not finished: {last:,} steps so far."
    numbers = [*_headline(run)]
    if saved := result.get("saved"):
        numbers.append(
            (
                "Trainable",
                _count(saved["trainable"]),
                f"{saved['trainable'] / saved['parameters']:.2%} of the base",
            )
        )
        numbers.append(("Adapter", size(saved["adapter_bytes"]), f"the base: {size(saved['base_bytes'])}"))
    numbers.append(("Training", duration(seconds), f"{last:,} steps of {run.recipe['train_batch_size']} rows"))
    cells = "".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd><dd>{_text(note)}</dd></div>" for name, value, note in numbers)
    return (
        f'<p class="eyebrow">{_text(kind)}</p>\n<h1>{_text(base)}</h1>\n'
        f'<p>{_text(learnt + said)}</p>\n<dl class="numbers">{cells}</dl>'
    )


def _headline(run: Run) -> Iterable[tuple[str, str, str]]:
    """(name, adapter's number, the base's beside it) of what was measured."""
    now, before = run.result.get("metrics") or (run.evals[-1] if run.evals else {}), run.result.get("base_metrics") or {}
    if not before and run.evals and run.evals[0]["step"] == 0:
        before = run.evals[0]
    for name, title in _MEASURES.items():
        value, was = _finite(now.get(name)), _finite(before.get(name))
        if value is not None:
            share = name in ("accuracy", "f1")
            note = "" if was is None else f"base {_measure(was, share)}"
            yield title, _measure(value, share), note + (f", {change(value, was)}" if was and not share else "")


def _measure(value: float, is_share: bool) -> str:
    return f"{value:.1%}" if is_share else f"{value:.4g}"


# — curves ———————————————————————————————————————————————————————————————————————————————————————


def _curves(run: Run) -> str:
    if not run.steps and not run.evals:
        return ""
    unit = "nats per learnt token" if run.recipe["task"] == "text-generation" else "nats"
    losses = [
        Series("training", "train", _points(run.steps, "loss")),
        Series("validation", "eval", _points(run.evals, "loss"), has_dots=True),
    ]
    best = run.best_step
    at = next((point for point in losses[1].points if point[0] == best), None)
    mark = (at[0], f"best: {at[1]:.4g} at step {at[0]:,.0f}") if at else None
    whole = _figure("Loss", losses, unit, mark=mark, is_large=True)
    tokens = "Images" if run.recipe["task"] == "image-classification" else "Tokens"
    norm = _finite(run.recipe.get("max_grad_norm"))
    small = [
        *(_measured(run, names, mark[0] if mark else None) for names in (("accuracy", "f1"), ("perplexity",))),
        _figure("Learning rate", [Series("", "train", _points(run.steps, "learning_rate"))], "of each step", zero=True),
        _figure(
            "Gradient norm",
            [Series("", "train", _points(run.steps, "grad_norm"))],
            "before clipping",
            zero=True,
            line=(norm, f"clipped above {norm:g}") if norm else None,
        ),
        _figure(
            f"{tokens} per second", [Series("", "train", _points(run.steps, "tokens_per_second"))], "of each step", zero=True
        ),
        _figure("Rows at once", [Series("", "train", _points(run.steps, "micro_batch"))], "micro-batch", zero=True)
        if len({line.get("micro_batch") for line in run.steps}) > 1
        else "",
    ]
    note = ""
    if len(run.steps) > 800:
        note = (
            f'<p class="soft">{len(run.steps):,} steps are drawn by the lowest and highest value of each stretch of them.</p>'
        )
    return whole + f'<div class="charts">{"".join(small)}</div>{note}'


def _measured(run: Run, names: Sequence[str], best: float | None) -> str:
    styles = ("eval", "train")
    series = [
        Series(_MEASURES[name] if len(names) > 1 else "", style, _points(run.evals, name), has_dots=True)
        for name, style in zip(names, styles, strict=False)
    ]
    title = "Accuracy and macro F1" if "accuracy" in names else _MEASURES[names[0]]
    return _figure(title, series, "validation", mark=None if best is None else (best, "best"))


def _figure(
    title: str,
    series: Sequence[Series],
    unit: str,
    *,
    mark: tuple[float, str] | None = None,
    line: tuple[float, str] | None = None,
    zero: bool = False,
    is_large: bool = False,
    say: Any = chart.short,
) -> str:
    """Nothing without a point. A large one is drawn twice: once for narrow screens."""
    drawn = [one for one in series if one.points]
    if not drawn:
        return ""
    keys = "".join(f'<span class="key {one.style}">{escape(_lower(one.name))}</span>' for one in drawn if one.name)
    last = ", ".join(f"{_lower(one.name)} {say(one.points[-1][1])}".strip() for one in drawn)
    label = f"{title}, by step; last: {last}"

    def draw(width: int, height: int) -> str:
        return chart.curves(drawn, label=label, width=width, height=height, starts_at_zero=zero, mark=mark, line=line, say=say)

    picture = draw(460, 200)
    if is_large:
        picture = f'<div class="wide">{draw(976, 340)}</div><div class="narrow">{draw(460, 260)}</div>'
    caption = f'<b>{_text(title)}</b>{keys}<small>{_text(unit)}</small><span class="last">last: {_text(last)}</span>'
    return f"<figure><figcaption>{caption}</figcaption>{picture}</figure>"


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """By step; what is no number is left out."""
    found = ((float(line["step"]), _finite(line.get(name))) for line in lines)
    return [(step, value) for step, value in found if value is not None]


def _evaluations(run: Run) -> str:
    if not run.evals:
        return "<p>No rows were held out: nothing was measured on the way.</p>" if run.result else ""
    names = [name for name in _MEASURES if any(_finite(line.get(name)) is not None for line in run.evals)]
    best, rows = run.best_step, []
    left = max(0, len(run.evals) - MOST_EVALUATIONS)
    shown = [line for line in run.evals[:left] if line["step"] == best] + list(run.evals[left:])
    for line in shown:
        values = [_finite(line.get(name)) for name in names]
        cells = "".join(f'<td class="n">{"" if value is None else f"{value:.4f}"}</td>' for value in values)
        step = line["step"]
        note = "best" if step == best else "base" if not step else ""
        rows.append(f'<tr{" class=best" if step == best else ""}><td class="n">{step:,}</td>{cells}<td>{note}</td></tr>')
    head = '<th class="n">step</th>' + "".join(f'<th class="n">{_lower(_MEASURES[name])}</th>' for name in names) + "<th></th>"
    more = f'<p class="soft">{left:,} earlier ones are in metrics.jsonl.</p>' if left else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{more}'


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    at = next((line for line in run.samples if line["step"] == run.best_step), run.samples[-1])
    items = []
    for number, side in enumerate(at["samples"][:MOST_SAMPLES]):
        before = []
        for line in run.samples[:: max(1, len(run.samples) // 8)][:8] if number < 6 else ():
            answer = line["samples"][number]["adapter"] if number < len(line["samples"]) else ""
            before.append(
                f'<tr><td class="n">{line["step"]:,}</td><td class="text said" dir="auto">{_answer(answer, 300)}</td></tr>'
            )
        history = f"<details><summary>on the way</summary><table>{''.join(before)}</table></details>" if len(before) > 1 else ""
        items.append(
            f'<li class="item"><div class="text" dir="auto">{_cut(side["prompt"], AN_ANSWER)}</div><div class="sides">'
            f'<div><h4>base</h4><div class="text said" dir="auto">{_answer(side["base"], AN_ANSWER)}</div></div>'
            f'<div><h4>adapter</h4><div class="text said" dir="auto">{_answer(side["adapter"], AN_ANSWER)}</div></div>'
            f"</div>{history}</li>"
        )
    left = len(at["samples"]) - MOST_SAMPLES
    more = f'<p class="soft">{left} more prompts are in metrics.jsonl.</p>' if left > 0 else ""
    note = f'<p class="soft">At step {at["step"]:,}; the likeliest token each time.</p>'
    return f'{note}<ul class="rows">{"".join(items)}</ul>{more}'


def _confusion(run: Run) -> str:
    metrics = run.result.get("metrics") or (run.evals[-1] if run.evals else {})
    matrix, labels = metrics.get("confusion"), metrics.get("labels")
    if not matrix or not labels:
        return ""
    pairs = sorted(
        (
            (count, true, predicted)
            for true, row in enumerate(matrix)
            for predicted, count in enumerate(row)
            if true != predicted
        ),
        key=lambda pair: -pair[0],
    )
    pairs = [pair for pair in pairs if pair[0]]
    if len(labels) > MOST_CLASSES:
        rows = "".join(
            f'<tr><td>{_value(labels[true])}</td><td>{_value(labels[predicted])}</td><td class="n">{count:,}</td></tr>'
            for count, true, predicted in pairs[:MOST_PAIRS]
        )
        note = f"<p>{len(labels)} classes; the pairs that were mistaken most often.</p>"
        head = '<tr><th>true</th><th>predicted</th><th class="n">rows</th></tr>'
        return f'{note}<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    columns = [sum(row[column] for row in matrix) for column in range(len(labels))]
    body = []
    for true, row in enumerate(matrix):
        total = sum(row)
        cells = "".join(
            f"<td{_shade(count, total, is_right=true == predicted)}>{count or ''}</td>" for predicted, count in enumerate(row)
        )
        recall = f"{row[true] / total:.0%}" if total else "–"
        body.append(f'<tr><th class="name" scope="row">{_value(labels[true])}</th>{cells}<td class="rate">{recall}</td></tr>')
    precision = "".join(f'<td class="rate">{f"{matrix[i][i] / n:.0%}" if n else "–"}</td>' for i, n in enumerate(columns))
    head = "<th></th>" + "".join(f'<th class="name" scope="col">{_value(label)}</th>' for label in labels) + "<th>recall</th>"
    foot = f"<tr><th>precision</th>{precision}<td></td></tr>"
    note = "<p class=soft>Rows: true class; columns: predicted. Shaded by share of the row.</p>"
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}{foot}</tbody>"
    return f'{note}<div class="scroll"><table class="confusion">{table}</table></div>'


def _shade(count: int, total: int, *, is_right: bool) -> str:
    if not count:
        return ""
    return f' class="{"right" if is_right else "miss"}{max(1, math.ceil(5 * count / total))}"'


# — data —————————————————————————————————————————————————————————————————————————————————————————


def _data(run: Run) -> str:
    data = run.facts.get("data")
    if not data:
        return ""
    rows = []
    for source in data["sources"]:
        rows.append(
            ("source", _value(source["name"]) + (f" at <code>{_value(source['commit'])}</code>" if source["commit"] else ""))
        )
    rows.append(("training rows", f"{data['train']:,}"))
    rows.append(("validation rows", f"{data['validation']:,}"))
    rows += [("split", _value(line)) for line in data["report"]]
    for split, counts in data["counts"].items():
        for what, count in counts.items():
            rows.append((split, f"{_value(what)}: {count:,}"))
    first = f'<h3>The first training row</h3><p class="soft">What is learnt is highlighted.</p>{_pieces(data["first"])}'
    return _pairs(rows) + _histogram(data["lengths"]) + first


def _histogram(lengths: Sequence[Sequence[int]]) -> str:
    if not lengths:
        return ""
    counts = chart.bins([(int(length), int(count)) for length, count in lengths])
    total = sum(count for _, count in lengths)
    sizes = f"{lengths[0][0]} to {lengths[-1][0]}, median {_median(lengths)}"
    picture = chart.bars(counts, label=f"Lengths of {total} training rows in tokens: {sizes}")
    caption = f'<b>Length of training rows</b><small>tokens</small><span class="last">{sizes}</span>'
    return f'<div class="charts"><figure><figcaption>{caption}</figcaption>{picture}</figure></div>'


def _median(lengths: Sequence[Sequence[int]]) -> int:
    """The lower one, of (length, how many have it), ascending."""
    sums = accumulate(count for _, count in lengths)
    half = sum(count for _, count in lengths) / 2
    return next(int(length) for (length, _), upto in zip(lengths, sums, strict=True) if upto >= half)


def _hardest(run: Run) -> str:
    known = run.facts.get("hardest")
    if not known or not known["rows"]:
        return ""
    judged = " and ".join(
        f"{of} {split} rows" if some == of else f"{some} of {of:,} {split} rows, spread evenly,"
        for split, (some, of) in known["judged"].items()
        if of
    )
    unit = {"text-generation": "learnt token", "token-classification": "judged word"}.get(run.recipe["task"], "row")
    note = (
        f"The finished adapter was asked about {judged} one by one; these {len(known['rows'])} different ones have the highest "
        f"loss (nats per {unit}). Wrong labels and broken rows gather here."
    )
    items = [_hard(number, row) for number, row in enumerate(known["rows"], 1)]
    is_gallery = any("image" in row for row in known["rows"])
    return f'<p>{note}</p><ol class="rows{" gallery" if is_gallery else ""}">{"".join(items)}</ol>'


def _hard(number: int, row: Mapping[str, Any]) -> str:
    loss = _finite(row["loss"])
    head = f"<b>{'not a number' if loss is None else f'{loss:.3f}'}</b>"
    head += f'<span class="mono">{_value(row["where"])}</span><span>{_value(row["split"])}</span>'
    if row.get("equal", 1) > 1:
        head += f"<span>{row['equal']} equal rows</span>"
    if "true" in row:
        is_right = row["true"] == row["predicted"]
        said = "as predicted" if is_right else f'predicted <mark class="wrong">{_value(row["predicted"])}</mark>'
        head += f'<span class="said">{_value(row["true"])}, {said}</span>'
    body = _pieces(row["pieces"]) if "pieces" in row else ""
    image = str(row.get("image", ""))
    if _DATA_URL.fullmatch(image):
        kind = " class=photo" if image.startswith("data:image/jpeg") else ""
        return f'<li class="item"><img{kind} src="{image}" alt="row {number}"><header>{head}</header></li>'
    return f'<li class="item"><header>{head}</header>{body}</li>'


# — what it was made with ————————————————————————————————————————————————————————————————————————


def _saved(run: Run) -> str:
    saved = run.result.get("saved")
    if not saved:
        return ""
    ours, full = saved["state_bytes"], saved["full_state_bytes"]
    lines = [(name, ours[name], full[name]) for name in ("weights", "gradients", "optimizer")]
    lines.append(("together", sum(ours.values()), sum(full.values())))
    lines.append(("without the weights", lines[3][1] - ours["weights"], lines[3][2] - full["weights"]))
    lines.append(("file", saved["adapter_bytes"], saved["base_bytes"]))
    rows = [
        (
            "parameters that learn",
            f"{saved['trainable']:,}",
            f"{saved['parameters']:,}",
            change(saved["trainable"], saved["parameters"]),
        )
    ]
    rows += [(name, size(one), size(other), change(one, other)) for name, one, other in lines]
    body = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td class=n>{value}</td>' for value in values)}</tr>" for name, *values in rows
    )
    head = '<tr><th></th><th class="n">this run</th><th class="n">full fine-tuning</th><th class="n">difference</th></tr>'
    note = (
        '<p class="soft">This run is counted from its tensors and files, of a process. Full fine-tuning is computed: fp32 '
        "with Adam, 16 bytes a parameter. What the passes themselves need (activations) is in neither.</p>"
    )
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{note}'


def _recipe(run: Run) -> str:
    origins = run.facts.get("origins") or {}
    given = [name for name in run.recipe if origins.get(name, _UNKNOWN) != "default"]

    def table(names: Iterable[str]) -> str:
        rows = "".join(
            f'<tr><td>{_text(name)}</td><td><span class="mono">{_value(_plain(run.recipe[name]))}</span></td>'
            f'<td class="soft">{_value(origins.get(name, ""))}</td></tr>'
            for name in names
        )
        return f'<div class="scroll"><table class="full pairs"><tbody>{rows}</tbody></table></div>'

    defaults = [name for name in run.recipe if name not in given]
    rest = f"<details><summary>{len(defaults)} as the default has it</summary>{table(defaults)}</details>" if defaults else ""
    return table(given) + rest


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, dict) and value.keys() == {"path", "weight"}:
        return str(value["path"]) + (f" (weight {value['weight']:g})" if value["weight"] != 1 else "")
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _origin(run: Run) -> str:
    facts = run.facts
    if "base" not in facts:
        return ""
    base, data = facts["base"], facts["data"]
    rows = [("base", _value(base["name"])), ("commit", _value(base["commit"] or "none: a directory"))]
    rows += [
        ("fingerprint", _value(base["fingerprint"])),
        *((_value(name), _value(digest)) for name, digest in base["files"].items()),
    ]
    rows.append(("rows", _value(data["sha256"])))
    weights = run.folder / "adapter" / "adapter_model.safetensors"
    if weights.is_file():
        with weights.open("rb") as stream:
            rows.append(("adapter_model.safetensors", hashlib.file_digest(stream, "sha256").hexdigest()))
    rows = [(name, f"<code>{value}</code>") for name, value in rows]
    rows.append(("versions", _value(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))))
    return '<p class="soft">sha256 of files, and of the rows as they were read.</p>' + _pairs(rows)


def _machine(run: Run) -> str:
    parts = []
    if machine := run.facts.get("machine"):
        count = machine["processes"]
        rows = [
            ("system", _value(machine["system"])),
            ("processor", f"{_value(machine['cpu'])}, {machine['cores']} cores, {machine['threads']} threads used"),
            ("memory", size(machine["memory_bytes"])),
            (
                "trained on",
                f"{_value(machine['device'])}, {'one process' if count == 1 else f'{count} processes'}, "
                f"{_value(run.facts['precision'])}",
            ),
        ]
        if "peak_bytes" in run.facts:
            rows.append(("peak memory", f"{size(run.facts['peak_bytes'])}, libraries included"))
        parts.append(_pairs(rows))
    figures = [
        _figure(title, [Series("", "train", points)], unit, zero=True, say=say) for title, points, unit, say in _sampled(run)
    ]
    if figures:
        parts.append(f'<div class="charts">{"".join(figures)}</div>')
    return "".join(parts)


def _sampled(run: Run) -> Iterable[tuple[str, list[Point], str, Any]]:
    """Of whatever numbers the samples of the machine have: those that change, by name."""
    flat: dict[str, list[Point]] = {}
    for line in run.machine:
        for name, value in _flattened(line):
            flat.setdefault(name, []).append((float(line["step"]), value))
    changing = [(name, points) for name, points in flat.items() if len(points) > 1 and len({y for _, y in points}) > 1]
    for name, points in changing[:MOST_MACHINE]:
        unit = next((unit for part, unit in _UNITS if part in name), "")
        yield name.replace("_", " "), points, unit, size if unit.startswith("bytes") else chart.short


def _flattened(line: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in line.items():
        if name in ("kind", "step", "at", "time"):
            continue
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name} ")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from _flattened(item, f"{prefix}{name.removesuffix('s')} {number} ")
        elif (found := _finite(value)) is not None:
            yield f"{prefix}{name}", found


def _repeat(run: Run) -> str:
    commit = run.facts.get("base", {}).get("commit")
    words = ["neartune train --config recipe.yaml", "output_dir=ANOTHER"] + ([f"revision={commit}"] if commit else [])
    return (
        f"<p>In the run’s directory, with the versions above:</p><pre>{_text(' '.join(words))}</pre>"
        "<p>The same rows, in the same order, with the same random numbers.</p>"
    )


# — text —————————————————————————————————————————————————————————————————————————————————————————


def shortened(pieces: Sequence[Sequence[str]]) -> list[tuple[str, str, str]]:
    """Pieces of a row within the limits above; what was left out stands there as a piece of kind "cut", with its count."""
    shown: list[tuple[str, str, str]] = []
    left = A_ROW
    for number, (text, kind, note) in enumerate(pieces):
        if left <= 0:
            rest = sum(len(piece[0]) for piece in pieces[number:])
            return [*shown, _left_out(rest)]
        limit = min(left, CONTEXT if not kind else LEARNT)
        left -= min(limit, len(text)) + len(note)
        if len(text) <= limit:
            shown.append((text, kind, note))
        elif kind:
            shown += [(text[:limit], kind, note), _left_out(len(text) - limit)]
        else:
            head = limit // 3
            tail = limit - head
            shown += [(text[:head], "", ""), _left_out(len(text) - limit), (text[-tail:], "", "")]
    return shown


def _left_out(count: int) -> tuple[str, str, str]:
    return f" … {count:,} characters … ", "cut", ""


def _pieces(pieces: Sequence[Sequence[str]]) -> str:
    """What was cut before a row's first line leaves no empty one. A word and its tag stay together."""
    parts = []
    for number, (text, kind, note) in enumerate(shortened(pieces)):
        text = text if number or kind else text.lstrip("\n")
        tag, after = (f'\u00a0<span class="tag">{_value(note)}</span>', text[len(text.rstrip()) :]) if note else ("", "")
        text = text.removesuffix(after)
        match kind:
            case "cut":
                parts.append(f'<span class="cut">{_text(text)}</span>')
            case "learnt" | "right" | "wrong":
                parts.append(f'<mark class="{kind}">{_text(text)}{tag}</mark>{after}')
            case _:
                parts.append(_text(text))
    return f'<div class="text" dir="auto">{"".join(parts)}</div>'


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values, both HTML already."""
    body = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="pairs"><tbody>{body}</tbody></table></div>'


def _text(text: object) -> str:
    """As HTML. Characters that are not seen, or that turn text around, by number; a run of them once, with how many."""
    plain = str(text).replace("\r\n", "\n")
    parts, end = [], 0
    for found in _ODD.finditer(plain):
        count = len(found[0])
        times = f" × {count}" if count > 1 else ""
        parts += [escape(plain[end : found.start()]), f"<i>U+{ord(found[1]):04X}{times}</i>"]
        end = found.end()
    return "".join(parts) + escape(plain[end:])


def _answer(text: object, limit: int) -> str:
    return _cut(text, limit) if text else '<span class="cut">nothing</span>'


def _cut(text: object, limit: int) -> str:
    plain = str(text)
    more = len(plain) - limit
    return _text(plain) if more <= 0 else f'{_text(plain[:limit])}<span class="cut"> … {more:,} characters more</span>'


def _value(text: object) -> str:
    """A name or a value, which may come from anyone and reads in its own direction."""
    return f"<bdi>{_cut(text, A_VALUE)}</bdi>" if text != "" else ""


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _count(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value:,}"


def _when(text: Any) -> str:
    return f"{datetime.fromisoformat(text):%-d %B %Y, %H:%M} UTC" if text else ""
