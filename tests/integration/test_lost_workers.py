"""Workers are killed during a run: the run goes on with the same results.

Real runs of the tiny model in this process, on the session's Ray. tests/chaos kills all workers in all other stages.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from actors.cluster import memory_folders
from actors.roles.gang import PolicyGang
from actors.run.engine_pool import ENGINE_POOL
from rlhf.cli import main
from rlhf.models.files.tiny import build_tiny_llama
from tests.integration.faults import FINE, GRPO, SFT, actor_processes, once, steps_done, write_run
from tests.integration.recipes import merge, rows, weights, without_clocks

pytestmark = pytest.mark.timeout(600)
THREE: Mapping[str, Any] = {"train": {"steps": 3, "checkpoint_every": 3}}
TWO_RANKS: Mapping[str, Any] = {"cluster": {"roles": {"policy": {"workers": 2, "cpus": 0.5, "threads": 1}}}}
EVERY_ROLE: Mapping[str, Any] = {
    "algorithm": {"name": "grpo", "kl": {"coef": 0.05}},
    "data": {"eval": {"task": "running_totals", "split": "eval", "size": 4}},
    "eval": {"every": 4},
    "rollouts": {"max_new_tokens": 200},  # long enough to kill an engine meanwhile
    "train": {"steps": 4, "checkpoint_every": 4, "max_tokens_per_microbatch": 1024},
    "cluster": {
        "weight_sync": "shm",
        "roles": {"policy": {"zero_stage": 3}, "rollout": {"engines": 2, "cpus": 0.5, "threads": 1}},
    },
}
OFFLINE_TEACHER: Mapping[str, Any] = {"algorithm": {"name": "distillation"}, "cluster": {"roles": None}}
ONLINE_TEACHER: Mapping[str, Any] = {"algorithm": {"name": "on_policy_distillation"}, "rewards": None}
ENDS_ITS_WORKER = """
import os, pathlib, signal

def reward(prompt, response):
    try:
        pathlib.Path(__file__).with_name("killed").touch(exist_ok=False)
        os.kill(os.getppid(), signal.SIGKILL)
    except FileExistsError:
        pass
    return float(len(response) % 3)
"""


@pytest.fixture(autouse=True)
def engines_stay(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the engines for a test's second run, so that the second run starts earlier."""
    monkeypatch.setattr(ENGINE_POOL, "keeps", True)
    yield
    ENGINE_POOL.close()
    assert not actor_processes()


def kill_during(monkeypatch: pytest.MonkeyPatch, method: str, *, rank: int, number: int) -> None:
    """Kill a rank of the policy during call `number` of a method."""
    original, calls = getattr(PolicyGang, method), []

    async def killing(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(method)
        working = asyncio.create_task(original(self, *arguments, **options))
        if len(calls) == number:
            await asyncio.sleep(0.01)
            self.processes.here[rank].kill()
        return await working

    monkeypatch.setattr(PolicyGang, method, killing)


def assert_unbroken(folder: Path, config: Path, *sources: str, kills: Mapping[str, int] = {}) -> None:
    """Run a configuration twice, kill workers in the first run, and assert that the runs are equal.

    Args:
        sources: role and rank of each lost worker.
        kills: the class of a worker whose first rank is killed, and the step before.
    """
    broken, unbroken = folder / "broken", folder / "unbroken"

    def kill(worker: str) -> None:
        names = {row["pid"]: row["who"] for row in json.loads((broken / "processes.json").read_text())}
        victim = min(actor_processes(worker), key=lambda process: names[process.pid])  # of the first rank
        time.sleep(0.1)  # by then an engine generates
        victim.kill()

    with ExitStack() as acts:
        for worker, step in kills.items():
            acts.enter_context(once(lambda step=step: steps_done(broken) >= step, lambda worker=worker: kill(worker)))
        assert main(["train", str(config), "--quiet"]) == 0
    assert main(["train", str(config), "--quiet", "run.name=unbroken"]) == 0
    assert without_clocks(rows(broken)) == without_clocks(rows(unbroken))
    assert weights(broken) == weights(unbroken)
    records = [json.loads(line) for line in (broken / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["kind"], record["source"]) for record in records] == [("died", source) for source in sources]
    for role in {source.split()[0] for source in sources}:
        assert sum(row.get(f"recovery/{role}/total", 0.0) for row in rows(broken)) == 1.0, role
    assert main(["doctor", str(broken)]) == 0
    assert not [path for path in memory_folders.folders_of_user().iterdir() if f"-{os.getpid()}-" in path.name]


def test_a_run_that_loses_a_worker_of_each_role_equals_an_unbroken_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reward worker dies with the first group, an engine during the rollouts and a rank during an update."""
    config = write_run(tmp_path, "broken", GRPO, TWO_RANKS, EVERY_ROLE, reward=ENDS_ITS_WORKER)
    kill_during(monkeypatch, "forward_backward", rank=1, number=4)
    kills = {"ReferenceWorker": 1, "RolloutEngine": 2}
    assert_unbroken(tmp_path, config, "reward 0", "reference 0", "rollout 0", "policy 1", kills=kills)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "method"),
    [({"cluster": {"weight_sync": "gloo"}}, "send"), ({"policy": {"lora": {"rank": 4}}}, "optim_step")],
    ids=["broadcast", "lora"],
)
def test_a_rank_with_an_adapter_or_in_a_broadcast_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: Mapping[str, Any], method: str
) -> None:
    kill_during(monkeypatch, method, rank=0, number=3)
    assert_unbroken(tmp_path, write_run(tmp_path, "broken", GRPO, TWO_RANKS, THREE, changes), "policy 0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "worker"),
    [(merge(GRPO, ONLINE_TEACHER), "OnlineTeacherWorker"), (merge(SFT, OFFLINE_TEACHER), "TeacherWorker")],
    ids=["a teacher of responses", "a teacher of fixed data"],
)
def test_a_run_that_loses_its_teacher_equals_an_unbroken_one(tmp_path: Path, base: Any, worker: str) -> None:
    teacher = {"model": str(build_tiny_llama(tmp_path / "teacher", seed=1))}
    config = write_run(tmp_path, "broken", base, THREE, {"teacher": teacher}, reward=FINE)
    assert_unbroken(tmp_path, config, "teacher 0", kills={worker: 1})
