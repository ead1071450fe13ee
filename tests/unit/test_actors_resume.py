"""A run refuses foreign checkpoints and results before Ray starts. A pipeline writes to the pipeline's folder."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
import yaml

from actors.run import train as module
from actors.run.train import launch
from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.load import LoadedConfig, load
from rlhf.config.schema.root import Config
from rlhf.controller.loop import trained_models
from rlhf.errors import UserError
from rlhf.exporting import export_checkpoint
from rlhf.models.files.loading import architecture_fingerprint, load_model_config
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.preflight.inputs import StageInputs, load_inputs
from rlhf.preflight.models import refuse_other_model, with_sources
from rlhf.preflight.run_folder import check_folders, stream_of
from rlhf.preflight.start import Start
from rlhf.process.stopping import StopRequest
from rlhf.tracking.run_folder.folder import RunFolder, pointed
from rlhf.tracking.sinks.tracker import Tracker

RUN = """
run: {name: demo, dir: %s}
policy: {model: tiny:llama, dtype: float32}
critic: {model: tiny:llama, dtype: float32}
algorithm: {name: ppo}
data: {train: {task: running_totals, size: 8}, max_prompt_tokens: 64}
rollouts: {prompts_per_step: 2, samples_per_prompt: 2, max_new_tokens: 4}
rewards: {correct: {function: exact_match}}
train: {steps: 2, lr: 1.0e-3, sequences_per_update: 4, max_tokens_per_microbatch: 256}
"""


DROPPED = "dropped"


def loaded(folder: Path, *overrides: str) -> LoadedConfig:
    path = folder / "run.yaml"
    path.write_text(RUN % folder)
    return load(path, overrides)


def local(folder: Path, *overrides: str) -> Config:
    """Return the configuration with loadable models, in the form for the controller."""
    run = loaded(folder, *overrides)
    return with_sources(run.runs["demo"], run.folder)


def state_of(config: Config) -> Any:
    """Return the description of the models in checkpoints."""
    policy = architecture_fingerprint(load_model_config(config.policy.model))
    return json.loads(json.dumps({"policy": policy, "algorithm": "ppo", "trained": trained_models(config)}))


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ([], ["policy.lora={rank: 8}"], "policy.lora is null there and a mapping here"),
        ([], ["policy.dtype=bfloat16"], "policy.dtype is 'float32' there and 'bfloat16' here"),
        ([], ["critic.lora={rank: 8}"], "critic.lora is null there and a mapping here"),
        ([], ["critic.model=MODEL"], "critic.model is '<run>/models/"),
        ([], ["policy.model=MODEL"], "policy.model is '<run>/models/"),  # of the same architecture
        (["policy.lora={rank: 8}"], ["policy.lora={rank: 4}"], "policy.lora.rank is 8 there and 4 here. Resume"),
    ],
)
def test_a_checkpoint_of_other_models(
    tmp_path: Path, tiny_model: Path, there: list[str], here: list[str], message: str
) -> None:
    state = state_of(local(tmp_path, *there))
    other = local(tmp_path, *(text.replace("MODEL", str(tiny_model)) for text in here))
    with pytest.raises(UserError) as caught:
        refuse_other_model(other, state, checkpoint=Path("step_000001"))
    assert str(caught.value).startswith("step_000001 cannot be continued by this run: ")
    assert message in str(caught.value)


def test_a_checkpoint_may_be_moved_trained_otherwise_and_continued_by_other_ranks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    state = state_of(local(tmp_path, "policy.lora={rank: 8}"))
    shutil.move(tmp_path / "demo", tmp_path / "moved" / "demo")
    hyper = ["train.lr=1.0e-4", "policy.lora={rank: 8, dropout: 0.1}", "policy.gradient_checkpointing=true"]
    refuse_other_model(local(tmp_path / "moved", *hyper), state, checkpoint=Path("step_000001"))
    assert not caplog.messages
    changes = ["cluster.roles.policy={workers: 2, zero_stage: 3}", "cluster.roles.critic.workers=2"]
    refuse_other_model(local(tmp_path / "moved", *hyper, *changes), state, checkpoint=Path("step_000001"))
    assert caplog.messages == [
        "the state of step_000001 is divided anew: cluster.roles.policy.workers is 1 there and 2 here; "
        "cluster.roles.policy.zero_stage is 2 there and 3 here; cluster.roles.critic.workers is 1 there and 2 here"
    ]


def test_a_finished_run_is_done_with_its_own_settings_alone(tmp_path: Path) -> None:
    run = loaded(tmp_path)
    (run.folder / "final").mkdir(parents=True)
    (run.folder / "config.resolved.yaml").write_text(dump_yaml(run))
    launch(run, Start(resume=True))
    launch(loaded(tmp_path, "tracking.wandb=offline", "train.checkpoint_every=1"), Start(resume=True))
    with pytest.raises(UserError) as caught:
        launch(loaded(tmp_path, "train.steps=500"), Start(resume=True))
    assert f"{run.folder} is finished, with other settings: train.steps is 2 there and 500 here." in str(caught.value)
    assert "Choose another run.name" in str(caught.value)


def with_checkpoints(folder: Path, *steps: int, **changes: Any) -> LoadedConfig:
    run = loaded(folder)
    with run.located():
        (inputs,) = load_inputs(run)
    assert isinstance(inputs, StageInputs)
    state = state_of(local(folder)) | {"cursor": asdict(stream_of(inputs).state()), "ahead": [], "step": 1} | changes
    text = json.dumps({key: value for key, value in state.items() if value != DROPPED})
    with RunFolder.open(folder, "demo", resume=True) as opened:
        for step in steps:
            Tracker(opened.path).log(step, {"update/lr": 1.0})
            (opened.begin_checkpoint(step) / "controller.json").write_text(text)
            opened.seal(opened.checkpoint(step), step=step)
            opened.commit_checkpoint(step)
    return run


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"cursor": {"x": 1}}, "'x'"),
        ({"cursor": None}, "NoneType"),
        ({"policy": DROPPED}, "no 'policy'"),
        ({"trained": DROPPED}, "no 'trained'"),
        ({"ahead": DROPPED}, "no 'ahead'"),
    ],
)
def test_a_state_that_another_version_wrote_is_named(tmp_path: Path, changes: dict[str, Any], missing: str) -> None:
    run = with_checkpoints(tmp_path, 1, **changes)
    with pytest.raises(UserError, match=rf"step_000001 was written by another version of this program: .*{missing}"):
        launch(run, Start(resume=True))


def test_a_damaged_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    run = with_checkpoints(tmp_path, 1, 2)
    path = tmp_path / "demo" / "checkpoints" / "step_000002" / "controller.json"
    path.write_text(path.read_text().replace("ppo", "ppp"))
    with pytest.raises(UserError, match=rf"{path} is damaged: .*before this one with --resume step_000001\."):
        launch(run, Start(resume=True))
    with pytest.raises(UserError, match=rf"{path} is damaged"):
        launch(run, Start(resume=True, from_step=2))
    with pytest.raises(UserError, match=r"no checkpoint step_000003\. Its checkpoints: step_000001, step_000002\."):
        launch(run, Start(resume=True, from_step=3))
    check_folders(run.stages.values(), Start(resume=True, from_step=1))


def latest_of(folder: Path) -> int | None:
    return pointed(folder / "demo" / "checkpoints" / "latest")


@pytest.mark.parametrize("failing", ["load_inputs", "connected"])
def test_a_start_that_fails_selects_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    monkeypatch.setattr(f"actors.run.train.{failing}", Mock(side_effect=UserError("of another cause")))
    with pytest.raises(UserError, match="of another cause"):
        launch(with_checkpoints(tmp_path, 1, 2), Start(resume=True, from_step=1))
    assert latest_of(tmp_path) == 2


def test_a_run_begins_from_the_named_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selected = []

    async def run_stage(*_: object, **__: object) -> None:
        selected.append(latest_of(tmp_path))

    monkeypatch.setattr("actors.run.train.connected", lambda _: nullcontext())
    monkeypatch.setattr("actors.run.train._run_stage", run_stage)
    with_checkpoints(tmp_path, 1, 2)
    run = loaded(tmp_path, "train.steps=1")  # the newest checkpoint is of a later step than the last
    launch(run, Start(resume=True, from_step=1))
    assert selected == [1]


def test_an_export_checks_every_byte_and_runs_no_code_unasked(tmp_path: Path) -> None:
    run, resolved = with_checkpoints(tmp_path, 1), tmp_path / "demo" / "config.resolved.yaml"

    def refusal(*, trust_remote_code: bool = False) -> str:
        options: dict[str, Any] = {"step": None, "folder": tmp_path / "out", "merged": False, "push_to_hub": None}
        with pytest.raises(UserError) as error:
            export_checkpoint(tmp_path / "demo", **options, trust_remote_code=trust_remote_code)
        return str(error.value)

    resolved.write_text(dump_yaml(run).replace("trust_remote_code: false", "trust_remote_code: true"))
    assert re.search(r"policy\.trust_remote_code is true.*Repeat it with --trust-remote-code", refusal())
    code = tmp_path / "demo" / "theirs.py"
    code.write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    resolved.write_text(dump_yaml(run).replace("name: ppo", "name: theirs.py:Theirs"))
    assert "algorithm.name is theirs.py:Theirs, so the export would run the code of this file. Repeat it" in refusal()
    assert not (tmp_path / "ran").exists()
    assert "theirs.py defines no `Theirs`" in refusal(trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    resolved.write_text(dump_yaml(run))
    path = tmp_path / "demo" / "checkpoints" / "step_000001" / "controller.json"
    path.write_text(path.read_text().replace("ppo", "ppp"))
    assert re.search(rf"{path} is damaged.*name another step with --step", refusal())


def test_a_finished_run_does_not_go_back_and_a_run_stops_only_at_a_step_of_its_own(tmp_path: Path) -> None:
    for step in (0, 3):
        with pytest.raises(UserError, match=rf"--until: is {step}, and the run has the steps 1 to 2"):
            launch(loaded(tmp_path), Start(resume=False, until=step))
    run = with_checkpoints(tmp_path, 1)
    (tmp_path / "demo" / "final").mkdir()
    (tmp_path / "demo" / "config.resolved.yaml").write_text(dump_yaml(run))
    with pytest.raises(UserError, match=r"--resume: is step_000001, but the run is finished"):
        launch(run, Start(resume=True, from_step=1))


def test_a_pipeline_s_file_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    build_tiny_llama(tmp_path / "a-long-secret", seed=1)
    monkeypatch.setenv("STORE_TOKEN", "a-long-secret")
    monkeypatch.setattr("rlhf.tracking.logs.configure", lambda: None)  # it is for a whole process
    models = {"a": {"model": str(tiny_model)}, "b": {"model": str(tmp_path / "a-long-secret")}}
    mean = {"mean": {"merge": {"method": "linear", "models": models}}}
    (tmp_path / "soup.yaml").write_text(yaml.safe_dump({"run": {"name": "soup", "dir": str(tmp_path)}, "stages": mean}))
    launch(load(tmp_path / "soup.yaml"), Start(resume=False, mode="quiet"))
    assert (tmp_path / "soup/mean/final/model.safetensors").exists()
    said = (tmp_path / "soup/config.resolved.yaml").read_text()
    assert str(tiny_model) in said
    assert "a-long-secret" not in said


@pytest.mark.parametrize(("node", "is_watched"), [("head", True), ("worker", True), ("other", False)])
def test_a_drain_of_the_driver_s_node_is_noticed_too(
    monkeypatch: pytest.MonkeyPatch, node: str, is_watched: bool
) -> None:
    async def look(*_: Any, draining_node: Any, **__: Any) -> bool:
        assert await draining_node() == ((node, 5.0) if is_watched else None)
        return False

    monkeypatch.setattr(module, "run_loop", look)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "head"))
    monkeypatch.setattr("ray._private.state.state", SimpleNamespace(get_draining_nodes=lambda: {node: 5000}))
    limits = SimpleNamespace(train=SimpleNamespace(preemption_grace_s=1.0), cluster=SimpleNamespace(call_timeout_s=1.0))
    supervisor = SimpleNamespace(continue_after=lambda _: None)
    controller: Any = SimpleNamespace(config=limits, run=lambda until: None, notice=None, supervisor=supervisor)
    asyncio.run(module._carry_out(controller, StopRequest(), step=None, until=None, nodes=lambda: {"worker"}))
