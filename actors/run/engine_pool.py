"""Keep rollout engines after a run, for the next run of this process with the same engine settings.

A process with several runs on one Ray may set `ENGINE_POOL.keeps`, as the tests do. Kept engines refuse to generate
before a sync, and every batch begins with an empty prefix cache. Only engines on the same CPU host are kept, because
all further transports are connected to their sender.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.cluster.placement import Placement, reserve
from actors.roles.group import WorkerGroup
from actors.rollout.engine_creation import engine_spec, start_engines
from actors.rollout.engine_group import RolloutEngines
from actors.serving.agent_engine import engine_for
from rlhf.agents.sessions import AgentSpec
from rlhf.config.placement_plan import plan_placement
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.root import Config
from rlhf.config.transports import TRANSPORTS
from rlhf.errors import RunError
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.vision.reading import ImageFolder

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class EnginePool:
    """Holds at most one set of engines, in a placement group."""

    keeps: bool = False
    kept: EngineLease | None = None

    async def lease(
        self,
        config: Config,
        *,
        max_model_len: int,
        spool: Path,
        environment: EnvironmentSpec | AgentSpec | None,
        images: ImageFolder | None = None,
    ) -> EngineLease:
        """Return the placement and engines of a run: matching kept engines, or else new engines before their start."""
        key, lent = engines_key(config, max_model_len, environment), self.kept
        if lent is not None and lent.key == key and await _renewed(lent.engines, spool):
            self.kept, lent.is_kept, lent.is_started = None, False, True
            logger.info("the rollout engines of the previous run are reused")
            return lent
        self.close()
        placement = await reserve(config)
        engines = start_engines(
            config,
            placement,
            max_model_len=max_model_len,
            spool=spool,
            environment=environment,
            images=images,
            engine=engine_for(environment, with_suites=bool(config.eval.suites)),
        )
        whole = config.policy.lora is None and environment is None and config.cluster.device == "cpu"
        whole = whole and images is None  # which belong to the run's folder
        may_stay = self.keeps and whole and engines.sync is not None and TRANSPORTS[engines.sync.method].stays
        may_stay = may_stay and not engines.is_elastic
        return EngineLease(key=key, placement=placement, engines=engines, may_stay=may_stay)

    def close(self) -> None:
        if self.kept is not None:
            self.kept.is_kept = False
            self.kept.end()
            self.kept.release()
            self.kept = None


@dataclass(slots=True, kw_only=True)
class EngineLease:
    """The engines and placement group of a run. Both may be kept if the run ends normally."""

    key: str  # see engines_key
    placement: Placement
    engines: RolloutEngines
    may_stay: bool
    is_started: bool = False
    is_kept: bool = False

    async def start_with(self, others: Sequence[WorkerGroup], cluster: ClusterConfig) -> None:
        """Start the engines and all other groups. On GPUs, engines that take turns with the trainer then sleep."""
        limit_s, on_gpus = cluster.start_timeout_s, cluster.device == "cuda"
        groups = list(others)
        if on_gpus and self.placement.plan.shares_gpus(self.engines.role):
            # An engine measures free GPU memory, so no other process may start during this start.
            await self.engines.start(deadline_s=limit_s)
        elif not self.is_started:
            groups.append(self.engines)
        if on_gpus and cluster.roles.rollout.colocate_with is not None:
            await self.engines.sleep(keep_weights=False)
        await asyncio.gather(*[group.start(deadline_s=limit_s) for group in groups])

    async def stop(self) -> None:
        """Keep the engines, or shut the engines down. Called only after a normal end of the run."""
        self.is_kept = self.may_stay
        if not self.is_kept:
            await self.engines.stop()

    def end(self) -> None:
        """End the engines at once unless kept."""
        if not self.is_kept:
            self.engines.end()

    def release(self) -> None:
        """Release the placement group unless the engines are kept."""
        if self.is_kept:
            ENGINE_POOL.kept = self
        else:
            self.placement.release()


def engines_key(config: Config, max_model_len: int, environment: EnvironmentSpec | AgentSpec | None) -> str:
    """Return a key. Runs with equal keys need the same engines in the same placement."""
    spec = engine_spec(config, max_model_len=max_model_len, environment=environment)
    return repr((spec, config.policy.lora, plan_placement(config), config.cluster, bool(config.eval.suites)))


async def _renewed(engines: RolloutEngines, spool: Path) -> bool:
    try:
        return await engines.renew(spool)
    except RunError as error:
        logger.warning("the rollout engines of the previous run cannot be reused: %s", error)
        return False


ENGINE_POOL = EnginePool()
