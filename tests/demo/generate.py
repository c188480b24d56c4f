"""`python -m tests.demo.generate REPO QUESTION`: a user's own program. HF_ENDPOINT says where the model is."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main(repo: str, question: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(repo)
    model = AutoModelForCausalLM.from_pretrained(repo)
    chat = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answered = model.generate(**asked, max_new_tokens=60, do_sample=False)
    print(tokenizer.decode(answered[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
