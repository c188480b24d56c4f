"""Several processes: who starts them, a sharded base, several machines; whatever it was, a run goes on as it began. On gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from neartune import cli, launch, model, recipe
from neartune.launch import Accelerate, LaunchError, Start, World, decide, read_accelerate
from neartune.model import Sharding
from neartune.prepare import Place
from tests.hub import HubProcess
from tests.mirror import MirrorProcess
from tests.trainer.bases import (
    FACTS,
    ROOT,
    TRAINER,
    environment,
    losses,
    read_to,
    recipe_of,
    run_here,
    settings_of,
    started,
    train,
    write_jsonl,
)

STEPS: dict[str, Any] = {
    "lora_dropout": 0,
    "max_steps": 20,
    "eval_every": 4,
    "precision": "fp32",
    "validation_split": 0.13,
    "early_stopping_patience": 0,
    "micro_batch_by": "tokens",
    "micro_batch_size": 40,
}
"""Cut so that one process has other micro-batches than the other, in steps and in evaluations."""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def fsdp(folder: Path, **more: Any) -> Path:
    """A file of `accelerate config`."""
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "num_processes": 2,
        "num_machines": 1,
        "machine_rank": 0,
        "main_process_port": free_port(),
        "use_cpu": False,
        "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True},
    }
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump(config | more))
    return file


def overrides(**settings: Any) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


# — who starts them ——————————————————————————————————————————————————————————————————————————————


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
TWO = Accelerate(Path("a.yaml"), 2, 1, is_sharded=False)
NODES = Accelerate(Path("a.yaml"), 8, 2, is_sharded=True)
SILENT = Accelerate(Path("a.yaml"), None, 1, is_sharded=True)


def gpus(count: int) -> Any:
    return lambda: count


@pytest.mark.parametrize(
    ("asked", "config", "environ", "is_child", "count", "command", "here"),
    [
        ("auto", None, {}, False, 0, [], 1),
        ("auto", None, {}, False, 4, ["torch.distributed.run", "--standalone", "--nproc-per-node=4"], 4),
        (2, None, {}, False, 0, ["torch.distributed.run", "--standalone", "--nproc-per-node=2"], 2),
        (1, None, {}, False, 4, [], 1),
        ("auto", None, TORCHRUN, False, 4, [], 1),
        (2, None, TORCHRUN, False, 4, [], 1),
        (2, None, TORCHRUN, True, 0, [], 1),
        ("auto", TWO, {}, False, 0, ["accelerate.commands.launch", "--config_file", "a.yaml"], 2),
        ("auto", NODES, {}, False, 0, ["accelerate.commands.launch", "--config_file", "a.yaml"], 4),
        ("auto", SILENT, {}, False, 1, ["accelerate.commands.launch", "--config_file", "a.yaml"], 1),
        ("auto", TWO, TORCHRUN, False, 0, [], 1),
        ("auto", TWO, TORCHRUN, True, 0, [], 1),
    ],
)
def test_who_starts_the_processes(
    asked: Any, config: Any, environ: dict[str, str], is_child: bool, count: int, command: list[str], here: int
) -> None:
    start = decide(asked, config, environ, gpus(count), is_child=is_child)
    assert list(start.command[2 : 2 + len(command)]) == command
    assert start.command[:2] == ((sys.executable, "-m") if command else ())
    assert start.command[-2:] == (("-m", "neartune") if command else ())
    assert start.here == here


def test_that_a_launcher_was_there_already_is_said() -> None:
    assert decide("auto", None, TORCHRUN, gpus(0), is_child=False) == Start(
        note="one of 2 processes that a launcher started: none are started here"
    )
    assert launch.world_of(TORCHRUN) == World(1, 2, here=2)
    assert launch.world_of({**TORCHRUN, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}) == World(1, 8, here=4)


@pytest.mark.parametrize(
    ("asked", "config", "environ", "is_child", "message"),
    [
        (4, None, TORCHRUN, False, "processes asks for 4 processes, and the launcher started 2"),
        (1, None, TORCHRUN, False, "processes asks for one process, and the launcher started 2"),
        ("auto", NODES, TORCHRUN, False, "accelerate_config asks for 8 processes, and the launcher started 2"),
        ("auto", TWO, {}, True, "a.yaml: 2 processes were to be started, and accelerate launch started 1"),
        ("auto", None, {"OMPI_COMM_WORLD_SIZE": "4"}, False, "MPI started 4 processes (OMPI_COMM_WORLD_SIZE) that do not know"),
    ],
)
def test_another_number_of_processes_than_was_asked_for_is_an_error(
    asked: Any, config: Any, environ: dict[str, str], is_child: bool, message: str
) -> None:
    with pytest.raises(LaunchError) as caught:
        decide(asked, config, environ, gpus(0), is_child=is_child)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: DEEPSPEED\n", "a.yaml:1: distributed_type: DEEPSPEED is not what this trainer can do"),
        ("num_machines: 1\nnum_processes: many\n", "a.yaml:2: num_processes: it is 'many'; it must be a whole number"),
        ("num_processes: [\n", "a.yaml:"),
        ("- FSDP\n", "a.yaml:1: the file must hold"),
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_offload_params: true\n", "fsdp_offload_params is not built"),
        (None, "a.yaml: there is no such file"),
    ],
)
def test_an_accelerate_config_is_read_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "a.yaml").write_text(text)
    file = tmp_path / "recipe.yaml"
    file.write_text("base_model: lab/llama\ntrain_data: lab/facts\naccelerate_config: a.yaml\n")
    assert cli.main(["--config", str(file)], verb="train") == 2
    said = capsys.readouterr().err
    assert f"{file}:3: accelerate_config: {tmp_path}/" in said
    assert message in said


def test_what_a_sharded_base_cannot_is_refused_by_the_recipe_all_at_once(tmp_path: Path) -> None:
    given = ["base_model=lab/llama", "train_data=lab/facts", f"accelerate_config={fsdp(tmp_path)}"]
    with pytest.raises(recipe.RecipeError) as caught:
        recipe.load(None, [*given, "processes=3", "train_batch_size=9", "compile=true", "load_in_4bit=true"])
    said = "\n".join(caught.value.complaints)
    assert "processes: it is 3, and accelerate.yaml says 2" in said
    assert "train_batch_size: 9 rows a step cannot be shared by 2 processes" in said
    assert "micro_batch_size: auto is not measured when the base is sharded" in said
    assert "compile: it is not built for a sharded base" in said
    assert "load_in_4bit: it is not built for a sharded base" in said
    assert recipe.load(None, [*given, "micro_batch_size=2"]).recipe.accelerate_config == tmp_path / "accelerate.yaml"
    assert read_accelerate(tmp_path / "accelerate.yaml") == Accelerate(tmp_path / "accelerate.yaml", 2, 1, is_sharded=True)


def test_nor_by_a_launcher_that_was_there_already(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    data = write_jsonl(tmp_path / "data.jsonl", FACTS)
    assert cli.main([*settings_of(tmp_path / "run", llama, data), "micro_batch_size=auto"], verb="train") == 2
    assert "micro_batch_size: auto is not measured when the base is sharded" in capsys.readouterr().err


def test_accelerate_starts_one_process_on_a_cpu_and_that_is_an_error(llama: Path, tmp_path: Path) -> None:
    config = fsdp(tmp_path, distributed_type="MULTI_CPU", use_cpu=True)
    arguments = settings_of(tmp_path / "run", llama, write_jsonl(tmp_path / "data.jsonl", FACTS), ["processes=auto"])
    done = train(*arguments, f"accelerate_config={config}")
    assert done.returncode == 2
    assert "2 processes were to be started, and accelerate launch started 1" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rank", "is_local_first", "before", "after"), [(0, True, 0, 2), (2, True, 1, 1), (1, False, 2, 0), (3, False, 2, 0)]
)
def test_the_first_process_fetches_then_one_on_each_other_machine_then_all(
    monkeypatch: pytest.MonkeyPatch, rank: int, is_local_first: bool, before: int, after: int
) -> None:
    """In a group that waits for hours: gloo's own gives up after 30 minutes, NCCL's after 10."""
    import torch

    groups: list[dict[str, Any]] = []
    waited: list[Any] = []
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: groups.append(options) or "a group")
    monkeypatch.setattr(torch.distributed, "barrier", waited.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", groups.append)

    class Accelerator:
        is_local_main_process = is_local_first

    place = Place(rank, 4, None, Accelerator())  # type: ignore[arg-type]
    with place.in_turn():
        assert waited == ["a group"] * before
        waited.clear()
    assert waited == ["a group"] * after
    (made, gone) = groups
    assert made["backend"] == "gloo", "NCCL's would keep the GPUs busy with waiting"
    assert made["timeout"] >= timedelta(hours=12)
    assert gone == "a group"


# — a sharded base, and runs that go on otherwise ————————————————————————————————————————————————


WATCHED = """
import json, sys
from pathlib import Path
from neartune import cli, loop
from neartune.model import learning

