"""What is fetched from a mirror, and how its failures are told apart. Against a nearhub mirror of a stand-in Hub."""

from __future__ import annotations

import base64
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from neartune import cli, hub, loop
from neartune.hub import HubError, choose_data_files, choose_model_files, endpoint, fetch, fetched
from tests.hub import HubProcess
from tests.mirror import MirrorProcess
from tests.trainer.bases import FACTS, environment, lines, read_to, settings_of, started, train, write_jsonl


def test_the_endpoint() -> None:
    environ = {"HF_ENDPOINT": "http://c"}
    assert endpoint("http://a/", "http://b", environ) == "http://a"
    assert endpoint("", "http://b", environ) == "http://b"
    assert endpoint(None, None, environ) == "http://c"
    assert endpoint("", None, {}) == "http://127.0.0.1:8090"


CODE = {"modeling_x.py": 5, "README.md": 5, "LICENSE.txt": 1, "requirements.txt": 1, "onnx/model.onnx": 9, "sub/config.json": 2}
SUPPORT = {"config.json": 2, "tokenizer.json": 2, "chat_template.jinja": 1}


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        (["model.safetensors", "pytorch_model.bin", "model.gguf", "tf_model.h5"], ["model.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "model.bin",
            ],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "adapter_model.safetensors"],
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        ),
    ],
)
def test_exactly_one_format_of_the_weights_and_no_code(weights: list[str], kept: list[str]) -> None:
    files = choose_model_files(CODE | SUPPORT | dict.fromkeys(weights, 10))
    assert sorted(files) == sorted([*SUPPORT, *kept])


def test_a_repo_without_weights() -> None:
    with pytest.raises(HubError, match=r"no weights in safetensors or PyTorch's format; what it has of size ends in \.gguf"):
        choose_model_files({**SUPPORT, "model.gguf": 10**8})
    with pytest.raises(HubError, match="it has no jsonl"):
        choose_data_files({"README.md": 1, "script.py": 1})
    assert choose_data_files({"README.md": 1, "a/train.jsonl": 1, "x.py": 1, "b.PNG": 1}) == ["a/train.jsonl", "b.PNG"]


def test_half_a_download_is_no_base(hub: HubProcess, mirror: MirrorProcess, llama: Path, tmp_path: Path) -> None:
    """One of two shards and their index, as Ctrl-C leaves them."""
    shards = {f"model-0000{number}-of-00002.safetensors": f"{number}" for number in (1, 2)}
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    hub.repo("lab/sharded").commit({"config.json": "{}", "model.safetensors.index.json": index, **shards})
    found = fetch("lab/sharded", "main", mirror.url, lambda line: None)
    assert fetched("lab/sharded", str(found.commit)) == found
    (found.path / "model-00002-of-00002.safetensors").unlink()
    assert fetched("lab/sharded", str(found.commit)) is None


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def repos(hub: HubProcess, llama: Path) -> None:
    files = {path.name: path for path in llama.iterdir()}
    hub.repo("lab/llama").commit(
        {**files, "pytorch_model.bin": b"x" * 9, "modeling_evil.py": "raise SystemExit(9)", "README.md": "x"}
    )
    hub.repo("lab/gated", gated="manual").commit({**files})
    hub.repo("lab/empty").commit({"README.md": "nothing"})
    hub.repo("lab/facts", "datasets").commit(
        {"train.jsonl": "".join(json.dumps(row) + "\n" for row in FACTS), "validation.jsonl": json.dumps(FACTS[0]) + "\n"}
    )


@pytest.mark.usefixtures("repos")
@pytest.mark.parametrize(
    ("base", "more", "message"),
    [
        ("lab/lama", [], "is up, and has no model 'lab/lama'"),
        ("lab/llama", ["revision=v9"], "is up and has 'lab/llama', but no revision 'v9'"),
        ("lab/gated", [], "is up, and model 'lab/gated' is gated"),
        ("lab/empty", [], "model 'lab/empty' cannot be used: it has no weights"),
        ("lab/llama", ["train_data=lab/none"], "is up, and has no dataset 'lab/none'"),
    ],
)
def test_failures_are_told_apart(
    mirror: MirrorProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str], base: str, more: list[str], message: str
) -> None:
    arguments = settings_of(tmp_path / "run", base, "lab/facts", more)
    assert cli.main([*arguments, "--use_mirror", mirror.url], verb="train") == 3
    assert message in capsys.readouterr().err


def test_a_mirror_that_is_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", FACTS)
    assert (
        cli.main([*settings_of(tmp_path / "run", "lab/llama", data), "--use_mirror", "http://127.0.0.1:9"], verb="train") == 3
    )
    assert "http://127.0.0.1:9 cannot be reached, so model 'lab/llama' cannot be fetched" in capsys.readouterr().err


