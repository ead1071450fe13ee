"""`rlhf train CONFIG`: run a configuration of any method, all stages of a pipeline in turn."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.run import Run
from rlhf.commands.shared import AnyConfig, loaded_config, print_table, starts_work, write_stdout
from rlhf.errors import Interrupted, Preempted, UserError

if TYPE_CHECKING:
    from rlhf.config.files.load import LoadedConfig
    from rlhf.process.stopping import StopRequest
    from rlhf.tracking.callbacks import Callback
    from rlhf.tracking.sinks.backends import TrackerBackend

logger = logging.getLogger(__name__)


@starts_work
def train(
    config: AnyConfig,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    from_step: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    json_lines: bool = False,
    until: int | None = None,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[TrackerBackend | type[TrackerBackend]] = (),
) -> Run:
    """Run a configuration of any method, all stages of a pipeline in turn. Return the run or the pipeline.

    `config` is a YAML file, a mapping with the same keys, or a configuration loaded or built before. Where a
    file names code, a mapping may hold the function, the class or the instance. `resume` continues the run in the
    folder from its newest checkpoint, and `from_step` from the checkpoint of this step. `callbacks` follow the run's
    training stages, and may end a stage. `trackers` are views, besides the trackers of the configuration.

    Args:
        overwrite: replace the run in the folder of run.name.
        json_lines: write progress to stdout as JSON lines, for programs.
        until (STEP): stop after this step, with a checkpoint from which --resume continues.

    Raises:
        UserError: the input is wrong.
        RunError: something failed at run time.
        Preempted: a signal ended the run, and `resume` continues it.
        Interrupted: Ctrl-C ended the run, and `resume` continues it.
    """
    from rlhf.config.schema.stages import run_folder
    from rlhf.preflight.dtypes import chosen_dtype, with_recorded_dtypes
    from rlhf.preflight.start import Start
    from rlhf.process.stopping import run_stoppable
    from rlhf.tracking import logs
    from rlhf.tracking.callbacks import check_callbacks
    from rlhf.tracking.run_folder.folder import refuse_other_run

    check_callbacks(callbacks)
    if not isinstance(trackers, Sequence):
        raise UserError(f"trackers: is of type {type(trackers).__name__}, expected a list of trackers")
    loaded = loaded_config(config, overrides)
    logs.configure()
    start = Start(
        resume=resume or from_step is not None,
        from_step=from_step,
        overwrite=overwrite,
        until=until,
        mode="quiet" if quiet else "json" if json_lines else "auto",
        callbacks=callbacks,
        trackers=trackers,
    )
    if not start.resume and not overwrite:
        for stage in loaded.stages.values():
            refuse_other_run(run_folder(stage))

    if start.resume:
        loaded = with_recorded_dtypes(loaded)
    if sentence := chosen_dtype(loaded):
        logger.info("%s: %s", loaded.name, sentence)

    def work(_: StopRequest) -> None:
        logger.info("%s: loading PyTorch, Ray and vLLM", loaded.name)
        from actors.run.train import launch

        launch(loaded, start)

    try:
        run_stoppable(work)
    except (KeyboardInterrupt, Preempted) as end:
        kind = Preempted if isinstance(end, Preempted) else Interrupted
        raise kind(f"{end}{_resume_point(loaded)}") from end
    return Run(loaded.folder)


def _add(parser: argparse.ArgumentParser) -> None:
    text = "start the run again with --resume auto if its process dies (docs/operations.md has the details)"
    parser.add_argument("--supervise", action="store_true", help=text)


def _present(args: argparse.Namespace) -> int:
    from rlhf.tracking.run_folder.atomic import json_line

    if args.overwrite and args.resume != "never":
        raise UserError("--overwrite has no effect with --resume; remove one of them")
    if args.supervise:
        from rlhf.commands.supervision import supervise

        return supervise(_driver_command(args), _driver_command(args, again=True))
    loaded = loaded_config(args.config, args.overrides)
    from_step = args.resume if isinstance(args.resume, int) else None
    COMMAND.call(args, config=loaded, overrides=(), resume=args.resume == "auto", from_step=from_step)
    if args.json_lines:
        write_stdout(json_line({"event": "done", "run": loaded.name, "folder": str(loaded.folder)}))
        return 0
    if not args.quiet:
        from rlhf.config.schema.stages import run_folder
        from rlhf.evaluation.comparison import before_after

        for stage in loaded.stages.values():
            print_table(before_after(run_folder(stage)))
    write_stdout(f"done: {loaded.folder}\n")
    if not args.quiet:
        sys.stderr.write(_next_steps(loaded))
    return 0


def _driver_command(args: argparse.Namespace, *, again: bool = False) -> list[str]:
    resume = "auto" if again else f"step_{args.resume:06d}" if isinstance(args.resume, int) else args.resume
    flags = {
        "--overwrite": args.overwrite and not again,
        "--quiet": args.quiet,
        "--json": args.json_lines,
        "--debug": args.debug,
    }
    until = [] if args.until is None else ["--until", str(args.until)]
    words = ["train", str(args.config), *args.overrides, "--resume", resume, *until]
    return [sys.executable, "-m", "rlhf.cli", *words, *(flag for flag, given in flags.items() if given)]


def _resume(text: str) -> str | int:
    match = re.fullmatch(r"(?:step_)?(\d{1,12})", text)
    if match is None and text not in ("auto", "never"):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected auto, never, or a checkpoint such as step_000010")
    return text if match is None else int(match[1])


def _next_steps(loaded: LoadedConfig) -> str:
    from rlhf.config.schema.stages import result_of, run_folder

    last = list(loaded.stages.values())[-1]
    folder = shlex.quote(str(run_folder(last)))
    text = f"  rlhf view {folder}      shows it in a browser\n  rlhf report {folder}    writes it as one page\n"
    if (result_of(last) / "config.json").exists():
        text += f"  rlhf generate {folder} --prompt TEXT\n"
    return text


def _resume_point(loaded: LoadedConfig) -> str:
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


RESUME = {
    "action": "store",
    "type": _resume,
    "default": "never",
    "metavar": "{auto,never,STEP}",
    "help": "auto: continue the run in its folder from its newest checkpoint; STEP: continue from this checkpoint, "
    "such as step_000010 (default: never)",
}
COMMAND = Command(
    train,
    _present,
    add=_add,
    exclusive=("quiet", "json_lines"),
    changes={
        "resume": RESUME,
        "from_step": None,
        "json_lines": {"flag": "--json"},
        "callbacks": None,
        "trackers": None,
    },
)
