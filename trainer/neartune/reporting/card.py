"""A model card: what an adapter, or a model merged with one, is and where it came from. Pure; nothing heavy is imported.

adapter/provenance.json holds the facts, adapter/README.md what card() makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neartune.recipe import FIELDS
from neartune.units import size

_HIDDEN = frozenset({"base_model", "train_data", "validation_data", "output_dir", "mirror", "revision", "task", "prompts"})
"""Settings that are told of elsewhere, or that are of one machine."""
_MEASURES = {"loss": "loss", "perplexity": "perplexity", "accuracy": "accuracy", "f1": "macro F1"}


@dataclass(frozen=True, slots=True)
class Facts:
    """`auto`: the class of transformers that loads the base. `data`: {name, commit} a source. `vocabulary`: of the tokenizer,
    where tokens were added, else 0."""

    name: str
    base: str
    repo: str | None
    commit: str | None
    fingerprint: str
    files: Mapping[str, str]
    task: str
    auto: str
    labels: tuple[str, ...]
    metrics: Mapping[str, Any]
    base_metrics: Mapping[str, Any]
    steps: int
    best_step: int
    stopped_because: str
    data: tuple[Mapping[str, Any], ...]
    rows: int
    validation_rows: int
    data_sha256: str
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    saved: Mapping[str, Any]
    vocabulary: int = 0
    is_merged: bool = False


def facts_of(
    name: str, known: Mapping[str, Any], result: Mapping[str, Any], recipe: Mapping[str, Any], vocabulary: int
) -> Facts:
    """Of a run: `known` is facts.json, `result` is result.json, `recipe` its settings as plain values."""
    base, data = known["base"], known["data"]
    return Facts(
        name=name,
        base=base["name"],
        repo=base["repo"],
        commit=base["commit"],
        fingerprint=base["fingerprint"],
        files=base["files"],
        task=known["task"],
        auto=known["auto"],
        labels=tuple(known["labels"]),
        metrics=result["metrics"],
        base_metrics=result["base_metrics"],
        steps=result["steps"],
        best_step=result["best_step"],
        stopped_because=result["stopped_because"],
        data=tuple(data["sources"]),
        rows=data["train"],
        validation_rows=data["validation"],
        data_sha256=data["sha256"],
        recipe={key: value for key, value in recipe.items() if key not in _HIDDEN},
        versions=known["versions"],
        saved=result["saved"],
        vocabulary=vocabulary,
    )


def read(adapter: Path) -> Facts:
    """Of the adapter in that directory. Raises OSError, ValueError, TypeError, KeyError."""
    known = json.loads((adapter / "provenance.json").read_text(encoding="utf-8"))
    return Facts(**known | {"labels": tuple(known["labels"]), "data": tuple(known["data"])})


def write(facts: Facts, folder: Path) -> None:
    """README.md and provenance.json in `folder`."""
    (folder / "provenance.json").write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(facts), encoding="utf-8")


def card(facts: Facts) -> str:
    """README.md, with the front matter that the Hub reads."""
    return f"---\n{_front(facts)}---\n\n" + "\n\n".join(part for part in _parts(facts) if part) + "\n"


def _front(facts: Facts) -> str:
    """JSON values are YAML."""
    tags = [facts.task, "neartune", "lora"]
    front: dict[str, Any] = {}
    if facts.repo:
        relation = "finetune" if facts.is_merged else "adapter"
        front |= {"base_model": facts.repo, "base_model_relation": relation}
        tags.append(f"base_model:{relation}:{facts.repo}")
    front |= {"library_name": "transformers" if facts.is_merged else "peft", "pipeline_tag": facts.task, "tags": tags}
    front["metrics"] = [name for name in _numbers(facts.metrics) if name != "loss"]
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items())


def _parts(facts: Facts) -> list[str]:
    base = _code(facts.base)
    sentence = f"{base}, merged with a LoRA adapter" if facts.is_merged else f"A LoRA adapter for {base}"
    sentence += f", for {facts.task}, trained with neartune on {facts.rows:,} rows."
    if facts.labels:
        shown = ", ".join(_code(label) for label in facts.labels[:30])
        more = len(facts.labels) - 30
        sentence += f" {len(facts.labels)} classes: {shown}{f' and {more} more' if more > 0 else ''}."
    return [
        f"# {_cell(facts.name)}",
        sentence,
        _results(facts),
        "## How to load it\n\n" + (_merged_code(facts) if facts.is_merged else _adapter_code(facts)),
        _data(facts),
        _origin(facts),
        "" if facts.is_merged else "## What LoRA saved\n\n" + saved_sentence(facts.saved),
        "## Recipe\n\nSettings that are not the defaults.\n\n" + _table(("setting", "value"), _settings(facts)),
        "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    ]


def _results(facts: Facts) -> str:
    numbers = _numbers(facts.metrics)
    end = f"{_cell(facts.stopped_because)}; the weights are those of step {facts.best_step} of {facts.steps}."
    if not numbers:
        return f"## Results\n\nNo rows were held out, so nothing was measured. {end[0].upper()}{end[1:]}"
    before = _numbers(facts.base_metrics)
    rows = [
        (_MEASURES.get(name, name), f"{before[name]:.4f}" if name in before else "", f"{value:.4f}")
        for name, value in numbers.items()
    ]
    on = f"On {facts.validation_rows:,} validation rows. {end[0].upper()}{end[1:]}"
    return f"## Results\n\n{on}\n\n" + _table(("measure", "base", "adapted"), rows)


def _data(facts: Facts) -> str:
    rows = [(_code(source["name"]), _code(source["commit"]) if source["commit"] else "a local file") for source in facts.data]
    counts = f"{facts.rows:,} rows to learn from, {facts.validation_rows:,} held out; sha256 of the rows `{facts.data_sha256}`."
    return "## Data\n\n" + _table(("source", "commit"), rows) + f"\n\n{counts}"


def _origin(facts: Facts) -> str:
    rows = [(_code(name), _code(digest)) for name, digest in facts.files.items()]
    at = f" at commit `{facts.commit}`" if facts.commit else ", a directory"
    text = f"{_code(facts.base)}{at}; fingerprint `{facts.fingerprint}`."
    return f"## Base\n\n{text}\n\n" + _table(("file", "sha256"), rows)


def _settings(facts: Facts) -> list[tuple[str, str]]:
    found = []
    for name, value in facts.recipe.items():
        default = FIELDS[name].default
        plain = list(value) if isinstance(value, tuple) else value
        if plain != (list(default) if isinstance(default, tuple) else default):
            found.append((name, _code(json.dumps(plain, ensure_ascii=False))))
    return found


# — code that loads it ———————————————————————————————————————————————————————————————————————————


def _base_of(facts: Facts) -> str:
    return json.dumps(facts.repo or f"path/to/{facts.base}")


def _adapter_code(facts: Facts) -> str:
    base = _base_of(facts)
    options = "".join(
        [
            f", revision={json.dumps(facts.commit)}" if facts.commit else "",
            f", num_labels={len(facts.labels)}" if facts.labels else "",
            ", ignore_mismatched_sizes=True" if facts.task == "image-classification" else "",
        ]
    )
    resize = [f"model.resize_token_embeddings({facts.vocabulary}, mean_resizing=False)"] if facts.vocabulary else []
    plain = [
        "from peft import PeftModel",
        f"from transformers import {facts.auto}, {_processor(facts)}",
        "",
        f'processor = {_processor(facts)}.from_pretrained("path/to/adapter")',
        f"model = {facts.auto}.from_pretrained({base}{options})",
        *resize,
        'model = PeftModel.from_pretrained(model, "path/to/adapter").eval()',
    ]
    checked = [
        "from pathlib import Path",
        "",
        "from neartune import adapter",
        f"from transformers import {_processor(facts)}",
        "",
        'folder = Path("path/to/adapter")',
        "belongs = adapter.Card.read(folder)",
        f'base = adapter.locate_base(belongs, {"None" if facts.repo else f"Path({base})"}, "http://127.0.0.1:8090", print)',
        f"model = adapter.load_base(belongs, base, {_processor(facts)}.from_pretrained(folder))",
        "model = adapter.load(model, folder, base, print).eval()",
    ]
    refuses = "With neartune, which refuses another base than it was trained on:"
    return f"With peft:\n\n{_block(plain)}\n\n{refuses}\n\n{_block(checked)}"


def _merged_code(facts: Facts) -> str:
    return _block(
        [
            f"from transformers import {facts.auto}, {_processor(facts)}",
            "",
            f'processor = {_processor(facts)}.from_pretrained("path/to/this")',
            f'model = {facts.auto}.from_pretrained("path/to/this").eval()',
        ]
    )


def _processor(facts: Facts) -> str:
    return "AutoImageProcessor" if facts.task == "image-classification" else "AutoTokenizer"


def _block(lines: Sequence[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


# — what LoRA saved ——————————————————————————————————————————————————————————————————————————————


def saved_sentence(saved: Mapping[str, Any]) -> str:
    """One sentence; of full fine-tuning's training state it says that it is computed."""
    state, full = saved["state_bytes"], saved["full_state_bytes"]
    ours, theirs = sum(state.values()), sum(full.values())
    light, heavy = ours - state["weights"], theirs - full["weights"]
    share = saved["trainable"] / saved["parameters"]
    return (
        f"LoRA learnt {saved['trainable']:,} parameters, {share:.2%} of the base's {saved['parameters']:,}: weights, gradients "
        f"and optimizer took {size(ours)}, full fine-tuning's in fp32 with Adam take {size(theirs)} (computed, 16 bytes a "
        f"parameter), {change(ours, theirs)}; without the weights {size(light)} and {size(heavy)}, {change(light, heavy)}; "
        f"the adapter is {size(saved['adapter_bytes'])}, the base {size(saved['base_bytes'])}"
    )


def change(now: float, before: float) -> str:
    """Of `now` against `before`, with its sign."""
    return f"{now / before - 1:+.1%}".replace("-", "−")


# — Markdown —————————————————————————————————————————————————————————————————————————————————————


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _cell(text: str) -> str:
    """Plain text, in which nothing is Markdown or HTML."""
    flat = " ".join(text.split())
    return "".join(
        f"\\{char}" if char in "\\`*_[]|#" else {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(char, char) for char in flat
    )


def _code(text: str) -> str:
    """As code: backticks and bars could end it."""
    flat = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{flat[:200]}`" if flat else ""
