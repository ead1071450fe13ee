"""The learning rate as a function of the step. Called by the engine before each step; it has no state of its own."""

from __future__ import annotations

import math

from rlhf.engine.base import ScheduleSettings


def lr_factor(settings: ScheduleSettings, step: int) -> float:
    """Return the multiple of the base rate for optimizer step `step`, counted from 1.

    The rise reaches 1 in step warmup_steps. The next step still has the full rate, and the decay would reach min_ratio
    one step after total_steps, so that no step of the run trains with a rate of 0.
    """
    if step <= settings.warmup_steps:
        return step / settings.warmup_steps
    if settings.kind == "constant":
        return 1.0
    length = max(1, settings.total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps - 1) / length)
    fall = 1.0 - progress if settings.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.min_ratio + (1.0 - settings.min_ratio) * fall
