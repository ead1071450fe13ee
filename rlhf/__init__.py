"""Post-training on Ray. The commands as typed calls; importing this package imports nothing heavy.

loaded = rlhf.load_config("configs/ppo_smollm2.yaml", ["train.steps=3"])
sys.stdout.write(rlhf.plan(loaded))
folder = rlhf.train(loaded)
rlhf.evaluate(loaded, model=str(folder)).sets[0].metrics["score"]
rlhf.generate(str(folder), ["What is 7 times 8?"])[0].response
rlhf.reward(loaded, "responses.jsonl").rows[0].score
rlhf.follow_job(rlhf.submit("configs/ppo_smollm2.yaml", address="http://head:8265")).exit_code
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.errors import Preempted, RunError, UserError
from rlhf.tracking.logs import hush_imports

hush_imports()

if TYPE_CHECKING:
    from actors.doctor.results import CheckResult
    from actors.jobs.submit import JobEnd
    from rlhf.config.files.load import LoadedConfig
    from rlhf.config.schema.merge import MergeRun
    from rlhf.config.schema.root import Config
    from rlhf.evaluation.decoding import Decoding, Generation
    from rlhf.evaluation.results import Evaluation, Marks
    from rlhf.evaluation.scored import ScoredFile
    from rlhf.reporting.report import Report
    from rlhf.rollouts.records.spans import Played
    from rlhf.sweeps.results import SweepResult

    AnyConfig = str | Path | Mapping[str, Any] | Config | LoadedConfig

__all__ = [
    "Preempted",
    "RunError",
    "UserError",
    "cluster_doctor",
    "dashboard",
    "doctor",
    "evaluate",
    "export",
    "follow_job",
    "generate",
    "job_status",
    "load_config",
    "load_merge",
    "make_wandb_sweep",
    "merge",
    "plan",
    "play",
    "quickstart",
    "report",
    "reward",
    "run_wandb_agent",
    "serve",
    "serve_reward",
    "stop_job",
    "submit",
    "sweep",
    "train",
    "view",
]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Load a YAML file with `section.key=value` overrides, and return the checked configuration.

    UserError names every mistake.
    """
    from rlhf.config.files.load import load

    return load(path, overrides)


def plan(
    config: AnyConfig,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    shapes: Path | None = None,
    lengths: str | None = None,
    simulate: str | None = None,
) -> str:
    """Return the output of `rlhf plan`: derived numbers, placement, memory, time and cost.

    For a sweep's file: its trials, how many fit at once, and the plan of the first.

    Args:
        cluster: nodes such as `2*cpu=96,gpu=8,type=h100` to fit the run into.
        shapes: a folder with config.json of models that are not on this machine.
        lengths: response lengths, as `lognormal:MEAN:SIGMA` or a file.
        simulate: scenarios such as `gpus=64+4096,staleness=0+1` instead of the plan. For numbers call
            rlhf.planning.footprints and rlhf.planning.simulate.
    """
    from rlhf.commands.plan import plan as text_of

    source = config if isinstance(config, str | Path) else _loaded(config, overrides)
    return text_of(source, overrides, cluster=cluster, shapes=shapes, lengths=lengths, simulate=simulate)


def train(
    config: AnyConfig,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    from_step: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    json_lines: bool = False,
    until: int | None = None,
) -> Path:
    """Run a configuration, all stages of a pipeline in turn. Returns the folder of the run or the pipeline.

    Args:
        config: a YAML file, a mapping with the same keys, or a configuration loaded or built before. In a
            mapping, a reward's `function` may be a function of a Python file.
        from_step: resume from the checkpoint of this step, not the newest.
        overwrite: replace the existing run in the folder.
        quiet: show no progress.
        json_lines: write progress to stdout as JSON lines.
        until: stop after this step, with a checkpoint from which `resume` continues.

    Raises:
        UserError: the input is wrong.
        RunError: something failed at run time.
        Preempted: a signal ended the run, and `resume` continues it.
        KeyboardInterrupt: Ctrl-C ended the run, and `resume` continues it.
    """
    from rlhf.commands.train import launch

    loaded = _loaded(config, overrides)
    resume = resume or from_step is not None
    launch(
        loaded,
        resume=resume,
        from_step=from_step,
        overwrite=overwrite,
        quiet=quiet,
        json_lines=json_lines,
        until=until,
    )
    return loaded.folder


