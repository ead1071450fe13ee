"""`rlhf eval CONFIG|MODEL`: measure a model on held-out data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf.commands.asking import add_decoding, decoding_of, options_given, refuse_options
from rlhf.commands.shared import add_overrides, configuration_or_name, say
from rlhf.errors import UserError
from rlhf.stopping import run_stoppable

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.config.files.load import LoadedConfig
    from rlhf.evaluation.decoding import Decoding
    from rlhf.evaluation.results import Evaluation, Marks
    from rlhf.stopping import StopRequest

Device = Literal["cpu", "cuda"]


def add(commands: Subparsers) -> None:
    command = commands.add_parser("eval", help="measure a model on held-out data")
    command.add_argument(
        "target", metavar="CONFIG|MODEL", help="a run's YAML (its data.eval and rewards), or a model as for generate"
    )
    command.add_argument("--model", metavar="MODEL", help="CONFIG only: this model, not its policy.model")
    command.add_argument("--against", metavar="MODEL", help="win rate against this model, by score")
    command.add_argument("--data", action="append", default=[], metavar="SET", help="file, dataset, or TASK[:ROWS]")
    command.add_argument(
        "--reward", action="append", default=[], metavar="NAME", help="a built-in, or path/file.py:name"
    )
    command.add_argument("--reward-model", metavar="MODEL", help="a reward model whose score is added")
    command.add_argument(
        "--k", type=_whole_numbers, metavar="K,K", help="of pass@k and maj@k; 1, 2, 4, ... if not given"
    )
    command.add_argument("--pass-score", type=float, help="score from which a response passes; 1 for functions")
    command.add_argument(
        "--answer", choices=("last_number", "answer_tag", "boxed", "whole"), help="by what responses vote (maj@k)"
    )
    command.add_argument("--by", metavar="COLUMN", help="report each value of a column beside the whole set")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the results; evals/NAME if not given")
    command.add_argument("--overwrite", action="store_true", help="replace the results that the folder holds")
    command.add_argument("--json", action="store_true", help="print eval.json, not a table")
    add_decoding(command)
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table."""
    import json

    from rlhf.evaluation.results import Marks

    given = options_given(args)
    if args.target.endswith((".yaml", ".yml")):
        refuse_options(given, args.target)
    target = configuration_or_name(args.target, args.overrides)
    evaluation, folder = evaluate(
        target,
        model=args.model,
        against=args.against,
        data=args.data,
        rewards=args.reward,
        reward_model=args.reward_model,
        decoding=decoding_of(target, given) if isinstance(target, str) else None,
        marks=Marks(ks=args.k, pass_score=args.pass_score, answers=args.answer, by=args.by),
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        out=args.out,
        overwrite=args.overwrite,
    )
    if args.json:
        say(json.dumps(evaluation.to_json(), indent=2) + "\n")
        return 0
    from rich.console import Console

    console = Console()
    console.print(evaluation.to_table())
    console.print(f"results: {folder}", highlight=False, soft_wrap=True)
    return 0


def evaluate(
    target: LoadedConfig | str,
    *,
    model: str | None,
    against: str | None,
    data: Sequence[str],
    rewards: Sequence[str],
    reward_model: str | None,
    decoding: Decoding | None,
    marks: Marks,
    device: Device | None,
    trust_remote_code: bool,
    out: Path | None,
    overwrite: bool,
) -> tuple[Evaluation, Path]:
    """Evaluate a run's configuration or a model. Return the result, and the folder with eval.json and samples.jsonl."""
    if isinstance(target, str):
        if model is not None:
            raise UserError(f"--model has no effect: {target} is a model already")
        folder = out or Path("evals", Path(target.removesuffix("/final")).name)
    else:
        without_effect = {
            "--data": (data, "data.eval"),
            "--reward": (rewards, "rewards"),
            "--reward-model": (reward_model, "reward.model"),
            "decoding": (decoding, "eval.temperature, eval.samples_per_prompt, rollouts.max_new_tokens and the like"),
            "--device": (device, "cluster.device"),
            "--trust-remote-code": (trust_remote_code, "policy.trust_remote_code"),
        }
        for option, (value, keys) in without_effect.items():
            if value:
                raise UserError(f"{option} has no effect: {target.source} says it; set {keys} instead, as key=value")
        folder = out or Path("evals", target.name)

    def work(_: StopRequest) -> Evaluation:
        from actors.run.evaluate import evaluate as measure
        from actors.run.evaluate import refuse_unusable_results_folder
        from rlhf.preflight.eval_inputs import inputs_of_model, inputs_of_run
        from rlhf.tracking import logs

        logs.configure()
        if isinstance(target, str):
            inputs = inputs_of_model(
                target,
                data=data,
                rewards=rewards,
                reward_model=reward_model,
                against=against,
                decoding=decoding or decoding_of(target, {}),
                marks=marks,
                device=device or "cpu",
                trust_remote_code=trust_remote_code,
            )
        else:
            with target.located():
                inputs = inputs_of_run(target, model=model, against=against, marks=marks)
        refuse_unusable_results_folder(folder, overwrite=overwrite)
        return measure(inputs, folder)

    return run_stoppable(work), folder


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes whole numbers, such as 1,8, got {text!r}") from None
