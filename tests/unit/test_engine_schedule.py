"""Learning-rate factors by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from rlhf.engine.schedule import lr_factor
from rlhf.engine.training_engine import ScheduleSettings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "constant"}, [0.5, 1, 1, 1, 1, 1, 1, 1]),
        # steps 3..6 have fallen by 0/4, 1/4, 2/4, 3/4 of 1 - 0.2
        ({"kind": "linear", "min_ratio": 0.2}, [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        # (1 + cos(pi k / 4)) / 2 at k = 0..3: 1, 0.853553, 0.5, 0.146447
        ({"kind": "cosine"}, [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0, 0]),
        # half of 6 steps: 4, 5 and 6 have fallen by 0/3, 1/3 and 2/3 of 1 - 0.25
        ({"kind": "wsd", "decay_ratio": 0.5, "min_ratio": 0.25}, [0.5, 1, 1, 1, 0.75, 0.5, 0.25, 0.25]),
        ({"kind": "wsd", "decay_ratio": 1.0}, [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]),  # linear
    ],
    ids=str,
)
def test_rates_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    schedule = ScheduleSettings(warmup_steps=2, total_steps=6, **settings)
    assert [lr_factor(schedule, step) for step in range(1, 9)] == pytest.approx(expected, abs=1e-6)


TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "cosine": ("cosine", {}),
    "cosine_with_restarts": ("cosine_with_restarts", {"num_cycles": 3}),
    "wsd": ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "linear"}),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_without_warmup_the_rates_are_those_of_transformers(kind: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name, settings = TRANSFORMERS[kind]
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=0, num_training_steps=12, scheduler_specific_kwargs=settings
    )
    theirs = []
    for _ in range(12):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    schedule = ScheduleSettings(kind=kind, warmup_steps=0, total_steps=12, cycles=3, decay_ratio=0.25)  # type: ignore[arg-type]
    assert [lr_factor(schedule, step) for step in range(1, 13)] == pytest.approx(theirs)
    assert theirs[-1] > 0.0


@pytest.mark.parametrize("kind", ["constant", *TRANSFORMERS])
def test_a_run_of_a_single_step_trains(kind: str) -> None:
    assert lr_factor(ScheduleSettings(kind=kind, warmup_steps=0, total_steps=1), 1) == 1.0  # type: ignore[arg-type]
