"""Bases in memory, and adapters on them, within a limit: loaded on first use, the least recently used dropped first.

Adapters that have the same shape (targets, ranks, heads) share one set of peft's modules: a slot. An adapter is then only its
tensors, and putting it on is setting what the slot's parameters point at; so loading is reading a file, and names of adapters
never reach peft, which takes one for another where it begins with the other's name. A base has one thread, which does
everything that is computed on it, a step of one answer at a time: each step with its own adapter on.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import json
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from neartune import adapter, tasks
from neartune.batch import is_out_of_memory
from neartune.model import ModelError, Precision, choose_precision, weight_files
from neartune.records import registry
from neartune.serving.catalog import Served
from neartune.tasks import Task

AT_ONCE = 64
"""Answers on one base: each has a cache of its own, which the limit does not know."""
_NOT_SHAPE = ("base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "init_lora_weights", "peft_version")
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
    """Modules of peft for adapters of one shape. `parameters`: by their names in an adapter's file; `filled`: by whom."""

    name: str
    parameters: Mapping[str, torch.nn.Parameter]
    filled: Fitted | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """An adapter in memory, ready to be put on."""

    slot: Slot
    tensors: Mapping[str, torch.Tensor]


@dataclass(slots=True)
class Base:
    """A base in memory. `slots`: by shape; `adapted`: peft's view of it, once it has one; `on`: the active slot's name, "" for
    the base by itself."""

    path: Path
    task: Task
    model: Any
    processor: Any
    precision: Precision
    slots: dict[str, Slot] = field(default_factory=dict)
    adapted: Any = None
    on: str = ""
    numbers: Iterator[int] = field(default_factory=itertools.count)
    """Of slots; none is used twice."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def bytes(self) -> int:
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, slots=True)
class Read:
    """An adapter's files."""

    path: Path
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
    has_room = bool(key_of(served).room)
    processor = task.load_processor(served.adapter if has_room and served.adapter else path)
    model = adapter.load_base(served.card, path, processor, precision.base).to(device)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True
    return Base(path, task, model, processor, precision)


def read_adapter(served: Served, processors: dict[str, Any]) -> Read:
    """The files of an adapter. `processors`: by digest, those that were read already; adapters of one base have mostly the
    same. Raises ModelError."""
    path = served.adapter
    assert path is not None
    if served.digest and registry.digest(path) != served.digest:
        raise ModelError(f"{served.name}: the adapter in {path} was changed after it was promoted: it is not given out")
    try:
        tensors = load_file(path / "adapter_model.safetensors")
    except Exception as exc:  # noqa: BLE001 - safetensors has errors of its own
        raise ModelError(f"{path}: the adapter cannot be read: {exc}") from None
    digest = _processor_digest(path)
    if digest not in processors:
        processors[digest] = tasks.find(served.card.task).load_processor(path)
    return Read(path, shape(_config(path), tensors), tensors, processors[digest])


