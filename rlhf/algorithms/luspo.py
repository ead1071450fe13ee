"""LUSPO (arXiv:2602.05261) is GSPO with each response's loss multiplied by the response's length."""

from __future__ import annotations

from typing import Literal

from rlhf.algorithms.gspo import SequenceClip, SequenceClipConfig
from rlhf.algorithms.online_config import Aggregation


class LUSPOConfig(SequenceClipConfig):
    """Length-unbiased sequence policy optimisation."""

    name: Literal["luspo"]
    aggregation: Aggregation = "sequence_mean_token_sum"


class LUSPO(SequenceClip):
    """Every token of a response has the same loss, so a response's sum is this loss times the length."""

    config: LUSPOConfig
