"""Groups of parameters with a common learning rate, decay and rule, built before anything is sharded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rlhf.engine.training_engine import OptimizerSettings
from rlhf.vision.kinds import is_vision_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Trainable parameters treated alike by the optimizer."""

    parameters: list[nn.Parameter]
    lr_ratio: float  # the group's rate as a multiple of the run's
    decays: bool  # whether weight decay applies
    is_matrix: bool  # matrices of a transformer block, orthogonalised by Muon


def parameter_groups(module: nn.Module, settings: OptimizerSettings) -> list[ParameterGroup]:
    """Return all trainable parameters in as few groups as the settings need, each in the model's order.

    LoRA+ (arXiv:2402.12354, section 4): lr_B = ratio * lr_A. Norms and biases have fewer than two dimensions and do not
    decay. Muon takes only the matrices of the blocks. Their names have a block number, unlike embeddings and heads.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # of the whole, where ranks have shares
        in_block = any(part.isdigit() for part in name.split("."))
        key = (
            (settings.lora_plus_ratio if ".lora_B." in name else 1.0)
            * (settings.vision_ratio if is_vision_weight(name) else 1.0),
            settings.weight_decay > 0.0 and dimensions >= 2,
            settings.name == "muon" and dimensions == 2 and in_block,
        )
        groups.setdefault(key, []).append(parameter)
    return [
        ParameterGroup(parameters=parameters, lr_ratio=ratio, decays=decays, is_matrix=is_matrix)
        for (ratio, decays, is_matrix), parameters in groups.items()
    ]
