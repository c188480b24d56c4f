"""Bases in memory, and adapters on them, within a limit: loaded on first use, the least recently used dropped first.

Adapters that have the same shape (targets, heads, DoRA or not; not ranks and scales) share one set of peft's modules: a slot.
An adapter is then only its tensors and scales, and putting it on is setting what the slot's parameters point at; so loading is
reading a file, and names of adapters never reach peft, which takes one for another where it begins with the other's name. peft
has wrapped every layer that can get an adapter when a base has been loaded, so the first of a shape waits for that no more. A
base has one thread, which does everything that is computed on it, a step of one answer at a time: each step with its own
adapter on.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import json
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from neartune import adapter, tasks
from neartune.batch import is_out_of_memory
from neartune.model import ModelError, Precision, all_linear, choose_precision, weight_files
from neartune.records import registry
from neartune.serving.catalog import Served
from neartune.serving.life import Event, Life, Phase, step
from neartune.tasks import Task
from neartune.units import size

AT_ONCE = 64
"""Answers on one base: each has a cache of its own, which the limit does not know."""
_NOT_SHAPE = ("base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "init_lora_weights", "peft_version")
_RANKS: Mapping[str, Any] = {"r": 1, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
"""What an adapter brings itself, and what a slot has in its place."""
_FACTORS = {"lora_A": 0, "lora_B": 1}
"""Where a factor's rank stands in its size."""
_MAGNITUDE = "lora_magnitude_vector"
"""What a layer has besides, with DoRA."""
_WRAPPED = "wrapped"
"""The slot that peft makes when it wraps the layers: for plain LoRA on all of them."""
_UNKNOWN = "?"
"""What is on, after peft has put a slot in."""
_PROCESSOR = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json", "vocab.txt")

Say = Callable[[str], None]


class NoRoom(Exception):
    """It does not fit within the limit. `is_for_good`: not even alone."""

    def __init__(self, text: str, *, is_for_good: bool) -> None:
        super().__init__(text)
        self.is_for_good = is_for_good


# — a base, and what is on it ————————————————————————————————————————————————————————————————————


@dataclass(frozen=True, slots=True)
class Key:
    """What adapters must have in common to share a base. `room`: of the tokenizer, where it has new tokens."""

    fingerprint: str
    task: str
    classes: int
    room: str = ""


@dataclass(slots=True)
class Slot:
    """Modules of peft for adapters of one shape, made with rank 1. `parameters`: by their names in an adapter's file, `sizes`:
    theirs as they were made; `layers`: by their names in the base; `filled`: by whom."""

    name: str
    parameters: Mapping[str, torch.nn.Parameter]
    sizes: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, Any]
    filled: Fitted | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """An adapter in memory, ready to be put on. `scales`: by the names of the slot's layers."""

    slot: Slot
    tensors: Mapping[str, torch.Tensor]
    scales: Mapping[str, float]


@dataclass(slots=True)
class Base:
    """A base in memory. `home`: where its own tokenizer or image processor is; `processors`: those that were read, by digest;
    `bytes`: of its own weights; `adapted`: peft's view of it; `slots`: by shape; `on`: the active slot's name, "" for the base
    by itself."""

    path: Path
    task: Task
    model: Any
    home: Path
    processors: dict[str, Any]
    precision: Precision
    bytes: int
    adapted: Any
    slots: dict[str, Slot] = field(default_factory=dict)
    on: str = _UNKNOWN
    numbers: Iterator[int] = field(default_factory=itertools.count)
    """Of slots; none is used twice."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def processor(self) -> Any:
        """Read when it is first asked for: adapters bring their own."""
        return _processor(self.task, self.home, self.processors)


@dataclass(frozen=True, slots=True)
class Read:
    """An adapter's files."""

    path: Path
    config: Mapping[str, Any]
    shape: str
    tensors: Mapping[str, torch.Tensor]
    processor: Any


