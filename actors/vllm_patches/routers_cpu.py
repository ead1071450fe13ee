"""Let the routers of a CPU engine choose experts by biases.

vLLM's router for CPUs reads a bias of choice only if the experts form groups. Without groups the router scores by a
softmax and drops the bias, as for ERNIE 4.5, or refuses sigmoids. One group of all experts gives the choice by bias.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.platforms import current_platform


def choose_by_bias_on_cpu() -> None:
    """Have vLLM's workers on CPUs build routers that read biases."""
    if not current_platform.is_cpu():
        return
    build = CPURouter.__init__

    def build_in_a_group(router: Any, *args: Any, **kwargs: Any) -> None:
        build(router, *args, **kwargs)
        put_in_a_group(router)

    CPURouter.__init__ = build_in_a_group


def put_in_a_group(router: Any) -> None:
    """Put all experts of a router into one group, if vLLM would not read the router's bias."""
    reads_bias = router.use_grouped_topk or router.custom_routing_function or router.scoring_func == "sqrtsoftplus"
    if router.e_score_correction_bias is not None and not reads_bias:
        router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1
