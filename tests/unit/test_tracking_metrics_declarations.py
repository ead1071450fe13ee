"""Declarations and reductions of rlhf/tracking/metrics/declarations.py and reductions.py."""

from __future__ import annotations

import math
import pickle

import pytest

from rlhf.tracking.metrics import declarations as metrics
from rlhf.tracking.metrics.declarations import METRICS, declared, expected_metrics, markdown, merge_metrics, results
from rlhf.tracking.metrics.reductions import ExplainedVariance, Last, Max, Mean, Reduction, Std, Sum
from tests.fixtures.sources import ROOT


def test_page_is_the_generated_one() -> None:
    assert (ROOT / "docs/metrics.md").read_text(encoding="utf-8") == markdown()


def test_every_metric_is_declared_once() -> None:
    assert len(METRICS) == len(metrics._DECLARATIONS)


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


def test_placeholders_are_explained() -> None:
    for metric in METRICS.values():
        for part in metric.name.split("<")[1:]:
            assert part.split(">")[0] in metrics.PLACEHOLDERS


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


def test_a_declaration_with_an_unknown_trait_is_refused() -> None:
    with pytest.raises(ValueError, match="'update/x' has the unknown trait 'offline'"):
        metrics._parse("update/x | 1 | Mean | offline optional | Nothing")


def test_mean_over_ranks_is_not_the_mean_of_means() -> None:
    # rank 0: one token of loss 4; rank 1: three tokens of 0: (4 + 0) / (1 + 3) = 1, where the mean of means is 2
    ranks = [{"update/loss/mean": Mean.of([4.0])}, {"update/loss/mean": Mean.of([0.0, 0.0, 0.0])}]
    assert results(merge_metrics(ranks)) == {"update/loss/mean": 1.0}


def test_reductions_by_hand() -> None:
    # 1, 3 and 5, 7, 9 together: mean 5, squares 16 + 4 + 0 + 4 + 16 = 40, 40 / 5 = 8
    moments = Std.of([1.0, 3.0]).merge(Std.of([5.0, 7.0, 9.0]))
    assert moments.mean == pytest.approx(5.0)
    assert moments.result() == pytest.approx(math.sqrt(8.0))
    assert Max(value=2.0).merge(Max(value=-3.0)).result() == 2.0
    assert Sum(total=2.0).merge(Sum(total=5.0)).result() == 7.0
    assert Last(value=2.0).merge(Last(value=1.0)).result() == 1.0
    # targets 0, 2: M2 = 2; residuals 1, 0: mean .5, M2 = .25 + .25 = .5; 1 - .5 / 2 = .75
    explained = ExplainedVariance(target=Std.of([0.0]), residual=Std.of([1.0])).merge(
        ExplainedVariance(target=Std.of([2.0]), residual=Std.of([0.0]))
    )
    assert explained.result() == pytest.approx(0.75)


def test_what_is_not_defined_is_nan() -> None:
    assert math.isnan(Mean.of([]).result())
    assert math.isnan(Std.of([]).merge(Std.of([])).result())
    assert math.isnan(ExplainedVariance(target=Std.of([1.0, 1.0]), residual=Std.of([0.0, 1.0])).result())
    assert math.isnan(Max(value=1.0).merge(Max(value=math.nan)).result())
    assert math.isnan(Max(value=math.nan).merge(Max(value=1.0)).result())


def test_std_does_not_cancel_far_from_zero() -> None:
    # 1e9 + (0, 1, 2): M2 = 2, std = sqrt(2/3); sum of squares minus square of the sum loses it in float64
    parts = [Std.of([1e9]), Std.of([1e9 + 1]), Std.of([1e9 + 2])]
    assert parts[0].merge(parts[1]).merge(parts[2]).result() == pytest.approx(math.sqrt(2 / 3), rel=1e-6)


def test_merge_refuses_undeclared_keys_and_other_reductions() -> None:
    with pytest.raises(KeyError):
        merge_metrics([{"update/nothing": Sum(total=1.0)}])
    with pytest.raises(TypeError, match="reduces by Mean, got Sum"):
        merge_metrics([{"update/loss/mean": Sum(total=1.0)}])


def test_merge_keeps_keys_that_only_some_parts_have() -> None:
    parts: list[dict[str, Reduction]] = [{"update/lr": Last(value=1.0)}, {"update/tokens/total": Sum(total=3.0)}]
    assert results(merge_metrics(parts)) == {"update/lr": 1.0, "update/tokens/total": 3.0}


def test_reductions_cross_processes() -> None:
    for value in (Mean.of([1.0, 2.0]), Std.of([1.0, 2.0]), Max(value=1.0), Sum(total=1.0), Last(value=1.0)):
        assert pickle.loads(pickle.dumps(value)) == value
