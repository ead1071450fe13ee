"""`rlhf serve-reward CONFIG|FUNCTION`: serve rewards over HTTP."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from rlhf.commands.command import Command
from rlhf.commands.shared import AnyConfig, config_or_name, starts_work, write_stdout

REWARD_PORT = 8700


@starts_work
def serve_reward(
    target: AnyConfig,
    overrides: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token_env: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve rewards over HTTP, until SIGINT or SIGTERM. `ready` is called with the URL.

    Args:
        target (CONFIG|FUNCTION): a YAML file with rewards, or a function: a built-in, the name of a reward of an
            installed package, or path/file.py:name.
    """
    from rlhf.scoring.http import serve_scores
    from rlhf.scoring.scorer import scoring_of_config, scoring_of_function

    source = config_or_name(target, overrides)
    if isinstance(source, str):
        scoring = scoring_of_function(source)
    else:
        with source.located():
            scoring = scoring_of_config(source)
    serve_scores(scoring, host=host, port=port, token_env=token_env, ready=ready)


def _present(args: argparse.Namespace) -> None:
    COMMAND.call(args, ready=lambda url: write_stdout(f"serving {url}\n"))


COMMAND = Command(serve_reward, _present, changes={"port": {"default": REWARD_PORT}, "ready": None})
