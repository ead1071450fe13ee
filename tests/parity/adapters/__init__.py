"""Which of our functions answers for which function of which library."""

from tests.parity.adapters import (
    aggregation,
    corrections,
    group_advantages,
    grpo_losses,
    kl,
    logprobs,
    policy_losses,
    rewards,
    tiny_llama,
    token_advantages,
    trl_advantages,
)
from tests.parity.case import Adapter

MODULES = (
    aggregation,
    corrections,
    group_advantages,
    grpo_losses,
    kl,
    logprobs,
    policy_losses,
    rewards,
    tiny_llama,
    token_advantages,
    trl_advantages,
)
ADAPTERS: dict[tuple[str, str], Adapter] = {}
for module in MODULES:
    ADAPTERS |= module.ADAPTERS
