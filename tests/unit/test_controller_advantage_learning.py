"""A step learns advantages from scored groups: responses are selected, and roles are called."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from rlhf.algorithms.online_config import EntropyConfig
from rlhf.controller.advantage_learning import AdvantageLearning
from rlhf.controller.entropy_bonus import EntropyBonus
from rlhf.controller.learning import OnlineRoles, Signals
from rlhf.controller.rollout_report import rollout_metrics
from rlhf.controller.streamed_learning import StreamedAdvantageLearning
from rlhf.controller.training_scores import TrainingScores
from rlhf.errors import UserError
from rlhf.roles import RemoteColumns, ScoredGroup
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.types import BatchPlan, GroupScores, StepReward
from tests.fakes.configs import online_config
from tests.fakes.groups import scored_groups
from tests.fakes.records import quiet_record
from tests.fakes.roles import FakePolicy, FakeReference


class Run:
    """A run's learning with all roles, in a folder."""

    def __init__(
        self,
        folder: RunFolder,
        algorithm: Mapping[str, Any],
        *,
        per_update: int,
        rewards: Mapping[str, Any] | None = None,
        streamed: bool = False,
        reference_host: str | None = "policy",
        **rollouts: Any,
    ) -> None:
        config = online_config(
            algorithm=algorithm,
            rollouts={"prompts_per_step": 3, "samples_per_prompt": 4, **rollouts},
            rewards=rewards or {"right": {"function": "f"}, "short": {"function": "f", "weight": 0.5}},
            train={"sequences_per_update": per_update, "epochs_per_batch": 2, "streamed": streamed},
            cluster={"roles": {"reference": {"colocate_with": reference_host}}},
        )
        has_reference = config.algorithm.model_dump()["kl"]["coef"] > 0.0
        self.policy, self.reference = FakePolicy(kl=0.5 if has_reference else None), FakeReference()
        roles: Any = {"policy": self.policy, "reference": self.reference if has_reference else None, "critic": None}
        self.record, unused = quiet_record(folder), cast(Any, None)
        learner = StreamedAdvantageLearning if streamed else AdvantageLearning
        self.learning = learner(config, OnlineRoles(**roles, rollout=unused, reward=unused), self.record)

    def learn(self, found: Sequence[ScoredGroup], step: int = 1) -> Signals:
        async def finish() -> Signals:
            signals = await self.learning.learn(found, step)
            if self.learning.renews_reference(step):
                await self.learning.renew_reference(step)
            self.learning.end_step(found, signals)
            return signals

        self.record.begin_step(1)
        return asyncio.run(finish())

    def stream(self, *portions: Sequence[ScoredGroup]) -> Signals:
        """Learn from groups that arrive during the computation of earlier portions."""

        async def arrive() -> Signals:
            assert isinstance(self.learning, StreamedAdvantageLearning)
            streaming = asyncio.create_task(self.learning.stream(1))
            for portion in portions:
                for scored in portion:
                    self.learning.arrived(scored)
                for _ in range(20):
                    await asyncio.sleep(0)
            await streaming
            found = sorted((one for portion in portions for one in portion), key=lambda one: one.group.request.group_id)
            signals = await self.learning.learn(found, 1)
            self.learning.end_step(found, signals)
            return signals

        self.record.begin_step(1)
        return asyncio.run(arrive())

    @property
    def plan(self) -> BatchPlan:
        assert self.policy.plan is not None
        return self.policy.plan

    @property
    def trained(self) -> list[list[int]]:
        """Return the sequences of each minibatch."""
        return [sorted(i for ids in one.sequences_by_rank for i in ids) for one in self.plan.minibatches]

    @property
    def steps(self) -> dict[int, Any]:
        """Return the values of each sequence's steps."""
        return {i: pytest.approx([step.value for step in steps], abs=1e-5) for i, steps in self.plan.steps.items()}


FIRST, SECOND, FLAT = (0.0, 3.0, 1.0, 2.0), (5.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)


