"""Connect to Ray: start a local Ray with bounded memory, or join the configured cluster.

A signal to all processes of a run also ends the daemons of the local Ray. A driver calling Ray then would wait for a
minute and be aborted. So after an interrupt the driver kills the daemons and makes no further call to Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import worker

from actors.cluster.address import cluster_to_join
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.errors import RunError, UserError
from rlhf.process.cgroups import total_memory
from rlhf.process.owned_folders import LOCK, alone_in, locked
from rlhf.process.stopping import current_request, finishes_within
from rlhf.tracking.run_folder.environment import num_cpus

logger = logging.getLogger(__name__)

CONNECT_WITHIN_S = 10.0  # TCP connection; Ray itself retries for over ten minutes
ANSWER_WITHIN_S = 30.0  # response of the Ray cluster
GONE_WITHIN_S = 10.0
SHUTDOWN_WITHIN_S = 15.0  # ray.shutdown waits forever for an unresponsive raylet
MIN_OPEN_FILES = 256
LONGEST_SOCKET = 107  # longest path of a Unix socket on Linux
SOCKET_IN_TEMP = "session_2026-01-31_12-00-00_000000_4194304/sockets/plasma_store"  # the longest socket path of Ray
KEPT_LOGS = 5  # of dead local Rays, the newest
VITAL = {"gcs_server", "raylet"}  # the raylet also holds the object store
KEPT_FROM_RAY = {signal.SIGHUP, signal.SIGUSR1}  # a terminal or Slurm sends them to Ray's daemons too


class OwnRay:
    """The local Ray started by this process, if any."""

    def __init__(self) -> None:
        self.daemons: list[psutil.Process] = []
        self.vital: list[psutil.Process] = []  # those without which no call is answered
        self.killed = False

    def find(self, others: Collection[psutil.Process]) -> None:
        """Record the daemons: all children of this process except `others`."""
        self.daemons = [process for process in psutil.Process().children() if process not in others]
        self.vital = [daemon for daemon in self.daemons if _name(daemon) in VITAL]

    def forget(self) -> None:
        self.daemons, self.vital, self.killed = [], [], False

    @property
    def is_ending(self) -> bool:
        """Return whether a vital daemon has ended, for example by a signal sent to all processes."""
        return any(map(_has_ended, self.vital))

    def kill(self) -> None:
        """Kill the daemons and all their child processes. Has no effect without a local Ray."""
        self.killed = bool(self.daemons)
        below = list(self.daemons)
        for daemon in self.daemons:
            with contextlib.suppress(psutil.NoSuchProcess):
                below += daemon.children(recursive=True)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=GONE_WITHIN_S)


def _has_ended(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


OWN_RAY = OwnRay()
_SESSION_LOCKS: list[int] = []  # held until this process ends


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Connect to Ray for the length of the block: to the cluster of the configuration or of RAY_ADDRESS, or to a local
    Ray that ends with the block and accepts no other process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it warns that this thread handles no signals
    logging.getLogger("ray.widgets.util").setLevel(logging.ERROR)  # in a notebook, the module advises an installation
    worker.print_to_stdstream = _log_messages
    request = current_request()
    if request is not None:
        request.on_interrupt = OWN_RAY.kill
    if ray.is_initialized():
        yield
        return
    address = cluster_to_join(config.address)
    try:
        if address is None:
            _start_local(config)
        else:
            _join(address)
        if request is not None:
            request.handlers_lost.set()  # Ray's handler of SIGTERM in C writes a stack to stderr
        yield
    finally:
        if not finishes_within(SHUTDOWN_WITHIN_S, ray.shutdown, "ray.shutdown"):
            logger.warning("Ray did not shut down within %.0f s: its daemons do not answer", SHUTDOWN_WITHIN_S)
            OWN_RAY.kill()
        OWN_RAY.forget()


def _log_messages(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Log Ray's messages to the driver, such as the loss of an actor. Ray itself would print the messages to stdout."""
    for line in data["lines"]:
        logger.info("Ray: %s", line)


