"""`rlhf view RUN [RUN ...]`: show run folders in a browser, also while the runs train."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from os import PathLike

from rlhf.commands.command import Command
from rlhf.commands.shared import run_folders, starts_work, write_stdout

VIEW_PORT = 8701


@starts_work
def view(
    runs: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token_env: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Show runs in a browser, until SIGINT or SIGTERM. `ready` is called with the URL.

    Args:
        runs (RUN): the folder of a run or a pipeline.
        token_env (NAME): the environment variable with the token that browsers must give.
    """
    from rlhf.viewing.server import serve_runs

    serve_runs(run_folders(runs), host=host, port=port, token_env=token_env, ready=ready)


def _present(args: argparse.Namespace) -> None:
    login = "" if args.token_env is None else f" (log in with the token in {args.token_env})"
    COMMAND.call(args, ready=lambda url: write_stdout(f"open {url}{login}; Ctrl-C ends it\n"))


COMMAND = Command(
    view,
    _present,
    changes={"runs": {"nargs": "+", "type": str}, "port": {"default": VIEW_PORT}, "ready": None},
)
