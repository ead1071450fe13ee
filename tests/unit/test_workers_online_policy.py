"""Sessions of several sequences are trained in the policy's update, with the model itself as the engine.

A session is one sample with one score and one weight, for any number and place of sequences.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.agents.trees import assemble_sessions
from rlhf.config.schema.rewards import RewardConfig
from rlhf.config.schema.root import Config
from rlhf.controller.rollout_scorer import request_for
from rlhf.controller.training_scores import TrainingScores
from rlhf.models.packed.forward import hidden_states, policy_logprobs, policy_logprobs_only
from rlhf.models.packed.row_layout import row_layout
from rlhf.roles import CompletedGroup, ScoredGroup
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.types import BatchPlan, GroupScores, MinibatchPlan, Prompt, RankedRollouts, Rollouts, StepReward, TokenValues
from rlhf.workers.online.critic import CriticWorker
from rlhf.workers.online.policy import PolicyWorker
from rlhf.workers.online.streamed import StreamedPolicyWorker
from tests.agent_sessions import call, session
from tests.fakes.configs import online_config
from tests.fixtures.workers import PLACE, assert_same_gradient, engine_of, gradient, make_update
from tests.tiny_architectures import tiny_model

PROMPT = Prompt(prompt_id=0, token_ids=(1, 2), text="", columns={})
BRANCHED = session(  # sequences of 9, 6 and 4 tokens, of which 4, 1 and 2 are trained
    call([1, 2], [3, 4]),
    call([1, 2, 3, 4, 5, 6, 7], [8, 9]),
    call([1, 2, 3, 4, 10], [11]),
    call([12, 13], [14, 15]),
)
SINGLE = session(call([1, 2], [16, 17, 18]))


class Worker(PolicyWorker):
    """A worker on one rank with the model as the engine."""

    def __init__(self, config: Config, model: Any) -> None:
        super().__init__(config, PLACE, optimizer_steps=1)
        self.layout, self.engine = row_layout(model), engine_of(model)


class StreamedWorker(Worker, StreamedPolicyWorker):
    """A worker with a batch in portions."""


def worker_of(model: Any, *, tokens: int = 100, kind: type[Worker] = Worker, **algorithm: Any) -> Worker:
    config = online_config(
        algorithm={"kl": {"coef": 0.0}, **algorithm},
        rollouts={"prompts_per_step": 1, "max_new_tokens": 8},
        train={"steps": 1, "lr": 1e-2, "sequences_per_update": 2, "max_tokens_per_microbatch": tokens},
    )
    return kind(config, model)


def rollouts() -> Rollouts:
    request = request_for(PROMPT, group_id=0, first_sequence_id=0, samples=2, run_seed=0)
    return assemble_sessions(request, [BRANCHED, SINGLE])[0]


def plan(**changes: Any) -> BatchPlan:
    whole = MinibatchPlan(sequences_by_rank=((0, 1),), num_tokens=10, num_sequences=2)
    return BatchPlan(step=1, minibatches=(whole,), scores={0: 2.0, 1: -1.0}, kl_coef=0.0, **changes)


@pytest.mark.parametrize("tokens", [100, 9])
@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("token_mean", (1 / 10, 1 / 10)),
        ("sequence_mean_token_mean", (1 / (7 * 2), 1 / (3 * 2))),
        ("sequence_mean_token_sum", (1 / 2, 1 / 2)),
    ],
)
def test_a_session_has_the_weight_of_one_response(aggregation: str, weights: tuple[float, float], tokens: int) -> None:
    """At the sampling weights, the loss has the gradient of weight * advantage * logprob over a session's tokens."""
    model, advantages = tiny_model("llama").double(), {0: 2.0, 1: -1.0}
    worker = worker_of(model, tokens=tokens, name="grpo", aggregation=aggregation)
    worker.prepare(plan(), rollouts())
    _, (means, _) = worker.set_advantages(advantages)
    assert means == pytest.approx(advantages)
    metrics = results(make_update(worker, 0))
    found = gradient(model)
    batch = rollouts()
    model.zero_grad(set_to_none=True)
    for row, sample in enumerate(batch.sequence_ids.tolist()):
        alone = batch.take([row])
        logprobs = policy_logprobs_only(model, alone.token_ids, alone.lengths, mask=alone.response_mask)
        (-weights[sample] * advantages[sample] * logprobs.sum()).backward()
    assert_same_gradient(found, gradient(model))
    # alone, the micro-batches hold 9 + 6 + 4 + 5 tokens; in one, the prompt and the first call are not repeated
    assert metrics["update/tokens/total"] == (9 + 2 + 4 + 3 if tokens == 100 else 9 + 6 + 4 + 5)