def _start_local(config: ClusterConfig) -> None:
    memory_gib = total_memory() / 2**30
    if config.object_store_gib > memory_gib:
        raise UserError(
            f"cluster.object_store_gib: is {config.object_store_gib:g}, but this machine has only {memory_gib:.0f} GiB "
            "of memory. Lower the value; 1 or 2 GiB are usual."
        )
    _refuse_few_open_files()
    # Ray listens on all interfaces, so a token must keep others from running code in it. RAY_AUTH_MODE may disable
    # tokens, with a warning by Ray. A separate token per run also keeps out other runs of the same user.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # Ray starts its workers at niceness 15 by default, so other processes would take their cores.
    os.environ.setdefault("RAY_worker_niceness", "0")
    temp, request = _private_temp(), current_request()
    _remove_dead_sessions(temp)
    logger.info("starting Ray on this machine")
    before = psutil.Process().children()
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_FROM_RAY)  # the daemons inherit this thread's mask
    try:
        try:
            _start_daemons(config, temp)
        except Exception as error:  # Ray gives a node 30 s to start and raises a bare Exception
            if request is not None and request.interrupted.is_set():
                raise
            logger.warning(
                "the local Ray did not start, so the run starts Ray a second time: %s", " ".join(str(error).split())
            )
            OWN_RAY.find(before)
            OWN_RAY.kill()
            finishes_within(SHUTDOWN_WITHIN_S, ray.shutdown, "ray.shutdown")
            OWN_RAY.forget()
            before = psutil.Process().children()
            _start_daemons(config, temp)
        _own_session(temp)
    except Exception as error:
        raise RunError(
            f"start: the local Ray did not start: {' '.join(str(error).split())} The machine may be busy or have too "
            "little free memory. End other programs here and start again. If the run had begun before, add --resume "
            "auto."
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        OWN_RAY.find(before)
        if request is not None and request.interrupted.is_set():
            OWN_RAY.kill()


def _start_daemons(config: ClusterConfig, temp: Path) -> None:
    ray.init(
        address="local",
        num_cpus=num_cpus(),
        object_store_memory=int(config.object_store_gib * 2**30),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
        _temp_dir=str(temp),
    )


def _own_session(temp: Path) -> None:  # as long as this process lives
    with alone_in(temp):
        own = locked(temp / ray.get_runtime_context().get_session_name())
    if own is not None:
        _SESSION_LOCKS.append(own)


def _remove_dead_sessions(temp: Path) -> None:
    """Remove leftovers of dead processes' local Rays: spilled objects and sockets, and all but the newest logs.

    Only one process at a time looks for leftovers or locks a new session, so a session without a lock has no owner.
    """
    with alone_in(temp):
        dead = {path: lock for path in temp.glob("session_*") if (lock := _lock_of_dead(path)) is not None}
    for age, session in enumerate(sorted(dead, reverse=True)):
        for part in session.iterdir():
            if part.is_dir() and (part.name != "logs" or age >= KEPT_LOGS):
                shutil.rmtree(part, ignore_errors=True)
        if age >= KEPT_LOGS:
            shutil.rmtree(session, ignore_errors=True)
        os.close(dead[session])


def _lock_of_dead(session: Path) -> int | None:
    """Return the lock of a session whose process is dead. None: the process lives, or belongs to another program."""
    with contextlib.suppress(FileNotFoundError):  # another start has removed the file
        return locked(session) if not session.is_symlink() and (session / LOCK).exists() else None
    return None


def _refuse_few_open_files() -> None:
    """Raise UserError if the limit of open files is too low: Ray would then die without a clear message."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < MIN_OPEN_FILES:
        raise UserError(
            f"start: a process may open {limit} files here (`ulimit -n`), but a run needs {MIN_OPEN_FILES} or more. "
            "Raise the limit with `ulimit -n 65536`, or ask the administrator of this machine."
        )


def _private_temp() -> Path:
    """Return the folder for Ray's files, private to this user. Ray's default folder is writable for everyone."""
    parent = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    temp = parent / f"ray-{os.getuid()}"
    if len(str(temp / SOCKET_IN_TEMP)) > LONGEST_SOCKET:
        raise UserError(
            f"start: Ray cannot create its sockets below {parent} (TMPDIR or RAY_TMPDIR): their paths would be longer "
            f"than {LONGEST_SOCKET} characters. Set RAY_TMPDIR to a folder with a short path, such as /tmp."
        )
    try:
        temp.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = temp.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise UserError(
                f"start: {temp} is not a folder that belongs to this user. Remove {temp}, or set RAY_TMPDIR to another "
                "folder."
            )
        temp.chmod(0o700)
    except OSError as error:
        text = f"start: {temp} cannot be created for Ray's files: {error.strerror}."
        raise UserError(f"{text} Set RAY_TMPDIR to a folder that you can write.") from error
    return temp


def _join(address: str) -> None:
    _refuse_dead(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, " ".join(str(error).split())) from error
    logger.info("connected to the Ray cluster at %s", address)


def _refuse_dead(address: str) -> None:
    """Raise UserError within seconds if no Ray responds at `[ray://]HOST:PORT`. Ray resolves other address forms."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error
    if address.startswith("ray://"):
        return  # Ray's client has its own timeout
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        subprocess.run(command, check=True, timeout=ANSWER_WITHIN_S, capture_output=True, text=True)
    except subprocess.TimeoutExpired as error:
        silent = f"a program listens there, but it did not answer in Ray's protocol within {ANSWER_WITHIN_S:.0f} s"
        raise _no_cluster(address, f"{silent} (the dashboard has another port)") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["its health check failed"])[-1]
        raise _no_cluster(address, last) from error


def _no_cluster(address: str, reason: str) -> UserError:
    return UserError(
        f"no Ray cluster responds at {address!r} (cluster.address or RAY_ADDRESS): {reason}. Start one with `ray start "
        "--head`, or leave cluster.address null to start a local Ray. If the cluster uses tokens, set "
        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
    )
