"""On a GPU, a continued response's generator continues after the random draws of the earlier tokens."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.gpu_helpers import GPU

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocabulary", [320, 49_152, 262_144])
def test_skipped_draws_are_those_of_the_earlier_tokens(vocabulary: int) -> None:
    from actors.vllm_patches.generators import skip_draws

    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.empty(vocabulary, device=GPU).exponential_(generator=generator)

    uninterrupted, continued = (torch.Generator(device=GPU).manual_seed(7) for _ in range(2))
    for _ in range(5):
        draw(uninterrupted)
    skip_draws(continued, 5, vocabulary=vocabulary)
    assert torch.equal(draw(continued), draw(uninterrupted))
