"""`rlhf submit` to a real head with a token: log, stop, and a second job of the same run."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ray._private.authentication_test_utils import reset_auth_token_state

import rlhf
from actors.jobs.submit import RUN, Jobs
from rlhf.cli import main
from rlhf.tracking.sinks.tracker import read_metrics
from tests.integration.recipes import ONLINE, merge, rows, write_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SFT: Mapping[str, Any] = {
    "algorithm": {"name": "sft"},
    "data": {"train": "rows.jsonl", "eval": None, "max_prompt_tokens": None},
    "eval": None,
    "rollouts": None,
    "train": {"steps": 1_000_000, "checkpoint_every": 1_000_000, "sequences_per_update": 4},
    "cluster": {"object_store_gib": None},
}
WITHIN_S = 200.0  # the head is up, and the job has done two steps
SECRET = "quite-a-private-word"
TEMPORARY = Path(f"/tmp/rlh{os.getpid()}")  # short: the paths of Ray's sockets lie below it
AGENT_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
PORTS = ("port", "dashboard-port", "metrics-export-port", "ray-client-server-port", *AGENT_PORTS)


def start_head(log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Return a head on free ports, and the dashboard's address. Another program may take a port first."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    options = [f"--{name}={port}" for name, port in zip(PORTS, ports, strict=True)]
    options += ["--min-worker-port=0", "--max-worker-port=0", "--num-cpus=2"]
    options += ["--node-ip-address=127.0.0.1", "--object-store-memory=134217728", f"--temp-dir={TEMPORARY}"]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", "--head", "--block", *options],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return process, f"http://127.0.0.1:{ports[1]}"


def is_up(process: subprocess.Popen[bytes], address: str, log: Path) -> bool:
    """Return whether the head comes up in time. False: the head has ended."""
    give_up = time.monotonic() + WITHIN_S
    while process.poll() is None:
        assert time.monotonic() < give_up, log.read_text()
        try:
            jobs = Jobs(address)
            if "Ray runtime started" in log.read_text():
                jobs._client.submit_job(entrypoint="true")  # refused until the head's agent is there
                return True
        except (rlhf.UserError, rlhf.RunError, RuntimeError):
            pass
        time.sleep(0.5)
    return False


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the dashboard's address of a head with this process's token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    reset_auth_token_state()  # a process reads the token once
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    log = tmp_path_factory.mktemp("head") / "log"
    process, address = start_head(log)
    try:
        if not is_up(process, address, log):
            process, address = start_head(log)
            assert is_up(process, address, log), log.read_text()
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(TEMPORARY, ignore_errors=True)
        monkeypatch.undo()
        reset_auth_token_state()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config and data in the test's current folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    text = "".join(f'{{"prompt": "{i}+1=", "completion": "{i + 1}"}}\n' for i in range(32))
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    write_config(folder / "run.yaml", {"run": {"name": "job", "dir": str(tmp_path / "runs")}}, merge(ONLINE, SFT))
    monkeypatch.chdir(folder)
    return folder


def logs() -> list[Path]:
    """Return all logs of the head, the head's node and the jobs."""
    found = [path for path in TEMPORARY.glob("session_*/logs/**/*") if path.is_file()]
    assert len(found) > 10
    return found


def test_a_job_is_stopped_and_submitted_again(
    head: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "runs/job"
    monkeypatch.setenv("WORD", SECRET)
    first = rlhf.submit("run.yaml", address=head, env=["WORD"])
    assert first == "job-1"
    give_up = time.monotonic() + WITHIN_S
    while len(read_metrics(run)) < 2:
        assert time.monotonic() < give_up, rlhf.job_status(first, address=head)
        time.sleep(0.2)
    with pytest.raises(rlhf.UserError, match=r"the job job-1 of the same run, .*/runs/job, is RUNNING"):
        rlhf.submit("run.yaml", address=head)

    assert rlhf.stop_job(first, address=head).state == "STOPPED"
    done = len(rows(run))
    steps = [f"train.steps={done + 2}", "--address", head]
    assert main(["submit", "run.yaml", "--wait", "--env", "WORD", *steps]) == 0
    told, _ = capsys.readouterr()
    assert "submitted job-2" in told
    assert told.endswith("done: job-2\n")
    assert f"done: {run}" in told
    assert [row["step"] for row in rows(run)] == list(range(1, done + 3))
    assert (run / "final/config.json").exists()

    details = Jobs(head)._client.get_job_info("job-2")
    assert details.metadata == {RUN: str(run)}
    assert SECRET not in f"{details}{told}"
    assert not [path for path in logs() if SECRET in path.read_text(encoding="utf-8", errors="replace")]

    assert main(["submit", "run.yaml", "--wait", *steps, "policy.model=no/such-model", "run.name=other"]) == 2
    assert "other-1: FAILED, exit code 2" in capsys.readouterr().out
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    reset_auth_token_state()
    with pytest.raises(rlhf.UserError, match="requires its token: set RAY_AUTH_MODE=token"):
        rlhf.job_status(first, address=head)