def key_of(served: Served) -> Key:
    card = served.card
    room = ""
    if served.adapter is not None and _config(served.adapter).get("trainable_token_indices"):
        room = _processor_digest(served.adapter)
    return Key(card.fingerprint, card.task, len(card.labels), room)


def open_base(served: Served, path: Path, device: torch.device, precision: Precision, say: Say) -> Base:
    """The base in the directory `path`, which must be the one that `served` was trained on. Raises ModelError."""
    served.card.check(path, served.name, say)
    task = tasks.find(served.card.task)
    home = served.adapter if served.adapter and key_of(served).room else path
    processors: dict[str, Any] = {}
    processor = _processor(task, served.adapter or path, processors)
    model = adapter.load_base(served.card, path, processor, precision.base).to(device)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True
    tensors = itertools.chain(model.parameters(), model.buffers())
    count = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    whole = _config(served.adapter).get("modules_to_save") if served.adapter else None
    adapted = _wrap(model, [*task.heads, *(whole or ())])
    base = Base(path, task, model, home, processors, precision, count, adapted)
    gc.collect()  # now, not while somebody waits for an adapter
    return base


def _wrap(model: Any, heads: Sequence[str]) -> Any:
    """peft's view of a base, all of whose layers it has wrapped that can get an adapter. To let it look for them takes it a
    third of a second on a base of 30 layers."""
    from peft import LoraConfig, get_peft_model

    is_transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = LoraConfig(
        r=1, target_modules=sorted(all_linear(model, heads)), init_lora_weights=False, fan_in_fan_out=is_transposed
    )
    adapted = get_peft_model(model, config, adapter_name=_WRAPPED)
    model.requires_grad_(False).eval()
    return adapted


def read_adapter(served: Served, processors: dict[str, Any]) -> Read:
    """The files of an adapter. `processors`: of its base; adapters of one base have mostly the same. Raises ModelError."""
    path = served.adapter
    assert path is not None
    if served.digest and registry.digest(path) != served.digest:
        raise ModelError(f"{served.name}: the adapter in {path} was changed after it was promoted: it is not given out")
    try:
        tensors = load_file(path / "adapter_model.safetensors")
    except Exception as exc:  # noqa: BLE001 - safetensors has errors of its own
        raise ModelError(f"{path}: the adapter cannot be read: {exc}") from None
    config = _config(path)
    processor = _processor(tasks.find(served.card.task), path, processors)
    return Read(path, config, shape(config, tensors), tensors, processor)


def shape(config: Mapping[str, Any], names: Iterable[str]) -> str:
    """Alike for adapters that can take each other's place in peft's modules. `names`: of their tensors."""
    kept = {name: value for name, value in config.items() if name not in (*_NOT_SHAPE, *_RANKS)}
    for name, value in kept.items():
        if isinstance(value, list):
            kept[name] = sorted(value, key=str)
    return hashlib.sha256(json.dumps([kept, sorted(names)], sort_keys=True).encode()).hexdigest()


def put(base: Base, read: Read) -> Fitted:
    """Make an adapter ready. To be called where nothing is computed on `base` meanwhile. Raises ModelError."""
    if read.shape not in base.slots:
        base.slots[read.shape] = _slot(base, read)
    slot = base.slots[read.shape]
    ranks = {name: rank_of(read.config, name) for name in slot.layers}
    wanted = {name: _size_with(name, made, ranks) for name, made in slot.sizes.items()}
    found = {name: tuple(tensor.shape) for name, tensor in read.tensors.items()}
    if found != wanted:
        differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        text = f"{differ[0]} is {found.get(differ[0], 'missing')}, not {wanted.get(differ[0], 'expected')}"
        raise ModelError(f"{read.path}: the adapter does not fit its base: of {len(differ)} tensors, {text}")
    tensors = {name: read.tensors[name].to(parameter.device, parameter.dtype) for name, parameter in slot.parameters.items()}
    return Fitted(slot, tensors, {name: scale_of(read.config, name, rank) for name, rank in ranks.items()})


