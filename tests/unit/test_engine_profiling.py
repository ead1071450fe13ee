"""A profile of a step is a Chrome trace of its operations, and a process without a profile writes none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from rlhf.engine.profiling import StepProfiler


def test_a_profile_names_the_operations_of_its_step(tmp_path: Path) -> None:
    profiler, path = StepProfiler(), tmp_path / "step_000001" / "policy-0.json.gz"
    profiler.start()
    torch.ones(4).cos()
    profiler.start()  # the step is repeated
    torch.ones(4, 4) @ torch.ones(4, 4)
    profiler.stop(path)
    with gzip.open(path) as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
    assert "aten::cos" not in names
    profiler.stop(tmp_path / "again.json.gz")
    assert not (tmp_path / "again.json.gz").exists()
