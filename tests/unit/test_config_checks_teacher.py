"""Impossible relations of runs with rollouts and a teacher are refused. Such runs need no rewards."""

from __future__ import annotations

import pytest

from rlhf.planning.report import render_plan
from tests.fixtures.configs import ONLINE, changed, refusal

TAUGHT = """\
run: {name: demo}
policy: {model: some/model}
teacher: {model: large/model}
algorithm: {name: on_policy_distillation}
data: {train: prompts.jsonl, eval: heldout.jsonl, max_prompt_tokens: 100}
rollouts: {prompts_per_step: 8, samples_per_prompt: 4, max_new_tokens: 50}
train: {steps: 10, lr: 1.0e-6, sequences_per_update: 16, max_tokens_per_microbatch: 200}
"""
REWARDS = "rewards={correct: {function: math_answer}}"
WHOLE = "algorithm.divergence=forward_kl"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=null"], "teacher: is missing: algorithm on_policy_distillation learns from a model; name it as tea"),
        (["algorithm.reward_coef=0.1"], "rewards: is missing: algorithm.reward_coef needs at least one reward"),
        (
            [REWARDS, "algorithm.reward_coef=0.1", "rollouts.samples_per_prompt=1", "train.sequences_per_update=8"],
            "rollouts.samples_per_prompt: is 1, but algorithm.reward_coef compares the responses to one prompt",
        ),
        ([REWARDS, WHOLE, "algorithm.reward_coef=0.1"], "has no effect here: algorithm.divergence is forward_kl"),
        ([WHOLE, "algorithm.clip_low=0.1"], "algorithm.clip_low: has no effect here: algorithm.divergence is"),
        ([WHOLE, "algorithm.beta=0.1"], "algorithm.beta: has no effect here: algorithm.divergence is forward_kl"),
        (["algorithm.beta=0.1"], "algorithm.beta: has no effect here: algorithm.divergence is sampled_reverse_kl"),
        (["algorithm.clip_high=0.1", "train.sequences_per_update=32"], "has no effect here: the batch of 32 responses"),
        (["reward_policy.timeout_s=6"], "reward_policy: has no effect here: there are no rewards; remove it, or name"),
        (["rollouts.dynamic_sampling={}"], "rollouts.dynamic_sampling: has no effect here: there are no rewards"),
        (["data.curriculum={}"], "data.curriculum: has no effect here: there are no rewards"),
        (["reference.model=a/b"], "reference: has no effect here: algorithm on_policy_distillation has no reference"),
        (["cluster.roles.reference.workers=2"], "cluster.roles.reference: has no effect here: this run starts no"),
        (["train.best_metric=eval/heldout/score"], "a leading `-`: eval/heldout/kl_teacher, eval/heldout/truncated"),
        (["data.max_sequence_tokens=9"], "data.max_sequence_tokens: has no effect here"),
    ],
)
def test_what_on_policy_distillation_refuses(overrides: list[str], message: str) -> None:
    assert message in refusal(TAUGHT, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.clip_low=0.1", "train.sequences_per_update=8"],
        ["rollouts.samples_per_prompt=1", "train.sequences_per_update=8"],
        [REWARDS, "algorithm.reward_coef=0.1", "reward_policy.timeout_s=6", "train.best_metric=eval/heldout/score"],
        [
            "algorithm={name: on_policy_distillation, divergence: jsd, beta: 0.3}",
            "train.best_metric=-eval/heldout/kl_teacher",
        ],
        [WHOLE, "cluster.roles.teacher={workers: 3, cpus: 2, colocate_with: null}", "policy.lora={}"],
    ],
)
def test_on_policy_distillation_configs_pass(overrides: list[str]) -> None:
    changed(TAUGHT, overrides)


def test_other_runs_on_rollouts_need_rewards_and_take_no_teacher() -> None:
    assert "rewards: is missing: algorithm ppo needs at least one reward" in refusal(ONLINE, ["rewards={}"])
    message = refusal(ONLINE, ["teacher.model=a/b"])
    assert "has no teacher; remove it, or use on_policy_distillation" in message


@pytest.mark.parametrize(("overrides", "says"), [([], "its log-probabilities of"), ([WHOLE], "its distributions at")])
def test_the_plan_says_what_is_asked_of_the_teacher(overrides: list[str], says: str) -> None:
    text = render_plan(changed(TAUGHT, overrides))
    assert f"large/model: {says} the sampled tokens" in text
    assert not [line for line in text.splitlines() if line.split()[:1] == ["reference"]]
