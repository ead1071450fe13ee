"""How many responses are sampled, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.algorithms.section import Section


class RolloutsConfig(Section):
    """Sampling of one step. A step's batch is prompts_per_step * samples_per_prompt responses."""

    prompts_per_step: int = Field(default=64, ge=1, le=1_000_000)
    """Prompts answered between two weight syncs."""
    samples_per_prompt: int = Field(default=4, ge=1, le=10_000)
    """Responses to each prompt: one group."""
    max_new_tokens: int = Field(default=256, ge=1)
    """A response that reaches it is cut and counted as truncated."""
    temperature: float = Field(default=1.0, ge=0.01, le=10.0)
    """Sampling temperature; the trainer's log-probabilities are taken at the same one."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling; 1.0 keeps all tokens."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample among the k likeliest tokens; null keeps all."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a response; they stay in it."""
    max_staleness: Literal[0] = 0
    """Optimizer phases by which a rollout may lag behind the weights it trains. 0: rollouts and training take turns."""
