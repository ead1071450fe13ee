"""A run has a schedule and a correction of old responses, and other schedules are possible."""

from __future__ import annotations

import pytest

from rlhf.config.files.load import load
from rlhf.config.schema.root import Config
from rlhf.planning.schedules import correction_in_force, schedule_of, schedules
from tests.fixtures.sources import ROOT

AHEAD = ("rollouts.max_staleness=1",)
FLIGHT = ("rollouts.max_staleness=2", "rollouts.weight_updates=in_flight")


def run(*keys: str, name: str = "grpo_smollm2") -> Config:
    return next(iter(load(ROOT / f"configs/{name}.yaml", keys).runs.values()))


@pytest.mark.parametrize(
    ("keys", "name", "correction"),
    [
        ((), "in turns", "not needed"),
        (("train.streamed=true",), "streamed", "not needed"),
        ((*AHEAD, "algorithm.correction=none"), "pipelined, 1 ahead", "none"),
        ((*FLIGHT, "algorithm.correction=none"), "in flight, 2 ahead", "none"),
        (
            (*FLIGHT, "algorithm.correction.mode=bypass", "rollouts.batch_order=completion"),
            "in flight, 2 ahead, by completion",
            "mode bypass",
        ),
        (("rollouts.oversample=1.5", "rollouts.carry_over=true", "algorithm.correction=none"), "in turns", "none"),
        ((*AHEAD, "algorithm.correction.preset=token_tis"), "pipelined, 1 ahead", "preset token_tis, mode decoupled"),
    ],
)
def test_the_schedule_and_the_correction_of_a_run(keys: tuple[str, ...], name: str, correction: str) -> None:
    config = run(*keys)
    assert str(schedule_of(config)) == name
    assert correction_in_force(config, config.rollouts) == correction


def test_an_algorithm_without_a_correction_says_so() -> None:
    config = run(*AHEAD, name="online_dpo_smollm2")
    assert correction_in_force(config, config.rollouts) == "none: online_dpo has no correction"


def test_the_schedules_of_a_bound_have_the_runs_order() -> None:
    config = run(*FLIGHT, "algorithm.correction=none", "rollouts.batch_order=completion")
    names = [str(one) for one in schedules(config, [0, 2])]
    assert names == ["in turns", "streamed", "pipelined, 2 ahead", "in flight, 2 ahead, by completion"]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("grpo_smollm2", ("cluster.device=cuda", "cluster.roles.rollout.colocate_with=policy")),
        ("online_dpo_smollm2", ()),
    ],
)
def test_a_run_that_cannot_be_streamed_has_no_such_schedule(name: str, keys: tuple[str, ...]) -> None:
    assert [str(one) for one in schedules(run(*keys, name=name), [0])] == ["in turns"]
