"""How good the model is on the rows that were held out: loss and the task's own measures, in batches of their own."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch

from neartune import batch
from neartune.loop import OutOfMemory, Trainer
from neartune.tasks import Example


def evaluate(trainer: Trainer, examples: Sequence[Example], labels: Sequence[str], micro: int) -> tuple[dict[str, Any], int]:
    """(metrics over `examples`, the micro-batch that fitted). Each process does its share. Raises OutOfMemory.

    Never more than one batch of logits is held; dropout is off.
    """
    trainer.model.eval()
    try:
        loss, weight, predictions, micro = _sums(trainer, batch.share(examples, trainer.rank, trainer.world), micro)
    finally:
        trainer.model.train()
    sums = trainer.reduce(torch.tensor([loss, float(weight)], dtype=torch.float64))
    predicted = trainer.gather(predictions)
    return trainer.task.measure(float(sums[0]) / max(1.0, float(sums[1])), predicted, labels), micro


@torch.no_grad()
def answers(trainer: Trainer, prompts: Sequence[str], longest: int = 64) -> list[str]:
    """What the model says to each prompt now, always choosing the likeliest token."""
    trainer.model.eval()
    try:
        return [answer(trainer.model, trainer.processor, prompt, longest) for prompt in prompts]
    finally:
        trainer.model.train()


def answer(model: Any, tokenizer: Any, prompt: str, longest: int) -> str:
    """By the base's chat template, where it has one."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
    said = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=longest,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@torch.no_grad()
def _sums(trainer: Trainer, mine: Sequence[Example], micro: int) -> tuple[float, int, list[Any], int]:
    loss, weight, predictions = 0.0, 0, list[Any]()
    position = 0
    while position < len(mine):
        part = mine[position : position + micro]
        try:
            summed, predicted = trainer.loss_of(part)
            loss += float(summed)
        except (RuntimeError, MemoryError) as exc:
            if not batch.is_out_of_memory(exc):
                raise
            if micro == 1:
                raise OutOfMemory("not even one row at a time fits in memory in evaluation: a smaller max_length") from None
            micro = max(1, micro // 2)
            gc.collect()
            continue
        weight += sum(trainer.task.weight(example) for example in part)
        predictions += predicted or []
        position += len(part)
    return loss, weight, predictions, micro
