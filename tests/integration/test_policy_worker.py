"""The worker that learns by advantages, without Ray or vLLM: a step depends on neither ranks nor micro-batches.

What is chosen among the tokens of the whole optimizer step is the point: by entropy, by covariance, and the baseline of
the batch. One process a rank is started for each layout and serves all tests. Not covered: sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.files.load import checked
from rlhf.config.schema.root import Config
from rlhf.models.packed import policy_logprobs_only
from rlhf.models.tiny import build_tiny_llama
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.tracking.metrics.reductions import Mean
from rlhf.types import BatchPlan, MinibatchPlan, TokenSignals, TokenValues
from rlhf.workers.online.policy import PolicyWorker
from tests.integration.rank_gang import Gang, place_of
from tests.integration.test_online_pairs import GROUPS, MOST_NEW, PROMPT, SAMPLES, rollouts_of

ALGORITHMS: Mapping[str, dict[str, Any]] = {
    "entropy": {"name": "grpo", "top_entropy_fraction": 0.2, "advantage_clip": 1.0, "entropy": {"coef": 0.01}},
    "clip_cov": {"name": "clip_cov", "fraction": 0.2, "min_covariance": -100.0, "max_covariance": 100.0},
    "kl_cov": {"name": "kl_cov", "fraction": 0.2},
    "reinforce": {"name": "reinforce", "kl": {"coef": 0.0}},
}


def config_of(algorithm: Mapping[str, Any], model: str, folder: str, *, workers: int, tokens: int) -> Config:
    config = Config.model_validate(
        {
            "run": {"name": "workers", "dir": folder},
            "policy": {"model": model, "dtype": "float32"},
            "algorithm": algorithm,
            "data": {"train": "x.jsonl", "apply_chat_template": False, "max_prompt_tokens": PROMPT},
            "rollouts": {"prompts_per_step": GROUPS, "samples_per_prompt": SAMPLES, "max_new_tokens": MOST_NEW},
            "rewards": {"r": {"function": "f"}},
            "train": {
                "steps": 2,
                "lr": 1e-2,
                "sequences_per_update": GROUPS * SAMPLES // 2,
                "max_tokens_per_microbatch": tokens,
                "grad_clip": 100.0,
            },
            "cluster": {"roles": {"policy": {"workers": workers}}},
        }
    )
    return next(iter(checked(config).stages.values()))


def plan_of(config: Config, num_ranks: int) -> BatchPlan:
    """Two minibatches of half of the groups each, whose sequences are dealt out in turn."""
    lengths = [int(rollouts.response_mask.sum()) for rollouts in map(rollouts_of, range(GROUPS))]
    half, minibatches = GROUPS // 2, []
    for start in (0, half):
        ids = range(start * SAMPLES, (start + half) * SAMPLES)
        minibatches.append(
            MinibatchPlan(
                sequences_by_rank=tuple(tuple(ids[rank::num_ranks]) for rank in range(num_ranks)),
                num_tokens=sum(lengths[start : start + half]),
                num_sequences=len(ids),
            )
        )
    coef = config.algorithm.entropy.coef
    scores = {i: float(i % SAMPLES) - 0.3 * i for i in range(GROUPS * SAMPLES)}
    return BatchPlan(step=1, minibatches=tuple(minibatches), scores=scores, kl_coef=0.0, entropy_coef=coef)


def learn(rank: int, world_size: int, *, algorithm: dict[str, Any], model: str, folder: str, tokens: int) -> list[Any]:
    """One rank: metrics of the advantages, their mean when they are done, and metrics of two updates."""
    config = config_of(algorithm, model, folder, workers=world_size, tokens=tokens)
    worker = PolicyWorker(config, place_of(rank, world_size), optimizer_steps=2, reference_is_adapter_off=False)
    worker.build()
    plan = plan_of(config, world_size)
    rollouts = [rollouts_of(group) for group in range(GROUPS)]
    worker.prepare(plan, *rollouts)
    by_sequence = None if algorithm["name"] == "reinforce" else {i: 2.0 - (i * 7 % 5) for i in plan.scores}
    _, (_, found) = worker.set_advantages(by_sequence)
    count = int(worker.share.rollouts.response_mask.sum())
    done = {"advantages/mean": Mean(total=float(worker.advantages.sum()), count=count)}
    return [found, done, *(worker.update(minibatch) for minibatch in range(2))]


Learn = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learn]:
    """Metrics by 1 rank with all sequences in a micro-batch or by 2 with about one."""
    folder = tmp_path_factory.mktemp("runs")
    model = str(build_tiny_llama(folder / "policy", seed=3))
    gangs = {1: Gang(1), 2: Gang(2)}

    def run(algorithm: dict[str, Any], *, ranks: int) -> list[dict[str, float]]:
        tokens = 4096 if ranks == 1 else PROMPT + MOST_NEW
        found = gangs[ranks].run(learn, algorithm=algorithm, model=model, folder=str(folder), tokens=tokens)
        return [results(merge_metrics(parts)) for parts in zip(*found, strict=True)]

    yield run
    for gang in gangs.values():
        gang.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ALGORITHMS)
def test_a_step_depends_on_neither_ranks_nor_microbatches(run: Learn, case: str) -> None:
    one, two = (run(ALGORITHMS[case], ranks=ranks) for ranks in (1, 2))
    assert one[2]["update/grad_norm"] > 0
    if case in ("clip_cov", "kl_cov"):
        assert one[2]["update/selected/fraction"] > 0.1
    if case == "reinforce":
        assert abs(one[0]["advantages/mean"]) > 0.1
        assert one[1]["advantages/mean"] == pytest.approx(0.0, abs=1e-6)
    if case == "entropy":
        assert one[0]["advantages/clipped/fraction"] > 0.1
        whole = run({**ALGORITHMS[case], "top_entropy_fraction": None}, ranks=1)
        assert one[2]["update/grad_norm"] != pytest.approx(whole[2]["update/grad_norm"], rel=0.1)
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"update/tokens/total"}:  # a prompt may be computed for fewer of its responses
            assert first[key] == pytest.approx(second[key], rel=2e-4, abs=2e-6), key


def signals(rank: int, world_size: int, *, algorithm: dict[str, Any], model: str, folder: str, tokens: int) -> Any:
    """One rank: what it tells of sequences 1, 4 and one that nobody has, and the columns that it computed before."""
    config = config_of(algorithm, model, folder, workers=world_size, tokens=tokens)
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"sequences_per_update": GROUPS * SAMPLES})}
    )
    worker = PolicyWorker(config, place_of(rank, world_size), optimizer_steps=1, reference_is_adapter_off=False)
    worker.build()
    plan = plan_of(config, world_size)
    ids = range(GROUPS * SAMPLES)
    whole = MinibatchPlan(
        sequences_by_rank=tuple(tuple(ids[rank::world_size]) for rank in range(world_size)),
        num_tokens=sum(one.num_tokens for one in plan.minibatches),
        num_sequences=len(ids),
    )
    plan = replace(plan, minibatches=(whole,))
    worker.prepare(plan, *(rollouts_of(group) for group in range(GROUPS)))
    (before,) = worker.compute("a test", policy_logprobs_only)
    worker.set_advantages({i: float(i) for i in ids})
    assert worker.old_logprobs is None  # only the update computes them
    worker.update(0)
    told, size = worker.token_signals((4, 99, 1))
    assert size == len(told.old_logprobs)
    before = TokenValues(sequence_ids=told.sequence_ids, lengths=told.lengths, values=before[_places(worker, told)])
    masks = worker.share.rollouts.response_mask[_places(worker, told)]
    return told, before, masks


def _places(worker: PolicyWorker, told: TokenSignals) -> torch.Tensor:
    lengths = worker.share.rollouts.lengths
    starts = dict(zip(worker.share.ids, (lengths.cumsum(0) - lengths).tolist(), strict=True))
    pairs = zip(told.sequence_ids.tolist(), told.lengths.tolist(), strict=True)
    return torch.cat([torch.arange(0), *(torch.arange(starts[i], starts[i] + n) for i, n in pairs)])


@pytest.mark.timeout(600)
def test_samples_are_told_what_the_only_update_saw(tmp_path: Path) -> None:
    """Old log-probabilities are those before the update; each rank tells of its own sequences: 4 of 0's, 1 of 1's."""
    model = str(build_tiny_llama(tmp_path / "policy", seed=3))
    gang = Gang(2)
    try:
        found = gang.run(
            signals, algorithm={"name": "grpo", "kl": {"coef": 0.0}}, model=model, folder=str(tmp_path), tokens=4096
        )
    finally:
        gang.close()
    assert [told.sequence_ids.tolist() for told, _, _ in found] == [[4], [1]]
    for told, before, mask in found:
        assert int(mask.sum()) > 0
        torch.testing.assert_close(told.old_logprobs[mask], before.values[mask], rtol=1e-5, atol=1e-5)
        assert told.advantages[mask].unique().tolist() == [float(told.sequence_ids)]
        assert told.ref_logprobs.isnan().all()
