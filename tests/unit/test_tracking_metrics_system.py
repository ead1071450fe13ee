"""The load of a node comes from the kernel and from nvidia-smi."""

from __future__ import annotations

import time

import pytest

from rlhf.tracking.metrics.system import NodeSampler, gpu_use


def test_a_busy_core_shows() -> None:
    sampler = NodeSampler()
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass
    found = {key: one.result() for key, one in sampler.take().items()}
    assert 0.0 < found["cpu_fraction"] <= 1.0
    assert found["memory_gib"] > 0.05
    sampler.stop()


def test_gpus_of_a_node_are_taken_together() -> None:
    found = gpu_use("30, 1024\n50, 3072\n")
    assert found["gpu_fraction"].result() == pytest.approx(0.4)  # (30 + 50) / 2 per cent
    assert found["gpu_memory_gib"].result() == pytest.approx(4.0)
    assert gpu_use("") == {}
    assert gpu_use("Unable to determine the device handle for GPU 0000:00:1E.0: Unknown Error\n30, 1024") == gpu_use(
        "30, 1024"
    )
    assert gpu_use("[N/A], 1024\n") == {}  # a slice of a GPU does not say how busy it is
