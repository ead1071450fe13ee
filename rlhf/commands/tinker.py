"""`rlhf tinker CONFIG`: serve a base model to clients that bring their own loops, by the Tinker protocol."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.shared import refuse_other_than_file, stoppable, write_stdout
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.config.schema.service import TinkerConfig

TINKER_PORT = 8703
logger = logging.getLogger(__name__)


def load_service(path: str | Path, overrides: Sequence[str] = ()) -> TinkerConfig:
    """Load a YAML file with `section.key=value` overrides, and return the checked configuration of a server."""
    from rlhf.config.files.load import load_service_file

    refuse_other_than_file(path)
    return load_service_file(path, overrides)


@stoppable
def tinker(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token_env: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a base model to clients with their own loops, by the Tinker protocol, until SIGINT or SIGTERM.

    `ready` is called with the base URL for clients. UserError before anything starts if the configuration or the token
    is wrong. A server that starts again with the same run.name continues all models.

    Args:
        config (CONFIG): a YAML file with the sections run and policy, and possibly service and cluster.
        token_env (NAME): the environment variable with the keys of the clients, separated by commas.
    """
    from rlhf.serving import refuse_taken, serving_token
    from rlhf.tracking import logs

    logs.configure()
    loaded = load_service(config, overrides)
    keys = _keys(serving_token(host, token_env))
    refuse_taken(host, port)
    logger.info("%s: loading PyTorch, Ray and vLLM", loaded.run.name)
    from actors.serving.tinker.start import serve_clients

    serve_clients(loaded, host=host, port=port, keys=keys, ready=ready)


def _keys(token: str | None) -> list[str]:
    """Return the keys of the clients. An empty list: no keys are required. UserError: no client could send a key."""
    keys = [] if token is None else [key.strip() for key in token.split(",")]
    for number, key in enumerate(keys, start=1):
        if not key.startswith("tml-"):
            raise UserError(
                f"--token-env: key {number} of {len(keys)} does not begin with tml-, as every client requires"
            )
    return keys


def _present(args: argparse.Namespace) -> None:
    COMMAND.call(args, ready=lambda url: write_stdout(f"serving {url}\n"))


COMMAND = Command(tinker, _present, changes={"config": {"type": str}, "port": {"default": TINKER_PORT}, "ready": None})
