"""The optimizers by name, behind PyTorch's common interface. The engine builds an optimizer before sharding anything.

Muon's update is scaled to the size of AdamW's, and Adafactor takes the rate unchanged.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf.engine.parameter_groups import ParameterGroup
from rlhf.engine.training_engine import OptimizerSettings
from rlhf.errors import UserError

MOMENTUM = 0.95  # Muon's


def make_optimizer(groups: Sequence[ParameterGroup], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return the optimizer of the groups, with a rate of 0 until the engine sets the first rate."""
    given: list[dict[str, Any]] = [
        {"params": group.parameters, "weight_decay": settings.weight_decay if group.decays else 0.0} for group in groups
    ]
    adam: dict[str, Any] = {"lr": 0.0, "betas": settings.betas, "eps": settings.eps}
    match settings.name:
        case "adamw":
            return torch.optim.AdamW(given, fused=True, **adam)
        case "adamw_8bit":
            refuse_absent_bitsandbytes()
            from bitsandbytes.optim.adamw import AdamW8bit

            made: torch.optim.Optimizer = AdamW8bit(given, **adam)
            return made
        case "adafactor":
            from transformers.optimization import Adafactor

            factored: torch.optim.Optimizer = Adafactor(given, lr=0.0, scale_parameter=False, relative_step=False)
            return factored
        case "muon":
            for values, group in zip(given, groups, strict=True):
                values["is_matrix"] = group.is_matrix
            return MuonWithAdamW(given, adam=adam)


def refuse_absent_bitsandbytes() -> None:
    """Raise UserError if the 8-bit optimizer's package is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer: is adamw_8bit, but bitsandbytes, which has that optimizer, is not installed here. "
            "Run `pip install 'ray-rlhf[qlora]'`, or use adamw."
        )


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (kellerjordan.github.io/posts/muon) for groups with `is_matrix`, AdamW for the remaining groups.

    Both read groups and store states here, so saving and loading work as for a single optimizer. Muon's update is
    scaled by 0.2 * sqrt(max(rows, columns)) (arXiv:2502.16982, equation 4).
    """

    def __init__(self, groups: list[dict[str, Any]], *, adam: dict[str, Any]) -> None:
        super().__init__(groups, defaults={})
        matrices, others = self._of(is_matrix=True), self._of(is_matrix=False)
        muon: dict[str, Any] = {"lr": 0.0, "momentum": MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
        self._muon = torch.optim.Muon(matrices, **muon) if matrices else None
        self._adamw = torch.optim.AdamW(others, fused=True, **adam) if others else None

    def _of(self, *, is_matrix: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["is_matrix"] is is_matrix]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights with a gradient."""
        for optimizer, is_matrix in ((self._muon, True), (self._adamw, False)):
            if optimizer is not None:
                optimizer.param_groups, optimizer.state = self._of(is_matrix=is_matrix), self.state
                optimizer.step()
