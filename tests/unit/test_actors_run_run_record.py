"""A run's record begins, ends and resumes: W&B groups, mirrors, full disks, foreign checkpoints, engines that stay."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import shutil
import signal
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import ray
import yaml
from ray.exceptions import ObjectStoreFullError

from actors.cluster.waiting import put
from actors.run import train as module
from actors.run.engine_pool import EngineLease, engines_key
from actors.run.run_record import recording
from actors.run.train import launch
from rlhf.cli import main
from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.load import LoadedConfig, load
from rlhf.config.schema.cluster import ClusterConfig, Roles, RolloutResources
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage
from rlhf.controller.loop import trained_models
from rlhf.errors import Preempted, RunError, StorageFull, UserError
from rlhf.exporting import export_checkpoint
from rlhf.models.files.loading import architecture_fingerprint, load_model_config
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.preflight.inputs import StageInputs, load_inputs
from rlhf.preflight.models import refuse_other_model, with_sources
from rlhf.preflight.run_folder import check_folders, meet_mirror, stream_of
from rlhf.preflight.start import Start
from rlhf.process.disk_full import PAUSE
from rlhf.process.stopping import StopRequest
from rlhf.tracking.run_folder.folder import RunFolder, pointed
from rlhf.tracking.sinks.tracker import Tracker
from tests.integration.recipes import write_config

PIPELINE = """\
run: {name: demo, dir: DIR}
tracking: {wandb: offline}
stages:
  a: {policy: {model: x}, algorithm: {name: sft}, data: {train: a.jsonl},
      train: {steps: 2, lr: 1e-3, sequences_per_update: 32}}
  soup: {merge: {method: linear, models: {a: {model: "stage:a"}, b: {model: b}}}}
  judge: {evaluate: {model: "stage:soup", data: held.jsonl}}
"""


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Requests to W&B."""
    found: list[dict[str, Any]] = []

    class Backend:
        name = "W&B"

        def log(self, step: Any) -> None: ...
        def alert(self, *told: str) -> None: ...
        def close(self, *, failed: bool) -> None: ...

    def open_wandb(folder: Path, **asked: Any) -> Backend:
        found.append(asked)
        return Backend()

    monkeypatch.setattr("actors.run.run_record.open_wandb", open_wandb)
    return found


def stages(folder: Path, *, wandb: str = "offline") -> list[Any]:
    folder.mkdir(exist_ok=True)
    path = folder / "p.yaml"
    path.write_text(PIPELINE.replace("DIR", str(folder)).replace("wandb: offline", f"wandb: {wandb}"))
    return list(load(path).stages.values())