def test_a_password_in_the_mirror_s_url_is_sent_to_it_and_told_to_nobody_else() -> None:
    asked: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_error(500)

        def log_message(self, *words: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        where = f"127.0.0.1:{server.server_port}"
        with pytest.raises(HubError) as caught:
            fetch("lab/llama", "main", f"http://reader:geheim@{where}", lambda line: None)
        server.shutdown()
        thread.join()
    assert {*asked} == {"Basic " + base64.b64encode(b"reader:geheim").decode()}
    assert f"http://{where} answers, but not usefully" in str(caught.value)
    assert "geheim" not in str(caught.value)


@pytest.mark.usefixtures("repos")
def test_something_that_is_no_mirror(hub: HubProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", FACTS)
    arguments = settings_of(tmp_path / "run", "lab/llama", data)
    assert cli.main([*arguments, "--use_mirror", f"{hub.url}/not/here"], verb="train") == 3
    assert "lab/llama" in capsys.readouterr().err


@pytest.mark.usefixtures("repos")
def test_what_will_be_fetched_is_said_first_and_only_that_is(
    hub: HubProcess, mirror: MirrorProcess, tmp_path: Path, llama: Path
) -> None:
    said: list[str] = []
    snapshot = hub_fetch(mirror, said)
    names = {path.name for path in snapshot.path.iterdir()}
    assert names == {path.name for path in llama.iterdir()}
    size = sum(path.stat().st_size for path in snapshot.path.iterdir())
    assert said == [f"model lab/llama at {snapshot.commit[:12]}: {len(names)} files, {size / 1e6:,.1f} MB, from {mirror.url}"]


@pytest.mark.usefixtures("repos")
def test_what_is_fetched_is_said_without_a_password(mirror: MirrorProcess) -> None:
    said: list[str] = []
    fetch("lab/llama", "main", mirror.url.replace("://", "://reader:geheim@"), said.append)
    assert [line.rpartition(" ")[2] for line in said] == [mirror.url]


def hub_fetch(mirror: MirrorProcess, said: list[str]) -> hub.Snapshot:
    return hub.fetch("lab/llama", "main", mirror.url, said.append)


@pytest.mark.usefixtures("repos")
def test_after_fetching_nobody_is_asked_and_the_mirror_may_go(hub: HubProcess, tmp_path: Path) -> None:
    """The mirror is killed before the first step; the Hub counts."""
    output = tmp_path / "run"
    with MirrorProcess(tmp_path / "cache", [hub.url], [hub.cdn_host]) as mirror:
        arguments = settings_of(output, "lab/llama", "lab/facts", ["max_steps=40", "early_stopping_patience=0"])
        process = started(*arguments, "--use_mirror", mirror.url, HF_HOME=str(tmp_path / "home"))
        read_to(process, "before:")
        mirror.kill()
        asked = len(hub.log())
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert len(hub.log()) == asked
    assert not [row for row in hub.log() if row["raw_path"].endswith((".py", "pytorch_model.bin", "README.md"))]
    assert not [row for row in hub.log() if "agent-harnesses" in row["raw_path"]]
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    base = json.loads((output / "adapter" / "base.json").read_text())
    assert config["base_model_name_or_path"] == "lab/llama"
    assert config["revision"] == base["commit"]
    assert len(base["commit"]) == 40
    assert len([line for line in lines(output) if "kind" not in line]) == 40


@pytest.mark.usefixtures("repos")
def test_a_run_that_goes_on_keeps_its_commits_and_needs_no_mirror(
    hub: HubProcess, mirror: MirrorProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    hub.repo("lab/moving").commit({path.name: path for path in llama.iterdir()})
    steps = loop.steps

    def stopped(*arguments: Any, **named: Any) -> Any:
        for result in steps(*arguments, **named):
            yield result
            if result.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "steps", stopped)
    arguments = [*settings_of(tmp_path / "run", "lab/moving", "lab/facts", ["max_steps=8"]), "--use_mirror"]
    assert cli.main([*arguments, mirror.url], verb="train") == 143
    monkeypatch.setattr(loop, "steps", steps)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.repo("lab/moving").commit({"config.json": "{}"})
    asked = len(hub.log())
    assert cli.main([*arguments, "http://127.0.0.1:9"], verb="train") == 0
    assert len(hub.log()) == asked
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 8


def test_xet_and_telemetry_are_off_before_the_library_is_imported_and_progress_bars_are_on(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom neartune import cli\nassert cli.main(sys.argv[1:], verb='train') == 3\n"
        "from huggingface_hub import constants\n"
        "assert constants.HF_HUB_DISABLE_XET and constants.HF_HUB_DISABLE_TELEMETRY\n"
        "from huggingface_hub.utils import are_progress_bars_disabled\nassert not are_progress_bars_disabled()"
    )
    environ = environment()
    del environ["HF_HUB_DISABLE_PROGRESS_BARS"]
    arguments = settings_of(tmp_path / "run", "lab/llama", write_jsonl(tmp_path / "d.jsonl", FACTS))
    command = [sys.executable, "-c", code, *arguments, "--use_mirror", "http://127.0.0.1:9"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_train_py_says_the_same_in_a_process(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", FACTS)
    done = train("--config", "config.yaml", "--use_mirror", "http://127.0.0.1:9", f"train_data={data}")
    assert done.returncode == 3
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
