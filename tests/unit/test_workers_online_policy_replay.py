"""A policy with router replay computes with the experts of the rollouts, in the order of the micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.routers.replay import RouterReplay
from rlhf.types import RoutedRollouts
from rlhf.workers.microbatches import SharedPrefixes, Temperatures, split_microbatches
from rlhf.workers.online.policy import PolicyWorker
from tests.tiny_architectures import VOCABULARY, tiny_model

LENGTHS = [9, 9, 6]
NUM_TOKENS = sum(LENGTHS)


def test_each_token_of_a_micro_batch_has_its_own_experts() -> None:
    model = tiny_model("qwen3_moe").eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)
    first = torch.randint(4, (NUM_TOKENS, 2, 1), generator=generator)
    experts = torch.cat([first, (first + 1) % 4], dim=-1).to(torch.int16)
    ids[9:13], experts[9:13] = ids[:4], experts[:4]  # the second response has the prompt of the first
    mask = torch.ones(NUM_TOKENS, dtype=torch.bool)
    mask[[0, 1, 2, 3, 9, 10, 11, 12, 18]] = False
    rollouts = RoutedRollouts(
        sequence_ids=torch.arange(3),
        lengths=torch.tensor(LENGTHS),
        token_ids=ids,
        response_mask=mask,
        rollout_logprobs=torch.zeros(NUM_TOKENS),
        versions=torch.zeros(NUM_TOKENS, dtype=torch.int64),
        experts=experts,
    )
    worker: Any = object.__new__(PolicyWorker)
    worker.device, worker.replay = torch.device("cpu"), RouterReplay(model)
    worker.engine = SimpleNamespace(forward=lambda function, *row, **options: function(model, *row, **options))
    share: Any = SimpleNamespace(rollouts=rollouts, temperatures=Temperatures(common=1.0, by_token=None))
    prefixes = SharedPrefixes(token_ids=ids, keys=(0, 0, 1), lengths=(4, 4, 1))
    found = torch.zeros(NUM_TOKENS)
    with torch.no_grad():
        for microbatch in split_microbatches(LENGTHS, [2, 0, 1], max_tokens=15, prefixes=prefixes):
            found[microbatch.tokens] = worker.forward(policy_logprobs_only, share, microbatch)
        parts = []
        columns = (ids, experts, mask)
        for own_ids, own_experts, own_mask in zip(*(column.split(LENGTHS) for column in columns), strict=True):
            with worker.replay.of(own_experts):
                own = policy_logprobs_only(model, own_ids, torch.tensor([len(own_ids)]), mask=own_mask)
            parts.append(own)
    torch.testing.assert_close(found, torch.cat(parts))
