"""By hand: the memory of a GPU shared with an engine at each moment of a step, and the times of moved states."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.files.load import load
from rlhf.config.mistakes.explain import parse
from rlhf.config.nodes import Node, parse_cluster
from rlhf.config.placement_plan import plan_placement
from rlhf.config.schema.root import Config
from rlhf.planning.fitting import Fit, held_on_gpu, places, remedies
from rlhf.planning.footprints import Sizes, footprints
from rlhf.planning.lengths import Lengths
from rlhf.planning.memory import GIB, Assumed
from rlhf.planning.rates import Stage
from rlhf.planning.time import system_of, training_stages
from rlhf.planning.transfers import snapshots, staging
from tests.fixtures.sources import ROOT

RUN: dict[str, Any] = {
    "run": {"name": "shared"},
    "policy": {"model": "Qwen/Qwen2.5-7B-Instruct", "gradient_checkpointing": True},
    "algorithm": {"name": "grpo", "kl": {"coef": 0.01}},
    "data": {"train": "x.jsonl"},
    "rollouts": {"prompts_per_step": 64, "samples_per_prompt": 8, "max_new_tokens": 4096},
    "train": {"steps": 10, "lr": 1e-6, "sequences_per_update": 128, "max_tokens_per_microbatch": 16384},
}
FUNCTION = {"rewards": {"exact": {"function": "exact_match"}}}
MODEL = {"rewards": {"score": {"role": "reward"}}, "reward": {"model": "Qwen/Qwen2.5-7B-Instruct"}}


def config_of(rewards: dict[str, Any], **rollout: Any) -> Config:
    roles = {"policy": {"workers": 8, "zero_stage": 3}, "rollout": {"engines": 8, "colocate_with": "policy", **rollout}}
    return parse({**RUN, **rewards, "cluster": {"device": "cuda", "roles": roles}})


def fits(config: Config, node: Node, count: int = 1) -> list[Fit]:
    return places(config, plan_placement(config), footprints(config, Sizes(gpu_memory_gib=80.0)), [node] * count)


def fullest_gpu(config: Config) -> Fit:
    node = Node(cpus=96.0, gpus=8.0, mem_gib=2000.0, gpumem_gib=80.0)
    return max((fit for fit in fits(config, node) if fit.where.startswith("GPU")), key=lambda fit: fit.wanted)


def test_a_reference_leaves_the_gpu_of_a_generating_engine_and_a_reward_model_stays() -> None:
    fit = fullest_gpu(config_of(FUNCTION))
    # The engine's 0.85 * 80 GiB, contexts of engine and reference, and context and NCCL of the policy's rank.
    assert fit.wanted == pytest.approx(0.85 * 80 * GIB + 3 * Assumed.CUDA_BYTES + Assumed.NCCL_BYTES)
    assert fit.parts.startswith("generate: ")
    assert fit.fits
    fit = fullest_gpu(config_of(MODEL))
    assert fit.wanted > (0.85 * 80 + 14.2) * GIB  # 7.6 billion weights of 2 bytes
    assert fit.fits is False
    assert fullest_gpu(config_of(MODEL, gpu_memory_utilization=0.6)).fits


def test_a_weight_transfer_holds_the_policy_its_copy_and_the_weights_of_the_engine() -> None:
    config = config_of(FUNCTION)
    by_role = {one.role: one for one in footprints(config, Sizes(gpu_memory_gib=80.0))}
    weights = 7_615_616_512
    # Of 8 ranks: bfloat16 weights, master weights, two moments and the block of gradients; a billion gathered weights
    # and the bucket. The copy for the engine is whole.
    states = weights * (2 + 4 + 8 + 4) / 8 + 2 * 10**9 + 2 * 5 * 10**7
    policy = held_on_gpu(by_role["policy"], "weight sync")
    assert policy == pytest.approx(states + 2 * weights + by_role["policy"].stays)
    assert held_on_gpu(by_role["rollout"], "weight sync") == pytest.approx(2 * weights + Assumed.CUDA_BYTES)
    assert held_on_gpu(by_role["reference"], "weight sync") == Assumed.CUDA_BYTES


def test_each_node_holds_the_copies_of_as_many_ranks_of_others() -> None:
    # Three ranks on each of two nodes, and the engines on a third. Each node holds the copies of two ranks: of
    # 7,615,616,512 parameters, 12 bytes twice, over 6 ranks.
    roles = {"policy": {"workers": 6}, "rollout": {"engines": 3}, "reward": {"colocate_with": "policy"}}
    tree = {**RUN, **FUNCTION, "cluster": {"device": "cuda", "address": "auto", "roles": roles}}
    config = parse({**tree, "algorithm": {"name": "grpo"}})
    (host,) = [
        fit for fit in fits(config, Node(cpus=96.0, gpus=3.0, mem_gib=2000.0), 3) if fit.where.startswith("host")
    ]
    assert f"copies of snapshots {2 * 7_615_616_512 * 24 / 6 / GIB:,.1f}" in host.parts
    (host,) = [fit for fit in fits(config, Node(cpus=96.0, gpus=9.0, mem_gib=2000.0)) if fit.where.startswith("host")]
    assert "copies of snapshots" not in host.parts


def shared_memory(config: Config, **node: float) -> Fit:
    (fit,) = [fit for fit in fits(config, Node(cpus=96.0, gpus=9.0, **node)) if fit.where == "/dev/shm of node 0"]
    return fit


def test_the_snapshots_and_the_objects_of_ray_must_fit_into_shared_memory() -> None:
    # 7,615,616,512 parameters of 12 bytes, twice: 170.2 GiB. `ray start` takes 30 % of the memory for its objects.
    roles = {"policy": {"workers": 6, "zero_stage": 2}, "rollout": {"engines": 3}}
    tree = {**RUN, **FUNCTION, "algorithm": {"name": "grpo"}}
    joined = parse({**tree, "cluster": {"device": "cuda", "address": "auto", "roles": roles}})
    local = parse({**tree, "cluster": {"device": "cuda", "object_store_gib": 4.0, "roles": roles}})
    snapshots = 7_615_616_512 * 24
    fit = shared_memory(joined, mem_gib=400.0)  # of which Linux gives half to /dev/shm
    assert fit.room == 200.0 * GIB
    assert fit.wanted == pytest.approx(snapshots + 0.3 * 400.0 * GIB)
    assert fit.fits is False
    assert "docker run --shm-size=291g" in fit.fix
    assert "cluster.restarts.gang=0" in fit.fix
    assert shared_memory(joined, mem_gib=400.0, shm_gib=300.0).fits is True
    assert shared_memory(local, mem_gib=400.0).wanted == pytest.approx(snapshots + 4.0 * GIB)
    assert shared_memory(local, mem_gib=400.0, shm_gib=0.0625).wanted == pytest.approx(snapshots)  # Ray uses the disk
    assert shared_memory(joined).fits is None


def test_a_change_that_fills_another_node_most_is_compared_with_the_fullest_node_before() -> None:
    # Four ranks share node 0. With eight ranks, two nodes have four each, and node 1 holds the larger copies.
    recipe = Path(__file__).parents[2] / "configs" / "grpo_qwen3_30b_a3b_8gpu.yaml"
    (config,) = load(recipe, ["cluster.roles.policy.workers=4"]).stages.values()
    nodes = [Node(cpus=64.0, gpus=4.0, mem_gib=300.0, kind="h100")] * 16
    changes = remedies(config, Sizes(gpu_memory_gib=80.0), nodes, ["policy"])
    (doubled,) = [line for line in changes if line.startswith("cluster.roles.policy.workers=8: ")]
    assert "is not needed" not in doubled
    assert re.search(r"/dev/shm of node 1 wants [\d.]+ GiB in place of [\d.]+ and still does not fit", doubled)
    (without,) = [line for line in changes if line.startswith("cluster.restarts.gang=0: ")]
    assert "/dev/shm of node 0 is not needed" in without


CONFIGS = ROOT / "configs"
NODE = "8*cpu=96,gpu=8,type=h100"
PARAMETERS = 30_532_122_624  # of Qwen3-30B-A3B
# 512 sequences of 1,024 + 2,048 tokens on 4 ranks, in micro-batches of 16,384 tokens: 24 of them on each rank.
LENGTHS = Lengths(most=4096, mean=2048.0)
NVLINK, NETWORK, PCIE, HOST, UNPINNED = 0.75 * 450e9, 8 * 20e9, 0.75 * 64e9, 150e9, 3.5e9
SHARED = "cluster.roles.rollout={engines: 4, tensor_parallel: 1, colocate_with: policy}"
MOVES = {"gathers", "gradients to host", "optimizer on host", "snapshots", "staging"}


def run(*keys: str, tokens: int = 16384) -> Config:
    """The recipe for the 30B model with a budget of tokens for a micro-batch."""
    path, budget = CONFIGS / "grpo_qwen3_30b_a3b_8gpu.yaml", f"train.max_tokens_per_microbatch={tokens}"
    return next(iter(load(path, [budget, *keys]).runs.values()))


def stages(config: Config, cluster: str = NODE) -> dict[str, Stage]:
    return {stage.name: stage for stage in training_stages(config, Sizes(), parse_cluster(cluster), LENGTHS)}


def test_weights_are_gathered_twice_and_gradients_reduced_once_for_each_microbatch() -> None:
    gathered = (24 * 2 + 24) * 2 * PARAMETERS * 3 / 4  # bfloat16; a rank has a quarter already
    assert stages(run())["gathers"].seconds == pytest.approx(gathered / NVLINK)
    assert "(48 * 56.9 GiB + 24 * 56.9 GiB of gradients) * 3 / 4" in stages(run())["gathers"].how
    larger = stages(run(tokens=65536))["gathers"]
    assert larger.seconds == pytest.approx(gathered / NVLINK / 4)
    # 16 ranks on two nodes, with 6 micro-batches each
    wide = stages(run("cluster.roles.policy.workers=16"))["gathers"]
    assert wide.seconds == pytest.approx((6 * 2 + 6) * 2 * PARAMETERS * 15 / 16 / NETWORK)


def test_passes_without_a_gradient_gather_once_and_offloaded_weights_come_from_the_host() -> None:
    keys = ["cluster.roles.policy.offload=[optimizer, parameters]", "train.sequences_per_update=256"]
    found = stages(run(*keys, "train.streamed=false", "rollouts.max_staleness=0"))
    assert "old logprobs" in found  # of two updates on a batch
    count = 24 + 24 * 2
    collectives = (count * 2 + 24 * 2) * PARAMETERS * 3 / 4 / NVLINK
    assert found["gathers"].seconds == pytest.approx(collectives + count * 2 * PARAMETERS / 4 / PCIE)
    assert found["optimizer on host"].seconds == pytest.approx(2 * adam_s())


def adam_s() -> float:
    # Each of 4 ranks has 7.6 billion parameters; they share the memory of their host. The weights return in bfloat16.
    return 46 * PARAMETERS / HOST + 2 * PARAMETERS / 4 / PCIE


def test_an_offloaded_optimizer_costs_copies_and_adam_on_the_host() -> None:
    found = stages(run())
    # Float32 gradients go to the GPU and back for each micro-batch, and once more for the step.
    assert found["gradients to host"].seconds == pytest.approx((2 * 24 + 1) * 4 * PARAMETERS / 4 / PCIE)
    assert found["optimizer on host"].seconds == pytest.approx(adam_s())
    assert not {"gradients to host", "optimizer on host"} & stages(run("cluster.roles.policy.offload=[]")).keys()


def test_a_snapshot_counts_where_the_next_passes_are_shorter() -> None:
    config, nodes = run(), parse_cluster(NODE)
    whole_s = 12 * PARAMETERS / 4 / UNPINNED  # float32 weights and two moments
    waits = snapshots(config, Sizes(), nodes, meanwhile_s=6.0)
    assert waits.seconds == pytest.approx(whole_s - 6.0)
    assert snapshots(config, Sizes(), nodes, meanwhile_s=whole_s + 0.1) is None
    assert "snapshots" not in stages(config)  # 68 s of passes
    assert snapshots(run("cluster.restarts.gang=0"), Sizes(), nodes, meanwhile_s=0.0) is None


def test_roles_that_share_gpus_with_engines_leave_them_and_return() -> None:
    states = 12 * PARAMETERS / 4
    for stage, expected in {
        2: 2 * (2 * PARAMETERS + states) / PCIE,  # whole weights in bfloat16, all by pinned memory
        # shares of weights and gradients, and a bucket of 50 million; masters and moments are not pinned
        3: 2 * ((2 + 4) * PARAMETERS / 4 + 2 * 50e6) / PCIE + 2 * states / UNPINNED,
    }.items():
        config = run(SHARED, f"cluster.roles.policy={{workers: 4, zero_stage: {stage}}}", "train.streamed=false")
        assert staging(config, Sizes(), None).seconds == pytest.approx(expected)
        assert "snapshots" not in stages(config)
    # A separate reference only returns.
    own = ["cluster.roles.reference={workers: 4, colocate_with: policy}", "algorithm.kl={coef: 0.01}"]
    runs = [run(SHARED, *keys, "train.streamed=false") for keys in (own, [])]
    seconds = [staging(config, Sizes(), None).seconds for config in runs]
    assert seconds[0] - seconds[1] == pytest.approx(2 * PARAMETERS / UNPINNED)


def test_a_run_without_moves_has_no_line_of_them() -> None:
    small = next(iter(load(CONFIGS / "grpo_smollm2.yaml").runs.values()))
    sizes = Sizes(made={small.policy.model: "Qwen/Qwen2.5-0.5B-Instruct"})
    assert not MOVES & {stage.name for stage in training_stages(small, sizes, None, LENGTHS)}


def test_streamed_gradients_overlap_with_rollouts_and_the_optimizer_step_does_not() -> None:
    config = run()
    found, system = stages(config), system_of(config, Sizes(), parse_cluster(NODE), LENGTHS)
    total = sum(stage.seconds for stage in found.values())
    assert system.streamed_share == pytest.approx(1.0 - found["optimizer on host"].seconds / total)
    tokens = 512 * 3072
    assert system.train_tokens_per_s == pytest.approx(tokens / total)
