"""`rlhf dashboard`: a W&B workspace with the graphs of a run in the order in which one reads them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.shared import say
from rlhf.errors import RunError, UserError

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers


def add(commands: Subparsers) -> None:
    """Its arguments."""
    command = commands.add_parser("dashboard", help="make a W&B workspace for the runs of a project")
    command.add_argument("--project", default="rlhf", help="W&B project (tracking.wandb_project); rlhf")
    command.add_argument("--entity", help="W&B user or team; the account's own")
    command.add_argument("--out", type=Path, metavar="FILE", help="write it as JSON, and ask no server")


def run(args: argparse.Namespace) -> int:
    """Save it, or write it down; say where."""
    say(f"{dashboard(project=args.project, entity=args.entity, out=args.out)}\n")
    return 0


def dashboard(*, project: str, entity: str | None, out: Path | None) -> str:
    """The address of the workspace, or the file that was written."""
    import json

    from rlhf.tracking.workspace import make_workspace, serialised

    if out is not None:
        if not out.parent.is_dir():
            raise UserError(f"--out: the folder of {out} does not exist; name a file in one that does")
        workspace = make_workspace(entity=entity or "", project=project)
        out.write_text(json.dumps(serialised(workspace), indent=1) + "\n", encoding="utf-8")
        return str(out)
    import wandb
    from rlhf.tracking.logs import redact

    make_workspace(entity=entity or "", project=project)  # before anybody is asked, whether it can be made
    if not wandb.Api.api_key if False else not wandb.login(prompt=False):
        raise UserError(
            "rlhf dashboard saves to W&B, which has no credentials here: set WANDB_API_KEY, run `wandb login`, or write "
            "the workspace to a file with --out."
        )
    try:
        saved = make_workspace(entity=entity or str(wandb.Api(timeout=30).default_entity), project=project).save()
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise RunError(f"dashboard: W&B did not take the workspace: {redact(str(error))}") from error
    return str(saved.url)
