"""Describe a client's model besides the weights, in a file of the model's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.adapters import AdapterShape
from rlhf.errors import RunError
from rlhf.tracking.run_folder.atomic import read_object, write_atomic

RECORD = "model.json"


def lora_fields(shape: AdapterShape | None) -> dict[str, Any]:
    """Return the protocol's words for a shape. None: not known yet."""
    return {"is_lora": shape is None or not shape.trains_all, "lora_rank": shape.rank or None if shape else None}


@dataclass(slots=True, kw_only=True)
class ModelRecord:
    """The description of a model besides the weights."""

    model_id: str
    session_id: str
    owner: str
    base_model: str
    created: str
    shape: AdapterShape | None = None  # None until the model's first request is carried out
    user_metadata: Mapping[str, Any] | None = None
    is_finished: bool = False  # the session has ended, and only the checkpoints are left

    @classmethod
    def read(cls, file: Path) -> ModelRecord:
        """Return the record in a file. RunError: the file is damaged."""
        values = read_object(file)
        if values is None:
            raise RunError(f"{file} is damaged. Restore the file from a copy, or remove the folder of this model.")
        shape = None if values["shape"] is None else AdapterShape(**values["shape"])
        return cls(**values | {"shape": shape})

    def write(self, folder: Path) -> None:
        write_atomic(folder / RECORD, json.dumps(asdict(self)) + "\n", waits=False)
