"""The command line, and the one module of rlhf that reaches into actors (inside functions, so that help stays fast).

Exit codes: 0 done, 2 the user's input, 1 anything that fails at run time, 130 interrupted. An error is one short
paragraph on stderr; a traceback only with --debug.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rlhf.errors import RunError, UserError

if TYPE_CHECKING:
    from rlhf.config.load import LoadedConfig
    from rlhf.config.merge import MergeRun

RECIPES = {"ppo": "quickstart.yaml", "grpo": "quickstart_grpo.yaml"}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(given)
    except UserError as error:
        return _report(error, 2)
    try:
        return _run(args)
    except KeyboardInterrupt:
        resume = "" if "--resume" in given or args.command != "train" else " --resume auto"
        again = f"; continue with: rlhf {shlex.join(given)}{resume}" if args.command in ("train", "quickstart") else ""
        sys.stderr.write(f"rlhf: interrupted{again}\n")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; there is no one to tell
        return 1
    except Exception as error:
        if args.debug:
            raise
        known = _known(error)
        if known is None:
            return _report(f"{type(error).__name__}: {error} (unexpected; --debug shows where)", 1)
        return _report(known, 2 if isinstance(known, UserError) else 1)


def launch(loaded: LoadedConfig, *, resume: bool, quiet: bool) -> None:
    """Run all stages in turn."""
    from actors.launch import launch as run

    run(loaded, resume=resume, quiet=quiet)


def export(run: Path, folder: Path, *, step: int | None) -> None:
    """Write a checkpoint of a run as a Hugging Face folder."""
    from actors.export import export_checkpoint

    export_checkpoint(run, step=step, folder=folder)


def merge(config: MergeRun, *, quiet: bool) -> None:
    """Merge models or adapters into the folder that the section names."""
    from rlhf.merging.merge import merge_models

    merge_models(config, config.out, quiet=quiet)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `{self.prog} --help` shows what there is")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser, with_overrides = _parser()
    args, extra = parser.parse_known_args(argv)
    if extra and (args.command not in with_overrides or any(word.startswith("-") for word in extra)):
        wrong = [word for word in extra if word.startswith("-")] or extra
        raise UserError(
            f"{args.command} does not know {' '.join(wrong)}; `rlhf {args.command} --help` shows what it knows"
        )
    if args.command in with_overrides:
        args.overrides = [*args.overrides, *extra]  # argparse leaves those that follow an option
    return args


def _parser() -> tuple[argparse.ArgumentParser, frozenset[str]]:
    """The parser, and the commands that take overrides."""
    parser = _Parser(prog="rlhf", description="Post-training on Ray: from a laptop CPU to a cluster.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("ray-rlhf"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    train = commands.add_parser("train", help="run a configuration, of whatever method")
    train.add_argument("config", metavar="CONFIG", help="YAML file")
    train.add_argument(
        "--resume", choices=("auto", "never"), default="never", help="auto: continue the run in its folder"
    )

    plan = commands.add_parser("plan", help="check a configuration and show what follows from it")
    plan.add_argument("config", metavar="CONFIG", help="YAML file")
    plan.add_argument("--cluster", metavar="NODES", help="fit it into nodes such as '2*cpu=96,gpu=8+1*cpu=16'")

    quickstart = commands.add_parser("quickstart", help="train a tiny model on this machine, in minutes")
    quickstart.add_argument("--algorithm", choices=tuple(RECIPES), default="ppo", help="which recipe")

    export = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    export.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    export.add_argument("folder", metavar="FOLDER", type=Path, help="folder to make")
    export.add_argument("--step", type=int, help="step of the checkpoint; the latest one if not given")

    merge = commands.add_parser("merge", help="merge models or adapters into one")
    merge.add_argument("config", metavar="CONFIG", help="YAML file with a merge section")

    doctor = commands.add_parser("doctor", help="what is installed, and what to do about it")
    for command in (train, quickstart, merge):
        command.add_argument("--quiet", action="store_true", help="no progress")
    for command in (train, plan, quickstart, merge):
        command.add_argument("overrides", metavar="key=value", nargs="*", help="set a key of the configuration")
    for command in (train, plan, quickstart, export, merge, doctor):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, frozenset({"train", "plan", "quickstart", "merge"})


def _run(args: argparse.Namespace) -> int:
    if args.command == "doctor":
        from actors.doctor import doctor

        return doctor()
    if args.command == "export":
        export(args.run, args.folder, step=args.step)
        return 0
    if args.command == "merge":
        from rlhf.config.merge import load_merge

        merging = load_merge(args.config, args.overrides)
        merge(merging, quiet=args.quiet)
        sys.stdout.write(f"done: {merging.out}\n")
        return 0
    from rlhf.config.load import load

    if args.command == "quickstart":
        return _quickstart(load(recipe(RECIPES[args.algorithm]), args.overrides), quiet=args.quiet)
    loaded = load(args.config, args.overrides)
    if args.command == "plan":
        from rlhf.config.plan import render

        sys.stdout.write(render(loaded, cluster=args.cluster))
        return 0
    launch(loaded, resume=args.resume == "auto", quiet=args.quiet)
    sys.stdout.write(f"done: {loaded.folder}\n")
    return 0


def recipe(name: str) -> Path:
    """A file of configs/: of the repository that this package is installed from, or else of the current folder."""
    folders = (Path(__file__).resolve().parent.parent / "configs", Path("configs"))
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{name}: not found in {' or '.join(map(str, folders))}; run this from the repository's folder")


def _quickstart(loaded: LoadedConfig, *, quiet: bool) -> int:
    """Train, show before and after, and say whether it worked. A quickstart that was cut off goes on."""
    from rlhf.config.load import run_folder
    from rlhf.quickstart import show

    launch(loaded, resume=True, quiet=quiet)
    show(run_folder(list(loaded.stages.values())[-1]))
    return 0


def _known(error: BaseException) -> UserError | RunError | None:
    """The error that was meant for the user, also where a task group wraps it."""
    if isinstance(error, UserError | RunError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((known for known in map(_known, error.exceptions) if known is not None), None)
    return None


def _report(error: object, code: int) -> int:
    sys.stderr.write(f"rlhf: error: {error}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
