"""Names, bases and adapters in memory, and how answers are made: against peft and transformers by themselves."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neartune import adapter, decode, model, tasks
from neartune.adapter import Card, locate_base
from neartune.data import Row
from neartune.decode import Options, Piece, PromptError
from neartune.hub import Snapshot
from neartune.model import ModelError, choose_precision
from neartune.records import registry
from neartune.serving import catalog, classify, pool
from neartune.serving.catalog import Served, Unknown
from neartune.serving.pool import Base, Fitted, NoRoom, Pool
from neartune.tasks import IGNORED, generation
from tests.trainer import served
from tests.trainer.bases import FACTS, SMALL, make_llama, make_tokenizer, recipe_of
from tests.trainer.served import QUESTION, alone, generated, moved, trained

CPU = torch.device("cpu")
FP32 = choose_precision("auto", is_cuda=False, has_bf16=False)
NAMES = ("a", "ab", "a.b")


@pytest.fixture(scope="session")
def runs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.made_runs(llama, tmp_path_factory)


@pytest.fixture(scope="session")
def classes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.made_classes(llama, tmp_path_factory)


def silent(line: str) -> None:
    pass


def fitted(home: Path, llama: Path, *names: str) -> tuple[Base, dict[str, tuple[Fitted | None, Any]]]:
    """A base, and by name what is to be put on it and the processor."""
    found = catalog.find([home])
    base = pool.open_base(found.models[names[0]], llama, CPU, FP32, silent)
    reads = {name: pool.read_adapter(found.models[name], base.processors) for name in names}
    return base, {name: (pool.put(base, read), read.processor) for name, read in reads.items()} | {"": (None, base.processor)}


def answered(base: Base, processor: Any, **options: Any) -> Iterator[int]:
    ids = decode.chat_ids(processor, [{"role": "user", "content": QUESTION}])
    return decode.tokens(base.model, ids, Options(**{"longest": 24, "ends": decode.ends_of(base.model, processor), **options}))


def expected(runs: Path, llama: Path) -> dict[str, list[int]]:
    found = {name: generated(*alone(runs / name, llama), QUESTION, 24) for name in NAMES}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    return found | {"": generated(*base, QUESTION, 24)}


# — adapters on a base ———————————————————————————————————————————————————————————————————————————


def test_each_adapter_answers_as_peft_and_transformers_have_it_answer_alone(runs: Path, llama: Path) -> None:
    base, ready = fitted(runs, llama, *NAMES)
    wanted = expected(runs, llama)
    assert len({tuple(ids) for ids in wanted.values()}) == 4  # they have learnt different things
    for name in ("a", "ab", "", "a.b", "a", "", "ab"):
        adapter, processor = ready[name]
        pool.switch(base, adapter)
        assert list(answered(base, processor)) == wanted[name], name


@pytest.mark.parametrize("others", [(), ("a",)], ids=["the first of its base", "after another"])
def test_an_adapter_that_does_not_fit_leaves_nothing_behind(
    runs: Path, llama: Path, tmp_path: Path, others: tuple[str, ...]
) -> None:
    """One matrix is of another rank than its config says: neither the base nor the next adapter answers otherwise for it."""
    found = catalog.find([runs]).models
    base = pool.open_base(found["a"], llama, CPU, FP32, silent)
    for name in others:
        pool.put(base, pool.read_adapter(found[name], {}))
    wanted = expected(runs, llama)
    shutil.copytree(runs / "a.b", tmp_path / "broken")
    file = tmp_path / "broken" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file)
    broken = catalog.resolve("broken", catalog.find([tmp_path]))
    with pytest.raises(ModelError, match="does not fit its base"):
        pool.put(base, pool.read_adapter(broken, {}))
    pool.switch(base, None)
    assert list(answered(base, base.processor)) == wanted[""]
    for good in ("a.b", "ab"):
        read = pool.read_adapter(found[good], {})
        pool.switch(base, pool.put(base, read))
        assert list(answered(base, read.processor)) == wanted[good]


def drawn(base: Path, home: Path, name: str, **settings: Any) -> None:
    """A run whose adapter has random numbers in it."""
    task = tasks.find("text-generation")
    adapted = model.adapt(task.load_model(base, ()), recipe_of(base, home, home, **settings), (), silent)
    with torch.no_grad():
        for _, parameter in model.learning(adapted):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 10)
    card = Card.of(Snapshot(base), model.base_files(base), task.name, ())
    (home / name).mkdir()
    (home / name / "result.json").write_text("{}")
    adapter.save(adapted, card, base, task.load_processor(base), home / name / "adapter", None)


SLOTS: list[dict[str, dict[str, Any]]] = [
    {
        "plain": {},
        "large": {"lora_rank": 8, "rslora": True},
        "by-module": {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 6},
            "alpha_pattern": {"v_proj": 3, "up_proj": 9},
        },
    },
    {"dora": {"dora": True}, "large-dora": {"dora": True, "lora_rank": 8, "lora_alpha": 4}},
    {"narrow": {"lora_targets": ["q_proj", "v_proj"]}},
]
"""Adapters, those together that share peft's modules."""


