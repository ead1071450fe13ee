"""`rlhf dashboard`: a W&B workspace with the graphs of a run in the order of reading."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlhf.commands.command import Command
from rlhf.commands.shared import starts_work, write_stdout


@starts_work
def dashboard(*, project: str = "rlhf", entity: str | None = None, out: str | Path | None = None) -> str:
    """Make a W&B workspace for the runs of a project. Return its address, or the file.

    UserError: no credentials, or wandb-workspaces is not installed. RunError: W&B refused the workspace.

    Args:
        project (NAME): the W&B project (tracking.wandb_project).
        entity (NAME): the W&B user or team; the account's default if not given.
        out (FILE): write the workspace to this file as JSON, without a server.
    """
    from rlhf.tracking.sinks.wandb_workspace import publish

    return publish(project=project, entity=entity, out=None if out is None else Path(out))


def _present(args: argparse.Namespace) -> None:
    write_stdout(f"{COMMAND.call(args)}\n")


COMMAND = Command(dashboard, _present)
