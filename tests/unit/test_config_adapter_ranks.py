"""The configuration of ranks with many adapters."""

from __future__ import annotations

from typing import Any

from rlhf.config.adapter_ranks import ranks_config
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.model import PolicyConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.run import RunConfig


def derived(policy: dict[str, Any], roles: dict[str, Any]) -> Config:
    section = PolicyConfig.model_validate({"model": "tiny:llama", "lora": {"rank": 8}, **policy})
    cluster = ClusterConfig.model_validate({"device": "cpu", "roles": {"policy": roles}})
    return ranks_config(section, RunConfig(name="service", seed=3), cluster, max_tokens_per_microbatch=512)


def test_the_ranks_get_model_seed_and_budget() -> None:
    config = derived({}, {"workers": 2})
    assert (config.policy.lora is not None and config.policy.lora.rank, config.run.seed) == (8, 3)
    assert config.train.max_tokens_per_microbatch == 512
    assert (config.cluster.roles.policy.zero_stage, config.cluster.roles.policy.workers) == (0, 2)
    assert derived({}, {"zero_stage": 3}).cluster.roles.policy.zero_stage == 3


def test_without_an_adapter_all_weights_are_trained_and_divided_among_several_ranks() -> None:
    assert derived({"lora": None}, {"workers": 1}).cluster.roles.policy.zero_stage == 0
    config = derived({"lora": None}, {"workers": 2})
    assert (config.policy.lora, config.cluster.roles.policy.zero_stage) == (None, 3)
