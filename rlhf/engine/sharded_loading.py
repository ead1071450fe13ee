"""Loading for ZeRO-3: a rank never holds more than a share of the weights and one whole module.

Only rank 0 reads the weights' files, module by module, and sends the remaining ranks their shares. Below stage 3 every
rank loads everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# DeepSpeed would round every buffer to dtype. Plain loading keeps rotary frequencies and the routing bias of experts.
_FLOAT32_BUFFERS = ["inv_freq", "e_score_correction_bias"]


@contextmanager
def shards_as_it_loads(*, zero_stage: int, dtype: torch.dtype, offload_parameters: bool = False) -> Iterator[None]:
    """At zero_stage 3, shard models built in the block, in host memory if offload_parameters. Collective."""
    if zero_stage != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    zero: dict[str, Any] = {"stage": 3}
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config = HfDeepSpeedConfig(  # transformers has a weak reference: this object must live as long as the block
        {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "data_types": {"keep_in_fp32_modules": _FLOAT32_BUFFERS},
            "zero_optimization": zero,
        }
    )
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config
