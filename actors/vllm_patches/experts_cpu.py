"""Record the experts chosen by a CPU engine's routers for each token, until the response is finished.

On GPUs vLLM's second model runner returns the experts itself. A table has a row for each place in the cache of keys and
values, so tokens of a shared prefix are both computed and recorded once.

A request that loses the place in the cache, as after an update of the weights, computes all tokens again. A token's
first choices are kept, as on GPUs, since these choices belong to the sampling weights.
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
    """The experts chosen for the tokens in an engine's cache of keys and values."""

    def __init__(self, runner: Any) -> None:
        groups = len(runner.kv_cache_config.kv_cache_groups)
        if groups != 1:
            raise RunError(
                f"policy.router_replay: the engine holds the keys of its layers in {groups} groups, but experts are "
                "recorded only with a single group. Set policy.router_replay to false."
            )
        self._runner = runner
        model, cache = runner.model_config, runner.cache_config
        self._block_size = cache.block_size
        shape = (model.get_total_num_hidden_layers(), model.get_num_experts_per_tok())
        self._table = torch.zeros(cache.num_gpu_blocks * cache.block_size, *shape, dtype=torch.int16)
        self._kept: dict[str, Tensor] = {}  # first choices of requests that have lost their places since
        bind_routed_experts_capturer(runner.get_model(), self)
        update = runner._update_states

        def update_states(scheduled: Any) -> Any:
            for internal_id in scheduled.finished_req_ids:
                self._kept.pop(internal_id, None)
            for internal_id in scheduled.preempted_req_ids or ():
                self._keep(internal_id)  # before the step fills the places again
            return update(scheduled)

        runner._update_states = update_states

    def capture(self, layer: int, chosen: Tensor) -> None:
        """Record a layer's choices for the tokens of the running step. vLLM's routers call this method."""
        mappings = get_forward_context().slot_mapping
        if mappings:  # a pass without mappings uses no cache
            slots = next(iter(mappings.values()))[: len(chosen)]
            self._table[slots, layer] = chosen.to(torch.int16)

    def of(self, request_id: str, num_tokens: int) -> np.ndarray[Any, Any]:
        """Return the choices for the first tokens of a request finished in the last step."""
        internal_id = next(name for name in self._runner.requests if name.rpartition("-")[0] == request_id)
        return self._first_choices(internal_id, num_tokens).numpy()

    def _keep(self, internal_id: str) -> None:
        """Keep the choices of a request that has just lost its places."""
        request = self._runner.requests.get(internal_id)  # None: the request has finished
        if request is not None:
            self._kept[internal_id] = self._first_choices(internal_id, request.num_tokens - 1)  # the last was not read

    def _first_choices(self, internal_id: str, num_tokens: int) -> Tensor:
        """Return the choices for the first tokens of a request, each from the first computation."""
        (blocks,) = self._runner.requests[internal_id].block_ids
        places = torch.tensor(blocks)[:, None] * self._block_size + torch.arange(self._block_size)
        kept = self._kept.get(internal_id, self._table[:0])[:num_tokens]
        return torch.cat([kept, self._table[places.flatten()[len(kept) : num_tokens]]])
