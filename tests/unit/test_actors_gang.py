"""What a gang's processes are given to start with. Gangs themselves need a Ray: tests/integration."""

from __future__ import annotations

import pytest

from actors.gang import worker_environment
from rlhf.workers.place import RankPlace


def test_no_secret_is_in_what_ray_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "not-to-be-seen")
    place = RankPlace(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=1.0)
    environment = worker_environment(place)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "not-to-be-seen" not in environment.values()
