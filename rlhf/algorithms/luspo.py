"""LUSPO (arXiv:2602.05261) is GSPO with each response's loss multiplied by its length."""

from __future__ import annotations

from typing import Literal

from rlhf.algorithms.gspo import GSPO, SequenceClipConfig
from rlhf.algorithms.shared import Aggregation


class LUSPOConfig(SequenceClipConfig):
    """Length-unbiased sequence policy optimisation."""

    name: Literal["luspo"]
    """The algorithm."""
    aggregation: Aggregation = "sequence_mean_token_sum"
    """How per-token losses are weighted over the whole optimizer step."""


class LUSPO(GSPO):
    """A response's loss is one number on each of its tokens. Their sum is this number times the length."""
