"""Recipe: what a run is to do, from a YAML file and `key=value` on the command line; validated before anything is fetched.

Every fault is one line that names the file and line (or the flag), the value, what is allowed, and the nearest valid name; all
of them are told at once. Nothing heavy is imported here: a wrong recipe is told of within a blink.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neartune import launch, pins, units, yaml12

TASKS = ("text-generation", "text-classification", "token-classification", "image-classification")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SCHEDULES = ("cosine", "linear", "constant")
LORA_INITS = ("default", "pissa", "olora")
CUT_BY = ("rows", "tokens")
REPORTERS = ("tensorboard", "wandb", "mlflow")
DEFAULT_MIRROR = "http://127.0.0.1:8090"
PATH_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")

_COMMAND_LINE = "command line"


def without_user(text: str) -> str:
    """URLs in `text` as they may be shown and kept: without a user's name and password."""
    return re.sub(r"(?<=://)[^/?#\s]*@", "", text)


class RecipeError(Exception):
    """The recipe cannot be used; `complaints` are lines for the user."""

    def __init__(self, complaints: Sequence[str]) -> None:
        self.complaints = tuple(map(without_user, complaints))
        super().__init__("\n".join(self.complaints))


class _Bad(ValueError):
    """What is allowed instead of the value."""


@dataclass(frozen=True, slots=True)
class Source:
    """One source of rows: a local path, or the id of a dataset on the Hub. `weight`: its share against the other sources."""

    name: str
    is_path: bool
    weight: float = 1.0


# — how values are read ——————————————————————————————————————————————————————————————————————————


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Bad("text")
    return value.strip()


