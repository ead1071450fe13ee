"""`rlhf sweep CONFIG`: compare runs with different values of some keys; also as a native W&B sweep."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.shared import print_table, refuse_other_than_file, starts_work, stoppable, write_stdout
from rlhf.commands.train import train
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.sweeps.trial_results import SweepResult


@stoppable
def sweep(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    retry_failed: bool = False,
    quiet: bool = False,
) -> SweepResult:
    """Vary keys of a configuration over many runs, and find the best. The section `sweep` names the keys.

    `resume` continues the sweep in its folder. UserError: the input is wrong. RunError: all trials failed.

    Args:
        config (CONFIG): a YAML file with a sweep section.
        retry_failed: with --resume auto, repeat failed trials too.
    """
    from rlhf.config.schema.sweep import load_sweep

    refuse_other_than_file(config)
    loaded = load_sweep(config, overrides)

    from actors.sweeps.runner import run_sweep

    return run_sweep(loaded, resume=resume, retry_failed=retry_failed, quiet=quiet)


@starts_work
def make_wandb_sweep(config: str | Path, overrides: Sequence[str] = ()) -> str:
    """Create the file's sweep on W&B's server. W&B agents run its trials. Return `ENTITY/PROJECT/ID`.

    UserError: the input is wrong, or there are no credentials. RunError: the server did not create the sweep.
    """
    from rlhf.config.schema.sweep import load_sweep
    from rlhf.sweeps.wandb_sweep import create

    refuse_other_than_file(config)
    return create(load_sweep(config, overrides), [str(config), *overrides])


@starts_work
def run_wandb_agent(sweep: str, *, count: int | None = None) -> None:
    """Run trials of a sweep from `make_wandb_sweep`, until W&B has no more or `count` are done."""
    from rlhf.sweeps.wandb_sweep import run_agent

    run_agent(sweep, count=count)


def _add(parser: argparse.ArgumentParser) -> None:
    wandb = parser.add_mutually_exclusive_group()
    wandb.add_argument("--wandb", action="store_true", help="create the sweep on W&B's server, and show how to run it")
    wandb.add_argument("--agent", metavar="ID", help="run trials of a sweep created with --wandb")
    wandb.add_argument("--trial", action="store_true", help="run one trial with the given parameters; --agent calls it")
    parser.add_argument("--count", type=int, metavar="N", help="with --agent, the number of trials")


def _present(args: argparse.Namespace) -> None:
    """Run the sweep and show the result."""
    if args.count is not None and args.agent is None:
        raise UserError("--count has no effect without --agent; set sweep.method.trials")
    if args.retry_failed and args.resume != "auto":
        raise UserError("--retry-failed has no effect without --resume auto")
    if args.resume == "auto" and (args.wandb or args.trial or args.agent is not None):
        raise UserError("--resume has no effect with --wandb, --agent or --trial, which continue no local sweep")
    if args.agent is not None and args.overrides:
        raise UserError(f"{args.overrides[0]} has no effect with --agent: trials have the keys that --wandb was given")
    if args.trial:
        _run_trial(args)
    elif args.wandb:
        identity = make_wandb_sweep(args.config, args.overrides)
        write_stdout(f"created: {identity}\nto run its trials: rlhf sweep {args.config} --agent {identity}\n")
    elif args.agent is not None:
        from rlhf.config.schema.sweep import load_sweep

        load_sweep(args.config)
        run_wandb_agent(args.agent, count=args.count)
    else:
        _show(COMMAND.call(args, resume=args.resume == "auto"))


def _show(result: SweepResult) -> None:
    print_table(result.to_table())
    write_stdout(f"results: {result.folder}\n")
    if result.best is not None:
        write_stdout(f"best: {result.describe_best()}; rlhf train {result.folder / 'best.yaml'}\n")


def _run_trial(args: argparse.Namespace) -> None:
    """Run a trial with the parameters of W&B's agent and the overrides of the sweep."""
    from rlhf.config.files.yaml_tree import from_yaml
    from rlhf.config.schema.sweep import load_sweep

    run_id = os.environ.get("WANDB_RUN_ID")
    if run_id is None:
        raise UserError("--trial is for W&B's agent, which names the run in WANDB_RUN_ID; use --agent")
    of_sweep = [word for word in args.overrides if word.startswith("sweep.")]
    varied = load_sweep(args.config, of_sweep).config.parameters
    varied_words = [word for word in args.overrides if word.partition("=")[0] in varied]
    loaded = load_sweep(args.config, [word for word in args.overrides if word not in varied_words])
    parameters = {word.partition("=")[0]: from_yaml(word.partition("=")[2]) for word in varied_words}
    if missing := [key for key in varied if key not in parameters]:
        raise UserError(f"--trial: {missing[0]} is not given; write {missing[0]}=VALUE")
    train(loaded.trial(parameters, run_id), quiet=args.quiet)


RESUME = {
    "action": "store",
    "choices": ("auto", "never"),
    "default": "never",
    "help": "auto: continue the sweep in its folder (default: never)",
}
COMMAND = Command(sweep, _present, add=_add, changes={"resume": RESUME})
