"""The sweep as W&B is told of it, up to what is sent, and the run that its agent's words make. No server."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

import rlhf
from rlhf.cli import main
from rlhf.config.files.load import LoadedConfig
from rlhf.config.schema.sweep import load_sweep
from rlhf.errors import UserError
from rlhf.sweeps.wandb_sweep import create, sweep_configuration
from tests.unit.test_config_schema_sweep import write_sweep

PARAMETERS: dict[str, Any] = {
    "train.lr": {"min": 1e-4, "max": 1e-2, "scale": "log"},
    "train.weight_decay": {"min": 0.0, "max": 0.5},
    "train.warmup_steps": {"min": 0, "max": 4, "integer": True},
    "train.grad_clip": {"min": 0.5, "max": 2.0, "step": 0.5},
    "data.shuffle": {"values": [True, False]},
}


def online(folder: Path, **changes: Any) -> Any:
    return load_sweep(write_sweep(folder, **{"parameters": PARAMETERS, **changes}), ["tracking.wandb=online"])


def test_what_is_sent_to_the_server(tmp_path: Path) -> None:
    """Through W&B's own client, whose checks it passes, up to the request."""
    from wandb.apis.public.sweeps import _upsert_sweep

    asha = {"name": "asha", "trials": 20, "grace_steps": 2, "reduction_factor": 3}
    made = sweep_configuration(online(tmp_path, method=asha), ["sweep.yaml", "tracking.wandb=online"])
    sent: dict[str, Any] = {}

    def execute(query: str, variables: dict[str, Any]) -> dict[str, Any]:
        sent.update(variables)
        return {"upsertSweep": {"sweep": {"name": "abc123"}, "configValidationWarnings": []}}

    api: Any = SimpleNamespace(
        settings={"entity": "me", "project": "rlhf"}, _service_api=SimpleNamespace(execute_graphql=execute)
    )
    _upsert_sweep(api, made)
    assert (sent["entityName"], sent["projectName"]) == ("me", "rlhf")
    assert yaml.safe_load(sent["config"]) == {
        "name": "rates",
        "method": "random",
        "metric": {"name": "eval/heldout/loss", "goal": "minimize"},
        "parameters": {
            "train.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
            "train.weight_decay": {"distribution": "uniform", "min": 0.0, "max": 0.5},
            "train.warmup_steps": {"distribution": "int_uniform", "min": 0, "max": 4},
            "train.grad_clip": {"distribution": "q_uniform", "min": 0.5, "max": 2.0, "q": 0.5},
            "data.shuffle": {"values": [True, False]},
        },
        "command": ["${env}", "rlhf", "sweep", "sweep.yaml", "tracking.wandb=online", "--trial", "${args_no_hyphens}"],
        "run_cap": 20,
        "early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 3, "strict": True},
    }


def test_it_is_made_where_its_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    asked: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "sweep", lambda made, **given: asked.update(given) or "abc123")
    words = ["tracking.wandb=online", "tracking.wandb_entity=team", "tracking.wandb_project=ours"]
    sweep = load_sweep(write_sweep(tmp_path, parameters=PARAMETERS), words)
    assert create(sweep, words) == "team/ours/abc123"
    assert asked == {"entity": "team", "project": "ours"}


def test_the_words_of_an_agent_make_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    launched: list[LoadedConfig] = []
    module = ModuleType("actors.run.train")
    module.__dict__["launch"] = lambda loaded, start: launched.append(loaded)
    monkeypatch.setitem(sys.modules, "actors.run.train", module)
    monkeypatch.setenv("WANDB_RUN_ID", "x7k2")
    file = write_sweep(tmp_path, parameters=PARAMETERS)
    chosen = {"train.lr": 0.00025, "train.weight_decay": 0.1, "train.warmup_steps": 3, "train.grad_clip": 1.5}
    args = {key: {"value": value} for key, value in {**chosen, "data.shuffle": False}.items()}
    words = create_sweep_command_args({"args": args})["args_no_hyphens"]
    assert main(["sweep", str(file), "tracking.wandb=online", "--trial", *words]) == 0
    (run,) = launched[0].runs.values()
    assert (run.train.lr, run.train.warmup_steps, run.train.grad_clip, run.data.shuffle) == (0.00025, 3, 1.5, False)
    assert (run.run.name, run.tracking.wandb, run.tracking.wandb_group) == ("x7k2", "online", "rates")
    made = ["sweep.parameters={train.steps: {values: [9, 12]}}", "tracking.wandb=online"]
    assert main(["sweep", str(file), *made, "--trial", "train.steps=12"]) == 0
    (run,) = launched[1].runs.values()
    assert run.train.steps == 12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method": {"name": "pbt", "trials": 4, "every": 2}, "parameters": {"train.lr": PARAMETERS["train.lr"]}},
            "W&B has no pbt",
        ),
        ({"parameters": {"train.best_metric": {"values": [None]}}}, "train.best_metric: W&B cannot pass None"),
        ({"method": {"name": "asha", "trials": 4, "grace_steps": 2, "reduction_factor": 2.5}}, "takes whole numbers"),
    ],
)
def test_what_wandb_cannot_do_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sweep_configuration(online(tmp_path, **changes), [])


def test_no_secret_is_sent(tmp_path: Path) -> None:
    words = ["sweep.yaml", "run.mirror=https://me:secret@store/runs"]
    with pytest.raises(UserError, match=r"--wandb: argument run\.mirror holds a secret"):
        sweep_configuration(online(tmp_path), words)


def test_a_run_that_is_not_told_to_wandb_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(write_sweep(tmp_path)), "--wandb"]) == 2
    assert "set tracking.wandb=online" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"set tracking\.wandb=online"):
        rlhf.make_wandb_sweep(write_sweep(tmp_path))


def test_the_calls_ask_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("wandb.login", lambda prompt: True)
    monkeypatch.setattr("wandb.sweep", lambda made, **where: asked.append((made["command"], where)) or "abc123")
    monkeypatch.setattr("wandb.agent", lambda identity, count: asked.append((identity, count)))
    monkeypatch.setattr("wandb.Api", lambda: SimpleNamespace(default_entity="me"))
    file = write_sweep(tmp_path)
    identity = rlhf.make_wandb_sweep(file, ["tracking.wandb=online"])
    assert identity == "me/rlhf/abc123"
    rlhf.run_wandb_agent(identity, count=3)
    words = ["sweep", str(file), "tracking.wandb=online", "--trial", "${args_no_hyphens}"]
    where = {"entity": None, "project": "rlhf"}
    assert asked == [(["${env}", "rlhf", *words], where), (identity, 3)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--count", "3"], "--count has no effect"),
        (["--retry-failed"], "no effect without --resume"),
        (["--resume", "auto", "--wandb"], "--resume has no effect with --wandb"),
        (["--resume", "auto", "--agent", "me/ours/x"], "--resume has no effect with"),
        (["--agent", "me/ours/x", "train.steps=3"], "train.steps=3 has no effect with --agent"),
    ],
)
def test_options_without_effect_are_refused(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(write_sweep(tmp_path)), *words]) == 2
    assert said in capsys.readouterr().err
