"""cluster/slurm/train.sbatch in a real Slurm of three nodes: the run continues after the time limit.

Nodes are network namespaces (tests/hosts.py); Slurm (without systemd), Ray and gloo between the ranks are real. The
first test shows the script's reaction to signals and exit codes in seconds, with programs in place of Ray and rlhf.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from tests.hosts import Host, several_hosts
from tests.integration.recipes import ONLINE, merge, rows, without_clocks, write_config

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
UP_WITHIN_S = 60.0

CONFIG = """\
ClusterName=rlhf
SlurmctldHost={machine}({head})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/linear
MpiDefault=none
ReturnToService=2
KillWait=60
"""  # cred_expire is also the wait of a requeued job


@dataclass(frozen=True, slots=True)
class Slurm:
    """A cluster with the nodes node0, node1, ..."""

    hosts: Sequence[Host]
    folder: Path

    def run(self, *command: str | Path, timeout_s: float = 60.0) -> str:
        """Run a command of Slurm on the first host, and return the output."""
        return self.hosts[0].run(command, {"SLURM_CONF": str(self.folder / "slurm.conf")}, timeout_s=timeout_s)

    def job(self, number: str) -> dict[str, str]:
        """Return Slurm's record of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, holds: Callable[[], bool], *, within_s: float, what: str) -> None:
        """Wait for a condition. A failure has the controller's log."""
        give_up = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > give_up:
                log = (self.folder / "slurmctld.log").read_text(encoding="utf-8", errors="replace")
                raise AssertionError(f"{what}: not in {within_s:g} s\n{log[-3000:]}")
            time.sleep(0.5)


