"""Every architecture is packed with the right log-probabilities and gradients, or computed sequence by sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.packed import row_check
from rlhf.models.packed.branches import Branch
from rlhf.models.packed.forward import hidden_states, policy_logprobs_only, supervised_loss
from rlhf.models.packed.row_check import check_rows
from rlhf.models.packed.row_layout import RowLayout, expected_layout, keeps_states, row_layout
from rlhf.workers.microbatches import split_microbatches
from tests.fixtures.packed_models import own_logprobs
from tests.tiny_architectures import ALL, ONE_BY_ONE, PACKS, SELDOM, SHARES_PROMPTS, VOCABULARY, tiny_config, tiny_model

CPU = torch.device("cpu")
LENGTHS = [6, 3, 8]
TYPES = [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in ALL]


def wanted_layout(name: str) -> RowLayout:
    if name in SHARES_PROMPTS:
        return RowLayout.SHARED_PROMPTS
    return RowLayout.PACKED if name in PACKS else RowLayout.ONE_BY_ONE


@pytest.mark.parametrize("name", TYPES)
def test_logprobs_and_gradients_are_those_of_each_sequence_alone(name: str) -> None:
    model = tiny_model(name).eval()
    torch.manual_seed(1)
    sequences = list(torch.randint(VOCABULARY, (sum(LENGTHS),)).split(LENGTHS))
    weights = torch.randn(sum(LENGTHS))
    expected = own_logprobs(model, sequences)
    (expected @ weights).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert check_rows(model, CPU) is wanted_layout(name)
    mask = torch.ones(sum(LENGTHS), dtype=torch.bool)
    mask[[0, 6, 9]] = False
    found = policy_logprobs_only(model, torch.cat(sequences), torch.tensor(LENGTHS), mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (found @ weights).backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and n in gradients}
    torch.testing.assert_close(ours, gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*PACKS, *ONE_BY_ONE])
def test_the_check_finds_the_layout_of_a_model_that_it_does_not_know(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights as small as in a new model suffice."""
    monkeypatch.setattr(row_check, "expected_layout", lambda config: (RowLayout.SHARED_PROMPTS, ""))
    assert check_rows(tiny_model(name, std=0.02).eval(), CPU) is wanted_layout(name)


def test_layouts_and_types_with_a_state_are_known_from_the_config() -> None:
    expected = {name: expected_layout(tiny_config(name).to_dict())[0] for name in ALL}
    assert expected == {name: wanted_layout(name) for name in ALL}
    known = {name for name in ALL if keeps_states(tiny_config(name).to_dict())}
    assert known >= {"falcon_h1", "jamba", "kimi_linear", "lfm2_moe", "mamba", "nemotron_h", "qwen3_next", "zamba2"}
    assert not known & {"gemma3_text", "gpt_oss", "llama", "llama4_text", "mixtral", "olmo3"}


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "llama"])
def test_a_supervised_step_does_not_depend_on_the_token_budget_of_microbatches(name: str) -> None:
    torch.manual_seed(1)
    lengths = [11, 4, 9, 7]
    token_ids = torch.randint(VOCABULARY, (sum(lengths),))
    starts = [0, 11, 15, 24]
    found: list[tuple[Tensor, Any]] = []
    for budget in (12, 20, 64):
        model = tiny_model(name)
        check_rows(model, CPU)
        total = torch.zeros(())
        for microbatch in split_microbatches(lengths, range(len(lengths)), max_tokens=budget, layout=row_layout(model)):
            mask = torch.tensor([int(i) not in starts for i in microbatch.tokens])
            loss, *_ = supervised_loss(
                model, token_ids[microbatch.tokens], microbatch.lengths, mask=mask, token_weight=1 / 27
            )
            loss.backward()
            total += loss.detach()
        found.append((total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_rows_that_are_not_packed_refuse_shared_prompts() -> None:
    model = tiny_model("bloom")
    check_rows(model, CPU)
    with pytest.raises(ValueError, match="cannot share prompts"):
        hidden_states(model, torch.arange(9), torch.tensor([5, 4]), [None, Branch(of=0, length=2)])


def test_a_scalar_head_is_checked_too_and_the_random_state_stays() -> None:
    config = tiny_config("qwen3_5_text", num_labels=1)
    model = transformers.AutoModelForSequenceClassification.from_config(config).train()
    before = torch.get_rng_state()
    assert check_rows(model, CPU) is RowLayout.SHARED_PROMPTS
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_head_and_weights_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    model.config.logit_scale = 0.5  # which Llama's own forward pass does not apply
    with pytest.raises(UserError, match="computes its logits in a way that this program does not know"):
        check_rows(model, CPU)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        check_rows(model, CPU)