def sweep(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    retry_failed: bool = False,
    quiet: bool = False,
) -> SweepResult:
    """Vary keys of a configuration over many runs, as in the file's section `sweep`, and return the result.

    resume: continue the sweep in its folder; retry_failed: also repeat its failed trials. UserError: the input is
    wrong. RunError: all trials failed.
    """
    from rlhf.commands.sweep import run_sweep
    from rlhf.config.schema.sweep import load_sweep

    return run_sweep(load_sweep(config, overrides), resume=resume, retry_failed=retry_failed, quiet=quiet)


def make_wandb_sweep(config: str | Path, overrides: Sequence[str] = ()) -> str:
    """Create the file's sweep on W&B's server. W&B agents run its trials. Returns `ENTITY/PROJECT/ID`.

    UserError: the input is wrong, or there are no credentials. RunError: the server did not create the sweep.
    """
    from rlhf.config.schema.sweep import load_sweep
    from rlhf.sweeps.wandb_sweep import create

    return create(load_sweep(config, overrides), [str(config), *overrides])


def run_wandb_agent(sweep: str, *, count: int | None = None) -> None:
    """Run trials of a sweep from `make_wandb_sweep`, until W&B has no more or `count` are done."""
    from rlhf.sweeps.wandb_sweep import run_agent

    run_agent(sweep, count=count)


def quickstart(
    algorithm: Literal["ppo", "grpo"] = "ppo", overrides: Sequence[str] = (), *, quiet: bool = False
) -> Path:
    """Train a tiny model on this machine in minutes, and show its improvement. Returns the pipeline's folder.

    An interrupted quickstart continues. RunError: the model has not reached the expected accuracy.
    """
    from rlhf.commands.quickstart import quickstart as run

    return run(algorithm, overrides, quiet=quiet)


