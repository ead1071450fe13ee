"""`rlhf export RUN FOLDER`: write a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.stopping import run_stoppable

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.stopping import StopRequest


def add(commands: Subparsers) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    command.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    command.add_argument("folder", metavar="FOLDER", type=Path, help="folder to make")
    command.add_argument("--step", type=int, help="step of the checkpoint; the latest one if not given")
    command.add_argument("--merged", action="store_true", help="of a LoRA run: a whole model with the adapter in it")
    command.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to this repository of the hub")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the run's model"
    )


def run(args: argparse.Namespace) -> int:
    export(
        args.run,
        args.folder,
        step=args.step,
        merged=args.merged,
        push_to_hub=args.push_to_hub,
        trust_remote_code=args.trust_remote_code,
    )
    return 0


def export(
    run: Path, folder: Path, *, step: int | None, merged: bool, push_to_hub: str | None, trust_remote_code: bool
) -> None:
    """Write a checkpoint of a run as a Hugging Face folder, and upload it if a repository is named."""

    def work(_: StopRequest) -> None:
        from actors.run.export import export_checkpoint

        export_checkpoint(
            run,
            step=step,
            folder=folder,
            merged=merged,
            push_to_hub=push_to_hub,
            trust_remote_code=trust_remote_code,
        )

    run_stoppable(work)
