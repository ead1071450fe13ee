"""Write the folder of a client's state as the server does, around content of real ranks."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.adapters import AdapterShape
from rlhf.hosting.checkpoints import Checkpoint, Checkpoints, adapter_name, now
from rlhf.hosting.model_run import begin_folder

MODEL = "5e55:train:0"


def client_state(
    root: Path, content: Path, shape: AdapterShape, *, base: str, dtype: str = "float32", kind: str = "weights"
) -> Path:
    """Return the folder of a state in the server's folder `root`, with a copy of the content."""
    begin_folder(root / adapter_name(MODEL), base=base, dtype=dtype)
    checkpoints = Checkpoints(root, quota=1 << 40)

    async def write(folder: Path) -> Mapping[str, Any]:
        shutil.copytree(content, folder)
        return {}

    draft = Checkpoint(
        model_id=MODEL,
        kind=kind,
        name="kept",
        owner="alice",
        seq_id=1,
        base_model="served/name",
        shape=shape,
        created=now(),
    )
    return checkpoints.folder(asyncio.run(checkpoints.make(draft, write, overwrites=False)))
