"""rlhf/controller/offline.py: an evaluation in pieces is that of the whole set, also with a smaller last piece."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rlhf.config.schema.cluster import Restarts
from rlhf.controller.offline import OfflineController
from rlhf.controller.supervisor import Supervisor
from rlhf.data.stream import Stream
from rlhf.types import MinibatchPlan


@dataclass(frozen=True)
class SomeRow:
    example_id: int
    token_ids: tuple[int, ...]
    num_targets: int
    non_token_bytes: bytes = b""


class Role:
    """Two ranks that note what they are asked."""

    num_ranks = 2

    def __init__(self) -> None:
        self.plans: list[MinibatchPlan] = []

    async def evaluate(self, dataset: int, name: str, plan: MinibatchPlan, states: tuple[()]) -> dict[str, Any]:
        self.plans.append(plan)
        return {}


def test_pieces_of_an_evaluation_are_divided_by_the_counts_of_the_whole_set() -> None:
    rows = [SomeRow(example_id=i, token_ids=(0,) * (i + 1), num_targets=i) for i in range(7)]
    role: Any = Role()
    train: Any = SimpleNamespace(sequences_per_update=3, best_metric=None, early_stopping=None)
    record: Any = SimpleNamespace(stage=lambda *_, **__: nullcontext(), add=lambda _: None)
    controller = OfflineController(
        SimpleNamespace(train=train),  # type: ignore[arg-type]
        role,
        record,
        train_set=rows,
        rows=Stream(rows, seed=0, shuffle=True),
        eval_sets={"heldout": rows},
        policy_fingerprint="",
        supervisor=Supervisor(Restarts(), record, ()),
    )
    asyncio.run(controller.evaluate(1))
    shares = [[set(ids) for ids in plan.sequences_by_rank] for plan in role.plans]
    assert [set.union(*ranks) for ranks in shares] == [{0, 1, 2}, {3, 4, 5}, {6}]
    assert set() in shares[-1]  # one row for two ranks
    assert {(plan.num_tokens, plan.num_sequences) for plan in role.plans} == {(0 + 1 + 2 + 3 + 4 + 5 + 6, 7)}
