"""`rlhf generate MODEL`: responses of a model, or a conversation with it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.commands.asking import add_decoding, decoding_of, options_given
from rlhf.commands.shared import say, typed_lines
from rlhf.errors import UserError
from rlhf.stopping import run_stoppable

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.evaluation.decoding import Decoding, Generation
    from rlhf.stopping import StopRequest

Device = Literal["cpu", "cuda"]


def add(commands: Subparsers) -> None:
    command = commands.add_parser("generate", help="responses of a model, or a conversation with it")
    command.add_argument("model", metavar="MODEL", help="model folder, hub name, LoRA adapter folder or run folder")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    source.add_argument(
        "--file", type=Path, metavar="DATA", help="prompts of a file or dataset; answered as JSON lines"
    )
    source.add_argument("--chat", action="store_true", help="each line on stdin is a turn; ends with it (Ctrl-D)")
    command.add_argument("--out", type=Path, metavar="FILE", help="JSON lines go here, not to stdout")
    add_decoding(command)


def run(args: argparse.Namespace) -> int:
    """Answer the prompts, or start a conversation."""
    given = options_given(args)
    if args.chat:
        if args.out is not None or given.keys() & {"samples", "columns", "apply_chat_template"}:
            raise UserError("--out, --samples, --column and --no-chat-template have no effect with --chat; remove them")
        given["apply_chat_template"] = True
    decoding = decoding_of(args.model, given)
    settings: dict[str, Any] = {"device": args.device or "cpu", "trust_remote_code": args.trust_remote_code}
    if args.chat:

        def work(_: StopRequest) -> None:
            from actors.serving.generate import chat

            chat(args.model, typed_lines(), lambda text: say(f"{text}\n"), decoding, **settings)

        run_stoppable(work)
        return 0
    if args.out is not None and (args.out.exists() or not args.out.parent.is_dir()):
        raise UserError(f"--out: {args.out} exists already, or its folder does not; name a new file")
    generations = generate(args.model, args.prompt or args.file, decoding, **settings)
    if args.prompt and args.out is None:
        say("".join(f"{generation.response}\n" for generation in generations))
        return 0
    from dataclasses import asdict

    from rlhf.tracking.run_folder.atomic import json_line, write_lines

    if args.out is None:
        say("".join(json_line(asdict(generation)) for generation in generations))
    else:
        write_lines(args.out, map(asdict, generations))
    return 0


def generate(
    model: str, source: Sequence[str] | Path, decoding: Decoding | None, *, device: Device, trust_remote_code: bool
) -> list[Generation]:
    """Return responses to prompts, or to the prompts of a file or dataset. decoding None: use the settings of the
    model's run.
    """
    decoding = decoding or decoding_of(model, {})

    def work(_: StopRequest) -> list[Generation]:
        from actors.serving.generate import generate as answer

        return answer(model, source, decoding, device=device, trust_remote_code=trust_remote_code)

    return run_stoppable(work)
