"""OPSD (arXiv:2601.18734): on-policy self-distillation from the policy before training, which is given a solution."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from rlhf.algorithms.privileged import PrivilegedConfig
from rlhf.algorithms.self_distillation import SelfDistillation, SelfDistillationConfig
from rlhf.objectives import distillation
from rlhf.sections import OnlyWith


class OPSDConfig(SelfDistillationConfig):
    """On-policy self-distillation with a solution in the teacher's prompt."""

    name: Literal["opsd"]
    divergence: Literal["sampled_reverse_kl", "forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """`forward_kl`: KL(teacher || student). `reverse_kl`: KL(student || teacher). `jsd`: a divergence between these
    two, set by beta. `sampled_reverse_kl`: a policy gradient with the log-ratios of the sampled tokens as
    advantages."""
    entry_clip: Annotated[float | None, OnlyWith("divergence", "forward_kl")] = Field(default=0.05, gt=0.0)
    """`forward_kl`: largest term of a single vocabulary entry, so that tokens of style do not dominate the loss. null:
    no limit."""
    privileged: PrivilegedConfig = PrivilegedConfig(
        template="{prompt}\n\nHere is a reference solution to this problem:\n{solution}\n\nAfter understanding the "
        "reference solution, solve the problem in your own words, step by step."
    )
    """The teacher's prompt, by default with the column `solution`."""
    teacher_weights: Literal["current", "average", "snapshot"] = "snapshot"


class OPSD(SelfDistillation):
    """On-policy self-distillation.

    The paper was read through descriptions and derived codes (rLLM, OpenTinker, ms-swift's opsd). Deviations: 1. the
    mean is over the tokens of the optimizer step; 2. the teacher's states are computed once a step; 3. the temperature
    of the divergence is the sampler's.
    """

    config: OPSDConfig

    @property
    def divergence(self) -> distillation.Divergence:
        """Return the divergence over the vocabulary, with clipped entries if so configured."""
        if self.config.divergence == "forward_kl" and self.config.entry_clip is not None:
            return partial(distillation.entry_clipped_forward_kl, most=self.config.entry_clip)
        return super().divergence
