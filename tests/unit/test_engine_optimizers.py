"""The optimizers step, save and report missing packages, without DeepSpeed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.engine.optimizers import MuonWithAdamW, make_optimizer
from rlhf.engine.parameter_groups import ParameterGroup
from rlhf.engine.training_engine import OptimizerSettings
from rlhf.errors import UserError

MATRIX, TABLE, NORM = (6, 4), (10, 4), (4,)


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in (MATRIX, TABLE, NORM)]


def made_for(parameters: list[nn.Parameter], name: Any) -> torch.optim.Optimizer:
    groups = [
        ParameterGroup(parameters=[p], lr_ratio=1.0, decays=p.dim() == 2, is_matrix=p.shape == torch.Size(MATRIX))
        for p in parameters
    ]
    return make_optimizer(groups, OptimizerSettings(name=name, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1))


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], numbers: range) -> list[Tensor]:
    for number in numbers:
        generator = torch.Generator().manual_seed(100 + number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / number
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def test_muon_with_adamw_is_muon_and_adamw() -> None:
    ours, (matrix, table, norm) = weights(), weights()
    found = steps(made_for(ours, "muon"), ours, range(1, 4))
    muon = torch.optim.Muon([matrix], weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    steps(muon, [matrix, table, norm], range(1, 4))
    plain = weights()
    adam = torch.optim.AdamW(
        [{"params": [plain[1]], "weight_decay": 0.1}, {"params": [plain[2]], "weight_decay": 0.0}], betas=(0.9, 0.99)
    )
    steps(adam, plain, range(1, 4))
    torch.testing.assert_close(found, [matrix.detach(), plain[1].detach(), plain[2].detach()])
    alone = weights()[:1]
    optimizer = made_for(alone, "muon")
    assert isinstance(optimizer, MuonWithAdamW)
    torch.testing.assert_close(steps(optimizer, alone, range(1, 4)), found[:1])


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "muon"])
def test_norms_do_not_decay_and_nothing_moves_before_the_first_rate(name: str) -> None:
    parameters = weights()
    before = [p.detach().clone() for p in parameters]
    optimizer = made_for(parameters, name)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(map(torch.equal, parameters, before))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    matrix, table, norm = (float((p / old).mean()) for p, old in zip(parameters, before, strict=True))
    assert (matrix, table, norm) == pytest.approx((0.95, 0.95, 1.0))  # 1 - 0.5 * 0.1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.optimizer: is adamw_8bit, but bitsandbytes"):
        made_for(weights(), "adamw_8bit")
