"""All tests here need a GPU that this build of torch can use."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail(
            "needs an NVIDIA GPU and a CUDA build of torch: torch.cuda.is_available() is False here", pytrace=False
        )
