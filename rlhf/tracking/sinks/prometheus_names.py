"""Names under which the metrics are exported to Prometheus: `update/loss/mean` as `ray_rlhf_update_loss_mean`.

What a placeholder stands for becomes a label, so that a graph of all rewards is one expression. Sums a step
(`.../total`) are counters, which go on rising; all else are gauges. actors/cluster/prometheus.py exports by these
names, and cluster/grafana.json asks for them. No Ray here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf.tracking.metrics.declarations import METRICS, PLACEHOLDERS, Metric, declared
from rlhf.tracking.metrics.reductions import Histogram

PREFIX = "rlhf_"
RAYS_PREFIX = "ray_"  # Ray puts it before every name
RUN_LABEL = "run"
STEP = "step"  # the last one that is done


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A metric as Ray is given it."""

    name: str
    labels: tuple[str, ...]  # besides the run
    is_counter: bool
    meaning: str

    @property
    def in_prometheus(self) -> str:
        """As a query names it: Ray puts its prefix before, and says of counters that they are totals."""
        return RAYS_PREFIX + self.name + ("_total" if self.is_counter else "")


def exported(metric: Metric) -> Exported:
    """How a declared metric is exported."""
    is_counter = metric.name.endswith("/total")
    parts = [re.sub(r"<\w+>_?", "", part) for part in metric.name.removesuffix("/total").split("/")]
    return Exported(
        name=PREFIX + re.sub(r"\W", "_", "_".join(part for part in parts if part)),
        labels=tuple(re.findall(r"<(\w+)>", metric.name)),
        is_counter=is_counter,
        meaning=f"{metric.meaning} ({metric.unit})",
    )


def labelled(key: str) -> tuple[Exported, dict[str, str]]:
    """How the value of a key is exported, and its labels. KeyError: it is not declared."""
    metric = declared(key)
    pattern = re.sub(r"<(\w+)>", lambda m: f"(?P<{m[1]}>{PLACEHOLDERS[m[1]][0]})", metric.name)
    match = re.fullmatch(pattern, key)
    assert match is not None
    return exported(metric), match.groupdict()


def all_exported() -> list[Exported]:
    """Everything that a run may export."""
    found = [exported(metric) for metric in METRICS.values() if metric.reduction is not Histogram]
    step = Exported(name=PREFIX + STEP, labels=(), is_counter=False, meaning="The last step that is done")
    return [step, *found]