@contextmanager
def slurm(hosts: Sequence[Host]) -> Iterator[Slurm]:
    """Run Slurm for the length of the block. Skips without Slurm. Sockets of job steps need the short folder."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"SLURM NOT TESTED: {', '.join(missing)} missing (apt-get install slurmctld slurmd munge)")
    folder = hosts[0].disk.parent / "slurm"
    folder.mkdir()
    (folder / "state").mkdir()
    lines = [
        f"NodeName=node{i} NodeHostname={socket.gethostname()} NodeAddr={host.address} Port={17000 + i} CPUs=1"
        for i, host in enumerate(hosts)
    ]
    lines.append("PartitionName=all Nodes=ALL Default=YES State=UP")
    config = CONFIG.format(machine=socket.gethostname(), head=hosts[0].address, folder=folder)
    (folder / "slurm.conf").write_text(config + "\n".join(lines) + "\n", encoding="utf-8")
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n", encoding="utf-8")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    names = ("socket", "key-file", "log-file", "pid-file", "seed-file")
    files = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in names]
    munge = subprocess.Popen(["munged", "--force", "--foreground", *files], stderr=subprocess.DEVNULL)
    try:
        conf = ["-D", "-f", folder / "slurm.conf"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        hosts[0].start(["slurmctld", "-c", *conf], **quiet)
        for i, host in enumerate(hosts):
            (folder / f"spool-node{i}").mkdir()
            host.start(["slurmd", *conf, "-N", f"node{i}"], **quiet)
        found = Slurm(hosts, folder)
        found.until(lambda: _idle(found) == len(hosts), within_s=UP_WITHIN_S, what="all nodes idle")
        yield found
    finally:
        for host in hosts:
            host.kill()
        munge.send_signal(signal.SIGTERM)
        munge.wait(timeout=10.0)


def _idle(cluster: Slurm) -> int:
    try:
        return cluster.run("sinfo", "--noheader", "--Node", "--states=idle").count("\n")
    except AssertionError:  # the controller does not listen yet
        return 0


pytestmark = pytest.mark.multinode

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster/slurm/train.sbatch"
OVER_TWO_NODES: Mapping[str, Any] = {  # each node has one CPU
    "algorithm": {"name": "sft"},
    "data": {"train": {"split": "sft"}, "eval": None, "max_prompt_tokens": None},
    "eval": None,
    "rollouts": None,
    "train": {"steps": 1_000_000, "checkpoint_every": 1_000_000, "sequences_per_update": 8},
    "cluster": {"object_store_gib": None, "roles": {"policy": {"workers": 2, "threads": 1}}},
}
MORE = 5
SOON_S = 120.0  # on a machine that may be slow and busy


RAY = """\
#!/bin/sh
[ "$1" = health-check ] || { echo "ray $*"; exec sleep 1000; }
"""
TOLD = """\
#!/bin/bash
trap 'exit 75' TERM
echo "rlhf $*"
while :; do sleep 0.1; done
"""
IN_PYTHON = "def init(*address, **options): pass\ndef nodes(): return [{'Alive': True}] * 3\n"


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Put programs before all others on PATH."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    path = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(path))


def test_who_is_told_to_go_is_put_back_and_who_is_cancelled_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs(tmp_path / "bin", monkeypatch, ray=RAY, rlhf=TOLD)
    (tmp_path / "ray.py").write_text(IN_PYTHON, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with several_hosts(3) as hosts, slurm(hosts) as cluster:

        def has_begun(log: Path, nodes: int) -> bool:
            said = log.read_text() if log.exists() else ""
            return "rlhf train" in said and said.count("ray start") == nodes

        def submitted(nodes: int, *words: str) -> tuple[str, Path]:
            log = tmp_path / f"{nodes}.log"
            number = cluster.run("sbatch", "--parsable", f"--nodes={nodes}", f"--output={log}", SCRIPT, *words)
            return number.strip(), log

        number, log = submitted(3, "run.yaml", "train.steps=2")
        cluster.until(lambda: has_begun(log, 3), within_s=SOON_S, what="the run")
        cluster.run("scancel", "--signal=TERM", "--batch", number)
        cluster.until(lambda: cluster.job(number).get("Restarts") == "1", within_s=SOON_S, what="back in the queue")
        cluster.run("scancel", number)
        said = log.read_text()
        command = r"rlhf train run.yaml train.steps=2 cluster.address=10.77.0.1:\d+ --resume auto --supervise\n"
        assert re.search(command, said)
        assert re.search(r"ray start --block --head --port=\d+ .*--node-ip-address=10.77.0.1 --num-cpus=1 ", said)
        for address in ("10.77.0.2", "10.77.0.3"):
            assert re.search(rf"ray start --block --address=10.77.0.1:\d+ --node-ip-address={address} ", said)

        number, log = submitted(1, "run.yaml")
        cluster.until(lambda: has_begun(log, 1), within_s=SOON_S, what="the run")
        cluster.run("scancel", number)
        cluster.until(lambda: not cluster.run("squeue", "--noheader"), within_s=SOON_S, what="its end")
        assert cluster.job(number)["JobState"] == "CANCELLED"
        assert cluster.job(number)["Restarts"] == "0"

        number, log = submitted(2)
        cluster.until(lambda: cluster.job(number)["JobState"] == "FAILED", within_s=SOON_S, what="its end")
        assert cluster.job(number)["ExitCode"] == "2:0"
        assert "train.sbatch: needs a CONFIG" in log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_time_limit_puts_the_run_back_and_it_goes_on(
    ray_local: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    base = merge(ONLINE, OVER_TWO_NODES)
    config = write_config(tmp_path / "run.yaml", {"run": {"name": "run", "dir": str(tmp_path)}}, base)
    ours = f'#!/bin/sh\nexec {sys.executable} -m rlhf.cli "$@"\n'  # also where another checkout is installed
    programs(tmp_path / "bin", monkeypatch, rlhf=ours)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RAY_AUTH_MODE")

    def steps() -> int:
        return len(rows(run)) if (run / "metrics.jsonl").exists() else 0

    def said(words: str) -> bool:
        return log.exists() and words in log.read_text(encoding="utf-8", errors="replace")

    with several_hosts(3) as hosts, slurm(hosts) as cluster:
        limits = ["--nodes=3", "--time=3", "--signal=B:TERM@60", f"--output={log}"]
        number = cluster.run("sbatch", "--parsable", *limits, SCRIPT, config, "--quiet").strip()
        try:
            cluster.until(lambda: said("back into the queue"), within_s=200.0, what="the time limit's signal")
            before = steps()
            assert before > 0
            assert said(f"preempted: a checkpoint of step {before} is written")
            cluster.until(lambda: steps() >= before + MORE, within_s=150.0, what=f"steps after {before}")
            assert cluster.job(number)["Restarts"] == "1"
            cluster.run("scancel", number)
            cluster.until(lambda: cluster.job(number)["JobState"] == "CANCELLED", within_s=90.0, what="its end")
        except AssertionError as error:
            job = log.read_text(errors="replace")[-4000:] if log.exists() else ""
            raise AssertionError(f"{error}\n{job}") from error
    found = without_clocks(rows(run))[: before + MORE]
    assert [row["step"] for row in found] == list(range(1, before + MORE + 1))
    unbroken = [f"train.steps={before + MORE}", "run.name=unbroken", "--quiet"]
    assert main(["train", str(config), *unbroken]) == 0
    assert found == without_clocks(rows(tmp_path / "unbroken"))