steps, folder = loop.steps, Path(sys.argv.pop(1))

def watched(trainer, *arguments, **named):
    from torch.distributed.tensor import DTensor

    for result in steps(trainer, *arguments, **named):
        if result.step == 2:
            base = [p for p in trainer.model.parameters() if isinstance(p, DTensor)]
            held = {
                "held": sum(p.to_local().numel() for p in base),
                "base": sum(p.numel() for p in base),
                "learning": {name: list(p.shape) for name, p in learning(trainer.model) if not isinstance(p, DTensor)},
            }
            (folder / f"rank-{trainer.rank}.json").write_text(json.dumps(held))
        yield result

loop.steps = watched
sys.exit(cli.main(verb="train"))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("facts") / "data.jsonl", FACTS)


@pytest.fixture(scope="module")
def one(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    before = dict(os.environ)
    output = tmp_path_factory.mktemp("one") / "run"
    run_here(llama, data, output, **STEPS)
    os.environ.clear()
    os.environ.update(before)
    return output


@pytest.fixture(scope="module")
def sharded(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two processes with FSDP, which accelerate itself started; rank-N.json beside it."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "watched.py").write_text(WATCHED)
    settings = [*settings_of(folder / "run", llama, data)[:-2], "lora_rank=4", *overrides(**STEPS)]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(fsdp(folder))]
    environ = environment(PYTHONPATH=str(TRAINER))
    command = [*accelerate, str(folder / "watched.py"), str(folder), *settings]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said, _ = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends the two that wait for each other
            raise
    assert process.returncode == 0, said
    assert said.count("one of 2 processes that a launcher started") == 1
    return folder / "run"


def result_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "result.json").read_text()))


