"""The worker for advantages, without Ray or vLLM: a step depends on neither ranks nor micro-batches.

Tests concern what needs the tokens of the whole optimizer step: selection by entropy or covariance, and the batch
baseline. A process for each rank is started for each layout and serves all tests. Not covered: sequence parallelism,
except in the comparison of a batch in portions with a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.agents.trees import assemble_sessions
from rlhf.config.schema.root import Config
from rlhf.controller.rollout_scorer import request_for
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.tracking.metrics.reductions import Mean
from rlhf.types import BatchPlan, MinibatchPlan, OwnLoss, Prompt, RolloutInfo, Rollouts, StepReward, TokenSignals
from rlhf.workers.online.policy import PolicyWorker
from rlhf.workers.online.streamed import StreamedPolicyWorker
from tests.agent_sessions import call, session
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

ALGORITHMS: Mapping[str, dict[str, Any]] = {
    "entropy": {"name": "grpo", "top_entropy_fraction": 0.2, "advantage_clip": 1.0, "entropy": {"coef": 0.01}},
    "clip_cov": {"name": "clip_cov", "fraction": 0.2, "min_covariance": -100.0, "max_covariance": 100.0},
    "kl_cov": {"name": "kl_cov", "fraction": 0.2},
    "reinforce": {"name": "reinforce", "kl": {"coef": 0.0}},
}


def plan_of(config: Config, num_ranks: int) -> BatchPlan:
    """Return two minibatches of half of the groups each, with sequences divided in turn."""
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
    """Run one rank: metrics of the advantages, the mean of finished advantages, and metrics of two updates."""
    config = worker_config(algorithm, model, folder, workers=world_size, tokens=tokens)
    worker = PolicyWorker(config, place_of(rank, world_size), optimizer_steps=2)
    worker.build()
    plan = plan_of(config, world_size)
    rollouts = [rollouts_of(group) for group in range(GROUPS)]
    worker.prepare(plan, *rollouts)
    by_sequence = None if algorithm["name"] == "reinforce" else {i: 2.0 - (i * 7 % 5) for i in plan.scores}
    _, (_, found) = worker.set_advantages(by_sequence)
    count = int(worker.prepared.share.rollouts.response_mask.sum())
    done = {"advantages/mean": Mean(total=float(worker.prepared.advantages.sum()), count=count)}
    return [found, done, *(make_update(worker, minibatch) for minibatch in range(2))]


Learn = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="module")
def run(gangs: Gangs, tmp_path_factory: pytest.TempPathFactory) -> Learn:
    """Return metrics by 1 rank with all sequences in a micro-batch or by 2 with about one sequence."""
    folder = tmp_path_factory.mktemp("runs")
    model = str(build_tiny_llama(folder / "policy", seed=3))

    def run(algorithm: dict[str, Any], *, ranks: int) -> list[dict[str, float]]:
        tokens = 4096 if ranks == 1 else PROMPT + MOST_NEW
        found = gangs[ranks].run(learn, algorithm=algorithm, model=model, folder=str(folder), tokens=tokens)
        return merged(found)

    return run


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
    assert_equal(one, two)


def sessions_of(group: int) -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
    """A group's sessions: a chat, a chat with a retry, and a chat with a sub-agent. Calls have up to 20 tokens."""
    random = torch.Generator().manual_seed(group)

    def some(count: int) -> list[int]:
        return torch.randint(3, 300, (count,), generator=random).tolist()

    prompt, sessions = some(PROMPT), []
    for _ in range(SAMPLES):
        first, second = some(3), some(4)
        longer = [*prompt, *first, *some(2)]
        sessions.append([call(prompt, first, first=1), call(longer, second, first=2)])
    sessions[1].append(call(sessions[1][1].prompt_ids.tolist(), some(2), first=3))
    sessions[2].append(call(some(4), some(5), first=1))
    request = request_for(
        Prompt(prompt_id=group, token_ids=tuple(prompt), text="", columns={}),
        group_id=group,
        first_sequence_id=group * SAMPLES,
        samples=SAMPLES,
        run_seed=0,
    )
    return assemble_sessions(request, [session(*calls) for calls in sessions])


