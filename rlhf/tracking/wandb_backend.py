"""W&B as a tracker back end: offline (files in the run folder, `wandb sync` later) or online.

Opened once by the driver; nothing else in the project calls W&B. Every call has a deadline: W&B may fail the start of a
run, never hang it, and never stop a run that is under way.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rlhf.errors import RunError, UserError
from rlhf.tracking.atomic import write_atomic
from rlhf.tracking.logs import redact, redact_config

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MARGIN_S = 10.0  # W&B keeps deadlines of its own; ours, this much later, are for what those do not cover


def open_wandb(
    folder: Path,
    *,
    mode: Literal["offline", "online"],
    project: str,
    name: str,
    config: Mapping[str, Any],
    group: str | None = None,
    tags: Sequence[str] = (),
    timeout_s: float = 60.0,
) -> WandbBackend:
    """Start, or after a resume continue, the run folder's W&B run (its id lies in <folder>/wandb_run_id).

    `config` is masked before it leaves the process. UserError: online without credentials. RunError: W&B did not start
    within timeout_s.
    """
    import wandb

    id_path = folder / "wandb_run_id"
    if not id_path.exists():
        write_atomic(id_path, uuid.uuid4().hex[:12] + "\n")
    run_id = id_path.read_text(encoding="utf-8").strip()

    def start() -> wandb.Run:
        if mode == "online" and not wandb.login(prompt=False):
            raise UserError(
                "tracking.wandb is online, but W&B has no credentials here: set WANDB_API_KEY, run `wandb login`, or "
                "set tracking.wandb=offline."
            )
        return wandb.init(
            mode=mode,
            dir=folder,
            id=run_id,
            project=project,
            name=name,
            group=group,
            tags=list(tags),
            config=redact_config(config),
            resume="allow" if mode == "online" else None,  # offline has nothing to look the id up in
            settings=wandb.Settings(
                init_timeout=timeout_s,
                finish_timeout=timeout_s,  # at the interpreter's exit too, where there is no thread to abandon
                finish_timeout_raises=True,
                console="off",
                silent=True,
                disable_code=True,
                x_disable_meta=True,  # it would upload the command line, which may hold secrets
            ),
        )

    try:
        run = _within(timeout_s + _MARGIN_S, "starting", start)
    except (wandb.errors.Error, TimeoutError, OSError) as error:
        raise RunError(
            f"tracking: W&B did not start ({mode}): {redact(str(error)).rstrip('.')}. "
            "Set tracking.wandb=offline, or off; metrics.jsonl is written in any case."
        ) from error
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # W&B's own counter restarts at 0 in a resumed offline run
    return WandbBackend(run, timeout_s=timeout_s)


class WandbBackend:
    """A started W&B run. After its first failure it is left alone, with one warning."""

    def __init__(self, run: wandb.Run, *, timeout_s: float) -> None:
        self._run = run
        self._timeout_s = timeout_s
        self._broken = False

    @property
    def run_id(self) -> str:
        """Id of the W&B run."""
        return str(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Queue one row; W&B's own process writes or sends it."""
        row = {"step": step, **{key: value for key, value in metrics.items() if value is not None}}
        self._try("logging", lambda: self._run.log(row))

    def close(self, *, failed: bool) -> None:
        """Wait for W&B to write or send the rest."""
        self._try("finishing", lambda: self._run.finish(exit_code=1 if failed else 0))

    def _try(self, what: str, call: Callable[[], None]) -> None:
        import wandb

        if self._broken:
            return
        try:
            _within(self._timeout_s + _MARGIN_S, what, call)
        except (wandb.errors.Error, TimeoutError, OSError) as error:
            self._broken = True
            logger.warning(
                "W&B failed while %s: %s. The run goes on without it: metrics.jsonl has all, and `wandb sync %s` "
                "sends what W&B has kept.",
                what,
                error,
                self._run.dir,
            )


def _within(timeout_s: float, what: str, call: Callable[[], T]) -> T:
    """The call's result, from a thread that is abandoned at the deadline. TimeoutError says what was awaited."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  (handed to the waiting thread, which raises it)
            future.set_exception(error)

    threading.Thread(target=work, name=f"wandb {what}", daemon=True).start()
    try:
        return future.result(timeout_s)
    except TimeoutError as error:
        if future.done():
            raise
        raise TimeoutError(f"waited {timeout_s:g} s for W&B ({what})") from error