@pytest.fixture(scope="module")
def kinds(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("kinds")
    for slot in SLOTS:
        for name, settings in slot.items():
            drawn(llama, home, name, **settings)
    return home


@pytest.mark.parametrize("is_narrow_first", [False, True])
def test_adapters_of_any_rank_and_scale_share_modules_and_answer_as_alone(
    kinds: Path, llama: Path, is_narrow_first: bool
) -> None:
    names = [name for slot in SLOTS for name in slot]
    if is_narrow_first:
        names.reverse()
    base, ready = fitted(kinds, llama, *names)
    ids = torch.arange(40, 72).view(2, 16)
    with torch.no_grad():
        wanted = {name: alone(kinds / name, llama)[0](input_ids=ids).logits for name in names}
        for name in (*names, *reversed(names), "plain", "dora"):
            pool.switch(base, ready[name][0])
            torch.testing.assert_close(base.model(input_ids=ids).logits, wanted[name], atol=1e-5, rtol=1e-5)
    for one, other in itertools.combinations(wanted.values(), 2):
        assert (one - other).abs().max() > 1e-3
    slots = [{found.slot.name for name in slot if (found := ready[name][0])} for slot in SLOTS]
    assert [len(names) for names in slots] == [1, 1, 1]
    known = ["slot0000", "slot0001", "wrapped"]
    assert sorted(base.adapted.peft_config) == known  # peft never hears an adapter's name
    assert ready["plain"][1] is ready["large"][1]  # the tokenizer is shared too


@pytest.mark.parametrize("name", ["plain", "dora", "narrow"])
def test_the_first_adapter_of_a_shape_waits_for_no_layers_norms_or_tokenizer(
    kinds: Path, llama: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of a second on SmolLM2, and with DoRA three: that is done when the base is loaded, or never."""
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.tuners_utils import BaseTuner

    models = catalog.find([kinds]).models
    base = pool.open_base(models[name], llama, CPU, FP32, silent)
    (processor,) = base.processors.values()
    read = pool.read_adapter(models[name], base.processors)
    assert read.processor is processor, "it is read once"
    for kind, method in ((BaseTuner, "inject_adapter"), (DoraLinearLayer, "get_weight_norm")):
        monkeypatch.delattr(kind, method)
    assert len(pool.put(base, read).tensors) == len(read.tensors)


@pytest.mark.parametrize("name", ["large", "narrow", "dora"])
def test_an_adapter_is_of_full_precision_on_a_base_of_half(kinds: Path, llama: Path, name: str) -> None:
    models = catalog.find([kinds]).models
    half = choose_precision("bf16", is_cuda=True, has_bf16=True)
    base = pool.open_base(models["plain"], llama, CPU, half, silent)
    pool.put(base, pool.read_adapter(models["plain"], {}))
    found = pool.put(base, pool.read_adapter(models[name], {}))
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16, torch.float32}
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    assert {parameter.dtype for parameter in found.slot.parameters.values()} == {torch.float32}


def test_the_first_adapter_of_another_rank_needs_no_modules_of_its_own(runs: Path, llama: Path) -> None:
    base, ready = fitted(runs, llama, "a")
    modules = [id(module) for module in base.model.modules()]
    found = pool.put(base, pool.read_adapter(catalog.find([runs]).models["a.b"], {}))
    assert ready["a"][0] is not None and found.slot is ready["a"][0].slot
    assert [id(module) for module in base.model.modules()] == modules


def test_adapters_that_name_the_same_layers_otherwise_do_not_write_over_one_another(
    runs: Path, llama: Path, tmp_path: Path
) -> None:
    for name in ("a", "ab"):
        shutil.copytree(runs / name, tmp_path / name)
    file = tmp_path / "ab" / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
    file.write_text(json.dumps(config))
    base, ready = fitted(tmp_path, llama, "a", "ab")
    wanted = expected(runs, llama)
    for name in ("a", "ab", "a"):
        pool.switch(base, ready[name][0])
        assert list(answered(base, ready[name][1])) == wanted[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, last: {last: tensors[last][:, :-1].contiguous()}, r"is \(\d+, 7\), not \(\d+, 8\)"),
        (lambda tensors, last: {last: None}, "is missing, not "),
        (lambda tensors, last: {"x.lora_A.weight": torch.zeros(1)}, r"x\.lora_A\.weight is \(1,\), not expected"),
    ],
    ids=["of another rank than it says", "one is missing", "one is too many"],
)
def test_tensors_that_do_not_fit_are_named(runs: Path, llama: Path, tmp_path: Path, change: Any, message: str) -> None:
    base, _ = fitted(runs, llama, "a")
    shutil.copytree(runs / "a.b", tmp_path / "broken")
    file = tmp_path / "broken" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors |= change(tensors, max(tensors))
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    broken = catalog.resolve("broken", catalog.find([tmp_path]))
    with pytest.raises(ModelError, match=f"does not fit its base: of 1 tensors, .*{message}"):
        pool.put(base, pool.read_adapter(broken, {}))


def test_answers_that_take_turns_token_by_token_are_what_each_is_alone(runs: Path, llama: Path) -> None:
    base, ready = fitted(runs, llama, *NAMES)
    wanted = expected(runs, llama)
    worker = pool.Worker(base, threading.Lock())
    told: dict[str, list[Any]] = {name: [] for name in wanted}
    order: list[str] = []

    def tell(name: str, item: Any) -> None:
        told[name].append(item)
        order.append(name)

    hold = threading.Event()
    worker.once(hold.wait, silent)
    for name in wanted:
        adapter, processor = ready[name]
        worker.submit(answered(base, processor), lambda item, name=name: tell(name, item), adapter)
    hold.set()
    worker.wait_idle()
    worker.stop()
    assert {name: items[:-1] for name, items in told.items()} == wanted
    assert all(items[-1] == pool.End() for items in told.values())
    assert order[:8] == [*wanted, *wanted]  # fair: one token each


def test_new_heads_go_with_their_adapter(classes: Path, llama: Path) -> None:
    base, ready = fitted(classes, llama, "spam", "pams")
    texts = ["win 5 coins now", "lunch at 5 today", ["win 2 coins now", "lunch"]]
    found = {}
    for name in ("spam", "pams", "spam"):
        adapter, processor = ready[name]
        pool.switch(base, adapter)
        found[name] = [told for told, _ in classify.classes(base.model, base.task, texts, processor, ("ham", "spam"))]
        model, tokenizer = alone(classes / name, llama)
        for text, told in zip(texts, found[name], strict=True):
            inputs = tokenizer(*([text] if isinstance(text, str) else text), return_tensors="pt")
            with torch.no_grad():
                shares = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.softmax(-1)[0]
            assert list(told["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-6)
    assert [told["label"] for told in found["spam"][:2]] == ["spam", "ham"]
    assert [told["label"] for told in found["pams"][:2]] == ["ham", "spam"]


def test_a_part_that_the_base_lacks_goes_with_its_adapter(tmp_path: Path) -> None:
    """A pooler: it is linear, and must not be wrapped, since the adapter brings it whole."""
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer(tmp_path / "bert", chat=False)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **SMALL)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    trained(tmp_path / "bert", tmp_path, "mails", served.MAILS, task="text-classification")
    base, ready = fitted(tmp_path, tmp_path / "bert", "mails")
    plain, tokenizer = alone(tmp_path / "mails", tmp_path / "bert")
    ids = torch.tensor([tokenizer("win 5 coins now")["input_ids"]])
    pool.switch(base, ready["mails"][0])
    with torch.no_grad():
        torch.testing.assert_close(base.model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_an_adapter_with_new_tokens_has_room_for_them_on_a_base_of_its_own(runs: Path, llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path, "new", [row | {"completion": "<yes>!"} for row in FACTS], new_tokens=["<yes>"])
    found = catalog.find([tmp_path, runs])
    assert pool.key_of(found.models["new"]) != pool.key_of(found.models["a"])
    base, ready = fitted(tmp_path, llama, "new")
    wanted = generated(*alone(tmp_path / "new", llama), QUESTION, 24)
    for name in ("new", "", "new"):
        pool.switch(base, ready[name][0])
        assert (list(answered(base, ready["new"][1])) == wanted) == bool(name)
    assert "<yes>" in ready["new"][1].decode(wanted)


def test_an_adapter_of_another_base_is_refused(runs: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match=r"a was trained on .* is another base: model.safetensors differs"):
        pool.open_base(catalog.find([runs]).models["a"], other, CPU, FP32, silent)


# — answers ——————————————————————————————————————————————————————————————————————————————————————


def test_a_seed_makes_a_sampled_answer_again_and_none_makes_another(runs: Path, llama: Path) -> None:
    base, _ = fitted(runs, llama, "a")
    pool.switch(base, None)
    sample = {"temperature": 1.5, "ends": frozenset[int]()}
    first, again = (list(answered(base, base.processor, seed=7, **sample)) for _ in range(2))
    assert first == again
    others = {tuple(answered(base, base.processor, seed=seed, **sample)) for seed in (8, None, None)}
    assert len(others | {tuple(first)}) == 4


def test_sampling_takes_the_shares_of_the_softmax_and_of_top_p_only_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(**options: Any) -> list[float]:
        counts = [0] * 4
        for _ in range(2000):
            counts[decode.choose(logits, Options(1, frozenset(), **options), generator)] += 1
        return [count / 2000 for count in counts]

    assert shares(temperature=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(temperature=0.5) == pytest.approx([0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365], abs=0.03)
    assert shares(temperature=1.0, top_p=0.79) == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.03)
    assert shares(temperature=1.0, top_p=0.0001) == [1, 0, 0, 0]
    assert shares() == [1, 0, 0, 0]


@pytest.mark.parametrize("has_template", [True, False])
def test_a_question_is_put_as_training_puts_it(tmp_path: Path, has_template: bool) -> None:
    tokenizer = make_tokenizer(tmp_path, chat=has_template, begin=not has_template)
    row = Row({"prompt": QUESTION, "completion": "5"}, "row")
    (example,) = generation.prepare([row], tokenizer, (), max_length=None, model_limit=128).examples
    asked = example["input_ids"][: next(n for n, label in enumerate(example["labels"]) if label != IGNORED)]
    assert decode.chat_ids(tokenizer, [{"role": "user", "content": QUESTION}]) == asked
    if not has_template:
        with pytest.raises(PromptError, match="the model has no chat template"):
            decode.chat_ids(tokenizer, [{"role": "system", "content": "x"}, {"role": "user", "content": QUESTION}])


@pytest.mark.parametrize(
    ("stops", "text", "count", "finish"),
    [
        ((), "Häuser €5 now", None, "length"),
        (("zzz",), "Häuser €5 now", None, "length"),
        (("€5",), "Häuser ", None, "stop"),
        (("now", "€"), "Häuser ", None, "stop"),
        (("H",), "", 1, "stop"),
        (("nowhere",), "Häuser €5 now", None, "length"),
    ],
)
def test_a_text_ends_before_its_stop_sequence(
    llama: Path, stops: tuple[str, ...], text: str, count: int | None, finish: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer("Häuser €5 now")["input_ids"]
    assert len(ids) > len("Häuser €5 now") / 2  # characters of several tokens are among them
    found = list(decode.pieces(iter(ids), tokenizer, Options(99, frozenset()), stops))
    assert "".join(piece.text for piece in found) == text
    assert [piece.finish for piece in found] == [None] * (len(found) - 1) + [finish]
    assert not any("�" in piece.text for piece in found)
    assert count is None or found[-1].count == count


def test_the_end_token_is_counted_and_not_said(llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = [*tokenizer("no")["input_ids"], tokenizer.eos_token_id]
    *_, last = decode.pieces(iter([*ids, *ids]), tokenizer, Options(99, frozenset({tokenizer.eos_token_id})))
    assert last == Piece("", len(ids), "stop")


def test_an_error_in_one_answer_is_told_and_others_go_on(runs: Path, llama: Path) -> None:
    base, ready = fitted(runs, llama, "a")
    worker = pool.Worker(base, threading.Lock())
    told: list[Any] = []
    broken = (int("x") for _ in range(1))
    worker.submit(broken, told.append, None)
    worker.submit(iter([1, 2]), told.append, ready["a"][0])
    worker.wait_idle()
    worker.stop()
    assert isinstance(told[0].error, ValueError)
    assert told[1:] == [1, 2, pool.End()]


# — memory ———————————————————————————————————————————————————————————————————————————————————————


@pytest.mark.parametrize(
    ("held", "over", "dropped"),
    [
        ([("x", 10, False, 1), ("y", 10, False, 2)], 0, []),
        ([("x", 10, False, 2), ("y", 10, False, 1)], 1, ["y"]),
        ([("x", 10, False, 2), ("y", 10, False, 1)], 11, ["y", "x"]),
        ([("x", 10, True, 1), ("y", 10, False, 2)], 5, ["y"]),
        ([("x", 10, True, 1), ("y", 10, False, 2)], 15, ["y", "x"]),
        ([("x", 10, True, 1)], 99, ["x"]),
    ],
)
def test_what_goes_first_is_what_nobody_uses_and_was_used_longest_ago(held: list[Any], over: int, dropped: list[str]) -> None:
    assert pool.victims(held, over) == dropped


@pytest.fixture(scope="module")
def many(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs x, y, z on three bases of one size."""
    home = tmp_path_factory.mktemp("many")
    for number, name in enumerate("xyz"):
        base = make_llama(tmp_path_factory.mktemp("bases") / name, seed=number + 1)
        moved(runs / "a", base, home / name)
    return home


def pool_of(home: Path, limit: int) -> tuple[Pool, dict[str, Served], list[str]]:
    """(pool, models by name, what it says)."""
    said: list[str] = []

    def locate(asked: Served) -> Path:
        return locate_base(asked.card, None, "http://127.0.0.1:9", said.append)

    return Pool(limit, CPU, locate, said.append), dict(catalog.find([home]).models), said


def one_base(home: Path) -> int:
    """Bytes of a base and its adapter."""
    path = catalog.find([home]).models["x"]
    assert path.adapter is not None
    return pool.weight_bytes(Path(path.card.path), torch.float32) + (path.adapter / "adapter_model.safetensors").stat().st_size


async def use(pool: Pool, served: Served) -> None:
    async with pool.seat(served):
        pass


async def test_the_least_recently_used_base_is_dropped_first(many: Path) -> None:
    pool, models, said = pool_of(many, int(2.5 * one_base(many)))
    for name in "xyxz":
        await use(pool, models[name])
    assert [held.name for held in pool.held.values()] == ["x", "z"]
    await use(pool, models["x"])
    assert [line.split(":")[0] for line in said] == ["x is loaded", "y is loaded", "y is dropped", "z is loaded"]
    await pool.close()
    assert not pool.held


async def test_many_who_ask_at_once_load_a_base_and_an_adapter_once(many: Path) -> None:
    pool, models, said = pool_of(many, 10**9)
    async with AsyncExitStack() as stack:
        seats = await asyncio.gather(*(stack.enter_async_context(pool.seat(models["x"])) for _ in range(8)))
    assert len(said) == 1
    assert len({id(seat.fitted) for seat in seats}) == 1 and seats[0].fitted is not None
    await pool.close()


async def test_a_base_in_use_is_waited_for_and_gets_no_new_answers(many: Path) -> None:
    pool, models, said = pool_of(many, int(1.5 * one_base(many)))
    leaves = asyncio.Event()

    def say(line: str) -> None:
        said.append(line)
        if "makes room" in line:
            leaves.set()

    pool._say = say
    order: list[str] = []

    async def ask(name: str) -> None:
        async with pool.seat(models[name]):
            order.append(name)

    async with pool.seat(models["x"]):
        waiting = asyncio.create_task(ask("y"))
        await leaves.wait()
        late = asyncio.create_task(ask("x"))
        await asyncio.to_thread(lambda: None)
        assert order == []
    await asyncio.gather(waiting, late)
    assert order == ["y", "x"]
    assert "the base of x makes room for y, once 1 answers are done" in said
    await pool.close()


async def test_more_answers_at_once_than_a_base_takes_are_refused_for_now(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neartune.serving.pool.AT_ONCE", 2)
    pool, models, _ = pool_of(many, 10**9)
    async with pool.seat(models["x"]), pool.seat(models["x"]):
        with pytest.raises(NoRoom, match="2 answers are in progress on the base of x") as raised:
            await use(pool, models["x"])
        assert not raised.value.is_for_good
    await use(pool, models["x"])
    await pool.close()


async def test_a_base_that_does_not_fit_alone_is_refused_with_the_numbers(many: Path) -> None:
    pool, models, _ = pool_of(many, 50_000)
    with pytest.raises(NoRoom, match=r"the base x needs \d+ kB with [\d.]+ kB of x, and --memory is 50 kB") as raised:
        await use(pool, models["x"])
    assert raised.value.is_for_good and not pool.held


async def test_adapters_that_nobody_uses_make_room_for_another_on_their_base(runs: Path, llama: Path) -> None:
    size = (runs / "a" / "adapter" / "adapter_model.safetensors").stat().st_size
    pool, models, _ = pool_of(runs, pool_weight(llama) + int(1.5 * size))
    async with pool.seat(models["a"]):
        with pytest.raises(NoRoom, match=r"ab needs .* are in use: try again") as raised:
            await use(pool, models["ab"])
        assert not raised.value.is_for_good
    await use(pool, models["ab"])
    (held,) = pool.held.values()
    assert [which[0] for which in held.adapters] == [models["ab"].adapter]
    await pool.close()


def pool_weight(base: Path) -> int:
    return pool.weight_bytes(base, torch.float32)


def test_the_bytes_of_a_base_are_foretold_from_its_files(runs: Path, llama: Path) -> None:
    base, _ = fitted(runs, llama, "a")
    fresh = pool.open_base(catalog.find([runs]).models["a"], llama, CPU, FP32, silent)
    parameters = sum(parameter.numel() * 4 for name, parameter in fresh.model.named_parameters() if ".lora_" not in name)
    assert pool.weight_bytes(llama, torch.float32) == parameters
    assert pool.weight_bytes(llama, torch.bfloat16) == parameters // 2
    assert parameters <= fresh.bytes == base.bytes


async def test_an_adapter_that_was_trained_again_is_loaded_again(runs: Path, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    pool, models, _ = pool_of(tmp_path, 10**9)
    async with pool.seat(models["a"]) as before:
        pass
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(runs / "ab", tmp_path / "a")
    async with pool.seat(models["a"]) as after:
        assert after.fitted is not before.fitted
    await pool.close()


# — names ————————————————————————————————————————————————————————————————————————————————————————


def test_runs_adapters_versions_and_bases_have_names(runs: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(runs / "a", tmp_path / "deep" / name)
    shutil.copytree(runs / "a" / "adapter", tmp_path / "plain")
    shutil.copytree(runs / "a", tmp_path / ".hidden")
    unfinished = shutil.copytree(runs / "a", tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    registry.promote(tmp_path / "deep" / "one", "door", tmp_path)
    registry.promote(tmp_path / "deep" / "two", "door", tmp_path)
    found = catalog.find([tmp_path])
    adapters = {"door", "door@1", "door@2", "deep/one", "deep/two", "plain"}
    assert set(found.listed()) == {*adapters, "base:door"}  # the base once
    assert {f"base:{name}" for name in adapters} <= found.models.keys()
    assert found.models["door"].name == "door@2"
    assert found.models["door@1"].adapter == tmp_path / "deep" / "one" / "adapter"
    assert found.models["base:plain"].adapter is None
    registry.rollback("door", tmp_path)
    assert catalog.find([tmp_path]).models["door"].name == "door@1"


def test_a_base_of_the_hub_has_its_own_name(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    card = json.loads((tmp_path / "a" / "adapter" / "base.json").read_text())
    (tmp_path / "a" / "adapter" / "base.json").write_text(json.dumps(card | {"repo": "lab/llama", "commit": "c" * 40}))
    found = catalog.find([tmp_path])
    assert set(found.listed()) == {"a", "lab/llama"}
    same = [found.models[name] for name in ("lab/llama", f"lab/llama@{'c' * 12}", "base:a")]
    assert len({(served.name, served.adapter) for served in same}) == 1


def test_an_unknown_name_is_told_with_the_nearest(runs: Path) -> None:
    found = catalog.find([runs])
    with pytest.raises(Unknown, match=r"there is no model 'base:abb': did you mean base:ab or "):
        catalog.resolve("base:abb", found)
    with pytest.raises(Unknown, match=r"there is no model 'zzzz': there are a, a\.b, ab, base:a"):
        catalog.resolve("zzzz", found)
    with pytest.raises(Unknown, match="nothing is served"):
        catalog.resolve("a", catalog.Catalog({}))


def test_what_cannot_be_served_is_a_trouble_and_keeps_nothing_else_away(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    shutil.copytree(runs / "a", tmp_path / "bad")
    (tmp_path / "bad" / "adapter" / "base.json").write_text("{}")
    found = catalog.find([tmp_path, tmp_path / "gone", runs])
    assert {"a", "ab", "a.b"} < set(found.models) and "bad" not in found.models
    assert [trouble.split(": ", 1)[1][:30] for trouble in found.troubles] == [
        "it was not written by this ver",
        "there is no such directory",
        f"a is {tmp_path / 'a' / 'adapter'}"[:30],
    ]


def test_a_version_that_changed_after_it_was_promoted_is_not_given_out(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    registry.promote(tmp_path / "a", "door", tmp_path)
    version = catalog.find([tmp_path]).models["door"]
    pool.read_adapter(version, {})
    shutil.copy(runs / "ab" / "adapter" / "adapter_model.safetensors", tmp_path / "a" / "adapter")
    with pytest.raises(ModelError, match=r"door@1: the adapter .* was changed after it was promoted"):
        pool.read_adapter(version, {})
