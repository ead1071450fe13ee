"""Times of moved states, by hand: gathers, gradients and Adam on the host, snapshots, shared GPUs."""

from __future__ import annotations

import pytest

from rlhf.config.files.load import load
from rlhf.config.nodes import parse_cluster
from rlhf.config.schema.root import Config
from rlhf.planning.footprints import Sizes
from rlhf.planning.lengths import Lengths
from rlhf.planning.rates import Stage
from rlhf.planning.time import system_of, training_stages
from rlhf.planning.transfers import snapshots, staging
from tests.fixtures.sources import ROOT

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
