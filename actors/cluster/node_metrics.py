"""What the nodes of a run are busy with: the driver's own is looked at from here, each other one by a small actor.

It takes no CPU of Ray's. A node that does not answer is left out with one warning: what matters of its death, the roles
on it say.
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
    """All nodes that have workers of the run, and the driver's."""

    def __init__(self, placement: Placement) -> None:
        here = ray.get_runtime_context().get_node_id()
        addresses = {node["NodeID"]: node["NodeManagerAddress"].replace(":", "-") for node in ray.nodes()}
        used = {node for role in placement.seating.seats for node in placement.nodes_of(role)}
        self.here = addresses[here]
        self.own = NodeSampler()
        remote = ray.remote(NodeSampler)
        self.others: dict[str, ActorHandle[Any]] = {
            addresses[node]: remote.options(
                num_cpus=0, max_restarts=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote()
            for node in sorted(used - {here})
        }

    async def use(self) -> Metrics:
        """`system/*` of each node since the last call."""
        found = _named(self.here, self.own.take())
        for told in await asyncio.gather(*map(self._asked, list(self.others))):
            found |= told
        return found

    async def stop(self) -> None:
        """Look no more."""

    def end(self) -> None:
        """End the actors."""
        self.own.stop()
        for handle in self.others.values():
            ray.kill(handle)
        self.others = {}

    async def _asked(self, node: str) -> dict[str, Reduction]:
        try:
            answer = asyncio.wrap_future(self.others[node].take.remote().future())
            return _named(node, await asyncio.wait_for(answer, timeout=ANSWER_WITHIN_S))
        except (RayError, TimeoutError) as error:
            logger.warning("node %s does not say what it is busy with: %s", node, type(error).__name__)
            del self.others[node]
            return {}


def _named(node: str, found: Mapping[str, Reduction]) -> dict[str, Reduction]:
    return {f"system/{node}/{key}": one for key, one in found.items()}