def learn_sessions(
    rank: int, world_size: int, *, algorithm: dict[str, Any], model: str, folder: str, tokens: int
) -> tuple[list[Any], list[int]]:
    """Run one rank: metrics of the experience, of the advantages and of two updates, and the samples' ids."""
    config = worker_config(algorithm, model, folder, workers=world_size, tokens=tokens)
    worker = PolicyWorker(config, place_of(rank, world_size), optimizer_steps=2)
    worker.build()
    groups = [sessions_of(group) for group in range(GROUPS)]
    infos = {info.sequence_id: info for _, group in groups for info in group}
    plan = plan_of(config, world_size)
    minibatches = [
        replace(one, num_tokens=sum(infos[i].num_response_tokens for ids in one.sequences_by_rank for i in ids))
        for one in plan.minibatches
    ]
    ends = {i: infos[i].num_prompt_tokens for i in plan.scores}  # the first sampled token of each session
    steps = {i: (StepReward(end=end, value=0.1 * i),) for i, end in ends.items()}
    plan = replace(plan, minibatches=tuple(minibatches), steps=steps)
    reports, metrics = worker.prepare(plan, *(rollouts for rollouts, _ in groups))
    assert sorted(report.sequence_id for report in reports) == sorted(plan.sequences_of(rank))
    _, (means, advantages) = worker.set_advantages({i: 2.0 - (i * 7 % 5) for i in plan.scores})
    return [metrics, advantages, *(make_update(worker, minibatch) for minibatch in range(2))], sorted(means)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_on_sessions_depends_on_neither_ranks_nor_microbatches(gangs: Gangs, tmp_path: Path) -> None:
    """A group is one tree, or micro-batches of about one sequence on two ranks. The selection is over all tokens."""
    model = str(build_tiny_llama(tmp_path / "policy", seed=3))
    algorithm = {"name": "grpo", "aggregation": "sequence_mean_token_mean", "top_entropy_fraction": 0.5}
    rows, computed = [], []
    for ranks, tokens in ((1, 4096), (2, 20)):
        found = gangs[ranks].run(learn_sessions, algorithm=algorithm, model=model, folder=str(tmp_path), tokens=tokens)
        assert sorted(i for _, ids in found for i in ids) == list(range(GROUPS * SAMPLES))
        rows.append(merged([metrics for metrics, _ in found]))
        computed.append(sum(row.pop("update/tokens/total", 0.0) for row in rows[-1]))
    assert computed[0] < computed[1]
    assert rows[0][2]["update/grad_norm"] > 0
    assert_equal(*rows)


PORTIONS = ((4,), (0, 5), (2, 1, 3))  # groups in the order in which they arrive
STREAMED: Mapping[str, dict[str, Any]] = {
    "tokens of one minibatch": {
        "algorithm": {"name": "grpo"},
        "minibatches": 1,
        "layouts": ((1, 0, 1), (2, 2, 1)),  # ranks, ZeRO stage, ranks that share a micro-batch
    },
    "sequences of two minibatches": {
        "algorithm": {"name": "grpo", "aggregation": "sequence_mean_token_mean", "entropy": {"coef": 0.01}},
        "minibatches": 2,
        "layouts": ((2, 3, 1), (2, 2, 2)),
    },
    "a constant length, in two passes": {
        "algorithm": {"name": "dr_grpo"},
        "minibatches": 1,
        "layouts": ((1, 0, 1),),
        "epochs_per_batch": 2,
    },
}


