"""Ray jobs: `rlhf train` in the cluster behind a dashboard, started from another machine.

The archive is uploaded, the job started, and log, state and end are read over HTTP. The values of `env` travel in the
archive and never appear in the job's command, metadata, runtime environment (logged by Ray), a shown line of the log,
or a message of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import shlex
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from actors.jobs.entrypoint import SETUP_HOOK
from actors.jobs.package import project_of
from rlhf.config.files.load import LoadedConfig, load
from rlhf.errors import RunError, UserError
from rlhf.process.owned_folders import temporary_folder
from rlhf.process.stopping import run_async, run_stoppable
from rlhf.tracking.logs import MASK, redact

ANSWER_WITHIN_S = 30.0  # for one request
UPLOAD_WITHIN_S = 600.0
AGENT_WITHIN_S = 60.0  # a newly started head has no agent for jobs yet
LOST_FOR_S = 300.0  # a head without an answer for longer is given up
HEARTBEAT_S = 10.0  # silence in a log before a request for the job's state
STOP_WITHIN_S = 300  # between SIGTERM, on which a run writes a checkpoint, and SIGKILL
OVER = ("SUCCEEDED", "FAILED", "STOPPED")
RUN = "rlhf_run"  # key of a job's metadata: the folder of its run


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverResources:
    """Resources that Ray reserves for the process of `rlhf train`, which computes little. Empty: run on the head."""

    cpus: float = 0.0
    memory_gib: float = 0.0
    custom: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {f"--resource {name}": amount for name, amount in self.custom.items()}
        for name, amount in {"--cpus": self.cpus, "--memory-gib": self.memory_gib, **named}.items():
            if not (math.isfinite(amount) and amount >= 0.0):
                raise UserError(f"{name}: got {amount:g}, expected a number >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """The end of a job, or the present state."""

    state: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    exit_code: int | None  # of its driver, if it ended
    message: str  # Ray's message, on one line

    @property
    def is_over(self) -> bool:
        return self.state in OVER


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with a limit on every request, because Ray's waits have no limits."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        limit_s = UPLOAD_WITHIN_S if method == "PUT" else ANSWER_WITHIN_S
        return super()._do_request(method, endpoint, timeout=limit_s, **options)


@contextlib.contextmanager
def _set_variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


class Jobs:
    def __init__(self, address: str | None) -> None:
        for name in ("dashboard_sdk", "job.sdk"):  # these loggers write uploads and closed connections to stderr
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        self.address = _dashboard(address)
        self._hidden: tuple[str, ...] = ()
        with _set_variable("RAY_API_SERVER_ADDRESS", self.address), self._explained():  # preferred to the argument
            self._client = _Client(self.address)

    def submit(
        self, loaded: LoadedConfig, archive: Path, command: str, *, hidden: Sequence[str], driver: DriverResources
    ) -> str:
        """Start the job and return the job's id: the run's name and a number.

        UserError: a job of the same run is not over. hidden: the values to mask in all text from the cluster.
        """
        self._hidden = tuple(hidden)
        name, folder = loaded.name.replace("/", "-"), str(loaded.folder)
        with self._explained():
            others = self._client.list_jobs()
        for other in others:
            if (other.metadata or {}).get(RUN) == folder and not other.status.is_terminal():
                raise UserError(
                    f"the job {other.submission_id} of the same run, {folder}, is {other.status}: `rlhf submit "
                    f"--follow {other.submission_id}` shows this job, and --stop ends it. Or choose another run.name."
                )
        taken = (re.fullmatch(rf"{re.escape(name)}-(\d+)", other.submission_id or "") for other in others)
        number = 1 + max((int(match[1]) for match in taken if match), default=0)
        job = f"{name}-{number}"
        give_up = time.monotonic() + AGENT_WITHIN_S
        while True:
            try:
                with self._explained():
                    self._client.submit_job(
                        entrypoint=command,
                        submission_id=job,
                        runtime_env={
                            "working_dir": str(archive),
                            "worker_process_setup_hook": SETUP_HOOK,
                            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WITHIN_S)},
                        },
                        metadata={RUN: folder},
                        entrypoint_num_cpus=driver.cpus or None,
                        entrypoint_memory=int(driver.memory_gib * 2**30) or None,
                        entrypoint_resources=dict(driver.custom) or None,
                    )
                return job
            except RunError as error:
                if "No available agent" not in str(error) or time.monotonic() > give_up:
                    raise
                time.sleep(1.0)

    def state(self, job: str) -> JobEnd:
        """Return the state of a job. UserError: there is no such job."""
        with self._explained():
            info = self._client.get_job_info(job)
        return JobEnd(state=str(info.status), exit_code=info.driver_exit_code, message=self._message(info.message))

    def follow(self, job: str, write: Callable[[str], object]) -> JobEnd:
        """Write a job's log from the beginning, live, until the job is over.

        RunError: the head does not answer any more. A run limits its operations itself, so there is no limit here.
        """
        return run_stoppable(lambda _: run_async(self._follow(job, write)))

    def stop(self, job: str) -> JobEnd:
        """Send SIGTERM for a checkpoint and an end of the run, and wait for the end. RunError: the job does not end."""
        end = self.state(job)
        if end.is_over:
            return end
        with self._explained():
            self._client.stop_job(job)
        give_up = time.monotonic() + STOP_WITHIN_S + ANSWER_WITHIN_S
        while not (end := self.state(job)).is_over:
            if time.monotonic() > give_up:
                late = f"the job {job} is {end.state} {STOP_WITHIN_S + ANSWER_WITHIN_S:.0f} s after it was told to stop"
                raise RunError(f"{late}; a job that waits for resources stops only after it gets them")
            time.sleep(0.5)
        return end

    async def _follow(self, job: str, write: Callable[[str], object]) -> JobEnd:
        self.state(job)
        shown, was_over = 0, False
        while True:
            is_complete = False
            async for text in self._log(job, skip=shown):
                if text is None:
                    is_complete = True
                else:
                    shown += len(text)
                    write(self._masked(text))
            end = await self._state_in_time(job)
            if end.is_over and (is_complete or was_over):
                return end
            was_over = end.is_over  # the log broke off, and is read once more
            await asyncio.sleep(1.0)

    async def _log(self, job: str, *, skip: int) -> AsyncGenerator[str | None, None]:
        """Yield the parts of the log after the first `skip` characters, and None at the end of the log.

        No None comes if the connection breaks, or if the connection is silent after the end of the job.
        """
        stream = self._client.tail_job_logs(job)
        try:
            while True:
                coming = asyncio.ensure_future(anext(stream, None))
                while not (await asyncio.wait({coming}, timeout=HEARTBEAT_S))[0]:
                    if (await self._state_in_time(job)).is_over:
                        return
                if (text := coming.result()) is None:
                    yield None
                    return
                skip, text = max(0, skip - len(text)), text[skip:]
                if text:
                    yield text
        except (RuntimeError, OSError, aiohttp.ClientError):
            return  # the connection broke, and the caller asks again
        finally:
            coming.cancel()
            await asyncio.wait({coming})
            await stream.aclose()

    async def _state_in_time(self, job: str) -> JobEnd:
        """Return the job's state. Repeat the request until there is an answer. RunError: no answer for LOST_FOR_S."""
        give_up = time.monotonic() + LOST_FOR_S
        while True:
            try:
                return await asyncio.to_thread(self.state, job)
            except (UserError, RunError) as error:
                if time.monotonic() > give_up:
                    text = f"no answer about {job} for {LOST_FOR_S:.0f} s, it may still run: {error}"
                    raise RunError(text) from error
            await asyncio.sleep(2.0)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the errors of Ray's client into UserError or RunError with a message that shows no secret."""
        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"the cluster at {self.address} requires its token: set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, to the values of the cluster"
            ) from None
        except OSError as error:
            raise UserError(
                f"no dashboard of Ray answers at {self.address} (--address or RAY_ADDRESS): {self._message(error)}. "
                "`ray start --head` prints the dashboard's address. The dashboard is part of ray[default]."
            ) from None
        except RuntimeError as error:
            message = self._message(error)
            if "status code 404" in message and "does not exist" in message:
                raise UserError(f"{self.address} has no such job: {message}") from None
            raise RunError(f"the cluster at {self.address} refused: {message}") from None

    def _message(self, words: object) -> str:
        return " ".join(self._masked(str(words or "")).split())[:600].rstrip(".")

    def _masked(self, text: str) -> str:
        # Ray sends a log in parts, so the lines of a value may come in two of them.
        hidden = {part for value in self._hidden for part in (value, *map(str.strip, value.splitlines()))}
        for part in sorted(hidden, key=len, reverse=True):  # a value may be part of another
            if len(part) >= 4:
                text = text.replace(part, MASK)
        return redact(text)