def test_the_stages_of_a_pipeline_are_one_group(tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    for stage in stages(tmp_path):
        with recording(stage, resume=False) as (record, step):
            assert step is None
            assert record.folder.path == tmp_path / stage.run.name
        again = load(tmp_path / stage.run.name / "config.resolved.yaml")
        assert list(again.stages.values()) == [stage]
        if isinstance(stage, MergeStage):
            assert opened[-1]["name"] == "demo/a"  # a merge has no metrics to send
    groups = [(asked["name"], asked["group"], asked["job_type"]) for asked in opened]
    assert groups == [("demo/a", "demo", "sft"), ("demo/judge", "demo", "evaluation")]
    for stage in stages(tmp_path / "sweep", wandb="offline, wandb_group: lr"):  # as a sweep names its group
        with recording(stage, resume=False):
            pass
    assert [asked["group"] for asked in opened[2:]] == ["lr", "lr"]


def checkpoint(folder: RunFolder, step: int = 1) -> None:
    (folder.begin_checkpoint(step) / "file").touch()
    folder.seal(folder.checkpoint(step), step=step)
    folder.commit_checkpoint(step)


@pytest.mark.parametrize(("has_checkpoint", "code"), [(True, 75), (False, 1)])
def test_a_full_object_store_ends_the_command_with_75_and_the_remedy_if_the_run_can_be_continued(
    tmp_path: Path,
    opened: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_checkpoint: bool,
    code: int,
) -> None:
    def launch(loaded: LoadedConfig, _: Start) -> None:
        with recording(stage := next(iter(loaded.stages.values())), resume=False) as (record, _step):
            assert stage.cluster.room_timeout_s == PAUSE.limit_s
            if has_checkpoint:
                checkpoint(record.folder)
            put("the data")

    monkeypatch.setattr("actors.run.train.launch", launch)
    monkeypatch.setattr("ray.put", Mock(side_effect=ObjectStoreFullError("no room for 8 MiB")))
    folder = tmp_path / stages(tmp_path)[0].run.name
    assert main(["train", str(tmp_path / "p.yaml"), "--quiet"]) == code
    assert PAUSE.limit_s == 0.0
    (error,) = map(json.loads, (folder / "errors.jsonl").read_text().splitlines())
    assert error["kind"] == "StorageFull"
    said = capsys.readouterr().err
    assert "Make room on this disk, or raise cluster.object_store_gib." in said
    assert ("\nrlhf: preempted: " in said) == has_checkpoint


@pytest.mark.parametrize(("has_checkpoint", "kind"), [(True, Preempted), (False, StorageFull)])
def test_a_resumed_run_without_room_for_its_start_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_checkpoint: bool, kind: type[Exception]
) -> None:
    stage = mirrored(tmp_path)
    with RunFolder.open(stage.run.dir, stage.run.name, resume=False) as folder:
        if has_checkpoint:
            checkpoint(folder)
    monkeypatch.setattr("actors.run.run_record.write_atomic", Mock(side_effect=StorageFull("no room")))
    with pytest.raises(kind, match="no room"), recording(stage, resume=True):
        pytest.fail("it began")


@pytest.mark.parametrize(("number", "is_final"), [(None, True), (signal.SIGTERM, False)])
def test_a_run_that_the_cluster_has_no_room_for_is_not_started_again_by_its_parent(
    tmp_path: Path,
    opened: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals | None,
    is_final: bool,
) -> None:
    facts, request = dict[str, Any](), StopRequest()
    request.signal = number
    monkeypatch.setattr("actors.run.run_record.tell_parent", facts.update)
    monkeypatch.setattr("actors.run.run_record.current_request", lambda: request)
    with pytest.raises(Preempted), recording(stages(tmp_path)[0], resume=False):
        raise Preempted("no other node")
    assert facts.get("is_final", False) == is_final