def test_all_responses_are_trained_on_unless_some_are_left_out(folder: RunFolder) -> None:
    run = Run(folder, {"name": "dr_grpo", "kl": {"coef": 0.1}}, per_update=6)
    signals = run.learn(scored_groups(FIRST, SECOND, FLAT))
    assert sorted(i for one in run.trained for i in one) == list(range(12))
    assert [len(one) for one in run.trained] == [6, 6]
    assert sorted(run.policy.updates) == [0, 0, 1, 1]
    assert run.reference.only is None
    assert [signals.advantages[i] for i in range(8)] == [-1.5, 1.5, -0.5, 0.5, 3.75, -1.25, -1.25, -1.25]
    row = run.record.row()
    assert row["advantages/zero_groups/fraction"] == pytest.approx(1 / 3)
    assert "advantages/kept/fraction" not in row


@pytest.mark.parametrize(
    ("by", "kept"),
    [
        # 0 and 3 of (0, 3, 1, 2); 5 and a 0 of (5, 0, 0, 0)
        ("spread", {0: -1.5, 1: 1.5, 4: 2.5, 7: -2.5}),
        ("best", {1: 0.5, 3: -0.5, 4: 2.5, 5: -2.5}),
    ],
)
def test_kept_responses_are_compared_with_each_other(folder: RunFolder, by: str, kept: dict[int, float]) -> None:
    keep = {"count": 2, "by": by}
    run = Run(folder, {"name": "dr_grpo", "kl": {"coef": 0.1}}, per_update=3, keep_per_prompt=keep)
    signals = run.learn(scored_groups(FIRST, SECOND, FLAT))
    assert [len(one) for one in run.trained] == [3, 3]
    trained = sorted(i for one in run.trained for i in one)
    assert trained[:4] == sorted(kept)
    assert run.reference.only == set(trained)
    assert {i: signals.advantages[i] for i in kept} == kept
    assert run.record.row()["advantages/kept/fraction"] == 0.5


def test_raft_trains_on_the_best_that_are_good_enough(folder: RunFolder) -> None:
    run = Run(folder, {"name": "raft", "keep": 2, "min_score": 2.0}, per_update=2)  # three minibatches at most
    run.learn(scored_groups(FIRST, SECOND, FLAT))
    assert sorted(run.trained) == [[1], [3], [4]]
    assert run.policy.rollouts == ["group 0", "group 1"]
    assert run.policy.advantages is None  # the advantages are per token
    row = run.record.row()
    assert row["advantages/kept/fraction"] == 0.25
    assert row["advantages/zero_groups/fraction"] == pytest.approx(1 / 3)


def test_the_reference_follows_the_policy_and_a_resumed_run_has_that_of_its_checkpoint(folder: RunFolder) -> None:
    algorithm = {"name": "grpo", "kl": {"coef": 0.1}, "reference_every": 2}
    run = Run(folder, algorithm, per_update=12)
    seen = []
    for step in range(1, 6):
        run.learn(scored_groups(FIRST, SECOND, FLAT), step)  # one minibatch, two epochs
        seen.append(run.reference.weights)
        if step in (1, 3):
            run.record.write_state(folder.begin_checkpoint(step), {"step": step, **run.learning.state()})
            folder.seal(folder.checkpoint(step), step=step)
            folder.commit_checkpoint(step)
    assert seen == ["initial", "4", "4", "8", "8"]
    assert sorted(path.name for path in folder.references.iterdir()) == ["step_000002", "step_000004"]
    again = Run(folder, algorithm, per_update=12)
    for step, weights in ((1, "initial"), (3, "4")):
        asyncio.run(again.learning.restore(again.record.read_state(step), step))
        assert again.reference.weights == weights
    path = folder.reference(2) / "weights"
    path.write_text("5")
    for damage in (rf"{path} is damaged", r"step_000002\. .*is missing"):
        with pytest.raises(UserError, match=rf"the checkpoint of step 3 needs its reference .*{damage}"):
            asyncio.run(again.learning.restore(again.record.read_state(3), 3))
        if folder.reference(2).exists():
            folder.reference(2).rename(folder.reference(3))


