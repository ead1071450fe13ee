"""The base class of callbacks: objects of the calling script that follow a run and may stop it.

Callbacks take part in the run: the loop waits for each call, and an exception ends the run. A tracker
(rlhf.tracking.sinks.backends) is a view instead, whose failure changes nothing. rlhf.controller.callback_calls makes
the calls. Every reward process imports this module, so it uses only the standard library.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.tracking.sinks.installed import TrackedRun


class StopRun(Exception):
    """Raised by a callback to end the run as early stopping does: with a checkpoint and the final model.

    A pipeline continues with the next stage. The text is the reason, for the log.
    """


class Callback:
    """Follow the training stages of a run. All calls come from one thread, and never at the same time.

    A callback overrides the needed methods: here all methods do nothing. A method may raise StopRun.
    """

    timeout_s: float = 600.0  # limit for each call; a slower call ends the run

    def on_start(self, run: TrackedRun) -> None:
        """Begin a stage with all roles started. `run` has name, folder, config, and the steps done before."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics `eval/...` of an evaluation. Step 0 is the evaluation before training."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step, as in the step's row of metrics.jsonl."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Take a whole checkpoint. Later checkpoints may remove it (train.keep_checkpoints)."""

    def on_end(self, error: Exception | None) -> None:
        """End a stage. The final model is in the run's folder, unless `error` or the step `until` ended the stage."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raise UserError for an object that is no callback, or has a method that would never or not be called."""
    if not isinstance(callbacks, Sequence):
        raise UserError(f"callbacks: is of type {type(callbacks).__name__}, expected a list of callbacks")
    for index, callback in enumerate(callbacks):
        place = f"callbacks[{index}]"
        if not isinstance(callback, Callback):
            kind = (
                f"the class {callback.__name__}" if inspect.isclass(callback) else f"of type {type(callback).__name__}"
            )
            raise UserError(f"{place}: is {kind}, expected an instance of a subclass of rlhf.Callback")
        name, limit_s = type(callback).__name__, callback.timeout_s
        if not isinstance(limit_s, int | float) or not limit_s > 0:
            raise UserError(f"{place}: `{name}.timeout_s` is {limit_s!r}, expected a number of seconds above 0")
        for method in dir(callback):
            if method.startswith("on_") and method not in EVENTS:
                near = (difflib.get_close_matches(method, EVENTS, n=1) or EVENTS)[0]
                raise UserError(f"{place}: `{name}.{method}` is never called; did you mean `{near}`?")
        for event in EVENTS:
            method = getattr(callback, event)
            if inspect.iscoroutinefunction(method):
                raise UserError(f"{place}: `{name}.{event}` is async; a callback is called without an event loop")
            expected = [parameter for parameter in inspect.signature(getattr(Callback, event)).parameters][1:]
            try:
                inspect.signature(method).bind(*expected)
            except TypeError as error:
                text = f"`{name}.{event}` cannot be called as `{event}({', '.join(expected)})`"
                raise UserError(f"{place}: {text}: {error}") from error
