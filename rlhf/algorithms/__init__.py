"""One file per algorithm. The tables below are the only list of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf.algorithms.cpo import CPO, CPOConfig
from rlhf.algorithms.distillation import DistillationConfig
from rlhf.algorithms.dpo import DPO, DPOConfig
from rlhf.algorithms.grpo import GRPO, GRPOConfig
from rlhf.algorithms.kto import KTO, KTOConfig
from rlhf.algorithms.online_dpo import OnlineDPO, OnlineDPOConfig
from rlhf.algorithms.orpo import ORPO, ORPOConfig
from rlhf.algorithms.pairs import OnlinePairAlgorithm, PairAlgorithm
from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.algorithms.process_reward_model import ProcessRewardModelConfig
from rlhf.algorithms.reward_model import RewardModeling, RewardModelingConfig
from rlhf.algorithms.sft import SFTConfig
from rlhf.algorithms.shared import OnlineAlgorithm
from rlhf.algorithms.simpo import SimPO, SimPOConfig
from rlhf.algorithms.tpo import TPO, TPOConfig

AlgorithmConfig = (
    PPOConfig
    | GRPOConfig
    | SFTConfig
    | DistillationConfig
    | RewardModelingConfig
    | ProcessRewardModelConfig
    | DPOConfig
    | SimPOConfig
    | CPOConfig
    | ORPOConfig
    | TPOConfig
    | KTOConfig
    | OnlineDPOConfig
)

ONLINE_ALGORITHMS: Mapping[str, Callable[[Any], OnlineAlgorithm]] = {
    "ppo": PPO,
    "grpo": GRPO,
}
PAIR_ALGORITHMS: Mapping[str, Callable[[Any], PairAlgorithm]] = {
    "reward_model": RewardModeling,
    "dpo": DPO,
    "simpo": SimPO,
    "cpo": CPO,
    "orpo": ORPO,
    "tpo": TPO,
}
ONLINE_PAIR_ALGORITHMS: Mapping[str, Callable[[Any], OnlinePairAlgorithm]] = {"online_dpo": OnlineDPO}
UNPAIRED_ALGORITHMS: Mapping[str, Callable[[Any], KTO]] = {"kto": KTO}
