"""What a gang's processes are given to start with. Gangs themselves need a Ray: tests/integration."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from actors.roles.gang import worker_environment
from actors.rollout.vllm_engine import RolloutSpec, engine_environment
from rlhf.workers.rank_context import RankContext

PLACE = RankContext(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=1.0)
ENGINE = RolloutSpec(name="", model="org/name", dtype="float32", max_model_len=8, max_num_seqs=1, transport="shm")


@pytest.mark.parametrize(
    "environment", [lambda: worker_environment(PLACE), lambda: engine_environment(ENGINE)], ids=["worker", "engine"]
)
def test_all_processes_use_the_hub_as_the_driver_does_and_no_secret_is_logged(
    monkeypatch: pytest.MonkeyPatch, environment: Callable[[], dict[str, str]]
) -> None:
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/shared/hf", "HF_HUB_CACHE": "/shared/hub", "HF_ENDPOINT": "http://hub"}
    for name, value in {**hub, "HF_TOKEN": "not-to-be-seen"}.items():
        monkeypatch.setenv(name, value)
    assert hub.items() <= environment().items()
    assert "not-to-be-seen" not in environment().values()