def export(
    run: str | Path,
    folder: str | Path,
    *,
    step: int | None = None,
    merged: bool = False,
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the checkpoint of a step (the latest if None) of the run in folder `run` as a Hugging Face folder.

    Args:
        merged: for a run with LoRA, write a whole model with the adapter in its weights instead of an adapter folder.
        push_to_hub: the hub repository, OWNER/NAME, for an upload of the folder. None: no upload.
        trust_remote_code: run the code in the run's model folder, if the run did.
    """
    from rlhf.commands.export import export as write

    write(
        Path(run),
        Path(folder),
        step=step,
        merged=merged,
        push_to_hub=push_to_hub,
        trust_remote_code=trust_remote_code,
    )


def load_merge(path: str | Path, overrides: Sequence[str] = ()) -> MergeRun:
    """Load a YAML file with `merge.key=value` overrides, and return the checked merge. UserError
    names every mistake.
    """
    from rlhf.config.schema.merge import load_merge as load

    return load(path, overrides)


def merge(config: str | Path | MergeRun, overrides: Sequence[str] = (), *, quiet: bool = False) -> Path:
    """Merge models or adapters. Returns the new folder.

    UserError: the input is wrong. RunError: something failed at run time.
    """
    from rlhf.commands.merge import merge as run

    if isinstance(config, str | Path):
        config = load_merge(config, overrides)
    elif overrides:
        raise UserError("overrides change a file; build the MergeRun with the values you want instead")
    run(config, quiet=quiet)
    return config.out


def generate(
    model: str | Path,
    prompts: Sequence[str] | Path,
    *,
    decoding: Decoding | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    trust_remote_code: bool = False,
) -> list[Generation]:
    """Return responses to prompts, or to the prompts of a file or dataset (a Path), in order.

    model: a hub name, a model folder, a LoRA adapter's folder, or a run's folder. decoding None: one greedy response,
    with the system prompt, chat template, columns and stops of the run that produced the model.
    """
    from rlhf.commands.generate import generate as run

    return run(str(model), prompts, decoding, device=device, trust_remote_code=trust_remote_code)


def serve(
    model: str | Path,
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token_env: str | None = None,
    engines: int = 1,
    tensor_parallel: int = 1,
    kv_cache_gib: int | None = None,
    max_length: int | None = None,
    deadline_s: float = 600.0,
    device: Literal["cpu", "cuda"] = "cpu",
    trust_remote_code: bool = False,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a model through OpenAI's interface, until SIGINT or SIGTERM. `ready` is called with the base URL.

    Args:
        model: as for `generate`; requests name it `name`.
        token_env: the environment variable with the callers' token, required for hosts beyond this machine.
        kv_cache_gib: the cache of each engine on a CPU.
        max_length: the maximum number of tokens in a prompt and its response.
    """
    from rlhf.commands.serve import serve as run

    run(
        str(model),
        name=name,
        host=host,
        port=port,
        token_env=token_env,
        engines=engines,
        tensor_parallel=tensor_parallel,
        kv_cache_gib=kv_cache_gib,
        max_length=max_length,
        deadline_s=deadline_s,
        device=device,
        trust_remote_code=trust_remote_code,
        ready=ready,
    )


def evaluate(
    target: AnyConfig,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    against: str | None = None,
    data: Sequence[str] = (),
    rewards: Sequence[str] = (),
    reward_model: str | None = None,
    decoding: Decoding | None = None,
    marks: Marks | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    trust_remote_code: bool = False,
    out: Path | None = None,
    overwrite: bool = False,
) -> Evaluation:
    """Measure a model on held-out data; eval.json and samples.jsonl go to `out`, or to evals/NAME.

    Args:
        target: a configuration (or its YAML), to measure its policy.model or `model` with its data.eval and rewards;
            or a model, to measure on `data` with `rewards`, in the form of the options of `rlhf eval`.
        decoding: None: as in `generate`.
        overwrite: replace the existing results in the folder.
    """
    from rlhf.commands.evaluate import evaluate as run
    from rlhf.evaluation.results import Marks

    is_model = isinstance(target, str | Path) and not str(target).endswith((".yaml", ".yml"))
    if is_model and overrides:
        raise UserError(f"overrides change a configuration, and {target} is a model")
    evaluation, _ = run(
        str(target) if is_model else _loaded(target, overrides),
        model=model,
        against=against,
        data=data,
        rewards=rewards,
        reward_model=reward_model,
        decoding=decoding,
        marks=marks or Marks(),
        device=device,
        trust_remote_code=trust_remote_code,
        out=out,
        overwrite=overwrite,
    )
    return evaluation


def report(runs: str | Path | Sequence[str | Path], *, out: Path | None = None) -> Report:
    """Write run folders as one HTML file, to `out` or into the (first) run's folder. The result holds the problems.

    UserError: a folder holds no run, or the file cannot be written.
    """
    from rlhf.reporting.report import write_report

    return write_report([Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)], out)


def dashboard(*, project: str = "rlhf", entity: str | None = None, out: str | Path | None = None) -> str:
    """Make a W&B workspace for the runs of a project; returns its address. `out`: a file for it, without a server.

    UserError: no credentials, or wandb-workspaces is not installed. RunError: W&B did not take it.
    """
    from rlhf.tracking.sinks.wandb_workspace import publish

    return publish(project=project, entity=entity, out=None if out is None else Path(out))


def reward(config: AnyConfig, file: str | Path, overrides: Sequence[str] = ()) -> ScoredFile:
    """Score the responses in a file with a configuration's rewards. A failing reward is part of the result.

    file: rows with `prompt`, `response` and the columns of the rewards, or samples written by a run.
    """
    from rlhf.commands.reward import reward as run

    scored, _ = run(_loaded(config, overrides), Path(file))
    return scored


