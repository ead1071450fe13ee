"""A frozen model leaves a GPU shared with an engine, and comes back unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.config.schema.model import ReferenceConfig
from rlhf.engine.distributed import RankContext
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.models.packed.row_layout import RowLayout, row_layout
from rlhf.types import TokenValues
from rlhf.workers.frozen.reference import ReferenceWorker
from tests.fixtures.workers import PLACE, rollouts_of
from tests.tiny_architectures import tiny_model

ROLLOUTS = rollouts_of((0, range(6), range(2, 6)))


def worker_of(model: Path, place: RankContext = PLACE, *, temperature: float = 1.0) -> ReferenceWorker:
    config = ReferenceConfig(model=str(model), dtype="float32")
    worker = ReferenceWorker(config, place, temperature=temperature, samples_per_prompt=1, max_tokens_per_microbatch=64)
    worker.start()
    return worker


def logprobs_of(worker: ReferenceWorker, temperatures: Mapping[int, float] = {}) -> Tensor:
    column, _ = worker.logprobs(None, temperatures, ROLLOUTS)
    assert isinstance(column, TokenValues)
    return column.values


def test_logprobs_are_at_the_temperature_of_the_samples(tiny_model: Path) -> None:
    """Sequence 0 was sampled at the common temperature of 0.5, or at a separate temperature of 2."""
    worker, tokens = worker_of(tiny_model, temperature=0.5), ROLLOUTS.token_ids
    logits = AutoModelForCausalLM.from_pretrained(tiny_model)(tokens[None]).logits[0, 1:5].detach()
    for own, temperature in (({}, 0.5), ({0: 2.0}, 2.0)):
        expected = (logits / temperature).log_softmax(-1)[torch.arange(4), tokens[2:]]
        torch.testing.assert_close(logprobs_of(worker, own)[2:], expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_was_put_aside_says_the_same_and_a_new_model_does_not(tiny_model: Path, tmp_path: Path) -> None:
    other = build_tiny_llama(tmp_path / "other", seed=1)
    worker = worker_of(tiny_model)
    before = logprobs_of(worker)
    for _ in range(2):
        worker.move_to_host()
        worker.reload()
        assert torch.equal(logprobs_of(worker), before)
    worker.become(str(other))
    worker.move_to_host()
    worker.reload()
    assert torch.equal(logprobs_of(worker), logprobs_of(worker_of(other)))


def test_frequencies_are_chosen_by_the_longest_sequence_of_the_run(tmp_path: Path) -> None:
    """A response has the long factors of the model if another sequence needs long factors, as in the engine."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    tiny_model("phi3", rope_parameters=rope | {"rope_theta": 100.0}, **sizes).save_pretrained(tmp_path)
    workers = [worker_of(tmp_path, replace(PLACE, longest_sequence=longest)) for longest in (16, 17, 64)]
    assert [row_layout(worker.model) for worker in workers] == [RowLayout.SHARED_PROMPTS] * 3
    short, long, longer = map(logprobs_of, workers)
    assert torch.equal(long, longer)
    assert (short - long).abs().max() > 1e-3
