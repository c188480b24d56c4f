"""`neartune chat`: a model on the terminal, or on a pipe: there each line is a question by itself.

/adapter NAME  another model      /base  the base by itself      /reset  forget what was said      /help
Ctrl-C stops an answer, Ctrl-D ends.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from neartune import decode
from neartune.adapter import Card, locate_base
from neartune.decode import Options, PromptError
from neartune.hub import HubError
from neartune.model import ModelError, choose_precision
from neartune.records.runs import RunsError
from neartune.serving import catalog, pool
from neartune.serving.catalog import Served, Unknown

HELP = (
    "/adapter NAME  answer with another model\n/base  with the base by itself\n/reset  forget what was said\n"
    "Ctrl-C stops an answer, Ctrl-D ends"
)
ERRORS = (Unknown, ModelError, RunsError, HubError, PromptError)
"""After which a talk can go on."""

Say = Callable[[str], None]


@dataclass(slots=True)
class Chat:
    """`base`, `fitted`, `processor`: of `served`. `said`: messages so far."""

    homes: Sequence[Path]
    locate: Callable[[Served], Path]
    device: Any
    note: Say
    temperature: float = 0.0
    served: Served | None = None
    key: pool.Key | None = None
    base: pool.Base | None = None
    fitted: pool.Fitted | None = None
    processor: Any = None
    said: list[dict[str, str]] = field(default_factory=list)


def named(name: str, homes: Sequence[Path]) -> Served:
    """A run's or an adapter's directory, or a name below `homes`. Raises Unknown, ModelError."""
    path = Path(name)
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return Served(path.resolve().name, Card.read(folder), folder)
    return catalog.resolve(name, catalog.find(homes))


def of_base(served: Served) -> Served:
    """Its base by itself."""
    card = served.card
    return Served(card.repo or f"base:{served.name}", card, None)


def begin(name: str, homes: Sequence[Path], url: str, note: Say, *, device: str, temperature: float, by_itself: bool) -> Chat:
    """Raises Unknown, ModelError, HubError."""
    from neartune.serving.serve import device_of

    chat = Chat(homes, lambda served: locate_base(served.card, None, url, note), device_of(device), note, temperature)
    served = named(name, homes)
    use(chat, of_base(served) if by_itself else served)
    return chat


def use(chat: Chat, served: Served) -> None:
    """Answer with `served` from here on; another base takes the place of the one that is loaded. Raises as ERRORS."""
    import torch

    if served.card.task != "text-generation":
        raise ModelError(f"{served.name} is a model of {served.card.task}: neartune serve answers at /v1/classify")
    key = pool.key_of(served)
    base = chat.base if key == chat.key else None
    if base is None:
        is_cuda = chat.device.type == "cuda"
        has_bf16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = choose_precision("auto", is_cuda=is_cuda, has_bf16=has_bf16)
        path = chat.locate(served)
        chat.base = chat.fitted = None
        base = pool.open_base(served, path, chat.device, precision, chat.note)
    if served.adapter is None:
        fitted, processor = None, base.processor
    else:
        read = pool.read_adapter(served, base.processors)
        fitted, processor = pool.put(base, read), read.processor
    chat.key, chat.base, chat.fitted, chat.processor, chat.served = key, base, fitted, processor, served


def answer(chat: Chat, question: str, write: Callable[[str], None], is_stopped: Callable[[], bool] = lambda: False) -> None:
    """What is said goes to `write` as it comes, and into the history when it is whole or stopped. Raises PromptError."""
    if chat.base is None and chat.served is not None:
        use(chat, chat.served)  # another base was tried, and could not be had
    assert chat.base is not None
    ids = decode.chat_ids(chat.processor, history(chat, question))
    room = decode.limit_of(chat.base.model.config, chat.processor) - len(ids)
    if room < 1:
        raise PromptError(f"the question has {len(ids)} tokens, and the model takes {room + len(ids)}")
    options = Options(room, decode.ends_of(chat.base.model, chat.processor), chat.temperature)
    pool.switch(chat.base, chat.fitted)
    text = ""
    try:
        with pool.computing(chat.base):
            tokens = takewhile(lambda token: not is_stopped(), decode.tokens(chat.base.model, ids, options))
            for piece in decode.pieces(tokens, chat.processor, options):
                text += piece.text
                write(piece.text)
    finally:
        chat.said += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]


def history(chat: Chat, question: str) -> list[dict[str, str]]:
    """The messages to answer. What was said first is forgotten until half of the model's context is left for the answer; a base
    without a chat template takes the question alone."""
    assert chat.base is not None
    most = decode.limit_of(chat.base.model.config, chat.processor) // 2
    asked = {"role": "user", "content": question}
    if not chat.processor.chat_template:
        chat.said.clear()
    while chat.said and len(decode.chat_ids(chat.processor, [*chat.said, asked])) > most:
        del chat.said[:2]
    return [*chat.said, asked]


def command(chat: Chat, line: str) -> str:
    """Do what a line that begins with / says; what is to be told. Raises Unknown, ModelError, HubError."""
    word, _, rest = line[1:].strip().partition(" ")
    match word, rest.strip():
        case "reset", "":
            chat.said.clear()
            return "forgotten"
        case "base", "":
            assert chat.served is not None
            use(chat, of_base(chat.served))
        case "adapter", name if name:
            use(chat, named(name, chat.homes))
        case _:
            return HELP
    assert chat.served is not None
    return f"now {chat.served.name}"


def talk(chat: Chat) -> None:
    """Until the input ends. On a terminal what goes wrong is said, and the talk goes on; on a pipe it ends with the error."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 - input() edits lines then, and remembers them

        assert chat.served is not None
        print(f"{chat.served.name}. {HELP}", flush=True)
    while (line := _line(is_terminal)) is not None:
        if not is_terminal and not line.startswith("/"):
            chat.said.clear()
        try:
            if line.startswith("/"):
                chat.note(command(chat, line))
            elif line.strip() and is_terminal:
                with _ctrl_c() as is_stopped:
                    answer(chat, line, _write, is_stopped)
                print(" (stopped)" if is_stopped() else "", flush=True)
            elif line.strip():
                answer(chat, line, _write)
                print(flush=True)
        except ERRORS as exc:
            if not is_terminal:
                raise
            print(exc, file=sys.stderr, flush=True)


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed inside. (KeyboardInterrupt is lost where it is raised in a callback that swallows errors.)"""
    is_pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal is_pressed
        is_pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: is_pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _line(is_terminal: bool) -> str | None:
    """The next; None at the end. Ctrl-C gives up the line."""
    if not is_terminal:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            print(flush=True)
        except EOFError:
            print(flush=True)
            return None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
