"""`rlhf submit CONFIG`: run a configuration as a job of a Ray cluster, and look after such jobs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, say
from rlhf.errors import RunError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from actors.jobs.submit import JobEnd, Jobs
    from rlhf.commands.shared import Subparsers


def add(commands: Subparsers) -> None:
    command = commands.add_parser("submit", help="run a configuration as a job of a Ray cluster")
    command.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file below the current folder")
    command.add_argument("--address", metavar="URL", help="the cluster's dashboard; RAY_ADDRESS if not given")
    command.add_argument("--wait", action="store_true", help="show the log until the job is over; exit as it does")
    command.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="give the job this variable of yours; repeatable"
    )
    command.add_argument("--cpus", type=float, default=0.0, metavar="N", help="reserve CPUs for the job's driver")
    command.add_argument("--memory-gib", type=float, default=0.0, metavar="N", help="reserve memory for it")
    command.add_argument(
        "--resource", action="append", default=[], type=_amount, metavar="NAME=N", help="reserve a custom resource"
    )
    jobs = command.add_mutually_exclusive_group()
    jobs.add_argument("--follow", metavar="JOB", help="show a job's log until it is over")
    jobs.add_argument("--status", metavar="JOB", help="say how a job stands")
    jobs.add_argument("--stop", metavar="JOB", help="end a job; its run writes a checkpoint first")
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    """Submit, or ask about a job."""
    job = args.follow or args.status or args.stop
    if job is None:
        if args.config is None:
            raise UserError("give a CONFIG, or --follow, --status or --stop with a job")
        return _submit(args)
    used = (args.config, *args.overrides, args.wait, *args.env, args.cpus, args.memory_gib, *args.resource)
    if any(used):
        raise UserError("--follow, --status and --stop take a JOB and --address alone")
    if args.follow:
        return _code(job, follow_job(job, address=args.address, write=say))
    end = job_status(job, address=args.address) if args.status else stop_job(job, address=args.address)
    code = "" if end.exit_code is None else f", exit code {end.exit_code}"
    say(f"{job}: {end.state}{code}\n")
    return 0


def submit(
    config: str | Path,
    overrides: Sequence[str],
    *,
    address: str | None,
    env: Sequence[str],
    cpus: float,
    memory_gib: float,
    resources: Mapping[str, float],
) -> tuple[Jobs, str]:
    """Start the job. Return the cluster's jobs, and the id of this job."""
    from actors.jobs.submit import DriverResources
    from actors.jobs.submit import submit as start

    driver = DriverResources(cpus=cpus, memory_gib=memory_gib, custom=resources)
    return start(config, overrides, address=address, env=env, driver=driver)


def follow_job(job: str, *, address: str | None, write: Callable[[str], object]) -> JobEnd:
    """Write its log until it is over; how it ended."""
    from actors.jobs.submit import Jobs

    return Jobs(address).follow(job, write)


def job_status(job: str, *, address: str | None) -> JobEnd:
    """Return the state of a job."""
    from actors.jobs.submit import Jobs

    return Jobs(address).state(job)


def stop_job(job: str, *, address: str | None) -> JobEnd:
    """End it; how it ended."""
    from actors.jobs.submit import Jobs

    return Jobs(address).stop(job)


def _submit(args: argparse.Namespace) -> int:
    jobs, job = submit(
        args.config,
        args.overrides,
        address=args.address,
        env=args.env,
        cpus=args.cpus,
        memory_gib=args.memory_gib,
        resources=dict(args.resource),
    )
    where = f" --address {args.address}" if args.address else ""
    say(f"submitted {job}; rlhf submit --follow {job}{where} shows its log, --stop ends it\n")
    return _code(job, jobs.follow(job, say)) if args.wait else 0


def _code(job: str, end: JobEnd) -> int:
    """Return the driver's exit code. RunError, with Ray's message, for a job without an exit code."""
    if end.state == "SUCCEEDED":
        say(f"done: {job}\n")
        return 0
    if end.exit_code is None or end.exit_code <= 0:
        raise RunError(f"the job {job} is {end.state}: {end.message}")
    say(f"{job}: {end.state}, exit code {end.exit_code}\n")
    return end.exit_code


def _amount(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    try:
        return name, float(amount)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes NAME=N, such as tpu=4, got {text!r}") from None