def test_a_reference_that_no_checkpoint_needs_is_removed(folder: RunFolder) -> None:
    run = Run(folder, {"name": "ppo", "kl": {"coef": 0.1}, "reference_every": 1}, per_update=12)
    for step in (1, 2, 3):
        run.learn(scored_groups(FIRST, SECOND, FLAT), step)
    assert [path.name for path in folder.references.iterdir()] == ["step_000003"]


def test_a_penalty_in_the_reward_is_felt_before_the_comparison(folder: RunFolder) -> None:
    penalty = {"coef": 0.1, "estimator": "k1", "place": "reward"}
    run = Run(folder, {"name": "remax", "kl": penalty}, per_update=12)
    found = scored_groups(FIRST, SECOND, FLAT, greedy=[1.0, 0.0, 2.0])
    signals = run.learn(found)
    # each sampled response has a KL of 0.5, so its score falls by 0.05; the greedy score stays
    expected = [-1.05, 1.95, -0.05, 0.95, 4.95, -0.05, -0.05, -0.05, *[-1.05] * 4]
    assert [signals.advantages[i] for i in range(12)] == pytest.approx(expected)
    assert results(merge_metrics([rollout_metrics(found, version=0)]))["rewards/greedy/mean"] == 1.0


def test_a_greedy_response_has_the_length_penalty_of_the_sampled_ones(folder: RunFolder) -> None:
    penalty = {"by": "band", "start": 1, "end": 5, "weight": 1.0}  # 3 tokens: 0.5; scores below 1 lose nothing
    run = Run(folder, {"name": "remax", "length_penalty": penalty, "kl": {"coef": 0.0}}, per_update=12)
    first, second, third = scored_groups(FIRST, SECOND, FLAT, greedy=[1.0, 0.0, 2.0])
    signals = run.learn([first, second, replace(third, greedy_tokens=9)])
    expected = [0.0, 2.5, 0.5, 1.5], [4.5, 0.0, 0.0, 0.0], [0.5] * 4
    greedy = 0.5, 0.0, 1.0
    for group, (scores, baseline) in enumerate(zip(expected, greedy, strict=True)):
        found = [signals.advantages[4 * group + i] for i in range(4)]
        assert found == pytest.approx([score - baseline for score in scores])


def test_gdpo_is_told_each_reward_and_its_weight(folder: RunFolder) -> None:
    run = Run(folder, {"name": "gdpo"}, per_update=12)
    signals = run.learn(scored_groups(FIRST, SECOND, FLAT))
    # in the first group the rewards are (0, 3, 1, 2) and half of (-2, -1, -3, 0): z-scores over sqrt(5/3)
    z = [(a - 1.5 + 0.5 * (b + 1.5)) for a, b in zip(FIRST, (-2.0, -1.0, -3.0, 0.0), strict=True)]
    found = [signals.advantages[i] for i in range(4)]
    assert found == pytest.approx([found[1] / z[1] * value for value in z], rel=1e-4)
    assert sum(signals.advantages.values()) == pytest.approx(0.0, abs=1e-9)


def test_dapo_takes_the_penalty_for_length_off_before_the_comparison(folder: RunFolder) -> None:
    overlong = {"buffer": 2, "factor": 3.0}
    run = Run(folder, {"name": "dapo", "overlong": overlong}, per_update=12, max_new_tokens=4)
    found = scored_groups(FIRST, SECOND, FLAT)
    short = replace(found[2].group.infos[0], num_response_tokens=2)  # all others have 3 tokens, half of the buffer
    infos = (short, *found[2].group.infos[1:])
    found[2] = replace(found[2], group=replace(found[2].group, infos=infos))
    signals = run.learn(found)
    assert run.record.row()["advantages/length_penalty/mean"] == pytest.approx(1.5 * 11 / 12)
    # scores of 1 and three times 1 - 1.5: mean -0.125, deviations 1.125 and -0.375, std 0.75
    assert [signals.advantages[i] for i in range(8, 12)] == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)


