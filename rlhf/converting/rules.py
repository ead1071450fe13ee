"""Apply the rules of a framework (rules/FRAMEWORK.csv): a key of ours, its value, and when.

A value is an expression over the settings by their names, such as `data.train_batch_size * rollout.n`. `method` is the
trainer, `gpus` the number of GPUs or None, and `online` says whether the trainer samples responses. `written` says
whether the file has a setting; the first name of a row stands for all its names. A rule without a key names a setting
without a counterpart, with the reason, or a conversion with a difference.
"""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path, PurePosixPath
from types import CodeType
from typing import Any

from rlhf.converting.draft import NULL, Draft

NEVER = 1_000_000  # steps between checkpoints or evaluations that never come
_FAILURES = (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError, OverflowError)
_ONLINE = ("rl", "grpo", "rloo", "ppo")
_LOSSES = {"apo_zero_unpaired": "apo_zero", "bco_pair": "bco", "exo_pair": "exo", "nca_pair": "nca",
           "sppo_hard": "sppo", "aot_pair": "aot", "robust": "robust"}  # fmt: skip
BUILT_IN: dict[str, dict[str, Any]] = {  # reward functions of TRL
    "accuracy_reward": {"function": "math_answer"},
    "reasoning_accuracy_reward": {"function": "math_answer"},
    "think_format_reward": {"function": "format_regex", "args": {"pattern": r"<think>(?!.*<think>).*?</think>.*"}},
    "get_soft_overlong_punishment": {},
}


