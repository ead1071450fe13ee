"""Start a Slurm on several hosts (tests/hosts.py): munge, a controller and a daemon each, without systemd.

All files and the key are in a single folder. The processes end with the hosts, and munge's by pid.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import Host

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
"""  # cred_expire is also how long a job that was put back has to wait


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
