"""Merges as stages: run them and record what they did."""

from __future__ import annotations

import logging
from pathlib import Path

from actors.run.run_record import recording
from rlhf.config.schema.stages import MergeStage
from rlhf.merging.merge import checked_sources, write_merge
from rlhf.preflight.merge import with_local_models
from rlhf.preflight.sources import prefix_errors

logger = logging.getLogger(__name__)


def run_merge(stage: MergeStage, pipeline: Path, *, resume: bool, quiet: bool) -> None:
    """Run the merge and write the stage's final/ atomically."""
    config = with_local_models(stage, pipeline)
    with recording(stage, resume=resume) as (record, _):
        folder = record.folder
        with prefix_errors(f"stages.{folder.path.name}"), record.timeline.span("merge", "controller"):
            sources = checked_sources(config, folder.final, key="run.dir")
            write_merge(config, sources, folder.begin_final(), out=folder.final, quiet=quiet)
        folder.commit_final()
    logger.info("%s: merged %s by %s", stage.run.name, ", ".join(config.models), config.method)
