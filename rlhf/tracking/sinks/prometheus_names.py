"""Names of the metrics in Prometheus: `update/loss/mean` is exported as `ray_rlhf_update_loss_mean`.

The value of a placeholder becomes a label, so one expression covers the graph of all rewards. Sums a step (`.../total`)
are counters, which only rise; all other metrics are gauges. actors/cluster/prometheus.py exports under the names, and
the Grafana dashboard queries the names. This module does not use Ray.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf.tracking.metrics.declarations import Metric, declared

PREFIX = "rlhf_"
RAYS_PREFIX = "ray_"  # Ray's prefix of every name
RUN_LABEL = "run"
STEP = "step"  # the last finished step


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A metric as given to Ray."""

    name: str
    labels: tuple[str, ...]  # besides the run
    is_counter: bool
    meaning: str

    @property
    def in_prometheus(self) -> str:
        """Return the name for queries: Ray adds a prefix, and `_total` for counters."""
        return RAYS_PREFIX + self.name + ("_total" if self.is_counter else "")


def exported(metric: Metric) -> Exported:
    is_counter = metric.name.endswith("/total")
    parts = [re.sub(r"<\w+>_?", "", part) for part in metric.name.removesuffix("/total").split("/")]
    return Exported(
        name=PREFIX + re.sub(r"\W", "_", "_".join(part for part in parts if part)),
        labels=tuple(re.findall(r"<(\w+)>", metric.name)),
        is_counter=is_counter,
        meaning=f"{metric.meaning} ({metric.unit})",
    )


def labelled(key: str) -> tuple[Exported, dict[str, str]]:
    """Return the Prometheus form of a key, and the labels. KeyError: the key is not declared."""
    metric = declared(key)
    return exported(metric), metric.placeholders(key) or {}
