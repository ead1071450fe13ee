"""The learning rate as a function of the step. Called by the engine before each step; it has no state of its own."""

from __future__ import annotations

import math

from rlhf.engine.base import ScheduleSettings


def lr_factor(settings: ScheduleSettings, step: int) -> float:
    """Multiple of the base rate in optimizer step `step`, counted from 1.

    The rise reaches 1 in step warmup_steps; the fall reaches min_ratio in step total_steps and stays there.
    """
    if step <= settings.warmup_steps:
        return step / settings.warmup_steps
    length = max(1, settings.total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / length)
    if settings.kind == "constant":
        return 1.0
    fall = 1.0 - progress if settings.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.min_ratio + (1.0 - settings.min_ratio) * fall
