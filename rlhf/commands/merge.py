"""`rlhf merge CONFIG`: merge several models or adapters into a new model or adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.shared import refuse_other_than_file, starts_work, write_stdout
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.config.schema.merge import MergeRun


def load_merge(path: str | Path, overrides: Sequence[str] = ()) -> MergeRun:
    """Load a YAML file with `merge.key=value` overrides, and return the checked merge."""
    from rlhf.config.files.load import load_merge_file

    refuse_other_than_file(path)
    return load_merge_file(path, overrides)


@starts_work
def merge(config: str | Path | MergeRun, overrides: Sequence[str] = (), *, quiet: bool = False) -> Path:
    """Merge several models or adapters. Return the new folder.

    UserError: the input is wrong. RunError: something failed at run time.

    Args:
        config (CONFIG): a YAML file with a merge section.
    """
    from rlhf.config.schema.merge import MergeRun

    if not isinstance(config, MergeRun):
        config = load_merge(config, overrides)
    elif overrides:
        raise UserError("overrides can change only a file. Build the MergeRun with the values that you want.")

    from rlhf.merging.merge import merge_models

    merge_models(config, config.out, quiet=quiet)
    return config.out


def _present(args: argparse.Namespace) -> None:
    write_stdout(f"done: {COMMAND.call(args)}\n")


COMMAND = Command(merge, _present, changes={"config": {"type": str}})
