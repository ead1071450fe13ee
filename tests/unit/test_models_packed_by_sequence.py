"""Layers other than attention compute each sequence of a row alone, and a branch after the tokens of its trunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.models.files.loading import enable_checkpointing
from rlhf.models.packed.attention import packed_attention
from rlhf.models.packed.by_sequence import mixers_of, separate_sequences
from rlhf.models.packed.forward import hidden_states, policy_logprobs
from rlhf.models.packed.packed_row import PackedRow, computing
from rlhf.models.packed.row_check import check_rows
from rlhf.models.packed.row_layout import RowLayout
from tests.fixtures.models import gradient_of
from tests.fixtures.packed_models import BRANCHES, LENGTHS, shared_and_copied
from tests.tiny_architectures import tiny_model

HYBRIDS = ["qwen3_5_text", "lfm2", "mamba", "llama4_text", "minimax", "recurrent_gemma", "gpt_oss"]


def checked(kind: str) -> Any:
    model = tiny_model(kind)
    assert check_rows(model, torch.device("cpu")) is RowLayout.SHARED_PROMPTS
    return model


@pytest.mark.parametrize(
    ("kind", "is_sharded"),
    [
        *((kind, False) for kind in HYBRIDS),
        *((kind, True) for kind in ("qwen3_5_text", "lfm2", "mamba", "minimax", "recurrent_gemma", "zamba2")),
    ],
)
def test_shared_prompts_equal_their_copies(kind: str, is_sharded: bool) -> None:
    """A sharded layer computes the sequences as a padded batch."""
    (tokens, mask), (copied, copied_mask, lengths) = shared_and_copied()
    model, plain = tiny_model(kind), checked(kind)
    for parameter in model.parameters() if is_sharded else ():
        parameter.ds_id = 0  # as DeepSpeed marks a sharded one
    assert check_rows(model, torch.device("cpu")) is RowLayout.SHARED_PROMPTS
    weights = torch.randn(int(mask.sum()))
    found = policy_logprobs(model, tokens, LENGTHS, mask=mask, branches=BRANCHES)[0][mask]
    expected = policy_logprobs(plain, copied, lengths, mask=copied_mask)[0][copied_mask]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ours, wanted = gradient_of(model, found @ weights), gradient_of(plain, expected @ weights)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_recomputed_layers_see_the_same_sequences(kind: str) -> None:
    """Two rows pass forward before the first passes backward, as in a loss over several rows."""
    (tokens, mask), (copied, copied_mask, lengths) = shared_and_copied()
    model = checked(kind)

    def loss() -> Tensor:
        first = policy_logprobs(model, tokens, LENGTHS, mask=mask, branches=BRANCHES)[0]
        return first.sum() + policy_logprobs(model, copied, lengths, mask=copied_mask)[0].square().sum()

    wanted = gradient_of(model, loss())
    enable_checkpointing(model)
    torch.testing.assert_close(gradient_of(model, loss()), wanted, rtol=1e-4, atol=1e-6)


def test_a_layer_that_mixes_tokens_is_cut_once_and_only_inside_a_packed_row() -> None:
    assert [type(mixer).__name__ for mixer in mixers_of(tiny_model("qwen3_5_text"))] == ["Qwen3_5GatedDeltaNet"]
    assert mixers_of(tiny_model("llama")) == ()
    model = tiny_model("lfm2").eval()
    (mixer,) = mixers_of(model)
    states = torch.randn(1, 5, 32)
    whole = mixer(states)
    separate_sequences(model)
    forward = mixer.forward
    separate_sequences(model)
    assert mixer.forward is forward
    assert torch.equal(mixer(states), whole)
    apart = torch.cat([mixer(states[:, :2]), mixer(states[:, 2:])], 1)
    with computing(PackedRow(lengths=[2, 3])):
        torch.testing.assert_close(mixer(states), apart)


def test_attention_outside_a_row_is_an_error() -> None:
    model = checked("llama")
    hidden_states(model, torch.arange(4), torch.tensor([4]))
    with pytest.raises(RuntimeError, match="outside the forward pass of one"):
        model(input_ids=torch.arange(4)[None])


def test_a_token_sees_only_its_chunk() -> None:
    model = tiny_model("llama4_text")
    (attention, *_) = [one for one in mixers_of(model) if one.config.layer_types[one.layer_idx] == "chunked_attention"]
    q, k, v = torch.randn(3, 1, 4, 6, 8)
    found, _ = packed_attention(attention, q, k, v, None, sequence_lengths=[6])
    expected = [
        packed_attention(torch.nn.Identity(), *parts, None, sequence_lengths=[parts[0].shape[2]])[0]
        for parts in zip(*(x.split([4, 2], 2) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(expected, 1))
