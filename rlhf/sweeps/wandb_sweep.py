"""Run a sweep as a native W&B sweep: W&B's server chooses the trials, and W&B's agents run the trials.

The configuration can be inspected without a server. W&B passes a trial's parameters as `key=value` arguments to
`rlhf sweep FILE --trial`, which runs the trial.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rlhf.config.schema.sweep import AshaMethod, GridMethod, Parameter, PbtMethod, Sweep
from rlhf.errors import RunError, UserError
from rlhf.tracking.logs import redact

METHODS = {"grid": "grid", "random": "random", "bayesian": "bayes", "asha": "random"}


def sweep_configuration(sweep: Sweep, words: list[str]) -> dict[str, Any]:
    """Return the sweep in W&B's format. `words` are the file and overrides given to `rlhf sweep`.

    Raise UserError for a setting without support in W&B.
    """
    config, method = sweep.config, sweep.config.method
    if isinstance(method, PbtMethod):
        raise UserError(f"{sweep.source}: sweep.method: W&B has no pbt; run it without --wandb")
    if any(stage.tracking.wandb != "online" for stage in sweep.base.runs.values()):
        raise UserError(
            f"{sweep.source}: --wandb: W&B compares trials by the metrics that it receives; set tracking.wandb=online"
        )
    for word in words:
        if redact(word) != word:
            raise UserError(
                f"{sweep.source}: --wandb: argument {word.partition('=')[0]} holds a secret, and W&B keeps the "
                "command; give it by an environment variable, or write it in the file"
            )
    result: dict[str, Any] = {
        "name": config.name,
        "method": METHODS[method.name],
        "metric": {"name": sweep.metric, "goal": "minimize" if sweep.lower_is_better else "maximize"},
        "parameters": {key: _parameter(key, parameter) for key, parameter in config.parameters.items()},
        "command": ["${env}", "rlhf", "sweep", *words, "--trial", "${args_no_hyphens}"],
    }
    if not isinstance(method, GridMethod):
        result["run_cap"] = method.trials
    if isinstance(method, AshaMethod):
        eta = round(method.reduction_factor)
        if eta != method.reduction_factor:
            raise UserError(f"{sweep.source}: sweep.method.reduction_factor: W&B takes whole numbers, such as {eta}")
        result["early_terminate"] = {"type": "hyperband", "min_iter": method.grace_steps, "eta": eta, "strict": True}
    return result


def _parameter(key: str, parameter: Parameter) -> dict[str, Any]:
    if parameter.values is not None:
        for value in parameter.values:
            if not isinstance(value, bool | int | float | str):
                raise UserError(f"sweep.parameters.{key}: W&B cannot pass {value!r}; use only strings and numbers")
        return {"values": list(parameter.values)}
    log = parameter.scale == "log"
    low, high = parameter.min, parameter.max
    assert low is not None
    assert high is not None
    if parameter.integer and not log and parameter.step is None:
        return {"distribution": "int_uniform", "min": int(low), "max": int(high)}
    if parameter.step is not None or parameter.integer:
        name = "q_log_uniform_values" if log else "q_uniform"
        return {"distribution": name, "min": low, "max": high, "q": parameter.step or 1.0}
    return {"distribution": "log_uniform_values" if log else "uniform", "min": low, "max": high}


def create(sweep: Sweep, words: list[str]) -> str:
    """Create the sweep on W&B's server and return its name, `ENTITY/PROJECT/ID`. Raise RunError on failure."""
    configuration = sweep_configuration(sweep, words)
    import wandb

    if not wandb.login(prompt=False):
        raise UserError("--wandb: W&B has no credentials here: set WANDB_API_KEY, or run `wandb login`.")
    where = next(iter(sweep.base.runs.values())).tracking
    try:
        identity = wandb.sweep(configuration, entity=where.wandb_entity, project=where.wandb_project)
        return f"{where.wandb_entity or wandb.Api().default_entity}/{where.wandb_project}/{identity}"
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise RunError(f"--wandb: W&B did not create the sweep: {error}") from error


def run_agent(identity: str, *, count: int | None) -> None:
    """Run trials chosen by W&B in sequence, until no trial is left or `count` trials are done."""
    import wandb

    if not wandb.login(prompt=False):
        raise UserError("--agent: W&B has no credentials here: set WANDB_API_KEY, or run `wandb login`.")
    here = str(Path(sys.executable).parent)  # folder of this `rlhf`, because the agent looks up its command
    os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", "")])
    try:
        wandb.agent(identity, count=count)
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise RunError(f"--agent: W&B's agent failed: {error}") from error
