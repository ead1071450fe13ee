"""GRPO (arXiv:2402.03300): advantages from a prompt's group of responses, clipped surrogate, no critic."""

from __future__ import annotations

from typing import Literal

from rlhf.algorithms.shared import KLConfig, OnlineConfig


class GRPOConfig(OnlineConfig):
    """Group-relative policy optimisation."""

    name: Literal["grpo"]
    """The algorithm."""
    kl: KLConfig = KLConfig(coef=0.0, estimator="k3", place="loss")
    """Penalty towards the reference model."""
    std_normalize: bool = True
    """Divide the centred scores by their group's standard deviation; False is the Dr. GRPO form (arXiv:2503.20783)."""
