"""Measure the load of a run's nodes. The driver measures its node, and a small actor measures each other node.

The actors reserve no CPU in Ray. An unresponsive node is left out with one warning; if it is dead, the roles on it
report the failure.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.placement import Placement
from rlhf.roles import Metrics
from rlhf.tracking.metrics.reductions import Reduction
from rlhf.tracking.metrics.system import NodeSampler

logger = logging.getLogger(__name__)
ANSWER_WITHIN_S = 5.0


class Nodes:
    """All nodes with workers of the run, and the driver's node."""

    def __init__(self, placement: Placement) -> None:
        here = ray.get_runtime_context().get_node_id()
        addresses = {node["NodeID"]: node["NodeManagerAddress"].replace(":", "-") for node in ray.nodes()}
        used = {node for role in placement.plan.slots for node in placement.nodes_of(role)}
        self.here = addresses[here]
        self.sampler = NodeSampler()
        remote = ray.remote(NodeSampler)
        self.others: dict[str, ActorHandle[Any]] = {
            addresses[node]: remote.options(
                num_cpus=0, max_restarts=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote()
            for node in sorted(used - {here})
        }

    async def use(self) -> Metrics:
        """Return `system/*` of each node since the last call."""
        metrics = _named(self.here, self.sampler.take())
        for node_metrics in await asyncio.gather(*map(self._asked, list(self.others))):
            metrics |= node_metrics
        return metrics

    async def stop(self) -> None:
        """Do nothing: the actors hold no state, and `end` kills them."""

    def end(self) -> None:
        """End the actors at once."""
        self.sampler.stop()
        for handle in self.others.values():
            ray.kill(handle)
        self.others = {}

    async def _asked(self, node: str) -> dict[str, Reduction]:
        try:
            answer = asyncio.wrap_future(self.others[node].take.remote().future())
            return _named(node, await asyncio.wait_for(answer, timeout=ANSWER_WITHIN_S))
        except (RayError, TimeoutError) as error:
            logger.warning(
                "node %s does not report its load and is left out of system/*: %s", node, type(error).__name__
            )
            del self.others[node]
            return {}


def _named(node: str, metrics: Mapping[str, Reduction]) -> dict[str, Reduction]:
    return {f"system/{node}/{key}": reduction for key, reduction in metrics.items()}
