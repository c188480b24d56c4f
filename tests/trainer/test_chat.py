"""`neartune chat` through a pipe and on a terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from neartune import cli
from tests.trainer import served
from tests.trainer.bases import TRAINER, environment
from tests.trainer.served import QUESTION, alone, generated


@pytest.fixture(scope="session")
def runs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.made_runs(llama, tmp_path_factory)


def said(home: Path, llama: Path, name: str, question: str) -> str:
    """By transformers itself, up to the end of the context."""
    model, tokenizer = alone(home / name, llama)
    count = len(tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"])
    return str(tokenizer.decode(generated(model, tokenizer, question, 128 - count), skip_special_tokens=True))


def piped(monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    return cli.main(["chat", *arguments])


def test_each_line_of_a_pipe_is_a_question_by_itself_and_may_change_the_adapter(
    runs: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [QUESTION, "/adapter ab", QUESTION, QUESTION, "", "/base", f"/adapter {runs / 'a.b'}", QUESTION]
    assert piped(monkeypatch, "\n".join(lines), "--adapter", "a", "--runs", str(runs)) == 0
    told = capsys.readouterr()
    assert told.out == "".join(f"{said(runs, llama, name, QUESTION)}\n" for name in ("a", "ab", "ab", "a.b"))
    assert told.err.splitlines() == ["now ab", "now base:ab", "now a.b"]


def test_the_base_by_itself_is_asked_with_base(
    runs: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert piped(monkeypatch, f"{QUESTION}\n", "--adapter", str(runs / "a"), "--base") == 0
    plain = capsys.readouterr().out
    assert piped(monkeypatch, f"{QUESTION}\n/base\n{QUESTION}", "--adapter", str(runs / "a")) == 0
    with_adapter, by_itself = said(runs, llama, "a", QUESTION), plain
    assert capsys.readouterr().out == f"{with_adapter}\n{by_itself}"
    assert plain != f"{with_adapter}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "there is no model 'abb': did you mean ab"), ("/adapter nix\n", "there is no model 'nix'")],
)
def test_on_a_pipe_what_is_wrong_ends_it_with_status_2(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert piped(monkeypatch, text, "--adapter", "a" if text else "abb", "--runs", str(runs)) == 2
    assert message in capsys.readouterr().err


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "neartune", *arguments],
            cwd=TRAINER,
            env=environment(PYTHONPATH=str(TRAINER), TERM="dumb"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # it becomes the one that Ctrl-C is for
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, text: str) -> str:
        """What it shows up to `text`."""
        shown = b""
        while text.encode() not in shown:
            shown += os.read(self._ours, 1)
        return shown.decode(errors="replace").replace("\r\n", "\n")

    def ended(self) -> int:
        try:
            while os.read(self._ours, 4096):
                pass
        except OSError:
            pass  # the other side has gone
        os.close(self._ours)
        return self.process.wait(60)


def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(runs: Path, llama: Path, tmp_path: Path) -> None:
    served.moved(runs / "a", served.endless(tmp_path / "base"), tmp_path / "endless")
    terminal = Terminal("chat", "--adapter", str(tmp_path / "endless"), "--base", "--runs", str(runs))
    try:
        talk(terminal, runs, llama)
    finally:
        terminal.process.kill()
        terminal.process.wait()


def talk(terminal: Terminal, runs: Path, llama: Path) -> None:
    assert "base:endless. /adapter NAME" in terminal.until("\n> ")
    terminal.type("Tell me everything.\n")
    terminal.until("\r\n" * 4)
    terminal.type("\x03")
    terminal.until(" (stopped)\r\n")
    terminal.until("> ")
    terminal.type("/adapter ab\n")
    terminal.until("now ab\r\n> ")
    terminal.type("/reset\n")
    terminal.until("forgotten\r\n> ")
    terminal.type(f"{QUESTION}\n")
    terminal.until("\n")
    assert terminal.until("\n> ").removesuffix("\n> ") == said(runs, llama, "ab", QUESTION)
    terminal.type("/nonsense\n")
    terminal.until("Ctrl-C stops an answer")
    terminal.type("\x04")
    assert terminal.ended() == 0


def test_what_was_said_is_remembered_until_reset_and_the_oldest_is_forgotten_for_room(runs: Path, llama: Path) -> None:
    from neartune.serving import chat

    talk = chat.begin("ab", [runs], "http://127.0.0.1:9", lambda line: None, device="cpu", temperature=0, by_itself=False)
    _, tokenizer = alone(runs / "ab", llama)
    told: list[str] = []
    talk.said += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Nobody."}]
    assert chat.history(talk, QUESTION) == [*talk.said, {"role": "user", "content": QUESTION}]
    chat.answer(talk, QUESTION, told.append)
    assert [message["role"] for message in talk.said] == ["user", "assistant"] * 2
    assert talk.said[-1]["content"] == "".join(told)
    long = tokenizer.decode(tokenizer("why " * 30)["input_ids"][:40])
    assert chat.history(talk, long) == [{"role": "user", "content": long}]
    talk.said += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]
    assert chat.command(talk, "/reset") == "forgotten" and not talk.said
