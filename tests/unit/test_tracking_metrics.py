"""Metrics are declared and reduced, ordered for a reader, and measured on a node."""

from __future__ import annotations

import json
import math
import pickle
import re
import time
from pathlib import Path
from typing import Any

import pytest

import rlhf
from rlhf.errors import UserError
from rlhf.tracking.metrics import declarations as metrics
from rlhf.tracking.metrics.declarations import METRICS, declared, expected_metrics, markdown, merge_metrics, results
from rlhf.tracking.metrics.panels import SECTIONS
from rlhf.tracking.metrics.reductions import ExplainedVariance, Histogram, Last, Max, Mean, Reduction, Std, Sum
from rlhf.tracking.metrics.system import NodeSampler, gpu_use
from rlhf.tracking.sinks import wandb_workspace as workspace
from rlhf.tracking.sinks.grafana import grafana_dashboard
from rlhf.tracking.sinks.prometheus_names import PREFIX, STEP, Exported, exported, labelled
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
    taught = expected_metrics(["online", "teacher", "taught"])
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


def test_the_workspace_as_it_would_be_sent(tmp_path: Path) -> None:
    assert {name for section in SECTIONS for panel in section.panels for name in panel.metrics} <= set(METRICS)
    file = tmp_path / "workspace.json"
    assert rlhf.dashboard(project="p", entity="team", out=file) == str(file)
    sent = json.loads(file.read_text())
    assert (sent["entity"], sent["project"]) == ("team", "p")
    section = sent["spec"]["section"]
    assert section["settings"]["xAxis"] == "step"
    assert section["settings"]["shouldAutoGeneratePanels"] is False
    banks = section["panelBankConfig"]["sections"]
    assert [bank["name"] for bank in banks] == [*(of.title for of in SECTIONS), "Distributions", "Samples"]
    plotted: set[str] = set()
    for bank in banks:
        for panel in bank["panels"]:
            config = panel["config"]
            plotted |= {*config.get("metrics", []), *config.get("mediaKeys", [])}
            if "metricRegex" in config:
                known = [name for name in METRICS if re.fullmatch(config["metricRegex"], _filled(name))]
                assert known, config["metricRegex"]
                plotted |= set(known)
    assert plotted <= set(METRICS)
    assert {"rewards/score/mean", "experience/kl_ref/mean", "update/ratio/histogram"} <= plotted
    assert "system/<node>/memory_gib" in plotted
    assert {"eval/<set>/<metric>", "rewards/<name>/mean", "time/<stage>_s"} <= plotted


def _filled(name: str) -> str:
    """A key of a declared metric."""
    known = name.replace("<stage>", "update").replace("<role>", "policy").replace("<lag>", "1")
    return known.replace("<", "").replace(">", "")


def all_exported() -> list[Exported]:
    """Return all metrics of a run for export, and the last finished step."""
    metrics = [exported(metric) for metric in METRICS.values() if metric.reduction is not Histogram]
    return [Exported(name=PREFIX + STEP, labels=(), is_counter=False, meaning=""), *metrics]


def test_exported_names_are_prometheus_names_and_distinct() -> None:
    names = [one.in_prometheus for one in all_exported()]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"ray_rlhf_[a-z][a-z0-9_]*", name) for name in names), names
    found, labels = labelled("eval/held.out/pass@1")
    assert (found.in_prometheus, labels) == ("ray_rlhf_eval", {"set": "held.out", "metric": "pass@1"})
    assert labelled("time/step_s")[0].in_prometheus == "ray_rlhf_time_step_s"
    assert labelled("time/update_s")[1] == {"stage": "update"}
    assert labelled("rollouts/tokens/total")[0].in_prometheus == "ray_rlhf_rollouts_tokens_total"


def expressions(tree: Any) -> list[str]:
    """Every query of a dashboard."""
    if isinstance(tree, dict):
        own = [tree["expr"]] if "expr" in tree else []
        return own + [one for value in tree.values() for one in expressions(value)]
    return [one for value in tree for one in expressions(value)] if isinstance(tree, list) else []


def test_grafana_asks_for_exported_metrics_alone() -> None:
    written = grafana_dashboard()
    known = {one.in_prometheus: one for one in all_exported()}
    found = expressions(written)
    assert len(found) > 40
    for expression in found:
        (name,) = re.findall(r"ray_\w+", expression)
        by = re.findall(r"by \(([^)]*)\)", expression)[0].split(", ")
        assert by == ["run", *known[name].labels]
        assert known[name].is_counter == ("rate(" in expression)
    (variable,) = re.findall(r"ray_\w+", written["templating"]["list"][1]["query"])
    assert variable in known
    places = [tuple(panel["gridPos"].values())[:2] for panel in written["panels"]]
    assert len(places) == len(set(places))


def test_a_missing_package_folder_or_login_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    monkeypatch.setattr(wandb, "login", lambda *, prompt: prompt)
    for out, message in ((None, r"WANDB_API_KEY.*--out"), (tmp_path / "none" / "file.json", "--out")):
        with pytest.raises(UserError, match=message):
            rlhf.dashboard(out=out)
    monkeypatch.setattr(workspace, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ray-rlhf\[dashboard\]"):
        rlhf.dashboard(out=tmp_path / "file.json")


def test_a_busy_core_shows() -> None:
    sampler = NodeSampler()
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass
    found = {key: one.result() for key, one in sampler.take().items()}
    assert 0.0 < found["cpu_fraction"] <= 1.0
    assert found["memory_gib"] > 0.05
    sampler.stop()


def test_gpus_of_a_node_are_taken_together() -> None:
    found = gpu_use("30, 1024\n50, 3072\n")
    assert found["gpu_fraction"].result() == pytest.approx(0.4)  # (30 + 50) / 2 per cent
    assert found["gpu_memory_gib"].result() == pytest.approx(4.0)
    assert gpu_use("") == {}
    assert gpu_use("Unable to determine the device handle for GPU 0000:00:1E.0: Unknown Error\n30, 1024") == gpu_use(
        "30, 1024"
    )
    assert gpu_use("[N/A], 1024\n") == {}  # a slice of a GPU does not say how busy it is