@pytest.mark.parametrize("keep", [None, {"count": 2, "by": "best"}])
def test_a_penalty_within_the_group_sees_the_whole_group(folder: RunFolder, keep: dict[str, Any] | None) -> None:
    """The plan has the penalised scores, so that algorithms with rewards of tokens train on these as well."""
    penalty = {"by": "pass_rate", "weight": 0.5, "min_score": 2.0}
    run = Run(folder, {"name": "grpo", "length_penalty": penalty}, per_update=6, keep_per_prompt=keep)
    found = scored_groups(FIRST, SECOND, FLAT)
    run.learn(found)
    assert FIRST == (0.0, 3.0, 1.0, 2.0)
    # two of four are right, and all have 3 tokens: each right response loses 0.5 * 2 / 4
    assert {i: run.plan.scores[i] for i in range(4) if i in run.plan.scores} == (
        {0: 0.0, 1: 2.75, 2: 1.0, 3: 1.75} if keep is None else {1: 2.75, 3: 1.75}
    )
    right = sum(score >= 2.0 for group in (FIRST, SECOND, FLAT) for score in group)
    shares = [sum(score >= 2.0 for score in group) for group in (FIRST, SECOND, FLAT)]
    expected = sum(0.5 * count / 4 * count for count in shares) / 12
    assert right
    assert run.record.row()["advantages/length_penalty/mean"] == pytest.approx(expected)


def test_the_entropy_bonus_follows_what_the_updates_measured(folder: RunFolder) -> None:
    bonus = {"coef": 0.01, "adaptive": {"target": 0.6, "step": 0.005}}
    run = Run(folder, {"name": "grpo", "entropy": bonus}, per_update=12)
    in_force = []
    for entropy in (0.5, 0.7, 0.4):  # coefficients 0.01, 0.015 (not applied), 0.01
        run.policy.entropy = entropy
        run.learn(scored_groups(FIRST, SECOND, FLAT))
        in_force.append(run.plan.entropy_coef)
        assert run.record.row()["update/entropy_coef"] == in_force[-1]
    assert in_force == pytest.approx([0.01, 0.015, 0.0])
    other = Run(folder, {"name": "grpo", "entropy": bonus}, per_update=12)
    asyncio.run(other.learning.restore(run.learning.state(), 3))
    other.learn(scored_groups(FIRST, SECOND, FLAT))
    assert other.plan.entropy_coef == pytest.approx(0.015)


def test_the_entropy_coefficient_rests_above_the_target_and_has_bounds() -> None:
    adaptive = {"target": 0.5, "step": 0.01, "max_coef": 0.025}
    bonus = EntropyBonus(EntropyConfig.model_validate({"coef": 0.0, "adaptive": adaptive}))
    in_force = []
    for entropy in (0.4, None, 0.3, 0.2, 0.7, 0.45):  # None: a step without an update of the policy
        bonus.adapt(entropy)
        in_force.append(bonus.in_force)
    # 0.01, 0.02, 0.025 at the bound; above the target 0.015, which is not applied; then 0.025 again
    assert in_force == pytest.approx([0.01, 0.01, 0.02, 0.025, 0.0, 0.025])
    for _ in range(3):
        bonus.adapt(0.6)
    assert bonus.coef == 0.0
    fixed = EntropyBonus(EntropyConfig(coef=0.1))
    fixed.adapt(9.0)
    assert fixed.in_force == 0.1


BY_STEP = {
    "right": {"function": "f"},
    "sound": {"function": "f.py:g", "credit": "step", "weight": 0.5, "gate": "parses"},
    "parses": {"function": "f", "weight": 0.0},
}


def in_steps(scored: ScoredGroup, *values: Sequence[float], parses: Sequence[float]) -> ScoredGroup:
    """Return the group with steps beside the scored reward. The steps end at the tokens 3, 4, ..."""
    told = tuple(tuple(StepReward(end=3 + n, value=v) for n, v in enumerate(one)) for one in values)
    right = scored.scores.scores
    by_name = {"right": right, "sound": tuple(map(sum, values)), "parses": tuple(parses)}
    total = tuple(r + 0.5 * p * sum(one) for r, p, one in zip(right, parses, values, strict=True))
    return replace(scored, scores=GroupScores(scores=total, by_name=by_name, errors=(), steps={"sound": told}))


