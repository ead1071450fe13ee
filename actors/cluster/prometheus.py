"""Export metrics to Prometheus through Ray: every node of a Ray cluster already serves metrics.

Every run exports, with the run's name as the label `run`; the cost without a scraper is negligible. Histograms are left
out: Ray computes sums of histograms from the centers of buckets, and the means are metrics already.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

from rlhf.tracking.sinks.backends import TrackedStep, TrackerBackend
from rlhf.tracking.sinks.prometheus_names import PREFIX, RUN_LABEL, STEP, Exported, labelled


class PrometheusBackend(TrackerBackend):
    """Exports the metrics of one run, as gauges and counters created at first use. Ray drops the values at the end."""

    name = "Prometheus"

    def __init__(self, run: str) -> None:
        self._run = {RUN_LABEL: run}
        self._exporters: dict[str, Gauge | Counter] = {}
        self._step = Gauge(PREFIX + STEP, description="The last finished step", tag_keys=(RUN_LABEL,))

    def log(self, step: TrackedStep) -> None:
        for key, value in step.metrics.items():
            if value is None:
                continue
            exported, labels = labelled(key)
            tags = self._run | labels
            if not exported.is_counter:
                self._exporter(exported).set(value, tags=tags)
            elif value > 0.0:
                self._exporter(exported).inc(value, tags=tags)
        self._step.set(step.step, tags=self._run)

    def _exporter(self, exported: Exported) -> Any:
        if exported.name not in self._exporters:
            kind = Counter if exported.is_counter else Gauge
            tags = (RUN_LABEL, *exported.labels)
            self._exporters[exported.name] = kind(exported.name, description=exported.meaning, tag_keys=tags)
        return self._exporters[exported.name]
