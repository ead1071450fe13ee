"""Each symptom on a series that shows it and on one that does not; real runs, one healthy, one hacking its reward.

`healthy_grpo` is the GRPO quickstart, `hacked_ppo` the pipeline of docs/rewards.md with algorithm.kl.coef=0, both to
three digits.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from rlhf.tracking.diagnosis.diagnose import CHECKS, Diagnosis, Watch
from rlhf.tracking.diagnosis.findings import Finding
from rlhf.tracking.metrics.declarations import declared
from rlhf.tracking.run_folder.atomic import read_lines

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, Any]]


def diagnose(rows: Rows) -> list[Finding]:
    diagnosis = Diagnosis()
    for row in rows:
        diagnosis.add(row)
    return diagnosis.findings()


def rows(steps: int, **series: Callable[[int], float | None]) -> Rows:
    """Rows 1, 2, ... with each metric by its step; a metric's slashes stand as `__`."""
    return [
        {"step": step, "time_s": float(step), **{key.replace("__", "/"): value(step) for key, value in series.items()}}
        for step in range(1, steps + 1)
    ]


def in_flight(*, lag: float, waits_s: float) -> dict[str, Callable[[int], float]]:
    """Series of a run with 24 groups in flight, responses up to 2 versions old, and steps of 10 seconds."""
    return {
        "rollouts__in_flight__mean": lambda s: 24.0,
        "experience__policy_lag__mean": lambda s: lag,
        "experience__policy_lag__max": lambda s: 2.0,
        "time__trainer_waits_s": lambda s: waits_s,
        "time__step_s": lambda s: 10.0,
    }


def corrected(*, truncated: float, masked: float, lag: float) -> dict[str, Callable[[int], float]]:
    """Series of a run with a correction of old responses."""
    return {
        "experience__rollout_weight_truncated__fraction": lambda s: truncated,
        "experience__rollout_weight_masked__fraction": lambda s: masked,
        "experience__policy_lag__mean": lambda s: lag,
    }


def evaluated(steps: int, *values: float, every: int, key: str = "eval/heldout/score", **series: Any) -> Rows:
    """The same, with a row 0 and an evaluation every so many steps."""
    made = [{"step": 0, "time_s": 0.0}, *rows(steps, **series)]
    for number, value in enumerate(values):
        made[number * every][key] = value
    return made


def real(name: str) -> Rows:
    folder = ROOT / "tests" / "fixtures" / "metrics"
    return read_lines(folder / f"{name}.jsonl")


