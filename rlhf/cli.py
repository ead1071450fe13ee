"""Parse the arguments of the command line, run the command, and report errors.

Exit codes: 0 done, 2 the user's input is wrong, 1 a failure at run time, 75 a signal other than Ctrl-C or a full disk
ended the run, and --resume auto continues it, 130 Ctrl-C ended it. An error is one short paragraph on stderr; --debug
adds a traceback.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import select
import shlex
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from rlhf.commands import COMMANDS
from rlhf.errors import Preempted, UserError, known_error
from rlhf.process import early_end
from rlhf.process.driver_parent import is_supervised
from rlhf.process.stopping import end_process_after_work, leave, leave_stuck_threads
from rlhf.tracking.logs import printable, redact

INTERRUPTED, PREEMPTED = 130, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of the arguments, and return the exit code. Without `argv` this is the whole process."""
    if argv is not None:
        return _main(list(argv))
    _repair_streams()
    early_end.raise_interrupts()
    end_process_after_work()
    code = _main(sys.argv[1:])
    early_end.end_in_silence()
    if code in (INTERRUPTED, PREEMPTED):
        leave(code)
    leave_stuck_threads(code)
    return code


def _repair_streams() -> None:
    """Make writing never fail: a closed stream becomes /dev/null, and characters outside the locale are escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # Python's value for a stream closed at its start
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  for the whole process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _main(words: list[str]) -> int:
    try:
        args = parse_arguments(words)
    except UserError as error:
        return _end(f"error: {error}", 2)
    try:
        return COMMANDS[args.command].run(args)
    except KeyboardInterrupt as end:
        return _end(f"interrupted{f': {end}' if str(end) else ''}{_how_to_continue(words, args)}", INTERRUPTED)
    except Preempted as end:
        return _end(f"preempted: {end}{_how_to_continue(words, args)}", PREEMPTED)
    except Exception as error:  # noqa: BLE001  it becomes a message and an exit code
        if early_end.INTERRUPTED.is_set():
            return _end(f"interrupted{_how_to_continue(words, args)}", INTERRUPTED)
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.stderr.close()  # nobody reads the output
            return 1
        if args.debug:
            sys.stderr.write(printable(redact(traceback.format_exc())))
        known = known_error(error)
        if known is None:
            how = "unexpected" if args.debug else "unexpected; --debug shows the traceback"
            return _end(f"error: {type(error).__name__}: {error} ({how})", 1)
        return _end(f"error: {known}", 2 if isinstance(known, UserError) else 1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `{self.prog} --help` shows the choices")


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Parse the words into a command with its options. UserError: invalid words."""
    parser = _Parser(prog="rlhf", description="Post-training on Ray: from a laptop CPU to a cluster.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("ray-rlhf"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.summary, description=f"{command.summary}.")
        if name in words:
            command.add_arguments(added)
    if words and words[0] not in COMMANDS and (near := _nearest(words[0], COMMANDS)):
        raise UserError(f"rlhf has no command {words[0]}; did you mean {near}? `rlhf --help` shows the commands")
    args, extra = parser.parse_known_args(words)
    takes_overrides = "overrides" in args
    if extra and (not takes_overrides or any(word.startswith("-") for word in extra)):
        unknown = [word for word in extra if word.startswith("-")] or extra
        options = commands.choices[args.command]._option_string_actions
        near = _nearest(unknown[0].partition("=")[0], options)
        raise UserError(
            f"{args.command} has no argument {' '.join(unknown)}{f'; did you mean {near}?' if near else '.'} "
            f"`rlhf {args.command} --help` shows all arguments"
        )
    if takes_overrides:
        args.overrides = [*args.overrides, *extra]  # argparse does not parse overrides after an option
    return args


def _nearest(word: str, words: Iterable[str]) -> str | None:
    from rlhf.config.mistakes.suggestions import nearest  # only for an error: the import takes time

    return nearest(word, list(words))


def _how_to_continue(given: Sequence[str], args: argparse.Namespace) -> str:
    if args.command not in ("train", "sweep", "quickstart"):
        return ""
    option = " --supervise" if is_supervised() else ""
    if args.command == "quickstart" or args.resume == "auto":
        return f". Continue with: rlhf {shlex.join(given)}{option}"
    words = [word for word in given if word != "--overwrite"]
    if "--resume" in words:  # `--resume STEP`: the run has passed this step
        del words[words.index("--resume") : words.index("--resume") + 2]
    return f". Continue with: rlhf {shlex.join(words)} --resume auto{option}"


def _reader_is_gone() -> bool:
    output = select.poll()
    output.register(1, 0)  # poll reports errors without a request
    return bool(output.poll(0))


def _end(text: str, code: int) -> int:
    sys.stderr.write(printable(redact(f"rlhf: {text}\n")))
    return code


if __name__ == "__main__":
    sys.exit(main())
