"""Run the loop of a sweep: start trials, read their metrics, stop trials and record the ends.

    parameters -> trials -> processes -> metrics.jsonl -> method -> results

Each trial is `rlhf train` in a separate process and run folder. A failed trial is a row of the result. All state is
in the journal and the run folders, so a kill loses nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.cluster.address import cluster_to_join
from actors.sweeps.search import require_optuna, strategy_of
from actors.sweeps.trial_process import END_WITHIN_S, MachineShare, TrialProcess, wait_for_all
from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.sweep import Sweep
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.errors import Preempted, RunError, UserError
from rlhf.planning.shares import divide, divided_machine, most_trials, room_in, trials_of
from rlhf.process.disk_full import PAUSE
from rlhf.process.stopping import StopRequest, current_request
from rlhf.sweeps.journal import Journal, Trial
from rlhf.sweeps.space import Values, format_values, known_trials
from rlhf.sweeps.strategy import Strategy
from rlhf.sweeps.trial_results import SweepResult, collect, explain_failure, judged_folder, metric_values, write
from rlhf.tracking import logs
from rlhf.tracking.formatting import number
from rlhf.tracking.run_folder.atomic import write_atomic
from rlhf.tracking.run_folder.environment import visible_gpus
from rlhf.tracking.run_folder.folder import checkpoints_in
from rlhf.tracking.run_folder.lock import lock_folder

logger = logging.getLogger(__name__)
POLL_S = 0.3
PREEMPTED = 75  # exit code of a run after a stop signal


@dataclass(slots=True)
class _Running:
    trial: Trial
    process: TrialProcess
    slot: int
    log_bytes: int  # size of its log before this process
    reported_step: int = -1  # last step reported to the strategy
    seen: tuple[int, int] = (0, 0)  # inode and size of metrics.jsonl when it was last read
    stopped: bool = False  # stopped by the strategy


@dataclass(slots=True)
class _Loop:
    """Run trials in a fixed number of slots."""

    sweep: Sweep
    journal: Journal
    strategy: Strategy
    shares: Sequence[MachineShare]
    failures: int  # including failures before a kill
    request: StopRequest
    running: list[_Running] = field(default_factory=list)

    def run(self) -> list[Trial] | None:
        """Run trials until no trial is left. After a stop request, return the trials in progress, all ended."""
        self.request.ends_by_itself = True
        try:
            while self.request.came is None:
                self._fill()
                if not self.running:
                    return None
                time.sleep(POLL_S)
                for running in list(self.running):
                    code = running.process.poll()  # before the metrics, so that no last row is missed
                    self._read(running)
                    if code is not None:
                        self.running.remove(running)
                        self._end(running, code)
            return [running.trial for running in self.running]
        finally:
            for running in self.running:
                running.process.interrupt()
            wait_for_all([running.process for running in self.running], self.request)
            self.request.ends_by_itself = False

    def _fill(self) -> None:
        most = self.sweep.config.max_failures
        while len(self.running) < len(self.shares) and (most is None or self.failures <= most):
            if (trial := self.strategy.next()) is None:
                return
            self._start(trial)

    def _start(self, trial: Trial) -> None:
        run = self.journal.run_folder(trial.number)
        file, log = run.with_suffix(".yaml"), run.with_suffix(".log")
        try:
            config = self.sweep.trial(trial.parameters, trial.name)
        except UserError as error:  # a suggestion, since the trials known in advance are checked before the start
            self._fail(trial, str(error))
            self.strategy.ended(trial)
            return
        write_atomic(file, dump_yaml(config))
        slot = next(n for n in range(len(self.shares)) if all(running.slot != n for running in self.running))
        log_bytes = log.stat().st_size if log.exists() else 0
        command = [sys.executable, "-m", "rlhf.cli", "train", str(file), "--resume", "auto", "--quiet"]
        process = TrialProcess(command, log, self.shares[slot], grace_s=_grace_s(self.sweep))
        self.running.append(_Running(trial, process, slot, log_bytes))
        logger.info("%s %s: %s", trial.name, "continues" if log_bytes else "begins", format_values(trial.parameters))

    def _read(self, running: _Running) -> None:
        folder = self._judged(running.trial)
        try:
            status = (folder / "metrics.jsonl").stat()
        except FileNotFoundError:
            return
        before, running.seen = running.seen, (status.st_ino, status.st_size)
        if running.seen == before:
            return
        for step, value in metric_values(folder, self.sweep.metric):
            if step > running.reported_step and not running.stopped:
                running.reported_step = step
                if self.strategy.report(running.trial, step, value):
                    running.stopped = True
                    running.process.interrupt()

    def _end(self, running: _Running, code: int) -> None:
        trial = running.trial
        values = metric_values(self._judged(trial), self.sweep.metric)
        if running.stopped and code != 0:
            self.journal.end(trial.number, "stopped")
        elif code not in (0, PREEMPTED):
            log = self.journal.run_folder(trial.number).with_suffix(".log").read_bytes()
            output = log[running.log_bytes :].decode(errors="replace")
            self._fail(trial, explain_failure(self._judged(trial), output, code))
        elif code == 0 and not values:
            self._fail(trial, f"no row of its metrics.jsonl has {self.sweep.metric}")
        elif code == 0:
            self.journal.end(trial.number, "finished")
        self.strategy.ended(trial)
        if code == PREEMPTED and not running.stopped:
            logger.warning("%s was stopped by a signal; continue it with --resume auto", trial.name)
        elif trial.state != "failed":
            step, value = values[-1]
            how = "is at" if trial.state == "open" else f"{trial.state} at"
            logger.info("%s %s step %d: %s = %s", trial.name, how, step, self.sweep.metric, number(value))
        write(self.sweep, collect(self.sweep, self.journal))

    def _fail(self, trial: Trial, why: str) -> None:
        self.journal.end(trial.number, "failed", why)
        self.failures += 1
        logger.warning("%s failed: %s", trial.name, trial.error)

    def _judged(self, trial: Trial) -> Path:
        return judged_folder(self.sweep, self.journal.run_folder(trial.number))


def run_sweep(sweep: Sweep, *, resume: bool, retry_failed: bool = False, quiet: bool = False) -> SweepResult:
    """Run all trials, or with `resume` the remaining trials, and return the results.

    UserError, before anything starts: a trial is invalid, or a folder is in use. RunError: no trial succeeded, or more
    failed than sweep.max_failures allows. Preempted: the sweep or a trial received a signal.
    """
    logs.configure("WARNING" if quiet else "INFO")
    if sweep.config.method.name == "bayesian":
        require_optuna()
    known = known_trials(sweep)
    shares = _shares(sweep, known)  # before the folder is written, since a refusal names settings to change
    room_s = max(stage.cluster.room_timeout_s for stage in sweep.base.runs.values())
    with PAUSE.limited(room_s), Journal.open(sweep, resume=resume) as journal:
        if retry_failed:
            for trial in journal.trials.values():
                if trial.state == "failed":
                    journal.end(trial.number, "open")
        _wait_for_leftovers(journal, within_s=_grace_s(sweep) + END_WITHIN_S)
        failures = sum(trial.state == "failed" for trial in journal.trials.values())
        request = current_request() or StopRequest()
        loop = _Loop(sweep, journal, strategy_of(sweep, journal, known), shares, failures, request)
        try:
            ended = loop.run()
        finally:
            result = collect(sweep, journal)
            write(sweep, result)
        if ended is not None:
            raise Preempted(f"the trials in progress were ended: {_checkpoints(sweep, journal, ended) or 'none'}")
        stopped = [trial for trial in journal.trials.values() if trial.state == "open"]
        cut_off = _checkpoints(sweep, journal, stopped)
    most = sweep.config.max_failures
    if most is not None and loop.failures > most:
        raise RunError(
            f"{loop.failures} trials failed, more than sweep.max_failures = {most}: {_failures(result)} Ended trials "
            f"are in {sweep.folder}; continue with --resume auto --retry-failed."
        )
    if cut_off:
        raise Preempted(f"these trials were stopped by a signal: {cut_off}")
    if result.best is None:
        raise RunError(f"no trial finished with a value of {sweep.metric}: {_failures(result)}")
    return result


def _checkpoints(sweep: Sweep, journal: Journal, trials: Sequence[Trial]) -> str:
    """Name unfinished trials, each with the checkpoint for the continuation."""
    parts = []
    for trial in trials:
        run, kept = journal.run_folder(trial.number), "without a checkpoint"
        for folder in [run / name for name in sweep.base.stages] if sweep.base.is_pipeline else [run]:
            checkpoints = folder / "checkpoints"
            if checkpoints.is_dir() and (steps := [step for step, _ in checkpoints_in(checkpoints)]):
                kept = f"with a checkpoint of step {steps[-1]}{f' of {folder.name}' if sweep.base.is_pipeline else ''}"
        parts.append(f"{trial.name} {kept}")
    return ", ".join(parts)


def _grace_s(sweep: Sweep) -> float:
    """Return the seconds for a trial to finish a step after a stop request."""
    return max(run.train.preemption_grace_s for run in sweep.base.runs.values())


def _wait_for_leftovers(journal: Journal, *, within_s: float) -> None:
    """Wait until the trials of a killed sweep have ended, since the kernel sent them SIGTERM.

    A new process could not lock the folders, and the new trials would count as failed. Raise UserError with the name of
    a trial that still runs after `within_s` seconds.
    """
    trials, give_up = journal.folder / "trials", time.monotonic() + within_s
    for lock in (*trials.glob("*/.lock"), *trials.glob("*/*/.lock")):
        while True:
            try:
                os.close(lock_folder(lock.parent, key="run.name"))
                break
            except UserError:
                if time.monotonic() > give_up:
                    raise
            logger.info("%s: waiting for a process of the earlier sweep to end", lock.parent)
            time.sleep(1.0)


def _failures(result: SweepResult) -> str:
    failed = [row for row in result.rows if row.state == "failed"]
    return f"{failed[-1].trial}: {failed[-1].error}" if failed else "no trial was run."


def _shares(sweep: Sweep, known: Sequence[Values] | None) -> list[MachineShare]:
    cluster = next(iter(sweep.base.runs.values())).cluster
    address = cluster_to_join(cluster.address)
    if address is not None:
        most = most_trials(sweep, known)
        room = max(1, room_in(_nodes(cluster), trials_of(sweep, known), most=most))
        count = min(sweep.config.concurrency or room, most)
        _warn_of_more(count, room)
        logger.info("%d trials run at once, in the cluster at %s", count, address)
        return [MachineShare()] * count
    cores, gpus = tuple(sorted(os.sched_getaffinity(0))), visible_gpus()
    division = divide(sweep, known, divided_machine(gpus=len(gpus)))
    if division.problem is not None:
        raise UserError(f"{sweep.source}: sweep.concurrency: {division.problem}")
    count = division.count
    _warn_of_more(count, division.room)
    each, each_gpus = len(cores) // count, division.gpus
    logger.info("%d trials run at once, with %d cores each", count, each or len(cores))
    parts = [(slice(n * each, (n + 1) * each), slice(n * each_gpus, (n + 1) * each_gpus)) for n in range(count)]
    return [MachineShare(cores=cores[cpu], gpus=tuple(gpus[gpu])) for cpu, gpu in parts]


def _warn_of_more(count: int, room: int) -> None:
    if count > room:
        logger.warning("sweep.concurrency is %d, but only %d trials fit at once", count, room)


def _nodes(cluster: ClusterConfig) -> list[Mapping[str, float]]:
    import ray

    from actors.cluster.connect import connected

    with connected(cluster):
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
