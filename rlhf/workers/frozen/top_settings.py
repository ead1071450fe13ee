"""Say what a run's teachers return in place of states. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.algorithms.distillation import DistillationConfig, TaughtConfig
from rlhf.config.derive import reads_teacher_heads
from rlhf.config.schema.model import ModelConfig, PolicyConfig
from rlhf.config.schema.root import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """Settings of teachers that return the k largest log-probabilities in place of states."""

    k: int
    temperature: float
    student: ModelConfig  # the teachers' distributions cover no row beyond those of the student's head


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Settings of teachers that compare spans of text if their tokenizer is another than the student's."""

    temperature: float
    student: PolicyConfig


def top_of(config: Config) -> Top | None:
    """Return the settings of a run's teachers. None: they return states."""
    algorithm = config.algorithm
    if not isinstance(algorithm, TaughtConfig) or algorithm.top_k is None:
        return None
    return Top(k=algorithm.top_k, temperature=_temperature(config), student=config.policy)


def spans_of(config: Config) -> Spans | None:
    """Return the settings of teachers with another tokenizer. None: no teacher of the run may have one."""
    return Spans(temperature=_temperature(config), student=config.policy) if reads_teacher_heads(config) else None


def _temperature(config: Config) -> float:
    """Return the divisor of the logits that are compared."""
    if config.rollouts is not None:
        return config.rollouts.temperature
    assert isinstance(config.algorithm, DistillationConfig)
    return config.algorithm.temperature
