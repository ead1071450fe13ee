"""`rlhf submit CONFIG`: run a configuration as a job of a Ray cluster, and follow, query or stop such jobs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.shared import refuse_other_than_file, starts_work, write_stdout
from rlhf.errors import RunError, UserError

if TYPE_CHECKING:
    from actors.jobs.submit import JobEnd


@starts_work
def submit(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    env: Sequence[str] = (),
    cpus: float = 0.0,
    memory_gib: float = 0.0,
    resources: Mapping[str, float] | None = None,
    supervise: bool = True,
) -> str:
    """Run a configuration as a job of a Ray cluster, or continue the run. Return the job's id.

    Args:
        config (CONFIG): a YAML file below the current folder.
        address (URL): the address of the cluster's dashboard; RAY_ADDRESS if not given.
        env (NAME): pass this environment variable to the job; may be repeated.
        cpus (N): CPUs to reserve for the job's driver.
        memory_gib (N): memory to reserve for the job's driver, in GiB.
        resources (NAME=N): a custom resource to reserve for the job's driver; may be repeated.
        supervise: start the run again in the same job if the driver dies, as `rlhf train --supervise` does.
    """
    refuse_other_than_file(config, because=". A job gets files only: no object of this process reaches the job.")

    from actors.jobs.submit import DriverResources, submit_job

    driver = DriverResources(cpus=cpus, memory_gib=memory_gib, custom=dict(resources or {}))
    return submit_job(config, overrides, address=address, env=env, driver=driver, supervise=supervise)[1]


def follow_job(job: str, *, address: str | None = None, write: Callable[[str], object] | None = None) -> JobEnd:
    """Write a job's log (by default to stdout) until the job is over. Return its final state."""
    from actors.jobs.submit import Jobs

    return Jobs(address).follow(job, write or sys.stdout.write)


def job_status(job: str, *, address: str | None = None) -> JobEnd:
    from actors.jobs.submit import Jobs

    return Jobs(address).state(job)


def stop_job(job: str, *, address: str | None = None) -> JobEnd:
    """End a job and wait for the end. The job's run writes a checkpoint first."""
    from actors.jobs.submit import Jobs

    return Jobs(address).stop(job)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait", action="store_true", help="show the log until the job is over, and exit as it does")
    jobs = parser.add_mutually_exclusive_group()
    jobs.add_argument("--follow", metavar="JOB", help="show a job's log until it is over")
    jobs.add_argument("--status", metavar="JOB", help="show the state of a job")
    jobs.add_argument("--stop", metavar="JOB", help="end a job; its run writes a checkpoint first")


def _present(args: argparse.Namespace) -> int:
    job = args.follow or args.status or args.stop
    if job is None:
        return _run_new(args)
    reserved = (args.cpus, args.memory_gib, *args.resources)
    if any((args.config, *args.overrides, args.wait, *args.env, *reserved, not args.supervise)):
        raise UserError("--follow, --status and --stop take only a JOB and --address")
    if args.follow:
        return _exit_code(job, follow_job(job, address=args.address, write=write_stdout))
    end = job_status(job, address=args.address) if args.status else stop_job(job, address=args.address)
    code = "" if end.exit_code is None else f", exit code {end.exit_code}"
    write_stdout(f"{job}: {end.state}{code}\n")
    return 0


def _run_new(args: argparse.Namespace) -> int:
    from actors.jobs.submit import DriverResources, submit_job

    if args.config is None:
        raise UserError("give a CONFIG to submit, or name a job with --follow, --status or --stop")
    driver = DriverResources(cpus=args.cpus, memory_gib=args.memory_gib, custom=dict(args.resources))
    jobs, job = submit_job(
        args.config, args.overrides, address=args.address, env=args.env, driver=driver, supervise=args.supervise
    )
    where = f" --address {args.address}" if args.address else ""
    write_stdout(f"submitted {job}; rlhf submit --follow {job}{where} shows its log, --stop ends it\n")
    return _exit_code(job, jobs.follow(job, write_stdout)) if args.wait else 0


def _exit_code(job: str, end: JobEnd) -> int:
    """Return the driver's exit code. RunError, with Ray's message, for a job without an exit code."""
    if end.state == "SUCCEEDED":
        write_stdout(f"done: {job}\n")
        return 0
    if end.exit_code is None or end.exit_code <= 0:
        raise RunError(f"the job {job} is {end.state}: {end.message}")
    write_stdout(f"{job}: {end.state}, exit code {end.exit_code}\n")
    return end.exit_code


def _amount(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    wrong = argparse.ArgumentTypeError(f"takes NAME=N, such as tpu=4, got {text!r}")
    try:
        number = float(amount)
    except ValueError:
        raise wrong from None
    if not name:
        raise wrong
    return name, number


COMMAND = Command(
    submit,
    _present,
    add=_add,
    changes={
        "config": {"nargs": "?"},
        "resources": {"flag": "--resource", "action": "append", "type": _amount, "default": []},
    },
)
