"""Connecting to Ray: a local one with bounded memory, or the cluster that the run was given."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rlhf.config.cluster import ClusterConfig
from rlhf.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Ray for the length of the block.

    cluster.address null means the cluster of RAY_ADDRESS (which `ray job submit` sets), or else a Ray of our own that
    ends with the block.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        yield
        return
    if address is None:
        # Nothing but this run talks to a Ray of our own, which listens on this machine only.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            object_store_memory=int(config.object_store_gib * 2**30),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    else:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except (ConnectionError, RuntimeError) as error:
            raise UserError(
                f"no Ray cluster answers at {address!r} (cluster.address or RAY_ADDRESS): {error}. Start one with "
                "`ray start --head`, or leave cluster.address null for a local one. If the cluster uses tokens, set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
            ) from error
        logger.info("connected to the Ray cluster at %s", address)
    try:
        yield
    finally:
        ray.shutdown()
