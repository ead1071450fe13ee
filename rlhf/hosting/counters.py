"""Count the requests of a server since the start, as a page for Prometheus."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

_HELP = {
    "requests_total": ("counter", "Finished requests by call and outcome (ok, user, server)"),
    "request_seconds_total": ("counter", "Seconds of the ranks and engines for finished requests, by call"),
    "trained_tokens_total": ("counter", "Tokens passed forward and backward"),
    "sampled_tokens_total": ("counter", "Tokens sampled"),
    "optimizer_steps_total": ("counter", "Optimizer steps"),
    "http_responses_total": ("counter", "Responses by status"),
    "recoveries_total": ("counter", "Lost ranks and engines that were started again, by place (ranks, engines)"),
    "recovery_seconds_total": ("counter", "Seconds of starting ranks and engines again"),
    "sessions": ("gauge", "Sessions that are not finished"),
    "models": ("gauge", "Models of sessions that are not finished, by place (ranks, disk)"),
    "waiting_requests": ("gauge", "Accepted requests without a result"),
    "checkpoint_bytes": ("gauge", "Bytes of all checkpoints"),
}
PREFIX = "rlhf_tinker_"
Gauges = Mapping[tuple[str, str], float]  # values by name and value of the label `place`


class Counters:
    """Sums by name and labels."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(lambda: defaultdict(float))

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._sums[name][tuple(labels.items())] += value

    def page(self, gauges: Gauges) -> str:
        """Return the page in Prometheus' text format."""
        lines = []
        values = {name: dict(sums) for name, sums in self._sums.items()}
        for (name, place), value in gauges.items():
            labels: tuple[tuple[str, str], ...] = (("place", place),) if place else ()
            values.setdefault(name, {})[labels] = value
        for name, (kind, text) in _HELP.items():
            lines += [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"]
            for labels, value in sorted(values.get(name, {}).items()):
                inside = ",".join(f'{key}="{word}"' for key, word in labels)
                lines.append(f"{PREFIX}{name}{f'{{{inside}}}' if inside else ''} {value:.15g}")
        return "\n".join(lines) + "\n"
