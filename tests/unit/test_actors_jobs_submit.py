"""Mistakes are refused before contact, and silent clusters are reported. integration/test_submit uses a cluster."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import actors.jobs.submit
import rlhf
from actors.jobs.submit import Jobs
from rlhf.cli import main

RUN = """\
run: {name: demo, dir: /shared/runs}
policy: {model: "some/model"}
algorithm: {name: sft}
data: {train: "some/dataset"}
train: {steps: 10, lr: 1e-6, sequences_per_update: 16}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project as the test's current folder. Any contact ends the test."""
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    return tmp_path


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a CONFIG, or --follow, --status or --stop with a job"),
        (["run.yaml", "--follow", "demo-1"], "take only a JOB and --address"),
        (["--stop", "demo-1", "--env", "X"], "take only a JOB and --address"),
        (["--status", "demo-1", "--stop", "demo-1"], "not allowed with argument"),
        (["run.yaml", "train.stps=3"], "did you mean train.steps?"),
        (["run.yaml", "run.dir=runs"], "run.dir: runs is relative"),
        (["run.yaml", "--env", "NOT_SET_HERE"], "--env NOT_SET_HERE: is not set in your environment"),
        (["run.yaml", "--env", "MINE=very-private-words"], "--env MINE: takes only the name of a variable"),
        (["run.yaml", "--address", "10.0.0.1:6379"], "10.0.0.1:6379 (--address or RAY_ADDRESS) is not the address"),
        (["run.yaml", "--address", "ray://10.0.0.1:10001"], "ray://10.0.0.1:10001 (--address or RAY_ADDRESS) is not"),
        (["run.yaml"], "no dashboard of Ray answers at http://127.0.0.1:1"),
        (["run.yaml", "--resource", "tpu"], "--resource: takes NAME=N, such as tpu=4, got 'tpu'"),
        (["run.yaml", "--resource", "tpu=-1"], "--resource tpu: got -1, expected a number >= 0"),
        (["run.yaml", "--memory-gib", "inf"], "--memory-gib: got inf, expected a number >= 0"),
        (["run.yaml", "run.mirror=https://me:very-private-words@store/runs"], "argument run.mirror: holds a secret"),
    ],
)
def test_what_is_wrong_is_said_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["submit", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1
    assert "very-private-words" not in err


def test_no_cluster_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    assert main(["submit", "run.yaml"]) == 2
    assert "no cluster is named: give --address http://HOST:8265" in capsys.readouterr().err


def test_who_says_nothing_is_not_waited_for(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.jobs.submit, "ANSWER_WITHIN_S", 0.2)
    with pytest.raises(rlhf.UserError, match=f"no dashboard of Ray answers at {silent} .*timed out"):
        rlhf.job_status("demo-1", address=silent)
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


def test_values_are_hidden_in_whatever_a_cluster_says() -> None:
    jobs = object.__new__(Jobs)
    jobs._hidden = ("open", "open sesame", "no", "two\nlines")
    assert jobs._masked("it said open sesame, no more") == "it said ***, no more"
    assert jobs._message("refused:\ntwo\nlines, open") == "refused: ***, ***"
    # a value of several lines, in a log that comes in parts
    jobs._hidden = ("-----BEGIN KEY-----\n  c2VjcmV0\n}\n-----END KEY-----\n",)
    assert jobs._masked("it has -----BEGIN KEY-----\n") == "it has ***\n"
    assert jobs._masked("c2VjcmV0\n}\n-----END KEY-----\n") == "***\n}\n***\n"


class Breaking:
    """A client whose log breaks off once in the middle, with an error or silently."""

    def __init__(self, *, over_at: int = 2, is_silent: bool = False) -> None:
        self.asked, self.over_at, self.is_silent = 0, over_at, is_silent

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.asked += 1
        yield "one\n"
        if self.asked == 1:
            yield "tw"
            if self.is_silent:
                await asyncio.sleep(600.0)
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        yield "two\nth"
        yield "ree\n"

    def get_job_info(self, job: str) -> SimpleNamespace:
        state = "RUNNING" if self.asked < self.over_at else "FAILED"
        return SimpleNamespace(status=state, driver_exit_code=75, message=None)


@pytest.mark.parametrize(("over_at", "is_silent"), [(2, False), (1, False), (1, True)])
def test_a_log_that_breaks_off_is_taken_up_where_it_was(
    monkeypatch: pytest.MonkeyPatch, over_at: int, is_silent: bool
) -> None:
    """The job ends after the break, or meanwhile."""
    monkeypatch.setattr(actors.jobs.submit, "HEARTBEAT_S", 0.2)
    jobs, told = object.__new__(Jobs), list[str]()
    jobs._hidden, jobs._client = (), Breaking(over_at=over_at, is_silent=is_silent)
    end = jobs.follow("demo-1", told.append)
    assert "".join(told) == "one\ntwo\nthree\n"
    assert (end.state, end.exit_code) == ("FAILED", 75)


def test_a_head_that_is_lost_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Breaking()
    info = Mock(side_effect=[client.get_job_info("demo-1"), *[ConnectionError("refused")] * 9])
    monkeypatch.setattr(client, "get_job_info", info)
    monkeypatch.setattr(actors.jobs.submit, "LOST_FOR_S", -1.0)
    jobs = object.__new__(Jobs)
    jobs._hidden, jobs._client, jobs.address = (), client, "http://head:8265"
    with pytest.raises(rlhf.RunError, match=r"no answer about demo-1 for .*it may still run: .*refused"):
        jobs.follow("demo-1", lambda text: None)


@pytest.mark.parametrize(("options", "end"), [([], " --supervise"), (["--no-supervise"], "")])
def test_the_driver_of_a_job_is_supervised(monkeypatch: pytest.MonkeyPatch, options: list[str], end: str) -> None:
    jobs = Mock()
    jobs.submit.return_value = "demo-1"
    monkeypatch.setattr(actors.jobs.submit, "Jobs", lambda address: jobs)
    assert main(["submit", "run.yaml", "train.steps=3", *options]) == 0
    command = f"exec python -m actors.jobs.entrypoint train run.yaml train.steps=3 --resume auto{end}"
    assert jobs.submit.call_args.args[2] == command
