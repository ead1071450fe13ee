"""Each symptom is found on a series with the symptom and on no other series. A real healthy run has no finding.

`healthy_grpo` is the GRPO quickstart, `hacked_ppo` the pipeline of docs/rewards.md with algorithm.kl.coef=0, both to
three digits.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest

from rlhf.tracking.diagnosis.diagnose import CHECKS, Diagnosis, Watch
from rlhf.tracking.diagnosis.findings import Finding
from rlhf.tracking.metrics.declarations import declared
from rlhf.tracking.run_folder.atomic import read_lines
from tests.fixtures.sources import ROOT

Rows = list[dict[str, Any]]


def diagnose(rows: Rows) -> tuple[Finding, ...]:
    diagnosis = Diagnosis()
    for row in rows:
        diagnosis.add(row)
    return diagnosis.findings()


def rows(steps: int, **series: Callable[[int], float | None]) -> Rows:
    """Return rows 1, 2, ... with each metric by step. `__` stands for a slash in a metric's name."""
    return [
        {"step": step, "time_s": float(step), **{key.replace("__", "/"): value(step) for key, value in series.items()}}
        for step in range(1, steps + 1)
    ]


def evaluated(steps: int, *values: float, every: int, key: str = "eval/heldout/score", **series: Any) -> Rows:
    """Return the rows with a row 0, and with an evaluation every `every` steps."""
    made = [{"step": 0, "time_s": 0.0}, *rows(steps, **series)]
    for number, value in enumerate(values):
        made[number * every][key] = value
    return made


def real(name: str) -> Rows:
    folder = ROOT / "tests" / "fixtures" / "metrics"
    return read_lines(folder / f"{name}.jsonl")


def pair(steps: int, key: str, ill: Any, well: Any, **shared: Any) -> tuple[Rows, Rows]:
    """Two series of a metric, each a number or a function of the step, with the same further series."""
    ill_and_well = ({key: value if callable(value) else lambda s, value=value: value} for value in (ill, well))
    first, second = (rows(steps, **series, **shared) for series in ill_and_well)
    return first, second


def always(value: float) -> Callable[[int], float]:
    return lambda s: value


LOSS, LR_LOSS = {"update__loss__mean": always(1.0)}, {"update__loss__mean": lambda s: 1.0 / s}
RISING = {"rewards__score__mean": lambda s: 0.02 * s, "rewards__score__std": always(0.4)}
WAITING = {"time__trainer_waits_s": always(6.0), "time__step_s": always(10.0)}
IDLE = {"time__engines_idle__fraction": always(0.7), "experience__policy_lag__mean": always(1.0)}
HELD_OUT_LOSS = {"every": 10, "key": "eval/heldout/loss", **LR_LOSS}
IN_FLIGHT = {  # 24 groups, responses up to 2 versions old, and steps of 10 seconds
    **{"rollouts__in_flight__mean": always(24.0), "experience__policy_lag__max": always(2.0)},
    "time__step_s": always(10.0),
}
OLD = {  # two versions from step 3 on, with a difference that the lag makes
    "experience__policy_lag__mean": lambda s: min(s - 1.0, 2.0),
    "experience__policy_lag__max": lambda s: min(s - 1.0, 2.0),
    "experience__rollout_logprob_diff__mean": lambda s: 1e-6 if s == 1 else 0.2,
}
CORRECTED = {f"experience__rollout_weight_{of}__fraction": always(0.2) for of in ("truncated", "masked")}
GRAMMAR, REASON = "agents__restricted_tokens__fraction", "agents__restricted_by_tool_choice__total"

