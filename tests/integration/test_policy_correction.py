"""The policy's worker under corrections of the sampler's mismatch, without Ray or vLLM.

The laws: a step does not depend on ranks or micro-batches; if the rollout's log-probabilities replace old_logprobs, no
old_logprobs are computed; and if sampler and trainer agree, bypassing old_logprobs changes nothing. A process for each
rank is started for each layout and serves all tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.controller.batches import plan_batch
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.roles import ScoredGroup
from rlhf.types import GroupScores, Rollouts
from rlhf.workers.online.policy import PolicyWorker
from tests.fakes.groups import completed_group, group_request
from tests.fixtures.workers import make_update
from tests.integration.gang_workers import (
    GROUPS,
    MOST_NEW,
    PROMPT,
    SAMPLES,
    assert_equal,
    merged,
    rollouts_of,
    worker_config,
)
from tests.integration.rank_gang import Gangs, place_of

BYPASSES = ("bypass", "policy_gradient")


def sampled(group: int) -> Rollouts:
    """Return a group with a sampler close to the tiny model: -5.8 nats, more or less."""
    rollouts = rollouts_of(group)
    noise = torch.randn(len(rollouts.token_ids), generator=torch.Generator().manual_seed(group))
    return replace(rollouts, rollout_logprobs=torch.where(rollouts.response_mask, -5.8 + 0.3 * noise, 0.0))


def scored(rollouts: Rollouts, group: int) -> ScoredGroup:
    sizes = [length - PROMPT for length in rollouts.lengths.tolist()]
    request = group_request(group, samples=SAMPLES)
    scores = GroupScores(scores=tuple(float(i) for i in range(SAMPLES)), by_name={}, errors=())
    completed = completed_group(request, rollouts, tokens=sizes, num_prompt_tokens=PROMPT, mean_logprob=-5.8)
    return ScoredGroup(group=completed, scores=scores)


def learn(
    rank: int,
    world_size: int,
    *,
    correction: dict[str, Any] | None,
    model: str,
    folder: str,
    tokens: int,
    agree: bool = False,
) -> list[Any]:
    """Run one rank: metrics of the preparation and of two updates. agree: sampler and trainer agree."""
    algorithm = {"name": "grpo", "correction": correction}
    config = worker_config(algorithm, model, folder, workers=world_size, tokens=tokens)
    worker = PolicyWorker(config, place_of(rank, world_size), optimizer_steps=2)
    worker.build()
    rollouts = [sampled(group) for group in range(GROUPS)]
    groups = [scored(one, group) for group, one in enumerate(rollouts)]
    plan = plan_batch(groups, step=1, seed=0, num_minibatches=2, num_ranks=world_size, kl_coef=0.0)
    if agree:
        worker.prepare(plan, *rollouts)
        share = worker.prepared.share
        own = worker.compute("old logprobs", policy_logprobs_only, share)[0]
        rollouts = [replace(share.rollouts, rollout_logprobs=own)]
    if correction is not None and correction.get("mode") in BYPASSES:
        unusable: Any = None
        worker.compute = unusable  # type: ignore[method-assign]
    reports, prepared = worker.prepare(plan, *rollouts)
    assert {report.sequence_id for report in reports} == set(plan.sequences_of(rank))
    by_sequence = {i: (i % SAMPLES) - 1.0 + 0.1 * i for i in range(GROUPS * SAMPLES)}
    _, (_, signals) = worker.set_advantages(by_sequence)
    first, second = (make_update(worker, minibatch) for minibatch in range(2))
    return [{**prepared, **signals}, first, second]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_llama(tmp_path_factory.mktemp("models") / "policy", seed=3))


Learn = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="module")
def run(gangs: Gangs, model: str, tmp_path_factory: pytest.TempPathFactory) -> Learn:
    """Return metrics of a step, by 1 rank with all responses in a micro-batch or by 2 with one to three."""
    folder = str(tmp_path_factory.mktemp("runs"))

    def run(correction: dict[str, Any] | None, *, ranks: int, **options: Any) -> list[dict[str, float]]:
        tokens = 4096 if ranks == 1 else PROMPT + 2 * MOST_NEW
        found = gangs[ranks].run(
            learn, correction=correction, model=model, folder=str(Path(folder)), tokens=tokens, **options
        )
        return merged(found)

    return run


CORRECTIONS: list[dict[str, Any]] = [
    {"preset": "geo_rs_token_tis", "max_ratio": 1.3, "reject": {"geometric_mean_ratio": [0.9, 1.1]}},
    {"mode": "bypass", "reject": {"token_k3": 0.1, "sequence_max_ratio": [0.4, 2.5]}, "off_policy_mask": 0.1},
    {"mode": "policy_gradient", "weights": "sequence_masked", "min_ratio": 0.7, "max_ratio": 1.4},
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "correction",
    [
        pytest.param(CORRECTIONS[0], marks=pytest.mark.slow),
        CORRECTIONS[1],
        pytest.param(CORRECTIONS[2], marks=pytest.mark.slow),
    ],
    ids=["decoupled", "bypass", "policy_gradient"],
)
def test_a_step_depends_on_neither_ranks_nor_microbatches(run: Learn, correction: dict[str, Any]) -> None:
    one, two = (run(correction, ranks=ranks) for ranks in (1, 2))
    assert_equal(one, two, rel=5e-4)
    prepared, first, second = one
    assert first["update/grad_norm"] > 0
    touched = ("rollout_weight_truncated", "rollout_weight_masked", "rollout_rejected")
    for found in (first, second):
        assert 0 < sum(found[f"experience/{name}/fraction"] for name in touched) < 1
    measured_in = first if correction.get("mode") in BYPASSES else prepared
    assert 0 < measured_in["experience/rollout_ess_token"] < 1
    others = [found for found in one if found is not measured_in]
    assert not any("experience/rollout_ess_token" in found for found in others)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_where_sampler_and_trainer_agree_a_bypass_changes_nothing(run: Learn) -> None:
    plain = run(None, ranks=1, agree=True)
    bypassed = run({"mode": "bypass"}, ranks=1, agree=True)
    assert bypassed[1]["experience/rollout_logprob_diff/max"] < 1e-6
    assert plain[2]["update/clip_fraction/mean"] > 0
    for one, two in zip(plain[1:], bypassed[1:], strict=True):
        updates = [{k: v for k, v in found.items() if k.startswith("update/")} for found in (one, two)]
        assert updates[0] == pytest.approx(updates[1], rel=1e-5, abs=1e-7)
