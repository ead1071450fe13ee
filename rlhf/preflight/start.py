"""Say how a run starts: the options of `rlhf train` outside the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.tracking.callbacks import Callback
from rlhf.tracking.display.progress import Mode
from rlhf.tracking.sinks.backends import TrackerBackend


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The options of one start, for all stages of a pipeline."""

    resume: bool = False  # run the unfinished stages only, each from its newest checkpoint
    from_step: int | None = None  # resume the first unfinished stage from the checkpoint of this step instead
    overwrite: bool = False  # replace the contents of the run's folder, once the inputs have been checked
    until: int | None = None  # stop a single run after this step, with a checkpoint for `resume`
    mode: Mode = "auto"
    callbacks: Sequence[Callback] = ()
    trackers: Sequence[TrackerBackend | type[TrackerBackend]] = ()  # objects, besides those of the configuration
