"""The command line, and the one module of rlhf that reaches into actors (inside functions, so that help stays fast).

Exit codes: 0 done, 2 the user's input, 1 anything that fails at run time, 130 interrupted. An error is one short
paragraph on stderr; a traceback only with --debug.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.arguments import RECIPES, parse, said_of_decoding
from rlhf.errors import RunError, UserError
from rlhf.tracking.logs import hush_imports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlhf.config.load import LoadedConfig
    from rlhf.config.merge import MergeRun
    from rlhf.config.rewards import RewardPolicy
    from rlhf.evaluation.decoding import Decoding, Generation
    from rlhf.evaluation.results import Evaluation, Marks
    from rlhf.evaluation.scored import ScoredFile

Device = Literal["cpu", "cuda"]
MOST_TOLD = 10  # failures of rewards


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    hush_imports()
    try:
        args = parse(given)
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


def generate(
    model: str, source: Sequence[str] | Path, decoding: Decoding, *, device: Device, trust_remote_code: bool
) -> list[Generation]:
    """Responses to prompts, or to those of a file or dataset."""
    from actors.generate import generate as run

    return run(model, source, decoding, device=device, trust_remote_code=trust_remote_code)


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
) -> tuple[Evaluation, Path]:
    """Evaluate a run's configuration or a model; what was found, and the folder with eval.json and samples.jsonl."""
    from rlhf.evaluation.decoding import Decoding

    if isinstance(target, str):
        if model is not None:
            raise UserError(f"--model has no effect: {target} is a model already")
        folder = out or Path("evals", Path(target.removesuffix("/final")).name)
    else:
        said = {
            "--data": (data, "data.eval"),
            "--reward": (rewards, "rewards"),
            "--reward-model": (reward_model, "reward.model"),
            "decoding": (decoding, "eval.temperature, eval.samples_per_prompt, rollouts.max_new_tokens and the like"),
            "--device": (device, "cluster.device"),
            "--trust-remote-code": (trust_remote_code, "policy.trust_remote_code"),
        }
        for what, (value, keys) in said.items():
            if value:
                raise UserError(f"{what} has no effect: {target.source} says it; set {keys} instead, as key=value")
        folder = out or Path("evals", target.name)
    from actors.eval_inputs import inputs_of_model, inputs_of_run
    from actors.evaluate import evaluate as run
    from actors.evaluate import refuse_unusable_folder
    from rlhf.tracking import logs

    logs.configure()
    if isinstance(target, str):
        inputs = inputs_of_model(
            target,
            data=data,
            rewards=rewards,
            reward_model=reward_model,
            against=against,
            decoding=decoding or Decoding(temperature=0.0),
            marks=marks,
            device=device or "cpu",
            trust_remote_code=trust_remote_code,
        )
    else:
        inputs = inputs_of_run(target, model=model, against=against, marks=marks)
    refuse_unusable_folder(folder)
    return run(inputs, folder), folder


def reward(loaded: LoadedConfig, file: Path) -> tuple[ScoredFile, RewardPolicy]:
    """Score the responses in a file; what the rewards say, and what the configuration makes of failures."""
    from actors.reward import score_file
    from actors.scorer import scoring_of_config

    scoring = scoring_of_config(loaded)
    return score_file(scoring, file), scoring.policy


def serve_reward(
    target: LoadedConfig | str, *, host: str, port: int, token_env: str | None, ready: Callable[[str], None]
) -> None:
    """Serve a configuration's rewards, or one function, until it is interrupted."""
    from actors.scorer import scoring_of_config, scoring_of_function
    from actors.serve_reward import serve

    scoring = scoring_of_function(target) if isinstance(target, str) else scoring_of_config(target)
    serve(scoring, host=host, port=port, token_env=token_env, ready=ready)


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
    if args.command == "generate":
        return _generate(args)
    if args.command == "eval":
        return _evaluate(args)
    if args.command == "reward":
        return _reward(args)
    if args.command == "serve-reward":
        serve_reward(
            _configuration_or_name(args.target, args.overrides),
            host=args.host,
            port=args.port,
            token_env=args.token_env,
            ready=lambda url: _say(f"serving {url}\n"),
        )
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
    if not args.quiet:
        _show_evaluations(loaded)
    sys.stdout.write(f"done: {loaded.folder}\n")
    return 0