def submit_job(
    config: str | Path,
    overrides: Sequence[str],
    *,
    address: str | None,
    env: Sequence[str],
    driver: DriverResources,
    supervise: bool,
) -> tuple[Jobs, str]:
    """Check a configuration, pack the current folder, and start or continue `rlhf train` there.

    UserError before any contact for every mistake visible on this machine. Returns the cluster's jobs, which mask the
    values of `env` in all text, and the id of this job.
    """
    loaded = load(config, overrides)
    for text in overrides:
        if redact(text) != text:
            raise UserError(
                f"argument {text.partition('=')[0]}: holds a secret, but a cluster shows the command of a job to all "
                "users; pass the secret in an environment variable (--env), or write it in the configuration file"
            )
    values = _values(env)
    project = project_of(Path(config), overrides, loaded)
    words = ["python", "-m", "actors.jobs.entrypoint", "train", str(project.config), *overrides, "--resume", "auto"]
    words += ["--supervise"] if supervise else []
    _dashboard(address)
    with temporary_folder() as folder:
        archive = folder / "project.zip"
        project.pack(archive, env=values)
        command, hidden = f"exec {shlex.join(words)}", tuple(values.values())
        jobs = Jobs(address)
        return jobs, jobs.submit(loaded, archive, command, hidden=hidden, driver=driver)


def _values(names: Sequence[str]) -> dict[str, str]:
    """Return the values of environment variables. UserError, without the input, for an invalid or unset name."""
    for name in names:
        if not (name.isascii() and name.isidentifier()):
            raise UserError(
                f"--env {name.partition('=')[0]}: takes only the name of a variable; its value comes from your "
                "environment, so that no command line shows it"
            )
        if name not in os.environ:
            raise UserError(f"--env {name}: is not set in your environment; export it first")
    return {name: os.environ[name] for name in names}


def _dashboard(address: str | None) -> str:
    """Return the dashboard's address: the given one, or RAY_ADDRESS."""
    url = address or os.environ.get("RAY_ADDRESS")
    if not url:
        raise UserError(
            "no cluster is named: give --address http://HOST:8265, or set RAY_ADDRESS to it; `ray start --head` "
            "prints the address"
        )
    if not url.startswith(("http://", "https://")):
        raise UserError(
            f"{url} (--address or RAY_ADDRESS) is not the address of a dashboard, which accepts jobs. It is "
            "http://HOST:PORT, with the port 8265 by default"
        )
    return url.rstrip("/")
