"""`rlhf view RUN [RUN]`: show run folders in a browser, also while the runs train."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from rlhf.commands.command import Command
from rlhf.commands.shared import starts_work, write_stdout

VIEW_PORT = 8701


@starts_work
def view(
    run: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token_env: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Show a run, or two, in a browser, until SIGINT or SIGTERM. `ready` is called with the URL.

    Args:
        run (RUN): the folder of a run or a pipeline.
        against (RUN): the folder of a second run, for a comparison.
        token_env (NAME): the environment variable with the token that browsers must give.
    """
    from rlhf.viewing.server import serve_runs

    folders = [Path(folder) for folder in (run, against) if folder is not None]
    serve_runs(folders, host=host, port=port, token_env=token_env, ready=ready)


def _present(args: argparse.Namespace) -> None:
    login = "" if args.token_env is None else f" (log in with the token in {args.token_env})"
    COMMAND.call(args, ready=lambda url: write_stdout(f"open {url}{login}; Ctrl-C ends it\n"))


COMMAND = Command(view, _present, changes={"port": {"default": VIEW_PORT}, "ready": None})
