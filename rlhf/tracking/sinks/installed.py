"""Find trackers by name: MLflow, trackio, SwanLab, and trackers of packages by entry points of the group
`rlhf.trackers`. Take tracker objects of `rlhf.train` too.

A tracker is a class. The constructor takes the run and the arguments from the configuration; the methods are
`TrackerBackend`'s. The class is constructed on the tracker's thread, so a failure there does not affect the run either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from rlhf.errors import UserError
from rlhf.extensions import LoadError, find_code, load_code
from rlhf.passed_objects import code_file
from rlhf.tracking.diagnosis.findings import Severity
from rlhf.tracking.sinks.backends import TrackedStep, TrackerBackend

if TYPE_CHECKING:
    from PIL.Image import Image

BUILT_IN = {  # by the name of the tracker, which is the name of the package and of the extra
    "mlflow": "rlhf.tracking.sinks.mlflow_backend:MlflowTracker",
    "swanlab": "rlhf.tracking.sinks.swanlab_backend:SwanlabTracker",
    "trackio": "rlhf.tracking.sinks.trackio_backend:TrackioTracker",
}
METHODS = ("log", "alert", "checkpoint", "close")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    name: str
    folder: Path
    config: Mapping[str, Any]  # all values in effect, without secrets
    done_steps: int | None  # steps before this start; None for a new run, -1 if a resumed run has no checkpoint
    image_of: Callable[[str], Image] | None = None  # returns a small version of an image of samples by its name


def installed_tracker(name: str, args: Mapping[str, Any], run: TrackedRun) -> InstalledTracker:
    """Load the class of a tracker without constructing it. UserError, naming the key: an unusable class."""
    key = f"tracking.trackers.{name}"
    source = find_code("tracker", name, key=key, built_ins=BUILT_IN)
    if source.entry is None:
        target: Any = _built_in(name, args, key=key)
    else:
        try:
            target = load_code(source)
        except LoadError as error:
            raise UserError(f"{key}: {error}") from error
    return _tracker(target, args, run, name=name, key=key)


def passed_tracker(value: Any, run: TrackedRun, *, index: int) -> InstalledTracker:
    """Return a tracker passed to the call: a class as of a package, without arguments, or an instance, which follows
    all stages. UserError: an unusable object."""
    key = f"trackers[{index}]"
    if inspect.isclass(value):
        return _tracker(value, {}, run, name=value.__name__, key=key)
    if not isinstance(value, TrackerBackend):
        raise UserError(
            f"{key}: is of type {type(value).__name__}, expected a subclass of "
            "rlhf.tracking.sinks.backends.TrackerBackend, or an instance of one"
        )
    return InstalledTracker(type(value).__name__, lambda: value, file=code_file(value))


def _tracker(target: Any, args: Mapping[str, Any], run: TrackedRun, *, name: str, key: str) -> InstalledTracker:
    if not inspect.isclass(target) or any(not callable(getattr(target, method, None)) for method in METHODS):
        raise UserError(
            f"{key}: a tracker is a class with the methods {', '.join(METHODS)}, and {target!r:.100} is not. Make it a "
            "subclass of rlhf.tracking.sinks.backends.TrackerBackend, which has all of these methods."
        )
    make = cast("Callable[..., TrackerBackend]", target)
    try:
        inspect.signature(target).bind(run, **args)
    except TypeError as error:
        raise UserError(f"{key}: {target.__name__} cannot be constructed with these arguments: {error}") from error
    file = None if target.__module__.startswith("rlhf.") else code_file(target)
    return InstalledTracker(name, lambda: make(run, **args), file=file)


def _built_in(name: str, args: Mapping[str, Any], *, key: str) -> type[TrackerBackend]:
    """Return the class. UserError: the package is not installed, or an argument is of another type."""
    if find_spec(name) is None:
        raise UserError(f"{key}: the package {name} is not installed: `pip install 'ray-rlhf[{name}]'`")
    tracker = cast("type[TrackerBackend]", resolve_name(BUILT_IN[name]))
    types = get_type_hints(tracker.__init__)
    for argument in args.keys() & types.keys():
        try:
            TypeAdapter(types[argument]).validate_python(args[argument], strict=True)
        except ValidationError as error:
            text = error.errors()[0]["msg"]
            raise UserError(f"{key}.{argument}: got {args[argument]!r}, but: {text}") from error
    return tracker


class InstalledTracker(TrackerBackend):
    """A tracker constructed at the first step."""

    def __init__(self, name: str, construct: Callable[[], TrackerBackend], *, file: str | None) -> None:
        self.name, self.file = f"the tracker {name}", file
        self._construct = construct

    @cached_property
    def _backend(self) -> TrackerBackend:
        return self._construct()

    def log(self, step: TrackedStep) -> None:
        self._backend.log(step)

    def alert(self, severity: Severity, title: str, text: str) -> None:
        self._backend.alert(severity, title, text)

    def checkpoint(self, step: int, folder: Path) -> None:
        self._backend.checkpoint(step, folder)

    def close(self, *, failed: bool) -> None:
        """Close the tracker, if there was anything to track."""
        if "_backend" in vars(self):
            self._backend.close(failed=failed)
