"""A run on presets gets rewards and settings of its data, and the resolved file shows them."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.load import from_mapping
from rlhf.config.schema.root import Config
from rlhf.config.yaml_tree import from_yaml
from rlhf.errors import UserError

ROLLOUTS = {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 8}


def values(train: Any, **more: Any) -> dict[str, Any]:
    data = {"train": train, **more.pop("data", {})}
    return {
        "run": {"name": "x"},
        "policy": {"model": "tiny:llama"},
        "algorithm": {"name": "grpo"},
        "rollouts": ROLLOUTS,
        "train": {"steps": 2, "lr": 1e-4, "sequences_per_update": 16, "max_tokens_per_microbatch": 2048},
        "data": data,
        **more,
    }


def config(train: Any, **more: Any) -> Config:
    (stage,) = from_mapping(values(train, **more)).stages.values()
    assert isinstance(stage, Config)
    return stage


def test_rewards_and_settings_are_added_and_the_resolved_file_repeats_the_run() -> None:
    stage = config({"preset": "math"})
    reward = stage.rewards["correct"]
    assert (reward.function, reward.on_error, reward.only) == ("math_answer", "drop", {})
    assert (stage.data.too_long, stage.data.max_unusable_fraction) == ("skip", 0.1)
    resolved = from_yaml(dump_yaml(stage))
    assert resolved["rewards"]["correct"]["function"] == "math_answer"
    assert dump_yaml(from_mapping(resolved)) == dump_yaml(stage)


def test_what_a_run_says_itself_stays() -> None:
    mine = {"rewards": {"mine": {"function": "exact_match"}}, "data": {"too_long": "cut", "max_unusable_fraction": 0.0}}
    stage = config({"preset": "gsm8k"}, **mine)
    assert list(stage.rewards) == ["mine"]
    assert (stage.data.too_long, stage.data.max_unusable_fraction) == ("cut", 0.0)
    assert config({"preset": "gsm8k"}, data={"too_long": "error"}).data.max_unusable_fraction == 0.0


def test_presets_with_different_rewards_are_told_apart_by_rows() -> None:
    sets = {name: {"source": {"preset": name}} for name in ("gsm8k", "math", "limo")}
    rewards = config(sets).rewards
    assert {name: (reward.function, reward.only) for name, reward in rewards.items()} == {
        "correct-gsm8k": ("last_number", {"preset": ("gsm8k",)}),
        "correct-math": ("math_answer", {"preset": ("math", "limo")}),
    }


def test_a_set_of_ones_own_among_the_presets_needs_ones_own_rewards() -> None:
    sets = {"a": {"source": {"preset": "gsm8k"}}, "b": {"source": "own.jsonl"}}
    with pytest.raises(UserError, match="grpo needs at least one reward"):
        config(sets)
    assert config(sets, rewards={"correct": {"function": "last_number"}}).data.too_long == "error"


@pytest.mark.parametrize(
    ("train", "more", "message"),
    [
        ({"preset": "gsm9k"}, {}, "data.train.preset: 'gsm9k' is no preset; did you mean gsm8k?"),
        ({"preset": "zzzz"}, {}, "'zzzz' is no preset; the presets are gsm8k, math, "),
        ({"preset": "gsm8k", "splitt": "eval"}, {}, "did you mean data.train.split?"),
        ({"preset": "gsm8k", "path": "f", "revision": "main"}, {}, "`path` replaces the hub"),
        ({"preset": "math-500"}, {}, "preset math-500 has no training split"),
        ({"preset": "gsm8k", "size": 0}, {}, "data.train.size: got 0, expected an integer >= 1"),
        ({"preset": "gsm8k"}, {"data": {"columns": {"prompt": "question"}}}, "`columns` has no effect: all sets are"),
    ],
)
def test_mistakes(train: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config(train, **more)
    assert message in str(error.value)


def test_another_preset_replaces_the_preset_of_a_base(tmp_path: Any) -> None:
    (tmp_path / "base.yaml").write_text(dump_yaml(config({"preset": "gsm8k", "split": "test"})), encoding="utf-8")
    from rlhf.config.files.load import load

    above = "base: base.yaml\ndata: {train: {preset: math}}\n"
    (tmp_path / "above.yaml").write_text(above, encoding="utf-8")
    (stage,) = load(tmp_path / "above.yaml").runs.values()
    assert stage.data.train.split == "train"  # type: ignore[union-attr]
    for source in ("{task: running_totals, size: 4}", "own.jsonl"):
        (tmp_path / "above.yaml").write_text(f"base: base.yaml\ndata: {{train: {source}}}\n", encoding="utf-8")
        (stage,) = load(tmp_path / "above.yaml").runs.values()
        assert not hasattr(stage.data.train, "preset")
