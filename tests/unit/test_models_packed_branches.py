"""A shared prompt gives the same values and gradients as a separate copy of the prompt for each response."""

from __future__ import annotations

import pytest
import torch
import transformers

from rlhf.models.packed.branches import Branch, positions, predecessors, trunks
from rlhf.models.packed.forward import policy_logprobs
from rlhf.models.packed.heads import token_values
from tests.fixtures.models import gradient_of
from tests.fixtures.packed_models import BRANCHES, CONFIGS, LENGTHS, VOCABULARY, make, shared_and_copied

# p q a b, p q c d e, p q c d f g, p q c d f g h, s i: the third sequence continues the second, the fourth the third
DEEP_LENGTHS = torch.tensor([4, 3, 2, 1, 2])
DEEP = (None, Branch(of=0, length=2), Branch(of=1, length=4), Branch(of=2, length=6), None)
DEEP_MASK = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool)


def test_positions_and_predecessors_follow_the_trunk() -> None:
    found = positions(LENGTHS.tolist(), BRANCHES, device=torch.device("cpu"))
    assert found.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 3, 4]
    assert predecessors(LENGTHS, BRANCHES).tolist() == [-1, 0, 1, 2, 3, 2, 5, 6, -1, 8, 9, 10, 10, 12]


def test_a_branch_of_a_branch_follows_both_trunks() -> None:
    found = positions(DEEP_LENGTHS.tolist(), DEEP, device=torch.device("cpu"))
    assert found.tolist() == [*(0, 1, 2, 3), *(2, 3, 4), *(4, 5), 6, *(0, 1)]
    assert predecessors(DEEP_LENGTHS, DEEP).tolist() == [-1, 0, 1, 2, 1, 4, 5, 5, 7, 8, -1, 10]
    held = trunks(DEEP_LENGTHS.tolist(), DEEP)
    assert held == [(), ((0, 2),), ((0, 2), (1, 2)), ((0, 2), (1, 2), (2, 2)), ()]


@pytest.mark.parametrize("branch", [Branch(of=1, length=2), Branch(of=1, length=6)])
def test_a_branch_ends_in_tokens_that_its_trunk_has_in_the_row(branch: Branch) -> None:
    with pytest.raises(ValueError, match="does not end in the 3 tokens"):
        trunks([4, 3, 1], (None, Branch(of=0, length=2), branch))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tree_has_the_logprobs_and_gradients_of_its_branches_computed_apart(name: str) -> None:
    torch.manual_seed(2)
    tokens = torch.randint(VOCABULARY, (int(DEEP_LENGTHS.sum()),))
    parts, masks = tokens.split(DEEP_LENGTHS.tolist()), DEEP_MASK.split(DEEP_LENGTHS.tolist())
    model, weights = make(name), torch.randn(int(DEEP_MASK.sum()))
    found = policy_logprobs(model, tokens, DEEP_LENGTHS, mask=DEEP_MASK, branches=DEEP)[0][DEEP_MASK]
    gradient = gradient_of(model, found @ weights)
    expected = []
    for part, mask, trunk in zip(parts, masks, trunks(DEEP_LENGTHS.tolist(), DEEP), strict=True):
        before = torch.cat([torch.zeros(0, dtype=torch.int64), *(parts[of][:count] for of, count in trunk)])
        whole, counted = torch.cat([before, part]), torch.cat([torch.zeros(len(before), dtype=torch.bool), mask])
        expected.append(policy_logprobs(model, whole, torch.tensor([len(whole)]), mask=counted)[0][counted])
    torch.testing.assert_close(found, torch.cat(expected))
    torch.testing.assert_close(gradient, gradient_of(model, torch.cat(expected) @ weights), rtol=1e-4, atol=1e-5)


def test_values_equal_those_of_copies() -> None:
    (tokens, mask), (copied, copied_mask, lengths) = shared_and_copied()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "num_labels": 1})
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    found = token_values(model, tokens, LENGTHS, BRANCHES)[mask]
    assert found.std() > 0
    torch.testing.assert_close(found, token_values(model, copied, lengths)[copied_mask])


def test_the_first_token_of_a_branch_may_be_sampled_and_that_of_a_trunk_not() -> None:
    model = make("llama")
    mask = torch.zeros(14, dtype=torch.bool)
    mask[5] = True
    assert policy_logprobs(model, torch.arange(14), LENGTHS, mask=mask, branches=BRANCHES)[0][5] < 0
    mask[8] = True
    with pytest.raises(ValueError, match="first token of a sequence"):
        policy_logprobs(model, torch.arange(14), LENGTHS, mask=mask, branches=BRANCHES)
