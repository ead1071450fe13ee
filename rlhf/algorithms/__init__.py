"""Define the policy-training algorithms, one file each. The tables below are the only list of algorithms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf.algorithms.cispo import CISPO, CISPOConfig
from rlhf.algorithms.clip_cov import ClipCov, ClipCovConfig
from rlhf.algorithms.cpo import CPO, CPOConfig
from rlhf.algorithms.dapo import DAPO, DAPOConfig
from rlhf.algorithms.distillation import DistillationConfig
from rlhf.algorithms.dpo import DPO, DPOConfig
from rlhf.algorithms.dppo import DPPO, DPPOConfig
from rlhf.algorithms.dr_grpo import DrGRPO, DrGRPOConfig
from rlhf.algorithms.dro import DRO, DROConfig
from rlhf.algorithms.gdpo import GDPO, GDPOConfig
from rlhf.algorithms.gmpo import GMPO, GMPOConfig
from rlhf.algorithms.gpg import GPG, GPGConfig
from rlhf.algorithms.grpo import GRPO, GRPOConfig
from rlhf.algorithms.gspo import GSPO, GSPOConfig
from rlhf.algorithms.kl_cov import KLCov, KLCovConfig
from rlhf.algorithms.kto import KTO, KTOConfig
from rlhf.algorithms.luspo import LUSPO, LUSPOConfig
from rlhf.algorithms.on_policy_distillation import OnPolicyDistillationConfig
from rlhf.algorithms.online_dpo import OnlineDPO, OnlineDPOConfig
from rlhf.algorithms.opo import OPO, OPOConfig
from rlhf.algorithms.orpo import ORPO, ORPOConfig
from rlhf.algorithms.otb import OTB, OTBConfig
from rlhf.algorithms.pairs import OnlinePairAlgorithm, PairAlgorithm
from rlhf.algorithms.pass_at_k import PassAtK, PassAtKConfig
from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.algorithms.process_reward_model import ProcessRewardModelConfig
from rlhf.algorithms.raft import RAFT, RAFTConfig
from rlhf.algorithms.reinforce import Reinforce, ReinforceConfig
from rlhf.algorithms.reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusConfig
from rlhf.algorithms.remax import ReMax, ReMaxConfig
from rlhf.algorithms.reward_model import RewardModeling, RewardModelingConfig
from rlhf.algorithms.rloo import RLOO, RLOOConfig
from rlhf.algorithms.sapo import SAPO, SAPOConfig
from rlhf.algorithms.sft import SFTConfig
from rlhf.algorithms.shared import OnlineAlgorithm
from rlhf.algorithms.simpo import SimPO, SimPOConfig
from rlhf.algorithms.tpo import TPO, TPOConfig
from rlhf.algorithms.vespo import VESPO, VESPOConfig

AlgorithmConfig = (
    PPOConfig
    | GRPOConfig
    | DrGRPOConfig
    | GSPOConfig
    | CISPOConfig
    | GMPOConfig
    | SAPOConfig
    | RLOOConfig
    | OPOConfig
    | ReinforcePlusPlusConfig
    | DAPOConfig
    | LUSPOConfig
    | VESPOConfig
    | GPGConfig
    | ReinforceConfig
    | DPPOConfig
    | DROConfig
    | ClipCovConfig
    | KLCovConfig
    | GDPOConfig
    | PassAtKConfig
    | ReMaxConfig
    | OTBConfig
    | RAFTConfig
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
    | OnPolicyDistillationConfig
)

ONLINE_ALGORITHMS: Mapping[str, Callable[[Any], OnlineAlgorithm]] = {
    "ppo": PPO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "gmpo": GMPO,
    "sapo": SAPO,
    "rloo": RLOO,
    "opo": OPO,
    "reinforce_plus_plus": ReinforcePlusPlus,
    "dapo": DAPO,
    "luspo": LUSPO,
    "vespo": VESPO,
    "gpg": GPG,
    "reinforce": Reinforce,
    "dppo": DPPO,
    "dro": DRO,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
    "gdpo": GDPO,
    "pass_at_k": PassAtK,
    "remax": ReMax,
    "otb": OTB,
    "raft": RAFT,
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