def test_the_signals_of_a_session_are_what_the_only_update_saw_in_all_of_its_sequences() -> None:
    """Old log-probabilities come from before the update; a sample of another rank is left out."""
    model, batch = tiny_model("llama"), rollouts().of_samples([0])
    worker, mask = worker_of(model, name="grpo"), batch.response_mask
    before = policy_logprobs_only(model, batch.token_ids, batch.lengths, mask=mask).detach()

    def step(divisor: float) -> SimpleNamespace:
        with torch.no_grad():
            model.lm_head.weight.mul_(2.0)
        return SimpleNamespace(grad_norm=1.0, lr=0.0)

    worker.engine.step = step  # type: ignore[method-assign, assignment]
    worker.prepare(plan(), rollouts())
    worker.set_advantages({0: 2.0, 1: -1.0})
    assert worker.prepared.old_logprobs is None  # only the update computes them
    make_update(worker, 0)
    signals, size = worker.token_signals((99, 0))
    assert size == 9 + 6 + 4
    assert signals.sequence_ids.tolist() == [0, 0, 0]
    assert signals.advantages[mask].tolist() == [2.0] * 7
    torch.testing.assert_close(signals.old_logprobs[mask], before[mask], rtol=1e-5, atol=1e-5)
    assert signals.ref_logprobs.isnan().all()


def test_without_a_taught_response_rlsd_has_grpos_advantages_and_measures_no_teacher() -> None:
    worker = worker_of(tiny_model("llama"), name="rlsd")
    unknown: Any = SimpleNamespace(logprobs=lambda share, _: torch.full((len(share.rollouts.token_ids),), torch.nan))
    worker.self_teacher = unknown
    worker.prepare(plan(), rollouts())
    _, (means, metrics) = worker.set_advantages({0: 2.0, 1: -1.0})
    assert means == pytest.approx({0: 2.0, 1: -1.0})
    assert "experience/kl_teacher/mean" not in metrics


@pytest.mark.parametrize("tokens", [100, 9])
def test_right_sessions_are_imitated_by_the_mean_over_their_tokens(tokens: int) -> None:
    """The session with a score of 2 has seven tokens in three sequences, which may be in separate micro-batches."""
    model = tiny_model("llama")
    worker = worker_of(model, tokens=tokens, name="ppo", imitation={"coef": 0.5})
    worker.algorithm.whitens = False
    batch = rollouts()
    zeros = TokenValues(
        sequence_ids=batch.sequence_ids, lengths=batch.lengths, values=torch.zeros(len(batch.token_ids))
    )
    worker.prepare(plan(imitation={0: 0.5, 1: 0.0}), batch)
    returns, _ = worker.set_advantages(None, zeros)
    assert returns is not None
    critic = object.__new__(CriticWorker)  # reads the returns of sessions of several sequences as they are
    critic.share, critic.data_rank = worker.prepared.share, 0
    critic.prepare(returns)
    assert critic.returns.tolist() == returns.values.tolist()
    worker.prepared.advantages.zero_()
    metrics = results(make_update(worker, 0))
    found = gradient(model)
    model.zero_grad(set_to_none=True)
    right, total = batch.of_samples([0]), 0.0
    for row in range(3):
        alone = right.take([row])
        loss = -policy_logprobs_only(model, alone.token_ids, alone.lengths, mask=alone.response_mask).sum()
        (0.5 / 7 * loss).backward()
        total += loss.item()
    assert_same_gradient(found, gradient(model))
    assert metrics["update/imitation_loss/mean"] == pytest.approx(total / 7, rel=1e-4)
    assert metrics["update/loss/mean"] == pytest.approx(0.5 * total / 7, rel=1e-4)