def rank_of(config: Mapping[str, Any], layer: str) -> int:
    """As peft reads an adapter_config.json."""
    return int(_of_layer(config, "rank_pattern", layer, config["r"]))


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """What the product of a layer's factors is multiplied by."""
    alpha = float(_of_layer(config, "alpha_pattern", layer, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(config: Mapping[str, Any], patterns: str, layer: str, otherwise: Any) -> Any:
    from peft.utils.other import get_pattern_key

    known = config.get(patterns) or {}
    return known.get(get_pattern_key([*known], layer), otherwise)


def _size_with(name: str, made: tuple[int, ...], ranks: Mapping[str, int]) -> tuple[int, ...]:
    """The size of the tensor `name` in a file, where a slot of rank 1 has `made`."""
    layer, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
    at = _FACTORS.get(f"lora_{rest.removesuffix('.weight')}")
    return made if at is None else (*made[:at], ranks[layer], *made[at + 1 :])


def _slot(base: Base, read: Read) -> Slot:
    """Of rank 1, since its numbers go anyway: an adapter brings its own."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(read.path))
    config.base_model_name_or_path = None  # checked already, by its bytes
    config.init_lora_weights, config.lora_dropout = False, 0.0
    for key, value in _RANKS.items():
        setattr(config, key, value)
    try:
        layers = _wrapped(base, config, read.tensors)
        is_all = len(layers) == sum(_WRAPPED in layer.scaling for _, layer in _lora_layers(base))
        is_spare = all(slot.name != _WRAPPED for slot in base.slots.values())
        fits = is_all and is_spare and not config.use_dora
        name = _WRAPPED if fits else f"slot{next(base.numbers):04d}"  # of one length: none begins with another
        if layers:
            return _made(base, name, config, layers)
        base.adapted.add_adapter(name, config)
    except (ValueError, RuntimeError, KeyError) as exc:
        if is_out_of_memory(exc):
            raise
        raise ModelError(f"{read.path}: the adapter does not fit its base: {exc}") from None
    finally:
        base.on = _UNKNOWN
    return _found(base, name)


def _found(base: Base, name: str) -> Slot:
    """What peft has made."""
    from peft import get_peft_model_state_dict

    base.model.requires_grad_(False).eval()
    known = {key: value for key, value in base.adapted.named_parameters(remove_duplicate=False) if name in key}
    parameters = get_peft_model_state_dict(base.adapted, known, name, save_embedding_layers=False)
    layers = {key: layer for key, layer in _lora_layers(base) if name in layer.scaling}
    return Slot(name, parameters, {key: tuple(value.shape) for key, value in parameters.items()}, layers)


def _lora_layers(base: Base) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((key, module) for key, module in base.model.named_modules() if isinstance(module, LoraLayer))


def _wrapped(base: Base, config: Any, names: Iterable[str]) -> dict[str, Any]:
    """The layers of an adapter that is nothing but what is in such layers; else {}. `names`: of its tensors."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import check_target_module_exists

    linear = ((key, layer) for key, layer in _lora_layers(base) if isinstance(layer, Linear))
    layers = {key: layer for key, layer in linear if check_target_module_exists(config, key)}
    parts = [f"{factor}.weight" for factor in _FACTORS] + [_MAGNITUDE] * config.use_dora
    return layers if {*names} == {_tensor(key, part) for key in layers for part in parts} else {}


def _made(base: Base, name: str, config: Any, layers: Mapping[str, Any]) -> Slot:
    """As peft makes it; but for DoRA it would compute the norms of all weights, to begin with: seconds."""
    from peft.tuners.lora.dora import DoraLinearLayer

    magnitude_of: Any = DoraLinearLayer
    base.adapted.peft_config[name] = config
    plain = replace(config, use_dora=False)
    parameters = {}
    for key, layer in layers.items():
        if name != _WRAPPED:
            layer.update_layer(name, 1, lora_alpha=1, config=plain)
        for factor in _FACTORS:
            parameter = getattr(layer, factor)[name].weight.requires_grad_(False)
            parameter.data = parameter.data.float()  # as peft does
            parameters[_tensor(key, f"{factor}.weight")] = parameter
        if config.use_dora:
            made = layer.lora_magnitude_vector[name] = magnitude_of(layer.fan_in_fan_out)
            numbers = torch.empty(layer.out_features, device=parameter.device)
            made.weight = parameters[_tensor(key, _MAGNITUDE)] = torch.nn.Parameter(numbers, requires_grad=False)
            layer.lora_variant[name] = layer.resolve_lora_variant(config=config)
    return Slot(name, parameters, {key: tuple(value.shape) for key, value in parameters.items()}, layers)


def _tensor(layer: str, part: str) -> str:
    """Its name in an adapter's file."""
    return f"base_model.model.{layer}.{part}"


def switch(base: Base, fitted: Fitted | None) -> None:
    """What is computed next is computed with this adapter, or with none."""
    name = fitted.slot.name if fitted else ""
    if base.on != name:
        if fitted is None:
            base.adapted.base_model.disable_adapter_layers()
        else:
            if base.on in ("", _UNKNOWN):
                base.adapted.base_model.enable_adapter_layers()
            base.adapted.set_adapter(name, inference_mode=True)
        base.on = name
    if fitted is not None and fitted.slot.filled is not fitted:
        for key, parameter in fitted.slot.parameters.items():
            parameter.data = fitted.tensors[key]
        for key, layer in fitted.slot.layers.items():
            layer.scaling[name] = fitted.scales[key]
        fitted.slot.filled = fitted


def computing(base: Base) -> AbstractContextManager[Any]:
    autocast = base.precision.autocast
    return torch.autocast(base.device.type, autocast) if autocast is not None else nullcontext()


def _config(path: Path) -> dict[str, Any]:
    """Raises ModelError."""
    try:
        config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path}: adapter_config.json cannot be read: {exc}") from None
    return config


def _processor(task: Task, path: Path, known: dict[str, Any]) -> Any:
    """Of the directory `path`. `known`: by digest, those that were read already."""
    digest = _processor_digest(path)
    if digest not in known:
        known[digest] = task.load_processor(path)
    return known[digest]


def _processor_digest(path: Path) -> str:
    found = hashlib.sha256()
    for file in (path / name for name in _PROCESSOR):
        found.update(f"{file.name}\n".encode() + (file.read_bytes() if file.is_file() else b""))
    return found.hexdigest()


def weight_bytes(path: Path, dtype: torch.dtype) -> int:
    """Of the base in the directory `path`, once it is loaded in `dtype`; of PyTorch's own files, at most. Raises ModelError."""
    return sum(_numbers(path / name) for name in weight_files(path)) * dtype.itemsize


def _numbers(file: Path) -> int:
    if file.suffix != ".safetensors":
        return file.stat().st_size // 2
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


# — its thread ———————————————————————————————————————————————————————————————————————————————————


class Stopped(Exception):
    """The base was dropped before the job was done."""


@dataclass(frozen=True, slots=True)
class End:
    """After the last step."""

    error: Exception | None = None


@dataclass(slots=True, eq=False)
class Job:
    """`steps` are taken in turns with those of other jobs, each with its adapter on; each result, then an End, is told."""

    steps: Iterator[Any]
    before: Callable[[], None]
    tell: Callable[[Any], None]
    is_cancelled: bool = False


class Worker:
    """The thread of one base. Each job that is not cancelled is told exactly one End, whenever it was submitted."""

    def __init__(self, base: Base, alone: AbstractContextManager[Any]) -> None:
        """`alone`: held during each step."""
        self.base, self._alone = base, alone
        self.steps = 0
        self._jobs = deque[Job]()
        self._is_stopping = False
        self._changed = threading.Condition()
        self._open = 0
        self._thread = threading.Thread(target=self._work, name=f"neartune {base.path.name}", daemon=True)
        self._thread.start()

    def submit(self, steps: Iterator[Any], tell: Callable[[Any], None], fitted: Fitted | None) -> Job:
        return self._submit(Job(steps, partial(switch, self.base, fitted), tell))

    def once(self, work: Callable[[], Any], tell: Callable[[Any], None]) -> Job:
        """Between two steps of answers."""
        return self._submit(Job((work() for _ in range(1)), lambda: None, tell))

    def _submit(self, job: Job) -> Job:
        with self._changed:
            if not self._is_stopping:
                self._jobs.append(job)
                self._open += 1
                self._changed.notify_all()
                return job
        job.tell(End(Stopped()))
        return job

    def cancel(self, job: Job) -> None:
        """No step of it is begun any more."""
        with self._changed:
            job.is_cancelled = True

    def wait(self, is_so: Callable[[], bool]) -> None:
        """Asked again after each step."""
        with self._changed:
            self._changed.wait_for(is_so)

    def wait_idle(self) -> None:
        """Until no job is left."""
        self.wait(lambda: not self._open)

    def stop(self) -> None:
        """Jobs that are left get no further step, and an End."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while self._turn():
            pass
        with self._changed:
            left, self._jobs = self._jobs, deque()
            self._open = 0
            self._changed.notify_all()
        for job in left:
            if not job.is_cancelled:
                job.tell(End(Stopped()))

    def _turn(self) -> bool:
        """A step of the job whose turn it is. Whether there may be another turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_stopping)
            if self._is_stopping:
                return False
            job = self._jobs.popleft()
        has_more = self._step(job)
        with self._changed:
            if has_more:
                self._jobs.append(job)
            else:
                self._open -= 1
            del job  # with its cache, before the next is waited for
            self._changed.notify_all()
        return True

    def _step(self, job: Job) -> bool:
        """Whether there may be more."""
        if job.is_cancelled:
            return False
        try:
            with self._alone, computing(self.base):
                job.before()
                result = next(job.steps)
            self.steps += 1
        except StopIteration:
            job.tell(End())
            return False
        except Exception as exc:  # noqa: BLE001 - it is told to who asked
            job.tell(End(exc))
            return False
        job.tell(result)
        return True


