"""Declarations and reductions of rlhf/tracking/metrics/declarations.py and reductions.py."""

from __future__ import annotations

import math
import pickle

import pytest

from rlhf.tracking.metrics import declarations as metrics
from rlhf.tracking.metrics.declarations import METRICS, declared, expected_metrics, markdown, merge_metrics, results
from rlhf.tracking.metrics.reductions import ExplainedVariance, Last, Max, Mean, Reduction, Std, Sum
from tests.fixtures.sources import ROOT


def test_the_table_is_sound_and_the_page_is_made_from_it() -> None:
    assert (ROOT / "docs/metrics.md").read_text(encoding="utf-8") == markdown()
    assert len(METRICS) == len(metrics._DECLARATIONS)  # no name twice
    placeholders = {part.split(">")[0] for name in METRICS for part in name.split("<")[1:]}
    assert placeholders == metrics.PLACEHOLDERS.keys()
    with pytest.raises(ValueError, match="'update/x' has the unknown trait 'offline'"):
        metrics._parse("update/x | 1 | Mean | offline optional | Nothing")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("rewards/correct/mean", "rewards/<name>/mean"),
        ("rewards/score/mean", "rewards/score/mean"),
        ("eval/held-out/score", "eval/<set>/<metric>"),
        ("time/weight_sync_s", "time/<stage>_s"),
        ("time/step_s", "time/step_s"),
        ("memory/critic_rss_gib", "memory/<role>_rss_gib"),
    ],
)
def test_key_finds_its_declaration(key: str, name: str) -> None:
    assert declared(key).name == name


NOT_DECLARED = "update/los/mean rewards/a/b/mean memory/actor_rss_gib time/wait_s eval/score Xrewards/a/mean"


@pytest.mark.parametrize("key", [*NOT_DECLARED.split(), "rewards/a/meanX", ""])
def test_undeclared_key_raises(key: str) -> None:
    with pytest.raises(KeyError, match="not declared"):
        declared(key)


def test_expected_follows_the_roles() -> None:
    grpo = expected_metrics(["online", "rewards", "advantages", "groups", "eval"])
    ppo = expected_metrics(["online", "rewards", "advantages", "critic", "reference", "eval"])
    pairs = expected_metrics(["online", "rewards", "preference", "groups", "reference", "eval"])
    taught = expected_metrics(["online", "teacher"])
    grouped = "advantages/zero_groups/fraction"
    assert {"update/clip_fraction/mean", "rewards/score/mean", grouped} <= set(grpo)
    assert not {"update/value_loss/mean", "experience/kl_ref/mean", "preference/pairs/total"} & set(grpo)
    assert "update/value_loss/mean" in ppo
    assert not {grouped, "update/dual_clip_fraction/mean"} & set(ppo)  # the clip of two sides needs its setting
    assert {"preference/pairs/total", "preference/accuracy/mean", grouped} <= set(pairs)
    assert not {"update/clip_fraction/mean", "advantages/std", "experience/kl_coef"} & set(pairs)
    assert "experience/kl_teacher/mean" in taught
    assert "rewards/score/mean" not in taught
    assert not any(name.startswith(("rollouts/", "rewards/")) for name in expected_metrics(["sft"]))


def test_what_is_not_defined_is_nan() -> None:
    assert math.isnan(ExplainedVariance(target=Std.of([1.0, 1.0]), residual=Std.of([0.0, 1.0])).result())
    assert math.isnan(Max(value=1.0).merge(Max(value=math.nan)).result())
    assert math.isnan(Max(value=math.nan).merge(Max(value=1.0)).result())


def test_std_does_not_cancel_far_from_zero() -> None:
    # 1e9 + (0, 1, 2): M2 = 2, std = sqrt(2/3); sum of squares minus square of the sum loses it in float64
    parts = [Std.of([1e9]), Std.of([1e9 + 1]), Std.of([1e9 + 2])]
    assert parts[0].merge(parts[1]).merge(parts[2]).result() == pytest.approx(math.sqrt(2 / 3), rel=1e-6)


def test_merging_adds_over_ranks_and_checks_the_declarations() -> None:
    # rank 0: one token of loss 4; rank 1: three tokens of 0: (4 + 0) / (1 + 3) = 1, where the mean of means is 2
    ranks = [([4.0], 0.5, 2.0), ([0.0, 0.0, 0.0], 0.25, 5.0)]
    parts: list[dict[str, Reduction]] = [
        {"update/loss/mean": Mean.of(losses), "update/lr": Last(value=lr), "update/tokens/total": Sum(total=tokens)}
        for losses, lr, tokens in ranks
    ]
    merged = merge_metrics([*pickle.loads(pickle.dumps(parts)), {"update/ratio/max": Max(value=2.0)}])
    numbers = {"update/loss/mean": 1.0, "update/lr": 0.25, "update/tokens/total": 7.0, "update/ratio/max": 2.0}
    assert results(merged) == numbers
    with pytest.raises(KeyError):
        merge_metrics([{"update/nothing": Sum(total=1.0)}])
    with pytest.raises(TypeError, match="reduces by Mean, got Sum"):
        merge_metrics([{"update/loss/mean": Sum(total=1.0)}])
