"""Drafts on a CPU get the sampling parameters of their request, by vLLM's own function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.sample import rejection_sampler

from actors.vllm_patches.drafts_cpu import repeated_for_drafts


def test_every_draft_has_the_parameters_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", repeated_for_drafts)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(5, 1)
    sampling: Any = SimpleNamespace(
        all_greedy=False,
        temperature=torch.tensor([0.5, 0.0, 2.0]),  # the second is greedy
        top_k=torch.tensor([4, 4, 2], dtype=torch.int32),
        top_p=torch.tensor([1.0, 1.0, 1.0]),
    )
    found = rejection_sampler.apply_sampling_constraints(logits.clone(), torch.tensor([2, 3, 5]), sampling)
    expected = logits / torch.tensor([0.5, 0.5, 1.0, 2.0, 2.0])[:, None]
    expected[3:, :2] = float("-inf")
    torch.testing.assert_close(found, expected)
