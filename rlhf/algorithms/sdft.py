"""SDFT (arXiv:2601.19897): self-distillation fine-tuning from a moving average that is given a demonstration."""

from __future__ import annotations

from typing import Literal

from rlhf.algorithms.privileged import PrivilegedConfig
from rlhf.algorithms.self_distillation import SelfDistillation, SelfDistillationConfig


class SDFTConfig(SelfDistillationConfig):
    """Self-distillation fine-tuning with a demonstration in the teacher's prompt."""

    name: Literal["sdft"]
    divergence: Literal["sampled_reverse_kl", "forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    """`reverse_kl`: KL(student || teacher). `forward_kl`: KL(teacher || student). `jsd`: a divergence between these
    two, set by beta. `sampled_reverse_kl`: a policy gradient with the log-ratios of the sampled tokens as
    advantages."""
    privileged: PrivilegedConfig = PrivilegedConfig(
        template="{prompt}\n\nThis is an example of a response to the question:\n{demonstration}\n\nNow answer with a "
        "response of your own, including the thinking process."
    )
    """The teacher's prompt, by default with the column `demonstration`."""
    teacher_weights: Literal["current", "average", "snapshot"] = "average"


class SDFT(SelfDistillation):
    """Self-distillation fine-tuning.

    The paper was read through TRL's `experimental/sdft` and lucidrains' sdft-pytorch. Deviations: 1. the mean is over
    the tokens of the optimizer step; 2. the teacher's states are computed once a step; 3. the whole vocabulary is
    compared, where TRL takes the student's 100 most probable tokens; 4. no token is weighed by the ratio to the
    sampler, which TRL clips at 2.
    """

    config: SDFTConfig
