"""cluster/grafana.json: rlhf/tracking/metrics/panels.py as a Grafana dashboard for the Prometheus that scrapes Ray.

`python -m rlhf.tracking.sinks.grafana > cluster/grafana.json` writes it. It uses only the names of
rlhf/tracking/sinks/prometheus_names.py.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rlhf.tracking.metrics.declarations import METRICS
from rlhf.tracking.metrics.panels import SECTIONS, Panel
from rlhf.tracking.sinks.prometheus_names import PREFIX, RAYS_PREFIX, RUN_LABEL, STEP, exported

_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 7  # of 24 units a row
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_UNITS = {"s": "s", "GiB": "gibibytes", "tokens/s": "none", "1": "none"}


def dashboard() -> dict[str, Any]:
    """Return the dashboard, for all runs chosen by name."""
    panels: list[dict[str, Any]] = [_progress()]
    top = _HEIGHT
    for section in SECTIONS:
        row = {"type": "row", "title": section.title, "collapsed": False, "panels": []}
        panels.append({**row, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}})
        for place, panel in enumerate(section.panels):
            x, y = place % _COLUMNS * _WIDTH, top + 1 + place // _COLUMNS * _HEIGHT
            panels.append(_graph(panel, section.question, x=x, y=y))
        top += 1 + -(-len(section.panels) // _COLUMNS) * _HEIGHT
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": RUN_LABEL,
            "type": "query",
            "label": "run",
            "datasource": _SOURCE,
            "query": f"label_values({RAYS_PREFIX}{PREFIX}{STEP}, {RUN_LABEL})",
            "refresh": 2,
            "multi": True,
            "includeAll": True,
        },
    ]
    return {
        "title": "ray-rlhf",
        "uid": "ray-rlhf",
        "tags": ["ray", "rlhf"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables},
        "panels": [{**panel, "id": number} for number, panel in enumerate(panels, start=1)],
    }


def _progress() -> dict[str, Any]:
    """Return the panel with the newest step of each run."""
    target = _target(f"{RAYS_PREFIX}{PREFIX}{STEP}", (), "A")
    position = {"x": 0, "y": 0, "w": 24, "h": _HEIGHT}
    return {
        "type": "timeseries",
        "title": "steps done",
        "datasource": _SOURCE,
        "targets": [target],
        "gridPos": position,
    }


def _graph(panel: Panel, question: str, *, x: int, y: int) -> dict[str, Any]:
    targets, unit = [], "none"
    for number, name in enumerate(panel.metrics):
        metric = exported(METRICS[name])
        targets.append(_target(metric.in_prometheus, metric.labels, chr(ord("A") + number), rate=metric.is_counter))
        unit = _UNITS.get(METRICS[name].unit, "none")
    scale = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
    return {
        "type": "timeseries",
        "title": f"{panel.title}, a second" if any(name.endswith("/total") for name in panel.metrics) else panel.title,
        "description": question,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"scaleDistribution": scale}}, "overrides": []},
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
    }


def _target(name: str, labels: tuple[str, ...], ref: str, *, rate: bool = False) -> dict[str, Any]:
    by = ", ".join((RUN_LABEL, *labels))
    value = f'{name}{{{RUN_LABEL}=~"${RUN_LABEL}"}}'
    value = f"sum by ({by}) (rate({value}[5m]))" if rate else f"max by ({by}) ({value})"
    legend = " ".join(["{{" + label + "}}" for label in (RUN_LABEL, *labels)])
    words = name.removeprefix(RAYS_PREFIX + PREFIX)
    return {"refId": ref, "expr": value, "legendFormat": f"{legend} {words}", "datasource": _SOURCE}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=1) + "\n")