def test_two_processes_with_half_the_base_each_learn_as_one(one: Path, sharded: Path, llama: Path) -> None:
    weights = sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    for rank in (0, 1):
        watched = json.loads((sharded.parent / f"rank-{rank}.json").read_text())
        assert watched["base"] == weights
        assert 0.45 * weights < watched["held"] < 0.55 * weights
        assert watched["learning"] == {
            name: list(tensor.shape) for name, tensor in load_file(next(one.glob("best/*/adapter.safetensors"))).items()
        }, "what learns is whole in each"
    assert result_of(sharded)["world_size"] == 2
    assert losses(sharded) == pytest.approx(losses(one), rel=1e-4)
    assert len(losses(sharded)) == 20
    assert result_of(sharded)["metrics"]["loss"] == pytest.approx(result_of(one)["metrics"]["loss"], rel=1e-4)


def test_what_a_sharded_run_leaves_is_what_any_run_leaves(one: Path, sharded: Path) -> None:
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-000020/adapter.safetensors"):
        ours, theirs = load_file(one / file), load_file(sharded / file)
        assert ours.keys() == theirs.keys()
        assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in ours)
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (one, sharded)]
    for config in configs:
        config["target_modules"].sort()  # a set, to peft
    assert configs[0] == configs[1]


@dataclass(slots=True)
class Chain:
    """A run that goes on, each time started otherwise. `homes`: a cache for each of two machines."""

    run: Path
    mirror: MirrorProcess
    settings: list[str]
    homes: tuple[str, str]

    def stopped(self, more: str, number: signal.Signals, last: str) -> tuple[int, str]:
        """(exit status, what it said) of a command that is sent a signal when it says `last`."""
        with started(*self.settings, more, HF_HOME=self.homes[0]) as process:
            before = read_to(process, last)
            process.send_signal(number)
            after, _ = process.communicate(timeout=100)
        return process.returncode, before + after


