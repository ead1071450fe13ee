"""The policy's ranks without Ray or vLLM credit steps, also with ranks that have nothing to train on.

The results agree with plain transformers and loops over tokens. The groups' responses are spread over two ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.models.files.tiny import build_tiny_llama
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.types import BatchPlan, MinibatchPlan, Rollouts, StepReward, TokenValues
from rlhf.workers.online.policy import PolicyWorker
from tests.fixtures.workers import make_update
from tests.integration.gang_workers import GROUPS, PROMPT, SAMPLES, rollouts_of, worker_config
from tests.integration.rank_gang import Gang, place_of

SCORES = {i: float((7 * i) % 5) / 2 for i in range(GROUPS * SAMPLES)}
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_llama(tmp_path_factory.mktemp("models") / "policy", seed=3))


def steps_of(sequence_id: int, length: int) -> tuple[StepReward, ...]:
    """Return up to three steps, with a possible end before the response's; every fifth response has no step."""
    ends = sorted({PROMPT + (sequence_id * k) % (length - PROMPT) for k in (1, 2, 4)})
    return tuple(StepReward(end=end, value=0.5 * end - sequence_id) for end in ends) if sequence_id % 5 else ()


def credit(
    rank: int, world_size: int, *, algorithm: dict[str, Any], model: str, folder: str, shares: Sequence[Sequence[int]]
) -> tuple[dict[int, list[float]], Any]:
    """Run one rank: the advantages of the share's tokens by scores and steps, and the metrics of an update by raft."""
    sections = {"rollouts": {"temperature": TEMPERATURE}, "train": {"sequences_per_update": GROUPS, "grad_clip": None}}
    config = worker_config(algorithm, model, folder, workers=world_size, tokens=40, **sections)
    worker, name = PolicyWorker(config, place_of(rank, world_size), optimizer_steps=2), algorithm["name"]
    worker.build()
    rollouts = [rollouts_of(group) for group in range(GROUPS)]
    chosen = [i for share in shares for i in share]
    whole = Rollouts.gather(rollouts, chosen)
    minibatch = MinibatchPlan(
        sequences_by_rank=tuple(map(tuple, shares)),
        num_tokens=int(whole.response_mask.sum()),
        num_sequences=len(chosen),
    )
    plan = BatchPlan(
        step=1,
        minibatches=(minibatch,),
        scores={i: SCORES[i] for i in chosen},
        kl_coef=0.0,
        steps={} if name == "raft" else dict(zip(chosen, map(steps_of, chosen, whole.lengths.tolist()), strict=True)),
    )
    reports, _ = worker.prepare(plan, *rollouts)
    assert {report.sequence_id for report in reports} <= set(shares[rank])
    values = [TokenValues(sequence_ids=whole.sequence_ids, lengths=whole.lengths, values=whole.token_ids / 100)]
    _, (means, _) = worker.set_advantages(SCORES if name == "grpo" else None, *(values if name == "ppo" else ()))
    assert set(means) == set(shares[rank])
    per_token = worker.prepared.advantages.split(worker.prepared.share.rollouts.lengths.tolist())
    if not shares[rank]:
        assert [float(one.abs().sum()) for one in per_token] == [0.0]
    found = {i: one.tolist() for i, one in zip(shares[rank], per_token, strict=False)}
    return found, make_update(worker, 0) if name == "raft" else {}


@pytest.mark.timeout(300)
def test_a_rank_may_be_without_a_sequence(gang: Gang, model: str, tmp_path: Path) -> None:
    shares: list[list[int]] = [[], [4]]
    found = gang.run(credit, algorithm={"name": "raft"}, model=model, folder=str(tmp_path), shares=shares)
    row = results(merge_metrics([metrics for _, metrics in found]))
    one = Rollouts.gather([rollouts_of(4 // SAMPLES)], [4])
    tokens, module = one.token_ids[PROMPT:], AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = module(input_ids=one.token_ids[None]).logits[0, PROMPT - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits / TEMPERATURE, tokens)
    assert row["update/loss/mean"] == pytest.approx(float(nll), rel=1e-5)
    assert row["update/grad_norm"] > 0.0
    assert row["update/tokens/total"] == PROMPT + len(tokens)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("shares", [[range(0, 18, 2), range(1, 18, 2)], [[], [4, 7, 9, 10]]], ids=["both", "one"])
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_steps_are_credited_to_the_tokens_up_to_their_ends(
    gang: Gang, model: str, tmp_path: Path, name: str, shares: list[list[int]]
) -> None:
    """grpo: a token has the response's advantage plus the value of all steps that end at or after the token. ppo: the
    test loops over later rewards and the critic's values."""
    if name == "grpo":
        algorithm: dict[str, Any] = {"name": "grpo"}
    else:
        algorithm = {"name": "ppo", "gamma": 0.9, "lam": 0.8, "whiten_advantages": False, "kl": {"coef": 0.0}}
    found = gang.run(credit, algorithm=algorithm, model=model, folder=str(tmp_path), shares=shares)
    advantages = {i: row for part, _ in found for i, row in part.items()}
    assert sorted(advantages) == sorted(i for share in shares for i in share)
    for i, row in advantages.items():
        one = Rollouts.gather([rollouts_of(i // SAMPLES)], [i])
        length = int(one.lengths[0])
        steps = steps_of(i, length)
        if name == "grpo":
            expected = [SCORES[i] + sum(step.value for step in steps if step.end >= t) for t in range(PROMPT, length)]
        else:
            value = [*(one.token_ids / 100).tolist(), 0.0]
            reward = [sum(step.value for step in steps if step.end == t) for t in range(length)]
            reward[-1] += SCORES[i]
            delta = [reward[t] + 0.9 * value[t + 1] - value[t] for t in range(length)]
            expected = [sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, length)) for t in range(PROMPT, length)]
        assert row[:PROMPT] == [0.0] * PROMPT
        assert row[PROMPT:] == pytest.approx(expected, rel=1e-4, abs=1e-4)
