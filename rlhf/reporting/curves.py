"""The plots of a report: every metric of the runs over the steps, grouped by stage, thinned to screen resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.reporting.runs import Run
from rlhf.tracking.diagnosis.findings import Finding
from rlhf.tracking.metrics.declarations import declared, is_declared

_MOST_POINTS = 1500  # of a curve
_MAIN = (
    *("rewards/score/mean", "experience/kl_ref/mean", "update/entropy/mean", "preference/accuracy/mean"),
    *("update/loss/mean", "experience/kl_teacher/mean", "rollouts/response_tokens/mean", "update/grad_norm"),
)
_NUM_MAIN = 6
_STAGES = (
    *("eval", "rewards", "rollouts", "experience", "advantages", "preference", "update", "weight_sync", "time"),
    *("throughput", "memory", "data"),
)


def keys_of(runs: Sequence[Run]) -> list[str]:
    """Return all metrics with a value in some run, by stage."""
    keys = {key for run in runs for row in run.rows for key, value in row.items() if "/" in key and value is not None}
    return sorted(keys, key=lambda key: (_stage_rank(key), key))


def _stage_rank(key: str) -> int:
    stage = key.split("/")[0]
    return _STAGES.index(stage) if stage in _STAGES else len(_STAGES)


def main_keys(runs: Sequence[Run], findings: Sequence[Finding]) -> list[str]:
    """Return the few metrics to read first: problems, held-out results, and the main training metrics."""
    keys = keys_of(runs)
    wrong = [finding.metrics[0] for finding in findings if finding.severity != "notice"]
    evals = [key for key in keys if key.startswith("eval/") and key.rpartition("/")[2] in ("score", "loss", "accuracy")]
    wanted = dict.fromkeys((*wrong[:2], *evals[:3], *_MAIN))
    return [key for key in wanted if key in keys][:_NUM_MAIN]


def plot_data(key: str, runs: Sequence[Run], findings: Sequence[Finding]) -> dict[str, Any]:
    """Return one plot's data in the form of uPlot: the steps, and each run's values at each step."""
    curves = [_curve(run.rows, key) for run in runs]
    steps = sorted({step for curve in curves for step in curve})
    metric = declared(key) if is_declared(key) else None
    return {
        "key": key,
        "unit": "" if metric is None or metric.unit == "1" else metric.unit,
        "meaning": "" if metric is None else metric.meaning,
        "x": steps,
        "y": [[curve.get(step) for step in steps] for curve in curves],
        "bands": [
            [finding.first_step, finding.last_step, finding.severity] for finding in findings if key in finding.metrics
        ],
    }


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    stride = -(-len(points) // _MOST_POINTS)
    kept = points[::stride] if stride else []
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return {step: float(f"{value:.5g}") for step, value in kept}