@pytest.fixture(scope="module")
def begun(
    hub: HubProcess, llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Chain, int, str]]:
    """By `accelerate launch` with FSDP, as the recipe says, until SIGTERM; the base comes through a mirror."""
    folder = tmp_path_factory.mktemp("chain")
    hub.repo("lab/llama-of-two").commit({path.name: path for path in llama.iterdir()})
    settings = [*settings_of(folder / "run", "lab/llama-of-two", data)[:-2], "lora_rank=4", *overrides(**STEPS)]
    with MirrorProcess(folder / "mirror", [hub.url], [hub.cdn_host]) as mirror:
        homes = (str(folder / "first"), str(folder / "second"))
        chain = Chain(folder / "run", mirror, [*settings, "--use_mirror", mirror.url], homes)
        status, said = chain.stopped(f"accelerate_config={fsdp(folder)}", signal.SIGTERM, "step 4/20:")
        yield chain, status, said


@pytest.fixture(scope="module")
def gone_on(begun: tuple[Chain, int, str]) -> tuple[Chain, int, str]:
    """By this command, until Ctrl-C."""
    chain, _, _ = begun
    return (chain, *chain.stopped("processes=2", signal.SIGINT, "step 8/20:"))


def test_accelerate_starts_two_processes_that_stop_on_sigterm(begun: tuple[Chain, int, str]) -> None:
    chain, status, said = begun
    assert status == 143, said
    assert said.count("the same command goes on from here") == 1
    assert f"2 processes, by accelerate launch and {chain.run.parent}" in said
    assert fetched(chain.mirror) == 1


def test_two_processes_go_on_and_stop_on_ctrl_c(gone_on: tuple[Chain, int, str]) -> None:
    chain, status, said = gone_on
    assert status == 130, said
    assert said.count("continued from step") == 1
    assert fetched(chain.mirror) == 1


