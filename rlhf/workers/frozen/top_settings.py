"""Name the values of a run's teachers in place of states. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.algorithms.distillation import DistillationConfig, TaughtConfig
from rlhf.config.derive import chat_template, reads_teacher_heads
from rlhf.config.schema.model import ModelConfig, PolicyConfig
from rlhf.config.schema.root import Config
from rlhf.data.templates import ChatTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """Settings of teachers that return the k largest log-probabilities in place of states."""

    k: int
    temperature: float
    student: ModelConfig  # the teachers' distributions cover no row beyond those of the student's head


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Settings of teachers with another tokenizer than the student's, for a comparison of spans of text."""

    temperature: float
    student: PolicyConfig
    template: ChatTemplate  # changes to the student's chat template


def top_of(config: Config) -> Top | None:
    """Return the settings of a run's teachers. None: the teachers return states."""
    algorithm = config.algorithm
    if not isinstance(algorithm, TaughtConfig) or algorithm.top_k is None:
        return None
    return Top(k=algorithm.top_k, temperature=_temperature(config), student=config.policy)


def spans_of(config: Config) -> Spans | None:
    """Return the settings of teachers with another tokenizer. None: no teacher of the run may have another
    tokenizer."""
    if not reads_teacher_heads(config):
        return None
    return Spans(temperature=_temperature(config), student=config.policy, template=chat_template(config))


def _temperature(config: Config) -> float:
    """Return the divisor of both models' logits."""
    if config.rollouts is not None:
        return config.rollouts.temperature
    assert isinstance(config.algorithm, DistillationConfig)
    return config.algorithm.temperature