def test_steps_are_compared_with_all_steps_of_their_group(folder: RunFolder) -> None:
    """After gating, the first group's steps are 1, 0 | 1, 1 | 0 (gate 0) | 3 with a mean of 1: 0, -1 | 0, 0 | -1 | 2,
    over the deviation sqrt(6 / 5), times the weight. The rest of the score is compared separately. The reward does not
    apply to the second group."""
    run = Run(folder, {"name": "grpo"}, per_update=12, rewards=BY_STEP)
    first, second, flat = scored_groups(FIRST, SECOND, FLAT)
    second = replace(second, scores=GroupScores(scores=SECOND, by_name={"right": SECOND}, errors=()))
    first = in_steps(first, (1.0, 0.0), (1.0, 1.0), (9.0,), (3.0,), parses=(1.0, 1.0, 0.0, 1.0))
    flat = in_steps(flat, (2.0,), (), (2.0, 2.0), (2.0,), parses=(1.0, 1.0, 1.0, 1.0))
    signals = run.learn([first, second, flat])
    unit, none = 0.5 / (6 / 5) ** 0.5, {8: [0.0], 9: [], 10: [0.0, 0.0], 11: [0.0]}
    assert run.steps == {0: [0.0, -unit], 1: [0.0, 0.0], 2: [-unit], 3: [2 * unit], **none}
    assert all([step.end for step in steps] == [3, 4][: len(steps)] for steps in run.plan.steps.values())
    assert [run.plan.scores[i] for i in range(4)] == pytest.approx(FIRST)
    std = (5 / 3) ** 0.5
    assert [signals.advantages[i] for i in range(4)] == pytest.approx([(s - 1.5) / std for s in FIRST], rel=1e-5)
    assert [signals.advantages[i] for i in range(8, 12)] == pytest.approx([0.0] * 4, abs=1e-6)
    assert first.scores.scores[0] == 0.5  # the reported scores include the steps


def test_kept_responses_steps_are_compared_with_each_other_and_rewards_to_come_get_them_as_they_are(
    folder: RunFolder,
) -> None:
    """The best two of the scores 0.5, 4, 1, 3.5 are kept, with the steps 1, 1 | 3: mean 5/3."""
    given: Any = ((1.0, 0.0), (1.0, 1.0), (9.0,), (3.0,))
    keep = {"count": 2, "by": "best"}
    run = Run(folder, {"name": "dr_grpo"}, per_update=2, rewards=BY_STEP, keep_per_prompt=keep)
    run.learn([in_steps(scored_groups(FIRST)[0], *given, parses=(1.0, 1.0, 0.0, 1.0))])
    assert run.steps == {1: [-1 / 3, -1 / 3], 3: [2 / 3]}
    run = Run(folder, {"name": "reinforce", "kl": {"coef": 0.0}}, per_update=12, rewards=BY_STEP)
    run.learn([in_steps(scored_groups(FIRST)[0], *given, parses=(1.0, 2.0, 0.0, 1.0))])
    assert run.steps == {0: [0.5, 0.0], 1: [1.0, 1.0], 2: [0.0], 3: [1.5]}
    assert run.policy.advantages is None
    assert [run.plan.scores[i] for i in range(4)] == pytest.approx(FIRST)


