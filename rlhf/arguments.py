"""What may stand on the command line: commands, their options, and what is wrong with others. Does nothing."""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path
from typing import Any, NoReturn

from rlhf.errors import UserError

RECIPES = {"ppo": "quickstart.yaml", "grpo": "quickstart_grpo.yaml"}  # of the quickstart
REWARD_PORT = 8700


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `{self.prog} --help` shows what there is")


def parse(argv: list[str]) -> argparse.Namespace:
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

    generate = commands.add_parser("generate", help="responses of a model, or a conversation with it")
    generate.add_argument("model", metavar="MODEL", help="model folder, hub name, LoRA adapter folder or run folder")
    given = generate.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    given.add_argument("--file", type=Path, metavar="DATA", help="prompts of a file or dataset; answered as JSON lines")
    given.add_argument("--chat", action="store_true", help="each line on stdin is a turn; ends with it (Ctrl-D)")
    generate.add_argument("--out", type=Path, metavar="FILE", help="JSON lines go here, not to stdout")

    evaluate = commands.add_parser("eval", help="measure a model on held-out data")
    evaluate.add_argument(
        "target", metavar="CONFIG|MODEL", help="a run's YAML (its data.eval and rewards), or a model as for generate"
    )
    evaluate.add_argument("--model", metavar="MODEL", help="CONFIG only: this model, not its policy.model")
    evaluate.add_argument("--against", metavar="MODEL", help="win rate against this model, by score")
    evaluate.add_argument("--data", action="append", default=[], metavar="SET", help="file, dataset, or TASK[:ROWS]")
    evaluate.add_argument(
        "--reward", action="append", default=[], metavar="NAME", help="a built-in, or path/file.py:name"
    )
    evaluate.add_argument("--reward-model", metavar="MODEL", help="a reward model whose score is added")
    evaluate.add_argument(
        "--k", type=_whole_numbers, metavar="K,K", help="of pass@k and maj@k; 1, 2, 4, ... if not given"
    )
    evaluate.add_argument("--pass-score", type=float, help="score from which a response passes; 1 for functions")
    evaluate.add_argument(
        "--answer", choices=("last_number", "answer_tag", "boxed", "whole"), help="by what responses vote (maj@k)"
    )
    evaluate.add_argument("--by", metavar="COLUMN", help="report each value of a column beside the whole set")
    evaluate.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the results; evals/NAME if not given")
    evaluate.add_argument("--json", action="store_true", help="print eval.json, not a table")
    for command in (generate, evaluate):
        _add_decoding(command)

    reward = commands.add_parser("reward", help="a configuration's rewards over responses in a file, without training")
    reward.add_argument("config", metavar="CONFIG", help="YAML file")
    reward.add_argument(
        "--file",
        type=Path,
        metavar="DATA",
        required=True,
        help="rows with prompt, response and columns, or a run's samples",
    )
    reward.add_argument("--json", action="store_true", help="print a line for each row, not a table")

    serve = commands.add_parser("serve-reward", help="serve rewards over HTTP")
    serve.add_argument(
        "target", metavar="CONFIG|FUNCTION", help="the rewards of a YAML file; a built-in, or path/file.py:name"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; others than this machine's: a token")
    serve.add_argument("--port", type=int, default=REWARD_PORT, help=f"0 takes a free one; {REWARD_PORT} if not given")
    serve.add_argument("--token-env", metavar="NAME", help="environment variable with the token that callers must give")

    doctor = commands.add_parser("doctor", help="what is installed, and what to do about it")
    for command in (train, quickstart, merge):
        command.add_argument("--quiet", action="store_true", help="no progress")
    for command in (train, plan, quickstart, merge, evaluate, reward, serve):
        command.add_argument("overrides", metavar="key=value", nargs="*", help="set a key of the configuration")
    for command in (train, plan, quickstart, export, merge, generate, evaluate, reward, serve, doctor):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, frozenset({"train", "plan", "quickstart", "merge", "eval", "reward", "serve-reward"})


def _add_decoding(command: argparse.ArgumentParser) -> None:
    """Options of sampling. None of those of a Decoding has a default here: what is not given is not said."""
    add = command.add_argument
    add("--samples", type=int, metavar="N", help="responses to each prompt; 1")
    add("--temperature", type=float, help="0 is greedy; generate: 1, eval: 0")
    add("--top-p", type=float, help="nucleus sampling; 1 keeps all tokens")
    add("--top-k", type=int, help="sample among the k likeliest tokens")
    add("--max-new-tokens", type=int, metavar="N", help="tokens of a response, at most; 256")
    add("--stop", action="append", metavar="TEXT", help="ends a response; may be repeated")
    add("--seed", type=int, help="of sampling and intervals; 0")
    add("--system-prompt", metavar="TEXT", help="put before every prompt by the chat template")
    add("--no-chat-template", action="store_true", default=None, help="string prompts go to the model as they are")
    add("--device", choices=("cpu", "cuda"), help="cpu if not given")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def said_of_decoding(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a Decoding that the arguments give."""
    names = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "system_prompt")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.stop is not None:
        given["stop"] = tuple(args.stop)
    if args.no_chat_template is not None:
        given["apply_chat_template"] = False
    return given


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
