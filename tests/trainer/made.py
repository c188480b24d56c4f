"""Directories as a run leaves them, written without training: for what only reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def made_run(
    path: Path,
    *,
    losses: Sequence[float] = (3.0, 2.0, 1.5),
    is_finished: bool = True,
    weights: bytes = b"weights",
    **settings: Any,
) -> Path:
    """A run of text generation on a base of the Hub. `settings`: of its recipe."""
    recipe = {"base_model": "lab/llama", "train_data": "/data/facts.jsonl", "task": "text-generation", "max_steps": 3}
    recipe |= {"train_batch_size": 4, "seed": 42, "output_dir": str(path)} | settings
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
    base = {"repo": "lab/llama", "commit": "c" * 40, "fingerprint": "f" * 64}
    data = {"train": 20, "validation": 4, "sha256": "d" * 64, "commits": {}}
    versions = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "peft": "0.21.2"}
    identity = {"recipe": recipe, "base": base, "data": data, "processes": 1, "precision": "fp32", "versions": versions}
    (path / "run.json").write_text(json.dumps(identity))
    lines: list[dict[str, Any]] = [{"kind": "eval", "step": 0, "loss": 3.5}]
    for step, loss in enumerate(losses, 1):
        lines.append({"step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0, "micro_batch": 4})
        lines.append({"kind": "eval", "step": step, "loss": loss + 0.1})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if is_finished:
        result = {"metrics": {"loss": min(losses) + 0.1, "perplexity": 5.0}, "steps": len(losses), "micro_batch": 4}
        (path / "result.json").write_text(json.dumps(result))
        (path / "adapter").mkdir()
        (path / "adapter" / "adapter_model.safetensors").write_bytes(weights)
        (path / "adapter" / "adapter_config.json").write_text('{"r": 4}')
        (path / "adapter" / "base.json").write_text(
            json.dumps({"repo": "lab/llama", "commit": "c" * 40, "path": "/bases/llama"})
        )
    return path
