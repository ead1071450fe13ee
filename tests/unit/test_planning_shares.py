"""Trials of a sweep divide a machine, and some keys make a trial fit into a share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import actors.sweeps.runner
from actors.sweeps.runner import run_sweep
from rlhf.config.files.sweep import Sweep, load_sweep
from rlhf.errors import UserError
from rlhf.planning.shares import Division, Machine, divide
from rlhf.sweeps.space import known_trials
from tests.fixtures.sweeps import RUN, write_sweep

GRPO: dict[str, Any] = {
    **RUN,
    "algorithm": {"name": "grpo"},
    "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 16},
    "rewards": {"right": {"function": "running_totals"}},
}
TWO_CORES = Machine(cores=2, cpus=2, gpus=0)


def grpo_sweep(folder: Path, **changes: Any) -> Sweep:
    return load_sweep(write_sweep(folder, config=GRPO, metric="rewards/score/mean", **changes))


def divided(sweep: Sweep, machine: Machine) -> Division:
    return divide(sweep, known_trials(sweep), machine)


def test_a_trial_larger_than_its_share_is_refused_with_the_keys_that_solve_it(tmp_path: Path) -> None:
    # A trial reserves 2 CPUs: 1 for the policy and 1 for the engine. Two trials on two cores have one core each.
    problem = divided(grpo_sweep(tmp_path, concurrency=2), TWO_CORES).problem
    assert problem == (
        "a trial reserves 2 CPUs, and the share of a trial is 1 of 2 with 2 at once. To run the sweep, set "
        "sweep.concurrency=1, or reserve less for each role with cluster.roles.policy.cpus=0.5 "
        "cluster.roles.rollout.cpus=0.5."
    )
    cured = grpo_sweep(
        tmp_path, concurrency=2, set={"cluster.roles.policy.cpus": 0.5, "cluster.roles.rollout.cpus": 0.5}
    )
    assert divided(cured, TWO_CORES) == Division(count=2, room=2, gpus=0, problem=None)
    assert divided(grpo_sweep(tmp_path, concurrency=1), TWO_CORES).problem is None
    assert divided(grpo_sweep(tmp_path), TWO_CORES) == Division(count=1, room=1, gpus=0, problem=None)


def test_as_many_trials_run_at_once_as_fit_into_equal_shares(tmp_path: Path) -> None:
    # 2.5 CPUs each: two trials fit into 5 CPUs, but a share has whole cores, and half of 5 is 2.
    sweep = grpo_sweep(tmp_path, set={"cluster.roles.policy.cpus": 1.5})
    assert divided(sweep, Machine(cores=5, cpus=5, gpus=0)) == Division(count=1, room=1, gpus=0, problem=None)
    assert divided(sweep, Machine(cores=6, cpus=6, gpus=0)).count == 2
    problem = divided(grpo_sweep(tmp_path, set={"cluster.roles.policy.cpus": 3}), TWO_CORES).problem
    assert "To run the sweep, reserve less for each role with cluster.roles.policy.cpus=1 " in problem  # 3 * 2 / 4
    assert "concurrency=" not in problem


def test_more_trials_than_the_gpus_hold_are_refused_with_the_number_that_they_hold(tmp_path: Path) -> None:
    # A trial has one GPU for the policy and one for the engine.
    machine = Machine(cores=16, cpus=16, gpus=2)
    sweep = grpo_sweep(tmp_path, concurrency=2, set={"cluster.device": "cuda"})
    assert divided(sweep, machine).problem == (
        "a trial reserves 2 GPUs, and there are 2 for 2 at once. To run the sweep, set sweep.concurrency=1, or use a "
        "machine with more GPUs."
    )
    alone = divided(grpo_sweep(tmp_path, set={"cluster.device": "cuda"}), Machine(cores=16, cpus=16, gpus=1))
    assert alone.problem == (
        "a trial reserves 2 GPUs, and there are 1 for 1 at once. To run the sweep, use a machine with more GPUs."
    )


def test_stages_of_a_pipeline_get_keys_of_their_own(tmp_path: Path) -> None:
    shared = {key: GRPO[key] for key in ("policy", "data", "train")}
    second = {key: value for key, value in GRPO.items() if key not in {*shared, "run"}}
    config = {"run": {"name": "both"}, **shared, "stages": {"first": {"algorithm": RUN["algorithm"]}, "second": second}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def problem(parameter: str, values: list[float]) -> str:
        parameters = {parameter: {"values": values}}
        sweep = write_sweep(tmp_path, config="pipeline.yaml", concurrency=2, parameters=parameters)
        return str(divided(load_sweep(sweep), TWO_CORES).problem)

    text = problem("train.lr", [1e-4, 1e-3])
    assert "stages.second.cluster.roles.policy.cpus=0.5 stages.second.cluster.roles.rollout.cpus=0.5" in text
    assert "stages.first" not in text
    # the sweep itself sets this key
    assert "policy.cpus=" not in problem("stages.second.cluster.roles.policy.cpus", [1, 2])


def test_the_sweep_says_so_before_a_trial_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a trial was started")

    monkeypatch.setattr(actors.sweeps.runner, "TrialProcess", started)
    monkeypatch.setattr("rlhf.tracking.logs.configure", lambda level: None)
    sweep = grpo_sweep(tmp_path, set={"cluster.roles.policy.cpus": 1000})
    with pytest.raises(UserError, match=r"sweep.yaml: sweep.concurrency: a trial reserves 1001 CPUs"):
        run_sweep(sweep, resume=False, quiet=True)
