"""Read the settings of a run from the file of a user: a shell script, a YAML file, or for TRL a Python script."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.config.mistakes.synonyms import Framework
from rlhf.config.yaml_tree import from_yaml, read_file
from rlhf.converting.rules import zero_stage
from rlhf.converting.shell import commands
from rlhf.errors import UserError

MAX_MIB = 1
_COMMAND: dict[Framework, str] = {  # a word that names the trainer
    "verl": r"(?:^|[./])(main_\w+|\w*sft_trainer\w*)(?:\.py)?$",
    "openrlhf": r"(?:^|[./])train_(\w+?)(?:_ray)?(?:\.py)?$",
    "trl": r"(?:^|[./])(\w+)\.py$|^trl\.scripts\.(\w+)$",
}
METHODS: dict[Framework, tuple[str, ...]] = {
    "verl": ("rl", "sft"),
    "openrlhf": ("ppo", "sft", "dpo", "rm", "kto", "kd", "prm"),
    "trl": ("grpo", "rloo", "sft", "dpo", "reward", "kto", "ppo", "bco", "prm", "cpo", "orpo", "tpo"),
}
_REFERENCE = r"\$\{[^{}]*[.:][^{}]*\}|\?\?\?"  # to another setting, or a missing value, in a file of Hydra
_LORA = {"r": "lora_r", "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save"}
_LOADED = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
_ARGUMENTS = {"model": "model_name_or_path", "reward_funcs": "reward_funcs", "reward_model": "reward_model_path"}


@dataclass(frozen=True, slots=True)
class Source:
    """Hold the settings as written, by the names of the framework."""

    method: str | None  # the trainer, in the framework's word; None: the file does not say
    settings: dict[str, Any]
    gpus: int | None = None  # processes that the launcher starts; None: the file does not say
    unread: dict[str, str] = field(default_factory=dict)  # settings without a value, with the reason
    zero_stage: int | None = None
    has_branches: bool = False  # a script with `if` or `case`, of which all branches are read


def read_source(path: Path, framework: Framework) -> Source:
    """Read a file. UserError: no file, no run of the framework in the file, or a file of an unknown kind."""
    if path.suffix in (".yaml", ".yml"):
        values = read_file(path, needs=f"the settings of a run of {framework}").values
        of_verl = "rl" if {"actor_rollout_ref", "algorithm"} & values.keys() else "sft"
        return Source(of_verl if framework == "verl" else None, dict(_flat(values, framework)))
    try:
        text = path.read_bytes()[: MAX_MIB * 2**20].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if path.suffix == ".py" and framework == "trl":
        return _python(path, text)
    found = [source for words in commands(text) if (source := _command(words, framework, path)) is not None]
    if not found:
        kinds = "a YAML file, or a shell script with the command" + (", or a Python script" * (framework == "trl"))
        raise UserError(f"{path}: no command that starts {framework}; `rlhf convert --from {framework}` reads {kinds}")
    return replace(found[0], has_branches=re.search(r"^\s*(?:if|case)\s", text, re.MULTILINE) is not None)


def _command(words: list[str], framework: Framework, path: Path) -> Source | None:
    at, method = -1, None
    for index, word in enumerate(words):
        match = re.search(_COMMAND[framework], word)
        if match or (framework == "trl" and word in METHODS["trl"] and index and words[index - 1].endswith("trl")):
            name = next(filter(None, match.groups())) if match else word
            method = name if framework != "trl" else {"gspo": "grpo"}.get(name, name.partition("_")[0])
            at = index
            break
    if at < 0:
        return None
    flags, rest = _flags(words[:at]), words[at + 1 :]
    launcher = {name: given[0] if isinstance(given, list) else given for name, given in flags.items()}
    counts = [launcher.get(name) for name in ("num_processes", "nproc_per_node", "num_gpus")]
    gpus = next((count for count in counts if type(count) is int), None)
    nodes = launcher.get("nnodes", launcher.get("num_nodes"))
    if gpus and type(nodes) is int and "num_processes" not in launcher:  # accelerate counts all nodes together
        gpus *= nodes
    if framework == "verl":
        pairs = [
            word.lstrip("+~").partition("=") for word in rest if "=" in word and not word.startswith(("-", "hydra."))
        ]
        named = {key.removeprefix("actor_rollout_ref."): _scalar(value) for key, _, value in pairs}
        return Source("sft" if "sft" in str(method) else "rl", dict(_flat(named, framework)), gpus)
    settings = _flags(rest)
    file = settings.pop("config", None) if framework == "trl" else None
    if isinstance(file, str):
        found = next((place for place in (path.parent / file, Path(file)) if place.is_file()), None)
        if found is None:
            raise UserError(f"{path}: the command reads --config {file}, and there is no such file beside the script")
        settings = dict(_flat(read_file(found, needs="settings").values, framework)) | settings
    known = method if method in METHODS[framework] else None
    launch = settings.pop("accelerate_config", None) or launcher.get("config_file")
    return _launched(Source(known, settings, gpus or settings.pop("num_processes", None)), launch, path)


def _launched(source: Source, launch: Any, path: Path) -> Source:
    """Add the processes and the stage of ZeRO in a configuration of accelerate, or the stage in the file's name."""
    number, gpus = zero_stage(launch), source.gpus
    file = next((place for place in (path.parent / str(launch), Path(str(launch))) if place.is_file()), None)
    if launch and file is not None:
        values = read_file(file, needs="a configuration of accelerate").values
        deepspeed, count = values.get("deepspeed_config") or {}, values.get("num_processes")
        number = deepspeed.get("zero_stage", number) if isinstance(deepspeed, dict) else number
        gpus = gpus or (count if isinstance(count, int) else None)
    return Source(source.method, source.settings, gpus, source.unread, number)


