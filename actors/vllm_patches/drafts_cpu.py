"""Give each drafted token the sampling parameters of the request, in speculative decoding on a CPU.

vLLM's kernel for CPUs writes the repeated values to a copy and drops the copy. Drafts would then be accepted and
reported by temperatures from uninitialised memory. The kernel's truncation to top-k fails in a step without a draft.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler


def correct_drafts_on_cpu() -> None:
    """Have vLLM's workers on CPUs repeat the parameters by a plain operation of torch."""
    if not current_platform.is_cpu():
        return
    apply = rejection_sampler.apply_sampling_constraints

    def apply_to_drafts(logits: Tensor, cu_num_tokens: Tensor, sampling: Any) -> Tensor:
        result: Tensor = apply(logits, cu_num_tokens, sampling) if len(logits) else logits
        return result

    rejection_sampler.expand_batch_to_tokens = repeated_for_drafts
    rejection_sampler.apply_sampling_constraints = apply_to_drafts


def repeated_for_drafts(
    values: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """Return each request's value once for each draft. cu_num_tokens: cumulative number of drafts by request."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    return replaced.repeat_interleave(counts, output_size=num_tokens)
