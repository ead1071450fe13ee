"""Derive the server of a base model for all trials of a sweep (sweep.shared_base).

run of the sweep -> the server: model, policy ranks and engines
                 -> a trial: everything else, with policy.tinker as the address of the server
"""

from __future__ import annotations

from rlhf.config.files.sweep import Sweep
from rlhf.config.problem import refuse
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.service import ServedPolicy, ServiceConfig, ServiceRun, TinkerConfig
from rlhf.config.validation.service import service_problems
from rlhf.config.yaml_tree import to_yaml
from rlhf.sweeps.space import MOST_TRIALS, corners

NAME = "server"  # of the server's folder and files in the folder of the sweep


def server_config(sweep: Sweep, *, at_once: int) -> TinkerConfig:
    """Return the configuration of the server for `at_once` simultaneous trials.

    The largest rank and the longest row are those of all trials. UserError: a key of the run is invalid for a server.
    """
    runs = [run for values in corners(sweep.config.parameters) for run in sweep.best(values).runs.values()]
    first = runs[0]
    model = first.policy.model_dump(mode="json", include=set(ServedPolicy.model_fields) - {"lora"})
    rank = max(run.policy.lora.rank for run in runs if run.policy.lora is not None)
    config = TinkerConfig(
        run=ServiceRun(name=NAME, dir=sweep.folder, seed=first.run.seed),
        policy=ServedPolicy.model_validate({**model, "lora": {"rank": rank}}),
        service=ServiceConfig(
            max_length=max(run.train.max_tokens_per_microbatch for run in runs),
            max_adapters=2 * at_once,  # the present and the next version of each trial
            max_models=2 * MOST_TRIALS,  # the models of a failed trial stay, on disk
        ),
    )
    cluster = first.cluster.model_dump(mode="json", exclude_unset=True, exclude={"weight_sync"})
    cluster["roles"] = {role: keys for role, keys in cluster.get("roles", {}).items() if role in config.needs}
    config = config.model_copy(update={"cluster": ClusterConfig.model_validate(cluster)})
    refuse(service_problems(config), lambda key: f"{sweep.source}: sweep.config")
    return config


def server_file(config: TinkerConfig) -> str:
    """Return the file for `rlhf tinker`, without defaults: a server has other defaults than a run."""
    return to_yaml(config.model_dump(mode="json", exclude_unset=True))