def _show_evaluations(loaded: LoadedConfig) -> None:
    """Of each run that has some by responses, the first and the last."""
    from rich.console import Console

    from rlhf.config.stages import run_folder
    from rlhf.evaluation.comparison import before_after

    for stage in loaded.stages.values():
        table = before_after(run_folder(stage))
        if table is not None:
            Console().print(table)


def _generate(args: argparse.Namespace) -> int:
    from rlhf.evaluation.decoding import Decoding

    decoding = Decoding(**said_of_decoding(args))
    settings: dict[str, Any] = {"device": args.device or "cpu", "trust_remote_code": args.trust_remote_code}
    if args.chat:
        if args.out is not None or decoding.samples > 1 or not decoding.apply_chat_template:
            raise UserError("--out, --samples and --no-chat-template have no effect with --chat; remove them")
        from actors.generate import chat

        chat(args.model, _turns(), lambda text: _say(f"{text}\n"), decoding, **settings)
        return 0
    if args.out is not None and (args.out.exists() or not args.out.parent.is_dir()):
        raise UserError(f"--out: {args.out} exists already, or its folder does not; name a new file")
    found = generate(args.model, args.prompt or args.file, decoding, **settings)
    if args.prompt and args.out is None:
        _say("".join(f"{one.response}\n" for one in found))
        return 0
    from dataclasses import asdict

    from rlhf.tracking.atomic import json_line, write_lines

    if args.out is None:
        _say("".join(json_line(asdict(one)) for one in found))
    else:
        write_lines(args.out, map(asdict, found))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    import json

    from rlhf.evaluation.decoding import Decoding
    from rlhf.evaluation.results import Marks

    said = said_of_decoding(args)
    if said and args.target.endswith((".yaml", ".yml")):
        raise UserError(
            f"--{next(iter(said)).replace('_', '-')} has no effect: {args.target} says how it is sampled; set "
            "eval.temperature, eval.samples_per_prompt, rollouts.max_new_tokens and the like as key=value"
        )
    target = _configuration_or_name(args.target, args.overrides)
    found, folder = evaluate(
        target,
        model=args.model,
        against=args.against,
        data=args.data,
        rewards=args.reward,
        reward_model=args.reward_model,
        decoding=Decoding(**({"temperature": 0.0} | said)) if said else None,
        marks=Marks(ks=args.k, pass_score=args.pass_score, answers=args.answer, by=args.by),
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        out=args.out,
    )
    if args.json:
        _say(json.dumps(found.to_json(), indent=2) + "\n")
        return 0
    from rich.console import Console

    console = Console()
    console.print(found.to_table())
    console.print(f"results: {folder}", highlight=False, soft_wrap=True)
    return 0


def _configuration_or_name(target: str, overrides: Sequence[str]) -> LoadedConfig | str:
    """A YAML file's configuration, or the name as it is. UserError for overrides of what has no keys."""
    if target.endswith((".yaml", ".yml")):
        from rlhf.config.load import load

        return load(target, overrides)
    if overrides:
        raise UserError(f"{overrides[0]}: changes a configuration, and {target} is none; give a CONFIG.yaml")
    return target


def _reward(args: argparse.Namespace) -> int:
    """The table or the lines; then the failures, which are an error where the policy says so."""
    from rlhf.config.load import load
    from rlhf.tracking.atomic import json_line

    found, policy = reward(load(args.config, args.overrides), args.file)
    if args.json:
        _say("".join(map(json_line, found.to_json())))
    else:
        from rich.console import Console

        Console().print(found.to_table())
    if found.errors:
        told = "\n".join(f"{place}: {one.reward}: {one.kind}: {one.message}" for place, one in found.errors[:MOST_TOLD])
        more = len(found.errors) - MOST_TOLD
        sys.stderr.write(told + (f"\nand {more} more\n" if more > 0 else "\n"))
        if policy.on_error == "fail":
            raise RunError(
                f"{found.num_unscored} of {len(found.rows)} rows have no score, and reward_policy.on_error is fail"
            )
    return 0


def _turns() -> Iterator[str]:
    """The user's lines, asked for where a person types them; blank ones are passed over."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            _say("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def recipe(name: str) -> Path:
    """A file of configs/: of the repository that this package is installed from, or else of the current folder."""
    folders = (Path(__file__).resolve().parent.parent / "configs", Path("configs"))
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{name}: not found in {' or '.join(map(str, folders))}; run this from the repository's folder")


def _quickstart(loaded: LoadedConfig, *, quiet: bool) -> int:
    """Train, show before and after, and say whether it worked. A quickstart that was cut off goes on."""
    from rlhf.config.stages import run_folder
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
