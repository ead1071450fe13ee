"""What `rlhf plan` says of a sweep, before any trial starts."""

from __future__ import annotations

from pathlib import Path

import pytest

import rlhf
from rlhf.cli import main
from rlhf.planning.shares import Machine
from tests.unit.test_config_schema_sweep import write_sweep


def test_a_sweep_is_planned_trial_by_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = {"train.lr": {"values": [1e-3, 1e-4]}, "train.steps": {"min": 10, "max": 12, "integer": True}}
    file = write_sweep(tmp_path, parameters=parameters, method={"name": "grid"})
    assert main(["plan", str(file), "--cluster", "2*cpu=2", "cluster.roles.policy.cpus=2"]) == 0
    said = capsys.readouterr().out
    assert "trials         6 of tiny, grid" in said
    assert "compared by    the last eval/heldout/loss of tiny; lower is better" in said
    assert "train.lr     0.001, 0.0001" in said
    assert "train.steps  10 to 12, integers" in said
    assert "at once        2 fit into 2*cpu=2" in said
    assert "trial-005  train.lr=0.0001, train.steps=12" in said
    assert "trial-000: sft -> " in said
    assert "10 steps: 10 optimizer steps" in said
    assert rlhf.plan(file, ["cluster.roles.policy.cpus=2"], cluster="2*cpu=2") == said.partition("\ninputs: ")[0]


def test_of_many_draws_some_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_sweep(tmp_path, method={"name": "random", "trials": 20}, concurrency=3)
    monkeypatch.setattr("rlhf.planning.trials.divided_machine", lambda gpus: Machine(cores=5, cpus=5, gpus=gpus))
    assert "at once      3 (sweep.concurrency); 5 fit into this machine" in rlhf.plan(file)
    said = rlhf.plan(file, cluster="4*cpu=1")
    assert "at once      3 (sweep.concurrency); 4 fit into 4*cpu=1" in said
    assert "trial-011" in said
    assert "trial-012" not in said
    assert "and 8 more" in said


def test_what_depends_on_results_is_planned_as_the_varied_run(tmp_path: Path) -> None:
    said = rlhf.plan(write_sweep(tmp_path, method={"name": "bayesian", "trials": 15}))
    assert "15 of tiny, bayesian" in said
    assert "trial-000" not in said
    assert "tiny: sft -> " in said
    cuda = rlhf.plan(write_sweep(tmp_path), ["cluster.device=cuda"])
    assert "at once      as many as fit; describe the nodes by --cluster" in cuda


def test_a_sweep_is_not_simulated(tmp_path: Path) -> None:
    with pytest.raises(rlhf.UserError, match="--simulate takes one run"):
        rlhf.plan(write_sweep(tmp_path), simulate="gpus=8")
