"""Supervised fine-tuning: cross-entropy on the tokens to be learnt."""

from __future__ import annotations

from typing import Literal

from rlhf.algorithms.section import Section


class SFTConfig(Section):
    """Supervised fine-tuning; the loss is the mean over all learnt tokens of the optimizer step."""

    name: Literal["sft"]
    """The algorithm."""