def portion_of(plan: BatchPlan, groups: tuple[int, ...], index: int) -> BatchPlan:
    """The plan's sequences of some groups."""
    minibatches = []
    for minibatch in plan.minibatches:
        ranks = tuple(tuple(i for i in ids if i // SAMPLES in groups) for ids in minibatch.sequences_by_rank)
        count = sum(
            int(rollouts_of(i // SAMPLES).take([i % SAMPLES]).response_mask.sum()) for ids in ranks for i in ids
        )
        minibatches.append(MinibatchPlan(sequences_by_rank=ranks, num_tokens=count, num_sequences=sum(map(len, ranks))))
    return replace(plan, minibatches=tuple(minibatches), portion=index)


def learn_streamed(
    rank: int, world_size: int, *, options: dict[str, Any], model: str, folder: str, streamed: bool, **resources: Any
) -> tuple[list[Any], dict[str, torch.Tensor], TokenSignals]:
    """Run one rank: metrics of two steps, the weights afterwards, and the signals of the last batch."""
    options = dict(options)
    algorithm, number = options.pop("algorithm"), options.pop("minibatches")
    train = {"sequences_per_update": GROUPS * SAMPLES // number, "grad_clip": 0.05, "eps": 1e-3} | options
    cluster = {"roles": {"policy": resources}}
    config = worker_config(algorithm, model, folder, workers=world_size, tokens=40, train=train, cluster=cluster)
    kind = StreamedPolicyWorker if streamed else PolicyWorker
    worker = kind(config, place_of(rank, world_size), optimizer_steps=8)
    worker.build()
    num_ranks = world_size // resources.get("sequence_parallel", 1)
    plan = plan_of(config, num_ranks)
    if number == 1:
        whole = MinibatchPlan(
            sequences_by_rank=tuple(plan.sequences_of(rank) for rank in range(num_ranks)),
            num_tokens=sum(one.num_tokens for one in plan.minibatches),
            num_sequences=GROUPS * SAMPLES,
        )
        plan = replace(plan, minibatches=(whole,))
    visits = [1, 0] if number == 2 else [0] * config.train.epochs_per_batch
    parts: list[Any] = []
    for _ in range(2):
        for index, groups in enumerate(PORTIONS if streamed else (tuple(range(GROUPS)),)):
            parts.append(worker.prepare(portion_of(plan, groups, index), *map(rollouts_of, groups))[1])
            parts.append(worker.set_advantages({i: 2.0 - (i * 7 % 5) for i in plan.scores})[1][1])
            if isinstance(worker, StreamedPolicyWorker) and index < len(PORTIONS) - 1:
                worker.forward_backward(visits[0], ends=False)
        if (
            isinstance(worker, StreamedPolicyWorker) and number == 2
        ):  # the last portion is in the gradient too, so an empty pass must end it
            worker.forward_backward(visits[0], ends=False)
        parts += [make_update(worker, minibatch) for minibatch in visits]
    weights = {name: weight.clone() for name, weight in worker.weights(torch.float32)}
    signals, _ = worker.token_signals(tuple(plan.scores))
    return parts, weights, signals


def learn_summed(
    rank: int, world_size: int, *, marks: bool, named: bool, model: str, folder: str, **resources: Any
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Make an optimizer step from the gradients of both minibatches. Return metrics and weights.

    Args:
        marks: let the last gradient mark the end, and not the optimizer step.
        named: name the configured loss.
    """
    train = {"sequences_per_update": GROUPS * SAMPLES // 2, "eps": 1e-3}
    options: Any = {"workers": world_size, "tokens": 40, "train": train, "cluster": {"roles": {"policy": resources}}}
    config = worker_config({"name": "grpo"}, model, folder, **options)
    worker = PolicyWorker(config, place_of(rank, world_size), optimizer_steps=8)
    worker.build()
    plan = plan_of(config, world_size)
    worker.prepare(plan, *map(rollouts_of, range(GROUPS)))
    worker.set_advantages({i: 2.0 - (i * 7 % 5) for i in plan.scores})
    loss = OwnLoss(section=config.algorithm) if named else None
    parts = [worker.forward_backward(0, ends=False, loss=loss), worker.forward_backward(1, ends=marks, loss=loss)]
    return [*parts, worker.optim_step()], {name: one.clone() for name, one in worker.weights(torch.float32)}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_gradients_of_two_minibatches_add_up_over_ranks(gangs: Gangs, tmp_path: Path, zero_stage: int) -> None:
    """An empty pass of the optimizer step may mark the end, and the configured loss may be named."""
    model = str(build_tiny_llama(tmp_path / "policy", seed=3))
    run = partial(gangs[2].run, learn_summed, model=model, folder=str(tmp_path), zero_stage=zero_stage)
    marked, *further = (run(marks=marks, named=named) for marks, named in ((True, False), (False, False), (True, True)))
    norm = results(merge_metrics(part for parts, _ in marked for part in parts))["update/grad_norm"]
    for other in further:
        found = results(merge_metrics(part for parts, _ in other for part in parts))["update/grad_norm"]
        assert found == pytest.approx(norm, rel=1e-6)
        for (_, weights), (_, others) in zip(marked, other, strict=True):
            torch.testing.assert_close(others, weights, rtol=1e-6, atol=1e-8)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", STREAMED)
def test_portions_give_the_updates_of_the_whole_batch(gangs: Gangs, tmp_path: Path, case: str) -> None:
    """The layouts are one rank, two ranks with sharded gradients or weights, and two ranks that share each micro-batch.

    The clip is below every norm, so an update by an undivided sum would be clipped alike: the norms differ. Epsilon is
    above the gradients, so that Adam does not amplify rounding.
    """
    options, model = dict(STREAMED[case]), str(build_tiny_llama(tmp_path / "policy", seed=3))
    for ranks, zero_stage, shared in options.pop("layouts"):
        resources = {"zero_stage": zero_stage, "sequence_parallel": shared}
        run = partial(gangs[ranks].run, learn_streamed, options=options, model=model, folder=str(tmp_path), **resources)
        whole, portions = (run(streamed=streamed)[::shared] for streamed in (False, True))
        rows = [results(merge_metrics(part for parts, _, _ in one for part in parts)) for one in (whole, portions)]
        assert rows[0]["update/grad_norm"] > 0.05
        assert_equal([rows[0]], [rows[1]], rel=1e-4)
        for (_, weights, signals), (_, others, other_signals) in zip(whole, portions, strict=True):
            torch.testing.assert_close(others, weights, rtol=1e-4, atol=2e-6)
            ids = signals.sequence_ids.tolist()
            assert sorted(other_signals.sequence_ids.tolist()) == sorted(ids)
            same_order = TokenSignals.gather([other_signals], ids)
            torch.testing.assert_close(same_order.advantages, signals.advantages)
            columns = [one.old_logprobs for one in (same_order, signals)]
            torch.testing.assert_close(*columns, rtol=1e-4, atol=1e-4, equal_nan=True)