def play(
    config: AnyConfig, turns: Iterable[str], show: Callable[[str], None], overrides: Sequence[str] = (), *, row: int = 1
) -> Played:
    """Play one conversation with the configuration's environment.

    Each element of `turns` stands for a turn of the policy. `show` gets the policy's input before it.
    """
    from rlhf.commands.play import play as run

    return run(_loaded(config, overrides), turns, show, row=row)


def serve_reward(
    target: AnyConfig,
    overrides: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token_env: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a configuration's rewards, or one function by name, until SIGINT or SIGTERM.

    `ready` is called with the URL. token_env: the environment variable with the callers' token, required for hosts
    beyond this machine.
    """
    from rlhf.commands.serve_reward import serve_reward as run

    is_function = isinstance(target, str | Path) and not str(target).endswith((".yaml", ".yml"))
    if is_function and overrides:
        raise UserError(f"overrides change a configuration, and {target} is a function")
    source = str(target) if is_function else _loaded(target, overrides)
    run(source, host=host, port=port, token_env=token_env, ready=ready)


def doctor() -> tuple[CheckResult, ...]:
    """Check this machine for training, print the findings and return them. A `bad` finding makes
    training impossible.
    """
    from rlhf.commands.doctor import doctor as look

    return look()


def cluster_doctor(config: AnyConfig | None = None, *, address: str | None = None) -> tuple[CheckResult, ...]:
    """Check whether the nodes of a Ray cluster fit together, print the findings and return them.

    With a configuration it also checks paths and room. address: HOST:PORT of the cluster; the default is
    cluster.address, then RAY_ADDRESS.
    """
    from rlhf.commands.doctor import cluster_doctor as look

    return look(None if config is None else _loaded(config, ()), address)


def submit(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    env: Sequence[str] = (),
    cpus: float = 0.0,
    memory_gib: float = 0.0,
    resources: Mapping[str, float] | None = None,
) -> str:
    """Run the YAML file, below the current folder, as a job of a Ray cluster, or continue its run. Returns the job's
    id.

    address: the address of the dashboard, or RAY_ADDRESS. env: names of variables passed from this process to the job.
    The other arguments are resources reserved for the job's driver.
    """
    from rlhf.commands.submit import submit as start

    reserved = dict(resources or {})
    return start(config, overrides, address=address, env=env, cpus=cpus, memory_gib=memory_gib, resources=reserved)[1]


def follow_job(job: str, *, address: str | None = None, write: Callable[[str], object] | None = None) -> JobEnd:
    """Write a job's log (by default to stdout) until the job is over. Returns its final state."""
    from rlhf.commands.submit import follow_job as follow

    return follow(job, address=address, write=write or sys.stdout.write)


def job_status(job: str, *, address: str | None = None) -> JobEnd:
    """Return the state of a job."""
    from rlhf.commands.submit import job_status as ask

    return ask(job, address=address)


def stop_job(job: str, *, address: str | None = None) -> JobEnd:
    """End a job and wait until it is over. Its run writes a checkpoint first."""
    from rlhf.commands.submit import stop_job as stop

    return stop(job, address=address)


def view(
    run: str | Path,
    against: str | Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token_env: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Show the folder of a run or a pipeline in browsers, until SIGINT or SIGTERM. `ready` is called with the URL.

    token_env: the environment variable with the browsers' token, required for hosts beyond this machine.
    """
    from rlhf.viewing.server import view as serve

    folders = [Path(folder) for folder in (run, against) if folder is not None]
    serve(folders, host=host, port=port, token_env=token_env, ready=ready)


def _loaded(config: AnyConfig, overrides: Sequence[str]) -> LoadedConfig:
    from rlhf.config.files.load import LoadedConfig, checked, from_mapping
    from rlhf.config.schema.root import Config

    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if isinstance(config, Mapping):
        return from_mapping(config, overrides)
    if not isinstance(config, Config | LoadedConfig):
        raise TypeError(
            f"the configuration is of type {type(config).__name__}; give the path of a YAML file, a mapping with the "
            "same keys, or what rlhf.load_config returned"
        )
    if overrides:
        raise UserError("overrides change a file or a mapping; build the Config with the values you want instead")
    return checked(config) if isinstance(config, Config) else config
