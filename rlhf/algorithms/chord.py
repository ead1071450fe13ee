"""CHORD (arXiv:2508.11408) is GRPO with a share of supervised learning from the given responses of the prompts."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.online_config import ClippedConfig, StepUse
from rlhf.deferred import Bool, Float, Tensor
from rlhf.objectives import supervised
from rlhf.sections import Section


class MuDecay(Section):
    """Changes mu over the steps: a linear warm-up from 0, then half a cosine (CHORD-mu)."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps until mu is reached."""
    steps: int = Field(ge=1)
    """Steps from mu to `final`, after the warm-up."""
    final: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the given responses afterwards. 0: plain GRPO."""


class ChordConfig(ClippedConfig):
    """Controllable harmonisation of on- and off-policy learning: (1 - mu) GRPO + mu SFT in each optimizer step."""

    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["chord"]
    mu: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the given responses in the loss. The paper takes 0.1 with `by_uncertainty`, and 0.9 at the start of a
    decay."""
    mu_decay: MuDecay | None = None
    """Change of mu over the steps; null: mu is constant."""
    by_uncertainty: bool = True
    """Multiply the cross-entropy of each given token by p (1 - p), with p the token's probability (CHORD-phi)."""

    @property
    def reads_given_responses(self) -> bool:
        return True


class Chord(GroupRelative):
    """Given responses are learned beside the rollouts of the same prompts, in the same optimizer step.

    Deviations from the paper: 1. the given responses are those of the step's prompts, not of a separate data set;
    2. their loss is the mean over the given tokens of the whole optimizer step, over micro-batches and ranks.
    """

    config: ChordConfig

    def given_share(self, step: int) -> float:
        """Return mu of a step."""
        decay = self.config.mu_decay
        if decay is None:
            return self.config.mu
        return supervised.warmed_up_cosine(
            step - 1, warmup=decay.warmup_steps, decay=decay.steps, peak=self.config.mu, final=decay.final
        )

    def given_loss(self, logprobs: Float[Tensor, " N"], mask: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return the cross-entropy of each given token, weighted as configured."""
        if self.config.by_uncertainty:
            return supervised.uncertain_negative_logprob(logprobs, mask)
        return supervised.negative_logprob(logprobs, mask)
