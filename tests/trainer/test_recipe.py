"""Recipes: each complaint with its place, all at once, before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml

from neartune import recipe
from neartune.recipe import RecipeError, is_path, load, schema
from neartune.watch import reporters
from tests.trainer.bases import TRAINER, environment

RECIPES = sorted([TRAINER / "config.yaml", *(TRAINER / "configs").glob("*.yaml")])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path / "config.yaml"


def complaints(file: Path, text: str, *overrides: str) -> list[str]:
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load(file, overrides)
    return [line.replace(f"{file}", "F") for line in caught.value.complaints]


MINIMAL = "base_model: org/m\ntrain_data: rows.jsonl\n"


def test_defaults_and_paths_relative_to_the_file(file: Path) -> None:
    file.write_text(MINIMAL)
    loaded = load(file)
    got = loaded.recipe
    assert (got.base_model, got.lora_rank, got.alpha, got.learning_rate) == ("org/m", 16, 32.0, 3e-4)
    assert [source.name for source in got.train_data] == [str(file.parent / "rows.jsonl")]
    assert got.output_dir == file.parent / "run"
    assert loaded.origins["base_model"] == f"{file}:1"
    assert loaded.origins["seed"] == "default"


def test_all_faults_at_once_with_line_value_what_is_allowed_and_the_nearest_name(file: Path) -> None:
    got = complaints(
        file,
        "base_model: org/m\nlorarank: 8\nlearning_rate: fast\ntask: text-generatoin\ntrain_data: gone.jsonl\nseed: -1\n",
        "max_step=3",
        "nonsense",
    )
    assert got == [
        "F:2: there is no setting 'lorarank'; did you mean lora_rank?",
        "command line: there is no setting 'max_step'; did you mean max_steps?",
        "command line: 'nonsense' is no key=value",
        'F:3: learning_rate is "fast"; it must be a number above 0 to 1',
        'F:4: task is "text-generatoin"; it must be one of text-generation, text-classification, token-classification, '
        "image-classification; did you mean text-generation?",
        "F:5: train_data is 'gone.jsonl': there is no such file or directory".replace("'gone", f"'{file.parent}/gone"),
        "F:6: seed is -1; it must be a whole number from 0",
    ]


def test_what_is_missing_is_said_with_what_it_is(file: Path) -> None:
    assert [line.partition(": ")[2].split(":")[0] for line in complaints(file, "seed: 1\n")] == [
        "base_model is missing",
        "train_data is missing",
    ]


def test_a_file_that_cannot_be_read_is_one_complaint(file: Path) -> None:
    assert complaints(file, MINIMAL + "seed: 1\nseed: 2\n") == ["F:4: 'seed' is given twice, the first time on line 3"]
    with pytest.raises(RecipeError, match="there is no such file"):
        load(file.parent / "other.yaml")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("trust_remote_code: true", "F:3: trust_remote_code: code of a repo never runs here"),
        ("max_steps: 3\nepochs: 2", "F:4: epochs: max_steps is given too"),
        ("train_batch_size: 5\nprocesses: 2", "F:3: train_batch_size: 5 rows a step cannot be shared by 2 processes"),
        ("micro_batch_size: 32", "F:3: micro_batch_size: 32 is more than train_batch_size, 16"),
        ("validation_split: 0\nearly_stopping_patience: 3", "F:4: early_stopping_patience: there is nothing to judge by"),
        ("micro_batch_by: token", 'F:3: micro_batch_by is "token"; it must be one of rows, tokens; did you mean tokens?'),
        ("task: text-classification\npacking: true", "F:4: packing: it is for text-generation, not for text-classification"),
        ("task: image-classification\nmicro_batch_by: tokens", "F:4: micro_batch_by: images are all of one size"),
        ("task: image-classification\ngroup_by_length: true", "F:4: group_by_length: images are all of one size"),
        ("load_in_4bit: true\nlora_init: pissa", "F:4: lora_init: pissa cannot take weights apart that are in 4 bits"),
        ("report_to: [wandb]", "F:3: report_to: wandb is not installed: pip install wandb"),
        ("task: image-classification\nnew_tokens: [x]", "F:4: new_tokens: it is for text-generation"),
        ("task: text-classification\nprompts: [x]", "F:4: prompts: it is for text-generation"),
        ("dora: true\nlora_init: pissa", "F:4: lora_init: pissa cannot be combined with dora"),
        ("lora_init: olora\nrank_pattern: {q_proj: 4}", "F:3: lora_init: it cannot be made plain LoRA"),
        ("lora_rank: 0", "F:3: lora_rank is 0; it must be a whole number from 1 to 4096"),
        ("memory_limit: 12", "F:3: memory_limit is 12; it must be auto, or a size with a unit"),
        ("rslora: yes", 'F:3: rslora is "yes"; it must be true or false'),
        ("lora_targets: []", "F:3: lora_targets is []; it must be auto, all-linear, or names"),
        ("lora_targets: [1]", "F:3: lora_targets is [1]; it must be a word or a list of words"),
        ("rank_pattern: 3", "F:3: rank_pattern is 3; it must be a map"),
        ("rank_pattern: {q_proj: 4.5}", 'F:3: rank_pattern is {"q_proj": 4.5}; it must be a map of module pattern: a whole'),
        ("rank_pattern: {q_proj: -4}", "it must be a map of module pattern: a whole number from 1 to 4096"),
        ("rank_pattern: {'q_(proj': 4}", "it must be a map of patterns, and 'q_(proj' is no regular expression: missing )"),
        ("rank_pattern: {'q_proj)|(v_proj': 4}", "is no regular expression: unbalanced parenthesis"),
        ("rank_pattern: {'(?i)Q_PROJ': 4}", "is no regular expression: global flags not at the start"),
        ("alpha_pattern: {q_proj: 0}", 'F:3: alpha_pattern is {"q_proj": 0}; it must be a map of module pattern: a number ab'),
        ("mirror: ['http://reader:geheim@mirror']", 'F:3: mirror is ["http://mirror"]; it must be text'),
        ("validation_data: []", "F:3: validation_data is []; it must be at least one source"),
        ("validation_data: {file: x}", "F:3: validation_data is"),
        ("validation_split: 0.9", "F:3: validation_split is 0.9; it must be a number from 0 to 0.5"),
        ("mirror: ' '", 'F:3: mirror is " "; it must be text'),
        ("learning_rate: .nan", "F:3: learning_rate is"),
        ("max_length: 3", "F:3: max_length is 3; it must be auto, or a whole number from 8"),
        ("report_to: tensorbord", "did you mean tensorboard?"),
    ],
)
def test_complaints(file: Path, text: str, word: str) -> None:
    got = complaints(file, MINIMAL + text + "\n")
    assert len(got) == 1
    assert word in got[0]


def test_a_value_that_cannot_be_read_contradicts_nothing(file: Path) -> None:
    assert len(complaints(file, MINIMAL + "train_batch_size: x\nmicro_batch_size: 64\n")) == 1


def test_overrides_are_read_like_the_file_and_their_paths_are_relative_to_where_one_stands(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(MINIMAL)
    here = file.parent / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    got = load(file, ["output_dir=out", "lora_targets=[q_proj, v_proj]", "learning_rate=1e-4", "lora_rank=8"])
    assert got.recipe.output_dir == here / "out"
    assert got.recipe.lora_targets == ("q_proj", "v_proj")
    assert got.recipe.learning_rate == 1e-4
    assert got.advice == ("lora_rank is 8: 16 to 64 is the usual range for text generation",)
    assert got.origins["lora_rank"] == "command line"


def test_steps_on_the_command_line_override_epochs_in_the_file(file: Path) -> None:
    file.write_text(MINIMAL + "epochs: 3\n")
    assert (load(file, ["max_steps=7"]).recipe.max_steps, load(file, ["max_steps=7"]).recipe.epochs) == (7, None)
    file.write_text(MINIMAL + "max_steps: 3\n")
    assert (load(file, ["epochs=7"]).recipe.max_steps, load(file, ["epochs=7"]).recipe.epochs) == (None, 7)


def test_sources_with_weights(file: Path) -> None:
    file.write_text("base_model: org/m\ntrain_data:\n  - rows.jsonl\n  - {path: org/data, weight: 3}\n")
    first, second = load(file).recipe.train_data
    assert (first.is_path, first.weight) == (True, 1.0)
    assert (second.name, second.is_path, second.weight) == ("org/data", False, 3.0)


@pytest.mark.parametrize("name", ["./m", "/m", "~/m", "../m", "C:\\m", "d:/m", "rows.jsonl", "a/b.CSV", "x.parquet"])
def test_these_are_paths(name: str, tmp_path: Path) -> None:
    assert is_path(name, tmp_path)


def test_an_existing_directory_is_a_path_and_else_it_is_an_id(tmp_path: Path) -> None:
    assert not is_path("org/m", tmp_path)
    (tmp_path / "org" / "m").mkdir(parents=True)
    assert is_path("org/m", tmp_path)


def test_a_base_that_is_a_path_must_be_there(file: Path) -> None:
    assert "there is no directory" in complaints(file, "base_model: ./m\ntrain_data: rows.jsonl\n")[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_load_and_the_schema_accepts_them(path: Path) -> None:
    load(path)
    document = {key: item.value for key, item in recipe.yaml12.parse_map(path.read_text()).items()}
    jsonschema.validate(document, schema(), cls=jsonschema.Draft202012Validator)


def test_the_schema_names_every_setting_and_refuses_others() -> None:
    made = json.loads(json.dumps(schema()))
    assert made["required"] == ["base_model", "train_data"]
    assert made["properties"].keys() == recipe.FIELDS.keys()
    assert all(entry["description"] for entry in made["properties"].values())
    for wrong in ({"lorarank": 1}, {"lora_rank": "x"}, {"task": "x"}, {"rslora": "yes"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"base_model": "a", "train_data": "b", **wrong}, made, cls=jsonschema.Draft202012Validator)


def test_the_shipped_schema_is_the_generated_one() -> None:
    assert json.loads((TRAINER / "recipe.schema.json").read_text()) == json.loads(json.dumps(schema()))


def test_ranks_that_records_hold_as_4_0_are_whole(file: Path) -> None:
    file.write_text(MINIMAL + "rank_pattern: {q_proj: 4.0}\nalpha_pattern: {q_proj: 4.5}\n")
    got = load(file).recipe
    assert (got.rank_pattern, got.alpha_pattern) == ((("q_proj", 4),), (("q_proj", 4.5),))
    assert isinstance(got.rank_pattern[0][1], int)


def test_reporters_are_not_told_the_mirror_s_password(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    run = SimpleNamespace(info=SimpleNamespace(run_id="r"), log=None, finish=None)

    class Client(SimpleNamespace):
        get_experiment_by_name = create_experiment = staticmethod(lambda name: None)
        create_run = staticmethod(lambda experiment, run_name: run)
        log_batch = staticmethod(lambda run, params: told.append(params))

    entities = SimpleNamespace(Metric=None, Param=lambda name, value: (name, value))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: told.append(options["config"]) or run))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=Client))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    file.write_text(MINIMAL + "mirror: http://reader:geheim@mirror:8090\n")
    for name in ("wandb", "mlflow"):
        reporters.OPENERS[name](file.parent, load(file).recipe, 0)
    by_wandb, by_mlflow = told
    assert by_wandb["mirror"] == dict(by_mlflow)["mirror"] == "http://mirror:8090"
    assert "geheim" not in repr(told)


def test_plain_yaml_readers_see_the_same_keys() -> None:
    assert yaml.safe_load((TRAINER / "config.yaml").read_text()).keys() <= recipe.FIELDS.keys()


HEAVY = "{'torch', 'transformers', 'peft', 'accelerate', 'huggingface_hub', 'datasets', 'numpy', 'pyarrow'}"


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["train", "max_step=1"], 2), (["schema"], 0)])
def test_help_and_wrong_recipes_import_nothing_heavy(arguments: list[str], status: int) -> None:
    code = (
        "import sys\nfrom neartune.cli import main\ntry:\n    status = main(sys.argv[1:])\nexcept SystemExit as exc:\n"
        f"    status = exc.code\nassert not sys.modules.keys() & {HEAVY}, sys.modules.keys() & {HEAVY}\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment())
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize(
    "text", ["validation_split: 0", "memory_limit: 1.5GB", "rank_pattern: {q_proj: 4}\nlora_targets: [q_proj]", "max_steps: 7"]
)
def test_the_recipe_that_a_run_keeps_can_be_read_again(file: Path, text: str) -> None:
    file.write_text(MINIMAL + text + "\n")
    first = recipe.load(file).recipe
    file.write_text(recipe.as_yaml(first))
    assert recipe.load(file).recipe == first
