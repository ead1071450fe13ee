"""Derived numbers of a configuration equal arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.config.derive import (
    critic_model,
    critic_optimizer_steps,
    derive,
    eval_sets,
    merged_because,
    needs,
    policy_optimizer_steps,
    prompts_asked,
    prompts_at_once,
    saved_rank,
    ships_adapter,
    warmup_steps,
    weight_sync,
    with_steps,
)
from rlhf.config.placement_plan import assign_nodes, copies, plan_apart, plan_placement, plan_roles
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.root import Config
from tests.fakes.configs import ONLINE


def config(algorithm: dict[str, Any], **sections: Any) -> Config:
    tree: dict[str, Any] = {
        **ONLINE,
        "algorithm": algorithm,
        "data": {"train": "x.jsonl", "max_prompt_tokens": 100},
        "rollouts": {"prompts_per_step": 6, "samples_per_prompt": 4, "max_new_tokens": 20},
        "train": {"steps": 10, "lr": 1.0, "sequences_per_update": 8, "epochs_per_batch": 2},
    }
    return Config.model_validate(tree | sections)


PPO = {"name": "ppo", "kl": {"coef": 0.1}}
GRPO = {"name": "grpo"}
TRAIN = {"lr": 1.0, "sequences_per_update": 8}
FIXED = {"rollouts": None, "rewards": {}}


def test_the_batch_of_an_online_run() -> None:
    run = config({**PPO, "critic_warmup_steps": 3})
    derived = derive(run)
    assert derived.sequences_per_step == 24  # 6 * 4
    assert derived.updates_per_batch == 3  # 24 / 8
    assert derived.updates_per_step == 6  # 3 * 2 epochs
    assert policy_optimizer_steps(run) == 42  # (10 - 3) * 6
    assert critic_optimizer_steps(run) == 60  # 10 * 6
    assert derived.longest_sequence == 120  # 100 + 20
    assert derived.tokens_per_step == 2880  # 24 * 120
    cluster = {"roles": {"policy": {"workers": 8, "sequence_parallel": 4}}}
    assert derive(config(GRPO, cluster=cluster)).data_parallel_ranks == 2
    run = config({"name": "online_dpo"}, train={**TRAIN, "steps": 10, "sequences_per_update": 3, "epochs_per_batch": 2})
    derived = derive(run)
    assert (derived.sequences_per_step, derived.rows_per_step) == (24, 6)  # 6 * 4 responses, 6 pairs, one per prompt
    assert (derived.updates_per_batch, derived.updates_per_step, policy_optimizer_steps(run)) == (2, 4, 40)


def test_a_supervised_step_is_an_optimizer_step() -> None:
    run = config({"name": "sft"}, **FIXED, train={**TRAIN, "steps": 10, "max_tokens_per_microbatch": 64})
    derived = derive(run)
    assert (derived.sequences_per_step, derived.updates_per_step, policy_optimizer_steps(run)) == (8, 1, 10)
    assert derived.longest_sequence == 64


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"),
    [(1.0, 16, 2), (1.0, 17, 3), (2.0, 17, 5), (0.5, 16, 1), (0.1, 3, 1), (3.0, 8, 3)],  # ceil(epochs * rows / 8)
)
def test_epochs_are_steps(epochs: float, rows: int, steps: int) -> None:
    run = with_steps(config({"name": "sft"}, **FIXED, train={**TRAIN, "epochs": epochs}), rows)
    assert (run.train.steps, run.train.epochs) == (steps, None)
    assert with_steps(config(GRPO, train={**TRAIN, "epochs": 2.0}), 100).train.steps == 34  # 200 prompts, 6 a step
    assert with_steps(config(GRPO), 100).train.steps == 10  # given steps stay


def test_a_warm_up_by_steps_or_by_a_share() -> None:
    assert warmup_steps(config(GRPO, train={**TRAIN, "warmup_steps": 3}).train, 40) == 3
    share = config(GRPO, train={**TRAIN, "warmup_ratio": 0.1}).train
    assert [warmup_steps(share, total) for total in (1, 10, 11, 40)] == [1, 1, 2, 4]  # as transformers rounds


LORA = {"policy": {"model": "m", "lora": {}}}
ADAPTER = {"policy": {"model": "m", "lora": {}, "adapter": "a"}}
TEACHER = {"rewards": {}, "teacher": {"model": "n"}}


@pytest.mark.parametrize(
    ("algorithm", "sections", "roles", "reference"),
    [
        (PPO, {}, "policy rollout critic reference reward", "workers"),
        ({"name": "ppo", "kl": {"coef": 0.0}}, {}, "policy rollout critic reward", "none"),
        (GRPO, {}, "policy rollout reward", "none"),
        ({"name": "grpo", "kl": {"coef": 0.1}}, {}, "policy rollout reward reference", "workers"),
        (PPO, LORA, "policy rollout critic reward", "adapter off"),
        ({"name": "online_dpo"}, {}, "policy rollout reward reference", "workers"),
        ({"name": "online_dpo"}, LORA, "policy rollout reward", "adapter off"),
        (PPO, {**LORA, "reference": {"model": "n"}}, "policy rollout critic reference reward", "workers"),
        (PPO, ADAPTER, "policy rollout critic reward", "adapter off"),
        (PPO, {**ADAPTER, "reference": {"model": "m"}}, "policy rollout critic reference reward", "workers"),
        ({"name": "sft"}, FIXED, "policy", "none"),
        ({"name": "distillation"}, {**FIXED, **TEACHER}, "policy teacher", "none"),
        ({"name": "on_policy_distillation"}, TEACHER, "policy rollout teacher reward", "none"),
    ],
)
def test_roles_that_start(algorithm: dict[str, Any], sections: dict[str, Any], roles: str, reference: str) -> None:
    made = config(algorithm, **sections)
    assert needs(made) == set(roles.split())
    assert derive(made).reference == reference


def test_a_critic_that_is_not_named_is_as_the_policy() -> None:
    made = critic_model(config(PPO, policy={"model": "m", "dtype": "float32", "lora": {"rank": 4}}))
    assert (made.model, made.dtype, made.lora and made.lora.rank) == ("m", "float32", 4)
    assert critic_model(config(PPO, critic={"model": "n"})).model == "n"
    lora = {"dora": True, "modules_to_save": ["lm_head"]}
    made = critic_model(config(PPO, policy={"model": "m", "lora": lora, "adapter": "a"}))
    assert made.adapter == "a"
    assert (made.lora.dora, made.lora.modules_to_save) == (True, ())


@pytest.mark.parametrize(
    ("lora", "rank", "why"),
    [
        ({"rank": 8}, 8, None),
        ({"rank": 8, "rslora": True, "layers": [0], "lora_plus_ratio": 4.0}, 8, None),
        ({"rank": 8, "init": "pissa"}, 16, None),
        ({"rank": 300, "init": "pissa"}, 600, "vLLM takes no rank of 600"),
        ({"rank": 512}, 512, None),
        ({"rank": 8, "dora": True}, 8, "vLLM takes no DoRA"),
        ({"rank": 8, "modules_to_save": ["embed_tokens"]}, 8, "vLLM takes no modules_to_save"),
        ({"rank": 8, "quantize": "nf4"}, 8, "the policy's base is nf4, the engines' is not"),
    ],
)
def test_what_of_an_adapter_travels(lora: dict[str, Any], rank: int, why: str | None) -> None:
    made = config(GRPO, policy={"model": "m", "lora": lora})
    assert saved_rank(made.policy.lora) == rank
    assert merged_because(made.policy.lora, vision=made.policy.vision_lr is not None) == why
    assert ships_adapter(made) == (why is None)
    assert not ships_adapter(config(GRPO))
    assert not ships_adapter(config(GRPO, policy={"model": "m", "lora": {"rank": 8}, "vision_lr": 1e-5}))


def test_a_single_evaluation_set_is_called_heldout() -> None:
    assert eval_sets(config(GRPO)) == {}
    for source in ("y", {"task": "t", "size": 2}):
        assert list(eval_sets(config(GRPO, data={"train": "x", "eval": source}))) == ["heldout"]
    assert eval_sets(config(GRPO, data={"train": "x", "eval": {"a": "y", "b": "z"}})) == {"a": "y", "b": "z"}


@pytest.mark.parametrize(
    ("cluster", "one_host", "method"),
    [
        ({}, True, "shm"),
        ({}, False, "gloo"),
        ({"weight_sync": "gloo"}, True, "gloo"),
        ({"device": "cuda"}, True, "nccl"),
        ({"device": "cuda", "roles": {"rollout": {"colocate_with": "policy"}}}, False, "ipc"),
    ],
)
def test_the_way_of_the_weights(cluster: dict[str, Any], one_host: bool, method: str) -> None:
    assert weight_sync(config(GRPO, cluster=cluster).cluster, one_host=one_host).method == method


def test_the_defaults_fit_two_cores() -> None:
    placement = plan_placement(config(PPO))
    assert placement.bundles == ({"CPU": 1.0}, {"CPU": 1.0})
    places = {role: [slot.bundle for slot in slots] for role, slots in placement.slots.items()}
    assert places == {"policy": [0], "rollout": [1], "critic": [0], "reference": [0], "reward": [1]}
    assert [s.cpus for s in placement.slots["policy"]] == [0.3333]  # a third, rounded down to what Ray counts
    assert [s.cpus for s in placement.slots["reward"]] == [0.5]


def test_guests_share_the_gpus_of_their_hosts() -> None:
    roles = {
        "policy": {"workers": 2, "cpus": 3.0},
        "critic": {"workers": 2},
        "reference": {"colocate_with": None, "cpus": 2.0},
        "rollout": {"engines": 2, "tensor_parallel": 4, "cpus": 8.0},
    }
    placement = plan_placement(config(PPO, cluster={"device": "cuda", "roles": roles}))
    policy, engine = {"CPU": 3.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 4.0}
    assert placement.bundles == (policy, policy, engine, engine, {"CPU": 2.0, "GPU": 1.0})
    assert [(s.bundle, s.gpus) for s in placement.slots["critic"]] == [(0, 0.5), (1, 0.5)]
    assert [(s.bundle, s.gpus) for s in placement.slots["rollout"]] == [(2, 4.0), (3, 4.0)]
    assert [(s.bundle, s.cpus, s.gpus) for s in placement.slots["reward"]] == [(2, 4.0, 0.0)]  # functions need no GPU
    assert (placement.total("CPU"), placement.total("GPU")) == (24.0, 11.0)  # 3+3+8+8+2, 1+1+4+4+1
    assert [role for role in placement.slots if placement.shares_gpus(role)] == ["policy", "critic"]


def test_a_bundle_has_the_labels_of_its_role_and_guests_of_guests() -> None:
    roles: dict[str, Any] = {"policy": {"workers": 2}, "rollout": {"node_labels": {"pool": "serve"}}}
    assert plan_placement(config(GRPO, cluster={"roles": roles})).labels == ({}, {}, {"pool": "serve"})
    roles["rollout"] = {"engines": 2, "colocate_with": "policy"}
    placement = plan_placement(config(GRPO, cluster={"roles": roles}))
    assert (len(placement.bundles), [s.bundle for s in placement.slots["reward"]]) == (2, [0])
    assert plan_roles({"rollout", "reward"}, ClusterConfig(), with_reward_model=False).total("CPU") == 1.0
    alone = plan_roles({"reward"}, ClusterConfig(), with_reward_model=False)  # without the host
    assert (alone.bundles, list(alone.slots)) == (({"CPU": 1.0},), ["reward"])


def test_an_engine_that_may_leave_is_placed_apart() -> None:
    roles = {
        "rollout": {"engines": {"min": 2, "max": 8}, "cpus": 4.0, "node_labels": {"pool": "serve"}},
        "reward": {"colocate_with": "policy"},
    }
    run = config(GRPO, cluster={"roles": roles})
    assert plan_placement(run).bundles == ({"CPU": 1.0}, {"CPU": 4.0}, {"CPU": 4.0}), "the fewest engines"
    rest, engine = plan_apart(run)
    assert (rest.bundles, [*rest.slots]) == (({"CPU": 1.0},), ["policy", "reward"])
    assert (engine.bundles, engine.labels) == (({"CPU": 4.0},), ({"pool": "serve"},))
    assert [slot.bundle for slot in engine.slots["rollout"]] == [0]
    fixed = config(GRPO, cluster={"roles": {"rollout": {"engines": 2}}})
    assert plan_apart(fixed) == (plan_placement(fixed), None)


def test_as_many_runs_fit_at_once_as_there_is_room_for() -> None:
    one = [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}]
    assert copies(one, [{"CPU": 5.0, "GPU": 2.0}], most=9) == 2  # by GPUs
    assert copies(one, [{"CPU": 5.0, "GPU": 4.0}], most=9) == 2  # by CPUs: 2 * 2 <= 5
    assert copies(one, [{"CPU": 9.0, "GPU": 9.0}], most=3) == 3
    assert copies(one, [{"CPU": 9.0}], most=3) == 0


def test_bundles_fill_nodes_in_order_the_large_ones_first() -> None:
    small, large = {"CPU": 1.0}, {"CPU": 4.0, "GPU": 2.0}
    nodes = [{"CPU": 5.0, "GPU": 2.0}, {"CPU": 2.0}]
    assert assign_nodes([small, large, small], nodes) == [0, 0, 1]
    assert assign_nodes([small, large, small, small], nodes) == [0, 0, 1, 1]
    assert assign_nodes([large, large], nodes) is None
    assert assign_nodes([{"CPU": 6.0}], nodes) is None  # 7 CPUs, but on no node 6
    bundles, nodes = [{"CPU": 4.0}, {"CPU": 2.0}], [{"CPU": 4.0}, {"CPU": 4.0}]
    serving = {"node_labels": [{"pool": "serve"}, {"pool": "train"}]}
    assert assign_nodes(bundles, nodes, labels=[{}, {"pool": "train"}], **serving) == [0, 1]
    assert assign_nodes(bundles, nodes, labels=[{}, {"pool": "serve"}], **serving) == [1, 0]
    assert assign_nodes(bundles, nodes, labels=[{"pool": "serve"}] * 2, **serving) is None


def test_more_prompts_are_asked_than_are_needed() -> None:
    def rollouts(**keys: Any) -> Config:
        return config(GRPO, rollouts={"prompts_per_step": 6, "samples_per_prompt": 4, **keys})

    for needed, oversample, asked in [(10, 1.0, 10), (10, 1.1, 11), (10, 1.25, 13), (1, 1.05, 2)]:
        assert prompts_at_once(needed, rollouts(oversample=oversample).rollouts) == asked
    for run, asked in [
        (rollouts(), 60),
        (rollouts(oversample=1.5), 10 * 9),
        (rollouts(dynamic_sampling={"max_filtered_fraction": 2.0}), 10 * 6 * 3),
        (config(GRPO, reward_policy={"on_error": "drop", "max_dropped_fraction": 0.5}), 10 * 12),
    ]:
        assert prompts_asked(run, run.rollouts) == asked