def _maybe(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Bad("true or false")
    return value


def _number(least: float, most: float = math.inf, *, above: bool = False) -> Callable[[Any], float]:
    allowed = f"a number {'above' if above else 'from'} {least:g}" + (f" to {most:g}" if most < math.inf else "")

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _Bad(allowed)
        if not least <= value <= most or (above and value == least):
            raise _Bad(allowed)
        return float(value)

    return read


def _count(least: int, most: int = 2**31) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _Bad(f"a whole number from {least}" + (f" to {most}" if most < 2**31 else ""))
        return value

    return read


def _auto_or(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def either(value: Any) -> Any:
        if value == "auto":
            return value
        try:
            return read(value)
        except _Bad as exc:
            raise _Bad(f"auto, or {exc}") from None

    return either


def _one_of(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value in words:
            return str(value)
        near = difflib.get_close_matches(str(value), words, 1)
        raise _Bad(f"one of {', '.join(words)}" + (f"; did you mean {near[0]}?" if near else ""))

    return read


def _words(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise _Bad("a word or a list of words")
    return tuple(items)


def _targets(value: Any) -> tuple[str, ...]:
    words = _words(value)
    if not words:
        raise _Bad("auto, all-linear, or names or patterns of modules")
    return words


def _reporters(value: Any) -> tuple[str, ...]:
    return tuple(_one_of(*REPORTERS)(word) for word in (() if value in (None, "none") else _words(value)))


def _pattern(read: Callable[[Any], Any]) -> Callable[[Any], tuple[tuple[str, Any], ...]]:
    """A map whose keys peft matches with the ends of modules' names."""

    def each(key: Any, number: Any) -> tuple[str, Any]:
        try:
            for text in (key, f"({key})"):
                re.compile(text)
            return key, read(number)
        except (re.error, TypeError) as exc:
            raise _Bad(f"a map of patterns, and {key!r} is no regular expression: {exc}") from None
        except _Bad as exc:
            raise _Bad(f"a map of module pattern: {exc}") from None

    def read_map(value: Any) -> tuple[tuple[str, Any], ...]:
        if not isinstance(value, dict):
            raise _Bad("a map of module pattern: number")
        return tuple(each(key, number) for key, number in value.items())

    return read_map


def _rank(value: Any) -> int:
    """4.0, which records hold, is 4."""
    return _count(1, 4096)(int(value) if isinstance(value, float) and value.is_integer() else value)


def _bytes(value: Any) -> int:
    try:
        return units.parse_size(value if isinstance(value, str) else "")
    except ValueError as exc:
        raise _Bad(str(exc)) from None


def _data(value: Any) -> tuple[Any, ...]:
    """Names, or {path, weight}; resolved against the file's directory later."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise _Bad("at least one source")
    found = []
    for item in items:
        if isinstance(item, dict):
            strange = set(item) - {"path", "weight"}
            if strange or "path" not in item:
                raise _Bad("a path or dataset id, or {path: …, weight: …}")
            found.append((_text(item["path"]), _number(0, above=True)(item.get("weight", 1.0))))
        else:
            found.append((_text(item), 1.0))
    return tuple(found)


def _key(default: Any, read: Callable[[Any], Any], doc: str, **schema: Any) -> Any:
    metadata = {"read": read, "doc": doc, "schema": schema}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


_REQUIRED = dataclasses.MISSING
_RUN = Path("run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All settings of a run. Paths are absolute; `auto` is decided later, from the data, the model and the machine."""

    base_model: str = _key(_REQUIRED, _text, "Model to adapt: a Hub id, or a directory.", type="string")
    train_data: tuple[Source, ...] = _key(
        _REQUIRED, _data, "Rows to learn from: a file, a directory, a dataset's id, or a list of these with weights."
    )
    revision: str = _key("main", _text, "Branch, tag or commit of the base; pinned to its commit when fetched.", type="string")
    task: str = _key("text-generation", _one_of(*TASKS), "What the model is to do.", enum=TASKS)
    validation_data: tuple[Source, ...] | None = _key(None, _maybe(_data), "Rows to judge by; else a split of train_data.")
    validation_split: float = _key(0.1, _number(0, 0.5), "Share of train_data that is held out.", type="number")
    output_dir: Path = _key(_RUN, _text, "Directory of the run; the same command on it resumes.", type="string")  # noqa: RUF009
    max_length: int | str = _key("auto", _auto_or(_count(8)), "Tokens a row; auto: the smaller of the model's and the data's.")

    lora_rank: int = _key(16, _count(1, 4096), "Rank of the adapter; 16 to 64 suit text generation.", type="integer")
    lora_alpha: float | str = _key("auto", _auto_or(_number(0, above=True)), "Scale; auto: twice the rank.")
    lora_dropout: float = _key(0.05, _number(0, 0.9), "Dropout before the adapter.", type="number")
    lora_targets: tuple[str, ...] = _key(("auto",), _targets, "auto, all-linear, or names or patterns of modules.")
    lora_init: str = _key("default", _one_of(*LORA_INITS), "How the adapter begins.", enum=LORA_INITS)
    rslora: bool = _key(False, _flag, "Scale by 1/sqrt(rank).", type="boolean")
    dora: bool = _key(False, _flag, "Weight-decomposed adapter.", type="boolean")
    loraplus_ratio: float | None = _key(None, _maybe(_number(1)), "LoRA+: learning rate of B over that of A.")
    rank_pattern: tuple[tuple[str, int], ...] = _key((), _pattern(_rank), "Ranks of single modules.", type="object")
    alpha_pattern: tuple[tuple[str, float], ...] = _key(
        (), _pattern(_number(0, above=True)), "Alphas of single modules.", type="object"
    )
    new_tokens: tuple[str, ...] = _key((), _words, "Tokens to add to the vocabulary and learn.")
    load_in_4bit: bool = _key(False, _flag, "QLoRA: the base in 4 bits (CUDA and bitsandbytes).", type="boolean")

    train_batch_size: int = _key(16, _count(1), "Rows a step, whatever fits in memory.", type="integer")
    micro_batch_size: int | str = _key("auto", _auto_or(_count(1)), "Rows (or tokens) at once; auto: measured.")
    micro_batch_by: str = _key("rows", _one_of(*CUT_BY), "What micro_batch_size counts: rows, or padded tokens.", enum=CUT_BY)
    group_by_length: bool = _key(False, _flag, "Rows of a step are of like length.", type="boolean")
    memory_limit: int | str = _key("auto", _auto_or(_bytes), "Memory that the measurement may use on a CPU.")
    learning_rate: float = _key(3e-4, _number(0, 1, above=True), "Peak learning rate.", type="number")
    schedule: str = _key("cosine", _one_of(*SCHEDULES), "How the learning rate falls.", enum=SCHEDULES)
    warmup: float = _key(0.03, _number(0), "Below 1 a share of the steps, else steps.", type="number")
    weight_decay: float = _key(0.0, _number(0, 1), "Of the adapter's matrices.", type="number")
    max_grad_norm: float = _key(1.0, _number(0, above=True), "Gradients are clipped to this norm.", type="number")
    max_steps: int | None = _key(None, _maybe(_count(1)), "Steps; or say epochs.")
    epochs: float | None = _key(None, _maybe(_number(0, above=True)), "Passes over the data; 3 if max_steps is not given.")
    eval_every: int | str = _key("auto", _auto_or(_count(1)), "Steps between evaluations; auto: a twentieth.")
    early_stopping_patience: int = _key(5, _count(0), "Evaluations without progress before it stops; 0: never.", type="integer")
    early_stopping_min_delta: float = _key(0.0, _number(0), "Progress smaller than this is none.", type="number")
    precision: str = _key("auto", _one_of(*PRECISIONS), "auto: bf16 where the hardware has it.", enum=PRECISIONS)
    gradient_checkpointing: bool = _key(False, _flag, "Less memory, more time.", type="boolean")
    packing: bool = _key(False, _flag, "Several rows in one sequence; only where they do not see each other.", type="boolean")
    compile: bool = _key(False, _flag, "torch.compile.", type="boolean")
    processes: int | str = _key("auto", _auto_or(_count(1, 1024)), "Processes; auto: one a GPU.")
    accelerate_config: Path | None = _key(None, _maybe(_text), "`accelerate config`'s file: FSDP, machines.", type="string")  # noqa: RUF009
    seed: int = _key(42, _count(0), "Of everything random.", type="integer")
    trust_remote_code: bool = _key(False, _flag, "Refused: code of a repo never runs here.", type="boolean")
    lock: Path | None = _key(  # noqa: RUF009
        None,
        _maybe(_text),
        "hf.lock that base and datasets must fit; default: one beside this file.",
        type=["string", "null"],
    )
    mirror: str | None = _key(None, _maybe(_text), "Hub endpoint to fetch from, such as http://mirror:8090.", type="string")
    report_to: tuple[str, ...] = _key((), _reporters, "tensorboard, wandb, mlflow; metrics.jsonl is always written.")
    panel: bool = _key(True, _flag, "A live panel where the output is a terminal; else plain lines.", type="boolean")
    prompts: tuple[str, ...] = _key((), _words, "Prompts answered at each evaluation, base beside adapter.")

    @property
    def alpha(self) -> float:
        return 2.0 * self.lora_rank if self.lora_alpha == "auto" else float(self.lora_alpha)


FIELDS = {f.name: f for f in dataclasses.fields(Recipe)}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid recipe; where each value came from (`config.yaml:12`, `command line`, `default`); and advice, a line each."""

    recipe: Recipe
    origins: Mapping[str, str]
    advice: tuple[str, ...]


def load(file: Path | None, overrides: Sequence[str] = (), *, base: Path | None = None, text: str | None = None) -> Loaded:
    """Read `file` and `key=value` overrides. Raises RecipeError with every complaint. `base`: of overrides' relative paths;
    `text`: what is taken to stand in `file`, which need not be there."""
    complaints: list[str] = []
    given: dict[str, tuple[Any, str, Path]] = {}
    is_read = file is None or _read_file(file, text, given, complaints)
    _read_overrides(overrides, (base or Path.cwd()), given, complaints)
    for key, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if key in given and other in given and given[key][1] == _COMMAND_LINE != given[other][1]:
            del given[other]  # two words for one thing: the command line's overrides the file's
    if file is not None and "lock" not in given and (file.parent / pins.FILE).is_file():
        given["lock"] = (pins.FILE, f"{file.parent / pins.FILE}", file.parent.absolute())
    values: dict[str, Any] = {}
    for key, (value, where, directory) in given.items():
        _read_value(key, value, where, directory, values, complaints)
    for key, spec in FIELDS.items():
        is_required = spec.default is _REQUIRED
        if is_required and key not in given and is_read:
            complaints.append(f"{file or _COMMAND_LINE}: {key} is missing: {spec.metadata['doc']}")
    complaints += _contradictions(values, {key: where for key, (_, where, _) in given.items()})
    if complaints:
        raise RecipeError(complaints)
    directory = file.parent.absolute() if file is not None else (base or Path.cwd())
    values.setdefault("output_dir", directory / "run")
    recipe = Recipe(**values)
    origins = {key: given[key][1] if key in given else "default" for key in FIELDS}
    return Loaded(recipe, origins, tuple(_advice(recipe)))


def _read_file(file: Path, text: str | None, given: dict[str, tuple[Any, str, Path]], complaints: list[str]) -> bool:
    """Whether it could be read."""
    try:
        text = file.read_text(encoding="utf-8") if text is None else text
    except FileNotFoundError:
        complaints.append(f"{file}: there is no such file")
        return False
    except (OSError, UnicodeDecodeError) as exc:
        complaints.append(f"{file}: cannot be read: {exc}")
        return False
    try:
        items = yaml12.parse_map(text)
    except yaml12.YamlError as exc:
        complaints.append(f"{file}:{exc.line}: {exc.message}")
        return False
    for key, item in items.items():
        where = f"{file}:{item.line}"
        if key not in FIELDS:
            complaints.append(f"{where}: {_unknown(key)}")
        else:
            given[key] = (item.value, where, file.parent.absolute())
    return True


def _read_overrides(
    overrides: Sequence[str], base: Path, given: dict[str, tuple[Any, str, Path]], complaints: list[str]
) -> None:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            complaints.append(f"{_COMMAND_LINE}: {override!r} is no key=value")
        elif key not in FIELDS:
            complaints.append(f"{_COMMAND_LINE}: {_unknown(key)}")
        else:
            try:
                given[key] = (yaml12.parse_scalar(text), _COMMAND_LINE, base)
            except yaml12.YamlError as exc:
                complaints.append(f"{_COMMAND_LINE}: {key}={text}: {exc.message}")


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, FIELDS, 1, 0.5)
    return f"there is no setting {key!r}" + (f"; did you mean {near[0]}?" if near else "")


def _read_value(key: str, value: Any, where: str, directory: Path, values: dict[str, Any], complaints: list[str]) -> None:
    try:
        read = FIELDS[key].metadata["read"](value)
    except _Bad as exc:
        complaints.append(f"{where}: {key} is {_shown(value)}; it must be {exc}")
        return
    if key == "output_dir":
        read = _located(read, directory)
    elif key == "accelerate_config" and read is not None:
        read = _located(read, directory)
        try:
            launch.read_accelerate(read)
        except launch.LaunchError as exc:
            complaints.append(f"{where}: {key}: {exc}")
            return
    elif key == "lock" and read is not None:
        read = _located(read, directory)
        try:
            pins.read(read)
        except pins.LockError as exc:
            complaints.append(f"{where}: {key}: {exc}")
            return
    elif key == "base_model" and is_path(read, directory):
        read = str(_located(read, directory))
        if not Path(read).is_dir():
            complaints.append(f"{where}: base_model is {_shown(value)}: there is no directory {read}")
    elif key in ("train_data", "validation_data") and read is not None:
        read = tuple(_source(name, weight, directory) for name, weight in read)
        complaints += [
            f"{where}: {key} is {source.name!r}: there is no such file or directory"
            for source in read
            if source.is_path and not Path(source.name).exists()
        ]
    values[key] = read


def _source(name: str, weight: float, directory: Path) -> Source:
    if is_path(name, directory):
        return Source(str(_located(name, directory)), True, weight)
    return Source(name, False, weight)


def is_path(name: str, directory: Path) -> bool:
    """A value is a path if it starts like one, ends in a known suffix, or exists; else it is the id of something on the Hub."""
    if name.startswith((".", "/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", name) or name.lower().endswith(PATH_SUFFIXES):
        return True
    return _located(name, directory).exists()


def _located(name: str, directory: Path) -> Path:
    return (directory / Path(name).expanduser()).absolute()


def _contradictions(values: Mapping[str, Any], where: Mapping[str, str]) -> list[str]:
    """Values that are right each by itself and cannot be together, and what is refused whatever stands beside it."""
    found = []

    def value(key: str) -> Any:
        return values.get(key, FIELDS[key].default)

    def complain(keys: str, text: str) -> None:
        """Of the first of `keys`. One that could not be read was complained of already, and says nothing here."""
        names = keys.split()
        if all(name in values or name not in where for name in names):
            found.append(f"{where.get(names[0], 'default')}: {names[0]}: {text}")

    if value("trust_remote_code"):
        complain("trust_remote_code", "code of a repo never runs here: whoever can write to the repo would own this machine")
    for name in value("report_to"):
        if not _is_installed(name):
            complain("report_to", f"{name} is not installed: pip install {name}")
    if value("max_steps") is not None and value("epochs") is not None:
        complain("epochs max_steps", "max_steps is given too: say one of them")
    batch, processes, micro = value("train_batch_size"), value("processes"), value("micro_batch_size")
    if processes != "auto" and batch % processes:
        complain("train_batch_size processes", f"{batch} rows a step cannot be shared by {processes} processes equally")
    if value("accelerate_config"):
        config = launch.read_accelerate(value("accelerate_config"))
        if config.processes is not None and processes not in ("auto", config.processes):
            complain("processes accelerate_config", f"it is {processes}, and {config.file.name} says {config.processes}")
        if config.processes is not None and batch % config.processes:
            complain("train_batch_size", f"{batch} rows a step cannot be shared by {config.processes} processes equally")
        for key, text in launch.sharding_complaints({name: value(name) for name in FIELDS}) if config.is_sharded else ():
            complain(f"{key} accelerate_config", text)
    if micro != "auto" and micro > batch and value("micro_batch_by") == "rows":
        complain("micro_batch_size train_batch_size micro_batch_by", f"{micro} is more than train_batch_size, {batch}")
    has_none = value("validation_data") is None and value("validation_split") == 0
    # The default stands in the recipe.yaml of every run, and asks for nothing.
    if has_none and value("early_stopping_patience") not in (0, FIELDS["early_stopping_patience"].default):
        complain(
            "early_stopping_patience validation_data validation_split",
            "there is nothing to judge by: neither validation_split nor validation_data",
        )
    if value("task") == "image-classification":
        for key in ("micro_batch_by", "group_by_length"):
            if value(key) not in ("rows", False):
                complain(f"{key} task", "images are all of one size: it is for text")
    for key in ("new_tokens", "packing", "prompts"):
        if value(key) and value("task") != "text-generation":
            complain(f"{key} task", f"it is for text-generation, not for {value('task')}")
    if value("lora_init") != "default":
        if value("load_in_4bit"):
            complain("lora_init load_in_4bit", f"{value('lora_init')} cannot take weights apart that are in 4 bits")
        if value("dora"):
            complain("lora_init dora", f"{value('lora_init')} cannot be combined with dora")
        if value("rank_pattern") or value("alpha_pattern"):
            complain("lora_init rank_pattern alpha_pattern", "it cannot be made plain LoRA with rank_pattern or alpha_pattern")
    return found


def _is_installed(package: str) -> bool:
    """Without importing it. A folder of that name, such as W&B leaves where one stands, has no origin and is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _advice(recipe: Recipe) -> list[str]:
    """A line where a value is outside what is commonly advised. Never an error."""
    lines = []
    if recipe.task == "text-generation" and not 16 <= recipe.lora_rank <= 64:
        lines.append(f"lora_rank is {recipe.lora_rank}: 16 to 64 is the usual range for text generation")
    return lines


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, before, now) of every leaf that is not the same."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def schema() -> dict[str, Any]:
    """A JSON schema for editors."""
    properties = {}
    for key, spec in FIELDS.items():
        entry: dict[str, Any] = {"description": spec.metadata["doc"]}
        entry |= {name: list(value) if isinstance(value, tuple) else value for name, value in spec.metadata["schema"].items()}
        default = spec.default
        if default is not _REQUIRED and default is not None and not isinstance(default, Path):
            entry["default"] = list(default) if isinstance(default, tuple) else default
        properties[key] = entry
    required = [key for key, spec in FIELDS.items() if spec.default is _REQUIRED]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "neartune recipe",
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": properties,
    }


def public(recipe: Recipe) -> Recipe:
    """As it may be shown and kept."""
    return dataclasses.replace(recipe, mirror=recipe.mirror and without_user(recipe.mirror))


def plain(recipe: Recipe) -> dict[str, Any]:
    """For JSON and YAML."""
    shown = dataclasses.asdict(public(recipe))
    return {name: str(value) if isinstance(value, Path) else value for name, value in shown.items()}


def as_yaml(recipe: Recipe) -> str:
    """JSON values are YAML 1.2."""
    sources = {"train_data": recipe.train_data, "validation_data": recipe.validation_data}
    settings = plain(recipe) | {"lock": None}  # a file of another place; what was used is in run.json, commit and hashes
    for name, value in sources.items():
        settings[name] = None if value is None else [{"path": source.name, "weight": source.weight} for source in value]
    if isinstance(recipe.memory_limit, int):
        settings["memory_limit"] = f"{recipe.memory_limit}B"
    settings["rank_pattern"], settings["alpha_pattern"] = dict(recipe.rank_pattern), dict(recipe.alpha_pattern)
    return "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items())
