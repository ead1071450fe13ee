"""The start of a submitted job's processes: `python -m actors.jobs.entrypoint train ...` is `rlhf train ...` there.

This module sets the variables of the archive's file: in the driver here, and in every worker as Ray's set-up hook.
Ray's runtime environment does not have the variables, because the dashboard and each node's log show this environment.
So nothing prints the values.
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

ENVIRONMENT = ".rlhf-environment.json"  # in the job's folder, where its processes start
SETUP_HOOK = "actors.jobs.entrypoint.take_environment"


def take_environment() -> None:
    file = Path(ENVIRONMENT)
    if file.exists():
        os.environ.update(json.loads(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    take_environment()
    runpy.run_module("rlhf.cli", run_name="__main__")
