"""Compute the gated delta rule of Qwen3.5 and Qwen3-Next on a CPU in float32 too.

vLLM's kernels for CPUs take only bfloat16. In any other dtype the causal convolution is PyTorch's, and the rule is the
rule of transformers, with vLLM's states of each sequence (Yang et al. 2024, arXiv:2412.06464).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.platforms import current_platform
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name

from rlhf.errors import RunError


def compute_delta_rule_on_cpu() -> None:
    """Have vLLM's workers on CPUs compute the gated delta rule in every dtype."""
    if not current_platform.is_cpu():
        return
    in_bfloat16 = gdn_attention.cpu_gdn_attention_core

    def attend(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: LayerNameType) -> None:
        if mixed_qkv.dtype == torch.bfloat16:
            in_bfloat16(mixed_qkv, b, a, core_attn_out, layer_name)
            return
        context = get_forward_context()
        if context.attn_metadata is not None:
            layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
            attend_by_sequence(layer, context.attn_metadata[layer.prefix], mixed_qkv, b, a, core_attn_out)

    gdn_attention.cpu_gdn_attention_core = attend


def attend_by_sequence(layer: Any, batch: Any, mixed_qkv: Tensor, b: Tensor, a: Tensor, out: Tensor) -> None:
    """Write the layer's result for each token into `out`, and continue the states of the sequences.

    The batch has sequences of one new token first, then prompts. mixed_qkv: [N, channels]; b, a: [N, heads].
    """
    states = layer.kv_cache[0] if is_conv_state_dim_first() else layer.kv_cache[0].transpose(-1, -2)
    if states.shape[-1] != layer.conv1d.weight.shape[-1] - 1:
        raise RunError("On a CPU, vLLM can draft tokens for this model only in bfloat16. Set policy.dtype to bfloat16.")
    slots, num_continued = batch.non_spec_state_indices_tensor, batch.num_decodes
    starts = batch.non_spec_query_start_loc.tolist()
    runs = [(0, num_continued, num_continued)] if num_continued else []  # first sequence, sequences, their tokens
    for i in range(num_continued, num_continued + batch.num_prefills):
        runs.append((i, 1, starts[i + 1] - starts[i]))
        if not bool(batch.has_initial_state[i]):
            states[slots[i]] = 0
            layer.kv_cache[1][slots[i]] = 0
    for first, count, num_tokens in runs:
        rows = slice(starts[first], starts[first] + num_tokens)
        taken = slots[first : first + count].long()
        out[rows] = _continued(layer, states, taken, mixed_qkv[rows], b[rows], a[rows])


def _continued(layer: Any, states: Tensor, slots: Tensor, mixed_qkv: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Return the result for adjacent sequences of equal length, one a slot, and store the states behind them."""
    count, num_tokens = len(slots), len(mixed_qkv) // len(slots)
    given = mixed_qkv.view(count, num_tokens, -1).transpose(1, 2)
    longer = torch.cat([states[slots].to(given), given], 2)
    states[slots] = longer[..., -states.shape[-1] :].to(states)
    convolved = F.silu(F.conv1d(longer, layer.conv1d.weight, layer.conv1d.bias, groups=given.shape[1]))
    parts = layer.rearrange_mixed_qkv(convolved.transpose(1, 2).reshape(len(mixed_qkv), -1))
    query, key, value = (part.reshape(count, num_tokens, *part.shape[-2:]) for part in parts)
    repeats = value.shape[2] // key.shape[2]
    memory = layer.kv_cache[1]
    memory = memory.view(*memory.shape[:2], memory.shape[3], memory.shape[2])  # [slots, heads, keys, values]
    rule = torch_recurrent_gated_delta_rule if num_tokens == 1 else torch_chunk_gated_delta_rule
    result, after = rule(
        query.repeat_interleave(repeats, 2),
        key.repeat_interleave(repeats, 2),
        value,
        g=(-layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias)).view(count, num_tokens, -1),
        beta=b.sigmoid().view(count, num_tokens, -1),
        initial_state=memory[slots].float(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    memory[slots] = after.to(memory)
    flat: Tensor = result.reshape(len(mixed_qkv), *result.shape[2:])
    return flat
