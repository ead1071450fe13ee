"""Say which limits of `cluster.restarts` have no effect because the run can never replace such a process."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.config.derive import shares_engines_gpus, ships_adapter
from rlhf.config.schema.root import Config
from rlhf.config.transports import TRANSPORTS, Transport


def void_restarts(config: Config, transport: Transport) -> Iterator[str]:
    """Yield a sentence for each limit without effect. `transport`: of the policy's weights to the engines."""
    restarts, rollout = config.cluster.restarts, config.cluster.roles.rollout
    if config.rollouts is not None and restarts.engine and not ships_adapter(config):
        is_only, text = rollout.workers == 1 and not rollout.is_elastic, "cluster.restarts.engine has no effect"
        if TRANSPORTS[transport].shares_gpus:
            why = "the engines share GPUs with the policy, which leaves a successor neither memory nor weights"
            yield f"{text}: {why}. The loss of an engine ends the run."
        elif TRANSPORTS[transport].meets and is_only:
            why = f"weights go by {transport}, which leaves none for the successor of the only engine"
            yield f"{text}: {why}. Its loss ends the run; with two engines or more it does not."
    if restarts.gang and shares_engines_gpus(config):
        text = "cluster.restarts.gang has no effect: ranks that share GPUs with engines keep no snapshots"
        yield f"{text}. The loss of a rank ends the run."
