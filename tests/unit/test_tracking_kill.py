"""A run killed by SIGKILL at any moment leaves a folder that the next start repairs and continues."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.tracking.run_folder.atomic import read_lines
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker, read_metrics

# Every step writes all that a step can write, as fast as it can; each checkpoint holds its step.
_RUN = """
import sys
from pathlib import Path
from rlhf.tracking.run_folder.errors import ErrorRecord
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.tracking.run_folder.atomic import write_lines
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker

with RunFolder.open(Path(sys.argv[1]), "run", resume=True) as folder:
    start = folder.latest_checkpoint() or 0
    tracker, timeline = Tracker(folder.path), Timeline(folder.timeline)
    tracker.truncate_after(start)
    print("started", flush=True)
    for step in range(start + 1, 100_000):
        with timeline.span("update", "policy", step=step):
            aside = folder.begin_checkpoint(step)
            for name in "abc":
                (aside / name).write_text(f"{step} " * 1000)
        write_lines(samples_path(folder.path, step), [{"step": step}])
        tracker.log_error(ErrorRecord(step=step, stage="rewards", kind="raised", message="x" * 500))
        tracker.log(step, {"update/lr": float(step)})
        folder.seal(folder.checkpoint(step), step=step)
        folder.commit_checkpoint(step)
        folder.prune(2)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.11, 0.23, 0.37])
def test_killed_at_any_moment(tmp_path: Path, seconds: float) -> None:
    reached = 0
    for pause in (seconds, seconds / 2):
        with subprocess.Popen([sys.executable, "-c", _RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout.readline() == "started\n"
            time.sleep(pause)
            run.send_signal(signal.SIGKILL)
            run.wait(timeout=10)
        with RunFolder.open(tmp_path, "run", resume=True) as folder:
            step = folder.latest_checkpoint() or 0
            assert step >= reached
            reached = step
            if step:
                assert (folder.checkpoint(step) / "c").read_text() == f"{step} " * 1000
                assert (folder.checkpoints / "latest").resolve().name in {f"step_{step:06d}", f"step_{step - 1:06d}"}
            Tracker(folder.path).truncate_after(step)
            steps = list(range(1, step + 1))
            assert [row["step"] for row in read_metrics(folder.path)] == steps
            assert [row["step"] for row in read_lines(folder.errors)] == steps
            assert [row["step"] for file in sorted(folder.samples.iterdir()) for row in read_lines(file)] == steps
            Timeline(folder.timeline).close()
            traced = [e["args"]["step"] for e in json.loads(folder.timeline.read_text()) if e["ph"] == "X"]
            assert set(steps) <= set(traced)
