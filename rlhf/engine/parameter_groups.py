"""Which parameters share a learning rate. Asked once, by the engine, before anything is sharded or flattened."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Trainable parameters whose rate is the same multiple of the run's."""

    parameters: list[nn.Parameter]
    lr_ratio: float


def parameter_groups(module: nn.Module, *, lora_plus_ratio: float) -> list[ParameterGroup]:
    """All trainable parameters in one group or, with a ratio other than 1, the adapters' B matrices in a second.

    LoRA+ (arXiv:2402.12354, section 4): lr_B = ratio * lr_A. A ratio other than 1 needs an adapter.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    fast = [p for name, p in trained.items() if ".lora_B." in name and lora_plus_ratio != 1.0]
    if not fast:
        return [ParameterGroup(list(trained.values()), 1.0)]
    slow = [p for name, p in trained.items() if ".lora_B." not in name]
    return [ParameterGroup(slow, 1.0), ParameterGroup(fast, lora_plus_ratio)]
