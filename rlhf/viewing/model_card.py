"""The README.md of a trained model: base model, training, and the last measurements of the run.

The card has the format of the Hugging Face hub, and no paths of the machine or arguments of rewards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.derive import eval_sets, train_sets
from rlhf.config.schema.data import DataSource, PresetConfig
from rlhf.config.schema.root import Config
from rlhf.data.presets import presets
from rlhf.tracking.sinks.tracker import read_metrics

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_METRICS = (
    *("rewards/score/mean", "experience/kl_ref/mean", "update/entropy/mean", "rollouts/response_tokens/mean"),
    *("preference/accuracy/mean", "preference/margin/mean", "update/token_accuracy/mean", "update/loss/mean"),
)


def write_model_card(folder: Path, config: Config, *, run: Path, step: int | None, merged: bool = False) -> None:
    """Write README.md into a model folder of the run in folder `run`.

    `step`: the step of the checkpoint; None: the end of the run. `merged`: whether an adapter was added to the weights.
    """
    rows = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    rows = [row for row in rows if step is None or row["step"] <= step]
    (folder / "README.md").write_text(model_card(config, rows, merged=merged), encoding="utf-8")


def model_card(config: Config, rows: list[dict[str, Any]], *, merged: bool = False) -> str:
    """Return the text of the card. rows: of metrics.jsonl, up to the step of the model."""
    name = config.run.name.rpartition("/")[2]
    base = _shown(config.policy.source)
    is_adapter = config.policy.lora is not None and not merged
    kind = "a reward model" if config.algorithm.has_scalar_head else "a language model"
    lines = [
        *("---", yaml.safe_dump(_front_matter(config, is_adapter=is_adapter), sort_keys=False).rstrip(), "---"),
        f"# {name}",
        "",
        f"This is {kind}, trained from `{base}` with `{config.algorithm.short_name}` by ray-rlhf."
        + (" The folder holds a LoRA adapter, which needs its base model." if is_adapter else ""),
        *("", "## Training", ""),
        *_table(("setting", "value"), dict(_settings(config, rows))),
    ]
    if metrics := _last_values(rows):
        lines += ["", "## Last metrics", "", *_table(("metric", "value"), metrics)]
    return "\n".join(lines) + "\n"


def _front_matter(config: Config, *, is_adapter: bool) -> dict[str, Any]:
    base = config.policy.source.partition("@")[0]
    sources = [*(data.source for data in train_sets(config).values()), *eval_sets(config).values()]
    data = {name for name in map(_shown, sources) if _HUB_NAME.fullmatch(name)}
    values: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers"}
    if _HUB_NAME.fullmatch(base) and not Path(base).exists():
        values["base_model"] = base
    values["pipeline_tag"] = "text-classification" if config.algorithm.has_scalar_head else "text-generation"
    values["tags"] = ["ray-rlhf", config.algorithm.short_name]
    if data:
        values["datasets"] = sorted(data)
    return values


def _settings(config: Config, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    train, lora = config.train, config.policy.lora
    yield "base model", _shown(config.policy.source)
    yield "method", config.algorithm.short_name
    yield "training data", ", ".join(_shown(data.source) for data in train_sets(config).values())
    if rows:
        yield "steps", f"{rows[-1]['step']}"
    warm_up = f"{train.warmup_ratio:.4g} of all steps" if train.warmup_ratio else f"{train.warmup_steps} steps"
    yield "learning rate", f"{train.lr:g} ({train.lr_schedule}, warm-up: {warm_up})"
    yield "sequences per update", f"{train.sequences_per_update}"
    if lora is not None:
        yield "LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}"
    if config.algorithm.is_online and config.rollouts is not None:
        rollouts = config.rollouts
        yield "rollouts per step", f"{rollouts.prompts_per_step} prompts, {rollouts.samples_per_prompt} responses each"
        yield "new tokens at most", f"{rollouts.max_new_tokens}"
        yield "rewards", ", ".join(config.rewards)
    yield "dtype", config.policy.dtype
    yield "seed", f"{config.run.seed}"


def _last_values(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return the newest value of each main metric; evaluations are not in every row."""
    newest: dict[str, Any] = {}
    for row in rows:
        newest |= {key: value for key, value in row.items() if isinstance(value, int | float)}
    evals = sorted(key for key in newest if key.startswith("eval/") and not key.endswith("_s"))
    return {key: f"{newest[key]:.4g}" for key in (*evals, *_METRICS) if key in newest}


def _shown(source: DataSource) -> str:
    """Return a hub name or a task unchanged, and only the last part of a path."""
    if isinstance(source, PresetConfig):
        known = presets()[source.preset]
        return f"{known.hub} ({known.license})"
    if not isinstance(source, str):
        return source.task
    name = source.partition("@")[0]
    return source if _HUB_NAME.fullmatch(name) and not Path(name).exists() else Path(name).name


def _table(head: tuple[str, str], values: Mapping[str, str]) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |"
    yield "|---|---|"
    for key, value in values.items():
        yield f"| {key} | {value.replace('|', '&#124;')} |"
