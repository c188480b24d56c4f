"""What a run leaves for its report and its card, beside metrics.jsonl, run.json and result.json: facts.json.

Rows are kept as pieces [text, kind, note]: kind "learnt" is what the model was to say, "right" and "wrong" are judged words
with a note, "" is context.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from neartune import __version__, batch
from neartune.data import Row, names_of
from neartune.evaluate import RowLoss, row_losses
from neartune.model import fingerprint, learning, weight_files
from neartune.prepare import Ready
from neartune.tasks import IGNORED, Example, images
from neartune.tasks.tagging import columns as tag_columns

HARDEST = 20
MOST_JUDGED = 500
"""Rows of a split that are judged one by one at the end."""
FULL_WEIGHTS, FULL_GRADIENTS, FULL_OPTIMIZER = 4, 4, 8
"""Bytes a parameter that full fine-tuning in fp32 with Adam holds: weight, gradient, two moments."""
_THUMBNAIL, _TINY = 160, 64
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")

Piece = tuple[str, str, str]


def of(ready: Ready, origins: Mapping[str, str]) -> dict[str, Any]:
    """What is known before the first step. `origins`: where each setting came from."""
    sources = (*ready.recipe.train_data, *(ready.recipe.validation_data or ()))
    lengths = Counter(len(example["input_ids"]) for example in ready.learnt.examples if "input_ids" in example)
    return {
        "task": ready.task.name,
        "auto": ready.task.auto,
        "labels": list(ready.labels),
        "base": {
            "repo": ready.base.repo,
            "commit": ready.base.commit,
            "name": ready.base.repo or ready.base.path.name,
            "fingerprint": fingerprint(ready.files),
            "files": ready.files,
        },
        "data": {
            "train": len(ready.learnt.examples),
            "validation": len(ready.judged.examples),
            "sha256": ready.splits.digest,
            "sources": [
                {"name": name, "commit": ready.commits.get(source.name)}
                for source, name in zip(sources, names_of(sources), strict=True)
            ],
            "report": list(ready.splits.report),
            "counts": {"train": ready.learnt.counts, "validation": ready.judged.counts},
            "first": _first(ready),
            "lengths": sorted(lengths.items()),
        },
        "origins": dict(origins),
        "precision": ready.precision.name,
        "machine": machine(ready),
        "versions": {"neartune": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def at_the_end(ready: Ready, steps: int) -> dict[str, Any]:
    """What the finished model adds: the rows that it finds hardest."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"ended": now, "peak_bytes": batch.peak(ready.trainer.device), "hardest": _hardest(ready, steps)}


# — rows —————————————————————————————————————————————————————————————————————————————————————————


def _hardest(ready: Ready, steps: int) -> dict[str, Any]:
    """Of rows spread evenly over both splits: at most a tenth of what the run has learnt from, so that it costs little. Of
    equal rows the first, with how many they are."""
    limit = min(MOST_JUDGED, max(HARDEST, steps * ready.recipe.train_batch_size // 10))
    found: list[tuple[str, int, RowLoss, Row]] = []
    judged = {}
    for split, prepared in (("train", ready.learnt), ("validation", ready.judged)):
        chosen = spread(len(prepared.examples), limit)
        losses = row_losses(ready.trainer, [prepared.examples[index] for index in chosen])
        found += [(split, index, loss, prepared.rows[index]) for index, loss in zip(chosen, losses, strict=True)]
        judged[split] = [len(chosen), len(prepared.examples)]
    found.sort(key=lambda item: item[2].rank)
    equal = Counter(row.digest for *_, row in found)
    first = {row.digest: (split, index, loss, row) for split, index, loss, row in reversed(found)}
    hardest = sorted(first.values(), key=lambda item: item[2].rank)[:HARDEST]
    return {"judged": judged, "rows": [_described(ready, *item) | {"equal": equal[item[3].digest]} for item in hardest]}


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `count`, at even distances."""
    return list(range(count)) if count <= limit else [index * count // limit for index in range(limit)]


def _described(ready: Ready, split: str, index: int, loss: RowLoss, row: Row) -> dict[str, Any]:
    example = (ready.learnt if split == "train" else ready.judged).examples[index]
    found: dict[str, Any] = {"split": split, "where": row.where, "loss": loss.mean, "weight": loss.weight}
    match ready.task.name:
        case "token-classification":
            found["pieces"] = tag_pieces(row, loss.predictions, ready.labels)
        case "text-generation":
            found["pieces"] = text_pieces(example, ready.processor)
        case "text-classification":
            found["pieces"] = [(_decoded(example, ready.processor), "", "")]
        case _:
            found["image"] = thumbnail(images.pixels(row, ready.processor), ready.processor)
    if "label" in example:
        true, predicted = loss.predictions[0]
        found |= {"true": ready.labels[true], "predicted": ready.labels[predicted]}
    return found


def _first(ready: Ready) -> list[Piece]:
    """The first row that is learnt."""
    example = ready.learnt.examples[0]
    match ready.task.name:
        case "text-generation":
            return text_pieces(example, ready.processor)
        case "text-classification":
            return [(_decoded(example, ready.processor) + " → ", "", ""), (ready.labels[example["label"]], "learnt", "")]
        case "token-classification":
            tags = [label for label in example["labels"] if label != IGNORED]
            return tag_pieces(ready.learnt.rows[0], [(tag, tag) for tag in tags], ready.labels)
        case _:
            return [(f"{ready.learnt.rows[0].where} → ", "", ""), (ready.labels[example["label"]], "learnt", "")]


def text_pieces(example: Example, tokenizer: Any) -> list[Piece]:
    """Runs of tokens that are learnt, or not."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        is_learnt = label != IGNORED
        if not runs or runs[-1][1] is not is_learnt:
            runs.append(([], is_learnt))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), "learnt" if is_learnt else "", "") for ids, is_learnt in runs]


