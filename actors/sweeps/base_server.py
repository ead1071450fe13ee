"""Run the server of the shared base model of a sweep, and start an ended server again.

The trials are the server's clients. The state of the server is in a folder, so a new server at the same address
continues the work. The clients wait until then.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from contextlib import AbstractContextManager

from actors.cluster.address import cluster_to_join
from actors.sweeps.trial_process import MachineShare, TrialProcess, wait_for_all
from rlhf.config.files.sweep import Sweep
from rlhf.config.schema.service import TinkerConfig
from rlhf.errors import RunError, UserError
from rlhf.preflight.served_base import find_base
from rlhf.process.stopping import StopRequest
from rlhf.sweeps.shared_base import NAME, server_config, server_file
from rlhf.sweeps.trial_results import explain_failure
from rlhf.tracking.run_folder.atomic import write_atomic

logger = logging.getLogger(__name__)
COMMAND = (sys.executable, "-m", "rlhf.cli", "tinker")
POLL_S = 0.3
BESIDES_START_S = 300.0  # for imports and for Ray, besides cluster.start_timeout_s of ranks and engines
MOST_ENDS = 3
KEY = "tml-sweep"  # the client wants a key, and a server only for this machine takes any key


def base_config(sweep: Sweep, *, at_once: int) -> TinkerConfig:
    """Return the configuration of the server, with the model's name. Rows are not longer than the model allows.

    UserError: there is no such model, a key of the run is invalid for a server, or the trials are of a cluster.
    """
    config = server_config(sweep, at_once=at_once)
    if (address := cluster_to_join(config.cluster.address)) is not None:
        raise UserError(
            f"{sweep.source}: sweep.shared_base: is true, but the trials of the cluster at {address} may be on other "
            "machines, and the server answers only this machine. Start `rlhf tinker` there, and in place of "
            "sweep.shared_base give every trial its address: sweep.set={policy.tinker: http://HOST:8703}."
        )
    limits = config.service
    model = find_base(config.model_copy(update={"service": limits.model_copy(update={"max_length": 2})}))
    longest = min(limits.max_length, model.max_length or limits.max_length)
    limits = limits.model_copy(update={"max_length": longest, "model_name": model.base})
    return config.model_copy(update={"service": limits})


class BaseServer(AbstractContextManager["BaseServer"]):
    """The process of `rlhf tinker` for the trials of a sweep, at one address of this machine."""

    def __init__(self, config: TinkerConfig, request: StopRequest) -> None:
        self.config, self.request, self.ends = config, request, 0
        folder = config.run.dir / NAME
        self.folder, self.file, self.log = folder, folder.with_suffix(".yaml"), folder.with_suffix(".log")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> BaseServer:
        """Start the server, and wait for its address or a signal. RunError: the server ends."""
        logger.info("starting the server of the shared base model; its log is %s", self.log)
        write_atomic(self.file, server_file(self.config))
        self._start()
        self.request.ends_by_itself = True  # a signal ends the wait
        give_up = time.monotonic() + self.config.cluster.start_timeout_s + BESIDES_START_S
        try:
            while not self._is_ready() and self.request.came is None:
                if (code := self.process.poll()) is not None:
                    raise RunError(f"the server of sweep.shared_base did not start: {self._why(code)}")
                if time.monotonic() > give_up:
                    raise RunError(f"the server of sweep.shared_base did not start in time; see {self.log}")
                time.sleep(POLL_S)
        except BaseException:
            self.__exit__()
            raise
        logger.info("the trials share the base model at %s", self.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.interrupt()
        wait_for_all([self.process], self.request)
        self.request.ends_by_itself = False

    def keep_running(self) -> None:
        """Start an ended server again. RunError: the server has ended too often."""
        if (code := self.process.poll()) is None:
            return
        self.ends += 1
        if self.ends > MOST_ENDS:
            raise RunError(f"the server of sweep.shared_base ended {self.ends} times: {self._why(code)}")
        logger.warning("the server of sweep.shared_base is started again. It ended: %s", self._why(code))
        self._start()

    def _start(self) -> None:
        self.log_bytes = self.log.stat().st_size if self.log.exists() else 0
        command = [*COMMAND, str(self.file), "--port", str(self.port)]
        self.process = TrialProcess(command, self.log, MachineShare())

    def _output(self) -> str:
        return self.log.read_bytes()[self.log_bytes :].decode(errors="replace")

    def _is_ready(self) -> bool:
        return f"serving {self.url}" in self._output()

    def _why(self, code: int) -> str:
        return f"{explain_failure(self.folder, self._output(), code)} (see {self.log})"
