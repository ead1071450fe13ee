"""The description of an engine's checkpoint: engine.json, written by rank 0 beside the files of the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from rlhf.engine.partitions import Sharding
from rlhf.engine.training_engine import OptimizerName
from rlhf.errors import UserError
from rlhf.tracking.run_folder.atomic import write_atomic

_NAME = "engine.json"


class EngineRecord(BaseModel):
    """Settings of an engine with an effect on the files, and the number of optimizer steps."""

    model_config = ConfigDict(frozen=True, strict=True)

    model: str  # fingerprint of the architecture
    ranks: PositiveInt
    zero_stage: Literal[0, 1, 2, 3]
    dtype: str
    optimizer: OptimizerName
    groups: list[dict[str, NonNegativeInt]]  # elements of each trained parameter
    frozen_weights: str  # checksum
    steps: NonNegativeInt
    updates_per_step: PositiveInt  # optimizer steps of a training step

    @property
    def sharding(self) -> Sharding:
        return Sharding(ranks=self.ranks, zero_stage=self.zero_stage)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the record of a checkpoint. Raise UserError if there is none."""
        try:
            return cls.model_validate_json((folder / _NAME).read_bytes())
        except OSError as error:
            raise UserError(f"{folder} is not a whole snapshot of a training engine: {error}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            raise UserError(f"{folder / _NAME} does not hold the state of a training engine: {reason}.") from error

    def write(self, folder: Path) -> None:
        write_atomic(folder / _NAME, self.model_dump_json(indent=1))

    def steps_of(self, own: EngineRecord) -> int:
        """Return the optimizer steps that the engine of the record `own` would have made in as many training steps."""
        return round(self.steps * own.updates_per_step / self.updates_per_step)

    def refuse_other(self, own: EngineRecord, *, folder: Path) -> None:
        """Raise UserError if the checkpoint in the folder is of another model than the engine with the record `own`."""
        pairs = (("model", self.model, own.model), ("dtype", self.dtype, own.dtype))
        if differing := "; ".join(f"{key} {there} there, {here} here" for key, there, here in pairs if there != here):
            raise UserError(f"The snapshot {folder} cannot be continued by this run: {differing}.")

    def refuse_other_decay(self, own: EngineRecord, *, folder: Path) -> None:
        """Raise UserError if weight decay was switched on or off after the checkpoint: the groups of weights differ."""
        decayed = len(self.groups) > len(own.groups)  # decay needs more groups
        there, here = ("above 0", "at 0") if decayed else ("at 0", "above 0")
        if self.groups != own.groups:
            raise UserError(
                f"{folder} was written with train.weight_decay {there}, and it is {here} now. This puts the trained "
                "weights in other groups, and the state in this checkpoint cannot be regrouped. Keep "
                f"train.weight_decay {there}."
            )

    def refuse_other_base(self, frozen_weights: str, *, folder: Path) -> None:
        """Raise UserError if the frozen weights have another checksum than when the checkpoint was written."""
        if self.frozen_weights != frozen_weights:
            raise UserError(
                f"{folder} was trained on other frozen weights: their checksum was {self.frozen_weights}, and is "
                f"{frozen_weights} now. Restore the folder of the model as it was when the run began."
            )