def shape(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Alike for adapters that can take each other's place in peft's modules."""
    kept = {name: value for name, value in config.items() if name not in _NOT_SHAPE}
    for name, value in kept.items():
        if isinstance(value, list):
            kept[name] = sorted(value, key=str)
    sizes = sorted((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps([kept, sizes], sort_keys=True).encode()).hexdigest()


def put(base: Base, read: Read) -> Fitted:
    """Make an adapter ready. To be called where nothing is computed on `base` meanwhile. Raises ModelError."""
    if read.shape not in base.slots:
        base.slots[read.shape] = _slot(base, read.path)
    slot = base.slots[read.shape]
    tensors = {name: read.tensors[name].to(parameter.device, parameter.dtype) for name, parameter in slot.parameters.items()}
    return Fitted(slot, tensors)


def _slot(base: Base, path: Path) -> Slot:
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    name = f"slot{next(base.numbers):04d}"  # of one length: none begins with another
    try:
        if base.adapted is None:
            config = PeftConfig.from_pretrained(str(path))
            config.base_model_name_or_path = None  # checked already, by its bytes
            base.adapted = get_peft_model(base.model, config, adapter_name=name, low_cpu_mem_usage=True)
        base.adapted.load_adapter(str(path), adapter_name=name, torch_device=str(base.device), low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, KeyError) as exc:
        if base.adapted is not None and name in base.adapted.peft_config:
            base.adapted.delete_adapter(name)  # what is half there would answer for others
        if is_out_of_memory(exc):
            raise
        raise ModelError(f"{path}: the adapter does not fit its base: {exc}") from None
    finally:
        base.on = _UNKNOWN
    base.model.requires_grad_(False).eval()
    known = base.adapted.state_dict(keep_vars=True)
    parameters = get_peft_model_state_dict(base.adapted, known, name, save_embedding_layers=False)
    return Slot(name, parameters)


def switch(base: Base, fitted: Fitted | None) -> None:
    """What is computed next is computed with this adapter, or with none."""
    name = fitted.slot.name if fitted else ""
    if base.on != name and base.adapted is not None:
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
    return sum(_product(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _product(sizes: Sequence[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


# — its thread ———————————————————————————————————————————————————————————————————————————————————


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
    """The thread of one base."""

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
            self._jobs.append(job)
            self._open += 1
            self._changed.notify_all()
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
        """Jobs that are left get no further step."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if self._step(job):
                with self._changed:
                    self._jobs.append(job)
                    self._changed.notify_all()
            else:
                with self._changed:
                    self._open -= 1
                    self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_stopping)
            return None if self._is_stopping else self._jobs.popleft()

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
    """A base that is here, or on its way. `used`: the later, the greater."""

    name: str
    ready: asyncio.Task[Worker]
    bytes: int = 0
    users: int = 0
    used: int = 0
    is_leaving: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
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
    for what, size, _, _ in sorted(held, key=lambda one: one[2:]):
        if over <= 0:
            break
        chosen.append(what)
        over -= size
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
        self._processors: dict[str, Any] = {}
        self._loading = asyncio.Lock()
        self._released = asyncio.Event()
        self._clock = itertools.count(1)

    @asynccontextmanager
    async def seat(self, served: Served) -> AsyncIterator[Seat]:
        """Neither base nor adapter is dropped inside. Raises NoRoom, ModelError, HubError."""
        held = await self._base(served)
        try:
            worker = await asyncio.shield(held.ready)
            if served.adapter is None:
                yield Seat(served, worker, None, worker.base.processor)
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
            held.users -= 1
            held.used = next(self._clock)
            self._released.set()

    async def _base(self, served: Served) -> Held:
        """Counted as used, though not there yet."""
        key = await asyncio.to_thread(key_of, served)
        while (held := self.held.get(key)) is not None and held.is_leaving:
            await held.gone.wait()
        if held is None:
            held = Held(served.name, asyncio.create_task(self._load(key, served)))
            held.ready.add_done_callback(_seen)
            self.held[key] = held
        if held.users >= AT_ONCE:
            raise NoRoom(f"{AT_ONCE} answers are in progress on the base of {served.name}: try again", is_for_good=False)
        held.users += 1
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
                self._say(
                    f"{path.name} is loaded: {_size(base.bytes)}; in memory {_size(self._total())} of {_size(self.limit)}"
                )
                return Worker(base, self._alone)
        except BaseException:
            self.held.pop(key).gone.set()
            raise

    def _open(self, served: Served, path: Path) -> Base:
        with self._alone:
            return open_base(served, path, self.device, self._precision, self._say)

    async def _make_room(self, key: Key, served: Served, path: Path, needed: int) -> None:
        """Bases that have to go get no new answers; those in progress are waited for."""
        own = _adapter_bytes(served)
        if needed + own > self.limit:
            with_it = f" with {_size(own)} of {served.name}" if own else ""
            raise NoRoom(
                f"the base {path.name} needs {_size(needed)}{with_it}, and --memory is {_size(self.limit)}", is_for_good=True
            )
        while (over := self._total() + needed + own - self.limit) > 0:
            others = [(k, held.all_bytes, held.users > 0, held.used) for k, held in self.held.items() if held.ready.done()]
            for victim in victims(others, over):
                leaving = self.held[victim]
                if not leaving.users:
                    await self._drop(victim)
                elif not leaving.is_leaving:
                    leaving.is_leaving = True
                    self._say(f"the base of {leaving.name} makes room for {served.name}, once {leaving.users} answers are done")
            if self._total() + needed + own > self.limit:
                self._released.clear()
                await self._released.wait()
        for held in self.held.values():  # who was asked to go, and need not
            if held.is_leaving:
                held.is_leaving = False
                held.gone.set()
                held.gone = asyncio.Event()

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
                used = f"{_size(self._total())} of {_size(self.limit)} are in use"
                raise NoRoom(
                    f"{served.name} needs {_size(stat.st_size)}, and {used}: try again",
                    is_for_good=held.bytes + stat.st_size > self.limit,
                )
            fit = HeldAdapter(stat.st_size, asyncio.create_task(self._fit(held, which, worker, served)))
            fit.ready.add_done_callback(_seen)
            held.adapters[which] = fit
        return held.adapters[which]

    async def _fit(self, held: Held, which: tuple[Any, ...], worker: Worker, served: Served) -> tuple[Fitted, Any]:
        try:
            read = await asyncio.to_thread(read_adapter, served, self._processors)
            async with aclosing(results(worker, partial(worker.once, partial(put, worker.base, read)))) as found:
                async for fitted in found:
                    return fitted, read.processor
            raise RuntimeError("the worker has stopped")
        except BaseException:
            held.adapters.pop(which, None)
            raise

    async def _drop(self, key: Key) -> None:
        held = self.held[key]
        held.is_leaving = True
        worker = await held.ready
        await asyncio.to_thread(worker.stop)
        del self.held[key]
        held.gone.set()
        self._say(f"{worker.base.path.name} is dropped: {_size(held.all_bytes)}")
        del worker, held
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _total(self) -> int:
        return sum(held.all_bytes for held in self.held.values())

    async def close(self) -> None:
        """Nothing is in use any more."""
        for key, held in list(self.held.items()):
            await asyncio.wait([held.ready])
            if key in self.held:
                await self._drop(key)


def _seen(task: asyncio.Task[Any]) -> None:
    """Who asked may have gone; then nobody is to be told."""
    if not task.cancelled():
        task.exception()


def _adapter_bytes(served: Served) -> int:
    return (served.adapter / "adapter_model.safetensors").stat().st_size if served.adapter else 0


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
