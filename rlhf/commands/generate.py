"""`rlhf generate MODEL`: responses of a model, or a conversation with a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf.commands.command import Command
from rlhf.commands.decoding import add_decoding, decoding_of, options_given
from rlhf.commands.shared import stoppable, typed_lines, write_stdout
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.evaluation.decoding import Decoding, Generation


@stoppable
def generate(
    model: str | PathLike[str],
    prompts: Sequence[str] | Path,
    *,
    decoding: Decoding | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    trust_remote_code: bool = False,
) -> list[Generation]:
    """Return responses of a model to prompts, or hold a conversation on the command line.

    A Path as `prompts` is a file or dataset. The responses have the order of the prompts.

    `model` is a hub name, a model folder, a LoRA adapter's folder, or a run's folder. Without `decoding` there is one
    greedy response, with the system prompt, chat template, columns and stops of the model's training run.
    """
    from actors.serving.generate import generate_responses

    decoding = decoding or decoding_of(str(model), {})
    return generate_responses(str(model), prompts, decoding, device=device, trust_remote_code=trust_remote_code)


def _add(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    text = "answer the prompts of a file or dataset in JSON lines"
    source.add_argument("--file", type=Path, metavar="DATA", help=text)
    source.add_argument("--chat", action="store_true", help="hold a conversation: each line of stdin is a turn")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines to this file instead of stdout")
    add_decoding(parser)


def _present(args: argparse.Namespace) -> None:
    given = options_given(args)
    if args.chat:
        if args.out is not None or given.keys() & {"samples", "columns", "apply_chat_template"}:
            options = "--out, --samples, --column and --no-apply-chat-template"
            raise UserError(f"{options} have no effect with --chat; remove them")
        _chat(args, decoding_of(args.model, {**given, "apply_chat_template": True}))
        return
    decoding = decoding_of(args.model, given)
    if args.out is not None and (args.out.exists() or not args.out.parent.is_dir()):
        raise UserError(f"--out: {args.out} exists already, or its folder does not; name a new file")
    generations = COMMAND.call(args, prompts=args.prompt or args.file, decoding=decoding)
    if args.prompt and args.out is None:
        write_stdout("".join(f"{generation.response}\n" for generation in generations))
        return
    from dataclasses import asdict

    from rlhf.tracking.run_folder.atomic import json_line, write_lines

    if args.out is None:
        write_stdout("".join(json_line(asdict(generation)) for generation in generations))
    else:
        write_lines(args.out, map(asdict, generations))


@stoppable
def _chat(args: argparse.Namespace, decoding: Decoding) -> None:
    from actors.serving.generate import chat

    settings = {"device": args.device, "trust_remote_code": args.trust_remote_code}
    chat(args.model, typed_lines(), lambda text: write_stdout(f"{text}\n"), decoding, **settings)


COMMAND = Command(generate, _present, add=_add, changes={"prompts": None, "decoding": None})