CASES: dict[str, tuple[Rows, Rows]] = {  # kind: a series with the symptom, and a series without
    "not_finite": pair(3, "update__loss__mean", lambda s: None if s == 3 else 0.1, 0.1),
    "kl_blow_up": (
        rows(40, experience__kl_ref__mean=lambda s: 0.05 if s < 30 else 0.05 * 2.0 ** (s - 30)),
        rows(200, experience__kl_ref__mean=lambda s: 0.002 * s),  # a drift to .4
    ),
    "update_too_large": pair(5, "update__kl_old__mean", 0.3, lambda s: 0.5 if s == 2 else 0.02),  # one step alone
    "entropy_collapse": pair(30, "update__entropy__mean", lambda s: 0.8 * 0.8**s, lambda s: 0.8 * 0.95**s),
    "entropy_explosion": pair(30, "update__entropy__mean", lambda s: 0.5 + 0.05 * s, lambda s: 0.5 + 0.01 * s),
    "clip_fraction_high": pair(6, "update__clip_fraction__mean", 0.5, 0.15),
    # a ratio of 1 is that of one update a step
    "clip_fraction_zero": pair(20, "update__ratio__max", 1.004, 1.0, update__clip_fraction__mean=always(0.0)),
    "gradient_spikes": pair(
        50, "update__grad_norm", lambda s: 40.0 if s % 15 == 0 else 1.0, lambda s: 12.0 if s == 30 else 1.0
    ),
    "sampler_mismatch": pair(  # bfloat16 differs by 0.04
        12, "experience__rollout_logprob_diff__mean", lambda s: 1e-6 if s < 8 else 0.05, 0.04
    ),
    "trainer_starved": pair(10, "experience__policy_lag__mean", 1.0, 0.0, **WAITING),
    # in turns, with continued responses
    "engines_starved": (rows(10, **IDLE), rows(10, **IDLE, rollouts__carried__fraction=always(0.5))),
    # a large difference alone costs nothing
    "lag_lowers_the_score": pair(
        30, "rewards__score__mean", lambda s: 0.6 if s < 15 else 0.3, lambda s: 0.02 * s, **OLD
    ),
    # in turns; sampler_mismatch finds the cause
    "correction_clips": pair(4, "experience__policy_lag__mean", 1.0, 0.0, **CORRECTED),
    "groups_reasked": pair(10, "rollouts__reasked_groups__total", 4.0, 1.0, **IN_FLIGHT),
    # the first batches do not count
    "short_responses_first": pair(10, "rollouts__completion_bias", 0.8, lambda s: 0.8 if s < 4 else 1.0),
    # bfloat16 is noisy
    "probe_drift": pair(20, "weight_sync__probe_max_diff", lambda s: 0.02 * s, lambda s: 0.4 + 0.3 * (s % 3)),
    "effective_samples_low": pair(4, "experience__rollout_ess_token", 0.5, 0.98),
    "much_rejected": pair(4, "experience__rollout_rejected__fraction", 0.7, 0.1),
    "critic_worse_than_none": pair(12, "update__explained_variance", -0.2, lambda s: -0.2 + 0.05 * s),
    "learning_rate_zero": pair(5, "update__lr", 0.0, lambda s: 1e-5 * (5 - s)),  # a schedule's last step
    "rewards_alike": pair(
        5, "rewards__score__std", 0.0, lambda s: 0.1 if s == 3 else 0.0, rewards__score__mean=always(0.0)
    ),
    "groups_alike": pair(6, "advantages__zero_groups__fraction", 0.97, 0.7),
    "advantages_zero": pair(4, "advantages__std", 0.0, 0.5, rewards__score__std=always(0.4)),
    "mostly_filtered": pair(5, "rollouts__filtered_groups__fraction", 0.9, 0.4),
    "much_truncated": pair(
        5, "rollouts__truncated__fraction", 0.5, 0.05, rollouts__response_tokens__mean=always(100.0)
    ),
    "length_runs_away": pair(
        30,
        "rollouts__truncated__fraction",
        lambda s: 0.01 * s,
        0.02,
        rollouts__response_tokens__mean=lambda s: 100.0 + 5 * s,
    ),
    "responses_shrink": pair(
        30, "rollouts__response_tokens__mean", lambda s: 100.0 * 0.9**s, lambda s: 100.0 * 0.97**s
    ),
    "reward_hacking": (
        evaluated(40, 0.5, 0.4, 0.3, 0.2, every=10, **RISING),
        evaluated(40, 0.5, 0.55, 0.5, 0.54, every=10, **RISING),
    ),
    "held_out_falls": (
        evaluated(40, 0.5, 0.4, 0.3, 0.2, every=10, **LOSS),
        evaluated(40, 0.5, 0.4, 0.5, 0.51, every=10, **LOSS),
    ),
    "held_out_loss_rises": (
        evaluated(40, 2.0, 1.5, 1.6, 1.8, **HELD_OUT_LOSS),
        evaluated(40, 2.0, 1.5, 1.4, 1.41, **HELD_OUT_LOSS),
    ),
    "held_out_flat": (
        evaluated(40, 0.3, 0.301, 0.3, 0.299, 0.3, every=10, **LOSS),
        evaluated(40, 0.3, 0.32, 0.35, 0.4, 0.41, every=10, **LOSS),
    ),
    "preferences_at_chance": pair(30, "preference__accuracy__mean", 0.5, lambda s: 0.5 + 0.01 * s),
    "rewards_fail": pair(30, "rewards__errors__total", lambda s: 2.0 if s == 7 else 0.0, 0.0),
    "prefixes_break": (
        rows(
            4,
            agents__broken_prefixes__fraction=always(0.4),
            agents__broken_by_edited_history__total=lambda s: 9.0 if s == 1 else 1.0,  # too early to count
            agents__broken_by_rewritten_turn__total=always(3.0),
        ),
        rows(4, agents__broken_prefixes__fraction=always(0.05), agents__broken_by_other_tools__total=always(1.0)),
    ),
    "grammars_restrict": (
        rows(
            2,
            **{GRAMMAR: lambda s: 0.11 * s, REASON: always(70.0)},
            agents__restricted_by_response_format__total=always(30.0),
        ),
        rows(2, **{GRAMMAR: always(0.1), REASON: always(9.0)}),
    ),
    "slower": pair(40, "throughput__tokens_per_s", lambda s: 1000.0 / s, lambda s: 1000.0 - 5 * s),
    # memory that is taken once and kept
    "memory_grows": pair(60, "memory__reward_rss_gib", lambda s: 1.0 + 0.05 * s, lambda s: min(1.0 + 0.5 * s, 3.0)),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_symptom_is_found_where_it_is_and_nowhere_else(kind: str) -> None:
    ill, well = CASES[kind]
    found = {one.kind: one for one in diagnose(ill)}
    assert kind in found
    assert 0 <= found[kind].first_step <= found[kind].last_step <= ill[-1]["step"]
    assert diagnose(well) == ()


def test_a_healthy_run_and_an_empty_run_have_no_finding() -> None:
    for run in (real("healthy_grpo"), [], [{"step": 0, "time_s": 0.0}]):
        assert diagnose(run) == ()


def test_a_run_that_hacks_its_reward_is_found_out() -> None:
    (found,) = diagnose(real("hacked_ppo"))
    assert (found.kind, found.severity, found.metrics[0]) == ("reward_hacking", "failure", "eval/heldout/correct")
    assert "fell from 0.422 (step 0) to 0.161" in found.what


def test_the_noise_of_an_evaluation_is_no_fall() -> None:
    """A policy solves a tenth of 200 prompts, learns nothing, and is evaluated ten times. This is done 200 times."""
    draw = random.Random(0)
    told = 0
    for _ in range(200):
        scores = [fmean(draw.random() < 0.1 for _ in range(200)) for _ in range(10)]
        found = diagnose(evaluated(90, *scores, every=10))
        told += any(one.kind == "held_out_falls" for one in found)
    assert told <= 30  # if noise were ignored: 150


def test_a_fall_from_a_peak_is_told_soon() -> None:
    """The turning point at the best score does not count as noise."""
    found = diagnose(evaluated(50, 0.3, 0.6, 0.5, 0.4, 0.35, every=10))
    assert [one.kind for one in found] == ["held_out_falls"]


@pytest.mark.parametrize("metric", ["chosen_reward", "rejected_reward", "calibration_error"])
def test_what_may_go_either_way_is_no_result(metric: str) -> None:
    """DPO lowers the rewards of both responses; a calibration error is better small, and noisy."""
    for values in ((0.5, 0.45, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4, 0.5)):
        assert diagnose(evaluated(40, *values, every=10, key=f"eval/heldout/{metric}")) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"experience__rollout_logprob_diff__mean": lambda s: 0.15 if s == 1 else 0.2},  # of the kernels
        {"experience__rollout_logprob_diff__mean": lambda s: 1e-6 if s == 1 else 0.01},
        {"experience__policy_lag__mean": always(2.0)},  # nothing to compare with
        {"rewards__score__mean": lambda s: 0.5 + 0.05 * (s % 3)},
        {"rewards__score__mean": always(-2.0)},
    ],
)
def test_a_lag_that_explains_no_fall_is_not_blamed(changes: dict[str, Callable[[int], float]]) -> None:
    falling = {"rewards__score__mean": lambda s: 0.6 if s < 15 else 0.3}
    assert diagnose(rows(30, **{**OLD, **falling, **changes})) == ()


