"""A run against another, or against its base, on the same held-out rows.

Each side reads a row by its own tokenizer and template, so what is summed must be made the same before it is compared:

- Where every row is the same learnt tokens to both, the unit is the token, and the figures are those that a run calls loss.
- Where it is not (another base, another tokenizer), a mean over tokens would flatter the side that cuts text finer. The unit is
  then the byte (UTF-8) of the answers' text: both sides must explain the same text, and nats over its bytes do not depend on
  how it was cut. Each side's loss has the tokens by which it ends an answer in it, the bytes do not: both have to say the end.
- A class, or a word's tag, is one thing to both: the unit is that, and accuracy is compared beside the loss.

A row counts only where both sides read it whole and would learn the same of it. Others are counted, by why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite, isinf
from pathlib import Path
from typing import Any

import torch

from neartune import adapter, data, hub, tasks
from neartune import recipe as recipes
from neartune.adapter import Card
from neartune.data import DataError, Row
from neartune.decode import limit_of
from neartune.model import Precision, choose_precision
from neartune.prepare import locate_source, quieten_transformers
from neartune.recipe import RecipeError
from neartune.records import compare
from neartune.records.compare import Difference
from neartune.records.registry import finished_adapter
from neartune.records.runs import Run, RunsError
from neartune.tasks import IGNORED, Task, length

Say = Callable[[str], None]
_ENDLESS = 2**30
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Side:
    """`adapter` None: the base of `card` as it is."""

    name: str
    card: Card
    adapter: Path | None
    run: Run | None


@dataclass(frozen=True, slots=True)
class Score:
    """Of one row. `learnt`: its learnt tokens, () for classes; `text`: what they say; `count`: things the loss is summed over;
    `right`: how many of them were told rightly, None where that is no question."""

    loss: float
    count: int
    learnt: tuple[int, ...]
    text: str
    right: int | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """`verdict`: of the first side. `measures`: loss, and accuracy of classes and tags; `unit`: what a loss is per; `left_out`:
    why → rows; `seen`: side → rows that stand in its training data, None where that cannot be told."""

    sides: tuple[str, str]
    verdict: str
    unit: str
    measures: dict[str, Difference]
    left_out: dict[str, int]
    seen: dict[str, int | None]


def judge(run: Run, other: Run | None, rows_of: Path | None, base: Path | None, url: str, say: Say) -> Judgement:
    """`run` against `other`, None: its base. `rows_of`: a file or directory to judge by, None: the run's own held-out rows.
    `base`: where the base of `run` is now. Raises RunsError, DataError, ModelError, HubError."""
    first = _side(run)
    second = _side(other) if other else Side("base", first.card, None, None)
    if first.card.task != second.card.task:
        raise RunsError(f"{first.name} is for {first.card.task}, {second.name} for {second.card.task}: they do not compare")
    rows = _rows(run, rows_of, first.card.task, url, say)
    if other and first.name == second.name:
        first, second = (
            replace(side, name=data.tail(ours.path.absolute().parts, [theirs.path.absolute().parts]) or side.name)
            for side, ours, theirs in ((first, run, other), (second, other, run))
        )
    digests = [row.digest for row in rows]
    seen = {side.name: _seen(side.run, digests, url, say) for side in (first, second) if side.run}
    where = {first.card.fingerprint: adapter.locate_base(first.card, base, url, say)}
    if second.card.fingerprint not in where:
        where[second.card.fingerprint] = adapter.locate_base(second.card, None, url, say)
    hub.go_offline()
    quieten_transformers()
    is_cuda = torch.cuda.is_available()
    has_bf16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = choose_precision("auto", is_cuda=is_cuda, has_bf16=has_bf16)
    seed = int(run.identity["recipe"]["seed"])
    scores = [
        list(
            row_scores(
                side, rows, where[side.card.fingerprint], precision, torch.device("cuda" if is_cuda else "cpu"), seed, say
            )
        )
        for side in (first, second)
    ]
    for side, found in zip((first, second), scores, strict=True):
        _refuse_broken(side.name, rows, found)
    return weigh((first.name, second.name), scores[0], scores[1], seen)


def _refuse_broken(name: str, rows: Sequence[Row], scores: Sequence[Score | str]) -> None:
    """To judge without the rows on which a model breaks would flatter it. Raises RunsError, naming them."""
    pairs = zip(rows, scores, strict=True)
    broken = [row.where for row, score in pairs if isinstance(score, Score) and not isfinite(score.loss)]
    if broken:
        shown = ", ".join(broken[:_SHOWN]) + (" …" if len(broken) > _SHOWN else "")
        raise RunsError(
            f"the loss of {name} is no finite number on {len(broken)} of {len(rows)} rows ({shown}): nothing is judged by; "
            "train it anew with a lower learning_rate, or say with --data FILE what to judge by"
        )


def weigh(
    sides: tuple[str, str],
    first: Sequence[Score | str],
    second: Sequence[Score | str],
    seen: dict[str, int | None],
) -> Judgement:
    """Of rows in the same order; in place of a score, why there is none. Raises DataError when no row is left."""
    pairs: list[tuple[Score, Score]] = []
    left_out: Counter[str] = Counter()
    for one, two in zip(first, second, strict=True):
        if isinstance(one, str) or isinstance(two, str):
            left_out[one if isinstance(one, str) else str(two)] += 1
        elif _plain(one.text) != _plain(two.text) or (one.right is not None and one.count != two.count):
            left_out["the two do not learn the same of it"] += 1
        else:
            pairs.append((one, two))
    is_same = all(one.learnt == two.learnt for one, two in pairs)
    if not is_same:
        left_out["there is no text to learn in it"] += sum(not one.text.strip() for one, _ in pairs)
        pairs = [pair for pair in pairs if pair[0].text.strip()]
    if not pairs:
        raise DataError("no row is left to compare: " + "; ".join(f"{why}: {count}" for why, count in left_out.items()))
    unit = ("thing told apart" if pairs[0][0].right is not None else "learnt token") if is_same else "byte of text"
    weights = [float(one.count if is_same else len(one.text.strip().encode())) for one, _ in pairs]
    losses = [[pair[side].loss for pair in pairs] for side in (0, 1)]
    measures = {"loss": compare.paired(losses[0], losses[1], weights, is_lower_better=True)}
    if pairs[0][0].right is not None:
        right = [[float(pair[side].right or 0) for pair in pairs] for side in (0, 1)]
        measures["accuracy"] = compare.paired(right[0], right[1], weights, is_lower_better=False)
    verdict = compare.overall([measure.verdict for measure in measures.values()])
    return Judgement(sides, verdict, unit, measures, dict(+left_out), seen)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _side(run: Run) -> Side:
    path = finished_adapter(run.path)
    return Side(run.name, Card.read(path), path, run)


# — rows —————————————————————————————————————————————————————————————————————————————————————————


def splits_of(run: Run, url: str, say: Say) -> data.Splits:
    """Rows of a run as they were. Raises DataError when they are not here any more as they were."""
    try:
        recipe = recipes.load(run.path / "recipe.yaml").recipe
    except RecipeError as exc:
        raise DataError(f"the rows of {run.name} are not to be had: {exc}") from None
    commits: dict[str, str | None] = dict(run.identity["data"]["commits"])
    splits = data.load(recipe, lambda source: locate_source(source, commits, url, say))
    if splits.digest != run.identity["data"]["sha256"]:
        raise DataError(f"the rows of {run.name} were changed after it: what is held out now it may have learnt from")
    return splits


def _rows(run: Run, rows_of: Path | None, task: str, url: str, say: Say) -> list[Row]:
    if rows_of is not None:
        if not rows_of.exists():
            raise DataError(f"{rows_of}: there is no such file or directory")
        learnt, judged = data.read(rows_of, task=task)
        if not learnt and not judged:
            raise DataError(f"{rows_of}: there are no rows to judge by")
        return [*learnt, *judged]
    try:
        rows = list(splits_of(run, url, say).validation)
    except DataError as exc:
        raise DataError(f"{exc}. --data FILE says what to judge by") from None
    if not rows:
        raise DataError(f"{run.name} held no rows out: --data FILE says what to judge by")
    return rows


def _seen(run: Run, digests: Sequence[str], url: str, say: Say) -> int | None:
    """How many of the rows stand in what the run learnt from."""
    try:
        learnt = {row.digest for row in splits_of(run, url, say).train}
    except DataError as exc:
        say(f"whether {run.name} has seen these rows in training cannot be told: {exc}")
        return None
    return sum(digest in learnt for digest in digests)


# — scores ———————————————————————————————————————————————————————————————————————————————————————


@torch.no_grad()
def row_scores(
    side: Side, rows: Sequence[Row], base: Path, precision: Precision, device: torch.device, seed: int, say: Say
) -> Iterator[Score | str]:
    """Of each row by itself, so that no row's figures depend on its neighbours; or why there is none. A base that has no head
    for the classes gets a random one, by `seed`."""
    task = tasks.find(side.card.task)
    processor = task.load_processor(side.adapter or base)
    torch.manual_seed(seed)
    model: Any = adapter.load_base(side.card, base, processor, precision.base)
    if side.adapter is not None:
        model = adapter.load(model, side.adapter, base, say)
    else:
        side.card.check(base, side.name, say)
    model.to(device).eval()
    limit = limit_of(model.config, processor)
    found = task.prepare(rows, processor, side.card.labels, max_length=_ENDLESS, model_limit=_ENDLESS)
    examples = {id(row): example for row, example in zip(found.rows, found.examples, strict=True)}
    for row in rows:
        example = examples.get(id(row))
        if example is None:
            yield "there is nothing to learn in it, or no such class in training"
        elif length(example) > limit:
            yield "it is longer than a base takes"
        else:
            yield _score(task, model, processor, example, precision, device)


def _score(task: Task, model: Any, processor: Any, example: Any, precision: Precision, device: torch.device) -> Score:
    inputs = {name: tensor.to(device) for name, tensor in task.collate([example], processor).items()}
    with torch.autocast(device.type, precision.autocast, enabled=precision.autocast is not None):
        loss, count, pairs = task.forward(model, inputs)
    if pairs is not None:
        return Score(float(loss), int(count), (), "", sum(true == told for true, told in pairs))
    learnt = tuple(token for token in example["labels"][1:] if token != IGNORED)
    return Score(float(loss), int(count), learnt, processor.decode(learnt, skip_special_tokens=True), None)


# — as JSON and text ——————————————————————————————————————————————————————————————————————————————————————


def as_json(judged: Judgement) -> dict[str, Any]:
    """An interval without ends, of one row, is null."""
    measures = {
        name: {key: None if isinstance(value, float) and isinf(value) else value for key, value in asdict(measure).items()}
        for name, measure in judged.measures.items()
    }
    return asdict(judged) | {"measures": measures}


def told(judged: Judgement) -> list[str]:
    """The verdict with its numbers, and what stands against it."""
    first, second = judged.sides
    rows = judged.measures["loss"].rows
    lines = [f"{first} against {second}, {rows} rows judged by both"]
    for name, measure in judged.measures.items():
        what = f"{name} per {judged.unit}" if name == "loss" else name
        lines.append(
            f"  {what}: {measure.first:.4f} against {measure.second:.4f}, difference {measure.difference:+.4f}, "
            f"95 % interval {measure.low:+.4f} to {measure.high:+.4f}: {measure.verdict}"
        )
    lines += [f"  left out, {count} rows: {why}" for why, count in judged.left_out.items()]
    lines += [
        f"  warning: {count} of these rows stand in the training data of {name}: this flatters it"
        for name, count in judged.seen.items()
        if count
    ]
    if rows < compare.FEWEST:
        lines.append(f"  {rows} rows are too few for a verdict: at least {compare.FEWEST}")
    return [*lines, f"verdict: {judged.verdict}"]
