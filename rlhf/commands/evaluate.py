"""`rlhf eval CONFIG|MODEL`: measure a model on held-out data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.commands.command import Command, add_parameters
from rlhf.commands.decoding import OF_SUITES, add_decoding, decoding_of, option_of, options_given, refuse_options
from rlhf.commands.shared import AnyConfig, config_or_name, model_name, print_table, stoppable, write_stdout
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.config.files.load import LoadedConfig
    from rlhf.evaluation.decoding import Decoding
    from rlhf.evaluation.results import Evaluation, Marks


@stoppable
def evaluate(
    target: AnyConfig,
    overrides: Sequence[str] = (),
    *,
    model: str | PathLike[str] | None = None,
    against: str | PathLike[str] | None = None,
    data: Sequence[str] = (),
    rewards: Sequence[str] = (),
    reward_model: str | PathLike[str] | None = None,
    suites: Sequence[str] = (),
    suite_limit: int | None = None,
    suite_data: str | None = None,
    decoding: Decoding | None = None,
    marks: Marks | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    trust_remote_code: bool = False,
    out: Path | None = None,
    overwrite: bool = False,
) -> Evaluation:
    """Measure a model on held-out data or suites of questions. Write eval.json and samples.jsonl to a folder.

    `target` is a configuration, to measure policy.model or `model` with the configuration's data.eval, rewards and
    eval.suites; or a model, to measure on `data` with `rewards`, on `suites`, or on both. Without `decoding`, the
    settings are those of `generate`.

    Args:
        target (CONFIG|MODEL): a run's YAML file with data.eval and rewards, or a model as for `rlhf generate`.
        model (MODEL): with CONFIG, measure this model instead of policy.model.
        against (MODEL): compare with this model, question by question: win rate, and the probability that MODEL is
            better.
        data (SET): a file, a dataset, preset:NAME[:SPLIT] or TASK[:ROWS]; may be repeated.
        rewards (NAME): a built-in reward, a reward of an installed package, or path/file.py:name; may be
            repeated.
        reward_model (MODEL): a reward model whose score is added.
        suites (NAME,...): ask a suite: reasoning-basic, or a task of lm-evaluation-harness such as gsm8k; may be
            repeated.
        suite_limit (N): the number of questions of each task in a suite; all if not given.
        suite_data (FOLDER): a folder with copies of the suites' data sets, by their names on the hub.
        device: the device of the model; cpu if not given.
        out (FOLDER): the folder for the results; evals/NAME if not given.
        overwrite: replace the existing results in the folder.
    """
    from rlhf.evaluation.results import Marks

    measured, marking = config_or_name(target, overrides), marks or Marks()
    if isinstance(measured, str):
        if model is not None:
            raise UserError(f"--model has no effect, because {measured} is a model already. Remove --model.")
    else:
        without_effect = {
            "--data": (data, "data.eval"),
            "--reward": (rewards, "rewards"),
            "--reward-model": (reward_model, "reward.model"),
            "--suite": (suites, "eval.suites"),
            "--limit": (suite_limit, "eval.suite_limit"),
            "--suite-data": (suite_data, "eval.suite_data"),
            "decoding": (decoding, "eval.temperature, eval.samples_per_prompt, rollouts.max_new_tokens and the like"),
            "--device": (device, "cluster.device"),
            "--trust-remote-code": (trust_remote_code, "policy.trust_remote_code"),
        }
        for option, (value, keys) in without_effect.items():
            if value:
                text = f"{option} has no effect on the configuration {measured.source}"
                raise UserError(f"{text}. Set {keys} as key=value")
    names = [name.strip() for text in suites for name in text.split(",")]
    if not all(names):
        raise UserError(f"--suite {','.join(suites)}: a name is empty. Write names separated by commas")
    for option, value in {"--limit": suite_limit, "--suite-data": suite_data}.items():
        if value is not None and not names:
            raise UserError(f"{option} has no effect without --suite. Name a suite, or remove {option}")
    if suite_limit is not None and suite_limit < 1:
        raise UserError(f"--limit: is {suite_limit}, expected 1 or more")
    folder = _results_folder(measured, out)

    from actors.run.evaluate import evaluate_inputs, refuse_unusable_results_folder
    from rlhf.preflight.eval_inputs import inputs_of_model, inputs_of_run
    from rlhf.process.owned_folders import temporary_folder
    from rlhf.tracking import logs

    logs.configure()
    with temporary_folder() as images:
        if isinstance(measured, str):
            inputs = inputs_of_model(
                measured,
                data=data,
                rewards=rewards,
                reward_model=model_name(reward_model),
                against=model_name(against),
                decoding=decoding or decoding_of(measured, {}, only=OF_SUITES if names and not data else None),
                suites=names,
                suite_limit=suite_limit,
                suite_data=suite_data,
                marks=marking,
                device=device or "cpu",
                trust_remote_code=trust_remote_code,
                images=images,
            )
        else:
            with measured.located():
                inputs = inputs_of_run(measured, model=model_name(model), against=model_name(against), marks=marking)
        refuse_unusable_results_folder(folder, overwrite=overwrite)
        return evaluate_inputs(inputs, folder)


def _results_folder(target: LoadedConfig | str, out: Path | None) -> Path:
    name = Path(target.removesuffix("/final")).name if isinstance(target, str) else target.name
    return out or Path("evals", name)


def _add(parser: argparse.ArgumentParser) -> None:
    from rlhf.evaluation.results import Marks
    from rlhf.evaluation.voting import ANSWER_FORMS

    parser.add_argument("--json", action="store_true", help="print eval.json instead of a table")
    ks = {"flag": "--k", "type": _whole_numbers, "action": "store"}
    changes: dict[str, Any] = {"ks": ks, "answers": {"flag": "--answer", "choices": ANSWER_FORMS}}
    add_parameters(parser.add_argument_group("grading"), Marks, changes, has_defaults=False)
    add_decoding(parser)


def _present(args: argparse.Namespace) -> None:
    import json

    from rlhf.evaluation.results import Marks

    given = options_given(args)
    target = config_or_name(args.target, args.overrides)
    if not isinstance(target, str):
        refuse_options(given, args.target)
    evaluation = COMMAND.call(
        args,
        target=target,
        overrides=(),
        decoding=_decoding(target, given, args) if isinstance(target, str) else None,
        marks=Marks(
            ks=args.ks,
            pass_score=args.pass_score,
            answers=args.answers,
            by=args.by,
            exchange_images=bool(args.exchange_images),
        ),
    )
    if args.json:
        write_stdout(json.dumps(evaluation.to_json(), indent=2) + "\n")
        return
    print_table(evaluation.to_table())
    write_stdout(f"results: {_results_folder(target, args.out)}\n")


def _decoding(model: str, given: Mapping[str, Any], args: argparse.Namespace) -> Decoding:
    """Return the options of a model. UserError: an option has no effect on suites, which set their sampling."""
    if not args.suites or args.data:
        return decoding_of(model, given)
    for name in given:
        if name not in OF_SUITES:
            raise UserError(f"{option_of(name)} has no effect: each suite sets its sampling. Remove it, or give --data")
    return decoding_of(model, given, only=OF_SUITES)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes whole numbers, such as 1,8, got {text!r}") from None


CHANGES = {
    "rewards": {"flag": "--reward"},
    "suites": {"flag": "--suite"},
    "suite_limit": {"flag": "--limit"},
    "decoding": None,
    "marks": None,
}
COMMAND = Command(evaluate, _present, add=_add, changes=CHANGES)