def test_every_sequence_of_a_session_ends_with_the_sessions_score() -> None:
    worker = worker_of(tiny_model("llama"), name="reinforce")
    worker.algorithm.centers = False
    worker.prepare(plan(), rollouts())
    worker.set_advantages(None)
    batch, advantages = rollouts(), worker.prepared.advantages
    expected = torch.tensor([2.0, 2.0, 2.0, -1.0]).repeat_interleave(batch.lengths)
    torch.testing.assert_close(advantages[batch.response_mask], expected[batch.response_mask])


def test_the_reward_of_a_token_is_lower_where_the_policy_is_above_the_reference() -> None:
    """The reference is 0.5 nats lower at each token, so each of the tokens to come costs 0.1 * 0.5."""
    model, batch = tiny_model("llama"), rollouts()
    worker = worker_of(model, name="reinforce", kl={"coef": 0.1, "estimator": "k1", "place": "reward"})
    worker.algorithm.centers = False
    logprobs = policy_logprobs_only(model, batch.token_ids, batch.lengths, mask=batch.response_mask).detach()
    reference = TokenValues(sequence_ids=batch.sequence_ids, lengths=batch.lengths, values=logprobs - 0.5)
    worker.prepare(replace(plan(), kl_coef=0.1), batch, reference)
    worker.set_advantages(None)
    assert worker.prepared.advantages[-3:].tolist() == pytest.approx([-1.15, -1.1, -1.05], abs=1e-5)


def test_a_step_reward_counts_through_the_sequences_of_its_session() -> None:
    """Steps end in the first sequence, in the branch of the first call, and in the sub-agent's call."""
    worker = worker_of(tiny_model("llama"), name="grpo")
    ends = {7: 0.5, 9 + 5: 1.0, 9 + 6 + 2: 4.0}
    steps = {0: tuple(StepReward(end=end, value=value) for end, value in ends.items())}
    worker.prepare(plan(steps=steps), rollouts())
    worker.set_advantages({0: 0.0, 1: 0.0})
    found = worker.prepared.advantages[rollouts().response_mask].tolist()
    # the first call's tokens come before both the second call and the branch; the branch's token only before its step
    assert found == [1.5, 1.5, 0.5, 0.0, 1.0, 4.0, 0.0, 0.0, 0.0, 0.0]


def test_gigpo_compares_the_calls_of_sessions_that_read_the_same() -> None:
    """The calls of the first session return 0.25, 0.5, 1 and 2 at gamma 0.5, and those of the second -0.5 and -1.

    The first calls read the same prompt, and the third call of the first session, in a branch, reads the same result
    as the second call of the other session.
    """
    algorithm: Any = {"name": "gigpo", "gamma": 0.5}
    worker = worker_of(tiny_model("llama"), **algorithm)
    other = session(call([1, 2], [3]), call([1, 2, 3, 10], [9]))
    request = request_for(PROMPT, group_id=0, first_sequence_id=0, samples=2, run_seed=0)
    batch, infos = assemble_sessions(request, [BRANCHED, other])
    scored = ScoredGroup(
        group=CompletedGroup(request=request, rollouts=batch, infos=infos),
        scores=GroupScores(scores=(2.0, -1.0), by_name={"r": (2.0, -1.0)}, errors=()),
    )
    scores = TrainingScores({"r": RewardConfig(function="f")})
    _, turns = scores.by_turn([scored], {}, worker.algorithm.turn_advantages)
    turns = {i: tuple(reversed(of_sample)) for i, of_sample in turns.items()}  # any order has the same tokens
    worker.prepare(plan(turns=turns), batch)
    worker.set_advantages({0: 0.0, 1: 10.0})
    found = worker.prepared.advantages
    assert found[batch.response_mask].tolist() == [0.375, 0.375, 0.0, 0.0, 1.0, 0.0, 0.0, 10 - 0.375, 10 - 1.0]
    assert not found[~batch.response_mask].any()


