"""TensorBoard as a tracker back end: event files in <run folder>/tensorboard, for `tensorboard --logdir runs`.

TensorBoard shows scalars, histograms, and alerts as text, but no samples and no timeline.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import UserError
from rlhf.tracking.diagnosis.findings import Severity
from rlhf.tracking.sinks.backends import TrackedStep, TrackerBackend

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_S = 10


def open_tensorboard(folder: Path, *, done_steps: int | None) -> TensorboardBackend:
    """Continue the log after a step; TensorBoard then hides later points of an earlier start. None: start a new log.

    UserError: the package is not installed.
    """
    if find_spec("tensorboard") is None:
        raise UserError(
            "tracking.tensorboard is true, but the package tensorboard is not installed: "
            "`pip install 'ray-rlhf[tensorboard]'`, or set it to false."
        )
    from torch.utils.tensorboard import SummaryWriter

    purge = None if done_steps is None else done_steps + 1
    return TensorboardBackend(SummaryWriter(folder / "tensorboard", purge_step=purge, flush_secs=FLUSH_S))


class TensorboardBackend(TrackerBackend):
    """Writes steps to an open event file."""

    name = "TensorBoard"

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer
        self._step = 0

    def log(self, step: TrackedStep) -> None:
        self._step = step.step
        for key, value in step.metrics.items():
            if value is not None:
                self._writer.add_scalar(key, value, step.step)
        for key, histogram in step.histograms.items():
            edges, counts = histogram.edges, histogram.counts
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            self._writer.add_histogram_raw(
                key,
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=sum(c * m for c, m in zip(counts, middles, strict=True)),
                sum_squares=sum(c * m * m for c, m in zip(counts, middles, strict=True)),
                bucket_limits=list(edges[1:]),
                bucket_counts=list(counts),
                global_step=step.step,
            )

    def alert(self, severity: Severity, title: str, text: str) -> None:
        self._writer.add_text(f"alerts/{title}", f"**{severity}**: {text}", self._step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()
