"""Define the stages of a pipeline: training runs, merges and evaluations. The sections of a stage decide the kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.merge import MergeConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.run import RunConfig
from rlhf.sections import Section


class MergeStage(Section):
    """A pipeline stage for merging models."""

    run: RunConfig
    """Name and folder."""
    merge: MergeConfig
    """The merge, without `out`. The result is the stage's final/."""


Stage = Config | MergeStage | EvaluationStage

# The section that determines the kind of a stage.
KINDS: Mapping[str, type[Stage]] = {"algorithm": Config, "merge": MergeStage, "evaluate": EvaluationStage}
WHAT: Mapping[type[Stage], str] = {Config: "a training run", MergeStage: "a merge", EvaluationStage: "an evaluation"}


def run_folder(stage: Stage) -> Path:
    return stage.run.dir / stage.run.name


def final_folder(stage: Stage) -> Path:
    """Return the folder of the model made by a training run or a merge."""
    return run_folder(stage) / "final"


def result_of(stage: Stage) -> Path:
    """Return the path created by the end of the stage."""
    return run_folder(stage) / "eval.json" if isinstance(stage, EvaluationStage) else final_folder(stage)


def kind_of(sections: Mapping[str, Any]) -> type[Stage]:
    return next((root for section, root in KINDS.items() if section in sections), Config)
