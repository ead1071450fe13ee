"""Arithmetic of a training pass without recomputation, and the speed of a large product, for throughput/mfu."""

from __future__ import annotations

import time
from typing import Any

import torch

from rlhf.models.files.folder_check import num_experts
from rlhf.models.files.loading import class_of
from rlhf.vision.kinds import is_vision_weight


def flops_per_token(config: Any, sequence_length: float) -> float:
    """Return the FLOPs of a model's forward and backward pass over one token, at a mean sequence length.

    There are 6 for each weight in a product (Kaplan et al., arXiv:2001.08361, section 2.1), with a tied embedding
    counted once, as the head. Of a mixture, the experts chosen for a token count. Causal attention adds 6 * layers *
    heads * head size * length, since attention sees half the sequence on average. A token of an image costs as much as
    any other; the passes of the vision tower are left out.
    """
    with torch.device("meta"):
        model = class_of(config, scalar=False).from_config(config)
    config = config.get_text_config()
    weights: int = sum(p.numel() for name, p in model.named_parameters() if not is_vision_weight(name))
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        weights -= model.get_input_embeddings().weight.numel()  # a look-up
    if experts := num_experts(config.to_dict()):
        stacked = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        weights -= stacked * (experts - config.num_experts_per_tok) // experts
    heads: int = config.num_attention_heads
    head_size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * weights + 6.0 * int(config.num_hidden_layers) * heads * head_size * sequence_length


def measure_peak_flops(dtype: torch.dtype, device: torch.device, *, repeats: int = 3, side: int = 4096) -> float:
    """Measure floating-point operations per second, as the best of some products of matrices larger than any cache."""
    generator = torch.Generator(device).manual_seed(0)  # a run draws the same numbers with and without a measurement
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        del product
    return 2.0 * side**3 / best
