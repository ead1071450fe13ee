"""Define the exceptions that end a command. The command line reports each exception with an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

RESUMES = "The run can be resumed with --resume auto."
LossKind = Literal["died", "hung", "out_of_memory"]


class _WithoutTraceback:
    """An error with a text for the user. A notebook shows only the text."""

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class UserError(_WithoutTraceback, Exception):
    """The user's input is wrong: config, data or arguments. Exit code 2. The message names the place and the fix."""


class RunError(_WithoutTraceback, Exception):
    """Something failed at run time. Exit code 1. The message names stage, actor, rank and cause."""


class StorageFull(RunError):
    """A disk or shared memory stayed full for `cluster.room_timeout_s`, or the object store of Ray is full."""


class NodeNotReplaced(RunError):
    """No node took the place of a lost node in time. The message names the limit."""


class WorkerLost(RunError):
    """A worker no longer works: the process died, or gave no answer and was given up.

    A worker started in the same place can repeat the work. If the loss ends the run, the message says how to resume.
    """

    def __init__(
        self, reason: str, *, role: str, rank: int, stage: str, kind: LossKind, stack: str | None = None
    ) -> None:
        """Create the error. `stack`: of a hung worker."""
        super().__init__(f"{reason} {RESUMES}")
        self.reason, self.role, self.rank = reason, role, rank
        self.stage, self.kind, self.stack = stage, kind, stack


class ResultsLost(WorkerLost):
    """Results needed by a worker are gone with the node that held the results. The worker itself works."""


class AdaptersLost(WorkerLost):
    """A rank was lost, and all ranks were started again, without the adapters of clients. `loss`: of the rank.

    An adapter comes back by `create` and `load`, and by a repetition of the calls after the saved state.
    """

    def __init__(self, loss: WorkerLost) -> None:
        super().__init__(loss.reason, role=loss.role, rank=loss.rank, stage=loss.stage, kind=loss.kind)
        self.loss = loss


class ChildLost(RunError):
    """A process or a GPU needed by a worker was lost. The driver takes the worker for lost."""

    def __init__(self, reason: str, *, kind: LossKind = "died") -> None:
        super().__init__(reason)
        self.kind = kind


class Interrupted(_WithoutTraceback, KeyboardInterrupt):
    """Ctrl-C, or the interrupt of a notebook, ended the work. Exit code 130. The message names the stored results."""


class Preempted(_WithoutTraceback, Exception):
    """A signal ended the run, and --resume auto continues it. Exit code 75. The message names the stored results."""


def known_error(error: BaseException) -> UserError | RunError | None:
    """Return the error meant for the user, also from inside a task group's error."""
    if isinstance(error, UserError | RunError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((known for known in map(known_error, error.exceptions) if known is not None), None)
    return None


@contextmanager
def prefix_errors(key: str, *, unless: str | None = None) -> Iterator[None]:
    """Put the key of the configuration in front of the message of a UserError, unless another key is there."""
    try:
        yield
    except UserError as error:
        if unless is not None and str(error).startswith(unless):
            raise
        raise UserError(f"{key}: {error}") from error
