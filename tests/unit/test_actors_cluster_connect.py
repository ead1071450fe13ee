"""A local Ray starts only after checks, in a private folder. tests/integration/ starts a real Ray."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray._private import worker

from actors.cluster.address import cluster_to_join, word_of_cluster
from actors.cluster.connect import _private_temp, _refuse_few_open_files, _start_daemons, connected
from actors.cluster.placement import Placement
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.errors import RunError, UserError


def test_too_few_open_files_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_few_open_files()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))
    with pytest.raises(UserError, match=r"may open 64 files here \(`ulimit -n`\), and a run needs 256"):
        _refuse_few_open_files()


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for Ray's files, with an unusually long path."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("actors.cluster.connect.LONGEST_SOCKET", 1000)
    return tmp_path / f"ray-{os.getuid()}"


def test_nobody_else_can_enter_the_folder_of_ray_or_put_it_there(tmp_path: Path, temp: Path) -> None:
    temp.mkdir()
    temp.chmod(0o777)
    assert _private_temp() == temp
    assert stat.S_IMODE(temp.stat().st_mode) == 0o700
    temp.rename(tmp_path / "elsewhere")
    temp.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not a folder that belongs to this user"):
        _private_temp()


def test_a_path_that_is_too_long_for_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("a" * 100)))
    with pytest.raises(UserError, match=r"longer than 107 characters. Set RAY_TMPDIR to a folder with a short path"):
        _private_temp()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_local_ray_that_does_not_start_is_started_once_more(
    temp: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """A node has 30 s to start Ray, sometimes too short on a busy machine."""
    daemons: list[subprocess.Popen[bytes]] = []

    def init(**_: Any) -> None:
        daemons.append(subprocess.Popen(["sleep", "60"]))
        if len(daemons) <= failures:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test's Ray may be there
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("actors.cluster.connect._own_session", lambda temp: None)
    try:
        with pytest.raises(RunError, match="timed out") if failures == 2 else nullcontext(), connected(ClusterConfig()):
            assert daemons[0].poll() is not None
            assert daemons[1].poll() is None
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
    assert len(daemons) == 2


def test_a_local_ray_has_the_cpus_of_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", options.update)
    monkeypatch.setattr("actors.cluster.connect.num_cpus", lambda: 3)
    _start_daemons(ClusterConfig(), tmp_path)
    assert options["num_cpus"] == 3


def test_what_ray_tells_the_driver_goes_to_the_log_and_not_to_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    poll = iter([(b"", {"job_id": None, "error_message": "A worker died."})])
    stopped = threading.Event()

    def next_message() -> Any:
        stopped.set()
        return next(poll)

    subscriber = SimpleNamespace(subscribe=lambda: None, poll=next_message)
    driver = SimpleNamespace(gcs_error_subscriber=subscriber, current_job_id=SimpleNamespace(binary=lambda: b"1"))
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with caplog.at_level("INFO"), connected(ClusterConfig()):
        worker.listen_error_messages(cast("Any", driver), stopped)
    assert capsys.readouterr().out == ""
    assert "Ray: A worker died." in caplog.messages


def test_workers_read_and_write_utf_8_whatever_the_locale() -> None:
    placement = SimpleNamespace(slots={"policy": [SimpleNamespace(cpus=1.0, gpus=0.0, bundle=0)]})
    placement = Placement(group=cast("Any", None), plan=cast("Any", placement))
    options = placement.options("policy", 0, {"OMP_NUM_THREADS": "1"})
    assert options["runtime_env"] == {"env_vars": {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}}


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is no RAY_ADDRESS and no record of `ray start`, independent of this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()


@pytest.mark.parametrize(
    ("configured", "named", "joined"),
    [
        (None, None, None),
        (None, "", None),
        (None, "local", None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("10.0.0.2:6379", "10.0.0.1:6379", "10.0.0.2:6379"),
        ("auto", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("ray://head:10001", None, "ray://head:10001"),
    ],
)
def test_the_config_names_a_cluster_before_the_environment_does(
    monkeypatch: pytest.MonkeyPatch, configured: str | None, named: str | None, joined: str | None
) -> None:
    if named is not None:
        monkeypatch.setenv("RAY_ADDRESS", named)
    assert cluster_to_join(configured) == joined


def test_auto_is_what_ray_start_left_word_of(monkeypatch: pytest.MonkeyPatch) -> None:
    word_of_cluster().write_text("10.0.0.3:6379\n")
    assert cluster_to_join("auto") == "10.0.0.3:6379"
    assert cluster_to_join(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster_to_join(None) == "10.0.0.3:6379"


def test_auto_without_such_word_and_a_dashboard_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = r"auto, but no cluster was started on this machine with `ray start`"
    dashboard = r"http://127.0.0.1:8265 .* is the address of a dashboard"
    for configured, named, message in (
        ("auto", "", absent),
        (None, "auto", absent),
        ("auto", "auto", absent),
        (None, "http://127.0.0.1:8265", dashboard),
    ):
        monkeypatch.setenv("RAY_ADDRESS", named)
        with pytest.raises(UserError, match=message):
            cluster_to_join(configured)
