"""transformers: from_pretrained of a configuration, a tokenizer and generation settings, and the weights, twice each.

Without torch, which is too large for the tests: `make demo` loads whole models.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.clients.lan import PREFIX, Lan, lan
from tests.clients.programs import made, sha256_of
from tests.hub import LFS, Hub

WORDS = ("[UNK]", "[PAD]", "the", "hub", "is", "near", "by")
SENTENCE = "the hub is near by the sea"
CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
SCRIPT = f"""
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file
def load():
    config = AutoConfig.from_pretrained("org/tiny")
    tokenizer = AutoTokenizer.from_pretrained("org/tiny")
    weights = load_file(cached_file("org/tiny", "model.safetensors"))
    return {{
        "config": [config.model_type, config.hidden_size, type(config).__name__],
        "ids": tokenizer({SENTENCE!r})["input_ids"],
        "chat": tokenizer.chat_template,
        "generation": GenerationConfig.from_pretrained("org/tiny").max_new_tokens,
        "weights": {{name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in weights.items()}},
    }}
out["first"], out["second"] = load(), load()
from huggingface_hub import snapshot_download
out["files"] = sorted(hashes(snapshot_download("org/tiny")))
"""


def tiny(folder: Path) -> dict[str, bytes | LFS]:
    """The files of a BERT of two layers with random weights and seven words, as transformers saves them."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(made(folder) / "tokenizer.json"))
    said = {
        "config.json": {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 16, "num_hidden_layers": 2},
        "generation_config.json": {"max_new_tokens": 7},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "[UNK]",
            "pad_token": "[PAD]",
        },
    }
    files: dict[str, bytes | LFS] = {path: json.dumps(data).encode() for path, data in said.items()}
    files["chat_template.jinja"] = CHAT.encode()
    return files | {"tokenizer.json": (folder / "tokenizer.json").read_bytes(), "model.safetensors": LFS(save(weights()))}


def weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(7)
    return {f"encoder.layer.{n}.output.dense.weight": draw.random((64, 4096), np.float32) for n in range(2)}


async def load(net: Lan, files: set[str]) -> None:
    out = await net.python(SCRIPT)
    assert (
        out["first"]
        == out["second"]
        == {
            "config": ["bert", 16, "BertConfig"],
            "ids": [WORDS.index(word) if word in WORDS else 0 for word in SENTENCE.split()],
            "chat": CHAT,
            "generation": 7,
            "weights": {name: sha256_of(array.tobytes()) for name, array in weights().items()},
        }
    )
    assert set(out["files"]) == files


@pytest.mark.parametrize("base", ["", PREFIX], ids=["root", "prefix"])
async def test_in_every_state_of_the_hub(hub: Hub, tmp_path: Path, base: str) -> None:
    """Loaded cold, warm, with a dead and with a refusing Hub. Files that it looks for in vain cost nothing."""
    files = tiny(tmp_path / "tiny")
    hub.repo("org/tiny").commit(files)
    async with lan(tmp_path, base, hub=hub) as net:
        await load(net, set(files))
        assert len(net.metadata_calls()) <= 2, net.metadata_calls()
        assert net.off_the_mirror() == []
        hub.log.clear()
        await load(net, set(files))
        assert [one.raw_path for one in hub.log] == []
        await net.hub_dies()
        await load(net, set(files))
        await net.hub_refuses()
        await load(net, set(files))
        assert net.refusals() > 0
        assert net.heard == []
