"""The finished adapter: plain peft files, and beside them what base they belong to, which is checked when they are loaded.

adapter/adapter_model.safetensors, adapter_config.json   peft's own; base_model_name_or_path is the Hub's id
        base.json                                        Card: repo, commit, sha256 of the base's files; task and labels
        tokenizer.json, chat_template.jinja …            as in training
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from neartune.hub import Snapshot, fetch, fetched
from neartune.model import ModelError, base_files, fingerprint, sha256
from neartune.tasks import find as find_task

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


@dataclass(frozen=True, slots=True)
class Card:
    """base.json: what an adapter belongs to, and what it does. `files` and `tokenizer`: name → sha256."""

    repo: str | None
    commit: str | None
    fingerprint: str
    files: Mapping[str, str]
    tokenizer: Mapping[str, str]
    task: str
    labels: tuple[str, ...]
    path: str
    """Where the base was in training."""

    @staticmethod
    def of(base: Snapshot, files: Mapping[str, str], task: str, labels: Sequence[str]) -> Card:
        return Card(
            base.repo, base.commit, fingerprint(files), files, _tokenizer_files(base.path), task, tuple(labels), str(base.path)
        )

    @staticmethod
    def read(path: Path) -> Card:
        """Of the adapter at `path`. Raises ModelError."""
        try:
            known = json.loads((path / "base.json").read_text())
            return Card(**known | {"labels": tuple(known["labels"])})
        except OSError as exc:
            raise ModelError(f"{path}: it does not say what base it belongs to: {exc.strerror}") from None
        except (ValueError, TypeError, KeyError) as exc:
            raise ModelError(f"{path}/base.json: it was not written by this version of neartune: {exc}") from None

    def check(self, base: Path, name: object, say: Callable[[str], None]) -> None:
        """Whether the directory `base` is the base of the adapter called `name`; a changed tokenizer only warns. Raises
        ModelError, naming the difference."""
        files = base_files(base)
        if fingerprint(files) != self.fingerprint:
            differ = sorted(file for file in {*files, *self.files} if files.get(file) != self.files.get(file))
            raise ModelError(
                f"{name} was trained on {self.repo or 'a directory'} at {str(self.commit)[:12]}; {base} is another base: "
                f"{', '.join(differ)} {'differs' if len(differ) == 1 else 'differ'}"
            )
        changed = [file for file, digest in _tokenizer_files(base).items() if self.tokenizer.get(file, digest) != digest]
        if changed:
            say(f"warning: {', '.join(changed)} of the base changed since the adapter was trained; the adapter's own is used")


def save(model: Any, card: Card, base: Path, processor: Any, target: Path, initial: Path | None) -> None:
    """Written beside and renamed. No request goes out (peft would ask for the base). `initial`: see save_initial(); the adapter
    is made plain LoRA of twice the rank, for the base as it is."""
    temporary = target.with_name(".adapter.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(temporary, save_embedding_layers=False)
    if initial is not None:
        _make_plain(temporary, initial)
    processor.save_pretrained(temporary)
    config_file = temporary / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = card.repo or str(base)
    config["revision"] = card.commit
    write_json(config_file, config)
    write_json(temporary / "base.json", asdict(card))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def locate_base(card: Card, asked: Path | None, url: str, say: Callable[[str], None]) -> Path:
    """The directory `asked`, or the adapter's own base: on this machine, else fetched from the Hub endpoint at `url`. Raises
    HubError, ModelError."""
    if asked is not None:
        return asked
    if card.repo is None or card.commit is None:
        if Path(card.path).is_dir():
            return Path(card.path)
        raise ModelError(f"the base was the directory {card.path}, which is not here: say where it is now")
    found = fetched(card.repo, card.commit) or fetch(card.repo, card.commit, url, say)
    return found.path


def load_base(card: Card, base: Path, processor: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The base that adapters of `card` go on, frozen and in eval mode, with room for the tokens of `processor`."""
    model = find_task(card.task).load_model(base, card.labels, dtype=dtype, trust_remote_code=False)
    if card.task == "text-generation" and len(processor) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(processor), mean_resizing=False)
    return model.requires_grad_(False).eval()


def load(model: Any, path: Path, base: Path, say: Callable[[str], None], name: str = "default") -> Any:
    """The adapter at `path` on `model`, which was loaded from the directory `base`, or on a model that has adapters already.
    Another base than it was trained on is refused: ModelError names the difference."""
    from peft import PeftModel

    Card.read(path).check(base, path, say)
    if isinstance(model, PeftModel):
        model.load_adapter(str(path), adapter_name=name)
        return model
    return PeftModel.from_pretrained(model, str(path), adapter_name=name)


def _tokenizer_files(base: Path) -> dict[str, str]:
    return {name: sha256(base / name) for name in _TOKENIZER if (base / name).is_file()}


def write_json(file: Path, value: Any) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.rename(file)
