from __future__ import annotations

from pathlib import Path

import pytest

from actors.cluster.address import cluster_to_join, word_of_cluster
from rlhf.errors import UserError


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
