"""`rlhf report RUN [RUN ...]`: run folders as one self-contained HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.shared import say

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers


def add(commands: Subparsers) -> None:
    command = commands.add_parser(
        "report", help="run folders as one HTML file: diagnosis, curves, samples, differences"
    )
    command.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run or a pipeline")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="RUN/report.html if not given; of several runs RUN/comparison.html"
    )


def run(args: argparse.Namespace) -> int:
    """Write it; the worst findings go to the terminal too."""
    from rlhf.reporting.report import write_report

    written = write_report(args.runs, args.out)
    for name, findings in written.findings.items():
        for finding in findings:
            say(f"{finding.severity}: {name}, steps {finding.first_step} to {finding.last_step}: {finding.what}\n")
    say("".join(f"written: {path}\n" for path in (written.html, *written.pictures)))
    return 0
