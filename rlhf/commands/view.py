"""`rlhf view RUN [RUN]`: run folders in a browser, while the runs go on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.shared import say

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers

VIEW_PORT = 8701


def add(commands: Subparsers) -> None:
    command = commands.add_parser("view", help="look at a run, or two, in a browser")
    command.add_argument("run", metavar="RUN", type=Path, help="folder of a run or a pipeline")
    command.add_argument("against", metavar="RUN", type=Path, nargs="?", help="another one to compare it with")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback: a token")
    command.add_argument("--port", type=int, default=VIEW_PORT, help=f"0: a free one; {VIEW_PORT} if not given")
    command.add_argument("--token-env", metavar="NAME", help="variable with the token that browsers must give")


def run(args: argparse.Namespace) -> int:
    from rlhf.viewing.server import view

    folders = [folder for folder in (args.run, args.against) if folder is not None]
    login = "" if args.token_env is None else f" (log in with the token in {args.token_env})"
    view(
        folders,
        host=args.host,
        port=args.port,
        token_env=args.token_env,
        ready=lambda url: say(f"open {url}{login}; Ctrl-C ends it\n"),
    )
    return 0
