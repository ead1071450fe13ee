"""`rlhf plan CONFIG`: show the consequences of a configuration, and check the inputs. Starts no Ray and no engine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.shared import AnyConfig, loaded_config, starts_work, write_stdout

if TYPE_CHECKING:
    from rlhf.config.files.load import LoadedConfig


@starts_work
def plan(
    config: AnyConfig,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    shapes: Path | None = None,
    lengths: str | None = None,
) -> str:
    """Check a configuration, and show the derived numbers, placement, memory, time and cost. Return the text.

    For a sweep's file, the text has the plan of the run with the first values. For the numbers of a plan, call
    rlhf.planning.footprints and rlhf.planning.simulate.

    Args:
        cluster (NODES): nodes to fit the run into, such as '2*cpu=96,gpu=8,type=h100'.
        shapes (FOLDER): a folder with config.json of models absent from this machine.
        lengths (SPEC): lengths of responses, as lognormal:MEAN:SIGMA, a file, or a run's folder.
    """
    from rlhf.planning.report import render_plan

    loaded = _loaded_run(config, overrides)
    return render_plan(loaded, cluster=cluster, shapes=shapes, lengths=lengths)


def _present(args: argparse.Namespace) -> None:
    loaded = _loaded_run(args.config, args.overrides)
    write_stdout(COMMAND.call(args, config=loaded, overrides=()))
    write_stdout("\ninputs: models, data, rewards, environments, agents\n")
    write_stdout(_check_inputs(loaded, cluster=args.cluster))


def _check_inputs(loaded: LoadedConfig, *, cluster: str | None) -> str:
    """Check the inputs as `rlhf train` does. Return a sentence about the checks, or the reason for none."""
    if cluster is not None:
        return "  not checked, since --cluster describes other machines; leave it out to check this machine's inputs\n"
    from rlhf.planning.here import missing_here

    with loaded.located():
        missing = missing_here(loaded)
    from rlhf.models.files.hub import why_silent

    hub_names = dict.fromkeys(need.hub_name for need in missing if need.hub_name is not None)
    if any(need.hub_name is None for need in missing) or (hub_names and why_silent()):
        lines = "".join(f"  {need.sentence}\n" for need in missing)
        return f"  not checked, since `rlhf train` does not start on this machine:\n{lines}"
    from rlhf.preflight.inputs import StageInputs, check_files_and_rewards, load_inputs
    from rlhf.process.owned_folders import temporary_folder

    if hub_names:
        with loaded.located():
            check_files_and_rewards(loaded)
        text = "is not downloaded yet, and `rlhf train` downloads it if the hub has it"
        lines = "".join(f"  not checked: {name} {text}\n" for name in hub_names)
        return f"  checked: data files and rewards of training stages\n{lines}"
    with temporary_folder() as folder, loaded.located():  # the tiny model is written to that folder
        stages = load_inputs(replace(loaded, folder=folder), only_checks=True)
    notes = dict.fromkeys(note for stage in stages if isinstance(stage, StageInputs) for note in stage.notes)
    return "".join(["  checked: `rlhf train` accepts them\n", *(f"  {note}\n" for note in notes)])


def _loaded_run(config: AnyConfig, overrides: Sequence[str]) -> LoadedConfig:
    """Return the run, or of a sweep's file the run with the first values. UserError: any trial is invalid."""
    from rlhf.config.files.base_file import read_tree
    from rlhf.config.files.recipes import config_file
    from rlhf.config.files.sweep import load_sweep
    from rlhf.sweeps.space import known_trials

    if isinstance(config, str | Path) and "sweep" in read_tree(config_file(config)).values:
        sweep = load_sweep(config, overrides)
        known_trials(sweep)
        return sweep.base
    return loaded_config(config, overrides)


COMMAND = Command(plan, _present, changes={"config": {"type": str}})
