"""Groups of parameters with a common learning rate, decay and rule.

The engine builds the groups before sharding anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Trainable parameters treated alike by the optimizer."""

    parameters: list[nn.Parameter]
    lr_ratio: float  # the group's rate as a multiple of the run's
    decays: bool  # whether weight decay applies
    is_matrix: bool  # matrices of a transformer block, orthogonalised by Muon


def parameter_groups(
    module: nn.Module, *, lora_plus_ratio: float, weight_decay: float, splits_matrices: bool
) -> list[ParameterGroup]:
    """Return all trainable parameters in as few groups as the settings need, each in the model's order.

    LoRA+ (arXiv:2402.12354, section 4): lr_B = ratio * lr_A. A ratio other than 1 needs an adapter. Norms and biases
    have fewer than two dimensions and do not decay. splits_matrices: matrices of the blocks get separate groups.
    Embeddings and heads stay out, since their names have no block number.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        dimensions = len(_shape(parameter))
        in_block = any(part.isdigit() for part in name.split("."))
        key = (
            lora_plus_ratio if ".lora_B." in name else 1.0,
            weight_decay > 0.0 and dimensions >= 2,
            splits_matrices and dimensions == 2 and in_block,
        )
        groups.setdefault(key, []).append(parameter)
    return [
        ParameterGroup(parameters=parameters, lr_ratio=ratio, decays=decays, is_matrix=is_matrix)
        for (ratio, decays, is_matrix), parameters in groups.items()
    ]


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, also where this rank has only a share."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
