"""Run the command line in tests/chaos, and write the states of all placement groups before leaving Ray."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ray
from ray.util.placement_group import placement_group_table

from rlhf.cli import main

FILE = "CHAOS_PLACEMENT_GROUPS"  # the variable that names the file

if __name__ == "__main__":
    shut_down = ray.shutdown

    def note_and_shut_down() -> None:
        states = {name: row["state"] for name, row in placement_group_table().items()}
        Path(os.environ[FILE]).write_text(json.dumps(states), encoding="utf-8")
        shut_down()

    ray.shutdown = note_and_shut_down
    sys.exit(main())
