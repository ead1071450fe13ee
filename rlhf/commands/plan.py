"""`rlhf plan CONFIG`: show the consequences of a configuration, and check the inputs. Starts no Ray and no engine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.shared import AnyConfig, loaded_config, starts_work, write_stdout
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.config.files.load import LoadedConfig
    from rlhf.config.schema.sweep import Sweep


@starts_work
def plan(
    config: AnyConfig | Sweep,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    shapes: Path | None = None,
    lengths: str | None = None,
    simulate: str | None = None,
) -> str:
    """Check a configuration, and show the derived numbers, placement, memory, time and cost. Return the text.

    For a sweep's file, the text has the trials, the number that fit at once, and the plan of the first. For the numbers
    of `simulate`, call rlhf.planning.footprints and rlhf.planning.simulate.

    Args:
        cluster (NODES): nodes to fit the run into, such as '2*cpu=96,gpu=8,type=h100'.
        shapes (FOLDER): a folder with config.json of models absent from this machine.
        lengths (SPEC): lengths of responses, as lognormal:MEAN:SIGMA, a file, or a run's folder.
        simulate (SPEC): predict the load of the GPUs in scenarios such as 'gpus=64+4096,staleness=0+1,mtbf_h=5000',
            instead of the plan.
    """
    from rlhf.config.files.load import LoadedConfig

    target = _loaded_run_or_sweep(config, overrides)
    if not isinstance(target, LoadedConfig):
        from rlhf.planning.trials import render_sweep

        if simulate is not None:
            raise UserError("--simulate takes one run; give the file that the sweep varies")
        return render_sweep(target, cluster=cluster, shapes=shapes, lengths=lengths)
    if simulate is not None:
        from rlhf.planning import scenarios

        return scenarios.render_scenarios(target, simulate, cluster=cluster, shapes=shapes, lengths=lengths)
    from rlhf.planning.report import render_plan

    return render_plan(target, cluster=cluster, shapes=shapes, lengths=lengths)


def _present(args: argparse.Namespace) -> None:
    """Print the plan, then check the run's inputs on this machine."""
    from rlhf.config.files.load import LoadedConfig

    target = _loaded_run_or_sweep(args.config, args.overrides)
    write_stdout(COMMAND.call(args, config=target, overrides=()))
    if args.simulate is None:
        write_stdout("\ninputs: models, data, rewards, environments, agents\n")
        loaded = target if isinstance(target, LoadedConfig) else target.base
        write_stdout(_check_inputs(loaded, cluster=args.cluster))


def _check_inputs(loaded: LoadedConfig, *, cluster: str | None) -> str:
    """Check the inputs as `rlhf train` does. Return a sentence about the checks, or the reason for none.

    UserError: an input is invalid.
    """
    if cluster is not None:
        return (
            "  not checked, since --cluster describes other machines; without it, those of this machine are checked\n"
        )
    from rlhf.planning.here import missing_here

    with loaded.located():
        missing = missing_here(loaded)
    from rlhf.models.files.hub import why_silent

    hub_names = dict.fromkeys(need.hub_name for need in missing if need.hub_name is not None)
    if any(need.hub_name is None for need in missing) or (hub_names and why_silent()):
        lines = "".join(f"  {need.sentence}\n" for need in missing)
        return f"  not checked, since `rlhf train` does not start on this machine:\n{lines}"
    from rlhf.preflight.inputs import check_files_and_rewards, load_inputs
    from rlhf.process.owned_folders import temporary_folder

    if hub_names:
        with loaded.located():
            check_files_and_rewards(loaded)
        text = "is not downloaded yet, and `rlhf train` downloads it if the hub has it"
        lines = "".join(f"  not checked: {name} {text}\n" for name in hub_names)
        return f"  checked: data files and rewards of training stages\n{lines}"
    with temporary_folder() as folder, loaded.located():  # the tiny model is written to that folder
        load_inputs(replace(loaded, folder=folder), only_checks=True)
    return "  checked: `rlhf train` accepts them\n"


def _loaded_run_or_sweep(config: AnyConfig | Sweep, overrides: Sequence[str]) -> LoadedConfig | Sweep:
    from rlhf.config.files.base_file import read_tree
    from rlhf.config.files.recipes import config_file
    from rlhf.config.schema.sweep import Sweep, load_sweep

    if isinstance(config, Sweep):
        return config
    if isinstance(config, str | Path) and "sweep" in read_tree(config_file(config)).values:
        return load_sweep(config, overrides)
    return loaded_config(config, overrides)


COMMAND = Command(plan, _present, changes={"config": {"type": str}})
