"""`rlhf train CONFIG`: run a configuration of any method, all stages of a pipeline in turn."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, add_progress, say
from rlhf.errors import Preempted, UserError
from rlhf.stopping import run_stoppable

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.config.files.load import LoadedConfig
    from rlhf.stopping import StopRequest

logger = logging.getLogger(__name__)


def add(commands: Subparsers) -> None:
    command = commands.add_parser("train", help="run a configuration of any method")
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument(
        "--resume",
        type=_resume,
        default="never",
        metavar="{auto,never,STEP}",
        help="auto: continue the run in its folder, from its newest checkpoint; STEP: from that one, as step_000010",
    )
    command.add_argument(
        "--until", type=int, metavar="STEP", help="stop after this step, with a checkpoint to --resume from"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the run that the folder of run.name holds")
    add_progress(command)
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    """Train, and show the evaluations."""
    from rlhf.config.files.load import load
    from rlhf.tracking.run_folder.atomic import json_line

    if args.overwrite and args.resume != "never":
        raise UserError("--overwrite has no effect with --resume; remove one of them")
    loaded = load(args.config, args.overrides)
    launch(
        loaded,
        resume=args.resume != "never",
        from_step=args.resume if isinstance(args.resume, int) else None,
        overwrite=args.overwrite,
        quiet=args.quiet,
        json_lines=args.json,
        until=args.until,
    )
    if args.json:
        say(json_line({"event": "done", "run": loaded.name, "folder": str(loaded.folder)}))
        return 0
    if not args.quiet:
        _show_evaluations(loaded)
    say(f"done: {loaded.folder}\n")
    if not args.quiet:
        sys.stderr.write(_next_steps(loaded))
    return 0


def _next_steps(loaded: LoadedConfig) -> str:
    """Return the commands that show or use the trained model."""
    from rlhf.config.schema.stages import result_of, run_folder

    last = list(loaded.stages.values())[-1]
    folder = shlex.quote(str(run_folder(last)))
    text = f"  rlhf view {folder}      shows it in a browser\n  rlhf report {folder}    writes it as one page\n"
    if (result_of(last) / "config.json").exists():
        text += f"  rlhf generate {folder} --prompt TEXT\n"
    return text


def _resume(text: str) -> str | int:
    """Parse the value of --resume: a word, or the step of a checkpoint."""
    match = re.fullmatch(r"(?:step_)?(\d{1,12})", text)
    if match is None and text not in ("auto", "never"):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected auto, never, or a checkpoint such as step_000010")
    return text if match is None else int(match[1])


def launch(
    loaded: LoadedConfig,
    *,
    resume: bool,
    quiet: bool,
    from_step: int | None = None,
    overwrite: bool = False,
    json_lines: bool = False,
    until: int | None = None,
) -> None:
    """Run all stages in turn. A signal ends them as `run_stoppable` says."""

    from rlhf.config.schema.stages import run_folder
    from rlhf.tracking import logs
    from rlhf.tracking.run_folder.folder import refuse_other_run

    logs.configure()
    if not resume and not overwrite:
        for stage in loaded.stages.values():
            refuse_other_run(run_folder(stage))

    def work(_: StopRequest) -> None:
        logger.info("%s: loading PyTorch, Ray and vLLM", loaded.name)
        from actors.run.train import launch as start

        start(
            loaded,
            resume=resume,
            from_step=from_step,
            overwrite=overwrite,
            quiet=quiet,
            json_lines=json_lines,
            until=until,
        )

    try:
        run_stoppable(work)
    except (KeyboardInterrupt, Preempted) as end:
        raise type(end)(f"{end}{_continues(loaded)}") from end


def _continues(loaded: LoadedConfig) -> str:
    """Say from where the run, or the first unfinished stage of a pipeline, continues."""
    from rlhf.config.schema.stages import result_of, run_folder

    for stage in loaded.stages.values():
        if result_of(stage).exists():
            continue
        subject = f"stage {stage.run.name}" if loaded.is_pipeline else "the run"
        latest = run_folder(stage) / "checkpoints/latest"
        if not latest.exists():
            return f"; there is no checkpoint, so {subject} starts from the beginning"
        step = int(latest.readlink().name.removeprefix("step_"))
        return f"; {subject} continues after step {step}"
    return ""


def _show_evaluations(loaded: LoadedConfig) -> None:
    """Show the first and the last evaluation of each run with evaluations by responses."""
    from rich.console import Console

    from rlhf.config.schema.stages import run_folder
    from rlhf.evaluation.comparison import before_after

    for stage in loaded.stages.values():
        table = before_after(run_folder(stage))
        if table is not None:
            Console().print(table)
