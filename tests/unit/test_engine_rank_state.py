"""A rank's state in bfloat16 at stage 0 is restored, where DeepSpeed cannot spread the float32 weights."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from rlhf.engine.rank_state import RankState


def test_bfloat16_weights_follow_the_float32_weights_that_were_restored() -> None:
    module = nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    master = module.weight.detach().float().clone()
    wrapped = SimpleNamespace(fp16_groups=[[module.weight]], fp32_groups=[[master]])
    counters = {"global_steps": 0, "global_samples": 0, "skipped_steps": 0}
    engine = SimpleNamespace(optimizer=wrapped, module=SimpleNamespace(module=module), **counters)
    state = RankState(engine, torch.optim.AdamW([master], lr=0.0), zero_stage=0)
    state.create()
    values = state.values()
    state.tensors()["master 0"].fill_(0.5)  # as a snapshot replaces it
    state.restore(values)
    assert torch.equal(module.weight, torch.full((2, 3), 0.5, dtype=torch.bfloat16))
