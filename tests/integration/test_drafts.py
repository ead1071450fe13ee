"""Speculative decoding with n-grams on a CPU: drafts change neither the sampled distribution nor reported values."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.weights.shm import ShmSender
from rlhf.errors import RunError
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.types import GroupRequest, Prompt, Rollouts, Sampling
from tests.integration.engine_helpers import call, engine, logprobs_of, model_like, sequences, spec, sync

pytestmark = pytest.mark.slow
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
KINDS, LENGTH, SAMPLES = 3, 4, 3200  # tokens possible at each position, tokens of a response, responses
TEMPERATURE, END = 2.0, 257
PROMPT = (65, 66, 67, 65, 66, 67, 65, 66)


def asked(samples: int, *, tokens: tuple[int, ...] = PROMPT, first: int = 0) -> GroupRequest:
    """Return samples of a repetitive prompt."""
    prompt = Prompt(prompt_id=first, token_ids=tokens, text="", columns={})
    seeds = tuple(range(first * samples, (first + 1) * samples))
    return GroupRequest(group_id=first, prompt=prompt, seeds=seeds, first_sequence_id=0)


def responses(rollouts: Rollouts) -> list[tuple[int, ...]]:
    return [tuple(one["token_ids"][one["response_mask"]].tolist()) for one in sequences(rollouts)]


def probabilities(model: Any) -> dict[tuple[int, ...], float]:
    """Return the trainer's probability of every response, under truncation to the likeliest tokens."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        longer = {response: probability for response, probability in found.items() if END in response}
        for response in found.keys() - longer.keys():
            with torch.no_grad():
                logits = model(torch.tensor([[*PROMPT, *response]])).logits[0, -1] / TEMPERATURE
            kept = logits.topk(KINDS)
            for token, share in zip(kept.indices.tolist(), kept.values.softmax(-1).tolist(), strict=True):
                longer[*response, token] = found[response] * share
        found = longer
    return found


def chi_square(counts: Counter[tuple[int, ...]], model: Any) -> tuple[float, int]:
    """Return the statistic of sampled responses against the trainer's probabilities, and the degrees of freedom."""
    expected = {response: SAMPLES * p for response, p in probabilities(model).items()}
    assert counts.keys() <= expected.keys()
    frequent = [response for response, count in expected.items() if count >= 5.0]
    cells = [(counts[response], expected[response]) for response in frequent]
    cells.append((SAMPLES - sum(seen for seen, _ in cells), SAMPLES - sum(wanted for _, wanted in cells)))
    return sum((seen - wanted) ** 2 / max(wanted, 1.0) for seen, wanted in cells), len(cells) - 1


def test_drafts_change_neither_the_distribution_nor_the_log_probabilities(tmp_path: Path, ray_local: None) -> None:
    folder = build_tiny_llama(tmp_path / "tiny", seed=0)
    model = model_like(folder, seed=1)
    sender = ShmSender(rank=0)
    greedy = Sampling(max_new_tokens=60, temperature=0.0)

    def refused(*args: Any, **options: Any) -> Any:
        raise RuntimeError("a draft was verified")

    with engine(spec(folder, engine_args={"speculative_config": DRAFTS})) as handle:
        sync(handle, sender.publish(model.named_parameters(), 1))
        truncated = Sampling(max_new_tokens=LENGTH, top_k=KINDS, temperature=TEMPERATURE)
        groups = call(*[handle.generate.remote(asked(64, first=i), truncated) for i in range(SAMPLES // 64)])
        counts = Counter(itertools.chain.from_iterable(responses(rollouts) for rollouts, _ in groups))
        statistic, freedom = chi_square(counts, model)
        assert freedom > 20
        assert statistic < freedom + 4.0 * (2.0 * freedom) ** 0.5

        warm = Sampling(max_new_tokens=60, temperature=0.7)
        rollouts, _ = call(handle.generate.remote(asked(64, first=500), warm))
        for one in sequences(rollouts):
            theirs = logprobs_of(model, one["token_ids"], temperature=0.7)
            difference = (theirs - one["rollout_logprobs"])[one["response_mask"]].abs()
            assert difference.max() < 1e-4
        with_drafts = responses(call(handle.generate.remote(asked(1, first=502), greedy))[0])
        call(handle.replace.remote("vllm.v1.sample.rejection_sampler", "rejection_sample", refused))
        with pytest.raises(RunError, match="a draft was verified"):
            call(handle.generate.remote(asked(1, first=503), greedy))
    with engine(spec(folder)) as handle:
        sync(handle, sender.publish(model.named_parameters(), 1))
        assert responses(call(handle.generate.remote(asked(1, first=502), greedy))[0]) == with_drafts
    sender.close()
