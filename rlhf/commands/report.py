"""`rlhf report RUN [RUN ...]`: write run folders as a self-contained HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.shared import run_folders, write_stdout

if TYPE_CHECKING:
    from rlhf.viewing.report import Report


def report(runs: str | PathLike[str] | Sequence[str | PathLike[str]], *, out: Path | None = None) -> Report:
    """Write run folders as an HTML file: diagnosis, curves, samples, differences. The result holds the problems.

    UserError: a folder holds no run, or the file cannot be written.

    Args:
        runs (RUN): the folder of a run or a pipeline.
        out (FILE): the file to write; RUN/report.html, or RUN/comparison.html for several runs, if not given.
    """
    from rlhf.viewing.report import write_report

    return write_report(run_folders(runs), out)


def _present(args: argparse.Namespace) -> None:
    written = COMMAND.call(args)
    for name, findings in written.findings.items():
        for finding in findings:
            steps = f"steps {finding.first_step} to {finding.last_step}"
            write_stdout(f"{finding.severity}: {name}, {steps}: {finding.what}\n")
    write_stdout("".join(f"written: {path}\n" for path in (written.html, *written.pictures)))


COMMAND = Command(report, _present, changes={"runs": {"nargs": "+", "type": str}})
