"""What the loop of a sweep meets when it goes on. Whole sweeps: tests/integration/test_sweep.py."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from actors.sweep import _wait_for_leftovers
from rlhf.config.sweep import load_sweep
from rlhf.errors import UserError
from rlhf.sweeps.journal import Journal
from rlhf.tracking.run_folder import lock_folder
from tests.unit.test_config_sweep import write_sweep


@pytest.mark.parametrize("stage", ["", "sft"])
def test_trials_of_a_killed_sweep_that_still_end_are_waited_for(tmp_path: Path, stage: str) -> None:
    with Journal.open(load_sweep(write_sweep(tmp_path)), resume=False) as journal:
        _wait_for_leftovers(journal, within_s=0.0)
        run = journal.run_folder(3) / stage
        run.mkdir(parents=True)
        held = lock_folder(run, key="run.name")
        with pytest.raises(UserError, match=rf"{run} is in use by process {os.getpid()}"):
            _wait_for_leftovers(journal, within_s=0.0)
        threading.Timer(0.5, os.close, [held]).start()
        _wait_for_leftovers(journal, within_s=30.0)
        os.close(lock_folder(run, key="run.name"))
