"""`rlhf convert --from FRAMEWORK FILE`: write the configuration of a run of TRL, verl or OpenRLHF as our YAML."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf.commands.command import Command
from rlhf.commands.shared import write_stdout
from rlhf.errors import UserError
from rlhf.tracking.logs import printable

if TYPE_CHECKING:
    from rlhf.converting.convert import Conversion


def convert(
    file: str | Path,
    framework: Literal["trl", "verl", "openrlhf"],
    *,
    method: str | None = None,
    gpus: int | None = None,
) -> Conversion:
    """Convert a configuration of TRL, verl or OpenRLHF to this framework's YAML, with remarks about each setting.

    Args:
        file (FILE): a YAML file, a shell script with the command, or for TRL a Python script.
        framework: the framework of the file.
        method (NAME): the trainer, such as grpo or sft, if the file does not name it.
        gpus (N): the number of GPUs, if the launcher in the file does not give it.
    """
    from rlhf.converting.convert import convert_file

    if gpus is not None and gpus < 1:
        raise UserError(f"--gpus is {gpus}, but a run needs at least 1")
    return convert_file(Path(file), framework, method=method, gpus=gpus)


def _present(args: argparse.Namespace) -> None:
    result = COMMAND.call(args)
    for remark in result.remarks:
        sys.stderr.write(f"{printable(remark)}\n")
    if args.output is None:
        write_stdout(result.yaml)
        return
    try:
        with args.output.open("x", encoding="utf-8") as file:
            file.write(result.yaml)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written: {error.strerror}") from None
    write_stdout(f"wrote {args.output}; `rlhf plan {args.output}` checks it\n")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="the file to write; the file must not exist")


COMMAND = Command(convert, _present, _add, changes={"framework": {"flag": "--from", "required": True}})