def test_the_reported_scores_decide_which_responses_are_imitated(folder: RunFolder) -> None:
    """The length penalty takes the training scores of all responses below min_score."""
    penalty = {"by": "band", "start": 0, "end": 1, "weight": 5.0}
    imitation = {"coef": 0.2, "min_score": 2.0}
    run = Run(folder, {"name": "ppo", "imitation": imitation, "length_penalty": penalty}, per_update=12)
    run.learn(scored_groups(FIRST, SECOND, FLAT))
    assert max(run.plan.scores.values()) < 2.0
    reported = [score for scores in (FIRST, SECOND, FLAT) for score in scores]
    assert run.plan.imitation == {i: 0.2 if score >= 2.0 else 0.0 for i, score in enumerate(reported)}
    assert run.plan.for_rank(0).imitation == {i: run.plan.imitation[i] for i in run.plan.received_by(0)}


def test_rlsd_finds_better_responses_by_the_reported_scores_of_whole_groups(folder: RunFolder) -> None:
    """The best response, of the score 3, is truncated and not trained on; with the penalty no score reaches 2."""

    class Prompts:
        def __init__(self) -> None:
            self.better: dict[int, int | None] = {}

        async def privileged_prompts(self, group: Any, contexts: Any) -> Any:
            self.better |= {i: context.better for i, context in contexts.items()}
            return RemoteColumns(ref=cast(Any, "prompts"), sequence_ids=tuple(contexts))

    algorithm = {
        "name": "rlsd",
        "mask_truncated": True,
        "length_penalty": {"by": "band", "start": 0, "end": 1, "weight": 5.0},
        "privileged": {"template": "{prompt}\n\n{better_response}", "success_score": 2.5},
    }
    run, prompts = Run(folder, algorithm, per_update=3), Prompts()
    run.learning.roles = replace(run.learning.roles, reward=cast(Any, prompts))
    (first,) = scored_groups(FIRST)
    best = max(range(4), key=lambda place: first.scores.scores[place])
    run.learn([cut(first, best)])
    assert prompts.better == {i: best for i in range(4) if i != best}


def test_a_group_is_flat_if_its_steps_are_too(folder: RunFolder) -> None:
    """Equal scores with different steps teach; with a gate of 0, or a weight of 0, equal scores do not teach."""
    run = Run(folder, {"name": "grpo"}, per_update=12, rewards=BY_STEP)
    (one,) = scored_groups((0.0, 0.0))
    told = ((1.0, 0.0), (0.5, 0.5))
    found = [in_steps(one, *told, parses=(1.0, 1.0)), in_steps(one, *told, parses=(0.0, 0.0))]
    assert found[0].scores.scores == (0.5, 0.5)
    config, algorithm = run.learning.config, run.learning.algorithm
    assert [run.learning.scores.is_flat(scored, config, algorithm) for scored in found] == [False, True]
    silent = {**config.rewards, "sound": config.rewards["sound"].model_copy(update={"weight": 0.0})}
    assert TrainingScores(silent).is_flat(found[0], config, algorithm)


def cut(scored: ScoredGroup, *places: int) -> ScoredGroup:
    """Return the group with some responses truncated at the limit of tokens."""
    infos = scored.group.infos
    ends = [replace(info, finish_reason="length") if i in places else info for i, info in enumerate(infos)]
    return replace(scored, group=replace(scored.group, infos=tuple(ends)))


def without_tokens(scored: ScoredGroup) -> ScoredGroup:
    """Return the group as sessions with sampled tokens restricted by a grammar."""
    infos = tuple(replace(info, num_response_tokens=0) for info in scored.group.infos)
    return replace(scored, group=replace(scored.group, infos=infos))


def test_masked_responses_are_compared_and_not_trained_on(folder: RunFolder) -> None:
    run = Run(folder, {"name": "dr_grpo", "mask_truncated": True, "kl": {"coef": 0.1}}, per_update=6)
    first, second, third = scored_groups(FIRST, SECOND, FIRST)
    signals = run.learn([cut(first, 1), second, cut(third, 0, 1, 2, 3)])
    assert sorted(i for one in run.trained for i in one) == [0, 2, 3, 4, 5, 6, 7]
    # losses are divided by these counts: 3 tokens of each trained response
    assert sum(one.num_sequences for one in run.plan.minibatches) == 7
    assert sum(one.num_tokens for one in run.plan.minibatches) == 7 * 3
    assert run.reference.only == {0, 2, 3, 4, 5, 6, 7}
    assert run.policy.rollouts == ["group 0", "group 1"]
    # the masked score of 3 is in the mean of 1.5
    assert [signals.advantages[i] for i in (0, 2, 3)] == [-1.5, -0.5, 0.5]
    assert signals.trained == {0, 2, 3, 4, 5, 6, 7}
    assert run.record.row()["advantages/kept/fraction"] == pytest.approx(7 / 12)
    run = Run(folder, {"name": "dr_grpo"}, per_update=12)  # without masking
    run.learn([cut(scored, 0, 1, 2, 3) for scored in scored_groups(FIRST, SECOND, FLAT)])
    assert run.trained == [list(range(12))]


