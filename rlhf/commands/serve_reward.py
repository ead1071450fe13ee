"""`rlhf serve-reward CONFIG|FUNCTION`: serve rewards over HTTP."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, configuration_or_name, say

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.config.files.load import LoadedConfig

REWARD_PORT = 8700


def add(commands: Subparsers) -> None:
    command = commands.add_parser("serve-reward", help="serve rewards over HTTP")
    command.add_argument(
        "target", metavar="CONFIG|FUNCTION", help="the rewards of a YAML file; a built-in, or path/file.py:name"
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback: a token")
    command.add_argument("--port", type=int, default=REWARD_PORT, help=f"0: a free one; {REWARD_PORT} if not given")
    command.add_argument("--token-env", metavar="NAME", help="variable with the token that callers must give")
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    serve_reward(
        configuration_or_name(args.target, args.overrides),
        host=args.host,
        port=args.port,
        token_env=args.token_env,
        ready=lambda url: say(f"serving {url}\n"),
    )
    return 0


def serve_reward(
    target: LoadedConfig | str, *, host: str, port: int, token_env: str | None, ready: Callable[[str], None]
) -> None:
    """Serve a configuration's rewards, or one function, until interrupted."""
    from rlhf.scoring.http import serve
    from rlhf.scoring.scorer import scoring_of_config, scoring_of_function

    if isinstance(target, str):
        scoring = scoring_of_function(target)
    else:
        with target.located():
            scoring = scoring_of_config(target)
    serve(scoring, host=host, port=port, token_env=token_env, ready=ready)
