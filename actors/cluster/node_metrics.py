"""Measure the load of a run's nodes: the driver on the driver's node, and a small actor on every other node.

The actors reserve no CPU in Ray. A node without an answer yet is left out. A dead node is reported by the roles.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.placement import Placement
from rlhf.process.stopping import start_thread
from rlhf.roles import Metrics
from rlhf.tracking.metrics.reductions import Reduction
from rlhf.tracking.metrics.system import NodeSampler

logger = logging.getLogger(__name__)
ANSWER_WITHIN_S = 5.0
LATE_ANSWER_WITHIN_S = 0.1  # the time to receive an answer that has already arrived


class Nodes:
    """The driver's node, and all nodes that have workers of the run now."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.here = ray.get_runtime_context().get_node_id()
        self.sampler = NodeSampler()
        self.others: dict[str, ActorHandle[Any]] = {}  # by Ray's id of the node
        self.addresses = _addresses()
        self._late: dict[str, ObjectRef[Any]] = {}
        self._failed: set[str] = set()  # nodes whose actor has ended
        self._looking: asyncio.Future[dict[str, str]] | None = None  # a search for new nodes that has not returned yet
        self._start_actors(self._new_nodes())

    async def use(self) -> Metrics:
        """Return the metrics `system/*` of each node for the time since the node's last answer."""
        await self._find_new_nodes()
        metrics = _named(self.addresses[self.here], self.sampler.take())
        for node_metrics in await asyncio.gather(*map(self._asked, list(self.others))):
            metrics |= node_metrics
        return metrics

    async def stop(self) -> None:
        """Do nothing: the actors hold no state, and `end` kills them."""

    def end(self) -> None:
        self.sampler.stop()
        for handle in self.others.values():
            ray.kill(handle)
        self.others = {}

    async def _find_new_nodes(self) -> None:
        """Start an actor on each new node. Ray's GCS may be lost during the search while the run continues."""
        limit_s = ANSWER_WITHIN_S if self._looking is None else LATE_ANSWER_WITHIN_S
        looking = self._looking or asyncio.wrap_future(start_thread(self._new_nodes, "new nodes")[0])
        done, _ = await asyncio.wait([looking], timeout=limit_s)
        self._looking = None if done else looking
        if done:
            self._start_actors(looking.result())

    def _new_nodes(self) -> dict[str, str]:
        """Return the addresses of nodes without an actor, by Ray's id of the node."""
        new = self.placement.nodes() - self.others.keys() - self._failed - {self.here}
        return {node: address for node, address in _addresses().items() if node in new} if new else {}

    def _start_actors(self, new: Mapping[str, str]) -> None:
        self.addresses |= new
        remote = ray.remote(NodeSampler)
        for node in sorted(new):
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            self.others[node] = remote.options(num_cpus=0, max_restarts=0, scheduling_strategy=strategy).remote()

    async def _asked(self, node: str) -> dict[str, Reduction]:
        address, is_late = self.addresses[node], node in self._late
        answer = self._late.pop(node) if is_late else self.others[node].take.remote()
        limit_s = LATE_ANSWER_WITHIN_S if is_late else ANSWER_WITHIN_S
        try:
            return _named(address, await asyncio.wait_for(asyncio.wrap_future(answer.future()), timeout=limit_s))
        except TimeoutError:
            self._late[node] = answer
            if not is_late:
                logger.warning("node %s does not report its load, and is left out of system/* until it does", address)
        except RayError as error:
            reason = type(error).__name__
            logger.warning("node %s does not report its load and is left out of system/*: %s", address, reason)
            self._failed.add(node)
            del self.others[node]
        return {}


def _addresses() -> dict[str, str]:
    return {node["NodeID"]: node["NodeManagerAddress"].replace(":", "-") for node in ray.nodes() if node["Alive"]}


def _named(node: str, metrics: Mapping[str, Reduction]) -> dict[str, Reduction]:
    return {f"system/{node}/{key}": reduction for key, reduction in metrics.items()}
