"""Define name, folder, seed and trackers of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, PositiveInt

from rlhf.sections import OnlyIn, OnlyWith, Section

OF_WANDB = OnlyWith("wandb", "offline", "online")
Tag = Annotated[str, Field(min_length=1, max_length=64)]
_MAX_PATH_BYTES = 3000  # Linux allows 4,095; file names inside the run's folder need the rest


def _at_home(value: Path) -> Path:
    if "\0" in str(value):
        raise ValueError("holds a null character, which no path may")
    size = len(os.fsencode(value))
    if size > _MAX_PATH_BYTES or any(len(os.fsencode(part)) > 255 for part in value.parts):
        raise ValueError(f"has {size} bytes; a path may have {_MAX_PATH_BYTES}, and the name of a folder 255")
    try:
        return value.expanduser()
    except RuntimeError as error:
        raise ValueError(f"got {str(value)!r}, and there is no such home folder: {error}") from error


Folder = Annotated[Path, AfterValidator(_at_home)]


class RunConfig(Section):
    """Name, folder and seed of a run. All files are in `<dir>/<name>/`."""

    name: str = Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")
    """Folder of the run below `dir`, and the run's name in W&B. A stage of a pipeline is called PIPELINE/STAGE."""
    dir: Folder = Field(default=Path("runs"), validate_default=False)
    """Folder for runs. A leading `~` is your home folder."""
    mirror: str | None = Field(default=None, min_length=1)
    """URL of fsspec for a remote folder of runs, such as `s3://bucket/runs`. The run's folder is copied there at
    checkpoints and at the end. `--resume auto` fetches the copy if the local folder is missing or older. null: no copy.
    """
    push_to_hub: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", max_length=96)
    """Repository on the Hugging Face hub, OWNER/NAME. final/ is uploaded at the end. A stage of a pipeline uses
    OWNER/NAME-STAGE. A new repository is private. The upload needs HF_TOKEN or a login. null: no upload."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of data order, sampling, initialisation and dropout."""

    @property
    def repository(self) -> str | None:
        stage = self.name.partition("/")[2]
        return f"{self.push_to_hub}-{stage}" if self.push_to_hub is not None and stage else self.push_to_hub


class ProfileConfig(Section):
    """Profiles of some steps by torch.profiler, for ranks and engines, in profiles/ of the run's folder."""

    steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Steps to profile. A profiled step takes longer."""


class TrackingConfig(Section):
    """Trackers of the run. metrics.jsonl, samples and timeline are always written."""

    wandb: Literal["off", "offline", "online"] = "off"
    """W&B: `online` needs WANDB_API_KEY or a login."""
    wandb_project: Annotated[str, OF_WANDB] = "rlhf"
    """W&B project."""
    wandb_entity: Annotated[str | None, OF_WANDB] = Field(default=None, min_length=1)
    """W&B user or team. null: the account's default."""
    wandb_group: Annotated[str | None, OF_WANDB] = Field(default=None, min_length=1)
    """W&B group. null: the pipeline's name for stages, otherwise no group. Trials of a sweep use the sweep's name."""
    wandb_tags: Annotated[tuple[Tag, ...], OF_WANDB] = ()
    """W&B tags."""
    wandb_checkpoints: Annotated[bool, OF_WANDB, OnlyIn("training")] = False
    """Also save checkpoints and the final model as W&B artifacts."""
    tensorboard: bool = False
    """Write TensorBoard files in the run's folder."""
    trackers: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    """Trackers by name: mlflow, swanlab, trackio, or a tracker of an installed package (entry points `rlhf.trackers`).
    The value is a mapping of arguments, `{}` for none. docs/tracking.md lists the arguments."""
    profile: Annotated[ProfileConfig | None, OnlyIn("training")] = None
    """Profiles of chosen steps, in addition to timeline.json. null: no profiles."""
    samples_per_step: Annotated[int, OnlyIn("rollouts")] = Field(default=16, ge=0)
    """Responses written to samples/ at each step, token by token. All evaluation responses are written."""
