"""The table from a library's function to our function."""

from tests.parity.adapters import (
    aggregation,
    corrections,
    distillation,
    group_advantages,
    grpo_losses,
    kl,
    logprobs,
    packing,
    policy_losses,
    preference_losses,
    reward_models,
    rewards,
    tiny_llama,
    token_advantages,
    trl_advantages,
    unpaired_losses,
)
from tests.parity.case import Adapter

MODULES = (
    aggregation,
    corrections,
    distillation,
    group_advantages,
    grpo_losses,
    kl,
    logprobs,
    packing,
    policy_losses,
    preference_losses,
    reward_models,
    rewards,
    tiny_llama,
    token_advantages,
    trl_advantages,
    unpaired_losses,
)
ADAPTERS: dict[tuple[str, str], Adapter] = {}
for module in MODULES:
    ADAPTERS |= module.ADAPTERS
