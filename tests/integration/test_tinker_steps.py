"""Optimizer steps through a server with a real rank equal the steps of a run's own rank with LoRA, to 1e-6."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf.config.schema.root import Config
from rlhf.engine.distributed import RankContext, init_distributed, leave_distributed
from rlhf.engine.tinker_client import TinkerEndpoint
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.types import MinibatchPlan
from rlhf.workers.offline.pairs import PreferenceWorker
from rlhf.workers.offline.supervised import SupervisedWorker
from rlhf.workers.online.policy import PolicyWorker
from tests.fakes.tinker_ranks import RANK
from tests.fakes.tinker_server import MODEL
from tests.integration.adapter_tenants import examples
from tests.integration.gang_workers import GROUPS, rollouts_of, worker_config
from tests.integration.offline_training import ROWS, data_of, plan_of
from tests.integration.rank_gang import free_port
from tests.integration.test_policy_worker import plan_of as plan_of_rollouts
from tests.integration.test_tinker_client import KEY, Server

PLACE = RankContext(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=60.0)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=3))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"), "tests.fakes.tinker_ranks", model)
    init_distributed(PLACE, "127.0.0.1", free_port())
    yield made
    made.kill()
    leave_distributed()


def supervised(worker: Any, model: str, folder: Path) -> list[Any]:
    data = examples()
    worker.load_data(data)
    count = int(data.loss_mask.sum())
    plan = MinibatchPlan(sequences_by_rank=((0, 1, 2, 3, 4),), num_tokens=count, num_sequences=5)
    return [worker.update_on(plan) for _ in range(3)]


def preferences(worker: Any, model: str, folder: Path) -> list[Any]:
    pairs = data_of("dpo", model)
    worker.load_data(pairs)
    plan = plan_of(pairs, range(ROWS), ranks=1)
    worker.store_reference(0, folder / "reference.safetensors", worker.reference_logprobs(0, plan)[0])
    return [worker.update_on(plan) for _ in range(3)]


def rewards(worker: Any, model: str, folder: Path) -> list[Any]:
    plan = replace(plan_of_rollouts(worker.config, 1), kl_coef=0.1)
    found = []
    for _ in range(2):
        _, metrics = worker.prepare(plan, *map(rollouts_of, range(GROUPS)))
        worker.set_advantages({i: 2.0 - (i * 7 % 5) for i in plan.scores})
        found.append(metrics)
        found += [merge_metrics([worker.forward_backward(half), worker.optim_step()]) for half in range(2)]
    return found


CASES: dict[str, tuple[Any, dict[str, Any], Callable[[Any, str, Path], list[Any]]]] = {
    "sft": (SupervisedWorker, {"name": "sft"}, supervised),
    "dpo": (PreferenceWorker, {"name": "dpo", "beta": 0.5}, preferences),
    "grpo": (PolicyWorker, {"name": "grpo", "kl": {"coef": 0.1, "estimator": "k3", "place": "loss"}}, rewards),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_through_a_server_are_those_of_a_rank(server: Server, model: str, tmp_path: Path, case: str) -> None:
    kind, algorithm, learn = CASES[case]

    def config_of(**policy: Any) -> Config:
        given: Any = {"policy": policy, "train": {"lr": 1e-4, "betas": (0.9, 0.95)}}
        is_online = case == "grpo"
        return worker_config(algorithm, model, str(tmp_path), tokens=64, is_online=is_online, **given)

    at = TinkerEndpoint(url=server.url, key=KEY, base_model=MODEL)
    remote = kind(config_of(tinker=server.url, lora={"rank": RANK}), PLACE, optimizer_steps=9, server=at)
    remote.start("", 0)
    (tmp_path / "begun").mkdir()
    remote.engine.download(tmp_path / "begun")
    local = kind(config_of(adapter=str(tmp_path / "begun"), lora={}), PLACE, optimizer_steps=9)
    local.build()
    theirs, ours = ([results(part) for part in learn(worker, model, tmp_path)] for worker in (remote, local))
    for there, own in zip(theirs, ours, strict=True):
        missing = {name for name in own.keys() - there.keys() if "entropy" not in name and "accuracy" not in name}
        assert not missing
        compared = there.keys() - {"update/tokens/total"}  # a rank shares the tokens of a prompt
        for name in compared:
            assert there[name] == pytest.approx(own[name], rel=1e-4, abs=1e-6), name
    for name, worker in (("there", remote), ("here", local)):
        worker.export(tmp_path / name)
    begun, there, here = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("begun", "there", "here")
    )
    assert there.keys() == here.keys()
    worst = max(float((there[name] - here[name]).abs().max()) for name in here)
    change = max(float((here[name] - begun[name]).abs().max()) for name in here)
    assert worst <= 1e-6 < 1e-4 < change, f"largest difference {worst:.2e}, largest change {change:.2e}"
    remote.engine.client.close()
