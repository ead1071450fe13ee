"""One file per algorithm. The tables below are the only list of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf.algorithms.grpo import GRPO, GRPOConfig
from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.algorithms.sft import SFTConfig
from rlhf.algorithms.shared import OnlineAlgorithm

AlgorithmConfig = PPOConfig | GRPOConfig | SFTConfig

ONLINE_ALGORITHMS: dict[str, Callable[[Any], OnlineAlgorithm]] = {
    "ppo": PPO,
    "grpo": GRPO,
}