CASES: dict[str, tuple[Rows, Rows]] = {  # kind: a series that shows it, one that is fine
    "not_finite": (
        rows(3, update__loss__mean=lambda s: None if s == 3 else 0.1),
        rows(3, update__loss__mean=lambda s: 0.1),
    ),
    "kl_blow_up": (
        rows(40, experience__kl_ref__mean=lambda s: 0.05 if s < 30 else 0.05 * 2.0 ** (s - 30)),
        rows(200, experience__kl_ref__mean=lambda s: 0.002 * s),  # a drift to .4
    ),
    "update_too_large": (
        rows(5, update__kl_old__mean=lambda s: 0.3),
        rows(5, update__kl_old__mean=lambda s: 0.5 if s == 2 else 0.02),  # one step alone
    ),
    "entropy_collapse": (
        rows(30, update__entropy__mean=lambda s: 0.8 * 0.8**s),
        rows(30, update__entropy__mean=lambda s: 0.8 * 0.95**s),
    ),
    "entropy_explosion": (
        rows(30, update__entropy__mean=lambda s: 0.5 + 0.05 * s),
        rows(30, update__entropy__mean=lambda s: 0.5 + 0.01 * s),
    ),
    "clip_fraction_high": (
        rows(6, update__clip_fraction__mean=lambda s: 0.5),
        rows(6, update__clip_fraction__mean=lambda s: 0.15),
    ),
    "clip_fraction_zero": (
        rows(20, update__clip_fraction__mean=lambda s: 0.0, update__ratio__max=lambda s: 1.004),
        rows(20, update__clip_fraction__mean=lambda s: 0.0, update__ratio__max=lambda s: 1.0),  # one update a step
    ),
    "gradient_spikes": (
        rows(50, update__grad_norm=lambda s: 40.0 if s % 15 == 0 else 1.0),
        rows(50, update__grad_norm=lambda s: 12.0 if s == 30 else 1.0),
    ),
    "sampler_mismatch": (
        rows(12, experience__rollout_logprob_diff__mean=lambda s: 1e-6 if s < 8 else 0.05),
        rows(12, experience__rollout_logprob_diff__mean=lambda s: 0.04),  # bfloat16
    ),
    "trainer_starved": (
        rows(
            10,
            time__trainer_waits_s=lambda s: 6.0,
            time__step_s=lambda s: 10.0,
            experience__policy_lag__mean=lambda s: 1.0,
        ),
        rows(
            10,
            time__trainer_waits_s=lambda s: 6.0,
            time__step_s=lambda s: 10.0,
            experience__policy_lag__mean=lambda s: 0.0,
        ),
    ),
    "engines_starved": (
        rows(10, time__engines_idle__fraction=lambda s: 0.7, experience__policy_lag__mean=lambda s: 1.0),
        rows(
            10,
            time__engines_idle__fraction=lambda s: 0.7,
            experience__policy_lag__mean=lambda s: 0.5,
            rollouts__carried__fraction=lambda s: 0.5,  # in turns, with continued responses
        ),
    ),
    "lag_at_bound": (
        rows(10, **in_flight(lag=1.9, waits_s=0.1)),
        rows(10, **in_flight(lag=1.9, waits_s=4.0)),  # long responses are in time for the bound, and training waits
    ),
    "correction_clips": (
        rows(4, **corrected(truncated=0.2, masked=0.2, lag=1.0)),
        rows(4, **corrected(truncated=0.2, masked=0.2, lag=0.0)),  # in turns; sampler_mismatch finds the cause
    ),
    "groups_reasked": (
        rows(10, **in_flight(lag=1.0, waits_s=0.1), rollouts__reasked_groups__total=lambda s: 4.0),
        rows(10, **in_flight(lag=1.0, waits_s=0.1), rollouts__reasked_groups__total=lambda s: 1.0),
    ),
    "short_responses_first": (
        rows(10, rollouts__completion_bias=lambda s: 0.8),
        rows(10, rollouts__completion_bias=lambda s: 0.8 if s < 4 else 1.0),  # the first batches
    ),
    "probe_drift": (
        rows(20, weight_sync__probe_max_diff=lambda s: 0.02 * s),
        rows(20, weight_sync__probe_max_diff=lambda s: 0.4 + 0.3 * (s % 3)),  # bfloat16, noisy
    ),
    "effective_samples_low": (
        rows(4, experience__rollout_ess_token=lambda s: 0.5),
        rows(4, experience__rollout_ess_token=lambda s: 0.98),
    ),
    "much_rejected": (
        rows(4, experience__rollout_rejected__fraction=lambda s: 0.7),
        rows(4, experience__rollout_rejected__fraction=lambda s: 0.1),
    ),
    "critic_worse_than_none": (
        rows(12, update__explained_variance=lambda s: -0.2),
        rows(12, update__explained_variance=lambda s: -0.2 + 0.05 * s),
    ),
    "learning_rate_zero": (
        rows(5, update__lr=lambda s: 0.0),
        rows(5, update__lr=lambda s: 1e-5 * (5 - s)),  # a schedule's last step
    ),
    "rewards_alike": (
        rows(5, rewards__score__std=lambda s: 0.0, rewards__score__mean=lambda s: 0.0),
        rows(5, rewards__score__std=lambda s: 0.1 if s == 3 else 0.0, rewards__score__mean=lambda s: 0.0),
    ),
    "groups_alike": (
        rows(6, advantages__zero_groups__fraction=lambda s: 0.97),
        rows(6, advantages__zero_groups__fraction=lambda s: 0.7),
    ),
    "advantages_zero": (
        rows(4, advantages__std=lambda s: 0.0, rewards__score__std=lambda s: 0.4),
        rows(4, advantages__std=lambda s: 0.5, rewards__score__std=lambda s: 0.4),
    ),
    "mostly_filtered": (
        rows(5, rollouts__filtered_groups__fraction=lambda s: 0.9),
        rows(5, rollouts__filtered_groups__fraction=lambda s: 0.4),
    ),
    "much_truncated": (
        rows(5, rollouts__truncated__fraction=lambda s: 0.5, rollouts__response_tokens__mean=lambda s: 100.0),
        rows(5, rollouts__truncated__fraction=lambda s: 0.05, rollouts__response_tokens__mean=lambda s: 100.0),
    ),
    "length_runs_away": (
        rows(
            30,
            rollouts__truncated__fraction=lambda s: 0.01 * s,
            rollouts__response_tokens__mean=lambda s: 100.0 + 5 * s,
        ),
        rows(30, rollouts__truncated__fraction=lambda s: 0.02, rollouts__response_tokens__mean=lambda s: 100.0 + 5 * s),
    ),
    "responses_shrink": (
        rows(30, rollouts__response_tokens__mean=lambda s: 100.0 * 0.9**s),
        rows(30, rollouts__response_tokens__mean=lambda s: 100.0 * 0.97**s),
    ),
    "reward_hacking": (
        evaluated(
            40,
            0.5,
            0.4,
            0.3,
            0.2,
            every=10,
            rewards__score__mean=lambda s: 0.02 * s,
            rewards__score__std=lambda s: 0.4,
        ),
        evaluated(
            40,
            0.5,
            0.55,
            0.5,
            0.54,
            every=10,
            rewards__score__mean=lambda s: 0.02 * s,
            rewards__score__std=lambda s: 0.4,
        ),
    ),
    "held_out_falls": (
        evaluated(40, 0.5, 0.4, 0.3, 0.2, every=10, update__loss__mean=lambda s: 1.0),
        evaluated(40, 0.5, 0.4, 0.5, 0.51, every=10, update__loss__mean=lambda s: 1.0),
    ),
    "held_out_loss_rises": (
        evaluated(40, 2.0, 1.5, 1.6, 1.8, every=10, key="eval/heldout/loss", update__loss__mean=lambda s: 1.0 / s),
        evaluated(40, 2.0, 1.5, 1.4, 1.41, every=10, key="eval/heldout/loss", update__loss__mean=lambda s: 1.0 / s),
    ),
    "held_out_flat": (
        evaluated(40, 0.3, 0.301, 0.3, 0.299, 0.3, every=10, update__loss__mean=lambda s: 1.0),
        evaluated(40, 0.3, 0.32, 0.35, 0.4, 0.41, every=10, update__loss__mean=lambda s: 1.0),
    ),
    "preferences_at_chance": (
        rows(30, preference__accuracy__mean=lambda s: 0.5),
        rows(30, preference__accuracy__mean=lambda s: 0.5 + 0.01 * s),
    ),
    "rewards_fail": (
        rows(30, rewards__errors__total=lambda s: 2.0 if s == 7 else 0.0),
        rows(30, rewards__errors__total=lambda s: 0.0),
    ),
    "prefixes_break": (
        rows(
            4,
            agents__broken_prefixes__fraction=lambda s: 0.4,
            agents__broken_by_edited_history__total=lambda s: 9.0 if s == 1 else 1.0,  # too early to count
            agents__broken_by_rewritten_turn__total=lambda s: 3.0,
        ),
        rows(4, agents__broken_prefixes__fraction=lambda s: 0.05, agents__broken_by_other_tools__total=lambda s: 1.0),
    ),
    "grammars_restrict": (
        rows(
            2,
            agents__restricted_tokens__fraction=lambda s: 0.11 * s,
            agents__restricted_by_response_format__total=lambda s: 30.0,
            agents__restricted_by_tool_choice__total=lambda s: 70.0,
        ),
        rows(
            2, agents__restricted_tokens__fraction=lambda s: 0.1, agents__restricted_by_tool_choice__total=lambda s: 9.0
        ),
    ),
    "slower": (
        rows(40, throughput__tokens_per_s=lambda s: 1000.0 / s),
        rows(40, throughput__tokens_per_s=lambda s: 1000.0 - 5 * s),
    ),
    "memory_grows": (
        rows(60, memory__reward_rss_gib=lambda s: 1.0 + 0.05 * s),
        rows(60, memory__reward_rss_gib=lambda s: min(1.0 + 0.5 * s, 3.0)),  # taken once and kept
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_symptom_is_found_where_it_is_and_nowhere_else(kind: str) -> None:
    ill, well = CASES[kind]
    found = {one.kind: one for one in diagnose(ill)}
    assert kind in found
    assert 0 <= found[kind].first_step <= found[kind].last_step <= ill[-1]["step"]
    assert diagnose(well) == []


def test_a_healthy_run_has_no_finding() -> None:
    assert diagnose(real("healthy_grpo")) == []


def test_a_run_that_hacks_its_reward_is_found_out() -> None:
    (found,) = diagnose(real("hacked_ppo"))
    assert (found.kind, found.severity, found.metrics[0]) == ("reward_hacking", "failure", "eval/heldout/correct")
    assert "fell from 0.422 (step 0) to 0.161" in found.what


def test_the_noise_of_an_evaluation_is_no_fall() -> None:
    """Ten evaluations on 200 prompts of a policy that solves a tenth of them and learns nothing, 200 times."""
    draw = random.Random(0)
    told = 0
    for _ in range(200):
        scores = [fmean(draw.random() < 0.1 for _ in range(200)) for _ in range(10)]
        found = diagnose(evaluated(90, *scores, every=10))
        told += any(one.kind == "held_out_falls" for one in found)
    assert told <= 30  # without a regard to noise 150


def test_a_fall_from_a_peak_is_told_soon() -> None:
    """The turn at the best is no noise."""
    found = diagnose(evaluated(50, 0.3, 0.6, 0.5, 0.4, 0.35, every=10))
    assert [one.kind for one in found] == ["held_out_falls"]


@pytest.mark.parametrize("metric", ["chosen_reward", "rejected_reward", "calibration_error"])
def test_what_may_go_either_way_is_no_result(metric: str) -> None:
    """DPO lowers the rewards of both responses; a calibration error is better small, and noisy."""
    for values in ((0.5, 0.45, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4, 0.5)):
        assert diagnose(evaluated(40, *values, every=10, key=f"eval/heldout/{metric}")) == []


def test_the_numbers_and_steps_are_those_of_the_series() -> None:
    ill, _ = CASES["kl_blow_up"]  # .05 until step 30, then doubling: means of three exceed .25 at 34, 1 at 36
    (found,) = diagnose(ill)
    assert (found.severity, found.first_step, found.last_step) == ("failure", 32, 40)
    assert "29.9 nats a token" in found.what  # (12.8 + 25.6 + 51.2) / 3


@pytest.mark.parametrize("before", [0.0, -0.001])
def test_a_kl_that_jumps_from_nothing_is_told_without_a_ratio(before: float) -> None:
    """A reference that is the policy, as while the learning rate warms up; the estimator may be negative by chance."""
    (found,) = diagnose(rows(30, experience__kl_ref__mean=lambda s: 0.5 if s > 25 else before))
    assert found.kind == "kl_blow_up"
    assert f"0.5 nats a token; the median of the 20 steps before is {before:g}." in found.what


def test_each_kind_is_told_once_while_the_run_goes_on_and_the_worst_first() -> None:
    watch = Watch()
    told = [
        [
            one.kind
            for one in watch.observe({"step": s, "rewards/score/std": 0.0, "advantages/zero_groups/fraction": 1.0})
        ]
        for s in range(1, 9)
    ]
    assert told == [[], [], [], [], ["rewards_alike", "groups_alike"], [], [], []]


def test_what_was_over_is_told_with_its_steps() -> None:
    shown = rows(40, update__clip_fraction__mean=lambda s: 0.6 if 10 <= s < 20 else 0.1)
    (found,) = diagnose(shown)
    assert (found.first_step, found.last_step) == (8, 21)  # means of five steps: 3 of .6 at first and at last


def test_the_most_frequent_reason_of_broken_prefixes_is_named_with_its_remedy() -> None:
    (found,) = diagnose(CASES["prefixes_break"][0])
    assert "40% of the calls" in found.what
    assert "`rewritten turn` (9 of 12)" in found.what
    assert "data.chat_template" in found.advice


def test_the_most_frequent_reason_of_a_grammar_is_named_with_its_remedy() -> None:
    (found,) = diagnose(CASES["grammars_restrict"][0])
    assert "22% of the step's sampled tokens" in found.what
    assert "`tool_choice` (70 of 100)" in found.what
    assert "`tool_choice: auto`" in found.advice


def test_an_empty_run_and_rows_with_nothing_in_them_have_no_finding() -> None:
    assert diagnose([]) == []
    assert diagnose([{"step": 0, "time_s": 0.0}]) == []


def test_metrics_and_keys_that_are_named_exist() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    found: list[Finding] = [one for ill, _ in CASES.values() for one in diagnose(ill)]
    assert len({one.kind for one in found}) == len(CHECKS)
    for one in found:
        for key in one.metrics:
            declared(key)
        named = re.findall(r"\b(?:train|algorithm|rollouts|data|reward_policy)\.[a-z_]+(?:\.[a-z_]+)*", one.advice)
        for key in named:
            assert f"`{key.rpartition('.')[2]}`" in page, f"{one.kind} names {key}"


def test_the_page_names_every_finding() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert not [kind for kind in CASES if f"`{kind}`" not in page]
