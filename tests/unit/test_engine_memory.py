"""A failed allocation names the place and the keys for less memory; every other error passes through."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args
from unittest.mock import Mock

import pytest
import torch
from pydantic import BaseModel

from actors.rollout.engine_thread import EngineLoop
from rlhf.config.schema.root import Config
from rlhf.engine.memory import advice_on_memory, explains_out_of_memory, peak_memory
from rlhf.errors import RunError
from rlhf.role_table import Role


def allocate_too_much() -> None:
    torch.empty(2**55, dtype=torch.uint8)  # 32 PiB: torch's CPU allocator refuses at once


@pytest.mark.parametrize(
    "fail", [allocate_too_much, Mock(side_effect=torch.OutOfMemoryError("CUDA")), Mock(side_effect=MemoryError)]
)
def test_names_place_and_keys(fail: Callable[[], None]) -> None:
    message = r"critic rank 3 during update with a micro-batch of 4096 tokens .*max_tokens_per_microbatch, critic\."
    with (
        pytest.raises(RunError, match=message),
        explains_out_of_memory(role="critic", stage="update", rank=3, tokens=4096),
    ):
        fail()


@pytest.mark.parametrize("role", ["policy", "critic", "reference", "reward", "rollout"])
def test_every_key_that_a_role_is_told_exists(role: Role) -> None:
    """A message with an unknown key would lead to the next error."""
    named = re.findall(r"[a-z_]+(?:\.[a-z_]+)+", advice_on_memory(role))
    assert len(named) >= 3
    for key in named:
        section: Any = Config
        for part in key.split("."):
            fields = section.model_fields
            assert part in fields, f"{key}: {section.__name__} has no {part}"
            kinds = [fields[part].annotation, *get_args(fields[part].annotation)]
            section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def test_an_engine_names_its_own_keys() -> None:
    loop = EngineLoop(allocate_too_much, name="rollout engine 0")
    with pytest.raises(RunError, match=r"did not start: .*cluster\.roles\.rollout\.max_num_seqs"):
        loop.start().result(timeout=60)
    loop.stop(timeout_s=60)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="mat1"), explains_out_of_memory(role="policy", stage="update", rank=0):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_peak_is_of_this_process() -> None:
    assert 0.1 < peak_memory().rss_gib < 64
