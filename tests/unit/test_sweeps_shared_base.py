"""The trials of a sweep may share one base model. Keys go to the server or to the trials, and others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.config.files.load import load_service_file
from rlhf.config.files.sweep import load_sweep
from rlhf.errors import UserError
from rlhf.sweeps.shared_base import server_config, server_file
from rlhf.sweeps.space import known_trials
from tests.fixtures.sweeps import RUN, write_sweep
from tests.integration.recipes import merge

ADAPTED = merge(
    RUN,
    {
        "policy": {"lora": {"rank": 4}, "gradient_checkpointing": True},
        "train": {"max_tokens_per_microbatch": 512},
        "cluster": {"roles": {"policy": {"cpus": 0.5, "zero_stage": 3}}, "start_timeout_s": 77.0},
    },
)
SERVED = merge(RUN, {"policy": {"lora": {}, "tinker": "http://host:1"}})
RANKS = {"policy.lora.rank": {"values": [4, 16, 2]}, "run.seed": {"values": [1, 2]}}


def shared(folder: Path, run: Any = ADAPTED, **changes: Any) -> Path:
    section = {"shared_base": True, "parameters": RANKS, "method": {"name": "grid"}, "config": run}
    return write_sweep(folder, **(section | changes))


def test_the_server_gets_the_model_and_a_trial_gets_the_rest(tmp_path: Path) -> None:
    sweep = load_sweep(shared(tmp_path))
    server = server_config(sweep, at_once=3)
    assert (server.run.dir, server.run.name) == (tmp_path / "rates", "server")
    assert server.policy.lora.rank == 16
    assert server.policy.gradient_checkpointing
    assert (server.policy.model, server.policy.dtype) == ("tiny:llama", "float32")
    assert (server.service.max_length, server.service.max_adapters) == (512, 6)
    assert (server.cluster.roles.policy.zero_stage, server.cluster.start_timeout_s) == (3, 77.0)
    (tmp_path / "server.yaml").write_text(server_file(server), encoding="utf-8")
    assert load_service_file(tmp_path / "server.yaml") == server
    (trial,) = sweep.trial({"policy.lora.rank": 2, "run.seed": 1}, "trial-000").runs.values()
    assert trial.policy.lora is not None
    assert (trial.policy.lora.rank, trial.run.seed, trial.policy.tinker) == (2, 1, sweep.server)
    assert not trial.policy.gradient_checkpointing
    assert (trial.cluster.roles.policy.zero_stage, trial.cluster.roles.policy.cpus) == (2, 0.5)
    (best,) = sweep.best({"policy.lora.rank": 2, "run.seed": 1}).runs.values()
    assert (best.policy.tinker, best.cluster.roles.policy.zero_stage) == (None, 3)


@pytest.mark.parametrize(
    ("run", "changes", "text"),
    [
        (
            RUN,
            {"parameters": {"run.seed": {"values": [1]}}},
            "shared_base: is true, but the run has no policy.lora",
        ),
        (SERVED, {}, "shared_base: is true, but the run has a server already"),
        (ADAPTED, {"parameters": {"policy.dtype": {"values": ["float32"]}}}, "policy.dtype: is the same in all trials"),
        (ADAPTED, {"parameters": {"cluster.roles.policy.cpus": {"values": [1]}}}, "is the same in all trials"),
        (ADAPTED, {"parameters": {"policy.lora.alpha": {"values": [8.0]}}}, "of sweep.shared_base: .*lora.alpha: is 8"),
    ],
)
def test_trials_that_differ_in_the_base_are_refused(
    tmp_path: Path, run: Any, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        known_trials(load_sweep(shared(tmp_path, run, **changes)))


def test_a_pipeline_has_no_shared_base(tmp_path: Path) -> None:
    stage = {section: ADAPTED[section] for section in ("algorithm", "data", "train", "policy", "eval")}
    stage |= {"policy": {**stage["policy"], "gradient_checkpointing": False}}
    pipeline = {"run": RUN["run"], "stages": {"first": stage}}
    with pytest.raises(UserError, match=r"sweep\.shared_base: is true, but sweep\.config is a pipeline"):
        load_sweep(shared(tmp_path, pipeline, parameters={"stages.first.train.lr": {"values": [1e-3]}}))


def test_keys_of_a_run_that_no_server_has_are_refused(tmp_path: Path) -> None:
    run = merge(ADAPTED, {"cluster": {"roles": {"policy": {"zero_stage": 2}}}})
    with pytest.raises(UserError, match=r"sweep\.config: cluster\.roles\.policy\.zero_stage: is 2, but"):
        server_config(load_sweep(shared(tmp_path, run)), at_once=1)


def test_a_server_has_its_own_defaults(tmp_path: Path) -> None:
    run = merge(RUN, {"policy": {"lora": {"rank": 4}}})
    file = tmp_path / "server.yaml"
    file.write_text(server_file(server_config(load_sweep(shared(tmp_path, run)), at_once=1)), encoding="utf-8")
    assert load_service_file(file).policy.lora.rank == 16