async def results(worker: Worker, begin: Callable[[Callable[[Any], None]], Job]) -> AsyncGenerator[Any]:
    """Of a job that `begin(tell)` submits. Leaving it cancels the job."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def tell(item: Any) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, item)

    job = begin(tell)
    try:
        while not isinstance(item := await queue.get(), End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        worker.cancel(job)


# — all of them ——————————————————————————————————————————————————————————————————————————————————


@dataclass(slots=True, eq=False)
class HeldAdapter:
    """`bytes` count from when it is asked for."""

    bytes: int
    ready: asyncio.Task[tuple[Fitted, Any]]
    users: int = 0
    used: int = 0


@dataclass(slots=True, eq=False)
class Held:
    """A base that is here, or on its way. `life` changes in Pool._move() alone; `used`: the later, the greater."""

    name: str
    ready: asyncio.Task[Worker]
    life: Life = field(default_factory=Life)
    bytes: int = 0
    used: int = 0
    adapters: dict[tuple[Any, ...], HeldAdapter] = field(default_factory=dict)

    @property
    def all_bytes(self) -> int:
        return self.bytes + sum(held.bytes for held in self.adapters.values())


@dataclass(frozen=True, slots=True)
class Seat:
    """What an answer needs. `processor`: the adapter's own."""

    served: Served
    worker: Worker
    fitted: Fitted | None
    processor: Any

    @property
    def base(self) -> Base:
        return self.worker.base

    def run(self, steps: Iterator[Any]) -> AsyncGenerator[Any]:
        return results(self.worker, lambda tell: self.worker.submit(steps, tell, self.fitted))