def _flags(words: list[str]) -> dict[str, Any]:
    """Return `--flag`, `--flag=value` and `--flag value ...` by name; a flag alone is true, `--no_x` is x: false."""
    values: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            name, equals, value = word[2:].partition("=")
            values[name.replace("-", "_")] = current = [value] if equals else []
            current = [] if equals else current
        elif word.strip(","):
            current.append(word.strip(","))
    parsed = {name: [_scalar(word) for word in given] for name, given in values.items()}
    flags = {name: given[0] if len(given) == 1 else given or True for name, given in parsed.items()}
    negated = {name for name, given in flags.items() if name.startswith("no_") and given is True}
    return {name.removeprefix("no_") if name in negated else name: given if name not in negated else False
            for name, given in flags.items()}  # fmt: skip


def _scalar(word: str) -> Any:
    try:
        return from_yaml(word)
    except UserError:
        return word


def _flat(values: Mapping[str, Any], framework: Framework, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield verl's settings by dotted names, without references between settings. Yield further settings unchanged."""
    for key, value in values.items():
        name = f"{at}{key}"
        if framework == "verl" and isinstance(value, dict) and value:
            if name not in ("hydra", "defaults"):
                yield from _flat(value, framework, f"{name}." if name != "actor_rollout_ref" else "")
        elif framework != "verl" or not (name in ("hydra", "defaults") or re.fullmatch(_REFERENCE, str(value))):
            yield name, value


def _python(path: Path, text: str) -> Source:
    """Return the literal keywords of XConfig(...), XTrainer(...), LoraConfig(...) and load_dataset(...) in a script."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: is not Python: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a null character, or brackets too deep
        raise UserError(f"{path}: is not Python: {error}") from None
    method, settings, unread = None, dict[str, Any](), dict[str, str]()
    constants = {
        target.id: node.value
        for node in tree.body if isinstance(node, ast.Assign)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    for node in ast.walk(tree):
        name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
        kind = re.fullmatch(r"(\w+)(Config|Trainer)", name)
        if not isinstance(node, ast.Call) or not (kind or name == "load_dataset"):
            continue
        if name == "load_dataset":
            loaded = dict(zip(("path", "name"), node.args, strict=False))
            loaded |= {str(word.arg): word.value for word in node.keywords}
            given = {_LOADED[arg]: value for arg, value in loaded.items() if arg in _LOADED}
            if isinstance(split := given.get("dataset_train_split"), ast.List) and split.elts:
                given["dataset_train_split"] = split.elts[0]
        elif name == "LoraConfig":
            given = {_LORA.get(str(word.arg), str(word.arg)): word.value for word in node.keywords}
            settings["use_peft"] = True
        elif kind and kind[1].lower() in METHODS["trl"]:
            method = kind[1].lower()
            words = {word.arg or f"**{ast.unparse(word.value)}": word.value for word in node.keywords}
            given = (
                words if kind[2] == "Config" else {_ARGUMENTS[arg]: words[arg] for arg in words if arg in _ARGUMENTS}
            )
        else:
            continue
        for key, value in given.items():
            value = constants.get(value.id, value) if isinstance(value, ast.Name) else value
            try:
                settings.setdefault(key, ast.literal_eval(value))
            except (ValueError, TypeError):
                if key == "reward_funcs":
                    items = value.elts if isinstance(value, ast.List) else [value]
                    settings[key] = [f"{path.name}:{ast.unparse(item)}" for item in items]
                else:
                    unread[key] = f"is {ast.unparse(value)[:60]}, which only Python can evaluate"
    if method is None:
        raise UserError(f"{path}: calls no Config and no Trainer of TRL, such as GRPOConfig(...)")
    return Source(method, settings, None, unread)