def test_the_lag_is_blamed_for_a_fall_of_negative_scores() -> None:
    (found,) = diagnose(rows(30, **{**OLD, "rewards__score__mean": lambda s: -1.0 if s < 15 else -1.5}))
    assert (found.kind, "fell from -1 to -1.5" in found.what) == ("lag_lowers_the_score", True)


def test_the_lag_is_blamed_with_its_numbers_and_the_keys_to_turn() -> None:
    (found,) = diagnose(CASES["lag_lowers_the_score"][0])
    assert "differ by 0.2 nats a token at a lag of 2 versions, and differed by 1e-06 at a smaller lag" in found.what
    assert "fell from 0.6 to 0.3" in found.what
    assert re.findall(r"[a-z]+\.[a-z_]+", found.advice) == [
        "train.lr",
        "rollouts.max_staleness",
        "algorithm.correction",
    ]


def test_the_numbers_and_steps_are_those_of_the_series() -> None:
    ill, _ = CASES["kl_blow_up"]  # .05 until step 30, then doubling: means of three exceed .25 at 34, 1 at 36
    (found,) = diagnose(ill)
    assert (found.severity, found.first_step, found.last_step) == ("failure", 32, 40)
    assert "29.9 nats a token" in found.what  # (12.8 + 25.6 + 51.2) / 3


