"""The engine's column of the table of tested architectures still describes a sync.

Frozen engines load the same weights from a folder. vLLM could lose other weights there.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from rlhf.models.support import support_by_type

ROWS = support_by_type().values()
SYNCED = [row.model_type for row in ROWS if row.engine[0].isdigit()]
FROZEN = ["axk1", "deepseek_v3", "ernie4_5_moe", "gemma3n_text", "laguna", "llama"]


@pytest.fixture(scope="module")
def importer() -> Iterator[Executor]:
    """A separate process that imports vLLM once."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        yield executor


def measure(model_type: str, frozen: bool, **changes: Any) -> str:
    from tests.support_engines import difference

    return difference(model_type, frozen=frozen, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SYNCED)
def test_an_engine_has_the_trainers_logprobs_after_a_sync(importer: Executor, model_type: str) -> None:
    assert float(importer.submit(measure, model_type, False).result(timeout=200.0)) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FROZEN)
def test_a_frozen_engine_has_the_trainers_logprobs(importer: Executor, model_type: str) -> None:
    assert float(importer.submit(measure, model_type, True).result(timeout=200.0)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_that_vllm_ties_is_a_lost_weight(importer: Executor, frozen: bool) -> None:
    said = importer.submit(measure, "lfm2", frozen, tie_word_embeddings=False).result(timeout=200.0)
    assert "vLLM has not loaded 1 weights" in said
    assert "lm_head.weight" in said
