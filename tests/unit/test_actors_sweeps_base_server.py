"""The server of a shared base is waited for, started again, and given up after several ends."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from actors.sweeps import base_server
from actors.sweeps.base_server import MOST_ENDS, BaseServer, base_config
from actors.sweeps.runner import run_sweep
from rlhf.config.files.sweep import load_sweep
from rlhf.config.schema.service import TinkerConfig
from rlhf.errors import RunError, UserError
from rlhf.models.files.loading import load_model_config
from rlhf.process.stopping import StopRequest
from rlhf.sweeps.journal import Journal
from tests.fixtures.sweeps import RUN, write_sweep, wrote
from tests.integration.recipes import merge

SERVES = "import sys, time; print('serving http://127.0.0.1:' + sys.argv[-1], flush=True); time.sleep(60)"
ENDS = "import sys; sys.exit('rlhf: error: policy.model: is no model')"


def server(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> BaseServer:
    monkeypatch.setattr(base_server, "COMMAND", (sys.executable, "-c", script))
    config = TinkerConfig.model_validate({"run": {"name": "server", "dir": str(folder)}, "policy": {"model": "m"}})
    return BaseServer(config, StopRequest())


def test_trials_of_a_cluster_are_refused(tmp_path: Path) -> None:
    run = merge(RUN, {"policy": {"lora": {}}, "cluster": {"address": "head:6379"}})
    sweep = load_sweep(write_sweep(tmp_path, config=run, shared_base=True))
    with pytest.raises(UserError, match=r"sweep\.shared_base: is true, but the trials of the cluster at head:6379"):
        base_config(sweep, at_once=1)


def test_rows_are_at_most_as_long_as_the_model_allows(tmp_path: Path) -> None:
    run = merge(RUN, {"policy": {"lora": {}}, "train": {"max_tokens_per_microbatch": 100_000}})
    made = base_config(load_sweep(write_sweep(tmp_path, config=run, shared_base=True)), at_once=1)
    assert made.service.max_length == load_model_config(made.service.model_name).max_position_embeddings
    assert made.service.max_length < 100_000


def test_a_finished_sweep_starts_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_server, "COMMAND", (sys.executable, "-c", ENDS))
    run = merge(RUN, {"policy": {"lora": {}}})
    parameters = {"train.lr": {"values": [0.1, 0.2]}}
    section = {"config": run, "shared_base": True, "parameters": parameters, "method": {"name": "grid"}}
    sweep = load_sweep(write_sweep(tmp_path, **section))
    with Journal.open(sweep, resume=False) as journal:
        for number in (0, 1):
            journal.add(number, {"train.lr": 0.1})
            journal.end(number, "finished")
            wrote(journal, number, s2=0.5 - number / 10)
    assert run_sweep(sweep, resume=True).describe_best() == "trial-001"
    with Journal.open(sweep, resume=True) as journal:
        journal.end(1, "open")
    with pytest.raises(RunError, match="did not start"):
        run_sweep(sweep, resume=True)


def ended(made: BaseServer) -> None:
    made.process.process.kill()
    while made.process.poll() is None:
        time.sleep(0.01)


def test_a_server_that_ends_is_started_again_at_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(tmp_path, monkeypatch, SERVES) as made:
        assert "model: m" in (tmp_path / "server.yaml").read_text(encoding="utf-8")
        made.keep_running()
        first = made.process
        for number in range(1, MOST_ENDS + 1):
            ended(made)
            made.keep_running()
            assert made.process is not first
            assert made.ends == number
        ended(made)
        with pytest.raises(RunError, match=r"ended 4 times: killed by signal 9.*server\.log"):
            made.keep_running()
    assert made.process.poll() is not None


def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("INFO"),
        pytest.raises(RunError, match=r"did not start: exit 1: policy\.model: is no model \(see .*server\.log\)"),
        server(tmp_path, monkeypatch, ENDS),
    ):
        pass
    assert f"starting the server of the shared base model; its log is {tmp_path}/server.log" in caplog.text


def test_a_signal_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = server(tmp_path, monkeypatch, "import time; time.sleep(60)")
    made.request.came = time.monotonic()
    with made:
        assert made.process.poll() is None
    assert made.process.poll() is not None
