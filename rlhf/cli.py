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
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from rlhf.errors import RunError, UserError
from rlhf.tracking.logs import hush_imports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlhf.config.load import LoadedConfig
    from rlhf.config.merge import MergeRun
    from rlhf.evaluation.decoding import Decoding, Generation
    from rlhf.evaluation.results import Evaluation, Marks

Device = Literal["cpu", "cuda"]
RECIPES = {"ppo": "quickstart.yaml", "grpo": "quickstart_grpo.yaml"}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    hush_imports()
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

    doctor = commands.add_parser("doctor", help="what is installed, and what to do about it")
    for command in (train, quickstart, merge):
        command.add_argument("--quiet", action="store_true", help="no progress")
    for command in (train, plan, quickstart, merge, evaluate):
        command.add_argument("overrides", metavar="key=value", nargs="*", help="set a key of the configuration")
    for command in (train, plan, quickstart, export, merge, generate, evaluate, doctor):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, frozenset({"train", "plan", "quickstart", "merge", "eval"})


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


def _said_of_decoding(args: argparse.Namespace) -> dict[str, Any]:
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

    decoding = Decoding(**_said_of_decoding(args))
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

    from rlhf.config.load import load
    from rlhf.evaluation.decoding import Decoding
    from rlhf.evaluation.results import Marks

    said = _said_of_decoding(args)
    if said and args.target.endswith((".yaml", ".yml")):
        raise UserError(
            f"--{next(iter(said)).replace('_', '-')} has no effect: {args.target} says how it is sampled; set "
            "eval.temperature, eval.samples_per_prompt, rollouts.max_new_tokens and the like as key=value"
        )
    target: LoadedConfig | str = args.target
    if args.target.endswith((".yaml", ".yml")):
        target = load(args.target, args.overrides)
    elif args.overrides:
        raise UserError(
            f"{args.overrides[0]}: changes a configuration, and {args.target} is a model; give a CONFIG.yaml"
        )
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