@pytest.mark.parametrize(
    ("algorithm", "change", "warning"),
    [
        (
            {"name": "raft", "min_score": 9.0, "kl": {"coef": 0.1, "adaptive": {"target": 1.0}}},
            lambda scored: scored,
            "no response reaches algorithm.min_score, so the policy is not updated",
        ),
        (
            {"name": "dr_grpo", "mask_truncated": True, "kl": {"coef": 0.1}},
            lambda scored: cut(scored, 0, 1, 2, 3),
            "every response was truncated (algorithm.mask_truncated), so nothing is updated",
        ),
        (  # the collector ends the run for a whole batch: here, the kept responses alone have no trained token
            {"name": "dr_grpo", "kl": {"coef": 0.1}},
            without_tokens,
            "a grammar restricted all tokens of the kept responses, so nothing is updated",
        ),
    ],
    ids=["none good enough", "all masked", "all restricted"],
)
def test_without_a_response_to_train_on_the_policy_stays(
    folder: RunFolder, caplog: pytest.LogCaptureFixture, algorithm: Any, change: Any, warning: str
) -> None:
    run = Run(folder, algorithm, per_update=3)
    with caplog.at_level(logging.WARNING):
        signals = run.learn([change(scored) for scored in scored_groups(FIRST, SECOND, FLAT)], step=7)
    assert f"step 7: {warning}" in caplog.text
    assert run.record.row()["time/update_s"] > 0.0  # the throughput is divided by this time
    if change is not without_tokens:
        assert (run.policy.plan, run.policy.updates, signals.reports, signals.trained) == (None, [], {}, frozenset())
        assert signals.advantages == {}
        assert run.learning.state()["kl_coef"] == 0.1
        assert run.record.row()["advantages/kept/fraction"] == 0.0


NORMALIZED = {"right": {"function": "f", "normalize": "group"}}


@pytest.mark.parametrize("solved", [3, 4])
def test_responses_are_chosen_by_the_scores_that_are_reported(folder: RunFolder, solved: int) -> None:
    """Normalised within the group, a right answer among right answers is worth 0, or 0.4999."""
    (scored,) = scored_groups([1.0] * solved + [0.0] * (4 - solved))
    scored = replace(scored, scores=replace(scored.scores, by_name={"right": scored.scores.scores}))
    raft = {"name": "raft", "keep": 2, "min_score": 0.5}
    run = Run(folder, raft, per_update=2, rewards=NORMALIZED)
    run.learn([scored])
    assert sorted(i for one in run.trained for i in one) == [0, 1]


def test_the_best_are_the_best_before_normalisation(folder: RunFolder) -> None:
    """Normalised, the first response scores 1.5 + 0.87 and the last 1.5 - 0.87; as reported 100 and 300."""
    (scored,) = scored_groups((101.5, 200.0, 200.0, 300.0))
    by_name = {"big": (100.0, 200.0, 200.0, 300.0), "small": (1.5, 0.0, 0.0, 0.0)}
    rewards = {"big": {"function": "f", "weight": 0.01, "normalize": "group"}, "small": {"function": "f"}}
    scored = replace(scored, scores=GroupScores(scores=scored.scores.scores, by_name=by_name, errors=()))
    keep = {"count": 2, "by": "best"}
    run = Run(folder, {"name": "dr_grpo"}, per_update=2, rewards=rewards, keep_per_prompt=keep)
    signals = run.learn([scored])
    assert sorted(i for one in run.trained for i in one) == [1, 3]
    assert signals.advantages[3] == pytest.approx(0.01 * 1.2247 / 2, rel=1e-3)  # the compared scores are normalised


