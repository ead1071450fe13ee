"""The panels of rlhf/tracking/metrics/panels.py as a Grafana dashboard for the Prometheus that scrapes Ray.

`python -m rlhf.tracking.sinks.grafana > grafana.json` writes the dashboard, with the names of prometheus_names.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from rlhf.tracking.metrics.declarations import METRICS
from rlhf.tracking.metrics.panels import SECTIONS, Panel
from rlhf.tracking.sinks.prometheus_names import PREFIX, RAYS_PREFIX, RUN_LABEL, STEP, exported

_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 7  # of 24 units a row
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_STEPS = f"{RAYS_PREFIX}{PREFIX}{STEP}"
_UNITS = {"s": "s", "GiB": "gibibytes", "tokens/s": "none", "1": "none"}


def grafana_dashboard() -> dict[str, Any]:
    """Return the dashboard, for all runs chosen by name."""
    panels = [_graph("steps done", [_target(_STEPS, (), "A")], x=0, y=0)]
    top = _HEIGHT
    for section in SECTIONS:
        row = {"type": "row", "title": section.title, "collapsed": False, "panels": []}
        panels.append({**row, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}})
        for place, panel in enumerate(section.panels):
            x, y = place % _COLUMNS * _WIDTH, top + 1 + place // _COLUMNS * _HEIGHT
            panels.append(_panel(panel, section.question, x=x, y=y))
        top += 1 + -(-len(section.panels) // _COLUMNS) * _HEIGHT
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    runs: dict[str, Any] = {"name": RUN_LABEL, "type": "query", "label": "run", "datasource": _SOURCE}
    runs |= {"query": f"label_values({_STEPS}, {RUN_LABEL})", "refresh": 2, "multi": True, "includeAll": True}
    return {
        **{"title": "ray-rlhf", "uid": "ray-rlhf", "tags": ["ray", "rlhf"], "schemaVersion": 39, "refresh": "30s"},
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, runs]},
        "panels": [{**panel, "id": number} for number, panel in enumerate(panels, start=1)],
    }


def _graph(title: str, targets: Sequence[Mapping[str, Any]], *, x: int, y: int, width: int = 24) -> dict[str, Any]:
    graph = {"type": "timeseries", "title": title, "datasource": _SOURCE, "targets": targets}
    return {**graph, "gridPos": {"x": x, "y": y, "w": width, "h": _HEIGHT}}


def _panel(panel: Panel, question: str, *, x: int, y: int) -> dict[str, Any]:
    metrics = [(exported(METRICS[name]), ref) for name, ref in zip(panel.metrics, ascii_uppercase, strict=False)]
    targets = [_target(metric.in_prometheus, metric.labels, ref, rate=metric.is_counter) for metric, ref in metrics]
    title = f"{panel.title}, a second" if any(metric.is_counter for metric, _ in metrics) else panel.title
    scale = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
    unit = _UNITS.get(METRICS[panel.metrics[-1]].unit, "none")
    fields = {"defaults": {"unit": unit, "custom": {"scaleDistribution": scale}}, "overrides": []}
    return {**_graph(title, targets, x=x, y=y, width=_WIDTH), "description": question, "fieldConfig": fields}


def _target(name: str, labels: tuple[str, ...], ref: str, *, rate: bool = False) -> dict[str, Any]:
    by = ", ".join((RUN_LABEL, *labels))
    value = f'{name}{{{RUN_LABEL}=~"${RUN_LABEL}"}}'
    value = f"sum by ({by}) (rate({value}[5m]))" if rate else f"max by ({by}) ({value})"
    legend = " ".join(["{{" + label + "}}" for label in (RUN_LABEL, *labels)])
    words = name.removeprefix(RAYS_PREFIX + PREFIX)
    return {"refId": ref, "expr": value, "legendFormat": f"{legend} {words}", "datasource": _SOURCE}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(grafana_dashboard(), indent=1) + "\n")
