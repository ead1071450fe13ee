"""`python -m tests.fakes.tinker_ranks FOLDER PORT KEY MODEL`: the Tinker server before a real rank in its process.

The rank is DeepSpeed's, as of `rlhf tinker`. The engines are fakes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlhf.adapters import AdamStep, AdapterShape, LossReport, LossRows, NamedLoss
from rlhf.config.adapter_ranks import ranks_config
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.model import PolicyConfig
from rlhf.config.schema.run import RunConfig
from rlhf.engine.distributed import init_distributed
from rlhf.workers.adapters.adapter_worker import AdapterWorker, merged_report
from tests.fakes.adapters import FakeAdapters
from tests.fakes.tinker_server import serve
from tests.integration.rank_gang import free_port, place_of

RANK, LONGEST = 8, 65


class RankAdapters(FakeAdapters):
    """The policy of clients on a rank in this process."""

    def __init__(self, model: str) -> None:
        super().__init__()
        policy = PolicyConfig.model_validate({"model": model, "dtype": "float32", "lora": {"rank": RANK}})
        config = ranks_config(policy, RunConfig(name="ranks"), ClusterConfig(), max_tokens_per_microbatch=LONGEST)
        place = replace(place_of(0, 1), longest_sequence=LONGEST)
        init_distributed(place, "127.0.0.1", free_port())
        self.worker = AdapterWorker(config, place, optimizer_steps=1)
        self.worker.build()

    def holds(self, adapter: str) -> bool:
        return adapter in self.worker.adapters

    async def create(self, adapter: str, shape: AdapterShape) -> None:
        self.worker.create(adapter, shape)

    async def remove(self, adapter: str) -> None:
        self.worker.remove(adapter)

    async def forward_backward(
        self, adapter: str, rows: LossRows, loss: NamedLoss, *, forward_only: bool = False
    ) -> LossReport:
        return merged_report([self.worker.forward_backward(adapter, rows, loss, forward_only=forward_only)])

    async def optim_step(self, adapter: str, step: AdamStep) -> float:
        return self.worker.step_adapter(adapter, step)

    async def drop_gradient(self, adapter: str, reason: str) -> None:
        self.worker.drop_gradient(adapter, reason)

    async def save(self, adapter: str, folder: Path) -> None:
        self.worker.save_adapter(adapter, folder)

    async def load(self, adapter: str, folder: Path, *, optimizer: bool) -> None:
        self.worker.load_adapter(adapter, folder, optimizer=optimizer)

    async def export(self, adapter: str, folder: Path) -> str:
        self.worker.export_adapter(adapter, folder)
        return "unchecked"

    async def probe(self, adapter: str | None, token_ids: Sequence[int]) -> list[float]:
        return self.worker.probe_adapter(adapter, token_ids)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), [sys.argv[3]], RankAdapters(sys.argv[4])))