def apply_rules(draft: Draft) -> None:
    """Put the keys of all rules that hold, in the order of the file: a later rule replaces an earlier one."""
    namespace = {
        **{function.__name__: function for function in (folder_name, base, first, as_list, trackers, every,
           data_sets, training_sets, column, modules, parent_unless, own_name, zero_stage, reward_functions,
           preference_loss, kl_estimator)},
        "NEVER": NEVER, "NULL": NULL, "BUILT_IN": BUILT_IN, "method": draft.method, "gpus": draft.gpus,
        "online": draft.method in _ONLINE, "setting": draft, "key": draft.values.get,
        "written": lambda name: name in draft.written or name in draft.file, "updates": lambda: _updates(draft.values),
    }  # fmt: skip
    with (Path(__file__).parent / "rules" / f"{draft.framework}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            names: list[str] = []
            try:
                when, names = _compiled(row["when"] or "True", draft)
                if not eval(when, namespace):
                    continue
                value, of_value = _compiled(row["value"] or "None", draft)
                of_condition, names = names, of_value
                result = eval(value, namespace) if row["key"] else None
            except _FAILURES as error:
                text = f"the value cannot be converted to {row['key']} ({type(error).__name__}: {error})"
                for name in names:
                    draft.lack(name, text)
                continue
            if row["key"]:
                draft.put(row["key"], result, *of_condition, *of_value)
            elif row["value"]:
                draft.lack(row["value"], row["look"])
            else:
                draft.looks.append(row["look"])


class _Settings(ast.NodeTransformer):
    """Replace the names of settings by calls that read them."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.names = draft, list[str]()

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self._read(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._read(node)

    def _read(self, node: ast.Attribute | ast.Name) -> ast.AST:
        if (name := ast.unparse(node)) not in self.draft.rows:
            return self.generic_visit(node)
        self.names.append(name)
        return ast.Call(ast.Name("setting", ast.Load()), [ast.Constant(name)], [])


def _compiled(text: str, draft: Draft) -> tuple[CodeType, list[str]]:
    settings = _Settings(draft)
    tree = ast.fix_missing_locations(settings.visit(ast.parse(text, mode="eval")))
    return compile(tree, "rule", "eval"), settings.names


def folder_name(text: Any) -> str | None:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)).strip("-._")[:200] or None if text else None


def base(path: Any) -> str | None:
    """Return the last part of a path."""
    return PurePosixPath(str(path)).name or None if path else None


def parent_unless(path: Any, name: Any) -> str | None:
    """Return the folder of runs for a run's folder: the parent if the last part is the run's name."""
    if not path:
        return None
    whole = PurePosixPath(str(path))
    folder = whole.parent if whole.name == name else whole
    return None if str(folder) == "." else str(folder)


def first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def trackers(names: Any, project: Any) -> dict[str, Any] | None:
    keys = {"mlflow": "experiment", "swanlab": "project", "trackio": "project"}
    return {name: {keys[name]: project} if project else {} for name in as_list(names) if name in keys} or None


def every(value: Any, per_step: float = 1, steps: int | None = None) -> int | None:
    """Convert optimizer steps between two events, -1 for never, to steps of `per_step` optimizer steps. A value below 1
    is a share of the run's `steps`."""
    if value is None or (0 < value < 1 and steps is None):
        return None
    if 0 < value < 1:
        value, per_step = value * (steps or 1), 1
    between: int = max(round(value / per_step), 1)
    return between if value > 0 else NEVER


def data_sets(value: Any, split: str = "") -> Any:
    """Return a data set, or several by name. Several sets are a list, or text with commas."""
    words = value.split(",") if isinstance(value, str) else as_list(value)
    split = split.partition("[")[0]
    names = [word.strip() if "." in word[-8:] or not split else f"{word.strip()}:{split}" for word in words]
    if len(names) < 2:
        return names[0] if names else None
    return {f"{index}-{folder_name(PurePosixPath(name).stem)}": name for index, name in enumerate(names, start=1)}


def training_sets(value: Any, split: str = "", weights: Any = None) -> Any:
    sets = data_sets(value, split)
    if not isinstance(sets, dict):
        return sets
    shares = [float(word) for word in str(weights).split(",")] if weights is not None else [1.0] * len(sets)
    return {name: {"source": sets[name], "weight": share} for name, share in zip(sets, shares, strict=True)}


def column(name: Any, inner: Any, ours: str) -> str | None:
    """Return the name of a column in the data, or None if it has our name."""
    whole = ".".join([str(name), *map(str, as_list(inner))])
    return whole if name and whole != ours else None


def modules(value: Any) -> Any:
    return "all-linear" if "all-linear" in as_list(value) else as_list(value) or None


def zero_stage(value: Any) -> int | None:
    """Return the stage in a name such as deepspeed_zero3.yaml. FSDP shards all (3), or gradients and states (2)."""
    match = re.search(r"zero_?([123])", str(value))
    return int(match[1]) if match else 3 if "full_shard" in str(value) else 2 if "grad_op" in str(value) else None


def own_name(function: Any) -> str:
    """Return the name of a reward function, given as a path of Python or as FILE.py:NAME."""
    return re.split(r"[.:]", str(function))[-1]


def reward_functions(functions: Any, weights: Any) -> dict[str, Any] | None:
    rewards = {}
    for index, function in enumerate(as_list(functions)):
        name, shares = own_name(function), as_list(weights)
        file = str(function).rpartition(".")[0].replace(".", "/")
        own = {"function": function if ":" in str(function) else f"{file or 'rewards'}.py:{name}"}
        share = {"weight": shares[index]} if index < len(shares) else {}
        if source := BUILT_IN.get(name, own):
            rewards[name] = {**source, **share}
    return rewards or None


def kl_estimator(name: str) -> str:
    """Return the estimator for a name of verl. With a `+`, verl takes the gradient from k2."""
    estimators = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
    estimator = estimators[name.removesuffix("+")]
    return f"{estimator}_straight_through" if name.endswith("+") and estimator != "k2" else estimator


def preference_loss(losses: Any, weights: Any) -> Any:
    shares = as_list(weights) or [1.0] * len(as_list(losses))
    pairs = dict(zip((_LOSSES.get(name, name) for name in as_list(losses)), shares, strict=True))
    pairs.pop("sft", None)
    return next(iter(pairs)) if len(pairs) == 1 else pairs or None


def _updates(values: dict[str, Any]) -> int:
    """Return the optimizer steps of a step."""
    responses = values.get("rollouts.prompts_per_step", 0) * values.get("rollouts.samples_per_prompt", 1)
    return max(int(responses // values["train.sequences_per_update"]), 1) * int(values.get("train.epochs_per_batch", 1))