def test_two_machines_go_on_and_the_losses_are_those_of_one_go_to_the_bit(
    gone_on: tuple[Chain, int, str], sharded: Path
) -> None:
    """A torchrun each, as Slurm or Kubernetes starts them; each fetches the base once."""
    chain, _, _ = gone_on
    port = free_port()
    machines = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"),
                *("--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"),
                *("-m", "neartune", "train", *chain.settings),
            ],
            env=environment(PYTHONPATH=str(TRAINER), HF_HOME=chain.homes[rank]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [machine.communicate(timeout=100)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "".join(said)
    assert fetched(chain.mirror) == 2
    assert "continued from step" in said[0]
    assert "step" not in said[1], "only the first process speaks"
    assert result_of(chain.run)["world_size"] == 2
    assert losses(chain.run) == losses(sharded)
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (chain.run, sharded))
    assert all(ours[name].equal(theirs[name]) for name in ours)


def fetched(mirror: MirrorProcess) -> int:
    """How often the mirror sent the weights."""
    assert mirror.log is not None
    return len([line for line in mirror.log.read_text().splitlines() if "GET" in line and "model.safetensors" in line])


def test_a_sharded_base_out_of_memory_is_the_end(llama: Path, tmp_path: Path) -> None:
    from neartune.loop import OutOfMemory, Trainer

    trainer = Trainer(None, None, None, None, None, None, 4, is_sharded=True)  # type: ignore[arg-type]
    with pytest.raises(OutOfMemory, match="a smaller micro_batch_size"):
        trainer.refuse_short()
    trainer.is_sharded = False
    trainer.refuse_short()


def test_layers_that_are_not_there_cannot_be_sharded_by(llama: Path, tmp_path: Path) -> None:
    import torch

    from neartune import tasks

    asked = recipe_of(llama, write_jsonl(tmp_path / "r.jsonl", FACTS), tmp_path)
    precision = model.choose_precision("fp32", is_cuda=False, has_bf16=False)
    adapted = model.build(asked, tasks.find(asked.task), llama, (), precision, lambda line: None)
    sharding = Sharding.of({"FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block,BertLayer", "FSDP_RESHARD_AFTER_FORWARD": "false"})
    assert sharding == Sharding(("GPT2Block", "BertLayer"), is_resharded=False)
    with pytest.raises(model.ModelError, match="no layers called BertLayer, GPT2Block"):
        model.shard(adapted, torch.device("cpu"), sharding)


# — the examples in deploy/ ——————————————————————————————————————————————————————————————————————


DEPLOY = ROOT / "deploy"
SLURM = DEPLOY / "slurm-train.sh"


def check_command(words: list[str]) -> None:
    """What stands after `neartune`, by our own parser; its settings by the recipe's keys."""
    parsed, more = cli._parser("neartune", None).parse_known_args(words)
    assert parsed.verb == "train"
    assert not [word for word in more if word.startswith("-")]
    for setting in [*parsed.overrides, *more]:
        assert setting.partition("=")[0] in recipe.FIELDS, setting


def test_the_kubernetes_examples_say_what_this_version_understands() -> None:
    for name in ("kubernetes-train.yaml", "kubernetes-train-nodes.yaml"):
        documents = list(yaml.safe_load_all((DEPLOY / name).read_text()))
        jobs = [document for document in documents if document["kind"] == "Job"]
        assert len(jobs) == 1
        pod = jobs[0]["spec"]["template"]["spec"]
        container = pod["containers"][0]
        words = container["command"]
        check_command(words[words.index("neartune") + 1 :])
        environ = {variable["name"]: variable["value"] for variable in container["env"]}
        assert environ["HF_ENDPOINT"].startswith("http://")
        grace = int(environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 0))
        assert grace < pod["terminationGracePeriodSeconds"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        for document in documents:
            if document["kind"] == "ConfigMap":
                settings = yaml.safe_load(document["data"]["recipe.yaml"])
                assert settings.keys() <= recipe.FIELDS.keys()
                gpus = container["resources"]["limits"]["nvidia.com/gpu"]
                assert settings["train_batch_size"] % gpus == 0


def test_exit_statuses_that_fail_the_kubernetes_job_at_once_are_those_that_another_try_would_not_mend() -> None:
    job = next(d for d in yaml.safe_load_all((DEPLOY / "kubernetes-train.yaml").read_text()) if d["kind"] == "Job")
    rules = [rule["onExitCodes"] for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert rules == [{"containerName": "train", "operator": "In", "values": [2, 4, 5]}]
    assert job["spec"]["backoffLimit"] > 1


FAKES = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && echo node-a && echo node-b; true',
    "scancel": 'echo "scancel $*" >> "$CALLS"; kill -TERM "$(cat "$CALLS.pid")"',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; export SLURM_NODEID=1; exec "$@"',
    "torchrun": 'echo $$ > "$CALLS.pid"; printf "%s\\n" "$@" > "$CALLS.words"; echo runs; exec "$PYTHON" -c "$BODY"',
}
WAITS = "import signal\nsignal.signal(signal.SIGTERM, lambda n, f: exit(1))\nsignal.pause()"


@pytest.fixture
def slurm(tmp_path: Path) -> Mapping[str, str]:
    """Slurm's commands and torchrun, which note what they were told."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return environment(**job, PATH=path, CALLS=str(tmp_path / "calls"), PYTHON=sys.executable)


def test_the_slurm_example_starts_torchrun_on_each_machine_with_a_command_of_ours(
    slurm: Mapping[str, str], tmp_path: Path
) -> None:
    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
    command = ["bash", str(SLURM), "my recipe.yaml", "max_steps=9"]
    done = subprocess.run(command, env={**slurm, "BODY": "exit(3)"}, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    words = (tmp_path / "calls.words").read_text().splitlines()
    assert {"--nnodes=2", "--node-rank=1", "--nproc-per-node=4", "--master-addr=node-a", "--master-port=20007"} <= {*words}
    ours = words[words.index("neartune") + 1 :]
    assert ours == ["train", "--config", "my recipe.yaml", "--use_mirror", "http://mirror:8090", "max_steps=9"]
    check_command(ours)
    assert "requeue" not in (tmp_path / "calls").read_text(), "a failure is not tried again"


def test_the_slurm_example_goes_back_into_the_queue_when_its_time_is_up(slurm: Mapping[str, str], tmp_path: Path) -> None:
    command = ["bash", str(SLURM), "recipe.yaml"]
    process = subprocess.Popen(command, env={**slurm, "BODY": f"print('waits', flush=True)\n{WAITS}"}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(2)] == [b"runs", b"waits"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-2:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]


def test_slurm_lets_processes_finish_before_its_own_time_is_up() -> None:
    text = SLURM.read_text()
    warned = re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.MULTILINE)
    grace = re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", text, re.MULTILINE)
    assert warned is not None and grace is not None
    assert int(grace[1]) < int(warned[1])
    assert "#SBATCH --requeue" in text
