"""`rlhf plan CONFIG`: show the consequences of a configuration, and check its inputs. Starts no Ray and no engine."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, say
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.config.files.load import LoadedConfig
    from rlhf.config.schema.sweep import Sweep


def add(commands: Subparsers) -> None:
    command = commands.add_parser("plan", help="check a configuration and show its plan")
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument("--cluster", metavar="NODES", help="fit it into nodes such as '2*cpu=96,gpu=8,type=h100'")
    command.add_argument(
        "--shapes", metavar="FOLDER", type=Path, help="where config.json of models that are not here lie"
    )
    command.add_argument(
        "--lengths", metavar="SPEC", help="of responses: lognormal:MEAN:SIGMA, a file, or a run's folder"
    )
    command.add_argument(
        "--simulate", metavar="SPEC", help="predict how busy GPUs are, such as 'gpus=64+4096,staleness=0+1,mtbf_h=5000'"
    )
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    """Print the plan, then check the run's inputs on this machine."""
    from rlhf.config.files.load import LoadedConfig

    target = _read(args.config, args.overrides)
    settings = {"cluster": args.cluster, "shapes": args.shapes, "lengths": args.lengths}
    say(plan(target, (), simulate=args.simulate, **settings))
    if args.simulate is None:
        say("\ninputs: models, data, rewards, environments\n")
        say(check_inputs(target if isinstance(target, LoadedConfig) else target.base, cluster=args.cluster))
    return 0


def plan(
    config: str | Path | LoadedConfig | Sweep,
    overrides: Sequence[str],
    *,
    cluster: str | None,
    shapes: Path | None,
    lengths: str | None,
    simulate: str | None,
) -> str:
    """Return the text, of a run or of a file for `rlhf sweep`."""
    from rlhf.config.files.load import LoadedConfig

    target = _read(config, overrides) if isinstance(config, str | Path) else config
    if not isinstance(target, LoadedConfig):
        from rlhf.planning.trials import render_sweep

        if simulate is not None:
            raise UserError("--simulate is of one run; give the file that the sweep varies")
        return render_sweep(target, cluster=cluster, shapes=shapes, lengths=lengths)
    if simulate is not None:
        from rlhf.planning import scenarios

        return scenarios.render_scenarios(target, simulate, cluster=cluster, shapes=shapes, lengths=lengths)
    from rlhf.planning.report import render_plan

    return render_plan(target, cluster=cluster, shapes=shapes, lengths=lengths)


def check_inputs(loaded: LoadedConfig, *, cluster: str | None) -> str:
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
    if missing:
        lines = "".join(f"  {sentence}\n" for sentence in missing)
        return f"  not checked, since `rlhf train` does not start on this machine:\n{lines}"
    from rlhf.preflight.inputs import load_inputs

    with tempfile.TemporaryDirectory() as folder, loaded.located():  # the tiny model is written to that folder
        load_inputs(replace(loaded, folder=Path(folder)))
    return "  checked: `rlhf train` takes them\n"


def _read(config: str | Path, overrides: Sequence[str]) -> LoadedConfig | Sweep:
    from rlhf.config.files.base import read_tree
    from rlhf.config.files.load import load
    from rlhf.config.files.recipes import config_file

    file = config_file(config)
    if "sweep" in read_tree(file).values:
        from rlhf.config.schema.sweep import load_sweep

        return load_sweep(file, overrides)
    return load(file, overrides)
