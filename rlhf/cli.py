"""The command line: finds the command, and says what went wrong.

Exit codes: 0 done, 2 the user's input, 1 anything that fails at run time, 75 preempted: told by SIGTERM to end, run it
again with --resume auto, 130 interrupted. An error is one short paragraph on stderr; a traceback only with --debug.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from rlhf.arguments import parse
from rlhf.commands import COMMANDS
from rlhf.errors import Preempted, RunError, UserError
from rlhf.tracking.logs import hush_imports


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
        sys.stderr.write(f"rlhf: interrupted{_how_to_go_on(given, args.command)}\n")
        return 130
    except Preempted as kept:
        sys.stderr.write(f"rlhf: preempted: {kept}{_how_to_go_on(given, args.command)}\n")
        return 75
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


def _how_to_go_on(given: Sequence[str], command: str) -> str:
    """With what a run that was cut off is continued."""
    if command not in ("train", "sweep", "quickstart"):
        return ""
    resume = "" if "--resume" in given or command == "quickstart" else " --resume auto"
    return f"; continue with: rlhf {shlex.join(given)}{resume}"


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