def tag_pieces(row: Row, pairs: Sequence[tuple[int, int]], labels: Sequence[str]) -> list[Piece]:
    """Words with the tag that was to be found, and the one that was. `pairs`: of the judged words, in order."""
    column = tag_columns([row])
    left = iter(pairs)
    pieces: list[Piece] = []
    for word, tag in zip(row.values["tokens"], row.values[column], strict=True):
        pair = next(left, None) if str(tag) in labels else None
        if pair is None:
            pieces.append((f"{word} ", "", ""))
        elif pair[0] == pair[1]:
            pieces.append((f"{word} ", "right", labels[pair[0]]))
        else:
            pieces.append((f"{word} ", "wrong", f"{labels[pair[0]]}, predicted {labels[pair[1]]}"))
    return pieces


def _decoded(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example["input_ids"], skip_special_tokens=True))


def thumbnail(pixels: Any, processor: Any) -> str:
    """A data URL of what the model saw. `pixels`: (channels, height, width), normalised as the processor says."""
    from PIL import Image

    count = pixels.shape[0]
    mean, std = (
        getattr(processor, name, None) or [default] * count for name, default in (("image_mean", 0.5), ("image_std", 0.5))
    )
    scale = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
    values = ((pixels.float() * scale[0] + scale[1]).clamp(0, 1) * 255).round().byte()
    image = Image.fromarray(values[0].numpy() if count == 1 else values.permute(1, 2, 0).numpy())
    kind = "PNG" if max(image.size) <= _TINY else "JPEG"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# — machine ——————————————————————————————————————————————————————————————————————————————————————


def machine(ready: Ready) -> dict[str, Any]:
    """What sums of floats may depend on, beside the versions."""
    device = ready.trainer.device
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": ready.place.world,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


# — what LoRA saved ——————————————————————————————————————————————————————————————————————————————


def saved(ready: Ready, adapter: Path) -> dict[str, Any]:
    """Counted from this run's tensors and files, of one process, beside full fine-tuning's training state in fp32 with Adam,
    which is computed. The frozen parameters are the base's: its heads are kept beside their learnt copies."""
    model, optimizer = ready.trainer.model, ready.trainer.optimizer
    learnt = [parameter for _, parameter in learning(model)]
    parameters = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return {
        "trainable": sum(parameter.numel() for parameter in learnt),
        "parameters": parameters,
        "state_bytes": {
            "weights": _bytes(model.parameters()),
            "gradients": _bytes(parameter if parameter.grad is None else parameter.grad for parameter in learnt),
            "optimizer": _bytes(states),
        },
        "full_state_bytes": {
            "weights": FULL_WEIGHTS * parameters,
            "gradients": FULL_GRADIENTS * parameters,
            "optimizer": FULL_OPTIMIZER * parameters,
        },
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "base_bytes": sum((ready.base.path / name).stat().st_size for name in weight_files(ready.base.path)),
    }


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