@pytest.mark.parametrize("per_update", [12, 6, 4, 3])
def test_portions_make_the_minibatches_and_advantages_of_the_whole_batch(folder: RunFolder, per_update: int) -> None:
    algorithm, found = {"name": "dr_grpo", "kl": {"coef": 0.1}}, scored_groups(FIRST, SECOND, FLAT)
    whole, run = (Run(folder, algorithm, per_update=per_update, streamed=streamed) for streamed in (False, True))
    expected, signals = whole.learn(found), run.stream([found[2]], [found[0]], [found[1]])
    assert signals == expected
    assert [plan.portion for plan in run.policy.portions] == [0, 1, 2]
    parts = [
        [sorted(i for ids in one.sequences_by_rank for i in ids) for one in plan.minibatches]
        for plan in run.policy.portions
    ]
    assert [sorted(i for ids in one for i in ids) for one in zip(*parts, strict=True)] == whole.trained
    first, *_ = visited = whole.policy.updates
    assert run.policy.calls == [
        "prepare group 2",
        f"accumulate {first}",
        "prepare group 0",
        f"accumulate {first}",
        "prepare group 1",  # the batch is whole: the update runs the rest
        *(f"update {minibatch}" for minibatch in visited),
    ]
    assert run.reference.requests == [["group 2"], ["group 0"], ["group 1"]]  # each as it arrived
    rows = (one.record.row() for one in (whole, run))
    assert len({tuple((key, row[key]) for key in sorted(row) if not key.startswith("time/")) for row in rows}) == 1


def test_groups_that_arrive_together_make_one_portion(folder: RunFolder) -> None:
    run, found = Run(folder, {"name": "grpo"}, per_update=12, streamed=True), scored_groups(FIRST, SECOND, FLAT)
    run.stream([found[1], found[0]], [found[2]])
    assert run.policy.calls == ["prepare group 1, group 0", "accumulate 0", "prepare group 2", "update 0", "update 0"]
    run.policy.calls.clear()
    run.stream(found)
    assert run.policy.calls == ["prepare group 0, group 1, group 2", "update 0", "update 0"]


def test_a_portion_without_a_trained_response_is_left_out(folder: RunFolder) -> None:
    run = Run(folder, {"name": "raft", "keep": 4, "min_score": 2.0}, per_update=12, streamed=True)
    found = scored_groups(FLAT, FIRST, SECOND)
    signals = run.stream([found[0]], [found[1]], [found[2]])
    assert run.policy.calls == ["prepare group 1", "accumulate 0", "prepare group 2", "update 0", "update 0"]
    assert [plan.portion for plan in run.policy.portions] == [0, 1]
    assert signals.trained == {5, 7, 8}


@pytest.mark.parametrize(
    ("keys", "asked"),
    [
        ({}, [["group 2"], ["group 0"], ["group 1"]]),  # each as it arrived
        ({"reference_every": 2}, [["group 0", "group 1", "group 2"]]),  # with a renewed reference: in the groups' step
    ],
)
def test_the_reference_computes_groups_of_later_batches_as_they_arrive(
    folder: RunFolder, keys: dict[str, Any], asked: list[list[str]]
) -> None:
    algorithm = {"name": "grpo", "kl": {"coef": 0.1}, "correction": {"preset": "token_tis"}, **keys}
    run = Run(folder, algorithm, per_update=12, reference_host=None, max_staleness=1)
    found = scored_groups(FIRST, SECOND, FLAT)

    async def learn() -> None:
        for scored in (found[2], found[0], found[1]):
            run.learning.arrived(scored)
        await run.learning.learn(found, 1)

    run.record.begin_step(1)
    asyncio.run(learn())
    assert run.reference.requests == asked