@pytest.mark.parametrize("before", [0.0, -0.001])
def test_a_kl_that_jumps_from_nothing_is_told_without_a_ratio(before: float) -> None:
    """The reference is the policy, as during a warm-up of the rate. The estimator may be negative by chance."""
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


@pytest.mark.parametrize(
    ("kind", "fraction", "reason", "remedy"),
    [
        ("prefixes_break", "40% of the calls", "`rewritten turn` (9 of 12)", "data.chat_template"),
        ("grammars_restrict", "22% of the step's sampled tokens", "`tool_choice` (70 of 100)", "`tool_choice: auto`"),
    ],
)
def test_the_most_frequent_reason_is_named_with_its_remedy(kind: str, fraction: str, reason: str, remedy: str) -> None:
    (found,) = diagnose(CASES[kind][0])
    assert fraction in found.what
    assert reason in found.what
    assert remedy in found.advice


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
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert not [kind for kind in CASES if f"`{kind}`" not in page]


def test_symptoms_of_a_clients_model_speak_of_the_clients_learning_rate() -> None:
    found: set[str] = set()
    for key, value in (("update/loss/mean", None), ("update/grad_norm", lambda s: 1e6 if s > 55 else 1.0)):
        series: dict[str, Any] = {"update__loss__mean": lambda s: 1.0, "update__lr": lambda s: 0.0}
        series |= {"update__tokens__total": lambda s: 8, "update__grad_norm": lambda s: 1.0, "time__update_s": float}
        series[key.replace("/", "__")] = value or (lambda s: None)
        for finding in diagnose(rows(60, **series)):
            assert "learning_rate in the AdamParams of a Tinker client" in finding.advice, finding
            found.add(finding.kind)
    assert found == {"not_finite", "gradient_spikes", "learning_rate_zero"}
