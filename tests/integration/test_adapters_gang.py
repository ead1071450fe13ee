"""Two clients train adapters on two ranks of a real gang, through Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from actors.cluster.placement import reserve_roles
from actors.roles.adapters import create_adapters_gang
from actors.roles.group import ending
from actors.weights.adapter import file_checksum
from rlhf.adapters import AdamStep, AdapterShape, LossReport, NamedLoss
from rlhf.config.adapter_ranks import ranks_config
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.model import PolicyConfig
from rlhf.config.schema.run import RunConfig
from rlhf.errors import UserError
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.roles import AdaptersRole
from tests.integration.adapter_tenants import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CROSS_ENTROPY = NamedLoss(name="cross_entropy")


async def work(role: AdaptersRole, folder: Path) -> tuple[list[LossReport], list[LossReport]]:
    """Train two adapters at the same time, each with equal rows."""
    await asyncio.gather(*(role.create(name, AdapterShape(rank=4, seed=3)) for name in ("a", "b")))

    async def client(name: str) -> list[LossReport]:
        reports = []
        for _ in range(8):
            reports.append(await role.forward_backward(name, rows_of(3), CROSS_ENTROPY))
            assert await role.optim_step(name, AdamStep(lr=0.02)) > 0.0
        return reports

    one, two = await asyncio.gather(client("a"), client("b"))
    with pytest.raises(UserError, match="There is no adapter nobody"):
        await role.forward_backward("nobody", rows_of(3), CROSS_ENTROPY)
    await role.drop_gradient("a", "the client asked for it.")
    with pytest.raises(UserError, match="the client asked for it"):
        await role.optim_step("a", AdamStep(lr=0.02))
    assert await role.export("a", folder / "peft") == file_checksum(folder / "peft" / "adapter_model.safetensors")
    probe = await role.probe("a", [1, 2, 3])
    await role.save("a", folder / "state")
    await role.load("b", folder / "state", optimizer=True)
    assert await role.probe("b", [1, 2, 3]) == probe != await role.probe(None, [1, 2, 3])
    await role.remove("a")
    await role.create("a", AdapterShape(rank=2))
    return one, two


def test_two_clients_train_at_the_same_time(ray_local: None, tmp_path: Path) -> None:
    model = build_tiny_llama(tmp_path / "tiny", seed=0)
    policy = PolicyConfig.model_validate({"model": str(model), "dtype": "float32", "lora": {"rank": 8}})
    resources = {"workers": 2, "cpus": 0.5, "threads": 1}
    cluster = ClusterConfig.model_validate({"device": "cpu", "roles": {"policy": resources}})
    config = ranks_config(policy, RunConfig(name="gang", dir=tmp_path), cluster, max_tokens_per_microbatch=64)

    async def run() -> tuple[list[LossReport], list[LossReport]]:
        placement = await reserve_roles(["policy"], config.cluster, with_reward_model=False)
        gang = create_adapters_gang(config, placement, longest_sequence=40)
        async with ending([gang], placement.release, heartbeat_timeout_s=120.0):
            await gang.start(deadline_s=300.0)
            return await work(gang, tmp_path)

    one, two = asyncio.run(run())
    for ours, theirs in zip(one, two, strict=True):
        assert ours.loss == theirs.loss
        assert torch.equal(ours.logprobs, theirs.logprobs)
    assert one[-1].loss < one[0].loss
