"""The learning rate as a function of the step, without state. The engine calls the schedule before each step."""

from __future__ import annotations

import math

from rlhf.engine.training_engine import ScheduleSettings


def lr_factor(settings: ScheduleSettings, step: int) -> float:
    """Return the multiple of the base rate for optimizer step `step`, counted from 1.

    The rise reaches 1 in step warmup_steps. The next step still has the full rate, and the decay would reach
    min_ratio one step after total_steps. No step of the run trains with a rate of 0.
    """
    if step <= settings.warmup_steps:
        return step / settings.warmup_steps
    length = max(1, settings.total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps - 1) / length)
    return settings.min_ratio + (1.0 - settings.min_ratio) * _height(settings, progress, length)


def _height(settings: ScheduleSettings, progress: float, length: int) -> float:
    """Return the rate, between minimum (0) and maximum (1), after a share of the `length` steps of the decay."""
    match settings.kind:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "cosine_with_restarts":
            within = (settings.cycles * progress) % 1.0 if progress < 1.0 else 1.0
            return 0.5 * (1.0 + math.cos(math.pi * within))
        case "wsd":
            decay_steps = min(length, max(1, round(settings.decay_ratio * settings.total_steps)))
            return min(1.0, (1.0 - progress) * length / decay_steps)
