"""Unknown arguments of vLLM's engine, and arguments of other keys, are refused."""

from __future__ import annotations

import dataclasses
import re

import pytest

from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.validation.engine_args import OWNED
from rlhf.errors import UserError
from rlhf.preflight.engine_args import known_engine_args, refuse_unknown_engine_args
from tests.fixtures.configs import ONLINE, changed, refusal
from tests.fixtures.sources import keywords


def cluster(**arguments: object) -> ClusterConfig:
    return ClusterConfig.model_validate({"roles": {"rollout": {"engine_args": arguments}}})


def test_names_are_those_of_the_installed_vllm() -> None:
    from vllm import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert known_engine_args() == {name for name in fields if not name.startswith("_")}


def test_every_argument_that_the_project_sets_is_owned_or_may_be_changed() -> None:
    changeable = "async_scheduling attention_backend block_size compilation_config enable_chunked_prefill "
    changeable += "enable_prefix_caching hf_overrides max_num_batched_tokens override_generation_config"
    ours = keywords("actors/rollout/vllm_engine.py", "EngineArgs")
    assert ours - set(changeable.split()) <= OWNED.keys() <= known_engine_args()


def test_an_unknown_name_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unknown_engine_args(cluster(enable_expert_parallel=True, kv_offloading_size=16))
    with pytest.raises(UserError, match=r"engine_args\.enable_expert_paralel: vllm.* did you mean enable_expert_paral"):
        refuse_unknown_engine_args(cluster(enable_expert_paralel=True))
    with pytest.raises(UserError, match=r"engine_args\.zzz: .*its EngineArgs lists all names"):
        refuse_unknown_engine_args(cluster(zzz=1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_unknown_engine_args(cluster(zzz=1))  # without vLLM the engines check the names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{max_model_len: 8}", "max_model_len: follows from data.max_prompt_tokens and rollouts.max_new_tokens"),
        ("{async_scheduling: true}", "async_scheduling: is true, but cluster.device is cpu, where vLLM has none"),
        ("{speculative_config: {method: eagle}}", "speculative_config: is not a mapping with method: ngram"),
        ("{speculative_config: {method: ngram, draft_sample_method: x}}", "has draft_sample_method, but with"),
        ("{enable_chunked_prefill: true}", "enable_chunked_prefill: is true, but cluster.device is cpu"),
    ],
)
def test_arguments_of_other_keys_are_refused_at_load(given: str, message: str) -> None:
    assert message in refusal(ONLINE, [f"cluster.roles.rollout.engine_args={given}"])


@pytest.mark.parametrize(
    "overrides",
    [["rollouts.min_p=0.1"], ["rollouts.carry_over=true", "rollouts.oversample=1.5", "algorithm.correction=none"]],
)
def test_keys_that_drafts_would_not_follow_are_refused(overrides: list[str]) -> None:
    drafts = "cluster.roles.rollout.engine_args={speculative_config: {method: ngram, num_speculative_tokens: 4}}"
    changed(ONLINE, overrides)  # without drafts nothing is refused
    message = f"{overrides[0].partition('=')[0]}: is .*, but speculative_config is set"
    assert re.search(message, refusal(ONLINE, [*overrides, drafts]))