def test_a_sessions_report_covers_all_of_its_sequences() -> None:
    model = tiny_model("llama")
    worker = worker_of(model, name="grpo", top_entropy_fraction=0.5)  # this selection needs the old log-probabilities
    reports, _ = worker.prepare(plan(), rollouts())
    assert [report.sequence_id for report in reports] == [0, 1]
    batch = rollouts().of_samples([0])
    logprobs = policy_logprobs_only(model, batch.token_ids, batch.lengths, mask=batch.response_mask)
    assert reports[0].mean_old_logprob == pytest.approx(float(logprobs.detach().sum()) / 7, rel=1e-5)
    worker.set_advantages({0: 2.0, 1: -1.0})
    chosen = worker.prepared.selections.high_entropy
    assert chosen is not None
    assert int(chosen.sum()) == 5
    merge_metrics([make_update(worker, 0)])


RESTRICTED = session(call([1, 2], [16, 17, 18], fixed=range(3)))


def halves(**portion: Any) -> tuple[BatchPlan, Rollouts]:
    """Return a plan of two minibatches, the first restricted by a grammar, and the rollouts."""
    request = request_for(PROMPT, group_id=0, first_sequence_id=0, samples=2, run_seed=0)
    minibatches = (
        MinibatchPlan(sequences_by_rank=((1,),), num_tokens=0, num_sequences=1),
        MinibatchPlan(sequences_by_rank=((0,),), num_tokens=7, num_sequences=1),
    )
    parts = BatchPlan(step=1, minibatches=minibatches, scores={0: 2.0, 1: -1.0}, kl_coef=0.0, **portion)
    return parts, assemble_sessions(request, [BRANCHED, RESTRICTED])[0]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("selection", [{}, {"top_entropy_fraction": 0.5}, {"name": "kl_cov"}])
def test_a_minibatch_without_a_trained_token_makes_no_optimizer_step(selection: dict[str, Any], streamed: bool) -> None:
    model = tiny_model("llama")
    gradients = []
    for streams in {False, streamed}:
        model.zero_grad(set_to_none=True)
        worker = worker_of(model, kind=StreamedWorker if streams else Worker, **({"name": "grpo"} | selection))
        worker.prepare(*halves())
        worker.set_advantages({0: 2.0, 1: -1.0})
        if isinstance(worker, StreamedWorker):
            worker.forward_backward(0, ends=False)
        assert results(make_update(worker, 0)) == {"update/without_tokens/total": 1.0}
        assert all(weight.grad is None for weight in model.parameters())
        metrics = results(make_update(worker, 1))
        assert metrics["update/grad_norm"] == 1.0
        gradients.append(gradient(model) / (7 if streams else 1))  # the step of an engine divides a sum by its tokens
    torch.testing.assert_close(gradients[0], gradients[-1])


def test_the_critic_makes_no_optimizer_step_without_a_trained_token() -> None:
    critic = object.__new__(CriticWorker)
    critic.share = SimpleNamespace(plan=halves()[0])  # type: ignore[assignment]
    assert make_update(critic, 0) == {}


def test_the_advantage_of_a_single_trained_token_is_centered_only() -> None:
    request = request_for(PROMPT, group_id=0, first_sequence_id=0, samples=1, run_seed=0)
    batch = assemble_sessions(request, [session(call([1, 2], [3]))])[0]
    worker = worker_of(tiny_model("llama"), name="reinforce_plus_plus")
    whole = MinibatchPlan(sequences_by_rank=((0,),), num_tokens=1, num_sequences=1)
    worker.prepare(BatchPlan(step=1, minibatches=(whole,), scores={0: 2.0}, kl_coef=0.0), batch)
    worker.set_advantages(None)
    assert worker.prepared.advantages.tolist() == [0.0, 0.0, 0.0]  # 2 - 2 at the sampled token


