"""`rlhf sweep CONFIG`: compare runs with different values of some keys; also as a native W&B sweep."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, add_quiet, say
from rlhf.errors import UserError
from rlhf.stopping import run_stoppable

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.config.schema.sweep import Sweep
    from rlhf.stopping import StopRequest
    from rlhf.sweeps.results import SweepResult


def add(commands: Subparsers) -> None:
    command = commands.add_parser("sweep", help="vary keys of a configuration over many runs, and find the best")
    command.add_argument("config", metavar="CONFIG", help="YAML file with a sweep section")
    command.add_argument(
        "--resume", choices=("auto", "never"), default="never", help="auto: continue the sweep in its folder"
    )
    command.add_argument("--retry-failed", action="store_true", help="with --resume auto: failed trials too")
    native = command.add_mutually_exclusive_group()
    native.add_argument("--wandb", action="store_true", help="make it a sweep on W&B's server, and say how to run it")
    native.add_argument("--agent", metavar="ID", help="run trials of a sweep that --wandb made")
    native.add_argument(
        "--trial", action="store_true", help="run one trial with the given parameters; --agent calls it"
    )
    command.add_argument("--count", type=int, help="with --agent: so many trials")
    add_quiet(command)
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    """Run the sweep and show its result."""
    from rlhf.config.schema.sweep import load_sweep

    if args.count is not None and args.agent is None:
        raise UserError("--count has no effect without --agent; set sweep.method.trials")
    if args.retry_failed and args.resume != "auto":
        raise UserError("--retry-failed has no effect without --resume auto")
    if args.resume == "auto" and (args.wandb or args.trial or args.agent is not None):
        raise UserError("--resume has no effect with --wandb, --agent or --trial; it continues a sweep of our own")
    if args.agent is not None and args.overrides:
        raise UserError(f"{args.overrides[0]} has no effect with --agent: trials have the keys that --wandb was given")
    if args.trial:
        return _run_trial(args)
    sweep = load_sweep(args.config, args.overrides)
    if args.wandb:
        from rlhf.sweeps.wandb_sweep import create

        words = [args.config, *args.overrides]
        identity = create(sweep, words)
        say(f"made: {identity}\nrun trials of it, here and elsewhere: rlhf sweep {args.config} --agent {identity}\n")
        return 0
    if args.agent is not None:
        from rlhf.sweeps.wandb_sweep import run_agent

        run_agent(args.agent, count=args.count)
        return 0
    result = run_sweep(sweep, resume=args.resume == "auto", retry_failed=args.retry_failed, quiet=args.quiet)
    from rich.console import Console

    Console().print(result.to_table())
    say(f"results: {result.folder}\n")
    if result.best is not None:
        say(f"best: {result.best.trial}; rlhf train {result.folder / 'best.yaml'}\n")
    return 0


def run_sweep(sweep: Sweep, *, resume: bool, retry_failed: bool, quiet: bool) -> SweepResult:
    """Run all trials, or only the remaining ones. A signal ends them as described in `run_stoppable`."""

    def work(_: StopRequest) -> SweepResult:
        from actors.sweeps.runner import run_sweep as start

        return start(sweep, resume=resume, retry_failed=retry_failed, quiet=quiet)

    return run_stoppable(work)


def _run_trial(args: argparse.Namespace) -> int:
    """Run a trial with the parameters of W&B's agent and the overrides of the sweep."""
    from rlhf.commands.train import launch
    from rlhf.config.files.yaml_tree import from_yaml
    from rlhf.config.schema.sweep import load_sweep

    run_id = os.environ.get("WANDB_RUN_ID")
    if run_id is None:
        raise UserError("--trial is for W&B's agent, which names the run in WANDB_RUN_ID; use --agent")
    of_sweep = [word for word in args.overrides if word.startswith("sweep.")]
    varied = load_sweep(args.config, of_sweep).config.parameters
    varied_words = [word for word in args.overrides if word.partition("=")[0] in varied]
    sweep = load_sweep(args.config, [word for word in args.overrides if word not in varied_words])
    parameters = {word.partition("=")[0]: from_yaml(word.partition("=")[2]) for word in varied_words}
    if missing := [key for key in varied if key not in parameters]:
        raise UserError(f"--trial: {missing[0]} is not given; write {missing[0]}=VALUE")
    launch(sweep.trial(parameters, run_id), resume=False, quiet=args.quiet)
    return 0
