"""The W&B workspace and the Grafana dashboard ask for declared metrics alone, in the order of reading."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import rlhf
from rlhf.errors import UserError
from rlhf.tracking.metrics.declarations import METRICS
from rlhf.tracking.metrics.panels import SECTIONS
from rlhf.tracking.metrics.reductions import Histogram
from rlhf.tracking.sinks import wandb_workspace as workspace
from rlhf.tracking.sinks.grafana import grafana_dashboard
from rlhf.tracking.sinks.prometheus_names import PREFIX, STEP, Exported, exported, labelled
from tests.fixtures.sources import ROOT


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
    written = json.loads((ROOT / "cluster" / "grafana.json").read_text(encoding="utf-8"))
    assert written == grafana_dashboard(), "run: python -m rlhf.tracking.sinks.grafana > cluster/grafana.json"
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