def victims(held: Sequence[tuple[Any, int, bool, int]], over: int) -> list[Any]:
    """Of (what, bytes, whether it is in use, when it was used), those to drop for `over` bytes: what is not in use first, the
    least recently used first."""
    chosen = []
    for what, count, _, _ in sorted(held, key=lambda one: one[2:]):
        if over <= 0:
            break
        chosen.append(what)
        over -= count
    return chosen


class Pool:
    """All bases and adapters in memory, of weights at most `limit` bytes. To be used in one event loop."""

    def __init__(self, limit: int, device: torch.device, locate: Callable[[Served], Path], say: Say) -> None:
        """`locate`: the directory of the base, fetched if need be; called in a thread. Raises ModelError, HubError."""
        self.limit, self.device, self._locate, self._say = limit, device, locate, say
        is_cuda = device.type == "cuda"
        has_bf16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self._precision = choose_precision("auto", is_cuda=is_cuda, has_bf16=has_bf16)
        # transformers sets the process's default dtype while it loads.
        is_plain = self._precision.base == torch.get_default_dtype()
        self._alone: AbstractContextManager[Any] = nullcontext() if is_plain else threading.Lock()
        self.held: dict[Key, Held] = {}
        self._loading = asyncio.Lock()
        self._moved = asyncio.Event()
        self._clock = itertools.count(1)

    @asynccontextmanager
    async def seat(self, served: Served) -> AsyncIterator[Seat]:
        """Neither base nor adapter is dropped inside. Raises NoRoom, ModelError, HubError."""
        held = await self._base(served)
        try:
            worker = await asyncio.shield(held.ready)
            if served.adapter is None:
                yield Seat(served, worker, None, await asyncio.to_thread(lambda: worker.base.processor))
                return
            fit = self._adapter(held, worker, served)
            fit.users += 1
            try:
                fitted, processor = await asyncio.shield(fit.ready)
                yield Seat(served, worker, fitted, processor)
            finally:
                fit.users -= 1
                fit.used = next(self._clock)
        finally:
            held.used = next(self._clock)
            self._move(held, Event.WENT)

    def _move(self, held: Held, event: Event) -> None:
        """Whoever waits looks again."""
        held.life = step(held.life, event)
        self._moved.set()
        self._moved = asyncio.Event()

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Of lives: `is_so` is asked again after each move, so none is missed."""
        while not is_so():
            await self._moved.wait()

    async def _base(self, served: Served) -> Held:
        """Counted as used, though not there yet."""
        key = await asyncio.to_thread(key_of, served)
        await self._until(lambda: key not in self.held or self.held[key].life.is_open)
        held = self.held.get(key)
        if held is None:
            held = Held(served.name, asyncio.create_task(self._load(key, served)))
            held.ready.add_done_callback(_seen)
            self.held[key] = held
        if held.life.users >= AT_ONCE:
            raise NoRoom(f"{AT_ONCE} answers are in progress on the base of {served.name}: try again", is_for_good=False)
        self._move(held, Event.COME)
        return held

    async def _load(self, key: Key, served: Served) -> Worker:
        try:
            async with self._loading:  # one at a time, so that each sees what is free
                path = await asyncio.to_thread(self._locate, served)
                needed = await asyncio.to_thread(weight_bytes, path, self._precision.base)
                await self._make_room(key, served, path, needed)
                self.held[key].bytes = needed
                base = await asyncio.to_thread(self._open, served, path)
                self.held[key].bytes = base.bytes
                self._say(f"{path.name} is loaded: {size(base.bytes)}; in memory {size(self._total())} of {size(self.limit)}")
                worker = Worker(base, self._alone)
                self._move(self.held[key], Event.LOADED)
                return worker
        except BaseException:
            self._move(self.held.pop(key), Event.FAILED)
            raise

    def _open(self, served: Served, path: Path) -> Base:
        with self._alone:
            return open_base(served, path, self.device, self._precision, self._say)

    async def _make_room(self, key: Key, served: Served, path: Path, needed: int) -> None:
        """Bases that have to go get no new answers; those in progress are waited for."""
        own = _adapter_bytes(served)
        if needed + own > self.limit:
            with_it = f" with {size(own)} of {served.name}" if own else ""
            raise NoRoom(
                f"the base {path.name} needs {size(needed)}{with_it}, and --memory is {size(self.limit)}", is_for_good=True
            )
        try:
            while (over := self._total() + needed + own - self.limit) > 0:
                chosen = victims(
                    [(k, one.all_bytes, one.life.users > 0, one.used) for k, one in self.held.items() if one.life.is_loaded],
                    over,
                )
                idle = [victim for victim in chosen if not self.held[victim].life.users]
                for victim in chosen:
                    self._ask_to_go(victim, served)
                if idle:
                    await self._drop(idle[0])
                else:
                    await self._moved.wait()
        finally:
            for held in self.held.values():  # who was asked to go, and need not
                if held.life.phase is Phase.LEAVING:
                    self._move(held, Event.SPARED)

    def _ask_to_go(self, key: Key, served: Served) -> None:
        held = self.held[key]
        if held.life.phase is Phase.HERE and held.life.users:
            self._move(held, Event.ASKED)
            self._say(f"the base of {held.name} makes room for {served.name}, once {held.life.users} answers are done")

    def _adapter(self, held: Held, worker: Worker, served: Served) -> HeldAdapter:
        """Never waits for room: it would keep its base from going."""
        assert served.adapter is not None
        try:
            stat = (served.adapter / "adapter_model.safetensors").stat()
        except OSError as exc:
            raise ModelError(f"{served.adapter}: the adapter is gone: {exc.strerror}") from None
        which = (served.adapter, served.digest, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if which not in held.adapters:
            idle = [(k, one.bytes, False, one.used) for k, one in held.adapters.items() if not one.users]
            for victim in victims(idle, self._total() + stat.st_size - self.limit):
                del held.adapters[victim]
            if self._total() + stat.st_size > self.limit:
                used = f"{size(self._total())} of {size(self.limit)} are in use"
                raise NoRoom(
                    f"{served.name} needs {size(stat.st_size)}, and {used}: try again",
                    is_for_good=held.bytes + stat.st_size > self.limit,
                )
            fit = HeldAdapter(stat.st_size, asyncio.create_task(self._fit(held, which, worker, served)))
            fit.ready.add_done_callback(_seen)
            held.adapters[which] = fit
        return held.adapters[which]

    async def _fit(self, held: Held, which: tuple[Any, ...], worker: Worker, served: Served) -> tuple[Fitted, Any]:
        try:
            read = await asyncio.to_thread(read_adapter, served, worker.base.processors)
            async with aclosing(results(worker, partial(worker.once, partial(put, worker.base, read)))) as found:
                return await anext(found), read.processor
        except BaseException:
            held.adapters.pop(which, None)
            raise

    async def _drop(self, key: Key) -> None:
        held = self.held[key]
        self._move(held, Event.DROP)
        worker = await held.ready
        await asyncio.to_thread(worker.stop)
        self._move(self.held.pop(key), Event.DROPPED)
        self._say(f"{worker.base.path.name} is dropped: {size(held.all_bytes)}")
        del worker, held
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _total(self) -> int:
        return sum(held.all_bytes for held in self.held.values())

    async def close(self) -> None:
        """Nobody comes any more, and who is there goes."""
        await self._until(lambda: not any(held.life.users for held in self.held.values()))
        if loads := [held.ready for held in self.held.values()]:
            await asyncio.wait(loads)
        for key in list(self.held):
            await self._drop(key)


def _seen(task: asyncio.Task[Any]) -> None:
    """Who asked may have gone; then nobody is to be told."""
    if not task.cancelled():
        task.exception()


def _adapter_bytes(served: Served) -> int:
    return (served.adapter / "adapter_model.safetensors").stat().st_size if served.adapter else 0
