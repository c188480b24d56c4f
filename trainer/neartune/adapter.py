"""The finished adapter: plain peft files, and beside them what base they belong to, which is checked when they are loaded.

adapter/adapter_model.safetensors, adapter_config.json   peft's own; base_model_name_or_path is the Hub's id
        base.json                                        repo, commit, sha256 of the base's files, their fingerprint
        tokenizer.json, chat_template.jinja …            as in training
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from neartune.hub import Snapshot
from neartune.model import ModelError, base_files, fingerprint, sha256

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.txt", "chat_template.jinja", "tokenizer_config.json")


def save_initial(model: Any, target: Path) -> None:
    """The factors that PiSSA or OLoRA begin with: they are in the base no more, so the finished adapter needs them."""
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        save_file({name: parameter.detach().contiguous() for name, parameter in _factors(model)}, temporary)
        temporary.rename(target)


def _factors(model: Any) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            yield name.replace(".default.", "."), parameter


def _make_plain(folder: Path, initial: Path) -> None:
    """What was learnt less what it began with, B·A - B0·A0, as one product of twice the rank."""
    import torch

    file = folder / "adapter_model.safetensors"
    tensors, before = load_file(file), load_file(initial)
    for name, tensor in before.items():
        is_a = ".lora_A." in name
        tensors[name] = torch.cat([tensors[name].cpu(), tensor if is_a else -tensor], dim=0 if is_a else 1).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["r"] *= 2
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2  # so that the scale stays
    config["init_lora_weights"] = True
    write_json(folder / "adapter_config.json", config)


def save(model: Any, base: Snapshot, files: Mapping[str, str], processor: Any, target: Path, initial: Path | None) -> None:
    """Written beside and renamed. No request goes out (peft would ask for the base). `initial`: see save_initial(); the adapter
    is made plain LoRA of twice the rank, for the base as it is."""
    temporary = target.with_name(".adapter.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = str(base.path)
    model.save_pretrained(temporary, save_embedding_layers=False)
    if initial is not None:
        _make_plain(temporary, initial)
    processor.save_pretrained(temporary)
    config_file = temporary / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = base.repo or str(base.path)
    config["revision"] = base.commit
    write_json(config_file, config)
    known = {"repo": base.repo, "commit": base.commit, "fingerprint": fingerprint(files), "files": dict(files)}
    write_json(temporary / "base.json", known | {"tokenizer": _tokenizer_files(base.path)})
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def load(model: Any, path: Path, base: Path, say: Callable[[str], None]) -> Any:
    """The adapter at `path` on `model`, which was loaded from the directory `base`. Another base than it was trained on is
    refused: ModelError names the difference."""
    from peft import PeftModel

    try:
        known = json.loads((path / "base.json").read_text())
    except OSError as exc:
        raise ModelError(f"{path}: it does not say what base it belongs to: {exc.strerror}") from None
    files = base_files(base)
    if fingerprint(files) != known["fingerprint"]:
        differ = sorted(name for name in {*files, *known["files"]} if files.get(name) != known["files"].get(name))
        raise ModelError(
            f"{path} was trained on {known['repo'] or 'a directory'} at {str(known['commit'])[:12]}; {base} is another base: "
            f"{', '.join(differ)} {'differs' if len(differ) == 1 else 'differ'}"
        )
    changed = [name for name, digest in _tokenizer_files(base).items() if known["tokenizer"].get(name, digest) != digest]
    if changed:
        say(f"warning: {', '.join(changed)} of the base changed since the adapter was trained; the adapter's own is used")
    return PeftModel.from_pretrained(model, str(path))


def _tokenizer_files(base: Path) -> dict[str, str]:
    return {name: sha256(base / name) for name in _TOKENIZER if (base / name).is_file()}


def write_json(file: Path, value: Any) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.rename(file)
