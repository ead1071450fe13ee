"""The command line: finds the command, and says what went wrong.

Exit codes: 0 done, 2 the user's input, 1 anything that fails at run time, 75 preempted: told by SIGTERM to end, run it
again with --resume auto, 130 interrupted. An error is one short paragraph on stderr; a traceback only with --debug.
"""

from __future__ import annotations

import argparse
import select
import shlex
import sys
from collections.abc import Sequence

from rlhf.arguments import parse
from rlhf.commands import COMMANDS
from rlhf.errors import Preempted, RunError, UserError
from rlhf.tracking.logs import hush_imports, redact


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    hush_imports()
    try:
        args = parse(given)
    except UserError as error:
        return _report(error, 2)
    try:
        return COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        return _say(f"interrupted{_how_to_go_on(given, args)}", 130)
    except Preempted as kept:
        return _say(f"preempted: {kept}{_how_to_go_on(given, args)}", 75)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.stderr.close()  # there is no one to tell
            return 1
        if args.debug:
            raise
        known = _known(error)
        if known is None:
            return _report(f"{type(error).__name__}: {error} (unexpected; --debug shows where)", 1)
        return _report(known, 2 if isinstance(known, UserError) else 1)


def _how_to_go_on(given: Sequence[str], args: argparse.Namespace) -> str:
    """With what a run that was cut off is continued."""
    of_wandb = args.command == "sweep" and (args.wandb or args.trial or args.agent is not None)
    if args.command not in ("train", "sweep", "quickstart") or of_wandb:
        return ""
    resume = "" if args.command == "quickstart" or args.resume == "auto" else " --resume auto"
    return f"; continue with: rlhf {shlex.join(given)}{resume}"


def _known(error: BaseException) -> UserError | RunError | None:
    """The error that was meant for the user, also where a task group wraps it."""
    if isinstance(error, UserError | RunError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((known for known in map(_known, error.exceptions) if known is not None), None)
    return None


def _reader_is_gone() -> bool:
    """Whether it is our own output that nobody takes."""
    output = select.poll()
    output.register(1, 0)  # an error is told unasked
    return bool(output.poll(0))


def _report(error: object, code: int) -> int:
    return _say(f"error: {error}", code)


def _say(text: str, code: int) -> int:
    sys.stderr.write(redact(f"rlhf: {text}\n"))
    return code


if __name__ == "__main__":
    sys.exit(main())
