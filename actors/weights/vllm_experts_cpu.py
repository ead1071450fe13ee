"""Record the experts that the routers of a CPU engine choose for each token, until its response is finished.

On GPUs vLLM's second model runner returns them itself. A table has a row for each place in the cache of keys and
values, so that tokens of a shared prefix are recorded once, as they are computed once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

from rlhf.errors import RunError


class RecordedExperts:
    """The experts chosen for the tokens whose keys and values are in an engine's cache."""

    def __init__(self, runner: Any) -> None:
        groups = len(runner.kv_cache_config.kv_cache_groups)
        if groups != 1:
            raise RunError(
                f"policy.router_replay: the engine keeps its layers' keys in {groups} groups, and experts are recorded "
                "only with one. Set it to false."
            )
        self._runner = runner
        model, cache = runner.model_config, runner.cache_config
        self._block_size = cache.block_size
        shape = (model.get_total_num_hidden_layers(), model.get_num_experts_per_tok())
        self._table = torch.zeros(cache.num_gpu_blocks * cache.block_size, *shape, dtype=torch.int16)
        bind_routed_experts_capturer(runner.get_model(), self)

    def capture(self, layer: int, chosen: Tensor) -> None:
        """Note a layer's choices for the tokens of the running step. vLLM's routers call it."""
        mappings = get_forward_context().slot_mapping
        if mappings:  # else it is a pass without a cache
            slots = next(iter(mappings.values()))[: len(chosen)]
            self._table[slots, layer] = chosen.to(torch.int16)

    def of(self, request_id: str, num_tokens: int) -> np.ndarray[Any, Any]:
        """Return the choices for the first tokens of a request that has finished in the last step."""
        requests = self._runner.requests
        internal_id = next(name for name in requests if name.rpartition("-")[0] == request_id)
        (blocks,) = requests[internal_id].block_ids
        places = torch.tensor(blocks)[:, None] * self._block_size + torch.arange(self._block_size)
        return self._table[places.flatten()[:num_tokens]].numpy()