@pytest.mark.parametrize("tokens", [100, 9])
def test_a_centered_loss_is_that_of_whole_distributions(tokens: int) -> None:
    """With all tokens of the vocabulary as the head, the term is the sampler's mean of the weighted score."""
    model, batch, advantages = tiny_model("llama").double(), rollouts(), {0: 2.0, 1: -1.0}
    random = torch.Generator().manual_seed(0)
    mask, vocabulary = batch.response_mask, model.config.vocab_size
    sampler = torch.randn(len(mask), vocabulary, generator=random).log_softmax(-1)
    top = sampler.sort(descending=True)
    columns = {name: getattr(batch, name) for name in (*Rollouts.columns(), "sequence_ids", "lengths")}
    columns["rollout_logprobs"] = sampler.gather(1, batch.token_ids[:, None])[:, 0].where(mask, 0.0)
    ranked = RankedRollouts(**columns, top_ids=top.indices.int(), top_logprobs=top.values)
    correction = {"preset": "score_centering", "center_top_k": vocabulary, "max_ratio": 1.5}
    worker = worker_of(model, tokens=tokens, name="grpo", correction=correction)
    worker.prepare(plan(), ranked)
    worker.set_advantages(advantages)
    merge_metrics([make_update(worker, 0)])
    found = gradient(model)
    model.zero_grad(set_to_none=True)
    for row, sample in enumerate(batch.sequence_ids.tolist()):
        alone, start = batch.take([row]), int(batch.lengths[:row].sum())
        logits = model.lm_head(hidden_states(model, alone.token_ids, alone.lengths))
        logprobs = logits.log_softmax(-1)[:-1]  # of the next token
        q = sampler[start + 1 : start + len(alone.token_ids)]
        weights = (logprobs.detach() - q).exp().clamp(max=1.5)
        at = alone.token_ids[1:, None]
        score = (weights * logprobs).gather(1, at)[:, 0] - (q.exp() * weights * logprobs).sum(1)
        (-advantages[sample] / 10 * score.where(alone.response_mask[1:], 0.0).sum()).backward()
    assert_same_gradient(found, gradient(model))


@pytest.mark.parametrize("function", [policy_logprobs, policy_logprobs_only])
def test_a_replayed_support_is_the_whole_distribution_of_the_sampled_token(function: Any) -> None:
    """Log-probabilities are those of the logits with all other tokens removed, and so is the gradient."""
    model, batch = tiny_model("llama"), rollouts()
    mask, count = batch.response_mask, 5
    draws = torch.rand(len(mask), model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    draws[torch.arange(len(mask)), batch.token_ids] = 2.0  # every support holds the sampled token
    top_ids = draws.topk(count).indices
    kept = torch.arange(count) < torch.arange(len(mask))[:, None] % count + 1
    columns = {name: getattr(batch, name) for name in (*Rollouts.columns(), "sequence_ids", "lengths")}
    top = torch.where(kept, -1.0, -torch.inf).where(mask[:, None], 0.0)
    ranked = RankedRollouts(**columns, top_ids=top_ids.int().where(mask[:, None], 0), top_logprobs=top)
    worker = worker_of(model, tokens=9, name="grpo")
    object.__setattr__(worker.config.policy, "support_replay", True)
    worker.prepare(plan(), ranked)
    found = torch.zeros(len(mask))
    for microbatch in worker.prepared.share.microbatches[0]:
        result = worker.forward(function, worker.prepared.share, microbatch)
        found[microbatch.tokens] = result if function is policy_logprobs_only else result[0]
    grown = torch.autograd.grad(found.sum(), model.lm_head.weight)[0]
    parts = []
    for row in range(len(batch.lengths)):
        alone, start = batch.take([row]), int(batch.lengths[:row].sum())
        logits = model.lm_head(hidden_states(model, alone.token_ids, alone.lengths))
        for place in range(1, len(alone.token_ids)):
            at = start + place
            allowed = top_ids[at][kept[at]]
            whole = logits[place - 1, allowed].log_softmax(0)[(allowed == batch.token_ids[at]).nonzero()[0, 0]]
            parts.append(whole if mask[at] else whole * 0.0)
    torch.testing.assert_close(found.sum(), torch.stack(parts).sum(), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(torch.stack(parts).sum(), model.lm_head.weight)[0]
    assert_same_gradient(grown, expected)
    assert (found[~mask] == 0.0).all()
