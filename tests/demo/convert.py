"""`python -m tests.demo.convert FILE.gguf DIRECTORY`: a GGUF file as an ordinary Hub repo. Needs torch, transformers, gguf.

What comes out are the dequantised values of that file, as bfloat16. They are not the weights that the file was made from.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

CARD = """\
---
license: apache-2.0
library_name: transformers
---
# SmolLM2-135M-Instruct, dequantised

Made for a demo from `{name}`: its quantised values, written out as bfloat16. These are **not** the original weights.
"""


def convert(gguf: Path, target: Path) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained(): its values go into a new one that knows of no quantisation.
    config = loaded.config
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    (target / "README.md").write_text(CARD.format(name=gguf.name), encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