def test_a_single_run_has_no_group(tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    stage = mirrored(tmp_path, tracking="{wandb: offline, wandb_tags: [tiny], wandb_entity: team}")
    with pytest.raises(RunError), recording(stage, resume=False) as (record, _):
        raise RunError("it broke")
    assert (opened[0]["group"], opened[0]["tags"], opened[0]["entity"]) == (None, ("tiny",), "team")
    assert opened[0]["config"]["train"]["lr"] == 1e-3
    assert "rollouts" not in opened[0]["config"]  # only keys in effect
    (row,) = (record.folder.path / "errors.jsonl").read_text().splitlines()
    assert json.loads(row)["message"] == "it broke"


def test_a_full_disk_does_not_hide_what_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full, stage = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")), stages(tmp_path, wandb="'off'")[0]
    monkeypatch.setattr("rlhf.tracking.sinks.tracker.write_error", full)
    monkeypatch.setattr("rlhf.tracking.sinks.tracker.Tracker.close", full)
    with pytest.raises(RunError, match="rank 1 died"), recording(stage, resume=False):
        raise RunError("update: policy rank 1 died")
    assert caplog.text.count("could not be written to its folder: [Errno 28]") == 2


RUN = """\
run: {name: demo, dir: DIR/runs, mirror: DIR/mirror}
policy: {model: x}
algorithm: {name: sft}
data: {train: a.jsonl}
train: {steps: 40, lr: 1e-3, sequences_per_update: 32, keep_checkpoints: 1}
"""


def mirrored(tmp_path: Path, parent: str = "runs", *, tracking: str = "{}") -> Any:
    path = tmp_path / "run.yaml"
    text = RUN.replace("DIR/runs", str(tmp_path / parent)).replace("DIR", str(tmp_path))
    path.write_text(f"{text}tracking: {tracking}\n")
    (stage,) = load(path).stages.values()
    return stage


def checkpointed(record: Any, step: int) -> None:
    record.write_row(step, {"update/lr": 1.0})
    checkpoint(record.folder, step)
    asyncio.run(record.prune(1))


def test_a_mirrored_run_goes_on_elsewhere_and_is_not_begun_twice(tmp_path: Path) -> None:
    there = tmp_path / "mirror" / "demo"
    with suppress(RunError), recording(mirrored(tmp_path), resume=False) as (record, _):
        assert (there / "config.resolved.yaml").exists()  # a mirror that cannot be written fails at the start
        for step in (10, 20):
            checkpointed(record, step)
        raise RunError("lost")
    assert json.loads((there / "errors.jsonl").read_text())["message"] == "lost"
    other = mirrored(tmp_path, "other")
    with pytest.raises(UserError, match=r"run\.mirror: .* already holds a run. Continue this run with --resume auto"):
        meet_mirror(other, resume=False)
    meet_mirror(other, resume=True)
    with recording(other, resume=True) as (record, step):
        assert step == 20
        checkpointed(record, 30)
    assert sorted(path.name for path in (there / "checkpoints").glob("step*")) == ["step_000030"]
    assert [json.loads(line)["step"] for line in (there / "metrics.jsonl").read_text().splitlines()] == [10, 20, 30]


def test_a_mirror_that_cannot_be_written_fails_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.tracking.run_folder.mirror._PAUSE_S", 0.001)
    (tmp_path / "mirror").write_text("a file")
    with pytest.raises(RunError, match=r"run\.mirror: "), recording(mirrored(tmp_path), resume=False):
        pytest.fail("it began")


def test_a_result_that_did_not_get_away_follows_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish() -> None:
        with recording(stage, resume=False) as (record, _):
            (record.folder.begin_final() / "model.safetensors").write_text("final")
            record.folder.commit_final()
            monkeypatch.setattr(record.mirror, "_put", Mock(side_effect=PermissionError("expired")))

    stage, there = mirrored(tmp_path), tmp_path / "mirror" / "demo" / "final.json"
    with pytest.raises(RunError, match=r"expired.*--resume auto"):
        finish()
    assert not there.exists()
    meet_mirror(stage, resume=True)
    assert json.loads(there.read_text())["files"]["model.safetensors"]["size"] == 5
    assert (there.parent / "final" / "model.safetensors").read_text() == "final"
    written = there.stat().st_mtime_ns
    meet_mirror(stage, resume=True)
    assert there.stat().st_mtime_ns == written


def test_a_checkpoint_that_did_not_get_away_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.tracking.run_folder.mirror._PAUSE_S", 0.001)
    with recording(mirrored(tmp_path), resume=False) as (record, _):
        whole = record.mirror._put_checkpoint
        record.mirror._put_checkpoint = Mock(side_effect=PermissionError("expired"))
        checkpointed(record, 10)
        record.mirror._call[1].join()
        record.mirror._put_checkpoint = whole
        checkpointed(record, 20)
    (error,) = map(json.loads, (tmp_path / "runs" / "demo" / "errors.jsonl").read_text().splitlines())
    assert (error["stage"], error["kind"]) == ("mirror", "not_uploaded")
    assert "expired" in error["message"]
    assert (tmp_path / "mirror" / "demo" / "checkpoints" / "step_000020" / "manifest.json").exists()


@pytest.fixture
def run(tmp_path: Path) -> Any:
    rewards = {"rewards": {"correct": {"function": "last_number"}}}
    path = write_config(tmp_path / "run.yaml", {"run": {"name": "demo"}, "algorithm": {"name": "grpo"}, **rewards})
    return lambda *overrides: cast(Config, load(path, overrides).stages["demo"])


DIFFERENT = ("policy.lora={rank: 4}", "policy.dtype=bfloat16", "policy.model=x", "cluster.roles.rollout.engines=2")
SAME = ("train.lr=0.5", "run.seed=7", "rollouts.temperature=0.5", "algorithm.clip_low=0.1")


@pytest.mark.parametrize("overrides", [*SAME, *DIFFERENT])
def test_engines_follow_from_their_settings_and_not_from_how_is_trained(run: Any, overrides: str) -> None:
    assert (engines_key(run(overrides), 32, None) == engines_key(run(), 32, None)) == (overrides in SAME)


def test_engines_that_keep_other_things_or_longer_responses_are_others(run: Any) -> None:
    config, game = run(), cast(Any, SimpleNamespace(max_turns=2))
    others = [
        config.model_copy(update={section: getattr(config, section).model_copy(update={key: True})})
        for section, key in (("rollouts", "carry_over"), ("policy", "router_replay"))
    ]
    keys = [engines_key(config, length, world) for length, world in ((32, None), (64, None), (32, game))]
    assert len({*keys, *(engines_key(other, 32, None) for other in others)}) == 5


class Group:
    """A group that records, in a list shared by all groups, the beginning and the end of each start."""

    def __init__(self, role: str, calls: list[str]) -> None:
        self.role, self.calls = role, calls

    async def start(self, *, deadline_s: float) -> None:
        self.calls.append(f"{self.role} begins")
        await asyncio.sleep(0)
        self.calls.append(f"{self.role} ends")

    async def sleep(self, *, keep_weights: bool) -> None:
        self.calls.append(f"{self.role} sleeps")


TOGETHER = ["policy begins", "rollout begins", "policy ends", "rollout ends"]
ENGINES_FIRST = ["rollout begins", "rollout ends", "policy begins", "policy ends"]


@pytest.mark.parametrize(
    ("device", "colocated", "shares_gpus", "is_started", "expected"),
    [
        ("cpu", False, False, False, TOGETHER),
        ("cpu", True, False, False, TOGETHER),
        ("cpu", False, False, True, ["policy begins", "policy ends"]),
        ("cuda", False, False, False, TOGETHER),
        ("cuda", False, True, False, ENGINES_FIRST),
        ("cuda", True, True, False, [*ENGINES_FIRST[:2], "rollout sleeps", *ENGINES_FIRST[2:]]),
    ],
)
def test_no_process_starts_while_an_engine_measures_its_gpu(
    device: Any, colocated: bool, shares_gpus: bool, is_started: bool, expected: list[str]
) -> None:
    calls: list[str] = []
    roles = Roles(rollout=RolloutResources(colocate_with="policy" if colocated else None))
    cluster = ClusterConfig(device=device, roles=roles)
    placement: Any = SimpleNamespace(plan=SimpleNamespace(shares_gpus=lambda role: shares_gpus))
    engines: Any = Group("rollout", calls)
    lease = EngineLease(key="", placement=placement, engines=engines, may_stay=False, is_started=is_started)
    policy: Any = Group("policy", calls)
    asyncio.run(lease.start_with([policy], cluster))
    assert calls == expected


PPO = """
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
    path.write_text(PPO % folder)
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
        "the state of step_000001 is sharded again: cluster.roles.policy.workers is 1 there and 2 here; "
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
        with pytest.raises(UserError, match=rf"--until: is {step}, but the run has only the steps 1 to 2"):
            launch(loaded(tmp_path), Start(resume=False, until=step))
    run = with_checkpoints(tmp_path, 1)
    (tmp_path / "demo" / "final").mkdir()
    (tmp_path / "demo" / "config.resolved.yaml").write_text(dump_yaml(run))
    with pytest.raises(UserError, match=r"--resume: is step_000001, but the run is finished"):
        launch(run, Start(resume=True, from_step=1))


def test_a_pipeline_s_file_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    build_tiny_llama(tmp_path / "a-long-secret", seed=1)
    monkeypatch.setenv("STORE_TOKEN", "a-long-secret")
    monkeypatch.setattr("rlhf.tracking.logs.configure", lambda: None)  # logging is set up for a whole process
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
